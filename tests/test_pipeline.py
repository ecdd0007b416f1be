"""The stages chained by their files, and what makes no sense is refused."""

import doctest
import json
import re
import subprocess

import pytest
from conftest import ROOT

from tract.judge import Judge
from tract.models import TINY_SEED
from tract.records import InputError


def test_own_records_go_through_every_stage_on_another_grid(mistral_tokenizer, lab, monkeypatch):
    """Judge instruction, response and rubric on 0 to 100, after words other than ours."""
    seed, path = ["--model", lab.checkpoint(mistral_tokenizer)], lab.path
    rows = [{"instruction": f"Say {i}.", "response": "ha " * 9**i, "rubric": "Is it said?"} for i in range(4)]
    scored = [row | {"cot": "It is.", "score": 33.3 * i} for i, row in enumerate(rows)]
    data, few = ["--data", lab.write("scored.jsonl", scored)], ["--epochs", 1, "--accumulation", 2]
    grid = ["--suffix", "[RESULT]", "--grid", "1=0,3=50,5=100"]
    two = ["--max-new-tokens", 12, "--num-cots", 2]
    lab.run("stage1_train", *seed, *data, *grid, *few, "--out", path / "p_s")
    assert "λ = 1 weighs as much as 625 on 1 to 5; --lambda 0.0016" in lab.capsys.readouterr().out
    # Without --data it writes CoTs for the records that p_s was trained on
    lab.run("gen_cot", "--model", path / "p_s", *two, "--out", path / "cots.jsonl")
    lab.write("scored.jsonl", scored[:3])
    assert "scored.jsonl: is not there, or not what" in lab.fail("gen_cot", "--model", path / "p_s")[1]
    cots = ["--data", path / "cots.jsonl", "--valid", path / "cots.jsonl", "--keep-unfinished"]
    lab.run("stage2_train", *seed, *cots, *grid, *few, "--out", path / "p_tract")
    judge = ["predict", "--model", path / "p_tract", "--data", lab.write("mine.jsonl", rows), *two]
    lab.run(*judge, "--renormalise", "--out", path / "judged.jsonl")
    judged = lab.read("judged.jsonl")
    assert [row["id"] for row in judged] == ["1", "2", "3", "4"] and judged[0]["rubric"] == "Is it said?"
    for row in judged:
        assert len(row["cots"]) == len(row["finished"]) == 2
        means = [(50 * b + 100 * c) / (a + b + c) for a, b, c in row["score_probs"]]
        assert row["prediction"] == pytest.approx(sum(means) / 2, rel=1e-4)
        decoded = [(0, 50, 100)[probs.index(max(probs))] for probs in row["score_probs"]]
        assert row["decoded"] == sum(decoded) / 2
    assert json.loads((path / "judged.run.json").read_text())["arguments"]["suffix"] == " [RESULT] "
    assert (
        "was trained with CoTs, needs one" in lab.fail(*judge[:-2], "--no-cot", "--out", path / "x.jsonl")[1]
    )
    monkeypatch.chdir("/")
    from_python = Judge(path / "p_tract", max_new_tokens=12, num_cots=2, renormalise=True)
    assert from_python(rows) == judged and from_python(**rows[2], id="3") == judged[2]
    assert (
        Judge(path / "p_tract", num_cots=2, seed=1, max_new_tokens=12)(rows)[0]["cots"] != judged[0]["cots"]
    )
    for option in (["--suffix", "Score:"], ["--grid", "1,5"]):
        code, said = lab.fail(*judge, "--out", path / "x.jsonl", *option)
        assert code == 2 and "was trained on 1=0,3=50,5=100 after '[RESULT]'" in said


