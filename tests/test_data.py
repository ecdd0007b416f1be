"""The scripts that prepare data, the data that are committed, and the links of the pages."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from data.pairs.prepare import convert, names_of
from data.prepare_helpers import clean_cot, is_held_out, read_feedback, read_hub, read_items
from tract.records import Grid, InputError, read_records

LEFT_OUT = re.compile(r"left out (\d+: \S+ \S+)")  # how many, and the first words of the reason


def prepare(lab, name: str, *arguments) -> str:
    """Run a prepare.py; returns all that it says."""
    lab.capsys.readouterr()
    with contextlib.suppress(SystemExit):
        lab.run(f"data.{name}.prepare", *arguments)
    said = lab.capsys.readouterr()
    return said.out + said.err


def test_feedback_collection_in_every_spelling_and_held_out_by_instruction(lab):
    """Keep scores as texts, numbers or [RESULT]; what is held out depends on the instruction alone."""
    good = {"instruction": 'Rate.\n###Feedback: ",\n', "output": "Feedback: Good. So the overall [RESULT] 4"}
    rows = [good | {"orig_score": score} for score in ("4", 4, 4.0, "4.0", None)]
    rows += [{"instruction": " The ###Feedback: of me. ", "orig_feedback": "Bad. [RESULT] 1"}, "text", None]
    rows += [good | {"instruction": " "}, good | {"instruction": "\ud800"}, good | {"output": "[RESULT] 3"}]
    rows += [good | {"orig_score": 6}, good | {"output": "No score."}]
    rendered = "###The instruction to evaluate:\n{} \n\n###Response to evaluate:\n{}\n\n###Feedback:"
    rows += [
        {"instruction": rendered.format(i % 49, i), "output": "Good. [RESULT] 4"}
        | ({"orig_instruction": f" {i % 49}"} if i % 2 else {})
        for i in range(196)
    ]
    (lab.path / "fc.json").write_text("\ufeff" + json.dumps(rows), "utf-8")
    how = ("feedback_collection", lab.path / "fc.json", "--valid-fraction")
    said, made = prepare(lab, *how, 0, "--out", lab.path / "all"), lab.read("all/train.jsonl")
    same = {"prompt": "Rate.\n###Feedback:", "cot": "Good.", "score": 4}
    assert made[:5] == [{"id": f"fc-{i:06}"} | same for i in range(5)]
    assert made[5] == {"id": "fc-000005", "prompt": "The ###Feedback: of me.", "cot": "Bad.", "score": 1}
    assert "209 rows read, 202 kept, 197 of them without" in said and "valid.jsonl: is empty" in said
    assert LEFT_OUT.findall(said) == ["2: not an", "2: no text", "1: no feedback", "2: no score"]
    assert "neither in 'orig_score' nor as '[RESULT] 4' (row 11, 12)" in said

    prepare(lab, *how, 0.3, "--out", lab.path)
    instructions = re.compile(r"instruction to evaluate:\\n(\d+)")  # as JSON writes it
    texts = [(lab.path / f"{side}.jsonl").read_text() for side in ("train", "valid")]
    train, valid = (set(instructions.findall(text)) for text in texts)
    alone, otherwise = ({p for p in train | valid if is_held_out(p, 0.3, seed)} for seed in (0, 1))
    assert valid == alone != otherwise and not train & valid and 7 < len(valid) < 24 < len(train)


@pytest.mark.parametrize(
    ("feedback", "label", "made"),
    [
        ("Feedback: Good. [RESULT] 4.", None, ("Good.", 4)),
        ("Good. [RESULT] **4/5**", None, ("Good.", 4)),
        ("Good. [RESULT] 4 [RESULT] Score: 4.0", None, ("Good.", 4)),
        ("Good. [RESULT] 4. So the overall score is 4.", None, ("Good.", 4)),
        ("Good. [RESULT] 4 [RESULT] 5", None, "disagree"),
        ("Good. [RESULT] 4", 5, "disagree"),
        ("Good. So the overall score is 3. [RESULT] 4", 4, "disagree"),
        ("Good. [RESULT] 4.5", 4, "disagree"),
        ("Good. [RESULT] 5/10", None, "a verdict amid"),
        ("Good. [RESULT] 4-5", None, "a verdict amid"),
        ("It prints [RESULT] 4 as asked. So the overall score is 4. [RESULT] 4", 4, "a verdict amid"),
        ("Good, so the overall score is 4 out of 5, for 2 faults. [RESULT] 4", 4, ("Good,", 4)),
        ("Fine.\n###Score: 4", 4, ("Fine.", 4)),
        ("Fine. 3/5", 4, "disagree"),
        ("Fine. I would give it a 4.", 4, ("Fine.", 4)),
        ("Fine. So the overall tone is warm. So the overall score is 4.", 4, ("Fine.", 4)),
        ("It costs 4.5, at least 3.", 4, ("It costs 4.5, at least 3.", 4)),
        ("Score: 4. [RESULT] 4", 4, "no feedback"),
    ],
)
def test_a_feedback_is_cut_at_its_verdict_and_left_out_where_it_is_ambiguous(feedback, label, made):
    found = read_feedback(feedback, label)
    assert made in found if isinstance(made, str) else (found["cot"], found["score"]) == made


def test_a_cot_is_cut_at_the_last_announcement():
    early = "It prints [RESULT]. So the overall tone is fine. But it errs."
    assert clean_cot(f"Feedback: {early} So the overall score is 4. [RESULT] 4", Grid()) == early
    assert clean_cot("So the overall tone is fine. But it errs. [RESULT] 2", Grid()).endswith("But it errs.")
    whole = "So the overall score depends on 2 things: style and facts. The style is good."
    assert clean_cot(f"Right. {whole}", Grid()) == f"Right. {whole}"
    assert clean_cot("Right. Thus the final score would be 4, for style. It is good.", Grid()) == "Right."
    assert clean_cot("Right. So the overall score for 2 faults is a 3. Good.", Grid()) == "Right."
    assert clean_cot("Fine work. I give it a B.", Grid.parse("A=1,B=2")) == "Fine work."


def test_bench_items_with_one_label_or_several(lab):
    three = {"instruction": "Rate.", "gpt4_score": [3, 4], "gpt4_feedback": ["Fine. So the overall", ""]}
    one = {"instruction": "Rate.", "gpt4_score": 4, "gpt4_feedback": "Good. [RESULT]", "human_score": [5, 2]}
    items = [three, three | {"gpt4_score": None}, three | {"gpt4_feedback": ["a", "b", "c"]}, "text", one]
    file, out = lab.path / "bench.json", lab.path / "test.jsonl"
    file.write_text("\n\n".join(map(json.dumps, items)))
    said = prepare(lab, "prometheus_bench", file, "--out", out, "--train", lab.path / "train.jsonl")
    assert "5 items read, 3 kept" in said and "6 feedbacks read, 4 kept" in said
    assert LEFT_OUT.findall(said) == ["1: 'gpt4_score' is", "1: not an", "1: no text", "1: no label"]
    assert [row["score"] for row in lab.read("test.jsonl")] == [3.5, 3.5, 4]
    made = [(row["id"][-6:], row["cot"], row["score"]) for row in lab.read("train.jsonl")]
    assert made == [("0000-1", "Fine.", 3), ("0002-1", "a", 3), ("0002-2", "b", 4), ("0004-1", "Good.", 4)]
    prepare(lab, "prometheus_bench", file, "--out", lab.path / "human.jsonl", "--label", "human_score")
    assert lab.read("human.jsonl") == [{"id": "bench-0004", "prompt": "Rate.", "score": 3.5}]
    for wrong in ("1: [1, 2", '2: {"a": 1}\n{"b"', " no rows: []", " nothing to keep: [{}]"):
        message, _, text = wrong.partition(": ")
        file.write_text(text)
        assert f"bench.json:{message}" in prepare(lab, "prometheus_bench", file, "--out", lab.path / "none")
    assert not (lab.path / "none").exists()


def test_feedbackqa_averages_raters_and_takes_the_explanation_of_one_or_of_each(lab):
    """Words of the ratings become numbers; a broken item or a question of another file is left out."""
    page = {
        "page_title": "Covid",
        "section_headers": ["Masks", "Why?"],
        "section_content": "one  two\nthree four",
    }
    item = {
        "question": " Why? ",
        "passage": {"reference": page},
        "rating": ["Excellent", "Bad", "Acceptable"],
    }
    item |= {"feedback": [" It says why. ", "It does not.", "It does, in part."], "domain": "WHO"}
    items = [
        item,
        item | {"rating": ["Superb"] * 3},
        item | {"feedback": ["Alone."]},
        item | {"question": "WHO?"},
    ]
    (lab.path / "items.json").write_text(json.dumps(items))
    lab.write("other.jsonl", [{"texts": ["Who?", "Health\u2028Organization"]}])  # which ends no line
    how = (
        "feedbackqa",
        lab.path / "items.json",
        "--without",
        lab.path / "other.jsonl",
        "--max-words",
        3,
    )
    said = prepare(lab, *how, "--out", lab.path / "one.jsonl")
    assert LEFT_OUT.findall(said) == ["1: not an", "1: an empty", "1: a question"]
    (record,) = lab.read("one.jsonl")
    assert record["prompt"].endswith("Question: Why?\n\nPassage (Why?): one two three …")
    assert (record["id"], record["score"], record["ratings"]) == ("fq-0000", 2.67, [4, 1, 3])
    prepare(lab, *how, "--all-raters", "--out", lab.path / "each.jsonl")
    each = lab.read("each.jsonl")
    assert [r["cot"] for r in each] == ["It says why.", "It does not.", "It does, in part."]
    assert record["cot"] in [r["cot"] for r in each] and len({r["id"] for r in each}) == 3
    for name, message in (("missing", "missing: no such file"), ("items.json", "row 0 has no two 'texts'")):
        said = prepare(lab, "feedbackqa", how[1], "--out", lab.path / "no", "--without", lab.path / name)
        assert message in said and said.count("\n") == 1


def test_interpretable_sts_puts_alignments_into_words_and_averages_scores(lab):
    """The order is that of the first sentence; a pair without score, twice or in --without is left out."""
    aligned = """<sentence id="{}" status="">
