"""The benches: the commands behind the ablations, what is made of predictions, whether estimates hold."""

import argparse
import functools
import json
import math
import random
import re
from pathlib import Path

import ablations
import memory
import numpy as np
import pytest
import real
import torch
import ways
from conftest import ROOT
from transformers import MistralConfig

import stage1_train
from data.tiny import ideal, prepare
from eval import METRICS, against_others, draw_resamples
from results.real import draw
from results.speed.draw import tables
from tract import models
from tract.encode import Example, encode_prefix
from tract.options import make_training_parser
from tract.records import Grid, predicted

RESULTS = ROOT / "results/ablations"
METRICS_SHOWN = ("pearson", "rmse")
SETTINGS = json.loads((RESULTS / "settings.json").read_text("utf-8"))


def commands_of(*rows: str) -> dict[str, str]:
    tests = ablations.tests_of(rows)
    return ablations.commands_of("out", 1, tests, ablations.SETUP)


def commands_of_real(task: str) -> dict[str, str]:
    settings = json.loads(real.SETTINGS.read_text("utf-8"))["tasks"][task]
    tests = ablations.tests_of(real.ROWS, settings.get("tests", ["test"]), "DATA", {"a1": 5, "tract": 5})
    return ablations.commands_of("out", 1, tests, real.setup_of(settings, "DATA"))


def test_every_command_is_understood_and_reads_what_an_earlier_one_made(monkeypatch, run_script):
    commands, understand = commands_of(*ablations.ROWS), argparse.ArgumentParser.parse_args

    def parse(*args):
        raise LookupError(understand(*args))  # which no script catches

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    tasks = json.loads(real.SETTINGS.read_text("utf-8"))["tasks"]
    assert set(tasks) <= set(draw.TASKS)
    both = [item for task in tasks for item in commands_of_real(task).items()]
    for some, made in ((commands.items(), set()), (both, {"out/real/smollm2"})):
        for out, command in some:
            assert {word for word in command.split()[:-1] if word.startswith("out/")} <= made, command
            made.add(out)
    for script, *words in [command.split()[1:] for _, command in [*commands.items(), *both]]:
        with pytest.raises(LookupError):
            run_script(script.removesuffix(".py").replace("/", "."), *words)
    assert "--epochs 4 --model data/tiny/seed --data out/a1.cots.jsonl --seed 1" in commands["out/tract"]
    assert "--model out/a1 --data out/a1.cots.jsonl --continue-from-stage1 --seed 1" in commands["out/a4"]
    scripts = [command.split()[1] for command in commands_of("raft").values()]
    assert scripts == ["data/tiny/prepare.py", "stage1_train.py", "predict.py", "predict.py"]


def test_commands_run_once_and_a_failure_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    good, bad = f"{tmp_path}/d/train.jsonl", f"{tmp_path}/e"
    commands = {bad: f"python eval.py {good} --out {bad}"}  # there are no predictions in it
    commands[good] = f"python data/tiny/prepare.py --splits train --size 3 --out {tmp_path}/d"
    made = []
    for _ in range(2):  # given again, only what is not there is made
        with pytest.raises(ablations.runs.Fault, match=f"{bad}: not made"):
            ablations.run_all(commands, jobs=2)
        made.append((tmp_path / "d/train.jsonl").stat().st_mtime_ns)
        log = (tmp_path / "e.log").read_text().splitlines()
        assert log[0] == commands[bad] and "field 'prediction' is missing" in log[1]
    assert made[0] == made[1]
    with pytest.raises(ablations.InputError, match=f"{good}: was not made by"):
        ablations.run_all({good: f"{commands[good]} --seed 2"}, jobs=1)


def test_rows_are_summed_up(tmp_path, lab):
    """Two seeds, certain predictions: those of seed 2 are one too high, or a constant."""
    true, high, three = [1, 2, 3, 4, 5, 3], [2, 3, 4, 5, 5, 4], [3] * 6
    tract, ce = "few-rating-12345-tract", "few-rating-12345-ce"
    certain = {f"1/{tract}": true, f"2/{tract}": high, f"1/{ce}": three, f"2/{ce}": three}
    for name, scores in certain.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        common = {"prompt": "x", "finished": [True] * 2, "grid": "1,2,3,4,5"}
        rows = [common | {"score": y, "prediction": y} for y in true]
        for row, score in zip(rows, scores, strict=True):
            row["score_probs"] = [[0.8 * (score == value) for value in range(1, 6)]] * 2
        lab.write(f"{name}.valid.jsonl", rows)
    arguments = [str(tmp_path / "1"), str(tmp_path / "2")], [(tract, "valid"), (ce, "valid")], ["valid"]
    cells = ablations.summarise(*arguments)["cells"]
    one, other = (c for c in cells if c["reading"] == "renormalised")
    assert one["rmse"]["per_seed"] == pytest.approx([0, (5 / 6) ** 0.5])
    assert one["pearson"]["per_seed"][0] == pytest.approx(1) and other["pearson"]["mean"] == 0
    assert one["log_score"]["per_seed"] == pytest.approx([0, 5 / 6 * math.log(1e-7)])
    assert other["calibration_error"]["mean"] == pytest.approx(4 / 6)
    rail = [c for c in cells if c["reading"] == "rail"]
    assert rail[0]["log_score"]["per_seed"][0] == pytest.approx(math.log(0.8)) and "difference" not in rail[0]
    assert rail[0]["calibration_error"]["per_seed"] == pytest.approx([0.2, 0.8 - 1 / 6])
    rmse = [0.8 * np.array(scores) - true for scores in certain.values()]
    rmse = [np.sqrt((d**2).mean()) for d in rmse]
    difference = rail[1]["difference"]["rmse"]
    assert difference["value"] == pytest.approx(rmse[2] - (rmse[0] + rmse[1]) / 2)
    assert difference["low"] <= difference["value"] <= difference["high"]
    lab.write(f"2/{ce}.valid.jsonl", rows[1:])
    with pytest.raises(ablations.InputError, match=f"{ce}: not tested on the records that others were"):
        ablations.summarise(*arguments)


