"""The stages chained by their files, with Mistral's real tokenizer, records of one's own, and other grids."""

import json

import pytest
from conftest import random_model

from encode import encode, prompt_ids, score_tokens
from models import TINY_SEED
from records import Grid


def test_every_stage_twice_gives_the_same_bytes(mistral_tokenizer, lab):
    rows = [{"id": f"r{i}", "prompt": f"Rate item {i}. {'Long. ' * 9 * i}"} for i in range(6)]
    train = lab.write("train.jsonl", [r | {"cot": f"Point {r['id']}.", "score": 10 / 3} for r in rows])
    seed, test = ["--model", lab.path / "seed"], ["--data", lab.write("test.jsonl", rows)]
    random_model(mistral_tokenizer).save_pretrained(seed[1])
    mistral_tokenizer.save_pretrained(seed[1])
    few, short = ["--accumulation", 2, "--epochs", 1], ["--max-new-tokens", 12, "--batch-size", 4]
    for out in (lab.path / "a", lab.path / "b"):
        lab.run("stage1_train", *seed, "--data", train, "--out", out / "stage1", *few)
        lab.run("gen_cot", "--model", out / "stage1", "--data", train, "--out", out / "cots.jsonl", *short)
        cots = ["--data", out / "cots.jsonl", "--valid", out / "cots.jsonl", "--keep-unfinished"]
        lab.run("stage2_train", *seed, *cots, "--out", out / "stage2", *few)
        judge = ["predict", "--model", out / "stage2", *test, *short]
        lab.run(*judge, "--num-cots", 2, "--out", out / "predictions.jsonl")
        lab.run(*judge, "--no-cot", "--out", out / "no_cot.jsonl")
    names = [f"stage{n}/{file}" for n in (1, 2) for file in ("log.jsonl", "model.safetensors")]
    for name in (*names, "cots.jsonl", "predictions.jsonl"):
        assert (lab.path / "a" / name).read_bytes() == (lab.path / "b" / name).read_bytes(), name

    # Records come out with a distribution, and its position is where training had the score
    predictions, (_, score_ids) = lab.read("a/predictions.jsonl"), score_tokens(mistral_tokenizer, Grid())
    assert [p["id"] for p in predictions] == [row["id"] for row in rows]
    for p in predictions:
        assert len(p["cots"]) == len(p["finished"]) == len(p["score_probs"]) == len(p["off_grid"]) == 2
        for probs, off_grid in zip(p["score_probs"], p["off_grid"], strict=True):
            assert sum(probs) + off_grid == pytest.approx(1, abs=1e-5) and min(probs) > 0
        means = [sum(q * v for q, v in zip(probs, Grid().values, strict=True)) for probs in p["score_probs"]]
        assert p["prediction"] == pytest.approx(sum(means) / 2, abs=1e-5)
        example = encode(mistral_tokenizer, p | {"cot": p["cots"][0], "score": 3}, Grid(), score_ids)
        assert example.ids[example.score_position - 1] == 28705 and example.ids.count(1) == 1
        assert example.start == len(prompt_ids(mistral_tokenizer, p["prompt"]))
    assert all(row["cots"] == [""] for row in lab.read("a/no_cot.jsonl"))


def test_own_records_another_suffix_and_a_grid_that_travels(gpt2_tokenizer, lab):
    """Someone's own instruction, response and rubric, judged on 0 to 100 after words other than ours."""
    random_model(gpt2_tokenizer).save_pretrained(lab.path / "seed")
    gpt2_tokenizer.save_pretrained(lab.path / "seed")
    rows = [{"instruction": f"Say {i}.", "response": str(i), "rubric": "Is it said?"} for i in range(4)]
    scored = [row | {"cot": "It is.", "score": 25 * i} for i, row in enumerate(rows)]
    train = [
        "--model",
        lab.path / "seed",
        "--data",
        lab.write("scored.jsonl", scored),
        "--out",
        lab.path / "p",
    ]
    lab.run("stage1_train", *train, "--suffix", "[RESULT]", "--grid", "1=0,3=50,5=100")
    mine = ["--model", lab.path / "p", "--data", lab.write("mine.jsonl", rows), "--max-new-tokens", 4]
    lab.run("predict", *mine, "--out", lab.path / "judged.jsonl", "--renormalise")
    judged = lab.read("judged.jsonl")
    assert [row["id"] for row in judged] == ["1", "2", "3", "4"] and judged[0]["rubric"] == "Is it said?"
    assert "###Score Rubrics:\nIs it said?" in judged[0]["prompt"]
    for row in judged:
        probs = row["score_probs"][0]
        assert row["prediction"] == pytest.approx((50 * probs[1] + 100 * probs[2]) / sum(probs), rel=1e-4)
        assert row["decoded"] == (0, 50, 100)[probs.index(max(probs))]
    assert json.loads((lab.path / "judged.run.json").read_text())["arguments"]["suffix"] == " [RESULT] "
    for option in (["--suffix", "Score:"], ["--grid", "1,5"]):
        code, said = lab.fail("predict", *mine, "--out", lab.path / "x.jsonl", *option)
        assert code == 2 and "was trained on 1=0,3=50,5=100 after '[RESULT]'" in said