def test_without_cot_from_training_to_prediction(lab):
    """Train on the squared error of the score alone; such a model is not asked for CoTs."""
    rows = [{key: r[key] for key in ("id", "prompt", "score")} for r in lab.rows[:64]]
    data, out = ["--data", lab.write("train.jsonl", rows)], ["--out", lab.path / "p.jsonl"]
    lab.run("stage1_train", *data, "--out", lab.path / "raft", "--no-cot", "--ce-weight", 0, "--epochs", 2)
    log = lab.read("raft/log.jsonl")
    assert all(line["loss"] == pytest.approx(line["penalty"]) for line in log)
    assert log[-1]["penalty"] < log[0]["penalty"]
    for script in ("gen_cot", "predict"):
        code, said = lab.fail(script, "--model", lab.path / "raft", *data, *out)
        assert code == 2 and "was trained without CoTs" in said
    lab.run("predict", "--model", lab.path / "raft", *data, *out, "--no-cot")
    for row in lab.read("p.jsonl"):
        expected = sum(p * score for score, p in enumerate(row["score_probs"][0], 1))
        assert row["cots"] == [""] and row["prediction"] == pytest.approx(expected, abs=1e-6)
    assert Judge(lab.path / "raft")(rows) == lab.read("p.jsonl")


def test_the_page_of_options_judges_from_python(monkeypatch):
    monkeypatch.chdir(ROOT)
    failed, run = doctest.testfile(str(ROOT / "docs/options.md"), module_relative=False)
    assert run == 6 and not failed


OWN = {"instruction": "Say 1.", "response": "1", "rubric": "Is it said?"}
REFUSED = [  # records, options, message
    ([OWN, {"instruction": "Say 1."}], {}, "record 2: field 'response' is missing"),
    ([OWN, OWN | {"response": b"1"}], {}, "record 2: not JSON (Object of type bytes"),
    ([OWN, OWN | {"instruction": "7 " * 300}], {}, "record 2: has 422 tokens, more than 248; shorten it"),
    ([OWN], {"given": "cots"}, "record 1: field 'cots' is missing"),
    ([OWN], {"num_cots": 0}, "--num-cots: 0 is not between 1"),
    ("Say 1.", {}, "give a list of records, or the fields of one"),
    ([OWN], {"out": "x.jsonl"}, "no option out; there are batch_size, bf16"),
]


