"""Measure the rows of the paper's table, and the losses one by one, on the embedded task over several seeds.

    python bench/ablations.py                               # everything; two hours on 2 cores
    python bench/ablations.py --rows tract a1 --seeds 1     # two rows, one seed
    python bench/ablations.py --rows tract --seeds 1 --show # only print the commands, in order

A row is a chain of commands that a user could give: STEPS and `tests_of` say which. What is not there yet is
run, and OUT/metrics.json sums up. Rows share what they have in common: the same p_s, the same CoTs. A seed
draws training records of its own and seeds training and sampling; the test records are the same for all.
Nothing is held out. Interrupted, the same command goes on.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import runpy
import sys
from collections.abc import Iterable
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import MistralForCausalLM  # noqa: F401, so that forked commands need not import it

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.tiny import ideal
from eval import interval
from loss import two_hot
from tract import runs
from tract.records import ROOT, Grid, InputError, read_records

# What a step makes, and its command. @NAME is where NAME lies, @seed is the seed model, which is what a stage
# trains unless it says otherwise. `commands_of` adds the settings, --seed and --out.
STEPS = {
    "train.jsonl": "data/tiny/prepare.py --splits train",
    "ce-no-cot": "stage1_train.py --data @train.jsonl --no-cot --lambda 0",
    "raft": "stage1_train.py --data @train.jsonl --no-cot",
    "raft-pure": "stage1_train.py --data @train.jsonl --no-cot --ce-weight 0",
    "ce": "stage1_train.py --data @train.jsonl --lambda 0",
    "ce.cots.jsonl": "gen_cot.py --model @ce --data @train.jsonl",
    "a1": "stage1_train.py --data @train.jsonl",
    "a1.cots.jsonl": "gen_cot.py --model @a1 --data @train.jsonl",
    "a2": "stage2_train.py --data @ce.cots.jsonl --lambda 0",
    "a4": "stage2_train.py --model @a1 --data @a1.cots.jsonl --continue-from-stage1",
    "tract": "stage2_train.py --data @a1.cots.jsonl",
}
MAIN = ["seed", "ce-no-cot", "raft", "raft-pure", "ce", "a1", "a2", "a4", "tract"]
WITHOUT_COT = ("ce-no-cot", "raft", "raft-pure")

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
}
FEW = "--epochs 8"  # 300 records: twice the epochs, two fifths of the steps
STEPS |= {
    "train_real.jsonl": "data/tiny/prepare.py --splits train --targets real",
    "train_rounded.jsonl": "data/tiny/prepare.py --splits train --targets rounded",
    "few/train.jsonl": "data/tiny/prepare.py --splits train --size 300",
    "few/train_real.jsonl": "data/tiny/prepare.py --splits train --size 300 --targets real",
    "few-a1": f"stage1_train.py --data @few/train.jsonl {FEW}",
    "real.cots.jsonl": "gen_cot.py --model @a1 --data @train_real.jsonl",
    "rounded.cots.jsonl": "gen_cot.py --model @a1 --data @train_rounded.jsonl",
    "few-rating.cots.jsonl": "gen_cot.py --model @few-a1 --data @few/train.jsonl",
    "few-real.cots.jsonl": "gen_cot.py --model @few-a1 --data @few/train_real.jsonl",
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
LOSS = {f"{where}-{loss}": where for where, losses in COMPARED.items() for loss in losses}
for where, losses in COMPARED.items():
    targets, _, grid = where.rpartition("-")
    cots = "a1.cots.jsonl" if targets == "rating" else f"{targets}.cots.jsonl"
    stage2 = f"stage2_train.py --data @{cots} --grid {','.join(grid)} {FEW * where.startswith('few')}"
    STEPS |= {f"{where}-{loss}": f"{stage2} {LOSSES[loss]}" for loss in losses}

SETTINGS = ROOT / "results/ablations/settings.json"  # options of both training scripts
RESAMPLES = 1000  # of seeds and records
GROUPS = {"main": MAIN, "loss": [*LOSS]}
ROWS = [*MAIN, *LOSS]


def tests_of(row: str, split: str, rows: list[str]) -> dict[str, str]:
    """Return what a row is tested on beside the other `rows`, each with the command that predicts it."""
    predict, real = f"predict.py --model @{row} --data", "_real" if is_real(row) else ""
    flags = "--no-cot" if row in WITHOUT_COT else ""
    many = "--num-cots 5" if row in MAIN and not flags else flags
    tests = {split: f"{predict} data/tiny/{split}{real}.jsonl {many}"}
    if split == "test":
        tests["test_ood"] = f"{predict} data/tiny/test_ood{real}.jsonl {flags}"
        tests |= whose_cots(row, rows, predict, "data/tiny/test.jsonl")
    return tests


def whose_cots(row: str, rows: list[str], predict: str, records: str) -> dict[str, str]:
    """Return the tests behind the argument for stage 2, of p_s and p_tract on the CoTs of others."""
    tests = {}
    if row in ("a1", "tract"):
        tests["annotated"] = f"{predict} {records} --given cot"
    if row == "tract" and "a1" in rows:  # on those of p_s, which its own test writes
        tests["p_s"] = f"{predict} @a1.test.jsonl --given cots"
    return tests


def is_real(row: str) -> bool:
    """Tell whether a row is tested on real-valued scores."""
    return "rating" not in LOSS.get(row, "rating")


def reference(row: str) -> str:
    """Return the row that a row is compared with: TRACT on the same targets and grid."""
    where = LOSS.get(row, "rating-12345")
    return "tract" if where == "rating-12345" else f"{where}-tract"


class Setup(NamedTuple):  # what the commands of a task have in common
    given: dict[str, str]  # name → path of what is there already, the seed model for one
    train: dict[str, object]  # options of both training scripts
    judge: str  # options of gen_cot.py and predict.py
    rows: dict[str, dict[str, object]]  # row → options of both training scripts that are its own


def options(given: dict[str, object]) -> str:
    """Return options as a command line has them; one with the value "" is a flag."""
    return " ".join(f"--{key} {value}".strip() for key, value in given.items())


def setup_of(settings: dict) -> Setup:
    return Setup({"seed": "data/tiny/seed"}, settings["train"], "--batch-size 64", {})


def commands_of(
    folder: str, seed: int, tests: dict[str, dict[str, str]], setup: Setup, kept: Iterable[str] = ()
) -> dict[str, str]:
    """Return all that these rows need of one seed: output → the command that makes it, after what it reads.

    tests: row → test → the command that predicts it, with @NAME for what it reads. kept: ROW.TEST of what is
    known already; it is made only where something else reads it.
    """
    tested = {f"{row}.{test}.jsonl": step for row, of_row in tests.items() for test, step in of_row.items()}
    steps, commands = STEPS | tested, {}

    def make(name: str) -> str:
        if name in setup.given:
            return setup.given[name]
        out, (script, own) = f"{folder}/{name}", steps[name].split(maxsplit=1)
        if out not in commands:
            to, flags = out, setup.judge
            if "prepare" in script:
                to, flags = Path(out).parent, ""  # it names its files itself
            elif "train" in script:
                flags = options(setup.train | setup.rows.get(name, {}))
                flags += "" if "--model" in own else " --model @seed"
            words = re.sub(r"@(\S+)", lambda found: make(found[1]), f"{flags} {own}").split()
            commands[out] = " ".join(["python", script, *words, f"--seed {seed} --out {to}"])
        return out

    for name in tested:
        if name.removesuffix(".jsonl") not in kept:
            make(name)
    return commands


def run_command(out: str, command: str, threads: int) -> None:
    """Run a command in this process, a fork that need not import torch anew; its output goes to OUT.log."""
    sys.stdout = sys.stderr = open(f"{out}.log", "w", encoding="utf-8", buffering=1)
    print(command)
    torch.set_num_threads(threads)
    sys.argv = command.split()[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_all(commands: dict[str, str], jobs: int) -> None:
    """Run what is not there yet, each command after what it reads. Raises InputError or Fault."""
    for out, command in commands.items():
        log = Path(f"{out}.log")
        if Path(out).exists() and not (log.is_file() and log.read_text("utf-8").startswith(f"{command}\n")):
            raise InputError(f"{out}: was not made by `{command}`; remove it, or choose another --out")
        log.parent.mkdir(parents=True, exist_ok=True)
    left, running = [out for out in commands if not Path(out).exists()], {}
    threads, fork = max(1, (os.cpu_count() or 1) // jobs), multiprocessing.get_context("fork")
    with runs.progress(len(commands), len(commands) - len(left), "ablations", "command") as bar:
        while left or running:
            unmade = {*left, *(out for out, _ in running.values())}
            ready = [out for out in left if unmade.isdisjoint(commands[out].split()[:-1])]
            for out in ready[: jobs - len(running)]:
                left.remove(out)
                process = fork.Process(target=run_command, args=(out, commands[out], threads))
                process.start()
                running[process.sentinel] = out, process
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
    """Return what FOLDER.npz keeps of a seed, by `real.pack`: predictions by name, true scores, grid."""
    path = Path(f"{folder}.npz")
    return dict(np.load(path)) if path.is_file() else {}


def predictions(folder: str, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return the probabilities (n, CoTs, S) that NAME predicts, the true scores (n,) and the grid (S,).

    None where it has not been measured.
    """
    if name in (kept := packed(folder)):
        return kept[name].astype(float), kept["true"], kept["grid"]
    path = Path(folder, f"{name}.jsonl")
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as lines:  # rows of older files do not name their grid
        named = json.loads(next(lines)).get("grid")
    grid = Grid.parse(named or runs.read_json(path.with_suffix(".run.json"))["arguments"]["grid"])
    rows = read_records(path, grid, ("id", "score", "finished", "score_probs"))
    true, probs = ([row[key] for row in rows] for key in ("score", "score_probs"))
    return np.array(probs), np.array(true, float), np.array(grid.values)


