"""Measure the rows of the paper's table, and the losses one by one, on the embedded task over several seeds.

    python bench/ablations.py                               # everything; two hours on 2 cores
    python bench/ablations.py --rows tract --seeds 1 --show # only print the commands, in order

A row is a chain of commands that a user could give. Rows share what they have in common: the same p_s, the
same CoTs. A seed draws training records of its own and seeds training and sampling; the test records are the
same for all. OUT/metrics.json (of --split valid: metrics-valid.json) sums up. Interrupted, the same
command goes on.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Iterable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import MistralForCausalLM  # noqa: F401, so that forked commands need not import it

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.tiny import ideal
from eval import confidence_interval, draw_resamples
from loss import two_hot
from tract import runs
from tract.hub import sha256
from tract.records import ROOT, InputError, read_records
from tract.scores import grid_of
from tract.settings import CODE

FEW = "--epochs 8"  # 300 records: twice the epochs, two fifths of the steps
# What a step makes → its command. @NAME is where NAME lies; `commands_of` adds the settings, --seed and --out
STEPS = {
    "train.jsonl": "data/tiny/prepare.py --splits train",
    "train_real.jsonl": "data/tiny/prepare.py --splits train --targets real",
    "train_rounded.jsonl": "data/tiny/prepare.py --splits train --targets rounded",
    "few/train.jsonl": "data/tiny/prepare.py --splits train --size 300",
    "few/train_real.jsonl": "data/tiny/prepare.py --splits train --size 300 --targets real",
    "ce-no-cot": "stage1_train.py --model @seed --data @train.jsonl --no-cot --lambda 0",
    "raft": "stage1_train.py --model @seed --data @train.jsonl --no-cot",
    "raft-pure": "stage1_train.py --model @seed --data @train.jsonl --no-cot --ce-weight 0",
    "ce": "stage1_train.py --model @seed --data @train.jsonl --lambda 0",
    "ce.cots.jsonl": "gen_cot.py --model @ce --data @train.jsonl",
    "a1": "stage1_train.py --model @seed --data @train.jsonl",
    "a1.cots.jsonl": "gen_cot.py --model @a1 --data @train.jsonl",
    "a2": "stage2_train.py --model @seed --data @ce.cots.jsonl --lambda 0",
    "a4": "stage2_train.py --model @a1 --data @a1.cots.jsonl --continue-from-stage1",
    "tract": "stage2_train.py --model @seed --data @a1.cots.jsonl",
    "few-a1": f"stage1_train.py --model @seed --data @few/train.jsonl {FEW}",
    "real.cots.jsonl": "gen_cot.py --model @a1 --data @train_real.jsonl",
    "rounded.cots.jsonl": "gen_cot.py --model @a1 --data @train_rounded.jsonl",
    "few-rating.cots.jsonl": "gen_cot.py --model @few-a1 --data @few/train.jsonl",
    "few-real.cots.jsonl": "gen_cot.py --model @few-a1 --data @few/train_real.jsonl",
}
MAIN = ["seed", "ce-no-cot", "raft", "raft-pure", "ce", "a1", "a2", "a4", "tract"]
WITHOUT_COT = ("seed-no-cot", "ce-no-cot", "raft", "raft-pure")
NUM_COTS = {row: 5 for row in MAIN if row not in WITHOUT_COT}  # CoTs a test record; of other rows one

# One loss beside the other: only stage 2 differs, on the same CoTs, those of p_s
LOSSES = {
    "tract": "",
    "ce": "--lambda 0",
    "two-hot": "--lambda 0 --score-ce two-hot",
    "rps": "--penalty rps",
    "ntl": "--penalty ntl --lambda 0.3",  # 1 was worse on held-out records
    "tract-0.3": "--lambda 0.3",
    "tract-3": "--lambda 3",
    "two-hot-tract": "--score-ce two-hot",
    "only-tract": "--score-ce none",
    "only-rps": "--score-ce none --penalty rps",
    # Controls: a score whose CE weighs as much as a squared error, and a squared error that weighs a token
    "ce-w1": "--lambda 0 --score-weight 1",
    "two-hot-w1": "--lambda 0 --score-ce two-hot --score-weight 1",
    "tract-0.02": "--lambda 0.02",
}
INTEGER = ("ce", "rps", "ntl")  # on integers and the grid 1 to 5, two-hot is the token
REAL = ("tract", "ce", "two-hot", "rps", "ntl")
COMPARED = {  # targets and grid of stage 2 → losses
    # On ratings, TRACT itself is the main row of that name
    "rating-12345": (*INTEGER, "tract-0.3", "tract-3", "only-tract", "only-rps"),
    "few-rating-12345": ("tract", *INTEGER),
    "few-real-15": REAL,
    "real-15": (*REAL, "two-hot-tract", "only-tract", "only-rps"),
    "real-135": REAL,
    "real-12345": REAL,
    "rounded-15": REAL,
    "rounded-135": REAL,
    "rounded-12345": ("tract", *INTEGER),
}
REFERENCE = {}  # row → what it is compared with, if not with "tract": TRACT on the same targets and grid
for targets_and_grid, losses in COMPARED.items():
    targets, _, grid = targets_and_grid.rpartition("-")
    cots = "a1.cots.jsonl" if targets == "rating" else f"{targets}.cots.jsonl"
    epochs = FEW if targets.startswith("few") else ""
    stage2 = f"stage2_train.py --model @seed --data @{cots} --grid {','.join(grid)} {epochs}"
    for loss in losses:
        row = f"{targets_and_grid}-{loss}"
        STEPS[row] = f"{stage2} {LOSSES[loss]}"
        REFERENCE[row] = "tract" if targets == "rating" else f"{targets_and_grid}-tract"
ON_REAL = {row for row in REFERENCE if "rating" not in row}  # tested on real-valued scores

SETTINGS = runs.read_json(ROOT / "results/ablations/settings.json")  # `train`: of both training scripts
FILES = ("test", "test_ood")  # what rows are tested on; the first is the main one
RESAMPLES = 1000  # of seeds and records
GROUPS = {"main": MAIN, "loss": [*REFERENCE]}
ROWS = [*MAIN, *REFERENCE]


def tests_of(rows: list[str], files: Sequence = FILES, data="data/tiny", num_cots: dict = NUM_COTS) -> dict:
    """Return what the rows are tested on: (row, test) → the command that predicts it, with @NAME for NAME.

    files: of records in DATA. A test has the name of its file; on others' CoTs, see `file_of`.
    """
    diagnosed = [file for file in files if file not in ("valid", "test_ood")]  # whose CoTs? is asked of these
    tests = {}
    for row in rows:
        command = f"predict.py --model @{row} --data"
        suffix = "_real" if row in ON_REAL else ""
        no_cot = "--no-cot" if row in WITHOUT_COT else ""
        many = f"--num-cots {num_cots[row]}" if row in num_cots else ""
        for file in files:
            cots = many if file == files[0] else ""
            tests[row, file] = f"{command} {data}/{file}{suffix}.jsonl {no_cot} {cots}"
        # The argument for stage 2: p_s and p_tract on annotated CoTs, p_tract on those of p_s
        for file in diagnosed:
            before = "" if file == files[0] else f"{file}-"
            if row in ("a1", "tract"):
                tests[row, f"{before}annotated"] = f"{command} {data}/{file}.jsonl --given cot"
            if row == "tract" and "a1" in rows:
                tests[row, f"{before}p_s"] = f"{command} @a1.{file}.jsonl --given cots"
    return tests


def file_of(test: str, files: Sequence[str]) -> str:
    """Return the file of a test: of annotated and p_s the main one, of FILE-annotated and FILE-p_s FILE."""
    file = test.removesuffix("annotated").removesuffix("p_s").removesuffix("-")
    return file or files[0]


class Setup(NamedTuple):  # what the commands of a task have in common
    train: dict[str, object]  # options of both training scripts
    rows: dict[str, dict[str, object]]  # row → options of both training scripts that are its own
    judge: dict[str, object]  # options of gen_cot.py and predict.py
    given: dict[str, str]  # name → path of what is there already


SETUP = Setup(SETTINGS["train"], rows={}, judge={"batch-size": 64}, given={"seed": "data/tiny/seed"})


def commands_of(folder: str, seed: int, tests: dict, setup: Setup, kept: Iterable[str] = ()) -> dict:
    """Return all that the tests need of one seed: output → the command that makes it, after what it reads.

    kept: ROW.TEST of what is known already; it is made only where something else reads it.
    """
    tested = {f"{row}.{test}.jsonl": command for (row, test), command in tests.items()}
    steps = STEPS | tested
    commands = {}

    def make(name: str) -> str:  # with what it reads; returns its path
        if name in setup.given:
            return setup.given[name]
        path = f"{folder}/{name}"
        if path in commands:
            return path
        script, arguments = steps[name].split(maxsplit=1)
        out = path
        settings = setup.judge
        if "prepare" in script:
            out = Path(path).parent  # it names its files itself
            settings = {}
        elif "train" in script:
            settings = setup.train | setup.rows.get(name, {})
        words = [f"--{option} {value}".strip() for option, value in settings.items()]  # "" makes a flag
        words += [make(word[1:]) if word.startswith("@") else word for word in arguments.split()]
        commands[path] = " ".join(["python", script, *words, f"--seed {seed} --out {out}"])
        return path

    for name in tested:
        if name.removesuffix(".jsonl") not in kept:
            make(name)
    return commands


def run_command(out: str, command: str, jobs: int) -> None:
    """Run a command in this process, a fork that need not import torch anew; its output goes to OUT.log."""
    os.setsid()  # Ctrl-C reaches the parent alone; it ends its forks by one SIGTERM, at which training saves
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the parent's handler is inherited
    sys.stdout = sys.stderr = open(f"{out}.log", "w", encoding="utf-8", buffering=1)
    print(command)
    torch.set_num_threads(max(1, os.cpu_count() // jobs))
    sys.argv = command.split()[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_all(commands: dict[str, str], jobs: int) -> None:
    """Run what is not there yet, each command after what it reads. Raises InputError or Fault."""
    for out, command in commands.items():
        log = Path(f"{out}.log")
        if Path(out).exists() and not (log.is_file() and log.read_text("utf-8").startswith(f"{command}\n")):
            raise InputError(f"{out}: was not made by `{command}`; remove it, or choose another --out")
        log.parent.mkdir(parents=True, exist_ok=True)
    waiting = [out for out in commands if not Path(out).exists()]
    running = {}  # sentinel of a process → what it makes, the process
    fork = multiprocessing.get_context("fork")
    code = [sha256(path) for path in CODE]
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
            signal.signal(number, signal.default_int_handler)  # so that the forks end with this process
    with runs.progress(len(commands), len(commands) - len(waiting), "bench", "command") as bar:
        while waiting or running:
            unmade = {*waiting, *(out for out, _ in running.values())}
            ready = [out for out in waiting if unmade.isdisjoint(commands[out].split()[:-1])]
            for out in ready[: jobs - len(running)]:
                # Forks have what was imported here, and would read new scripts beside it
                if code != [sha256(path) for path in CODE]:
                    raise runs.Fault("the code has changed since this began; the same command goes on")
                waiting.remove(out)
                process = fork.Process(target=run_command, args=(out, commands[out], jobs), daemon=True)
                process.start()
                running[process.sentinel] = (out, process)
            for sentinel in connection.wait(running):
                out, process = running.pop(sentinel)
                process.join()
                if process.exitcode:
                    raise runs.Fault(f"{out}: not made, {out}.log says why; the same command goes on")
                bar.update()


class Reading(NamedTuple):  # what a file of predictions says when read in one way, all (n,)
    predictions: np.ndarray
    log_score: np.ndarray  # of the true score, nats; a score between two tokens is split as in `two_hot`
    confidence: np.ndarray  # the probability of the likeliest score
    right: np.ndarray  # whether that one is the true score, or its share in it
    tied: np.ndarray  # the share of its CoTs after which several scores are equally likely


def packed(folder: str) -> dict[str, np.ndarray]:
    """Return what FOLDER.npz keeps of a seed, by `real.pack`: predictions and true scores by name, grid."""
    path = Path(f"{folder}.npz")
    return dict(np.load(path)) if path.is_file() else {}


def predictions(folder: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return p (n, CoTs, S) that NAME predicts, true scores (n,) and grid (S,); None if not measured."""
    kept = packed(folder)
    if name in kept:
        # The GPU's seeds in results/real keep the true scores once: all their tests are on the same records
        true = kept["true"] if "true" in kept else kept[f"{name}.true"]
        return kept[name].astype(float), true, kept["grid"]
    path = Path(folder, f"{name}.jsonl")
    if not path.exists():
        return None
    grid = grid_of(str(path))
    rows = read_records(path, grid, ("id", "score", "finished", "score_probs", "grid"))
    probs = np.array([row["score_probs"] for row in rows])
    return probs, np.array([row["score"] for row in rows], float), np.array(grid.values)


