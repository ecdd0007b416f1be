"""Measure the rows of the paper's table on a task with people's words and people's scores.

    python bench/real.py ists                                # model and data come first: make real
    python bench/real.py feedbackqa --rows tract --seeds 1   # one row, one seed
    python bench/real.py ists --rows tract --seeds 1 --show  # only print the commands, in order
    python bench/real.py ists --measured                     # sum up what there is

The chains of commands are those of bench/ablations.py, with model, records and settings of the task
(results/real/settings.json). Beside the rows stand a ridge regression on words and, where records have the
ratings of several people, one of them against the mean of the others. Interrupted, the same command goes on.
What a seed predicts is kept in seedN.npz, some 100 KB: what is in there is not run again, on any machine.
"""

import json
import multiprocessing
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ablations
from ablations import STEPS, WITHOUT_COT, Setup

from eval import METRICS, against_others
from tract import models, runs
from tract.records import ROOT, Grid, InputError, read_records

SETTINGS = ROOT / "results/real/settings.json"
STEPS |= {
    "two-hot": "stage2_train.py --data @a1.cots.jsonl --lambda 0 --score-ce two-hot",
    "rps": "stage2_train.py --data @a1.cots.jsonl --penalty rps",
}
ROWS = ["seed", "seed-no-cot", "ce-no-cot", "raft", "ce", "a1", "a2", "tract", "two-hot", "rps"]
OFTEN = ["raft", "ce", "a1", "a2", "tract"]  # what has to be measured with several seeds


def tests_of(row: str, split: str, data: str, rows: list[str], num_cots: int = 5) -> dict[str, str]:
    """Return what a row is tested on beside the other `rows`, each with the command that predicts it.

    num_cots: how many CoTs A.1 and TRACT write for a record.
    """
    predict = f"predict.py --model @{row.removesuffix('-no-cot') if row == 'seed-no-cot' else row} --data"
    how = "--no-cot" if row in (*WITHOUT_COT, "seed-no-cot") else ""
    many = f"--num-cots {num_cots}" if row in ("a1", "tract") else how
    tests = {split: f"{predict} {data}/{split}.jsonl {many}"}
    if split == "test":
        tests |= ablations.whose_cots(row, rows, predict, f"{data}/test.jsonl")
    return tests


def fast_precision() -> str:
    """Return the option for what this machine is fast at: bf16 where GPU or CPU has instructions for it."""
    has = torch.cpu.get_capabilities()
    # Asked in a process of its own: forks of one that has used the GPU could not use it
    with multiprocessing.get_context("fork").Pool(1) as pool:
        on_gpu = pool.apply(models.has_bf16)
    return "bf16" if on_gpu or has.get("avx512_bf16") or has.get("amx_bf16") else "fp32"


def setup_of(settings: dict, data: str) -> Setup:
    given = {"seed": "out/real/smollm2", "train.jsonl": f"{data}/train.jsonl"}
    common = {"grid": settings["grid"], fast_precision(): ""}
    judge = ablations.options(common | settings["judge"])
    return Setup(given, common | settings["train"], judge, settings["rows"])


def check_pack(folder: str, settings: dict) -> None:
    """Refuse a FOLDER.npz that was made with other settings. Raises InputError."""
    kept = ablations.packed(folder)
    if kept and str(kept["settings"]) != json.dumps(settings):
        raise InputError(f"{folder}.npz: was made with settings {kept['settings']}; choose another --out")


def pack(folder: str, names: list[str], settings: dict) -> None:
    """Add what these files of FOLDER predict to FOLDER.npz, in half precision; what it keeps stays."""
    kept = ablations.packed(folder)
    new = {name: ablations.predictions(folder, name) for name in names if name not in kept}
    for name, found in new.items():
        if found:
            probs, kept["true"], kept["grid"] = found
            kept[name] = probs.astype(np.float16)
    if kept:
        kept["settings"] = np.array(json.dumps(settings))
        runs.write_whole(f"{folder}.npz", lambda out: np.savez_compressed(out, **kept))


