"""Metrics by hand, paired intervals, and nothing dropped in silence."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import eval
from records import Grid


def predictions(n: int) -> list[dict]:
    """Make records whose prediction is the true score, with all mass on it."""
    rows = []
    for i, y in enumerate(np.random.default_rng(0).integers(1, 6, n).tolist()):
        row = {"id": f"r{i}", "score": y, "finished": [i % 4 != 0], "off_grid": [0.25], "prediction": y}
        rows.append(row | {"decoded": y, "score_probs": [[float(k == y) for k in range(1, 6)]]})
    return rows


def evaluate(lab, *arguments) -> tuple:
    """Run eval.py; returns its entry for each file, and last what it prints."""
    out = lab.path / f"eval{len(list(lab.path.iterdir()))}"
    lab.run("eval", "--resamples", 200, "--out", out, *arguments)
    report = json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    return *report["files"].values(), lab.capsys.readouterr().out


def test_metrics_and_reliability_by_hand_and_without_torch():
    p, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.0, 3.0, 2.0, 4.0])
    by_hand = {"pearson": 5.5 / 43.75**0.5, "spearman": 0.8, "kendall": 4 / 6, "rmse": 0.75**0.5, "mae": 0.75}
    by_hand["spread"] = (8.75 / 5) ** 0.5
    assert {name: metric(p, y) for name, metric in eval.METRICS.items()} == pytest.approx(by_hand)
    by_hand = {"kappa": 1 - 0.75 / np.mean((p[:, None] - y) ** 2), "exact": 0.25, "within_one": 1.0}
    assert {name: metric(p, y) for name, metric in eval.AGREEMENT.items()} == pytest.approx(by_hand)
    assert eval.AGREEMENT["within_one"](p, y + np.eye(4)[2]) == 1 and eval.ties(p[[0, 0, 1, 1, 1]]) == 0.4
    length = np.array([3.0, 1.0, 4.0, 2.0])  # what is left of p and of length without y correlates so
    rest = [x - np.polyval(np.polyfit(y, x, 1), y) for x in (p, length)]
    assert eval.length_bias(p, y, length) == pytest.approx(np.corrcoef(*rest)[0, 1])
    points = eval.reliability(predictions(100), Grid())
    assert sum(p["n"] for p in points if p["observed"] == p["predicted"] in (0, 1)) == 500
    code = "import sys, eval; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_are_compared_in_pairs_and_all_is_counted(lab):
    """Resample all files alike: a constant offset has no interval. Tell files by their whole path."""
    off, rows = 0.5 + 0.1 * np.sin(np.arange(200)), predictions(200)
    near = [row | {"prediction": row["score"] + x} for row, x in zip(rows, off, strict=True)]
    far = [row | {"prediction": row["prediction"] + 1} for row in near]
    near[3]["score"], far[4]["cot"] = None, "So the overall score is text where the suffix is another."
    paths = lab.write("preds-t0.7", near), lab.write("preds-t0.9", far[:150])
    note = {"arguments": {"grid": "1,2,3,4,5=7", "suffix": " [RESULT] "}}
    (lab.path / "preds-t0.9.run.json").write_text(json.dumps(note))
    first, second, printed = evaluate(lab, *paths)
    names, common = ("grid", "records", "without_score", "not_in_all_files"), np.delete(off[:150], 3)
    assert [first[name] for name in names] == ["1=1,2=2,3=3,4=4,5=5", 200, 1, 50]
    assert [second[name] for name in names] == ["1=1,2=2,3=3,4=4,5=7", 150, 0, 1]
    assert second["difference"]["prediction"]["mae"] == pytest.approx({"value": 1, "low": 1, "high": 1})
    value, low, high = first["prediction"]["mae"].values()
    assert low < value < high and value == pytest.approx(common.mean())
    assert high - low == pytest.approx(2 * 1.96 * common.std() / np.sqrt(149), rel=0.1)
    assert all(f"{n}: {path}: " in printed for n, path in enumerate(paths, 1)) and "| 2 decoded " in printed
    assert f"lowest RMSE: {paths[0]}" in printed and printed.count("| kappa ") == 2
    assert "149 records" in printed and "1 without score, 50 not in all files" in printed


def test_other_values_fewer_cots_and_renormalised(lab):
    """Compute predictions anew, with half the mass on x or, after a second CoT, on 100 − x."""
    rows = predictions(30)
    for i, row in enumerate(rows):
        half = [p / 2 for p in row["score_probs"][0]]
        row |= {"score_probs": [half, half[::-1]], "finished": [True, i > 0], "off_grid": [0.5, 0.3]}
        row |= {"score": 25 * (row["score"] - 1), "ratings": [0, 25 * (i % 3)]}
    arguments = [lab.write("p.jsonl", rows), "--grid", "1=0,2=25,3=50,4=75,5=100"]
    both, printed = evaluate(lab, *arguments)
    assert both["prediction"]["pearson"]["value"] is None and "undefined" in printed  # constant
    assert both["against_others"]["pearson"] is None
    assert both["prediction"]["mae"]["value"] == pytest.approx(np.mean([abs(r["score"] - 25) for r in rows]))
    assert (both["cots"], both["unfinished_rate"], both["off_grid_mean"]) == (60, 1 / 60, 0.4)
    first, _ = evaluate(lab, *arguments, "--cots", 1, "--renormalise")
    assert first["prediction"]["mae"]["value"] == first["unfinished_rate"] == 0 and first["cots"] == 30


def test_what_cannot_be_compared_is_refused(lab):
    path, out = lab.write("p.jsonl", predictions(2)), ("--out", lab.path / "eval")
    wrong = {"scores differ": {"score": 1.5}, "is missing": {"decoded": None}, "in common": {"id": "x"}}
    for message, change in wrong.items():
        assert message in lab.fail("eval", path, lab.write("q.jsonl", [predictions(1)[0] | change]), *out)[1]
    assert "'r0' has fewer CoTs than --cots 2" in lab.fail("eval", path, "--cots", 2, *out)[1]
    empty = lab.write("q.jsonl", [predictions(1)[0] | {"score_probs": [[0.0] * 5]}])
    assert "no probability on any score" in lab.fail("eval", empty, "--renormalise", *out)[1]
    assert "is given twice" in lab.fail("eval", path, path, *out)[1] and not out[1].exists()
    assert "is there already" in lab.fail("eval", path, "--out", lab.path)[1]


def test_agreement_is_of_the_nearest_grid_points_and_the_ceiling_of_the_raters(lab):
    """Round to a wide grid; length and ratings count where the records have them."""
    rows = predictions(40)
    for i, row in enumerate(rows):
        row["score"] = 25 * (row["score"] - 1)
        row |= {"prediction": min(row["score"] + 12, 100), "decoded": max(row["score"] - 30, 0)}
        row |= {"response": "x" * (i % 7), "ratings": [i % 5, i % 5 + 1, i % 5 + 1]}
    three = [lab.write(f"{name}.jsonl", rows) for name in "abc"]
    for name in "abc":
        note = '{"arguments": {"grid": "1=0,2=25,3=50,4=75,5=100", "suffix": " is "}}'
        (lab.path / f"{name}.run.json").write_text(note)
    found, printed = evaluate(lab, three[0])
    assert found["prediction"]["exact"]["value"] == found["decoded"]["within_one"]["value"] == 1
    assert found["decoded"]["exact"]["value"] == np.mean([row["score"] == 0 for row in rows])
    assert abs(found["prediction"]["length_bias"]["value"]) < 1 and "| length_bias " in printed
    rmse = ((1 + 2 * 0.25) / 3) ** 0.5  # off by 1, by one half, by one half
    assert "| 120 ratings, against the mean" in printed and f" | {rmse:.3f} " in printed
    others = [(i % 5 + 1 - k / 2, row["prediction"]) for i, row in enumerate(rows) for k in (0, 1, 1)]
    assert found["against_others"]["rmse"] == pytest.approx(
        np.sqrt(np.mean([(a - b) ** 2 for a, b in others]))
    )
    *_, printed = evaluate(lab, *three)
    assert "| 3 prediction " in printed and "decoded" not in printed