def test_code_that_changes_meanwhile_stops_the_bench(tmp_path, monkeypatch):
    hashes = iter(range(1000))  # each file has another one whenever it is read
    monkeypatch.setattr(ablations, "sha256", lambda path: next(hashes))
    with pytest.raises(ablations.runs.Fault, match="the code has changed since this began"):
        ablations.run_all({f"{tmp_path}/made": "python make.py"}, jobs=1)


def test_what_is_packed_needs_no_file(tmp_path, lab):
    row = {"prompt": "x", "score": 4.5, "prediction": 4, "finished": [True] * 2, "grid": "1=1,5=5"}
    row["score_probs"] = [[0.125, 0.75], [0.5, 0.5]]
    (tmp_path / "seed1").mkdir()
    for name in ("tract.test", "ce.test"):
        path = lab.write(f"seed1/{name}.jsonl", [row])
        real.pack(f"{tmp_path}/seed1", [name], {"grid": "1,5"})
        path.unlink()
    for name in ("tract.test", "ce.test"):
        found = [values.tolist() for values in ablations.predictions(f"{tmp_path}/seed1", name)]
        assert found == [[row["score_probs"]], [4.5], [1, 5]]
    tests = {("tract", "test"): "predict.py --model @tract", ("ce", "test"): "predict.py --model @ce"}
    args = argparse.Namespace(out=tmp_path, seeds=[1], show=False, measured=False, jobs=1)
    real.check_pack(f"{tmp_path}/seed1", {"grid": "1,5"})
    with pytest.raises(ablations.InputError, match=r"seed1\.npz: was made with settings"):
        real.check_pack(f"{tmp_path}/seed1", {"grid": "1,5", "train": "--epochs 2"})
    folders = ablations.predict(args, tests, ablations.SETUP)
    assert folders == [f"{tmp_path}/seed1"] and not [*tmp_path.glob("seed1/*.log")]  # nothing was run


def test_a_task_with_two_tests_keeps_the_true_scores_of_each(tmp_path, lab, run_script):
    files = ["unseen_answers", "unseen_questions"]
    names = [test for _, test in ablations.tests_of(["a1", "tract"], files)]
    assert {ablations.file_of(name, files) for name in names if "answers" not in name} == {*files}
    assert {ablations.file_of(name, files) for name in ("annotated", "p_s")} == {"unseen_answers"}
    (tmp_path / "seed1").mkdir()
    for test, true in (("unseen_answers", [1, 5, 5]), ("unseen_questions", [1, 1, 5, 1])):
        row = {"prompt": "x", "prediction": 3, "finished": [True], "score_probs": [[0.5, 0.5]], "grid": "1,5"}
        lab.write(f"seed1/tract.{test}.jsonl", [row | {"score": score} for score in true])
    real.pack(f"{tmp_path}/seed1", [f"tract.{file}" for file in files], {"grid": "1,5", "tests": files})
    real.check_pack(f"{tmp_path}/seed1", {"grid": "1,5", "group": "question"})  # which decides no prediction
    for file in files:
        (tmp_path / f"seed1/tract.{file}.jsonl").unlink()
    tests = [("tract", file) for file in files]
    groups = {"unseen_questions": [1, 1, 1, 2]}
    report = ablations.summarise([f"{tmp_path}/seed1"], tests, files, groups)
    assert report["records"] == {"unseen_answers": 3, "unseen_questions": 4}
    assert report["groups"] == {"unseen_questions": 2}
    report |= {
        "task": "saf",
        "baselines": {file: {"ridge": dict.fromkeys(METRICS_SHOWN, 0.0)} for file in files},
    }
    run_script("results.real.draw", lab.write("metrics.json", [report]), "--out", tmp_path)
    tables = (tmp_path / "tables.md").read_text("utf-8")
    assert "## SAF, unseen answers" in tables and "4 records of 2 questions;" in tables


def test_rows_that_some_seeds_lack_are_summed_up_over_the_others(tmp_path, lab):
    true, values = np.array([1.0, 5.0, 5.0]), np.array([1, 5])
    for seed, row, p in ((1, "tract", 0.5), (1, "a1", 0.75), (2, "tract", 1.0)):
        probs = np.stack([1 - p * (true > 1), p * (true > 1)], -1)[:, None]
        kept = {f"{row}.test": probs, "true": true, "grid": values}
        np.savez(tmp_path / f"seed{seed}.npz", **ablations.packed(f"{tmp_path}/seed{seed}") | kept)
    args = argparse.Namespace(out=tmp_path, seeds=[1, 2, 3], measured=True)
    tests = dict.fromkeys([("tract", "test"), ("a1", "test"), ("a1", "annotated"), ("raft", "test")])
    folders = ablations.predict(args, tests, None)  # which runs nothing
    cells = [c for c in ablations.summarise(folders, tests)["cells"] if c["reading"] == "rail"]
    assert [(c["row"], c["seeds"]) for c in cells] == [("tract", ["seed1", "seed2"]), ("a1", ["seed1"])]
    off = [4 * share * (2 / 3) ** 0.5 for share in (0.5, 0.25)]  # of seed 1; seed 2 of TRACT is right
    assert cells[0]["rmse"]["per_seed"] == pytest.approx([off[0], 0])
    assert cells[1]["difference"]["rmse"]["value"] == pytest.approx(off[1] - off[0])
    with pytest.raises(ablations.InputError, match="seed3: nothing has been measured yet"):
        ablations.summarise(folders[2:], tests)


