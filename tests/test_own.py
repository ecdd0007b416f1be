"""Data of one's own become records that the stages take; what can't be one is counted with the reason."""

import json
from datetime import date

import datasets
import pytest

from tract.records import Grid, read_records

TABLE = """\ufeffno;My question;answer;points;mark 2;topic
1.0;"Say ""hi"";
twice";Hi, hi; 3.5 ;;a
007;Why?;NA;4,5;5;a
3;Why?;;4;4;a
4;Why?;So;;4;a
5;Why?;So;4/5;4;a
6;Why?;So;6;4;a
1;Why?;So;1;4;a
;Why?;So;1.0;2;b;cell
;Why?;So;2;2;b
"""
FIELDS = ["--map", "instruction=My question", "response=answer", "--set", "rubric=Is it right?"]
MAPPED = [*FIELDS, "--map", "id=no", "score=points"]


def prepare(lab, source, *options, out="made.jsonl"):
    """Run prepare.py on lab.path/source; returns its records and all that it said."""
    lab.capsys.readouterr()
    lab.run("data.own.prepare", lab.path / source, *options, "--out", lab.path / out)
    return lab.read(out), lab.capsys.readouterr().out


def test_a_table_as_spreadsheets_write_it(lab):
    """Keep texts as they are, read numbers in every spelling, name row and reason of what is left out."""
    (lab.path / "Table.CSV").write_text(TABLE, "utf-8")
    made, said = prepare(lab, "Table.CSV", *MAPPED, "--ratings", "mark 2")
    rubric = {"rubric": "Is it right?"}
    assert made == [
        {"id": "007", "instruction": "Why?", "response": "NA", "score": 4.5, "ratings": [5]} | rubric,
        {"id": "1", "instruction": "Why?", "response": "So", "score": 1, "ratings": [4]} | rubric,
        {"id": "Table-10", "instruction": "Why?", "response": "So", "score": 2, "ratings": [2]} | rubric,
    ]
    reasons = [line for line in said.splitlines() if line.startswith("left out")]
    assert reasons == [
        "left out 2: a score or rating that is no number (row 2, 6)",  # no rating at all in row 2
        "left out 1: nothing in 'answer' (row 4)",
        "left out 1: nothing in 'points' (row 5)",
        "left out 1: a score or rating outside 1 to 5, the scale of --grid (row 7)",
        "left out 1: no object, or more cells than the header has (row 9)",
    ]
    assert "not used: 'topic'" in said and "9 rows read, 3 kept" in said

    made, said = prepare(lab, "Table.CSV", *MAPPED, "--grid", "0=0,1=10", out="ten.jsonl")
    assert [(row["id"], row["score"]) for row in made] == [
        ("1", 3.5),
        ("007", 4.5),
        ("6", 6),
        ("Table-10", 2),
    ]
    assert made[0]["instruction"] == 'Say "hi";\ntwice' and "an id that an earlier row has (row 8)" in said


def test_empty_lines_of_a_table_count_but_are_no_rows(lab):
    (lab.path / "t.csv").write_text(
        "prompt,score,,\np1,1,,\n\np2,2,,\n\n\np3,9,,\n"
    )  # and columns without name
    made, said = prepare(lab, "t.csv")
    assert [row["id"] for row in made] == ["t-2", "t-4"] and "3 rows read, 2 kept" in said
    assert "the scale of --grid (row 7)" in said
    made, _ = prepare(
        lab, "t.csv", "--map", "instruction=prompt", "--set", "response=So.", "rubric=?", "score=3", out="s"
    )
    assert [row["score"] for row in made] == [3, 3, 3]


def test_every_kind_of_file_gives_the_same_records(lab, monkeypatch):
    """Integers beside gaps are floats in Parquet; the mean of the ratings that are there is the score."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", lab.path / "cache")
    columns = {"id": [1.0, None], "prompt": ["Judge.", "Judge it."], "a": [4.0, 2.0], "b": [None, 5.0]}
    columns |= {"c": [4.5, 4.0], "cot": ["Fine. Score: 4", "Good."], "day": [7.0, None]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    data = datasets.Dataset.from_dict(columns)
    data.to_parquet(lab.path / "mine.parquet")
    datasets.DatasetDict(test=data).save_to_disk(lab.path / "mine")
    lab.write("mine.jsonl", rows)
    (lab.path / "mine.json").write_text(json.dumps(rows))
    data.to_pandas().to_csv(lab.path / "mine.csv", index=False)
    data.to_pandas().to_csv(lab.path / "mine.tsv", index=False, sep="\t")
    options = ["--ratings", "a", "b", "c", "--split", "test", "--map", "day=day"]
    expected = [
        {"id": "1", "day": 7, "prompt": "Judge.", "cot": "Fine.", "ratings": [4, 4.5], "score": 4.25},
        {"id": "mine-2", "prompt": "Judge it.", "cot": "Good.", "ratings": [2, 5, 4], "score": 3.666667},
    ]
    for source in ("mine.parquet", "mine", "mine.jsonl", "mine.json"):
        assert prepare(lab, source, *options, out=f"out/{source}.jsonl")[0] == expected
        assert '"ratings": [4, 4.5]' in (lab.path / f"out/{source}.jsonl").read_text()  # not 4.0
    for source in ("mine.csv", "mine.tsv"):  # where all cells are texts, and the header is row 1
        made, said = prepare(lab, source, *options, out=f"out/{source}.jsonl")
        assert "1 rows with a CoT that was cut where it announces its score: 2\n" in said
        assert made == [expected[0] | {"day": "7.0"}, expected[1] | {"id": "mine-3"}]
    assert read_records(lab.path / "out/mine.csv.jsonl", Grid(), ("id", "prompt", "cot", "score"))


def test_what_is_cut_away_or_not_taken_is_said(lab):
    """A column `ratings` stands back where --ratings names others; a CoT may be nothing but its verdict."""
    row = {"prompt": "Judge.", "a": 1, "b": 2, "ratings": [5, 5], "score": 5, "cot": "Fine."}
    lab.write("mine.jsonl", [row, row | {"cot": "Score: 4"}])
    made, said = prepare(lab, "mine.jsonl", "--ratings", "a", "b")
    assert made[0]["ratings"] == [1, 2] and made[0]["score"] == 1.5 and "not used: 'ratings', 'score'" in said
    assert "left out 1: a text in 'cot' that only announces a score (row 2)" in said and "was cut" not in said


def test_a_mapped_column_is_not_taken_again_and_dates_become_texts(lab, monkeypatch):
    """Take `prompt`, which is the instruction here, for that alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", lab.path / "cache")
    columns = {"prompt": ["Why?"], "response": ["So."], "rubric": ["Is it?"], "day": [date(2026, 1, 31)]}
    datasets.Dataset.from_dict(columns).to_parquet(lab.path / "mine.parquet")
    made, _ = prepare(
        lab, "mine.parquet", "--map", "instruction=prompt", "day=day", "--set", "rubric=Is it right?"
    )
    expected = {"id": "mine-1", "rubric": "Is it right?", "instruction": "Why?", "day": "2026-01-31"}
    assert made == [expected | {"response": "So."}]


