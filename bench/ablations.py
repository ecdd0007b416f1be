"""Measure every row of the paper's table and ablations on the embedded task, over several seeds.

    python bench/ablations.py                               # everything; some hours on 2 cores
    python bench/ablations.py --rows tract a1 --seeds 1     # two rows, one seed
    python bench/ablations.py --rows tract --seeds 1 --show # only print the commands, in order

A row is a chain of commands that a user could give: STEPS and `tests_of` say which. What is not there yet is
run, and OUT/metrics.json sums up. Rows share what they have in common: the same p_s, the same CoTs. A seed
draws training records of its own and seeds training and sampling; the test records are the same for all.
Nothing is held out. Interrupted, the same command goes on.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval
import runs
from data.tiny import ideal
from records import ROOT, Grid, InputError, predicted, read_records


def two_stages(row: str, flags: str, data: str = "train.jsonl") -> dict[str, str]:
    """Return the steps of a row that has both stages for itself; its p_s is called ROW-a1."""
    return {
        f"{row}-a1": f"stage1_train.py --data @{data} {flags}",
        f"{row}.cots.jsonl": f"gen_cot.py --model @{row}-a1 --data @{data}",
        row: f"stage2_train.py --data @{row}.cots.jsonl {flags}",
    }


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

# One setting at a time
SWEEPS = []
for value in ("0.1", "0.3", "3", "10"):  # 1 is in the main rows
    STEPS |= two_stages(f"lambda-{value}", f"--lambda {value}")
    SWEEPS += [f"lambda-{value}-a1", f"lambda-{value}"]
STEPS |= two_stages("mask-score", "--mask-score")
for n, epochs in ((2, 2), (4, 1)):  # as many steps as with one CoT and the 4 epochs of settings.json
    STEPS[f"cots-{n}.cots.jsonl"] = f"gen_cot.py --model @a1 --data @train.jsonl --num-cots {n}"
    STEPS[f"cots-{n}"] = f"stage2_train.py --data @cots-{n}.cots.jsonl --epochs {epochs}"
STEPS["few/train.jsonl"] = "data/tiny/prepare.py --splits train --size 300"
STEPS |= two_stages("few-ce", "--epochs 8 --lambda 0", "few/train.jsonl")
STEPS |= two_stages("few-tract", "--epochs 8", "few/train.jsonl")
SWEEPS += ["mask-score", "cots-2", "cots-4", "few-ce", "few-tract"]

# Grids coarser than the targets: stage 2 with either loss on the same CoTs, those of p_s
SCALE = []
for targets in ("real", "rounded"):
    STEPS[f"train_{targets}.jsonl"] = f"data/tiny/prepare.py --splits train --targets {targets}"
    STEPS[f"{targets}.cots.jsonl"] = f"gen_cot.py --model @a1 --data @train_{targets}.jsonl"
    for grid in ("1,5", "1,3,5", "1,2,3,4,5"):
        for loss, flags in (("ce", "--lambda 0"), ("tract", "")):
            SCALE.append(f"{targets}-{grid.replace(',', '')}-{loss}")
            STEPS[SCALE[-1]] = f"stage2_train.py --data @{targets}.cots.jsonl --grid {grid} {flags}"

# Which of the settings are options of a script; all others are stages of training
KINDS = {"data/tiny/prepare.py": "prepare", "gen_cot.py": "generate", "predict.py": "generate"}
GROUPS = {"main": MAIN, "sweeps": SWEEPS, "scale": SCALE}
ROWS = [*MAIN, *SWEEPS, *SCALE]
CLAIMS = {  # a row read by CoT-RAIL → rows and readings that the paper, or the README, says it is better than
    "tract": ["a1 rail", "raft rail", "a2 decoded", "a2 rail", "a4 rail"],
    "raft": ["ce-no-cot decoded", "ce-no-cot rail"],
    "few-tract": ["few-ce rail"],
}


def tests_of(row: str, split: str, num_cots: int) -> dict[str, str]:
    """Return what a row is tested on, each with the command that predicts it."""
    predict, real = f"predict.py --model @{row} --data", "_real" if row in SCALE else ""
    flags = "--no-cot" if row in WITHOUT_COT else ""
    many = f"--num-cots {num_cots}" if row in MAIN and not flags else flags
    tests = {split: f"{predict} data/tiny/{split}{real}.jsonl {many}"}
    if split == "test":
        tests["test_ood"] = f"{predict} data/tiny/test_ood{real}.jsonl {flags}"
    if row in ("a1", "tract"):  # the argument for stage 2: the same judges on the annotated CoTs
        tests["annotated"] = f"{predict} data/tiny/{split}.jsonl --given cot"
    if row == "tract":  # and p_tract on those of p_s
        tests["p_s"] = f"{predict} @a1.{split}.jsonl --given cots"
    return tests


def reference(row: str) -> str:
    """Return the row that a row is compared with."""
    if row in SCALE:
        return row.rpartition("-")[0] + "-tract"
    return "few-tract" if row.startswith("few") else "tract"


def commands_of(folder: str, seed: int, rows: list[str], settings: dict, split: str, num_cots: int) -> dict:
    """Return all that the rows need of one seed: output → the command that makes it, after what it reads."""
    commands, tests = {}, {row: tests_of(row, split, num_cots) for row in ROWS}
    options = {"generate": {"batch-size": 64}} | settings
    steps = STEPS | {f"{row}.{test}.jsonl": step for row in ROWS for test, step in tests[row].items()}

    def make(name: str) -> str:
        if name == "seed":
            return settings.get("seed_model", "data/tiny/seed")
        out, (script, own) = f"{folder}/{name}", steps[name].split(maxsplit=1)
        if out not in commands:
            kind = KINDS.get(script, "train")
            flags = " ".join(f"--{key} {value}" for key, value in options.get(kind, {}).items())
            own = f"--model @seed {own}" if kind == "train" and "--model" not in own else own
            own = re.sub(r"@(\S+)", lambda found: make(found[1]), own)
            to = str(Path(out).parent) if kind == "prepare" else out  # it names its files itself
            commands[out] = " ".join(f"python {script} {flags} {own} --seed {seed} --out {to}".split())
        return out

    for row in rows:
        for test in tests[row]:
            make(f"{row}.{test}.jsonl")
    return commands


def run_all(commands: dict[str, str], jobs: int) -> None:
    """Have make run what is not there yet, each command after what it reads; its output goes to OUT.log."""
    rules = [f"all: {' '.join(commands)}"]
    for out, command in commands.items():
        log = Path(f"{out}.log")
        if Path(out).exists() and not (log.is_file() and log.read_text("utf-8").startswith(f"{command}\n")):
            raise InputError(f"{out}: was not made by `{command}`; remove it, or choose another --out")
        inputs = [word for word in command.split()[:-1] if word in commands]
        recipe = f"@echo {out}; mkdir -p {log.parent}; echo '{command}' > {log}; "
        recipe += f"{sys.executable} {command.removeprefix('python ')} >> {log} 2>&1"
        rules.append(f"{out}: | {' '.join(inputs)}\n\t{recipe}")  # behind |: only whether they are there
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    make = ["make", "--file=-", f"--jobs={jobs}", "--no-print-directory"]
    if subprocess.run(make, input="\n".join(rules), text=True, env=os.environ | threads).returncode:
        raise runs.Fault("not made what make names above, its .log says why; the same command goes on")


def readings(path: str) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, float]]:
    """Return what each reading of a file of predictions says, (n,), the true scores, (n,), and the variance.

    A reading is of the first CoT, or as NAME@5 of all five. The variance of the prediction is split into that
    between CoTs of one record and that between records.
    """
    grid = Grid.parse(runs.read_json(Path(path).with_suffix(".run.json"))["arguments"]["grid"])
    rows = read_records(path, grid, ("id", "score", "finished", "score_probs"))
    probs, found = [row["score_probs"] for row in rows], {}
    n = len(probs[0])
    for cots, which in {1: "", n: f"@{n}" if n > 1 else ""}.items():
        for name, renormalise in (("rail", False), ("renormalised", True)):
            both = np.array([predicted(of[:cots], grid, renormalise) for of in probs])
            found[name + which], found["decoded" + which] = both.T
    variance = {}
    if n > 1:
        each = np.array(probs) @ np.array(grid.values)  # (records, CoTs)
        within = float(each.var(axis=1, ddof=1).mean())
        variance = {"within": within, "between": float(each.mean(1).var(ddof=1)) - within / n}
    return found, np.array([row["score"] for row in rows], dtype=float), variance


def r_and_rmse(predictions: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Pearson's r and RMSE, (S,), of predictions (S, n); r of a constant, undefined, counts as 0."""
    x, y = predictions - predictions.mean(1, keepdims=True), true - true.mean()
    defined = (np.ptp(predictions, axis=1) > 0) & (np.ptp(true) > 0)
    r = np.divide(x @ y, np.sqrt((x * x).sum(1) * (y @ y)), out=np.zeros(len(x)), where=defined)
    return r, np.sqrt(((predictions - true) ** 2).mean(1))