def test_what_is_kept_is_made_again_only_for_what_reads_it(capsys):
    both = ablations.tests_of(["a1", "tract"])
    names = {f"{row}.{test}" for row, test in both}
    assert "out/a1.test.jsonl" not in ablations.commands_of("out", 1, both, ablations.SETUP, names)
    made = list(ablations.commands_of("out", 1, both, ablations.SETUP, names - {"tract.p_s"}))
    assert made[-1] == "out/tract.p_s.jsonl" and "out/a1.test.jsonl" in made and len(made) == 6
    alone = ablations.tests_of(["tract"])
    args = argparse.Namespace(out="out", seeds=[1], show=True, measured=False)
    with pytest.raises(SystemExit):
        ablations.predict(args, alone, ablations.SETUP)
    said = capsys.readouterr().out
    assert "out/seed1/tract.test.jsonl" in said and "a1.test" not in said


def test_bootstrap_resamples_seeds_and_records():
    true, noise = np.random.default_rng(0).normal(size=(2, 400))

    def read(predictions: np.ndarray) -> ablations.Reading:
        return ablations.Reading(predictions, *np.zeros((4, *predictions.shape)))

    column = np.stack([noise, np.full(400, 0.1)])  # r of a constant is undefined, and counts as 0
    found = ablations.metrics_of(read(column), true)
    assert [*found["pearson"]] == pytest.approx([METRICS["pearson"](noise, true), 0])
    assert [*found["rmse"]] == pytest.approx([METRICS["rmse"](p, true) for p in column])
    seeds = true + np.array([[1.0], [3.0]])  # off by 1 and by 3
    samples = ablations.bootstrap(read(seeds), true)["rmse"]
    assert samples[0] == pytest.approx(2) and np.mean(samples < 1.5) == pytest.approx(0.25, abs=0.08)
    samples = ablations.bootstrap(read(true + noise[None]), true)["rmse"]
    assert samples[1:].std() == pytest.approx(1 / 800**0.5, rel=0.2)
    copies = read(np.tile(true + noise, 4)[None])  # 1,600 records that are no more evidence than 400
    samples = ablations.bootstrap(copies, np.tile(true, 4), [*range(400)] * 4)["rmse"]
    assert samples[1:].std() == pytest.approx(1 / 800**0.5, rel=0.2)


def test_log_score_and_calibration_of_a_score_between_two_tokens(tmp_path, lab):
    """On the grid 1 and 5, a true score of 4 is a 5 in three of four cases."""
    row = {"prompt": "x", "score": 4, "prediction": 3.2, "finished": [True], "score_probs": [[0.2, 0.6]]}
    rows = [row | {"grid": "1=1,5=5"}] * 2
    lab.write("p.jsonl", rows)
    probs, true, values = ablations.predictions(str(tmp_path), "p")
    found = ablations.readings(probs, true, values)
    assert [*true] == [4, 4] and [*found["rail"].predictions] == pytest.approx([3.2, 3.2])
    assert [*found["rail"].log_score] == pytest.approx([math.log(0.2) / 4 + math.log(0.6) * 3 / 4] * 2)
    assert [*found["renormalised"].confidence] == pytest.approx([0.75, 0.75])
    assert [*found["rail"].right] == [0.75, 0.75] and [*found["decoded"].predictions] == [5, 5]


def test_readings_are_what_predict_py_makes_of_the_same_probabilities():
    """Two CoTs a record, after most of which several scores are equally likely."""
    probs = np.array([[[0.4, 0.4, 0.1], [0.1, 0.3, 0.3]], [[0.2, 0.6, 0.1], [0.3, 0.3, 0.3]]])
    grid = Grid.parse("1,2,4")
    read = ablations.readings(probs, np.array([1, 3]), np.array(grid.values))
    for name, cots in (("", 1), ("@2", 2)):
        for reading in ("rail", "renormalised"):
            said = [predicted(each[:cots].tolist(), grid, reading == "renormalised") for each in probs]
            expected, decoded = zip(*said, strict=True)
            assert [*read[reading + name].predictions] == pytest.approx(expected)
            assert [*read["decoded" + name].predictions] == pytest.approx(decoded)
    assert [*read["rail"].right] == [0.5, 0.5]  # 1 or 2 where 1 is true; 2 where 3 is, half of it
    assert [*read["rail"].tied] == [1, 0] and [*read["rail@2"].tied] == [1, 0.5]


def test_ideal_judges_know_how_the_task_is_drawn():
    draws = [prepare.sample(random.Random(f"ideal/{i}")) | {"id": str(i)} for i in range(3000)]
    ratings, two_stage = np.array([(draw["rating"], ideal.predict(draw)["two-stage"]) for draw in draws]).T
    for value in np.unique(two_stage):
        same = two_stage == value
        assert ratings[same].mean() == pytest.approx(value, abs=4 / same.sum() ** 0.5)