// A man sleeps -LRB- well -RRB- .
// A man 's asleep in a chair , outside .
<alignment>
0 <==> 5 6 7 // NOALI // NIL // -not aligned- <==> in a chair
0 <==> 9 // NOALI // NIL // -not aligned- <==> outside
3 <==> 3 4 // SPE1_FACT // 4 // sleeps <==> 's asleep
1 2 <==> 1 2 // EQUI // 5 // A man <==> A man
5 <==> 0 // NOALI // NIL // -LRB- well -RRB- <==> -not aligned-
7 <==> 0 // NOALI // NIL // . <==> -not aligned-
</alignment>
</sentence>
"""
    other = aligned.replace("sleeps", "rests")
    (lab.path / "STSint.input.images.wa").write_text(aligned.format(1) + aligned.format(2) + other.format(3))
    gold = "{}\tA man sleeps (well).\tA man's asleep in a chair, outside.\n"
    (lab.path / "gold.tsv").write_text(
        gold.format(4) + gold.format(3.5) + gold.format("").replace("A", "The")
    )
    how = ("ists", "--alignments", lab.path, "--gold", lab.path, "--out")
    said = prepare(lab, *how, lab.path / "made.jsonl")
    assert LEFT_OUT.findall(said) == ["1: a pair", "1: no gold"]
    (record,) = lab.read("made.jsonl")
    only = "Only in 1: well. Only in 2: in a chair; outside."
    assert record["cot"] == f"A man / A man: same, 5. sleeps / 's asleep: 1 says more, 4. {only}"
    assert (record["id"], record["score"]) == ("images-1", 3.75)
    assert record["prompt"].endswith("1: A man sleeps (well).\n2: A man's asleep in a chair, outside.")
    again = lab.path / "again.jsonl"
    assert "nothing to keep" in prepare(lab, *how, again, "--without", lab.path / "made.jsonl")
    (lab.path / "gold.tsv").write_text("4\tonly one sentence\n")
    assert "gold.tsv:1: not score, sentence, sentence" in prepare(lab, *how, again)


def test_saf_leaves_out_what_is_empty_there_already_or_in_a_test(lab):
    """No answer is there twice, whatever its case and punctuation; a test's answer is not in training."""
    answer = (
        '<studentAnswer id="{}"><response>{}</response>'
        "<response_feedback>{}</response_feedback><score>{}</score></studentAnswer>"
    )
    answers = {
        "training/2.1_A": [
            ("A1", "It is\n\t one two   three.", "Right.", " 1"),
            ("A2", "it is: one, two, three", "Good.", 1),  # there already
            ("A3", "It is one two three!", "Fine.", 0.5),  # and graded otherwise
            ("A4", " No Submission. ", "Empty.", 0),
            ("A5", " ", "Empty.", 0),
            ("A6", "Two &lt; 3", "Not bad. Score: 0.75", 0.75),
            ("A7", "In the test.", "Right.", 1),
            ("A8", "All else", "Wrong.", 1.5),
        ],
        "training/2.2_B": [
            ("B1", "In the test.", "It names 3 of 4.", 0.875)
        ],  # an answer to another question
        "unseen_answers/2.1_A": [("A9", "in the TEST", "Right.", 1)],
        "unseen_questions/3.1_C": [("C1", "No response", "Empty.", 0), ("C2", "Yes.", "Too short.", 0.125)],
    }
    for name, of_question in answers.items():
        path = lab.path / f"{name}.xml"
        path.parent.mkdir(exist_ok=True)
        reference = (
            "<referenceAnswers><referenceAnswer>one two three four</referenceAnswer></referenceAnswers>"
        )
        students = "".join(answer.format(*row) for row in of_question)
        asks = f"<questionText>What is {name}?</questionText>".replace("unseen_answers", "training")
        path.write_text(f'<question id="2.1">{asks}{reference}{students}</question>')

    said = prepare(lab, "saf", lab.path, "--out", lab.path / "made", "--max-words", 3, "--valid-size", 1)
    assert [line for line in said.splitlines() if line.startswith("left out")] == [
        "left out 1: an empty submission (id C1)",
        "left out 1: in training already, with the same score (id A2)",
        "left out 1: in training already, with another score (id A3)",
        "left out 2: an empty submission (id A4, A5)",
        "left out 1: a feedback that ends in a number, as if it held the score (id A6)",
        "left out 1: in unseen_answers already, with the same score (id A7)",
        "left out 1: no id, no feedback or no score from 0 to 1 (id A8)",
    ]
    grid = Grid.parse("1=0,2=0.25,3=0.5,4=0.75,5=1")
    made = {}
    for name in ("train", "valid", "unseen_answers", "unseen_questions"):
        need = ("id", "prompt", "cot", "score", "texts", "question")
        made[name] = read_records(lab.path / f"made/{name}.jsonl", grid, need)
    assert [row["id"] for rows in list(made.values())[2:] for row in rows] == ["A9", "C2"]
    first, second = sorted(made["train"] + made["valid"], key=lambda row: row["id"])
    assert (first["id"], first["score"], first["question"]) == ("A1", 1, "2.1_A")
    assert (second["id"], second["score"], second["question"]) == ("B1", 0.875, "2.2_B")
    assert first["texts"] == ["one two three […]", "It is one […]"]
    assert f"{first['instruction']}\nReference answer: one two three […]\nAnswer: It is" in first["prompt"]
    assert "train.jsonl: 1 records, 1 with texts cut to 3 words" in said

    said = prepare(lab, "saf", lab.path, "--out", lab.path / "again", "--valid-size", 2)
    assert "--valid-size 2: all 2 answers; give a smaller one" in said
    for text, message in (("<q>\n</p>", "line 2"), ('<?xml version="1.0" encoding="a"?><q/>', "encoding")):
        (lab.path / "training/2.2_B.xml").write_text(text)
        said = prepare(lab, "saf", lab.path, "--out", lab.path / "again").splitlines()[-1]
        assert "2.2_B.xml: no XML (" in said and message in said and not any((lab.path / "again").iterdir())


