"""The stages chained by their files, on a bench file in the real format and with Mistral's real tokenizer."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, random_model

import records
from records import Grid

SCRIPTS = ["stage1_train", "gen_cot", "stage2_train", "predict", "eval"]
PREPARE = ["data/tiny/prepare.py", "data/prometheus_bench/prepare.py", "data/feedback_collection/prepare.py"]


def bench_file(tmp_path):
    """Six items with the quirks of the real files: one label or three, stray quotes after the prompt."""
    items = []
    for i in range(6):
        ends = ["", " ", ' ",\n'][i % 3]
        item = {"idx": i, "instruction": f"###Task Description:\nRate item {i}. {'Long. ' * 9 * i}\n\n###Feedback:{ends}"}
        feedbacks = [f"Point {k} of {i}. So the overall score is {k}. [RESULT] {k}" for k in (2, 4, 4)]
        one = {"gpt4_score": 4, "gpt4_feedback": feedbacks[1]}
        items.append(item | (one if i == 5 else {"gpt4_score": [2, 4, 4], "gpt4_feedback": feedbacks}))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(items), "utf-8")
    return path


def pipeline(run_script, seed_model, train, test, out) -> None:
    short, few = ["--max-new-tokens", 12, "--batch-size", 4], ["--accumulation", 2, "--epochs", 1, "--eval-size", 1]
    run_script("stage1_train", "--model", seed_model, "--data", train, "--out", out / "stage1", *few)
    run_script("gen_cot", "--model", out / "stage1", "--data", train, "--out", out / "cots.jsonl", *short)
    options = ["--keep-unfinished", *few]
    run_script("stage2_train", "--model", seed_model, "--data", out / "cots.jsonl", "--out", out / "stage2", *options)
    for name, extra in {"predictions": ["--num-cots", 2], "no_cot": ["--no-cot"]}.items():
        run_script("predict", "--model", out / "stage2", "--data", test, "--out", out / f"{name}.jsonl", *short, *extra)


def test_bench_file_through_every_stage_twice(mistral_tokenizer, tmp_path, run_script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    bench, train, test = bench_file(tmp_path), tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    run_script("data.prometheus_bench.prepare", bench, "--out", test, "--train", train)
    assert "6 items read, 6 kept" in capsys.readouterr().out
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    assert [row["score"] for row in rows] == [pytest.approx(10 / 3)] * 5 + [4]
    assert all(row["prompt"].endswith("###Feedback:") for row in rows)
    assert [json.loads(line)["cot"] for line in train.read_text().splitlines()][:2] == ["Point 2 of 0.", "Point 4 of 0."]

    random_model(mistral_tokenizer).save_pretrained(tmp_path / "seed")
    mistral_tokenizer.save_pretrained(tmp_path / "seed")
    for out in ("a", "b"):
        pipeline(run_script, tmp_path / "seed", train, test, tmp_path / out)
    files = [tmp_path / "a" / name for name in ("predictions.jsonl", "no_cot.jsonl")]
    run_script("eval", *files, "--out", tmp_path / "eval", "--resamples", 20)

    # The same bytes both times
    for name in ("stage1/log.jsonl", "stage1/model.safetensors", "stage2/model.safetensors", "cots.jsonl", "predictions.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name

    # All items come out with a distribution, and the score position is where training had it
    predictions = [json.loads(line) for line in (tmp_path / "a/predictions.jsonl").read_text().splitlines()]
    assert [p["id"] for p in predictions] == [row["id"] for row in rows]
    tokens = records.score_tokens(mistral_tokenizer, Grid())
    for p in predictions:
        assert len(p["cots"]) == len(p["finished"]) == len(p["score_probs"]) == len(p["off_grid"]) == 2
        for probs, off_grid in zip(p["score_probs"], p["off_grid"], strict=True):
            assert sum(probs) + off_grid == pytest.approx(1, abs=1e-5) and min(probs) > 0
        means = [sum(q * v for q, v in zip(probs, Grid().values, strict=True)) for probs in p["score_probs"]]
        assert p["prediction"] == pytest.approx(sum(means) / 2, abs=1e-5)
        example = records.encode(mistral_tokenizer, p | {"cot": p["cots"][0]}, grid=Grid(), score_ids=tokens.score_ids)
        assert example.ids[example.score_position] == tokens.score_ids[Grid().nearest(p["score"])]
        assert example.ids[example.score_position - 1] == 28705 and example.ids.count(1) == 1
        assert example.start == len(records.prompt_ids(mistral_tokenizer, p["prompt"]))
    assert all(json.loads(line)["cots"] == [""] for line in (tmp_path / "a/no_cot.jsonl").read_text().splitlines())


def test_feedback_collection_rows(tmp_path, run_script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    rows = [
        {"instruction": "Rate.\n###Feedback:", "output": "Good. So the overall score is 4. [RESULT] 4", "orig_score": "4"},
        {"instruction": "Rate.\n###Feedback:", "output": "Bad all over. [RESULT] 1"},
    ]
    (tmp_path / "fc.json").write_text(json.dumps(rows))
    arguments = ["--file", tmp_path / "fc.json", "--out", tmp_path / "train.jsonl"]
    run_script("data.feedback_collection.prepare", *arguments)
    made = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(r["id"], r["cot"], r["score"]) for r in made] == [("fc-000000", "Good.", 4), ("fc-000001", "Bad all over.", 1)]
    assert "2 rows read, 2 kept, 1 of them without 'So the overall'" in capsys.readouterr().out

    bad = [{"instruction": "Rate.", "output": "no score"}, {"instruction": " "}, {"instruction": "x", "output": "[RESULT] 3"}]
    (tmp_path / "fc.json").write_text(json.dumps([*rows, *bad, bad[0]]))
    run_script("data.feedback_collection.prepare", *arguments)
    printed = capsys.readouterr().out
    assert "6 rows read, 2 kept" in printed and "left out 2: no score from 1 to 5" in printed and "(row 2, 5)" in printed
    assert (
        "left out 1: no text in 'instruction' (row 3)" in printed and "left out 1: no feedback in 'output' (row 4)" in printed
    )
    (tmp_path / "fc.json").write_text(json.dumps(bad))
    with pytest.raises(SystemExit) as exit:
        run_script("data.feedback_collection.prepare", *arguments)
    assert exit.value.code == 2 and "fc.json: nothing to keep, row 0: no score" in capsys.readouterr().err


def test_bench_items_that_lack_something_are_counted(tmp_path, run_script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    good = {"instruction": "Rate.", "gpt4_score": [3, 4], "gpt4_feedback": ["Fine. So the overall", ""], "human_score": [5, 2]}
    items = [good, {"instruction": "Rate.", "gpt4_score": None}, good | {"gpt4_feedback": ["a", "b", "c"]}, "text"]
    (tmp_path / "bench.json").write_text(json.dumps(items))
    out, train = tmp_path / "test.jsonl", tmp_path / "train.jsonl"
    run_script("data.prometheus_bench.prepare", tmp_path / "bench.json", "--out", out, "--train", train)
    printed = capsys.readouterr().out
    assert "4 items read, 2 kept" in printed and "left out 1: 'gpt4_score' is neither" in printed
    assert "5 feedbacks read, 3 kept" in printed and "left out 1: no text in 'gpt4_feedback' (row 1)" in printed
    assert "left out 1: no label of its own (row 4)" in printed
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    assert [(r["id"], r["cot"], r["score"]) for r in rows] == [
        ("bench-0000-1", "Fine.", 3), ("bench-0002-1", "a", 3), ("bench-0002-2", "b", 4)
    ]  # fmt: skip
    run_script("data.prometheus_bench.prepare", tmp_path / "bench.json", "--out", out, "--label", "human_score")
    assert [json.loads(line)["score"] for line in out.read_text().splitlines()] == [3.5, 3.5]


def test_committed_tiny_data_is_what_its_script_makes(tmp_path, run_script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    run_script("data.tiny.prepare", "--out", tmp_path)
    run_script("data.tiny.prepare", "--out", tmp_path, "--targets", "real")
    made = sorted(tmp_path.glob("*.jsonl"))
    assert len(made) == 8
    for path in made:
        assert path.read_bytes() == (ROOT / "data/tiny" / path.name).read_bytes()


def test_predict_needs_no_scores_and_any_model_will_do(tiny_records, write_jsonl, run_script, tmp_path):
    unscored = [{"id": r["id"], "prompt": r["prompt"], "mine": 1} for r in tiny_records[:4]]
    out = tmp_path / "p.jsonl"
    run_script(
        "predict", "--model", records.TINY_SEED, "--data", write_jsonl("d.jsonl", unscored), "--out", out, "--renormalise"
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == [r["id"] for r in unscored] and rows[0]["mine"] == 1
    for row in rows:
        probs = row["score_probs"][0]
        expected = sum(q * v for q, v in zip(probs, Grid().values, strict=True)) / sum(probs)
        assert row["prediction"] == pytest.approx(expected, rel=1e-4) and 1 <= row["prediction"] <= 5
        assert row["decoded"] == 1 + probs.index(max(probs))


def test_the_grid_travels_with_the_checkpoint(tiny_records, write_jsonl, run_script, tmp_path):
    rows = [r | {"score": 25.0 * (r["score"] - 1)} for r in tiny_records[:40]]
    data, stage1, out = write_jsonl("train.jsonl", rows), tmp_path / "stage1", tmp_path / "p.jsonl"
    run_script("stage1_train", "--data", data, "--out", stage1, "--grid", "1=0,3=50,5=100", "--lambda", 0.0016, "--epochs", 1)
    run_script("predict", "--model", stage1, "--data", data, "--out", out)
    row = json.loads(out.read_text().splitlines()[0])
    assert len(row["score_probs"][0]) == 3 and row["decoded"] in (0, 50, 100)
    run_script("eval", out, "--out", tmp_path / "eval", "--resamples", 10)


def test_own_records_and_a_suffix_that_travels_with_the_checkpoint(gpt2_tokenizer, write_jsonl, run_script, tmp_path, capsys):
    """Someone's own instruction, response and rubric, judged in one command, after words other than ours."""
    random_model(gpt2_tokenizer).save_pretrained(tmp_path / "seed")
    gpt2_tokenizer.save_pretrained(tmp_path / "seed")
    rows = [{"instruction": f"Say {i}.", "response": str(i), "rubric": "Is it said?"} for i in range(4)]
    scored = write_jsonl("scored.jsonl", [row | {"cot": "It is.", "score": 1 + i} for i, row in enumerate(rows)])
    train = ["--model", tmp_path / "seed", "--data", scored, "--val-fraction", 0, "--epochs", 1]
    run_script("stage1_train", *train, "--out", tmp_path / "p", "--suffix", "[RESULT]")
    judge = ["--model", tmp_path / "p", "--data", write_jsonl("mine.jsonl", rows), "--max-new-tokens", 4]
    run_script("predict", *judge, "--out", tmp_path / "judged.jsonl")
    judged = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert [row["id"] for row in judged] == ["1", "2", "3", "4"] and judged[0]["rubric"] == "Is it said?"
    assert "###Score Rubrics:\nIs it said?" in judged[0]["prompt"] and len(judged[0]["score_probs"][0]) == 5
    assert json.loads((tmp_path / "judged.run.json").read_text())["arguments"]["suffix"] == " [RESULT] "
    with pytest.raises(SystemExit) as exit:
        run_script("predict", *judge, "--out", tmp_path / "x.jsonl", "--suffix", "Score:")
    assert exit.value.code == 2 and "leave --suffix away" in capsys.readouterr().err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_defaults(script, run_script, capsys):
    with pytest.raises(SystemExit) as exit:
        run_script(script, "--help")
    assert exit.value.code == 0 and "(default: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "model, lr, data",
    [
        ([], "0.001", "tiny/train.jsonl"),
        (["--model", "data/tiny/seed"], "0.001", "tiny/train.jsonl"),
        (["--model", "mistral-7b"], "1e-05", "feedback_collection/train.jsonl"),
    ],
)
def test_defaults_follow_the_model(model, lr, data, run_script, capsys, monkeypatch):
    """The embedded task's settings for its own seed model, however its path is written; the paper's for any other."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        run_script("stage1_train", *model, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default: {lr})" in shown and data in shown.replace(" ", "")


@pytest.mark.parametrize("script", PREPARE)
def test_data_scripts_run_by_path(script):
    assert subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    "script, option, value",
    [("stage1_train", "--batch-size", 0), ("stage1_train", "--epochs", 0), ("stage1_train", "--lr", -1),
     ("stage1_train", "--warmup", 1.5), ("stage1_train", "--lambda", "nan"), ("gen_cot", "--num-cots", 0),
     ("predict", "--top-p", 0), ("predict", "--max-new-tokens", "many"), ("eval", "--resamples", 0)],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(script, option, value, run_script, capsys):
    with pytest.raises(SystemExit) as exit:
        run_script(script, option, value)
    assert exit.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


def test_without_cot_from_training_to_prediction(tiny_records, write_jsonl, run_script, tmp_path, capsys):
    """RAFT without CoT: pure squared error on the score; such a model is not asked for CoTs."""
    rows = [{key: r[key] for key in ("id", "prompt", "score")} for r in tiny_records[:64]]
    data, out = write_jsonl("train.jsonl", rows), tmp_path / "raft"
    run_script("stage1_train", "--data", data, "--out", out, "--no-cot", "--ce-weight", 0, "--epochs", 2)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert all(line["loss"] == pytest.approx(line["squared_error"]) for line in log)
    assert log[-1]["squared_error"] < log[0]["squared_error"]
    for script in ("gen_cot", "predict"):
        with pytest.raises(SystemExit) as exit:
            run_script(script, "--model", out, "--data", data, "--out", tmp_path / "p.jsonl")
        assert exit.value.code == 2 and "was trained without CoTs" in capsys.readouterr().err
    run_script("predict", "--model", out, "--data", data, "--out", tmp_path / "p.jsonl", "--no-cot")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert all(row["cots"] == [""] and 0 < row["prediction"] <= 5 for row in rows)