def test_committed_tables_come_from_the_committed_numbers(tmp_path, run_script):
    run_script("results.ablations.draw", "--out", tmp_path)
    assert (tmp_path / "tables.md").read_bytes() == (RESULTS / "tables.md").read_bytes()
    tables = (RESULTS / "tables.md").read_text("utf-8")
    page, _, _ = (ROOT / "docs/results.md").read_text("utf-8").partition("## The demo")
    assert all(line in tables for line in page.splitlines() if line.startswith("|"))
    report = json.loads((RESULTS / "metrics.json").read_text("utf-8"))
    assert report["settings"]["train"] == SETTINGS["train"]
    for name, metrics in ideal.metrics(ROOT / "data/tiny/test.jsonl").items():
        assert metrics == pytest.approx(report["ideal"]["test"][name])


def test_committed_tables_of_people_s_scores_come_from_the_committed_predictions(
    tmp_path, run_script, monkeypatch
):
    committed = real.SETTINGS.parent
    run_script("results.real.draw", "--out", tmp_path)
    tables = (tmp_path / "tables.md").read_text("utf-8")
    assert tables == (committed / "tables.md").read_text("utf-8")
    page = (committed / "README.md").read_text("utf-8")
    tried = (committed / "tried.md").read_text("utf-8")
    for overview in tables.split("\n\n")[:2]:  # of the GPU's tests, of the CPU's
        assert overview.startswith("| method, prediction |") and overview in page
    settings = json.loads(real.SETTINGS.read_text("utf-8"))["tasks"]
    front = (ROOT / "README.md").read_text("utf-8").splitlines()
    shown = [line for line in front if line.startswith("|")]
    assert shown and set(shown) <= set(tables.splitlines())
    monkeypatch.setattr(ablations, "packed", functools.cache(ablations.packed))  # each cell reads it twice
    for task in ("ists", "ists-cpu", "feedbackqa", "saf-cpu"):
        for cell in json.loads((committed / f"{task}.json").read_text("utf-8"))["cells"]:
            for seed, *numbers in zip(
                cell["seeds"], *(cell[m]["per_seed"] for m in METRICS_SHOWN), strict=True
            ):
                kept = ablations.predictions(f"{committed}/{task}/{seed}", f"{cell['row']}.{cell['test']}")
                predicted = ablations.readings(*kept)[cell["reading"]].predictions
                found = [METRICS[name](predicted, kept[1]) for name in METRICS_SHOWN]
                assert np.nan_to_num(found) == pytest.approx(numbers)  # r of a constant counts as 0
                real.check_pack(f"{committed}/{task}/{seed}", settings[task])
    for task, n in (("ists", 17), ("feedbackqa", 5), ("ists-cpu", 6)):
        kept = ablations.packed(f"{committed}/{task}/tried")  # on validation records
        own = {name: probs for name, probs in kept.items() if probs.ndim == 3 and "annotated" not in name}
        assert len(own) == n
        for name, probs in own.items():
            read = ablations.readings(probs.astype(float), kept["true"], kept["grid"])
            how = read.get("rail@5", read["rail"]).predictions
            r, rmse = (f"{METRICS[metric](how, kept['true']):.3f}" for metric in METRICS_SHOWN)
            assert f"| {r.lstrip('0')} | {rmse.lstrip('0')} |" in tried, (name, r, rmse)
    chunks = dict(np.load(committed / "ists/chunk_scores.npz"))
    said = {name: chunks[name] for name in chunks if "true" not in name}
    assert len(said) == 12
    for name, scores in said.items():
        r = f"{METRICS['pearson'](scores, chunks[name.split('.')[0] + '.true']):.3f}"
        assert re.search(rf"(?<![\d.]){re.escape(r.lstrip('0'))}\b", page + tried), (name, r)


CONTROLS = (  # as the page calls them, and what is kept of them
    ("A.1, four epochs of stage 1", "ists", "a1-4.test"),
    ("stage 2 on other pairs' CoTs", "ists", "swapped.test"),
    ("p_tract after another pair's CoT", "ists", "tract.swapped"),
    ("RAFT without CoT, two epochs", "feedbackqa", "raft-2.test"),
    ("TRACT, two epochs of stage 2", "feedbackqa", "tract-2.test"),
    ("stage 2 on other records' CoTs", "feedbackqa", "swapped.test"),
    ("p_tract after another record's CoT", "feedbackqa", "tract.swapped"),
)


def judged(task: str, name: str, seed: int = 1) -> tuple[np.ndarray, np.ndarray] | None:
    """Return what a row predicts in a test from its first CoT, and the true scores; None if not measured."""
    found = ablations.predictions(f"{real.SETTINGS.parent}/{task}/seed{seed}", name)
    return found and (found[0][:, 0] @ found[2], found[1])