def test_committed_tiny_data_is_what_its_script_makes(lab):
    for targets in ("rating", "real"):
        command = [sys.executable, ROOT / "data/tiny/prepare.py", "--out", lab.path, "--targets", targets]
        subprocess.run(command, check=True)
    committed = {path.name: path.read_bytes() for path in (ROOT / "data/tiny").glob("*.jsonl")}
    assert committed == {path.name: path.read_bytes() for path in lab.path.iterdir()} and len(committed) == 8


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("feedback_collection.prepare", "none.json --out {}/train.jsonl"),
        ("feedback_collection.prepare", "none.json --out {}/valid.jsonl"),
        ("feedbackqa.prepare", "none.json --out {}/made.jsonl"),
        ("ists.prepare", "--alignments none --gold none --out {}/made.jsonl"),
        ("ists.prepare", "--alignments none --gold none --out {}/new.jsonl --valid {}/made.jsonl"),
        ("own.prepare", "none.csv --out {}/made.jsonl"),
        ("own.prepare", "none.csv --valid-fraction 0.1 --out {}/valid.jsonl"),
        ("pairs.prepare", "none.json --out {}/made.jsonl"),
        ("prometheus_bench.prepare", "none.json --out {}/made.jsonl"),
        ("prometheus_bench.prepare", "none.json --out {}/new.jsonl --train {}/made.jsonl"),
        ("saf.prepare", "none --out {}/train.jsonl"),
        ("saf.prepare", "none --out {}/unseen_questions.jsonl"),
        ("smollm2.prepare", "--out {}/made"),
        ("tiny.prepare", "--out {}/test.jsonl"),
        ("tiny.make_seed", "--steps 1 --out {}/made"),
    ],
)
def test_nothing_is_written_over(lab, script, words):
    """Refuse each output that is there, before anything is read; what is in it stays."""
    *options, out = words.format(lab.path, lab.path).split()
    kept = Path(out)
    if script.split(".")[0] in ("feedback_collection", "saf", "tiny") and kept.suffix:
        options.append(str(kept.parent))  # --out is a folder
    else:
        options.append(out)
    if kept.suffix:
        kept.write_text("mine")
    else:
        kept.mkdir()
        kept = kept / "notes.txt"
        kept.write_text("mine")
    code, said = lab.fail(f"data.{script}", *options)
    assert code == 2 and f"{out}: is there already" in said and said.count("\n") == 1
    assert [path for path in lab.path.rglob("*") if path.is_file()] == [kept] and kept.read_text() == "mine"


