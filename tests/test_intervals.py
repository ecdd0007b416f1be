"""Intervals: the promise kept where it can be, and nothing calibrated on other predictions."""

import json

import numpy as np
import pytest
from conftest import ROOT

from tract import hub, intervals
from tract.options import make_judging_parser
from tract.records import Grid
from tract.scores import Predictions


def test_half_widths_by_hand():
    """Take the 8th of nine, for ⌈10 · .8⌉ = 8, and at 90 % the 9th; of eight, 90 % would take a 9th, too."""
    errors = np.array([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6])
    assert [intervals.half_width(errors, level) for level in (80, 90)] == [0.8, 0.9]
    assert intervals.half_width(errors[1:], 90) is None and intervals.half_width(errors[:3], 80) is None


def test_of_exchangeable_records_as_many_are_inside_as_promised(tmp_path):
    """Of 21 errors each is equally likely to be the new one: 17 of 21 and 19 of 21 keep to the half-width."""
    random, trials = np.random.default_rng(0), 4000
    errors = random.standard_cauchy((trials, 21)) ** 2
    for level, share in ((80, 17 / 21), (90, 19 / 21)):
        inside = np.mean([intervals.half_width(row[:20], level) >= row[20] for row in errors])
        assert inside == pytest.approx(share, abs=3 * (share * (1 - share) / trials) ** 0.5)
    rows = [{"score": y, "renormalised": False, "finished": [True]} for y in random.uniform(1, 5, 4000)]
    for row in rows:
        row["prediction"] = row["score"] + random.normal()
    found = intervals.calibrate(
        str(tmp_path / "p.jsonl"), Predictions(rows, Grid()), 0, list(range(len(rows)))
    )
    for level, normal in (("80 %", 1.2816), ("90 %", 1.6449)):
        assert found[level]["half_width"] == pytest.approx(normal, abs=0.06)
        assert found[level]["inside"] == pytest.approx(float(level[:2]) / 100, abs=0.03)


@pytest.fixture
def judged(lab):
    """Judge 40 records with the seed model; returns the command, and where eval.py found their intervals."""
    judge = [
        "predict",
        "--no-cot",
        "--renormalise",
        "--data",
        lab.write("data.jsonl", lab.rows[:40]),
        "--model",
    ]
    lab.run(*judge, ROOT / "data/tiny/seed", "--out", lab.path / "p.jsonl")
    lab.run("eval", lab.path / "p.jsonl", "--resamples", 5, "--out", lab.path / "eval")
    return judge, lab.path / "eval/metrics.json"


def test_from_eval_to_new_scores(lab, judged):
    judge, path = judged
    found = json.loads(path.read_text())["files"][str(lab.path / "p.jsonl")]["intervals"]
    errors = sorted(abs(row["prediction"] - row["score"]) for row in lab.read("p.jsonl"))
    halves = [found[level]["half_width"] for level in ("80 %", "90 %")]
    assert halves == [errors[32], errors[36]] and found["n"] == 40  # ⌈41 · .8⌉ = 33, ⌈41 · .9⌉ = 37
    assert f"90 %: ± {halves[1]:.3g}, on the other half " in lab.capsys.readouterr().out
    new = lab.path / "new.jsonl"
    lab.run(*judge, ROOT / "data/tiny/seed", "--out", new, "--intervals", path)
    for row in lab.read("new.jsonl"):
        ends = [max(row["prediction"] - halves[1], 1), min(row["prediction"] + halves[1], 5)]
        assert [row["low"], row["high"]] == pytest.approx(ends, rel=1e-6)
    judge[judge.index("--data") + 1] = new
    lab.run(*judge, ROOT / "data/tiny/seed", "--out", lab.path / "again.jsonl")
    assert not {"low", "high"} & lab.read("again.jsonl")[0].keys()  # of the judge before