def test_what_the_page_says_of_people_s_scores_is_counted():
    committed = real.SETTINGS.parent
    page = " ".join((committed / "README.md").read_text("utf-8").split())
    for task, many in (
        ("ists", "524 pairs p_tract is nearer in {} and"),
        ("feedbackqa", "1,422 passages nearer in {},"),
    ):
        p_s, p_tract = (np.abs(np.subtract(*judged(task, f"{row}.test"))) for row in ("a1", "tract"))
        text = f"{many} off by more than 2 in {(p_tract > 2).sum()}, p_s in {(p_s > 2).sum()}"
        assert text.format((p_tract < p_s).sum()) in page
    cots = map(json.loads, (committed / "feedbackqa/cots.jsonl").read_text("utf-8").splitlines())
    same = np.array(
        [[of[name].startswith("This answer is irrelevant") for name in ("p_s", "p_tract")] for of in cots]
    )
    share = [f"{of:.0%}".replace("%", " %") for of in same.mean(0)]
    assert f"CoTs of p_tract there {share[1]} begin" in page and f"as do {share[0]} of p_s's" in page
    r = METRICS["pearson"](*(of[same[:, 1]] for of in judged("feedbackqa", "tract.test")))
    assert f"r = {r:.2f}".replace("0.", ".") + " with the truth" in page
    files = [committed / f"{task}/squared_error.json" for task in ("ists", "feedbackqa")]
    errors = [json.loads(path.read_text("utf-8")) for path in files]
    for name, text in (
        ("a2", "a squared error of {} and {}"),
        ("two-hot", "two-hot CE {} and {}"),
        ("p_tract", "TRACT {} and {}."),
    ):
        late = [np.mean(of[f"{name}.frozen"][-len(of[f"{name}.frozen"]) // 4 :]) for of in errors]
        assert text.format(*(f"{error:.2f}".removeprefix("0") for error in late)) in page


def test_what_is_said_of_the_rows_on_a_cpu_is_kept():
    committed = real.SETTINGS.parent
    page = " ".join((committed / "README.md").read_text("utf-8").split())
    errors = json.loads((committed / "ists-cpu/squared_error.json").read_text("utf-8"))
    rows = ("token", "tract-0.02", "ce-w1", "two-hot-w1", "tract")
    late = [f"{np.mean(errors[row][-100:]):.2f}".removeprefix("0") for row in rows]
    text = "in the last 100 steps, is {} and {} where the score weighs a token (CE, with squared error),"
    assert (text + " {}, {} and {} where it weighs its CoT").format(*late) in page
    assert f"A.2 ends at {np.mean(errors['a2'][-100:]):.2f}." in page
    cells = json.loads((committed / "ists-cpu.json").read_text("utf-8"))["cells"]
    r = {c["row"]: c["pearson"]["mean"] for c in cells if (c["test"], c["reading"]) == ("test", "rail")}
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    for row in ("token-3e-4", "ce-w1-3e-4", "tract-3e-4"):
        r[row], rmse = (METRICS[name](*judged("ists-cpu", f"{row}.test")) for name in METRICS_SHOWN)
        found = f"| {r[row]:.3f} | {rmse:.3f} | {np.mean(errors[row][-100:]):.2f} |"
        assert found.replace("0.", ".") in (committed / "tried.md").read_text("utf-8")
    rows = ("token", "ce-w1", "tract", "tract-3e-4", "ce-w1-3e-4")
    text = "CE rises from {} to {} (sentences, half the epochs, one seed); TRACT has {}, but {} to CE's {} at"
    assert text.format(*(f"{r[row]:.2f}".removeprefix("0") for row in rows)) in readme
    rows = ("token", "token-3e-4", "ce-w1", "ce-w1-3e-4", "tract-0.02", "tract", "tract-3e-4", "two-hot-w1")
    text = "| CE | {} | {} | {} (`--score-weight 1`) | {} | | CE and squared error | {} (`--lambda 0.02`) |"
    text += " | {} (TRACT) | {} | | two-hot CE | | | {} |"
    assert text.format(*(f"{r[row]:.3f}".removeprefix("0") for row in rows)) in page
    for row, other, low, high, text in (
        ("ce-w1", "token", 0.18, 0.29, "as much as its CoT is worth {} [.18, .29] with CE"),
        ("ce-w1-3e-4", "token-3e-4", 0.22, 0.33, "({} [.22, .33] at a learning rate of 3e-4)"),
        ("tract", "tract-0.02", 0.17, 0.27, "and {} [.17, .27] with the squared error."),
        ("tract-0.02", "token", 0.03, 0.11, "is {} [.03, .11] ahead where the score weighs a token;"),
        ("tract", "ce-w1", 0.03, 0.09, "no better: {} [.03, .09] ahead at 1e-4"),
        ("ce-w1-3e-4", "tract-3e-4", 0.00, 0.06, "{} [.00, .06] behind at 3e-4"),
        ("tract", "two-hot-w1", 0.05, 0.11, "({} [.05, .11] of two-hot CE)"),
        ("tract", "a2", 0.10, 0.19, "behind TRACT (on a CPU {} [.10, .19]),"),
        ("a2", "token", 0.09, 0.21, "than from those of p_s, {} [.09, .21] on a CPU."),
    ):
        (ours, true), (theirs, _) = (judged("ists-cpu", f"{name}.test") for name in (row, other))
        picks = np.random.default_rng(0).integers(0, len(true), (1000, len(true)))
        apart = [np.subtract(*np.corrcoef([true[i], ours[i], theirs[i]])[0, 1:]) for i in picks]
        assert np.percentile(apart, [2.5, 97.5]) == pytest.approx([low, high], abs=0.01), row
        assert text.format(f"{r[row] - r[other]:.2f}".removeprefix("0")) in page
    seconds = json.loads((committed / "ists-cpu/seconds.json").read_text("utf-8"))["seconds of each command"]
    assert f"({seconds['tract.test']:.0f} s and {seconds['raft.test']:.0f} s, 524 records" in page
    log = (committed / "ists-cpu/stage3.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line) for line in log]
    tried = [steps[0]["valid_before"], *(step["valid"] for step in steps if "valid" in step)]
    options = " ".join((ROOT / "docs/options.md").read_text("utf-8").split())
    for name, text in (
        ("rmse", "records from {} to {} (10 steps) and {} (20)"),
        ("r", "r from {} to {} and {}"),
    ):
        assert text.format(*(f"{found[name]:.3f}".removeprefix("0") for found in tried)) in options


def test_what_is_said_of_saf_is_kept():
    committed = real.SETTINGS.parent
    page = " ".join((committed / "README.md").read_text("utf-8").split())
    report = json.loads((committed / "saf-cpu.json").read_text("utf-8"))
    rail = {(c["row"], c["test"]): c for c in report["cells"] if c["reading"] == "rail"}
    rows = ("tract", "raft", "a2")
    answers = [rail[row, "unseen_answers"]["pearson"]["mean"] for row in rows]
    known = report["baselines"]["unseen_answers"]
    means = [known[name]["pearson"] for name in ("mean training score of the question", "ridge")]
    text = "TRACT, RAFT and A.2 reach r {}, {} and {}, the mean training score of the question alone {},"
    text += " a regression on words {}."
    assert text.format(*(f"{r:.3f}".replace("0.", ".") for r in answers + means)) in page
    errors = [rail[row, "unseen_questions"]["rmse"]["mean"] for row in rows]
    errors.append(report["baselines"]["unseen_questions"]["mean training score"]["rmse"])
    text = "(RMSE {}, {} and {}, the mean training score {};"
    assert text.format(*(f"{error:.3f}".replace("0.", ".") for error in errors)) in page
    tests = ("annotated", "unseen_questions-annotated", "unseen_answers", "unseen_questions")
    own = [rail["a1", test]["rmse"]["mean"] for test in tests]
    text = "p_s has an RMSE of {} and {} on the graders' feedback, of {} and {} on its own"
    assert text.format(*(f"{error:.3f}".replace("0.", ".") for error in own)) in page
    own = [rail["tract", test]["rmse"]["mean"] for test in (tests[0], tests[2], tests[1], tests[3])]
    text = "no difference whose feedback it reads ({} and {}; {} and {})"
    assert text.format(*(f"{error:.3f}".replace("0.", ".") for error in own)) in page
    apart = rail["a2", "unseen_answers"]["difference"]["pearson"]
    assert "A.2 is {value:.2f} [{low:.2f}, {high:.2f}] ahead".format(**apart).replace("0.", ".") in page

    kept = dict(np.load(committed / "saf-cpu/questions.npz"))  # of the unseen answers, and training scores

    def within_questions(values):
        return values - [values[kept["question"] == number].mean() for number in kept["question"]]

    with_means = []
    within = []
    for row in rows:
        probs, true, grid = ablations.predictions(f"{committed}/saf-cpu/seed1", f"{row}.unseen_answers")
        predicted = probs[:, 0] @ grid
        r = METRICS["pearson"](predicted, kept["mean"])
        with_means.append(f"{r:.2f}".removeprefix("0"))
        r = METRICS["pearson"](within_questions(predicted), within_questions(true))
        within.append(f"{r:.2f}".removeprefix("0"))
    text = "correlate with the question's mean training score at {}, {} and {};"
    assert text.format(*with_means) in page
    assert "have r = {}, {} and {} with the true".format(*within) in page
    errors = json.loads((committed / "saf-cpu/squared_error.json").read_text("utf-8"))
    numbers = [*(np.mean(errors[row][-50:]) for row in rows), kept["variance"]]
    text = "is still {}, {} and {}, with a variance of {}:"
    assert text.format(*(f"{x:.3f}".removeprefix("0") for x in numbers)) in page


def test_saf_with_a_heavier_squared_error_is_as_said():
    committed = real.SETTINGS.parent
    page = " ".join((committed / "README.md").read_text("utf-8").split())
    question = np.load(committed / "saf-cpu/questions.npz")["question"].tolist()
    heavy, light, a2 = (judged("saf-cpu", f"{row}.unseen_answers") for row in ("tract-16", "tract", "a2"))
    for better, worse, low, high, text in (
        (heavy, light, -0.003, 0.064, "{:.3f} [-.003, .064] more,"),
        (a2, heavy, -0.06, 0.08, "as 1 on scores of 1 to 5, {:.2f} [-.06, .08]."),
    ):
        apart = []
        for picked in draw_resamples(question, 1000, seed=1):
            r = [METRICS["pearson"](predicted[picked], true[picked]) for predicted, true in (better, worse)]
            apart.append(r[0] - r[1])
        assert text.format(apart[0]).replace("0.", ".") in page
        assert np.percentile(apart[1:], [2.5, 97.5]) == pytest.approx([low, high], abs=0.01)
    numbers = [METRICS["pearson"](*heavy), METRICS["rmse"](*heavy)]
    numbers.append(METRICS["rmse"](*judged("saf-cpu", "tract-16.unseen_questions")))
    errors = json.loads((committed / "saf-cpu/squared_error.json").read_text("utf-8"))
    numbers.append(np.mean(errors["tract-16"][-50:]))
    text = "r {:.3f} on unseen answers, .024 [-.003, .064] more, and an RMSE of {:.3f} and {:.3f} (before,"
    text += " .280 and .241); its squared error in training ends at {:.3f}. RAFT keeps its r ({:.3f})."
    numbers.append(METRICS["pearson"](*judged("saf-cpu", "raft-16.unseen_answers")))
    assert text.format(*numbers).replace("0.", ".") in page


def test_means_of_groups_are_those_of_training():
    train = [{"q": "a", "score": 1}, {"q": "a", "score": 2}, {"q": "b", "score": 5}]
    assert real.means_of_groups(train, [{"q": "b"}, {"q": "a"}], "q").tolist() == [5, 1.5]
    assert real.means_of_groups(train, [{"q": "a"}, {"q": "c"}], "q") is None


def test_controls_and_what_one_rater_reaches_are_counted():
    committed = real.SETTINGS.parent
    page = " ".join((committed / "README.md").read_text("utf-8").split())
    for label, task, name in CONTROLS:
        of_seeds = [found for seed in (1, 2, 3) if (found := judged(task, name, seed))]
        line = f"| {label} | {len(of_seeds)} |"
        for metric in METRICS_SHOWN:
            each = [METRICS[metric](*found) for found in of_seeds]
            line += f" {np.mean(each):.3f}" + (f" ± {np.std(each, ddof=1):.3f} |" if each[1:] else " |")
        assert line in page
    ratings = dict(np.load(committed / "feedbackqa/ratings.npz"))["ratings"].tolist()

    def against_two(row: str) -> list[float]:
        judges = []
        for seed in (1, 2, 3):
            predicted, _ = judged("feedbackqa", f"{row}.test", seed)
            rows = [{"prediction": p, "ratings": r} for p, r in zip(predicted, ratings, strict=True)]
            judges.append(against_others(rows, "prediction"))
        return [np.mean([judge[metric] for judge in judges]) for metric in METRICS_SHOWN]

    rater = against_others([{"ratings": r} for r in ratings])
    numbers = [*against_two("tract"), *(rater[metric] for metric in METRICS_SHOWN), *against_two("raft")]
    text = "p_tract has r = {:.3f} and an RMSE of {:.3f}, the third rater {:.3f} and {:.3f}, RAFT without CoT"
    text += " {:.3f} and {:.3f}."
    assert re.sub(r"\b0\.", ".", text.format(*numbers)) in page


@pytest.mark.parametrize(
    ("row", "other", "low", "high", "text"),
    [
        ("swapped", "a1", 0.16, 0.28, "it still gains {0:.2f} [.16, .28] and {1:.2f} [.27, .47],"),
        ("tract", "swapped", 0.03, 0.10, "add the rest, {0:.2f} [.03, .10] and {1:.2f} [.07, .25]."),
        ("raft", "ce-no-cot", 0.001, 0.026, "RAFT is {0:.3f} [.001, .026] and {1:.3f} [-.007, .059] ahead"),
        ("ce", "a1", 0.004, 0.113, "alone is {0:.3f} [.004, .113] ahead of A.1 on sentences"),
    ],
)
def test_the_differences_to_decide_by_are_counted(monkeypatch, row, other, low, high, text):
    page = " ".join((real.SETTINGS.parent / "README.md").read_text("utf-8").split())

    monkeypatch.setattr(ablations, "packed", functools.cache(ablations.packed))

    def correlations(task: str, name: str) -> np.ndarray:
        """Return r on the data, then on 1,000 resamples, of each seed (1001, 3)."""
        records_of = np.random.default_rng(0)
        found = []
        judges = [judged(task, f"{name}.test", seed) for seed in (1, 2, 3)]
        n = len(judges[0][1])
        for number in range(1001 if task == "ists" else 1):
            records = records_of.integers(0, n, n) if number else np.arange(n)
            found.append([np.corrcoef(p[records], true[records])[0, 1] for p, true in judges])
        return np.array(found)

    apart = {task: correlations(task, row) - correlations(task, other) for task in ("ists", "feedbackqa")}
    on_both = [apart[task][0].mean() for task in ("ists", "feedbackqa")]
    assert re.sub(r"\b0\.", ".", text.format(*on_both)) in page
    seeds = np.random.default_rng(1).integers(0, 3, (1000, 3))  # of both rows the same
    drawn = np.take_along_axis(apart["ists"][1:], seeds, 1).mean(1)
    assert np.percentile(drawn, [2.5, 97.5]) == pytest.approx([low, high], abs=0.01)


def test_what_else_the_conclusions_say_is_counted():
    page = " ".join((real.SETTINGS.parent / "README.md").read_text("utf-8").split())

    def mean(task: str, row: str, metric: str = "pearson", seeds: tuple = (1, 2, 3)) -> float:
        return float(np.mean([METRICS[metric](*judged(task, f"{row}.test", seed)) for seed in seeds]))

    def ahead(row: str, other: str, metric: str = "pearson") -> list[float]:
        return [mean(task, row, metric) - mean(task, other, metric) for task in ("ists", "feedbackqa")]

    gains = []  # of the mean of three judges
    for task in ("ists", "feedbackqa"):
        judges = [judged(task, "tract.test", seed) for seed in (1, 2, 3)]
        together = np.mean([predicted for predicted, _ in judges], axis=0)
        gains.append(METRICS["pearson"](together, judges[0][1]) - mean(task, "tract"))
    equal = [mean("ists", "tract", seeds=(1,)) - mean("ists", "a1-4", seeds=(1,))]
    equal.append(mean("feedbackqa", "tract-2") - mean("feedbackqa", "a1"))
    for numbers, text in (
        (ahead("tract", "a1"), "A.1 is {:.2f} and {:.2f} behind TRACT"),
        (ahead("raft", "a1"), "half its epochs, and {:.2f} and {:.2f} behind RAFT without a CoT."),
        (equal, "stage 2 is worth {:.2f} (four, one seed) and {:.2f} (two;"),
        (ahead("raft", "swapped"), "but stays {:.2f} and {:.2f} behind RAFT."),
        (ahead("ce-no-cot", "raft", "rmse"), "both read by RAIL, in RMSE {:.3f} and {:.3f}."),
        (ahead("tract", "a2"), "(A.2) is {:.2f} and {:.2f} behind TRACT"),
        (ahead("a1", "ce", "rmse"), "(in RMSE {:.2f} and {:.2f} ahead)"),
        (gains, "**three judges** (the seeds) in place of one {:.3f} and {:.3f};"),
        ([mean("feedbackqa", "raft-2") - mean("feedbackqa", "tract-2")], "{:.2f} behind RAFT of two."),
    ):
        assert re.sub(r"\b0\.", ".", text.format(*numbers)) in page, text


def train_random(
    config, lora: int | None, batch: tuple, bf16: bool, checkpointing: bool, folder: Path
) -> None:
    """Take two steps of two random batches, as `memory.estimate` takes one."""
    sequences, length, supervised = batch
    options = [f"--batch-size={sequences}", "--bf16" if bf16 else "--fp32"]
    args = make_training_parser("", stage=1, defaults=stage1_train.DEFAULTS).parse_args(options)
    ids = torch.randint(10, config.vocab_size, (2 * sequences, length)).tolist()
    window = [Example("random", row, length - supervised, length - 2, 3.67) for row in ids]
    loss_options = models.score_tensors([3, 4, 5, 6, 7], Grid())
    model = models.load_for_training("random", lora, checkpointing, bf16)
    stage1_train.train(args, model, [window] * 2, [], loss_options, folder)


def test_estimated_memory_is_what_is_measured(run_script, capsys, monkeypatch, tmp_path):
    small = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=8000, num_key_value_heads=1, **small)
    for lora, *rest in ((None, False, True), (None, True, False), (8, False, True), (8, False, False)):
        case = (lora, (2, 64, 32), *rest)
        monkeypatch.setattr(models, "load_model", functools.partial(memory.random_model, config))
        folder = tmp_path / f"{lora}{rest}"
        folder.mkdir()
        measured, _ = memory.peak_of(functools.partial(train_random, config, *case, folder))
        estimated = memory.estimate(memory.shape_of(config), *case)
        assert sum(estimated.values()) == pytest.approx(measured, rel=0.04), case
    run_script("cost")
    memory_of_7b, *costs = capsys.readouterr().out.split("\n\n")
    assert memory_of_7b in (ROOT / "docs/speed.md").read_text("utf-8")
    assert len(costs) == 2 and all(table in (ROOT / "docs/scale.md").read_text("utf-8") for table in costs)


def peers_of(lab, *options) -> list:
    few = lab.write("few.jsonl", lab.rows[:6])
    out = lab.path / "peers.json"
    return ["peers", "--data", few, "--fp32", "--batch-size", 3, "--texts", 5, "--out", out, *options]


def test_ways_to_train_and_to_judge_find_the_same(lab):
    lab.run(*peers_of(lab, "--rounds", 1, "--tasks", "training", "judging-5"))
    report = json.loads((lab.path / "peers.json").read_text())
    training, judging = report["tasks"].values()
    assert (len(training["ways"]), len(judging["ways"])) == (4, 2)
    assert all(way["peak"] > training["weights"] for way in training["ways"].values())
    assert all(len(way["seconds"]) == 1 for way in judging["ways"].values())
    said = lab.capsys.readouterr().out
    assert said.endswith(tables(report)) and tables(report)


def doubled(loss):
    """Return a loss of the same value and twice the gradient."""
    return 2 * loss - loss.detach()


def test_another_loss_gradient_or_score_is_no_peer(lab, monkeypatch):
    right = ways.authors_loss
    for wrong, found in ((lambda loss: 1.001 * loss, "loss"), (doubled, "grad_norm")):
        monkeypatch.setattr(ways, "authors_loss", lambda *args, w=wrong, **scores: w(right(*args, **scores)))
        said = lab.fail(*peers_of(lab, "--tasks", "training"))[1]
        assert f"authors' style: {found} is" in said
        (lab.path / "peers.json").unlink()
    monkeypatch.setattr(ways, "encode_prefix", lambda *args: encode_prefix(*args)[1:])
    said = lab.fail(*peers_of(lab, "--tasks", "judging-5"))[1]
    assert "authors' style: generate, then read each text anew: probs is" in said


def test_the_peers_table_has_medians_of_ratios_and_what_was_cut_off():
    timed = {ways.OURS: {"seconds": [1, 2, 4]}, "slow": {"seconds": [3, 2]}, "late": {"seconds": []}}
    report = {"device": "CPU", "tasks": {"judging": {"tokens": 10, "flops": 1, "ways": timed, "note": ""}}}
    lines = tables(report).splitlines()
    assert lines[3] == "| slow | 2.50 | 2.00 (1.00 to 3.00) | 4 |" and "| late | no time left |" in lines[4]
    page = (ROOT / "docs/speed.md").read_text("utf-8")
    for path in (ROOT / "results/speed").glob("*.json"):
        assert tables(json.loads(path.read_text("utf-8"))) in page


def test_the_ridge_regression_sees_how_far_words_overlap():
    overlap = real.features([["The cat sat", "the dog"], ["", "dogs"]])
    assert overlap.tolist() == [[1 / 3, 1 / 2, 1 / 4, 3, 2], [0, 0, 0, 0, 1]]