def likeliest(probs: np.ndarray) -> np.ndarray:
    """Return the share of each score in being the likeliest, (..., S): equally likely ones share it."""
    top = probs == probs.max(-1, keepdims=True)
    return top / top.sum(-1, keepdims=True)


def readings(probs: np.ndarray, true: np.ndarray, values: np.ndarray) -> dict[str, Reading]:
    """Return the readings of `predictions`, of the first CoT and, if there are n > 1, as NAME@n of all."""
    shares = two_hot(torch.tensor(true), torch.tensor(values)).numpy()  # true scores, (n, S)
    found = {}
    for num_cots in sorted({1, probs.shape[1]}):
        suffix = "" if num_cots == 1 else f"@{num_cots}"
        on_grid = probs[:, :num_cots]  # (n, CoTs, S)
        top = likeliest(on_grid)
        tied = (top.max(-1) < 1).mean(1)
        renormalised = on_grid / on_grid.sum(-1, keepdims=True)
        for name, p_of_cots in (("rail", on_grid), ("renormalised", renormalised)):
            p = p_of_cots.mean(1)  # (n, S)
            log_score = (np.log(p.clip(1e-7)) * shares).sum(1)
            right = (likeliest(p) * shares).sum(1)
            found[name + suffix] = Reading(p @ values, log_score, p.max(1), right, tied)
        # Equally likely scores decode to their mean, as in `records.predicted`
        decoded = (top @ values).mean(1)
        found["decoded" + suffix] = found["renormalised" + suffix]._replace(predictions=decoded)
    return found