def likeliest(probs: np.ndarray) -> np.ndarray:
    """Return the share of each score in being the likeliest, (..., S): equally likely ones share it."""
    top = probs == probs.max(-1, keepdims=True)
    return top / top.sum(-1, keepdims=True)


def readings(probs: np.ndarray, true: np.ndarray, values: np.ndarray) -> dict[str, Reading]:
    """Return the readings of `predictions`, of the first CoT and as NAME@5 of all.

    Where several scores are equally likely, decoded is their mean, as in `records.predicted`.
    """
    share, n = two_hot(torch.tensor(true), torch.tensor(values)).numpy(), probs.shape[1]  # (n, S), CoTs
    found = {}
    for cots, at in {1: "", n: f"@{n}" if n > 1 else ""}.items():
        first = probs[:, :cots]  # (records, CoTs, S)
        top = likeliest(first)
        for name, each in (("rail", first), ("renormalised", first / first.sum(-1, keepdims=True))):
            p = each.mean(1)  # (records, S)
            log_score = (np.log(p.clip(1e-7)) * share).sum(1)
            right = (likeliest(p) * share).sum(1)
            found[name + at] = Reading(p @ values, log_score, p.max(1), right, (top.max(-1) < 1).mean(1))
        decoded = (top @ values).mean(1)  # of the same distribution
        found["decoded" + at] = found["renormalised" + at]._replace(predictions=decoded)
    return found