def bootstrap(column: np.ndarray, true: np.ndarray, resamples: int) -> dict[str, np.ndarray]:
    """Return r and RMSE, the mean over seeds, on the data (entry 0) and on resampled seeds and records.

    column (S, n): the predictions of S seeds. All columns see the same resamples: differences are paired.
    """
    (seeds, n), random = column.shape, np.random.default_rng(0)
    picks = [(np.arange(seeds), np.arange(n))]
    picks += [(random.integers(0, seeds, seeds), random.integers(0, n, n)) for _ in range(resamples)]
    both = [np.mean(np.stack(r_and_rmse(column[which][:, i], true[i])), axis=1) for which, i in picks]
    return dict(zip(("pearson", "rmse"), np.transpose(both), strict=True))


def summarise(folders: list[str], rows: list[str], split: str, resamples: int) -> dict:
    """Return the metrics of every row, test and reading, and the differences to its reference by CoT-RAIL.

    Raises InputError where rows were not tested on the same records.
    """
    true, samples, cells, claims, variance = {}, {}, [], [], {}
    for row in tqdm(rows, desc="bootstrap", unit="row", dynamic_ncols=True):
        for test in tests_of(row, split, 1):
            files = [readings(f"{folder}/{row}.{test}.jsonl") for folder in folders]
            records = ("test_ood" if test == "test_ood" else split) + "_real" * (row in SCALE)
            y = true.setdefault(records, files[0][1])
            if not all(np.array_equal(scores, y) for _, scores, _ in files):
                raise InputError(f"{row}: not tested on the records that others were; remove what is older")
            if test == split and files[0][2]:
                variance[row] = {part: [of_seed[part] for _, _, of_seed in files] for part in files[0][2]}
            for reading in files[0][0]:
                column = np.stack([of_seed[reading] for of_seed, _, _ in files])  # (S, n)
                samples[row, test, reading] = bootstrap(column, y, resamples)
                cells.append({"row": row, "test": test, "reading": reading})
                for name in ("pearson", "spearman", "rmse"):
                    values = [float(np.nan_to_num(eval.METRICS[name](of_seed, y))) for of_seed in column]
                    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
                    cells[-1][name] = {"per_seed": values, "mean": float(np.mean(values)), "sd": sd}

    def difference(one: tuple, other: tuple) -> dict:
        return {name: eval.interval(x - samples[other][name]) for name, x in samples[one].items()}

    for cell in cells:
        one, on = tuple(cell.values())[:3], "test_ood" if cell["test"] == "test_ood" else split
        other = (reference(cell["row"]), on, "rail")
        if other in samples and other != one:
            cell |= {"difference": difference(one, other), "reference": other[0]}
    for test in (split, "test_ood"):
        for row, others in CLAIMS.items():
            for than, reading in map(str.split, others):
                one, other = (row, test, "rail"), (than, test, reading)
                if one in samples and other in samples:
                    claim = {"test": test, "better": [row, "rail"], "than": [than, reading]}
                    claims.append(claim | {"difference": difference(one, other)})
    records = {name: len(y) for name, y in true.items()}
    return {"records": records, "cells": cells, "claims": claims, "variance": variance}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add, names = parser.add_argument, {"choices": [*GROUPS, *ROWS], "metavar": "ROW"}
    add("--rows", nargs="+", default=[*GROUPS], **names, help=f"{', '.join(GROUPS)} or {' '.join(ROWS)}")
    add("--seeds", nargs="+", type=runs.SEED, default=[1, 2, 3, 4, 5], metavar="SEED", help="training seeds")
    add("--jobs", type=runs.COUNT, default=os.cpu_count(), help="commands at a time")
    add("--split", choices=("valid", "test"), default="test", help="what to test on")
    add("--num-cots", type=runs.COUNT, default=5, help="CoTs a prompt in the main rows")
    frozen = ROOT / "results/ablations/settings.json"
    add("--settings", type=Path, default=frozen, help="options: train, generate, prepare; seed_model")
    add("--resamples", type=runs.COUNT, default=1000, help="bootstrap resamples of seeds and records")
    add("--out", type=Path, default=Path("out/ablations"), help="folder of all that is made")
    add("--show", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    if not args.settings.is_file():
        raise InputError(f"{args.settings}: no such file; give a JSON file of options")
    settings = runs.read_json(args.settings)
    os.chdir(ROOT)
    rows = [name for row in args.rows for name in GROUPS.get(row, [row])]
    folders, commands = {seed: f"{args.out}/seed{seed}" for seed in args.seeds}, {}
    for seed, folder in folders.items():
        commands |= commands_of(folder, seed, rows, settings, args.split, args.num_cots)
    if args.show:
        return print("\n".join(commands.values()))
    run_all(commands, args.jobs)
    report = {"settings": settings, "seeds": args.seeds, "split": args.split, "resamples": args.resamples}
    report |= summarise([*folders.values()], rows, args.split, args.resamples)
    report["ideal"] = {
        test: ideal.metrics(f"data/tiny/{test}.jsonl", real="real" in test) for test in report["records"]
    }
    runs.write_whole(args.out / "metrics.json", json.dumps(report, indent=1) + "\n")
    print(f"{args.out}/metrics.json; python results/ablations/draw.py {args.out}/metrics.json draws it")


if __name__ == "__main__":
    runs.run(main)