def metrics_of(read: Reading, true: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics, (S,) each, of the same records (n,) judged by S seeds: `read` holds (S, n).

    Pearson's r of a constant counts as 0. Calibration error of the likeliest score: Σ over ten bins of
    confidence of the bin's share of records · |mean confidence − share that is right|.
    """
    p = read.predictions
    seeds = len(p)
    defined = (np.ptp(p, axis=1) > 0) & (np.ptp(true) > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(defined, np.corrcoef(true, p)[0, 1:], 0)
    bins = (10 * read.confidence).astype(int).clip(max=9) + 10 * np.arange(seeds)[:, None]
    gaps = np.bincount(bins.ravel(), (read.confidence - read.right).ravel(), 10 * seeds).reshape(seeds, 10)
    rmse = np.sqrt(((p - true) ** 2).mean(1))
    error = np.abs(gaps).sum(1) / len(true)
    return {"pearson": r, "rmse": rmse, "log_score": read.log_score.mean(1), "calibration_error": error}


def bootstrap(read: Reading, true: np.ndarray, groups: Sequence | None = None) -> dict[str, np.ndarray]:
    """Return the metrics, mean over seeds, on the data (entry 0) and on resampled seeds and records.

    groups: which group each record is of; whole groups are resampled. None: each record by itself.
    """
    seeds, n = read.predictions.shape
    # Both draw the same for all readings: differences are paired
    random = np.random.default_rng(0)
    samples = []
    for records in draw_resamples(range(n) if groups is None else groups, RESAMPLES, seed=1):
        picked = random.integers(0, seeds, seeds) if samples else np.arange(seeds)
        resampled = Reading(*(column[np.ix_(picked, records)] for column in read))
        samples.append(metrics_of(resampled, true[records]))
    return {name: np.array([sample[name].mean() for sample in samples]) for name in samples[0]}


def summarise(
    folders: list[str], tests: Iterable[tuple], files: Sequence[str] = FILES, groups: dict | None = None
) -> dict:
    """Return the metrics of every row, test and reading, and the differences to its reference by CoT-RAIL.

    A difference is over the seeds of both. groups: file → which group each of its records is of, for
    `bootstrap`. Raises InputError where rows have different true scores, or none.
    """
    groups = groups or {}
    true = {}  # file of records → its true scores (n,)
    measured = {}  # row, test, reading → folder → Reading

    def records_of(row: str, test: str) -> str:
        file = file_of(test, files)
        return f"{file}_real" if row in ON_REAL else file

    for (row, test), folder in itertools.product(tests, folders):
        predicted = predictions(folder, f"{row}.{test}")
        if predicted is None:
            continue
        _, scores, _ = predicted
        if not np.array_equal(scores, true.setdefault(records_of(row, test), scores)):
            raise InputError(f"{row}: not tested on the records that others were; remove what is older")
        for name, reading in readings(*predicted).items():
            measured.setdefault((row, test, name), {})[folder] = reading
    if not measured:
        raise InputError(f"{folders[0]}: nothing has been measured yet")

    @functools.cache
    def stack(key: tuple, seeds: tuple[str, ...]) -> tuple[Reading, dict[str, np.ndarray]]:
        stacked = Reading(*np.stack([measured[key][folder] for folder in seeds], axis=1))  # each (S, n)
        records = records_of(*key[:2])
        return stacked, bootstrap(stacked, true[records], groups.get(records))

    cells = []
    for key in tqdm(measured, desc="bootstrap", unit="cell", dynamic_ncols=True):
        row, test, name = key
        seeds = tuple(measured[key])  # their folders
        cell = {"row": row, "test": test, "reading": name, "seeds": [Path(folder).name for folder in seeds]}
        stacked, samples = stack(key, seeds)
        cell["tied"] = float(stacked.tied.mean())
        for metric, values in metrics_of(stacked, true[records_of(row, test)]).items():
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            within = confidence_interval(samples[metric])
            cell[metric] = {"per_seed": values.tolist(), "mean": float(values.mean()), "sd": sd}
            cell[metric] |= {"low": within["low"], "high": within["high"]}
        # TRACT with CoTs of its own, on the same prompts
        reference = (REFERENCE.get(row, "tract"), file_of(test, files), "rail")
        shared = tuple(folder for folder in seeds if folder in measured.get(reference, {}))
        if shared and reference != key:
            _, ours = stack(key, shared)
            _, theirs = stack(reference, shared)
            cell["difference"] = {
                metric: confidence_interval(ours[metric] - theirs[metric]) for metric in ours
            }
            cell["reference"] = reference[0]
        cells.append(cell)
    records = {name: len(scores) for name, scores in true.items()}
    counted = {name: len(set(groups[name])) for name in true if name in groups}
    return {"resamples": RESAMPLES, "records": records, "groups": counted, "cells": cells}


def make_parser(description: str, rows: list[str], out: str) -> argparse.ArgumentParser:
    """Make the options of this script and of bench/real.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=runs.Help)
    add = parser.add_argument
    add("--rows", nargs="+", choices=rows, metavar="ROW", default=rows, help=" ".join(rows))
    add("--seeds", nargs="+", type=runs.SEED, default=[1, 2, 3, 4, 5], metavar="SEED", help="training seeds")
    add("--jobs", type=runs.COUNT, default=os.cpu_count(), help="commands at a time")
    add("--split", choices=("valid", "test"), default="test", help="what to test on")
    add("--out", type=Path, default=Path(out), help="folder of all that is made")
    add("--show", action="store_true", help="print the commands and run nothing")
    add("--measured", action="store_true", help="run nothing, sum up what has been measured")
    return parser


