"""The scripts that prepare data, the data that are committed, and the links of the pages."""

import json
import re
import subprocess
import sys

from conftest import ROOT

from data.feedback_collection.prepare import is_held_out

LEFT_OUT = re.compile(r"left out (\d+: \S+ \S+)")  # how many, and the first words of the reason


def prepare(name: str, *arguments) -> str:
    """Run a prepare.py by its path; returns all that it says."""
    command = [sys.executable, ROOT / f"data/{name}/prepare.py", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def test_feedback_collection_in_every_spelling_and_held_out_by_prompt(lab):
    """Keep scores as texts, numbers or [RESULT]; a prompt is held out whatever else is in the file."""
    good = {"instruction": 'Rate.\n###Feedback: ",\n', "output": "Feedback: Good. So the overall [RESULT] 4"}
    rows = [good | {"orig_score": score} for score in ("4", 4, 4.0, "4.0", None)]
    rows += [{"instruction": " The ###Feedback: of me. ", "orig_feedback": "Bad. [RESULT] 1"}, "text", None]
    rows += [good | {"instruction": " "}, good | {"instruction": "\ud800"}, good | {"output": "[RESULT] 3"}]
    rows += [good | {"orig_score": 6}, good | {"output": "No score."}]
    rows += [{"instruction": f"{i % 98}", "output": "Good. [RESULT] 4"} for i in range(196)]
    (lab.path / "fc.json").write_text("\ufeff" + json.dumps(rows), "utf-8")
    how = ("feedback_collection", "--file", lab.path / "fc.json", "--out", lab.path, "--valid-fraction")
    said, made = prepare(*how, 0), lab.read("train.jsonl")
    same = {"prompt": "Rate.\n###Feedback:", "cot": "Good.", "score": 4}
    assert made[:5] == [{"id": f"fc-{i:06}"} | same for i in range(5)]
    assert made[5] == {"id": "fc-000005", "prompt": "The ###Feedback: of me.", "cot": "Bad.", "score": 1}
    assert "209 rows read, 202 kept, 197 of them without" in said and "valid.jsonl: is empty" in said
    assert LEFT_OUT.findall(said) == ["2: not an", "2: no text", "1: no feedback", "2: no score"]
    assert "neither in 'orig_score' nor as '[RESULT] 4' (row 11, 12)" in said

    prepare(*how, 0.3)
    train, valid = ({row["prompt"] for row in lab.read(f"{name}.jsonl")} for name in ("train", "valid"))
    alone, otherwise = ({p for p in train | valid if is_held_out(p, 0.3, seed)} for seed in (0, 1))
    assert valid == alone != otherwise and not train & valid and 15 < len(valid) < 45 < len(train)


def test_bench_items_with_one_label_or_several(lab):
    three = {"instruction": "Rate.", "gpt4_score": [3, 4], "gpt4_feedback": ["Fine. So the overall", ""]}
    one = {"instruction": "Rate.", "gpt4_score": 4, "gpt4_feedback": "Good. [RESULT]", "human_score": [5, 2]}
    items = [three, three | {"gpt4_score": None}, three | {"gpt4_feedback": ["a", "b", "c"]}, "text", one]
    file, out = lab.path / "bench.json", lab.path / "test.jsonl"
    file.write_text("\n\n".join(map(json.dumps, items)))
    said = prepare("prometheus_bench", file, "--out", out, "--train", lab.path / "train.jsonl")
    assert "5 items read, 3 kept" in said and "6 feedbacks read, 4 kept" in said
    assert LEFT_OUT.findall(said) == ["1: 'gpt4_score' is", "1: not an", "1: no text", "1: no label"]
    assert [row["score"] for row in lab.read("test.jsonl")] == [3.5, 3.5, 4]
    made = [(row["id"][-6:], row["cot"], row["score"]) for row in lab.read("train.jsonl")]
    assert made == [("0000-1", "Fine.", 3), ("0002-1", "a", 3), ("0002-2", "b", 4), ("0004-1", "Good.", 4)]
    prepare("prometheus_bench", file, "--out", out, "--label", "human_score")
    assert lab.read("test.jsonl") == [{"id": "bench-0004", "prompt": "Rate.", "score": 3.5}]
    for wrong in ("1: [1, 2", '2: {"a": 1}\n{"b"', " no rows: []", " nothing to keep: [{}]"):
        message, _, text = wrong.partition(": ")
        file.write_text(text)
        assert f"bench.json:{message}" in prepare("prometheus_bench", file, "--out", lab.path / "none")
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
    lab.write("other.jsonl", [{"texts": ["Who?", ""]}])
    how = (
        "feedbackqa",
        "--file",
        lab.path / "items.json",
        "--without",
        lab.path / "other.jsonl",
        "--max-words",
        3,
    )
    said = prepare(*how, "--out", lab.path / "one.jsonl")
    assert LEFT_OUT.findall(said) == ["1: not an", "1: an empty", "1: a question"]
    (record,) = lab.read("one.jsonl")
    assert record["prompt"].endswith("Question: Why?\n\nPassage (Why?): one two three …")
    assert (record["id"], record["score"], record["ratings"]) == ("fq-0000", 2.67, [4, 1, 3])
    prepare(*how, "--all-raters", "--out", lab.path / "each.jsonl")
    each = lab.read("each.jsonl")
    assert [r["cot"] for r in each] == ["It says why.", "It does not.", "It does, in part."]
    assert record["cot"] in [r["cot"] for r in each] and len({r["id"] for r in each}) == 3


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
    said = prepare(*how, lab.path / "made.jsonl")
    assert LEFT_OUT.findall(said) == ["1: a pair", "1: no gold"]
    (record,) = lab.read("made.jsonl")
    only = "Only in 1: well. Only in 2: in a chair; outside."
    assert record["cot"] == f"A man / A man: same, 5. sleeps / 's asleep: 1 says more, 4. {only}"
    assert (record["id"], record["score"]) == ("images-1", 3.75)
    assert record["prompt"].endswith("1: A man sleeps (well).\n2: A man's asleep in a chair, outside.")
    assert "nothing to keep" in prepare(*how, lab.path / "again.jsonl", "--without", lab.path / "made.jsonl")
    (lab.path / "gold.tsv").write_text("4\tonly one sentence\n")
    assert "gold.tsv:1: not score, sentence, sentence" in prepare(*how, lab.path / "again.jsonl")


def test_committed_tiny_data_is_what_its_script_makes(lab):
    for targets in ("rating", "real"):
        prepare("tiny", "--out", lab.path, "--targets", targets)
    committed = {path.name: path.read_bytes() for path in (ROOT / "data/tiny").glob("*.jsonl")}
    assert committed == {path.name: path.read_bytes() for path in lab.path.iterdir()} and len(committed) == 8


def test_the_readme_is_short_and_links_lead_to_what_they_name():
    assert len((ROOT / "README.md").read_bytes()) <= 13_700
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for text, target in re.findall(r"\[([^]]*)\]\((?!http)([^)#]+)", page.read_text("utf-8")):
            linked = page.parent / target
            assert linked.exists(), f"{page.name}: {target}"
            for name in re.findall(r"`(\w+)`", text) if target.endswith(".py") else ():
                assert re.search(rf"^(def|class) {name}\b", linked.read_text("utf-8"), re.M), name
