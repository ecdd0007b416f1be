"""Every row of the paper's table and ablations on the embedded task, over several seeds, through the scripts a user has.

    python bench/ablations.py                               # everything, see the README for how long
    python bench/ablations.py --rows tract a1 --seeds 1     # two rows, one seed
    python bench/ablations.py --rows tract --seeds 1 --show # only print the commands, in order

A row is a chain of commands: this file says which, runs what is not there yet, and sums up in OUT/metrics.json. Rows share
what they have in common: the same p_s, the same CoTs. A seed draws training records of its own and seeds training and
sampling; the test records are the same for all, those committed in data/tiny. Interrupted, it goes on where it was.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import runpy
import shlex
import sys
import time
import traceback
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import eval  # noqa: E402
import records  # noqa: E402
import runs  # noqa: E402
from data.tiny import ideal  # noqa: E402
from runs import Fault, InputError  # noqa: E402

MODEL = "data/tiny/seed"
MAIN = ["seed", "ce-no-cot", "raft", "raft-pure", "ce", "a1", "a2", "a4", "tract"]
LAMBDAS = ["0.1", "0.3", "3", "10"]  # 1 is in the main rows
SWEEPS = [f"lambda-{v}{stage}" for v in LAMBDAS for stage in ("-a1", "")]
SWEEPS += ["mask-score", "cots-2", "cots-4", "few-ce", "few-tract"]
SCALE = [
    f"{targets}-{grid.replace(',', '')}-{loss}"
    for grid in ("1,5", "1,3,5", "1,2,3,4,5")
    for targets in ("real", "rounded")
    for loss in ("ce", "tract")
]
GROUPS = {"main": MAIN, "sweeps": SWEEPS, "scale": SCALE}
CLAIMS = [  # a row and reading that the paper, or this page, says is better than another
    (("tract", "rail"), ("a1", "rail")),
    (("tract", "rail"), ("raft", "rail")),
    (("tract", "rail"), ("a2", "decoded")),
    (("tract", "rail"), ("a2", "rail")),
    (("tract", "rail"), ("a4", "rail")),
    (("raft", "rail"), ("ce-no-cot", "decoded")),
    (("raft", "rail"), ("ce-no-cot", "rail")),
    (("few-tract", "rail"), ("few-ce", "rail")),
]
FEW = 300  # training records of the rows with few data, which get twice the epochs


class Plan(NamedTuple):
    commands: dict[str, str]  # output → the command that makes it, in an order in which they can run
    predictions: dict[str, dict[str, str]]  # row → what it was tested on → file of predictions


def plan(
    folder: str,
    seed: int,
    *,
    flags: str,
    num_cots: int,
    split: str,
    generate: str = "--batch-size 64",
    seed_model: str = MODEL,
    size: int | None = None,
) -> Plan:
    """All commands and prediction files of one seed.

    `flags` are those of every training stage, `generate` those of gen_cot.py and predict.py, `split` is tested on; `size` is
    the number of training records, None: as many as the embedded task has.
    """
    commands, predictions = {}, {}
    ratings = {split: f"data/tiny/{split}.jsonl"}
    real = {split: f"data/tiny/{split}_real.jsonl"}
    if split == "test":
        ratings["test_ood"], real["test_ood"] = "data/tiny/test_ood.jsonl", "data/tiny/test_ood_real.jsonl"

    def make(name: str, command: str) -> str:
        out = f"{folder}/{name}"
        commands[out] = " ".join(f"python {command} --out {out}".split())
        return out

    def data(own: str = "", into: str = folder) -> str:
        targets = "_" + own.split()[1] if "--targets" in own else ""
        out = f"{into}/train{targets}.jsonl"
        own += f" --size {size}" if size and "--size" not in own else ""
        commands[out] = " ".join(f"python data/tiny/prepare.py --seed {seed} --splits train {own} --out {into}".split())
        return out

    def train(name: str, data: str, own: str = "", *, stage: int = 1, model: str = seed_model) -> str:
        script = f"stage{stage}_train.py"
        return make(name, f"{script} --model {model} --data {data} {flags} {own} --seed {seed}")

    def cots(name: str, model: str, data: str, own: str = "") -> str:
        return make(name, f"gen_cot.py --model {model} --data {data} {generate} {own} --seed {seed}")

    def predict(row: str, model: str, own: str = "", *, on: dict[str, str], n: int = 1) -> None:
        files = predictions.setdefault(row, {})
        for test, path in on.items():
            many = f"--num-cots {n}" if n > 1 and test == split else ""
            files[test] = make(
                f"{row}.{test}.jsonl", f"predict.py --model {model} --data {path} {generate} {many} {own} --seed {seed}"
            )

    def two_stages(row: str, data: str, own: str = "", *, on: dict[str, str], first: str | None = None) -> None:
        p_s = first or train(f"{row}.stage1", data, own)
        p_tract = train(f"{row}.stage2", cots(f"{row}.cots.jsonl", p_s, data), own, stage=2)
        predict(row, p_tract, on=on)

    # The paper's table and ablations
    ours = data()
    predict("seed", seed_model, on=ratings, n=num_cots)
    predict("ce-no-cot", train("ce-no-cot", ours, "--no-cot --lambda 0"), "--no-cot", on=ratings)
    predict("raft", train("raft", ours, "--no-cot"), "--no-cot", on=ratings)
    predict("raft-pure", train("raft-pure", ours, "--no-cot --ce-weight 0"), "--no-cot", on=ratings)
    p_ce = train("ce", ours, "--lambda 0")
    p_s = train("a1", ours)
    p_s_cots = cots("a1.cots.jsonl", p_s, ours)
    predict("ce", p_ce, on=ratings, n=num_cots)
    predict("a1", p_s, on=ratings, n=num_cots)
    p_a2 = train("a2", cots("ce.cots.jsonl", p_ce, ours), "--lambda 0", stage=2)
    predict("a2", p_a2, on=ratings, n=num_cots)
    predict("a4", train("a4", p_s_cots, "--continue-from-stage1", stage=2, model=p_s), on=ratings, n=num_cots)
    p_tract = train("tract", p_s_cots, stage=2)
    predict("tract", p_tract, on=ratings, n=num_cots)

    # The argument for stage 2: the same judges on the annotated CoTs, and p_tract on those of p_s
    for row, model in (("a1", p_s), ("tract", p_tract)):
        predict(row, model, "--given cot", on={"annotated": ratings[split]})
    predict("tract", p_tract, "--given cots", on={"p_s": predictions["a1"][split]})

    # One setting at a time
    for value in LAMBDAS:
        first = train(f"lambda-{value}-a1", ours, f"--lambda {value}")
        predict(f"lambda-{value}-a1", first, on=ratings)
        two_stages(f"lambda-{value}", ours, f"--lambda {value}", on=ratings, first=first)
    two_stages("mask-score", ours, "--mask-score", on=ratings)
    for n in (2, 4):  # as many steps as with one
        more = cots(f"cots-{n}.cots.jsonl", p_s, ours, f"--num-cots {n}")
        predict(f"cots-{n}", train(f"cots-{n}", more, f"--epochs {epochs(flags) // n}", stage=2), on=ratings)
    for row, own in (("few-ce", "--lambda 0"), ("few-tract", "")):
        two_stages(row, data(f"--size {FEW}", f"{folder}/few"), f"--epochs {epochs(flags) * 2} {own}", on=ratings)

    # Where does the squared error pay? Grids coarser than the targets. All train on the same CoTs, those of p_s.
    for row in SCALE:
        targets, tokens, loss = row.split("-")
        own = f"--grid {','.join(tokens)}{' --lambda 0' if loss == 'ce' else ''}"
        self_generated = cots(f"{targets}.cots.jsonl", p_s, data(f"--targets {targets}"))
        predict(row, train(row, self_generated, own, stage=2), on=real)
    return Plan(commands, predictions)


def flags_of(settings: dict) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def epochs(flags: str) -> int:
    words = flags.split()
    return int(words[words.index("--epochs") + 1])


def inputs(command: str, commands: dict[str, str]) -> list[str]:
    """Which outputs of other commands this one reads."""
    words = command.split()
    return [word for word in words[:-1] if word in commands and word != words[-1]]


def needed(plans: Iterable[Plan], rows: list[str]) -> list[tuple[str, str]]:
    """(output, command) of everything that the rows need, those of the first plan first, the table of scales last."""
    chosen = {}
    for late in (False, True):
        for p in plans:
            wanted = [file for row in rows if (row in SCALE) == late for file in p.predictions[row].values()]
            marked = set()
            while wanted:
                out = wanted.pop()
                if out in p.commands and out not in marked:
                    marked.add(out)
                    wanted += inputs(p.commands[out], p.commands)
            chosen |= {out: command for out, command in p.commands.items() if out in marked}
    return list(chosen.items())


# ----------------------------------------------------------------------------------------------------- running it


def work(command: str, out: str) -> tuple[int, float]:
    """Run one command in this process, its output to OUT.log: (exit code, seconds).

    The scripts are run as `python SCRIPT` would run them, but for the imports, which this process does only once: six
    seconds each, as long as many of these commands take.
    """
    started = time.time()
    with open(f"{out}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        sys.argv = shlex.split(command)[1:]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as exit:
            return exit.code or 0, time.time() - started
        except Exception:
            traceback.print_exc()
            return 1, time.time() - started
    return 0, time.time() - started


def run_all(todo: list[tuple[str, str]], *, jobs: int, log: Path) -> None:
    """Run the commands, `jobs` at a time, each as soon as what it reads is there. Raises Fault at the first that fails."""
    commands = dict(todo)
    waiting = {out: command for out, command in todo if not Path(out).exists()}
    for out in waiting:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
    running: dict[Future, str] = {}
    failed = None
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))  # before torch is imported anywhere
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
        open(log, "a", encoding="utf-8", buffering=1) as lines,
        tqdm(total=len(todo), initial=len(todo) - len(waiting), unit="command", dynamic_ncols=True) as bar,
    ):
        while waiting or running:
            busy = set(running.values())
            for out, command in list(waiting.items()):
                if len(running) < jobs and not failed and not {*waiting, *busy} & set(inputs(command, commands)):
                    running[pool.submit(work, command, out)] = out
                    busy.add(out)
                    del waiting[out]
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                out = running.pop(future)
                code, seconds = future.result()
                lines.write(json.dumps({"command": commands[out], "exit": code, "seconds": round(seconds, 1)}) + "\n")
                failed = failed or (out if code else None)
                bar.set_postfix_str(out)
                bar.update()
    if failed:
        raise Fault(f"{failed}: not made, see {failed}.log; what was finished is kept, the same command goes on")


# ----------------------------------------------------------------------------------------------------- summing up


def readings(path: str) -> dict[str, np.ndarray]:
    """What a file of predictions says of each record, (n,): read one way or the other, from one CoT or from all."""
    grid = eval.grid_of(path, None)
    rows = records.read_records(path, grid=grid, need=("id", "score", "finished", "score_probs", "off_grid"))
    columns = {"score": np.array([row["score"] for row in rows], dtype=float)}
    n = len(rows[0]["finished"])
    for cots in {1, n}:
        suffix = "" if cots == 1 else f"@{cots}"
        for name, renormalise in (("", False), ("renormalised", True)):
            read = [eval.again(row, grid, cots=cots, renormalise=renormalise) for row in rows]
            columns[(name or "rail") + suffix] = np.array([row["prediction"] for row in read])
        columns["decoded" + suffix] = np.array([row["decoded"] for row in read])
    if n > 1:
        values = np.array(grid.values)
        columns["each CoT"] = np.array([row["score_probs"] for row in rows]) @ values  # (n, CoTs)
    return columns


def variance(each: np.ndarray) -> dict[str, float]:
    """Of predictions (records, CoTs): the variance between CoTs of one record, and between records (mean over CoTs)."""
    within = float(each.var(axis=1, ddof=1).mean())
    return {"within": within, "between": float(each.mean(1).var(ddof=1)) - within / each.shape[1]}


def reference(row: str) -> str:
    """Which row a row is compared with."""
    return "few-tract" if row.startswith("few") else row.rpartition("-")[0] + "-tract" if row in SCALE else "tract"


def summarise(plans: dict[int, Plan], rows: list[str], *, resamples: int) -> dict:
    """Metrics of every row, test and reading: a seed each, mean and standard deviation, and the paired difference to the
    row's reference (CoT-RAIL) with a 95 % interval from resampling seeds and test records."""
    columns: dict = {}  # (test, real-valued or not) → (row, reading) → (S, n)
    true: dict = {}
    cells, claims, variances = [], [], {}
    for row in rows:
        for test in plans[min(plans)].predictions[row]:
            read = [readings(p.predictions[row][test]) for p in plans.values()]
            key = ("test" if test in ("annotated", "p_s") else test, row in SCALE)
            scores = [r.pop("score") for r in read]
            if any(not np.array_equal(own, true.setdefault(key, scores[0])) for own in scores):
                raise InputError(f"{row}: not all its seeds were tested on the records that others were; remove what is older")
            if "each CoT" in read[0]:
                each = [variance(r.pop("each CoT")) for r in read]
                variances[row] = {part: [v[part] for v in each] for part in ("within", "between")}
            for reading in read[0]:
                columns.setdefault(key, {})[row, test, reading] = np.stack([r[reading] for r in read])

    for key, of in tqdm(columns.items(), desc="bootstrap", unit="test"):
        samples = eval.bootstrap(of, true[key], resamples=resamples, seed=0, metrics=("pearson", "rmse"))
        # A constant prediction says nothing of the score: its correlation, which is undefined, counts as 0
        samples = {name: {m: np.nan_to_num(s) for m, s in metrics.items()} for name, metrics in samples.items()}
        for (row, test, reading), column in of.items():
            cell = {"row": row, "test": test, "reading": reading}
            for metric in ("pearson", "spearman", "rmse"):
                values = np.array([eval.METRICS[metric](run, true[key]) for run in column])
                values = np.nan_to_num(values)
                spread = float(values.std(ddof=1)) if len(values) > 1 else None
                cell[metric] = {"per_seed": values.tolist(), "mean": float(values.mean()), "sd": spread}
            base = samples.get((reference(row), key[0], "rail"))
            if base and samples[row, test, reading] is not base:
                cell["difference"] = {m: eval.interval(s - base[m]) for m, s in samples[row, test, reading].items()}
                cell["reference"] = reference(row)
            cells.append(cell)
        for better, worse in CLAIMS:
            names = [(row, key[0], reading) for row, reading in (better, worse)]
            if all(name in samples for name in names):
                of, than = (samples[name] for name in names)
                difference = {m: eval.interval(of[m] - than[m]) for m in of}
                claims.append({"test": key[0], "better": better, "than": worse, "difference": difference})
    return {
        "records": {f"{t}{'_real' if r else ''}": len(y) for (t, r), y in true.items()},
        "cells": cells,
        "claims": claims,
        "variance": variances,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    names = [name for group in GROUPS.values() for name in group]
    parser.add_argument(
        "--rows",
        nargs="+",
        default=list(GROUPS),
        choices=[*GROUPS, *names],
        metavar="ROW",
        help=", ".join(GROUPS) + " or " + " ".join(names),
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5], metavar="SEED", help="training seeds")
    parser.add_argument("--jobs", type=runs.COUNT, default=os.cpu_count(), help="commands at a time")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="what to test on")
    parser.add_argument("--num-cots", type=runs.COUNT, default=5, help="CoTs a prompt in the main rows")
    parser.add_argument(
        "--settings",
        type=Path,
        default=ROOT / "results/ablations/settings.json",
        help="frozen settings: train, and generate, seed_model and size where others are meant",
    )
    parser.add_argument("--resamples", type=runs.COUNT, default=1000, help="bootstrap resamples of seeds and records")
    parser.add_argument("--out", type=Path, default=Path("out/ablations"), help="folder of everything that is made")
    parser.add_argument("--show", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    os.chdir(ROOT)
    settings = json.loads(args.settings.read_text("utf-8"))
    rows = [name for row in args.rows for name in GROUPS.get(row, [row])]
    same = {"flags": flags_of(settings["train"]), "num_cots": args.num_cots, "split": args.split}
    same |= {"generate": flags_of(settings["generate"])} if "generate" in settings else {}
    same |= {name: settings[name] for name in ("seed_model", "size") if name in settings}
    plans = {seed: plan(f"{args.out}/seed{seed}", seed, **same) for seed in args.seeds}
    todo = needed(plans.values(), rows)
    if args.show:
        print("\n".join(command for _, command in todo))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    run_all(todo, jobs=args.jobs, log=args.out / "log.jsonl")
    report = {"settings": settings, "seeds": args.seeds, "split": args.split, "resamples": args.resamples}
    report |= summarise(plans, rows, resamples=args.resamples)
    report["ideal"] = {
        f"{name}{'_real' if real else ''}": ideal.metrics(f"data/tiny/{name}{'_real' if real else ''}.jsonl", real=real)
        for name in (("test", "test_ood") if args.split == "test" else (args.split,))
        for real in (False, True)
    }
    runs.write_whole(args.out / "metrics.json", json.dumps(report, indent=1) + "\n")
    print(f"{args.out}/metrics.json")


if __name__ == "__main__":
    runs.run(main)