def test_of_two_files_both_are_written_or_none(lab):
    file, out = lab.path / "bench.json", lab.path / "test.jsonl"
    file.write_text('[{"instruction": "Rate.", "gpt4_score": 3, "gpt4_feedback": "Fine."}]')
    (lab.path / ".test.jsonl.tmp").mkdir()  # so that it can't be written
    how = ("data.prometheus_bench.prepare", file, "--out", out, "--train")
    assert lab.fail(*how, lab.path / "train.jsonl")[0] == 1
    assert lab.fail(*how, out) == (2, f"{out}: given for two outputs; choose two names\n")
    assert {path.name for path in lab.path.iterdir()} == {"bench.json", ".test.jsonl.tmp"}


def test_the_seed_model_appears_whole_and_spares_what_stands_beside_it(lab):
    kept = lab.write("seed.part", lab.rows[:1])
    lab.run("data.tiny.make_seed", "--out", lab.path / "seed", "--steps", 1, "--hidden", 64, "--layers", 1)
    assert {path.name for path in lab.path.iterdir()} == {"seed", "seed.part"} and kept.is_file()
    assert {path.stat().st_mode & 0o044 for path in (lab.path / "seed").iterdir()} == {
        0o044
    }  # for all to read


def test_files_of_pairs_are_told_apart_and_labels_read_in_every_spelling(tmp_path):
    same = ["Natural/dataset.json", "Adversarial/Neighbor/dataset.json", "Manual.json"]
    assert names_of(same) == ["Natural", "Neighbor", "Manual"]
    assert names_of(["a/x/d.json", "b/x/d.json"]) == ["a/x/d.json", "b/x/d.json"]
    with pytest.raises(InputError, match="given twice"):
        names_of(["d.json", "./d.json"])
    row = {"input": "Hi", "output_1": "Hello.", "output_2": "No."}
    chosen = {1.0: "Hello.", "1": "Hello.", 2: "No.", "2.0": "No."}
    for label, text in chosen.items():
        assert convert(row | {"label": label}, "p", "f", "r")[0]["response"] == text
    for label in (True, None, 0, 3, 1.5, "A", [1], {}):
        assert convert(row | {"label": label}, "p", "f", "r") == "'label' is neither 1 nor 2"


