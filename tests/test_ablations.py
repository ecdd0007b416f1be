"""The graph of the ablations, the ideal judges, and that the committed tables come from the committed numbers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import gen_cot
import stage1_train
from bench import ablations
from data.tiny import ideal, prepare
from runs import Fault, InputError

RESULTS = ROOT / "results/ablations"
FLAGS = "--lr 0.001 --epochs 4"


@pytest.fixture(scope="module")
def plan():
    return ablations.plan("out", 1, flags=FLAGS, num_cots=5, split="test")


def test_every_command_reads_what_an_earlier_one_made(plan):
    made = set()
    for out, command in plan.commands.items():
        for option in ("--data", "--model"):
            words = command.split()
            if option in words:
                path = words[words.index(option) + 1]
                assert path in made or (ROOT / path).exists(), command
        made.add(out)
    files = [file for of in plan.predictions.values() for file in of.values()]
    assert len(set(files)) == len(files) and set(files) <= made
    assert set(plan.predictions) == {row for group in ablations.GROUPS.values() for row in group}


def test_every_command_is_one_its_script_understands(plan, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in plan.commands.values():
        _, script, *arguments = command.split()
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        if script.startswith("stage1"):
            stage1_train.make_parser("", stage=1).parse_args()
        elif script == "gen_cot.py":
            gen_cot.make_parser("", model="", data="", out="").parse_args()


def test_a_row_needs_no_more_than_its_own_commands(plan):
    def scripts(row: str) -> list[str]:
        return [command.split()[1] for _, command in ablations.needed([plan], [row])]

    assert scripts("raft") == ["data/tiny/prepare.py", "stage1_train.py", "predict.py", "predict.py"]
    assert scripts("a2").count("stage2_train.py") == scripts("a2").count("gen_cot.py") == 1
    tract = dict(ablations.needed([plan], ["tract"]))
    assert "--model data/tiny/seed" in tract["out/tract"] and "--data out/a1.cots.jsonl" in tract["out/tract"]
    a4 = dict(ablations.needed([plan], ["a4"]))
    assert "--model out/a1 --data out/a1.cots.jsonl" in a4["out/a4"] and "--continue-from-stage1" in a4["out/a4"]


def test_commands_run_once_and_a_failure_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    good = f"{tmp_path}/d/train.jsonl", f"python data/tiny/prepare.py --splits train --size 3 --out {tmp_path}/d"
    bad = f"{tmp_path}/e", f"python eval.py {tmp_path}/none.jsonl --out {tmp_path}/e"
    log = tmp_path / "log.jsonl"
    for ran in (["good", "bad"], ["good", "bad", "bad"]):  # given again, only what is not there is made
        with pytest.raises(Fault, match=f"{bad[0]}: not made, see {bad[0]}.log"):
            ablations.run_all([good, bad], jobs=1, log=log)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [(line["command"], line["exit"]) for line in lines] == [
            (good[1], 0) if r == "good" else (bad[1], 2) for r in ran
        ]
    assert len(Path(good[0]).read_text().splitlines()) == 3
    assert "none.jsonl: no such file" in Path(f"{bad[0]}.log").read_text()


def test_a_finished_row_is_summed_up(tmp_path):
    """Two seeds of two rows, made up: what the table says of them, by hand."""
    true = [1, 2, 3, 4, 5, 3]
    plans = {}
    for seed, off in ((1, 0.0), (2, 1.0)):
        files = {}
        for row, constant in (("tract", False), ("a1", True)):
            path = files[row] = tmp_path / f"{row}{seed}.jsonl"
            with path.open("w") as out:
                for i, y in enumerate(true):  # certain of the score next to the true one, or always of a 3
                    token = 2 if constant else min(4, y - 1 + int(off))
                    probs = [0.0] * 5
                    probs[token] = 1.0
                    record = {"id": str(i), "score": y, "finished": [True] * 2, "score_probs": [probs] * 2, "off_grid": [0, 0]}
                    out.write(json.dumps(record) + "\n")
        plans[seed] = ablations.Plan({}, {row: {"test": str(path)} for row, path in files.items()})
    report = ablations.summarise(plans, ["tract", "a1"], resamples=50)
    cells = {(cell["row"], cell["reading"]): cell for cell in report["cells"]}
    tract, a1 = cells["tract", "rail"], cells["a1", "rail"]
    assert tract["rmse"]["per_seed"] == pytest.approx([0, (5 / 6) ** 0.5]) and a1["rmse"]["mean"] == pytest.approx(
        (10 / 6) ** 0.5
    )
    assert tract["pearson"]["per_seed"][0] == pytest.approx(1) and a1["pearson"]["mean"] == 0
    assert "difference" not in tract and a1["reference"] == "tract"
    difference = a1["difference"]["rmse"]
    assert difference["value"] == pytest.approx((10 / 6) ** 0.5 - (5 / 6) ** 0.5 / 2)
    assert difference["low"] < difference["value"] < difference["high"]
    assert report["variance"]["a1"] == {"within": [0, 0], "between": [0, 0]} and report["records"] == {"test": 6}

    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))  # of a1, the last that was written
    with pytest.raises(InputError, match="a1: not all its seeds were tested on the records that others were"):
        ablations.summarise(plans, ["tract", "a1"], resamples=50)


def test_variance_is_split_into_cots_and_records():
    rng = np.random.default_rng(0)
    each = 2 * rng.normal(size=(20000, 1)) + rng.normal(size=(20000, 5))
    assert ablations.variance(each) == pytest.approx({"within": 1, "between": 4}, rel=0.03)


def test_ideal_judges_know_how_the_task_is_drawn():
    """On fresh draws each is right on average, and the two-stage one also wherever right claims and tone are the same."""
    rng = random.Random("ideal")
    draws = [prepare.sample(rng) | {"id": str(i)} for i in range(4000)]
    ratings = np.array([draw["rating"] for draw in draws])
    predicted = [ideal.predict(draw) for draw in draws]
    for name in predicted[0]:
        column = np.array([p[name] for p in predicted])
        assert column.mean() == pytest.approx(ratings.mean(), abs=0.05)
    errors = {name: np.mean([(p[name] - y) ** 2 for p, y in zip(predicted, ratings, strict=True)]) for name in predicted[0]}
    assert errors["two-stage"] < errors["no-cot"] < errors["one-stage"]  # trusting one's own verdict costs more than no CoT
    two_stage = np.array([p["two-stage"] for p in predicted])
    for value in np.unique(two_stage):
        same = two_stage == value
        assert ratings[same].mean() == pytest.approx(value, abs=4 / same.sum() ** 0.5)
    leaked = np.array([prepare.VERDICTS.index(draw["cot"].split()[3]) for draw in draws])
    for rating in range(1, 6):
        shares = np.bincount(leaked[ratings == rating], minlength=5) / (ratings == rating).sum()
        assert shares == pytest.approx(ideal.VERDICT_PROBS[rating - 1], abs=0.06)


def test_committed_tables_come_from_the_committed_numbers(tmp_path):
    subprocess.run([sys.executable, RESULTS / "draw.py", "--out", tmp_path], check=True, capture_output=True)
    assert (tmp_path / "tables.md").read_bytes() == (RESULTS / "tables.md").read_bytes()
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    settings = json.loads((RESULTS / "settings.json").read_text())
    assert json.loads((RESULTS / "metrics.json").read_text())["settings"] == settings
