"""Metrics by hand, paired intervals, and nothing dropped in silence."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import eval
from records import Grid


def predictions(n: int, noise: float, seed: int) -> list[dict]:
    random, rows = np.random.default_rng(seed), []
    truth = np.random.default_rng(0).integers(1, 6, n)
    for i, y in enumerate(truth.tolist()):
        p = float(np.clip(y + noise * random.normal(), 1, 5))
        probs = [0.0] * 5
        probs[round(p) - 1] = 1.0
        row = {"id": f"r{i}", "prompt": "p", "score": y, "cots": ["c"], "finished": [i % 4 != 0]}
        rows.append(row | {"score_probs": [probs], "off_grid": [0.25], "prediction": p, "decoded": float(round(p))})
    return rows


def test_metrics_by_hand():
    p, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert eval.METRICS["rmse"](p, y) == pytest.approx(np.sqrt(3 / 4))
    assert eval.METRICS["mae"](p, y) == pytest.approx(3 / 4)
    assert eval.METRICS["pearson"](p, y) == pytest.approx(5.5 / np.sqrt(8.75 * 5))
    assert eval.METRICS["spearman"](p, y) == pytest.approx(0.8)
    assert eval.METRICS["kendall"](p, y) == pytest.approx(4 / 6)  # 5 pairs agree, 1 does not
    assert np.isnan(eval.METRICS["pearson"](np.ones(4), y))


def test_interval_covers_and_pairing_narrows_it():
    """A constant offset has a paired difference in MAE that is the same in every resample."""
    y = np.arange(200) % 5 + 1.0
    a = y + 0.5 + 0.01 * np.sin(np.arange(200))
    samples = eval.bootstrap({"a": a, "b": a + 1}, y, resamples=200, seed=0)
    difference = eval.interval(samples["b"]["mae"] - samples["a"]["mae"])
    assert difference["low"] == pytest.approx(1) and difference["high"] == pytest.approx(1)
    alone = eval.interval(samples["a"]["rmse"])
    assert alone["low"] < alone["value"] < alone["high"]


def test_several_seeds_are_averaged_and_resampled():
    """Two runs with an RMSE of 1 and of 3 in every resample of the records: what varies is which runs were drawn."""
    y = np.arange(50) % 5 + 1.0
    samples = eval.bootstrap({"both": np.stack([y + 1, y + 3])}, y, resamples=200, seed=0, metrics=("rmse",))["both"]["rmse"]
    assert samples[0] == pytest.approx(2)
    assert {round(float(x), 6) for x in samples[1:]} == {1, 2, 3}


def test_fewer_cots_and_renormalised(write_jsonl, run_script, tmp_path, capsys):
    rows = predictions(30, 0.5, 1)
    for i, row in enumerate(rows):  # .5 of the mass on one score; a second CoT that says the opposite
        row["score_probs"] = [[p / 2 for p in row["score_probs"][0]], [p / 2 for p in row["score_probs"][0][::-1]]]
        row |= {"cots": ["c", "d"], "finished": [True, i > 0], "off_grid": [0.5, 0.5], "prediction": 1.5, "decoded": 3.0}
    path = write_jsonl("p.jsonl", rows)
    run_script("eval", path, "--out", tmp_path / "a", "--resamples", 5)
    run_script("eval", path, "--out", tmp_path / "b", "--resamples", 5, "--cots", 1, "--renormalise")
    both, first = (json.loads((tmp_path / name / "metrics.json").read_text())["files"][str(path)] for name in "ab")
    assert both["prediction"]["pearson"]["value"] is None and (both["cots"], first["cots"]) == (60, 30)
    expected = [5 - row["score_probs"][0][::-1].index(0.5) for row in rows]  # renormalised, all mass on one score
    true = np.array([row["score"] for row in rows])
    assert first["prediction"]["rmse"]["value"] == pytest.approx(eval.METRICS["rmse"](np.array(expected), true))
    assert first["unfinished_rate"] == 0 and both["unfinished_rate"] == pytest.approx(1 / 60)
    with pytest.raises(SystemExit) as exit:
        run_script("eval", path, "--out", tmp_path / "c", "--cots", 3)
    assert exit.value.code == 2 and "record 'r0' has 2 CoTs, fewer than --cots 3" in capsys.readouterr().err


def test_reliability_counts():
    points = eval.reliability(predictions(100, 0.0, 1), Grid())
    assert all(p["observed"] == pytest.approx(p["predicted"]) for p in points)
    assert sum(p["n"] for p in points) == 500


def test_several_files_and_everything_is_counted(write_jsonl, run_script, tmp_path, capsys):
    good, bad = predictions(60, 0.3, 1), predictions(60, 1.5, 2)
    del good[3]["score"]
    files = write_jsonl("good.jsonl", good), write_jsonl("bad.jsonl", bad[:50])
    run_script("eval", *files, "--out", tmp_path / "eval", "--resamples", 100)
    report = json.loads((tmp_path / "eval/metrics.json").read_text())
    first, second = (report["files"][str(f)] for f in files)
    assert report["evaluated"] == 49
    assert (first["records"], first["without_score"], first["not_in_all_files"]) == (60, 1, 10)
    assert (second["records"], second["without_score"], second["not_in_all_files"]) == (50, 0, 1)
    assert first["off_grid_mean"] == 0.25 and 0.2 < first["unfinished_rate"] < 0.3
    assert second["difference"]["prediction"]["rmse"]["low"] > 0  # the noisier judge is worse
    assert (tmp_path / "eval/figure.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "49 records" in printed and "1 without score, 10 not in all files" in printed

    with pytest.raises(SystemExit) as exit:
        run_script("eval", *files, "--out", tmp_path / "eval")
    assert exit.value.code == 2 and "already holds a finished run" in capsys.readouterr().err


def test_one_record_and_a_constant_prediction_are_reported_as_undefined(write_jsonl, run_script, tmp_path, capsys):
    run_script("eval", write_jsonl("one.jsonl", predictions(1, 0.0, 1)), "--out", tmp_path / "eval", "--resamples", 10)
    assert "undefined" in capsys.readouterr().out
    assert "NaN" not in (tmp_path / "eval/metrics.json").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": None}, ":2: field 'prediction' is missing"),
        ({"prediction": "3"}, ":2: field 'prediction' is \"3\", not a number"),
        (
            {"score_probs": [[0.5, 0.5]]},
            ":2: field 'score_probs' does not hold one entry a CoT with 5 scores (is --grid right?)",
        ),
        ({"finished": True}, ":2: field 'finished' does not hold one true or false a CoT"),
    ],
)
def test_what_is_no_prediction_is_refused(change, message, write_jsonl, run_script, tmp_path, capsys):
    rows = predictions(2, 0.0, 1)
    path = write_jsonl("p.jsonl", [rows[0], rows[1] | change])
    with pytest.raises(SystemExit) as exit:
        run_script("eval", path, "--out", tmp_path / "eval")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith(f"{path}{message}") and error.count("\n") == 1
    assert not (tmp_path / "eval").exists()


def test_eval_imports_no_torch():
    code = "import sys, eval; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
