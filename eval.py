"""Compare predictions with true scores: metrics, bootstrap intervals, differences, a figure. No torch here.

    python eval.py out/run/predictions.jsonl [more.jsonl ...] --out out/run/eval

Writes metrics.json, figure.png and report.html (tables, figure, records) to --out and prints tables, for the
prediction (CoT-RAIL) and the decoded score. Several files are compared with the first, on the records they
share and the same resamples. Records without score or prediction are left out and counted. Where records
have the `ratings` of several people, each rater, and the judge in a rater's place, is compared with the mean
of the others. It also measures how far a prediction may be off, for predict.py --intervals (docs/trust.md).
With --pairs it decides pairs of responses by their scores instead, and writes metrics.json alone.

    pearson, spearman, kendall, rmse, mae
    spread        standard deviation of the predictions over that of the true scores
    kappa         quadratic weighted kappa of predicted and true score, each rounded to the grid
    exact, within_one
                  share of records on which these agree, or differ by at most one grid point
    length_bias   correlation of prediction and length of the response (in characters), given the true score;
                  if every record has a `response`
    ties          share of the pairs of records that are given the same score
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from tract import intervals, page, pairs, runs
from tract.records import InputError
from tract.report import describe, draw, write
from tract.scores import Predictions, facts_of_file, groups_of, keep_common, read_predictions

KINDS = ("prediction", "decoded")  # CoT-RAIL, and the most likely score


# The metrics. p: predicted scores (n,), not probabilities; y: true scores (n,); undefined: NaN (ties: 0)
def correlation(coefficient, p: np.ndarray, y: np.ndarray) -> float:
    """Return a correlation coefficient of scipy.stats, NaN where one side is constant."""
    if np.ptp(p) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(coefficient(p, y).statistic)


def spread(p: np.ndarray, y: np.ndarray) -> float:
    """Return std(p) / std(y): below 1 where predictions vary less than true scores."""
    return float(np.std(p) / np.std(y)) if np.ptp(y) else math.nan


def kappa(p: np.ndarray, y: np.ndarray) -> float:
    """Return the quadratic weighted kappa (Cohen 1968): 1 − mean squared difference / the same by chance."""
    by_chance = np.var(p) + np.var(y) + (p.mean() - y.mean()) ** 2  # mean of (p_i − y_j)² over all i, j
    return float(1 - np.mean((p - y) ** 2) / by_chance) if by_chance else math.nan


METRICS = {
    "pearson": lambda p, y: correlation(stats.pearsonr, p, y),
    "spearman": lambda p, y: correlation(stats.spearmanr, p, y),
    "kendall": lambda p, y: correlation(stats.kendalltau, p, y),
    "rmse": lambda p, y: float(np.sqrt(np.mean((p - y) ** 2))),
    "mae": lambda p, y: float(np.mean(np.abs(p - y))),
    "spread": spread,
}
AGREEMENT = {  # here p and y are indices of the grid points nearest to the scores; 2.5 counts as 3
    "kappa": kappa,
    "exact": lambda p, y: float(np.mean(p == y)),
    "within_one": lambda p, y: float(np.mean(np.abs(p - y) <= 1)),
}


def length_bias(p: np.ndarray, y: np.ndarray, length: np.ndarray) -> float:
    """Return the partial correlation of prediction and length of the response (n,), given the true score.

    (r_pl − r_py · r_ly) / √((1 − r_py²)(1 − r_ly²)), of three Pearson correlations
    """
    r_pl = correlation(stats.pearsonr, p, length)
    r_py = correlation(stats.pearsonr, p, y)
    r_ly = correlation(stats.pearsonr, length, y)
    unexplained = (1 - r_py**2) * (1 - r_ly**2)  # NaN where r_py or r_ly is; then the result is NaN, too
    if unexplained <= 1e-12:  # the true score explains prediction or length altogether
        return math.nan
    return (r_pl - r_py * r_ly) / math.sqrt(unexplained)


def ties(p: np.ndarray) -> float:
    """Return the share of the pairs of records that are given the same score; 0 where there is no pair."""
    _, counts = np.unique(p, return_counts=True)
    tied_pairs = np.sum(counts * (counts - 1) / 2)
    all_pairs = len(p) * (len(p) - 1) / 2
    return float(tied_pairs / all_pairs) if all_pairs else 0.0


def against_others(rows: list[dict], kind: str | None = None) -> dict | None:
    """Compare each rating with the mean of its record's others: Pearson's r (None: undefined) and RMSE.

    None where no record has several `ratings`. kind: put this score (one of KINDS) in the rater's place.
    """
    scores = []
    means_of_others = []
    for row in rows:
        ratings = row.get("ratings") or []
        if len(ratings) < 2:
            continue
        for k, rating in enumerate(ratings):
            scores.append(rating if kind is None else row[kind])  # the judge takes each rater's place in turn
            means_of_others.append(np.mean(ratings[:k] + ratings[k + 1 :]))
    if not scores:
        return None
    found = {"ratings": len(scores)}
    for name in ("pearson", "rmse"):
        value = METRICS[name](np.array(scores, dtype=float), np.array(means_of_others))
        found[name] = value if math.isfinite(value) else None
    return found


# The bootstrap: every metric anew on resamples of the records, drawn with replacement
def draw_resamples(groups: list, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the indices of the records in each resample; the first is the data itself.

    groups: which group each record is of (n,). Whole groups are drawn: records of one group are alike, and
    drawn singly they would make intervals too narrow. A record like no other is a group of its own.
    """
    indices_of = {}  # group → indices of its records
    for index, group in enumerate(groups):
        indices_of.setdefault(group, []).append(index)
    members = [np.array(indices) for indices in indices_of.values()]
    yield np.arange(len(groups))
    random = np.random.default_rng(seed)
    for _ in range(resamples):  # one at a time: all together would take gigabytes
        drawn = random.integers(0, len(members), len(members))  # which groups
        if len(members) == len(groups):  # every record is a group: the numbers of groups are indices
            yield drawn
        else:
            yield np.concatenate([members[number] for number in drawn])