def test_without_cot_from_training_to_prediction(lab):
    """RAFT without CoT: pure squared error on the score; such a model is not asked for CoTs."""
    rows = [{key: r[key] for key in ("id", "prompt", "score")} for r in lab.rows[:64]]
    data, out = ["--data", lab.write("train.jsonl", rows)], ["--out", lab.path / "p.jsonl"]
    lab.run("stage1_train", *data, "--out", lab.path / "raft", "--no-cot", "--ce-weight", 0, "--epochs", 2)
    log = lab.read("raft/log.jsonl")
    assert all(line["loss"] == pytest.approx(line["squared_error"]) for line in log)
    assert log[-1]["squared_error"] < log[0]["squared_error"]
    for script in ("gen_cot", "predict"):
        code, said = lab.fail(script, "--model", lab.path / "raft", *data, *out)
        assert code == 2 and "was trained without CoTs" in said
    lab.run("predict", "--model", lab.path / "raft", *data, *out, "--no-cot")
    assert all(row["cots"] == [""] and 0 < row["prediction"] <= 5 for row in lab.read("p.jsonl"))


COTS = {"id": "a", "prompt": "p", "cot": "c", "score": 3, "cots": ["c"], "finished": [True]}
BAD = [
    ("stage1_train", [], ["--data", "missing.jsonl"], "missing.jsonl: no such file"),
    ("stage1_train", [], [], "data.jsonl: no records in it"),
    ("stage1_train", [COTS], ["--valid", "missing.jsonl"], "missing.jsonl: no such file"),
    ("stage1_train", [COTS], ["--model", "."], ".: a folder without config.json"),
    ("stage1_train", [COTS], ["--model", "no/model"], "no/model: neither a checkpoint nor on the hub"),
    ("stage1_train", [COTS], ["--max-length", 3], "no CoT in it is finished and has at most 3 tokens"),
    ("stage1_train", [COTS], ["--lora", 4, "--full"], "--full: not allowed with argument --lora"),
    ("stage2_train", [{"id": "a", "prompt": "p", "cot": "c", "score": 3}], [], "'cots' is missing"),
    ("stage2_train", [COTS | {"prediction": 3.0}], [], "record 'a' is a prediction"),
    ("stage2_train", [COTS | {"finished": [False]}], [], "no CoT in it is finished"),
    ("stage2_train", [COTS], ["--no-cot"], "unrecognized arguments: --no-cot"),
    ("predict", [COTS | {"cots": ["c", "d"]}], ["--given", "cots"], "'cots' does not hold one entry"),
    ("predict", [COTS], ["--no-cot", "--num-cots", 2], "--num-cots: not allowed with argument --no-cot"),
    ("predict", [COTS], ["--max-length", 1], "all 1 records are longer than 1 tokens"),
]


@pytest.mark.parametrize("script, rows, options, message", BAD, ids=[message for *_, message in BAD])
def test_what_makes_no_sense_gets_one_line(script, rows, options, message, lab, monkeypatch):
    lab.write("data.jsonl", rows)
    monkeypatch.chdir(lab.path)
    common = ["--model", TINY_SEED, "--data", "data.jsonl", "--out", "out"]
    code, said = lab.fail(script, *common, *options)
    assert code == 2 and message in said.strip().splitlines()[-1] and not list(lab.path.glob("out*"))


@pytest.mark.parametrize("script", ["stage1_train", "gen_cot", "stage2_train", "predict", "eval"])
def test_help_shows_defaults(script, lab):
    code, said = lab.fail(script, "--help")
    assert code == 0 and "(default: " in said


def test_defaults_follow_the_model(lab):
    for model, lr, lora in (([], "0.001", "None"), (["--model", "mistral-7b"], "1e-05", "8")):
        said = " ".join(lab.fail("stage1_train", *model, "--help")[1].split())
        assert f"AdamW (default: {lr})" in said and f"None: all weights (default: {lora})" in said