@pytest.mark.parametrize("rows, options, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_what_can_not_be_judged_from_python_is_named_by_its_number(rows, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Judge(TINY_SEED, **options)(rows)


def test_one_record_is_a_dict_or_keywords_and_a_list_takes_none():
    judge = Judge(TINY_SEED, max_new_tokens=2)
    record = dict.fromkeys(("instruction", "response", "rubric"), "Say 1.")
    assert (
        judge(record)
        == judge(**record)
        == judge([record])[0]
        == judge(record | {"rubric": ""}, rubric="Say 1.")
    )
    with pytest.raises(InputError, match="give a list of records, or the fields of one"):
        judge([record], rubric="Is it right?")


def test_stage_2_keeps_the_finished_cots_of_a_record_whose_others_are_not(lab):
    row = lab.rows[0] | {"cots": [lab.rows[0]["cot"], "Unfinished."], "finished": [True, False]}
    row["grid"] = "1=1,3=3,5=5"  # another grid has to be asked for
    run = ["stage2_train", "--data", lab.write("cots.jsonl", [row]), "--grid", "1,2,3,4,5", "--dry-run"]
    lab.run(*run)
    said = lab.capsys.readouterr().out
    assert "\n1 examples," in f"\n{said}" and "1 records with a CoT left out" in said
    lab.run(*run, "--keep-unfinished")
    said = lab.capsys.readouterr().out
    assert "\n2 examples," in f"\n{said}" and "left out" not in said


COTS = {"id": "a", "prompt": "p", "cot": "c", "score": 3, "cots": ["c"], "finished": [True]}
BAD = [
    ("stage1_train", [], ["--data", "missing.jsonl"], "missing.jsonl: no such file"),
    ("stage1_train", [], [], "data.jsonl: no records in it"),
    ("stage1_train", [COTS, COTS | {"score": 6}], [], "data.jsonl:2: score 6 lies outside the grid"),
    ("stage1_train", [COTS], ["--valid", "missing.jsonl"], "missing.jsonl: no such file"),
    ("stage1_train", [COTS], ["--model", "."], ".: a folder without config.json"),
    ("stage1_train", [COTS], ["--model", "no/model"], "no/model: no such folder, and can't reach the hub"),
    ("stage1_train", [COTS], ["--max-length", 3], "longer than 3 tokens, the shortest has 10"),
    ("stage1_train", [COTS], ["--lora", 4, "--full"], "--full: not allowed with argument --lora"),
    ("stage1_train", [COTS], ["--model", "qwen3-8b", "--lora", 8, "--full"], "--full: not allowed with argu"),
    ("stage1_train", [COTS], ["--lambda", 0, "--ce-weight", 0], "--lambda 0: then nothing trains the score"),
    ("stage1_train", [COTS], ["--lambda", 0, "--score-ce", "none"], "--lambda 0: then nothing trains the sc"),
    ("stage2_train", [COTS], ["--continue-from-stage1"], "a model that was not trained here; give p_s"),
    ("stage2_train", [{"id": "a", "prompt": "p", "cot": "c", "score": 3}], [], "'cots' is missing"),
    ("stage2_train", [COTS | {"prediction": 3.0}], [], "record 'a' is a prediction"),
    (
        "stage2_train",
        [COTS | {"grid": "1=1,3=3"}],
        [],
        "'a': its CoT was written for the scores 1=1,3=3,",
    ),
    ("stage2_train", [COTS | {"finished": [False]}], [], "no CoT in it is finished; train"),
    ("stage2_train", [COTS], ["--no-cot"], "unrecognized arguments: --no-cot"),
    ("predict", [COTS | {"cots": ["c", "d"]}], ["--given", "cots"], "'cots' does not hold one entry"),
    ("predict", [COTS], ["--no-cot", "--num-cots", 2], "--num-cots: not allowed with argument --no-cot"),
    ("predict", [COTS], ["--max-length", 1], "all 1 records are longer than 1 tokens"),
    ("predict", [COTS], ["--temperature", 0, "--num-cots", 2], "--temperature 0: all CoTs of a prompt would"),
]


@pytest.mark.parametrize("script, rows, options, message", BAD, ids=[message for *_, message in BAD])
def test_what_makes_no_sense_gets_one_line(script, rows, options, message, lab, monkeypatch):
    lab.write("data.jsonl", rows)
    monkeypatch.chdir(lab.path)
    common = ["--model", TINY_SEED, "--data", "data.jsonl", "--out", "out"]
    code, said = lab.fail(script, *common, *options)
    assert code == 2 and message in said.strip().splitlines()[-1] and not list(lab.path.glob("out*"))


def test_a_sweep_hands_its_options_to_the_stages():
    """Let make say, without running it, which commands a sweep is; what it would print is not there yet."""
    options = ["TRAINING=--epochs 1 --lora 8", "JUDGING=--num-cots 2", "LAMBDAS=0.3 1", "SWEEP=out/none"]
    make = ["make", "--dry-run", "sweep", *options]
    said = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for script, given in (
        ("stage1_train", "--lambda 0.3 --epochs 1 --lora 8"),
        ("stage2_train", "--lambda 1 --epochs 1 --lora 8"),
        ("gen_cot", "--num-cots 2"),
        ("predict", "--num-cots 2"),
    ):
        lines = [line for line in said.splitlines() if f"{script}.py" in line]
        assert len(lines) == 2 and any(f" {given} " in line for line in lines)


def test_help_begins_with_what_matters_most(lab):
    first = {
        "stage1_train": "model data out epochs lora full",
        "stage2_train": "model data out epochs lora full",
    }
    first |= {"stage3_train": "model data out lora full"}
    first |= {"gen_cot": "model data out batch-size num-cots"}
    first |= {"predict": "model data out batch-size num-cots no-cot given"}
    for script, names in first.items():
        said = lab.fail(script, "--help")[1]
        assert said.startswith(f"usage: {script}.py [options]\n")
        ungrouped = said.partition("options:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  --([\w-]+)", ungrouped, re.M) == names.split()


def test_help_shows_defaults_and_those_of_training_follow_the_model(lab):
    for script in ("gen_cot", "stage2_train", "predict", "eval"):
        code, said = lab.fail(script, "--help")
        assert code == 0 and "(default: " in said
    for model, lr, lora in (([], "0.001", "None"), (["--model", "mistral-7b"], "1e-05", "8")):
        said = " ".join(lab.fail("stage1_train", *model, "--help")[1].split())
        assert f"AdamW (default: {lr})" in said and f"None: all weights (default: {lora})" in said