def test_a_model_of_the_hub_is_fetched_before_it_is_compared(lab, judged, monkeypatch):
    report = json.loads(judged[1].read_text())
    (entry,) = report["files"].values()
    way = entry["intervals"]["way"]
    for name in [name for name in way if name.startswith("model ")]:
        del way[name]
    way |= {"model name": hub.MODELS["smollm2-135m"], "model revision": "0" * 40}
    there = []

    def snapshot(name, allow_patterns, local_files_only):
        if local_files_only and not there:
            raise FileNotFoundError(name)
        there.append(name)
        return lab.path / ("0" * 40)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    options = ["--model=smollm2-135m", "--no-cot", "--renormalise"]
    args = make_judging_parser("").parse_args([*options, f"--intervals={lab.write('hub.json', [report])}"])
    args.grid = Grid()
    assert intervals.read(args)["n"] == 40


def test_too_few_records_have_no_interval(lab, judged):
    judge, _ = judged
    few = lab.write("few.jsonl", lab.read("p.jsonl")[:17])  # half of them are 8
    lab.run("eval", few, "--resamples", 5, "--out", lab.path / "few")
    assert "; 90 %: too few records" in lab.capsys.readouterr().out
    options = ["--out", lab.path / "new.jsonl", "--intervals", lab.path / "few/metrics.json"]
    lab.run(*judge, ROOT / "data/tiny/seed", *options)
    assert "17 records are too few for 90 %: low and high will be null" in lab.capsys.readouterr().out
    assert lab.read("new.jsonl")[0]["low"] is lab.read("new.jsonl")[0]["high"] is None


def test_a_group_is_on_one_half_and_counts_as_one():
    """Copies of a record are no check of each other: 20 questions are enough, 3 are not."""
    rows = [
        {"id": str(i), "score": 3, "prediction": 3 + i % 20 / 10, "finished": [True], "renormalised": False}
        for i in range(200)
    ]
    questions = [i % 20 for i in range(200)]
    found = intervals.calibrate("p.jsonl", Predictions(rows, Grid()), 0, questions)
    inside = 10 * found["90 %"]["inside"]  # of ten questions, each with ten copies
    assert inside == pytest.approx(round(inside))
    assert (
        intervals.calibrate("p.jsonl", Predictions(rows, Grid()), 0, [i % 3 for i in range(200)])["80 %"]
        is None
    )


def test_predictions_made_in_another_way_are_refused(lab, judged, tiny_tokenizer):
    judge, path = judged
    seed = ROOT / "data/tiny/seed"
    two = lab.path / "p.jsonl", lab.write("q", lab.read("p.jsonl"))
    lab.run("eval", *two, "--resamples", 5, "--out", lab.path / "two")
    wrong = [
        (seed, path, ["--temperature", 0.5], "temperature was 1.0, is 0.5; calibrate with"),
        (seed, path, ["--grid", "1,2,3,4,5=7"], "grid was '1=1,2=2,3=3,4=4,5=5', is '1=1,2=2,3=3,4=4,5=7'"),
        (seed, path, ["--suffix", "good"], "suffix was ' So the overall score is ', is ' good '"),
        (lab.checkpoint(tiny_tokenizer), path, [], "model config.json was "),
        (seed, lab.path / "two/metrics.json", [], "no metrics.json of one judge"),
        (seed, lab.path / "none.json", [], "no metrics.json of one judge"),
        (seed, lab.write("list.json", [{"files": []}]), [], "no metrics.json of one judge"),
        (
            seed,
            lab.write("a.json", [{"files": {"a": {"intervals": {}}}}]),
            [],
            "no metrics.json of one judge",
        ),
        (seed, lab.write("b.json", [{"files": {"a": None}}]), [], "no metrics.json of one judge"),
    ]
    for model, file, options, message in wrong:
        code, said = lab.fail(*judge, model, "--out", lab.path / "x", "--intervals", file, *options)
        assert code == 2 and message in said.strip().splitlines()[-1] and not list(lab.path.glob("x*"))
    # Renamed or joined, the file says less, but always how many CoTs, which grid, and whether renormalised
    lab.run("eval", lab.path / "q", "--resamples", 5, "--out", lab.path / "renamed")
    changes = {"--no-cot": "num_cots was 1, is 2", "--renormalise": "renormalise was True, is False"}
    for option, message in changes.items():
        options = [seed, *["--num-cots", 2] * (option == "--no-cot"), "--out", lab.path / "x", "--intervals"]
        asked = [word for word in judge if word != option]
        assert message in lab.fail(*asked, *options, lab.path / "renamed/metrics.json")[1]