def bootstrap(file: Predictions, kind: str, picks: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Return every metric's values (1 + resamples,): on the data, then on each resample.

    kind: the score to judge by, one of KINDS. picks: what draw_resamples yields.
    """
    rows, grid = file
    predicted = np.array([row[kind] for row in rows], dtype=float)
    true = np.array([row["score"] for row in rows], dtype=float)
    predicted_points = np.array([grid.nearest(score) for score in predicted])
    true_points = np.array([grid.nearest(score) for score in true])
    with_length = all(isinstance(row.get("response"), str) for row in rows)
    if with_length:
        length = np.array([len(row["response"]) for row in rows], dtype=float)
    samples = []
    for pick in picks:
        p = predicted[pick]
        y = true[pick]
        values = {name: metric(p, y) for name, metric in METRICS.items()}
        for name, metric in AGREEMENT.items():
            values[name] = metric(predicted_points[pick], true_points[pick])
        if with_length:
            values["length_bias"] = length_bias(p, y, length[pick])
        samples.append(values)
    return {name: np.array([values[name] for values in samples]) for name in samples[0]}


def confidence_interval(samples: np.ndarray) -> dict:
    """Return the value on the data (entry 0) and the 95 % percentile interval; None where undefined."""
    value = samples[0]
    resampled = samples[1:]
    resampled = resampled[np.isfinite(resampled)]
    if not math.isfinite(value) or len(resampled) == 0:
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": value, "low": low, "high": high}


# The comparison: all files on the same records, and on the same resamples of them
def compare(
    files: dict, common: dict[str, Predictions], resamples: int, seed: int, group: str | None = None
) -> dict:
    """Return what metrics.json holds: all metrics of every file, and their differences to the first file.

    files: all records of each file, by its path. common: those that are compared, from keep_common. group:
    the field that says which records belong together; None: none do.
    """
    reference = next(iter(common))
    n = len(common[reference].rows)
    groups = list(range(n)) if group is None else groups_of(common[reference].rows, group)
    report = {"reference": reference, "evaluated": n, "resamples": resamples, "seed": seed, "files": {}}
    if group is not None:
        report |= {"group": group, "groups": len(set(groups))}
    report["one_rater"] = against_others(common[reference].rows)  # what a person reaches
    samples = {}  # path → kind → metric → values (1 + resamples,)
    for path, file in common.items():
        samples[path] = {}
        for kind in KINDS:
            picks = draw_resamples(groups, resamples, seed)  # each time the same: so differences are paired
            samples[path][kind] = bootstrap(file, kind, picks)
    for path, file in common.items():
        entry = facts_of_file(path, files[path], file)  # records, those left out and why, unfinished CoTs
        entry["difference"] = {}
        for kind in KINDS:
            entry[kind] = {}
            entry["difference"][kind] = {}
            for name, values in samples[path][kind].items():
                entry[kind][name] = confidence_interval(values)
                if name in samples[reference][kind]:  # length_bias may be missing there
                    difference = values - samples[reference][kind][name]  # 0 for the first file itself
                    entry["difference"][kind][name] = confidence_interval(difference)
            # Without interval: a resample holds records twice, which are tied with themselves
            entry[kind]["ties"] = ties(np.array([row[kind] for row in file.rows]))
        entry["against_others"] = against_others(file.rows, "prediction")  # the judge in a rater's place
        # How far single predictions may be off, for predict.py --intervals
        entry["intervals"] = intervals.calibrate(path, file, seed, groups)
        report["files"][path] = entry
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("predictions", nargs="*", default=["out/predictions.jsonl"], help="JSONL files of predict.py")
    add("--out", type=Path, default=Path("out/eval"), help="folder for metrics.json, figure.png, report.html")
    add("--grid", help="give the score tokens other values; None: those in the file")
    add("--cots", type=runs.COUNT, help="use the first so many CoTs of each record; None: all")
    add("--pairs", action="store_true", help="judge pairs of records: see the fields pair and chosen")
    add("--group", metavar="FIELD", help="resample whole groups: records with the same text in this field")
    add("--renormalise", action="store_true", help="divide expected scores by their mass on the grid")
    add("--resamples", type=runs.COUNT, default=1000, help="bootstrap resamples of the records")
    add("--seed", type=runs.SEED, default=0, help="random seed of the bootstrap")
    args = parser.parse_args()
    runs.check_out(args.out)
    if len(set(args.predictions)) < len(args.predictions):
        raise InputError("the same prediction file is given twice; give each once")
    if args.pairs and args.group:
        raise InputError("--group: pairs are resampled as they are; leave it out with --pairs")
    files = {}
    for path in args.predictions:
        files[path] = read_predictions(path, args.grid, args.cots, args.renormalise)
    if args.pairs:
        write(args.out, pairs.evaluate(files, args.resamples, args.seed, interval_of=confidence_interval))
        return
    common = keep_common(files)
    report = compare(files, common, args.resamples, args.seed, args.group)
    figure = draw(common, report)
    text = describe(report, common)
    worst = page.worst(common)
    text += page.left_out(worst, report["evaluated"])
    write(args.out, report, figure, page.render(worst, text, figure))
    print(text, end="")


if __name__ == "__main__":
    runs.run(main)