def features(pairs: list[list[str]]) -> np.ndarray:
    """Return how far the words of two texts overlap, and how long the texts are, (n, 5)."""
    rows = []
    for pair in pairs:
        a, b = (set(re.findall(r"\w+", text.lower())) for text in pair)
        both = len(a & b)
        rows.append([both / max(len(a), 1), both / max(len(b), 1), both / max(len(a | b), 1), len(a), len(b)])
    return np.array(rows, float)


def ridge(train: list[dict], test: list[dict]) -> np.ndarray:
    """Predict scores by ridge regression on TF-IDF of words and pairs of words, cosine and `features`.

    Its strength is chosen by cross-validation on the training records.
    """
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    words, scale = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), StandardScaler()
    words.fit(["\n".join(r["texts"]) for r in train])

    def inputs(records: list[dict], fit: bool):
        pairs = [r["texts"] for r in records]
        both = [words.transform(texts) for texts in zip(*pairs, strict=True)]
        dense = np.hstack([features(pairs), np.asarray(both[0].multiply(both[1]).sum(1))])
        dense = scale.fit_transform(dense) if fit else scale.transform(dense)
        return hstack([words.transform(["\n".join(pair) for pair in pairs]), 0.3 * dense]).tocsr()

    model = RidgeCV(alphas=np.logspace(-1, 2, 10), cv=5)
    model.fit(inputs(train, True), [r["score"] for r in train])
    return model.predict(inputs(test, False))


def baselines(train: list[dict], test: list[dict]) -> dict:
    """Return r and RMSE of a ridge regression, of one rater against the mean of the others and of a constant.

    Pearson's r of the constant, undefined, counts as 0.
    """
    true = np.array([r["score"] for r in test], dtype=float)
    predicted = ridge(train, test)
    found = {"ridge": {name: METRICS[name](predicted, true) for name in ("pearson", "rmse")}}
    if raters := against_others(test):
        found["one rater against the others"] = raters
    rmse = METRICS["rmse"](np.full_like(true, np.mean([r["score"] for r in train])), true)
    return found | {"mean training score": {"pearson": 0.0, "rmse": rmse}}


def main() -> None:
    settings = runs.read_json(SETTINGS)
    parser = ablations.make_parser(__doc__, {"often": OFTEN}, ROWS, "out/real")
    parser.add_argument("task", choices=settings["tasks"])
    parser.add_argument("--num-cots", type=int, choices=(1, 5), default=5, help="CoTs a test record")
    parser.set_defaults(rows=ROWS, seeds=[1, 2, 3])
    args = parser.parse_args()
    os.chdir(ROOT)
    data, own = f"{args.out}/{args.task}", settings["tasks"][args.task]
    rows = [name for row in args.rows for name in {"often": OFTEN}.get(row, [row])]
    args.out = Path(data)
    tests = {row: tests_of(row, args.split, data, rows, args.num_cots) for row in rows}
    for seed in args.seeds:
        check_pack(f"{data}/seed{seed}", own)
    folders = ablations.predict(args, tests, setup_of(own, data))
    if args.split == "test":
        for folder in folders:
            pack(folder, [f"{row}.{test}" for row in tests for test in tests[row]], own)
    report = {"task": args.task, "settings": own, "seeds": args.seeds}
    report |= ablations.summarise(folders, tests, args.split)
    grid = Grid.parse(own["grid"])
    records = [
        read_records(f"{data}/{name}.jsonl", grid, ("score", "texts")) for name in ("train", args.split)
    ]
    report["baselines"] = baselines(*records)
    runs.write_whole(args.out / "metrics.json", json.dumps(report, indent=1) + "\n")
    print(f"{args.out}/metrics.json; python results/real/draw.py {args.out}/metrics.json draws it")


if __name__ == "__main__":
    runs.run(main)
