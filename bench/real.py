"""Measure the rows of the paper's table on a task with people's words and people's scores.

    python bench/real.py ists                                # model and data come first: make real
    python bench/real.py ists --rows tract --seeds 1 --show  # only print the commands, in order
    python bench/real.py ists --measured                     # sum up what there is

The chains of commands are those of bench/ablations.py, with model, records and settings of the task
(results/real/settings.json). Beside the rows stand a ridge regression on words, the mean training score (of
each group, where records have one) and, where they have the ratings of several people, one of these against
the mean of the others. What a seed predicts is kept in seedN.npz: it is not run again, on any machine.
"""

import json
import os
import re
from importlib.util import find_spec

import ablations  # which puts the repository into sys.path
import numpy as np
from ablations import LOSSES, STEPS, Setup

from eval import METRICS, against_others
from tract import runs
from tract.records import ROOT, Grid, InputError, read_records

SETTINGS = ROOT / "results/real/settings.json"
# Stage 2 on the same CoTs, those of p_s, with another loss; "ce" itself is a row of stage 1
SAME_COTS = {"token": "ce"} | {loss: loss for loss in ("two-hot", "rps", "ce-w1", "two-hot-w1", "tract-0.02")}
for row, loss in SAME_COTS.items():
    STEPS[row] = f"{STEPS['tract']} {LOSSES[loss]}"
ROWS = ["seed", "seed-no-cot", "ce-no-cot", "raft", "ce", "a1", "a2", "tract", *SAME_COTS]


def setup_of(settings: dict, data: str) -> Setup:
    """Return what the commands of a task have in common; its records lie in DATA."""
    model = "out/real/smollm2"
    given = {"seed": model, "seed-no-cot": model, "train.jsonl": f"{data}/train.jsonl"}
    grid = {"grid": settings["grid"]}
    return Setup(grid | settings["train"], settings["rows"], grid | settings["judge"], given)


def deciding(settings: dict) -> str:
    """Return what of a task's settings decides what is predicted."""
    return json.dumps({name: value for name, value in settings.items() if name not in ("tests", "group")})


def check_pack(folder: str, settings: dict) -> None:
    """Refuse a FOLDER.npz of other settings. Raises InputError."""
    kept = ablations.packed(folder)
    if kept and str(kept["settings"]) != deciding(settings):
        raise InputError(f"{folder}.npz: was made with settings {kept['settings']}; choose another --out")


def pack(folder: str, names: list[str], settings: dict) -> None:
    """Add what these files of FOLDER predict to FOLDER.npz; what it keeps stays."""
    kept = ablations.packed(folder)
    for name in names:
        predicted = None if name in kept else ablations.predictions(folder, name)
        if predicted:
            probs, kept[f"{name}.true"], kept["grid"] = predicted
            kept[name] = probs.astype(np.float32)  # as the model computed it: halves would make ties
    if kept:
        kept["settings"] = np.array(deciding(settings))
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
    """Predict scores by ridge regression on TF-IDF of words and pairs of words, cosine and `features`."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler()
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
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


def means_of_groups(train: list[dict], test: list[dict], field: str) -> np.ndarray | None:
    """Predict the mean training score of each record's group; None where training lacks one of them."""
    scores = {}
    for record in train:
        scores.setdefault(record[field], []).append(record["score"])
    if any(record[field] not in scores for record in test):
        return None
    return np.array([np.mean(scores[record[field]]) for record in test])


def baselines(train: list[dict], test: list[dict], group: str | None) -> dict:
    """Return r and RMSE of ridge regression, means of groups, one rater against the others and a constant."""
    true = np.array([r["score"] for r in test], dtype=float)
    predicted = {"ridge": ridge(train, test)}
    means = means_of_groups(train, test, group) if group else None
    if means is not None:
        predicted[f"mean training score of the {group}"] = means
    predicted["mean training score"] = np.full_like(true, np.mean([r["score"] for r in train]))
    found = {}
    for label, values in predicted.items():  # r of a constant counts as 0
        r, rmse = (METRICS[name](values, true) for name in ("pearson", "rmse"))
        found[label] = {"pearson": float(np.nan_to_num(r)), "rmse": rmse}
    raters = against_others(test)
    if raters:
        found["one rater against the others"] = raters
    return found


def main() -> None:
    settings = runs.read_json(SETTINGS)
    parser = ablations.make_parser(__doc__, ROWS, "out/real")
    parser.add_argument("task", choices=settings["tasks"])
    parser.set_defaults(seeds=[1, 2, 3])
    args = parser.parse_args()
    if not args.show and not find_spec("sklearn"):  # which the ridge regression needs, after hours
        raise InputError("scikit-learn is not there; pip install -r bench/requirements.txt")
    os.chdir(ROOT)
    task = settings["tasks"][args.task]
    data = args.out / task.get("records", args.task)
    args.out = args.out / args.task
    files = task.get("tests", ["test"]) if args.split == "test" else [args.split]
    num_cots = dict.fromkeys(("a1", "tract"), task.get("num-cots", 5))  # a test record; of other rows one
    tests = ablations.tests_of(args.rows, files, str(data), num_cots)
    for seed in args.seeds:
        check_pack(f"{args.out}/seed{seed}", task)
    folders = ablations.predict(args, tests, setup_of(task, str(data)))
    if args.split == "test":
        for folder in folders:
            pack(folder, [f"{row}.{test}" for row, test in tests], task)
    grid = Grid.parse(task["grid"])
    train = read_records(data / "train.jsonl", grid, ("score", "texts"))
    records = {file: read_records(data / f"{file}.jsonl", grid, ("score", "texts")) for file in files}
    groups = None
    if "group" in task:  # intervals are over whole groups
        groups = {file: [row[task["group"]] for row in rows] for file, rows in records.items()}
    report = {"task": args.task, "split": args.split, "settings": task, "seeds": args.seeds}
    report |= ablations.summarise(folders, tests, files, groups)
    report["baselines"] = {file: baselines(train, records[file], task.get("group")) for file in files}
    ablations.write_report(args, report, "results/real/draw.py")


if __name__ == "__main__":
    runs.run(main)