@pytest.mark.parametrize("script", sorted(ROOT.glob("data/*/prepare.py")), ids=lambda path: path.parent.name)
def test_every_prepare_starts_by_its_path(script, tmp_path):
    subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, check=True, capture_output=True)


@pytest.mark.parametrize("endpoint", [None, "https://mirror.org"])
def test_the_hub_is_asked_where_it_is(endpoint, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    if endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
    asked = []

    def open_address(address, timeout):
        asked.append(address)
        return io.BytesIO()

    monkeypatch.setattr("urllib.request.urlopen", open_address)
    monkeypatch.setattr("datasets.load_dataset", lambda hub_id, split: [hub_id, split])
    assert read_hub("a/b", "train", "b.json", "b/prepare.py") == ["a/b", "train"]
    assert asked == [f"{endpoint or 'https://huggingface.co'}/api/datasets/a/b"]


@pytest.mark.parametrize("address", ["", " ", "mirror.org"])
def test_a_hub_address_without_scheme_is_refused(address, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(InputError, match="unset it, or write it with its scheme"):
        read_hub("a/b", "train", "b.json", "b/prepare.py")


def test_a_pipe_is_a_file_and_a_folder_is_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", "echo '[1]' > pipe"], cwd=tmp_path):
        assert read_items(tmp_path / "pipe") == [1]
    with pytest.raises(InputError, match="give a file"):
        read_items(tmp_path)


def test_the_readme_is_short_and_links_lead_to_what_they_name():
    assert len((ROOT / "README.md").read_bytes()) <= 12_288
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/*/*.md")]:
        for text, target in re.findall(r"\[([^]]*)\]\((?!http)([^)#]+)", page.read_text("utf-8")):
            linked = page.parent / target
            assert linked.exists(), f"{page.name}: {target}"
            for name in re.findall(r"`(\w+)`", text) if target.endswith(".py") else ():
                assert re.search(rf"^(def|class) {name}\b", linked.read_text("utf-8"), re.M), name
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", page.read_text("utf-8")):
            linked = page.parent / target if target else page
            headings = re.findall(r"^#+ (.*)$", linked.read_text("utf-8"), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page.name}: {target}#{anchor}"


def test_the_readme_shows_what_the_demo_printed():
    front = (ROOT / "README.md").read_text("utf-8")
    quoted = (ROOT / "results/demo/quoted.jsonl").read_text("utf-8").splitlines()
    _, p_s, p_tract = map(json.loads, quoted)
    assert (
        f"p_s predicts {p_s['prediction']:.2f}" in front and f'"prediction": {p_tract["prediction"]}' in front
    )
    assert str(p_tract["score_probs"]) in front
    printed = (ROOT / "results/demo/table.txt").read_text("utf-8").splitlines()
    shown = re.findall(r"^    (\|.*)$", (ROOT / "README.md").read_text("utf-8"), re.M)
    assert shown and set(shown) <= set(printed)