def metrics_of(read: Reading, true: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics, (S,) each, of the same records (n,) judged by S seeds: `read` holds (S, n).

    Pearson's r of a constant, undefined, counts as 0. The calibration error is that of the likeliest score:
    Σ over ten bins of confidence of the bin's share of records · |mean confidence − share that is right|.
    """
    p, y, seeds = read.predictions, true - true.mean(), len(read.predictions)
    x, defined = p - p.mean(1, keepdims=True), (np.ptp(p, axis=1) > 0) & (np.ptp(true) > 0)
    r = np.divide(x @ y, np.sqrt((x * x).sum(1) * (y @ y)), out=np.zeros(seeds), where=defined)
    bins = (10 * read.confidence).astype(int).clip(max=9) + 10 * np.arange(seeds)[:, None]
    gaps = np.bincount(bins.ravel(), (read.confidence - read.right).ravel(), 10 * seeds).reshape(seeds, 10)
    found = {"pearson": r, "rmse": np.sqrt(((p - true) ** 2).mean(1)), "log_score": read.log_score.mean(1)}
    return found | {"calibration_error": np.abs(gaps).sum(1) / len(true)}


def bootstrap(read: Reading, true: np.ndarray) -> dict[str, np.ndarray]:
    """Return the metrics, mean over seeds, on the data (entry 0) and on resampled seeds and records.

    All readings see the same resamples: differences are paired.
    """
    (seeds, n), random = read.predictions.shape, np.random.default_rng(0)
    picks = [(np.arange(seeds), np.arange(n))]
    picks += [(random.integers(0, seeds, seeds), random.integers(0, n, n)) for _ in range(RESAMPLES)]
    each = [metrics_of(Reading(*(x[np.ix_(*pick)] for x in read)), true[pick[1]]) for pick in picks]
    return {name: np.array([of[name].mean() for of in each]) for name in each[0]}


def summarise(folders: list[str], tests: dict[str, Iterable[str]], split: str) -> dict:
    """Return the metrics of every row, test and reading, and the differences to its reference by CoT-RAIL.

    A row is summed up over the seeds that it was tested with, a difference over those of both rows. Raises
    InputError where rows were not tested on the same records, or none were.
    """
    true, read, cells = {}, {}, []  # read: row, test, reading → folder → Reading

    def own_test(test: str) -> str:  # the one with CoTs of the row's own, on the same prompts
        return "test_ood" if test == "test_ood" else split

    def records_of(row: str, test: str) -> str:
        return own_test(test) + "_real" * is_real(row)

    pairs = [(row, test) for row, of_row in tests.items() for test in of_row]
    for (row, test), folder in itertools.product(pairs, folders):
        if (found := predictions(folder, f"{row}.{test}")) is None:
            continue
        if not np.array_equal(found[1], true.setdefault(records_of(row, test), found[1])):
            raise InputError(f"{row}: not tested on the records that others were; remove what is older")
        for reading, of_seed in readings(*found).items():
            read.setdefault((row, test, reading), {})[folder] = of_seed
    if not read:
        raise InputError(f"{folders[0]}: nothing has been measured yet")

    def together(key: tuple, seeds: tuple[str, ...]) -> tuple[Reading, np.ndarray]:
        each = zip(*(read[key][folder] for folder in seeds), strict=True)
        return Reading(*map(np.stack, each)), true[records_of(*key[:2])]

    @functools.cache
    def samples(key: tuple, seeds: tuple[str, ...]) -> dict[str, np.ndarray]:
        return bootstrap(*together(key, seeds))

    for key in tqdm(read, desc="bootstrap", unit="cell", dynamic_ncols=True):
        (row, test, reading), own = key, tuple(read[key])
        cells.append({"row": row, "test": test, "reading": reading, "seeds": [Path(f).name for f in own]})
        of_seeds, scores = together(key, own)
        cells[-1]["tied"] = float(of_seeds.tied.mean())
        for name, values in metrics_of(of_seeds, scores).items():
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            cells[-1][name] = {"per_seed": values.tolist(), "mean": float(values.mean()), "sd": sd}
            within = interval(samples(key, own)[name])
            cells[-1][name] |= {end: within[end] for end in ("low", "high")}
        other = (reference(row), own_test(test), "rail")
        if other != key and (both := tuple(folder for folder in own if folder in read.get(other, {}))):
            apart = {name: interval(x - samples(other, both)[name]) for name, x in samples(key, both).items()}
            cells[-1] |= {"difference": apart, "reference": other[0]}
    report = {"split": split, "resamples": RESAMPLES, "records": {name: len(y) for name, y in true.items()}}
    return report | {"cells": cells}


def make_parser(description: str, groups: dict[str, list[str]], rows: list[str], out: str):
    """Make the options of this script and of bench/real.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=runs.Help)
    add, names = parser.add_argument, {"choices": [*groups, *rows], "metavar": "ROW"}
    add("--rows", nargs="+", default=[*groups], **names, help=f"{', '.join(groups)} or {' '.join(rows)}")
    add("--seeds", nargs="+", type=runs.SEED, default=[1, 2, 3, 4, 5], metavar="SEED", help="training seeds")
    add("--jobs", type=runs.COUNT, default=os.cpu_count(), help="commands at a time")
    add("--split", choices=("valid", "test"), default="test", help="what to test on")
    add("--out", type=Path, default=Path(out), help="folder of all that is made")
    add("--show", action="store_true", help="print the commands and run nothing")
    add("--measured", action="store_true", help="run nothing, sum up what has been measured")
    return parser