def predict(args, tests: dict, setup: Setup) -> list[str]:
    """Run all that the rows need, with --measured nothing; return the folder of each seed. --show exits."""
    folders = [f"{args.out}/seed{seed}" for seed in args.seeds]
    if args.measured:
        return folders
    commands = {}
    for seed, folder in zip(args.seeds, folders, strict=True):
        commands |= commands_of(folder, seed, tests, setup, packed(folder))
    if args.show:
        print("\n".join(commands.values()))
        raise SystemExit
    run_all(commands, args.jobs)
    return folders


def write_report(args, report: dict, script: str) -> None:
    """Write metrics.json, of another split than the test metrics-SPLIT.json; say which script draws it."""
    path = args.out / ("metrics.json" if args.split == "test" else f"metrics-{args.split}.json")
    runs.write_whole(path, json.dumps(report, indent=1) + "\n")
    print(f"{path}; python {script} {path} draws it")


def main() -> None:
    parser = make_parser(__doc__, [*GROUPS, *ROWS], "out/ablations")
    parser.set_defaults(rows=[*GROUPS])
    args = parser.parse_args()
    os.chdir(ROOT)
    rows = [name for row in args.rows for name in GROUPS.get(row, [row])]
    files = FILES if args.split == "test" else [args.split]
    tests = tests_of(rows, files)
    report = {"split": args.split, "settings": SETTINGS, "seeds": args.seeds}
    report |= summarise(predict(args, tests, SETUP), tests, files)
    report["ideal"] = {name: ideal.metrics(f"data/tiny/{name}.jsonl") for name in report["records"]}
    write_report(args, report, "results/ablations/draw.py")


if __name__ == "__main__":
    runs.run(main)