@pytest.mark.parametrize("column", ["instruction", "topic"])
def test_what_belongs_together_is_held_out_together(lab, column):
    """A prompt or a --group is on one side, the same in any order and beside any other rows."""
    rows = []
    for i in range(200):
        row = {"id": str(i), "instruction": f"Say  {i % 40}", "topic": f"t{i % 25}"}
        rows.append(row | {"response": "x", "rubric": "r"})
    lab.write("mine.jsonl", rows)
    lab.write("half.jsonl", rows[:99:-1])
    options = ["--valid-fraction", 0.3, *(["--group", "topic"] if column == "topic" else [])]
    held_out = {}
    for name in ("mine", "half"):
        kept, _ = prepare(lab, f"{name}.jsonl", *options, out=f"{name}/train.jsonl")
        valid = lab.read(f"{name}/valid.jsonl")
        group = {row["id"]: row[column] for row in rows}
        held_out[name] = {group[row["id"]] for row in valid}
        assert not held_out[name] & {group[row["id"]] for row in kept}
        assert len(kept) + len(valid) == len(rows) // (1 if name == "mine" else 2)
    assert held_out["mine"] == held_out["half"] and 3 < len(held_out["mine"]) < 20


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("t.csv", ["--map", "response=text"], "has no column 'text'; its columns are 'instruction', 'a=b'"),
        ("t.csv", ["--group", "no"], "has no column 'no'"),
        ("t.csv", ["--map", "response=a=b"], "nothing to keep, row 2: field 'rubric' is missing; a record"),
        ("t.csv", [*FIELDS[3:], "--map", "response"], "argument --map: invalid pair value: 'response'"),
        (
            "t.csv",
            [*FIELDS[3:], "--map", "response=a=b", "--valid-fraction", 1],
            "made.jsonl: would be empty",
        ),
        ("t.csv", ["--grid", "1,x"], "--grid 1,x: give numbers"),
        ("t.csv", ["--map", "ratings=a=b"], "row 2: 'ratings' is no list; name the columns"),
        ("t.csv", ["--map", "response=a=b", "--set", "response=No."], "response: is in --map and in --set"),
        ("t.csv", ["--map", "ratings=a=b", "--ratings", "a=b"], "ratings: is in --map, and --ratings names"),
        ("cut.csv", [], "can't be read (Error: unexpected end of data)"),
        ("two.csv", [], "two columns are called 'response'"),
        ("latin.csv", [], "can't be read (UnicodeDecodeError"),
        ("none.csv", [], "none.csv: can't be read (FileNotFoundError"),
        ("t.xlsx", [], "can't be read (ValueError: a format that is not known, '.xlsx'); give .csv"),
        ("none.json", [], "none.json: no such file"),
        ("data", [], "no split 'train' but test; see --split"),
        ("own/data", [], "own/data: can't be had from the hub ("),
    ],
)
def test_what_makes_no_sense_gets_one_line(lab, monkeypatch, file, options, message):
    monkeypatch.chdir(lab.path)
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:9")  # where no hub is
    (lab.path / "t.csv").write_text("instruction,a=b\nSay.,yes\n")
    (lab.path / "t.xlsx").write_text("instruction,a=b\nSay.,yes\n")
    (lab.path / "cut.csv").write_text('instruction,response\nSay.,"yes\n')
    (lab.path / "two.csv").write_text("instruction,response,response\nSay.,yes,no\n")
    (lab.path / "latin.csv").write_text("instruction,response\nSay.,ö\n", "latin-1")
    datasets.DatasetDict(test=datasets.Dataset.from_dict({"a": [1]})).save_to_disk("data")
    code, said = lab.fail("data.own.prepare", file, *options, "--out", "made.jsonl")
    assert code == 2 and message in said.strip().splitlines()[-1]
    assert not list(lab.path.glob("made*")) and not list(lab.path.glob("valid*"))