def predict(args, tests: dict[str, dict[str, str]], setup: Setup) -> list[str]:
    """Run all that the rows need, and return the folder of each seed.

    With --measured, run nothing; with --show, print the commands and end.
    """
    folders, commands = [f"{args.out}/seed{seed}" for seed in args.seeds], {}
    if args.measured:
        return folders
    for seed, folder in zip(args.seeds, folders, strict=True):
        commands |= commands_of(folder, seed, tests, setup, packed(folder))
    if args.show:
        print("\n".join(commands.values()))
        raise SystemExit
    run_all(commands, args.jobs)
    return folders


def main() -> None:
    args = make_parser(__doc__, GROUPS, ROWS, "out/ablations").parse_args()
    settings = runs.read_json(SETTINGS)
    os.chdir(ROOT)
    rows = [name for row in args.rows for name in GROUPS.get(row, [row])]
    tests = {row: tests_of(row, args.split, rows) for row in rows}
    report = {"settings": settings, "seeds": args.seeds}
    report |= summarise(predict(args, tests, setup_of(settings)), tests, args.split)
    report["ideal"] = {
        of: ideal.metrics(f"data/tiny/{of}.jsonl", real="real" in of) for of in report["records"]
    }
    runs.write_whole(args.out / "metrics.json", json.dumps(report, indent=1) + "\n")
    print(f"{args.out}/metrics.json; python results/ablations/draw.py {args.out}/metrics.json draws it")


if __name__ == "__main__":
    runs.run(main)
