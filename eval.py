"""Compare predictions with true scores: metrics, bootstrap intervals, differences, a figure. No torch here.

    python eval.py out/run/predictions.jsonl [more.jsonl ...] --out out/run/eval

Writes metrics.json and figure.png to --out and prints tables, for the prediction (CoT-RAIL) and the decoded
score. Several files are compared with the first, on the records they share and the same resamples of them.
--pairs judges pairs of records (data/pairs/prepare.py) by these scores instead, as pairs.py says.

    pearson, spearman, kendall, rmse, mae
    spread        standard deviation of the predictions over that of the true scores
    kappa         quadratic weighted kappa of both scores, rounded to the grid
    exact, within_one
                  share of records on which these agree, or differ by at most one grid point
    length_bias   correlation of prediction and length of the response, given the true score; for records
                  that have a `response`
    ties          share of the pairs of records that are given the same score
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from scipy import stats

import pairs
import runs
from records import SUFFIX, Grid, InputError, predicted, read_records


def correlation(of, a: np.ndarray, b: np.ndarray) -> float:
    """Return a correlation, NaN where one side is constant and it is undefined."""
    return math.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else float(of(a, b)[0])


KINDS = ("prediction", "decoded")  # CoT-RAIL, and the most likely score
METRICS = {  # (predicted (n,), true (n,)) → number
    "pearson": lambda p, y: correlation(stats.pearsonr, p, y),
    "spearman": lambda p, y: correlation(stats.spearmanr, p, y),
    "kendall": lambda p, y: correlation(stats.kendalltau, p, y),
    "rmse": lambda p, y: float(np.sqrt(np.mean((p - y) ** 2))),
    "mae": lambda p, y: float(np.mean(np.abs(p - y))),
    "spread": lambda p, y: float(np.std(p) / np.std(y)) if np.ptp(y) else math.nan,
}
AGREEMENT = {  # the same, of indices into the score grid
    "kappa": lambda p, y: kappa(p, y),
    "exact": lambda p, y: float(np.mean(p == y)),
    "within_one": lambda p, y: float(np.mean(np.abs(p - y) <= 1)),
}


def kappa(p: np.ndarray, y: np.ndarray) -> float:
    """Return the quadratic weighted kappa (Cohen 1968): 1 − mean squared difference / the same by chance."""
    by_chance = np.var(p) + np.var(y) + (p.mean() - y.mean()) ** 2  # mean of (p_i − y_j)² over all i, j
    return float(1 - np.mean((p - y) ** 2) / by_chance) if by_chance else math.nan


def length_bias(p: np.ndarray, y: np.ndarray, length: np.ndarray) -> float:
    """Return the partial correlation of prediction and length, given the true score."""
    p_l, p_y, l_y = (correlation(stats.pearsonr, a, b) for a, b in ((p, length), (p, y), (length, y)))
    rest = (1 - p_y**2) * (1 - l_y**2)
    return (p_l - p_y * l_y) / math.sqrt(rest) if rest > 1e-12 else math.nan


def ties(p: np.ndarray) -> float:
    _, same = np.unique(p, return_counts=True)
    return float((same * (same - 1)).sum() / max(len(p) * (len(p) - 1), 1))


def against_others(rows: list[dict], kind: str = "") -> dict | None:
    """Return r (None where undefined) and RMSE of each rater against the mean of a record's other raters.

    None where no record has several `ratings`. kind: put this prediction (one of KINDS) in the rater's place.
    """
    pairs = [
        (row[kind] if kind else own, np.mean(of[:k] + of[k + 1 :]))
        for row in rows
        if len(of := row.get("ratings") or ()) > 1
        for k, own in enumerate(of)
    ]
    if not pairs:
        return None
    found = {name: METRICS[name](*np.array(pairs).T) for name in ("pearson", "rmse")}
    return {"ratings": len(pairs)} | {name: x if math.isfinite(x) else None for name, x in found.items()}


def sampled(p: np.ndarray, rows: list[dict], grid: Grid, picks: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Return every metric of the predictions p (n,) on the data and on each resample in `picks`."""
    y = np.array([row["score"] for row in rows], dtype=float)
    points = [np.array([grid.nearest(score) for score in scores]) for scores in (p, y)]
    found = {name: [of(p[pick], y[pick]) for pick in picks] for name, of in METRICS.items()}
    found |= {name: [of(*(x[pick] for x in points)) for pick in picks] for name, of in AGREEMENT.items()}
    if all(isinstance(row.get("response"), str) for row in rows):
        length = np.array([len(row["response"]) for row in rows], dtype=float)
        found["length_bias"] = [length_bias(p[pick], y[pick], length[pick]) for pick in picks]
    return {name: np.array(samples) for name, samples in found.items()}


def interval(samples: np.ndarray) -> dict:
    """Return the value on the data (entry 0) and the 95 % percentile interval; None where undefined."""
    value, resampled = samples[0], samples[1:][np.isfinite(samples[1:])]
    if not math.isfinite(value) or not len(resampled):
        return {"value": None, "low": None, "high": None}
    return {"value": value} | dict(zip(("low", "high"), np.percentile(resampled, [2.5, 97.5]), strict=True))


def read_predictions(path: str, args) -> tuple[list[dict], Grid]:
    """Read a file of predict.py, as it would be with another --grid, fewer CoTs, or renormalised."""
    noted = runs.read_json(Path(f"{path.removesuffix('.jsonl')}.run.json")).get("arguments", {})
    grid = Grid.parse(args.grid or noted.get("grid") or str(Grid()), noted.get("suffix", SUFFIX))
    need = ("id", "prediction", "decoded", "score_probs", "off_grid", "finished")
    rows = read_records(path, grid, need)
    for row in rows if args.grid or args.cots or args.renormalise else []:
        if args.cots and args.cots > len(row["finished"]):
            raise InputError(f"{path}: record {row['id']!r} has fewer CoTs than --cots {args.cots}")
        row |= {field: row[field][: args.cots] for field in ("finished", "score_probs", "off_grid")}
        row["prediction"], row["decoded"] = predicted(row["score_probs"], grid, args.renormalise)
    return rows, grid


def reliability(rows: list[dict], grid: Grid, bins: int = 10) -> list[dict]:
    """Return, for each score and bin of its probability, how often it was the (nearest) true score."""
    points = []
    probs = np.array([np.mean(row["score_probs"], axis=0) for row in rows])  # (n, S), mean over the CoTs
    true = np.array([grid.nearest(row["score"]) for row in rows])
    for s, token in enumerate(grid.tokens):
        bin_of = np.minimum((probs[:, s] * bins).astype(int), bins - 1)
        for here in (bin_of == b for b in np.unique(bin_of)):
            means = {"predicted": float(probs[here, s].mean()), "observed": float((true[here] == s).mean())}
            points.append({"score": token, "n": int(here.sum())} | means)
    return points


def compare(files: dict[str, tuple[list[dict], Grid]], resamples: int, seed: int) -> dict:
    """Return all metrics of all files, on the records that have a score and are in every file.

    Raises InputError where there is no such record, or where the files do not agree on the true scores.
    """
    scored = {path: {} for path in files}  # path → id → record
    for path, (rows, _) in files.items():
        scored[path] = {row["id"]: row for row in rows if row.get("score") is not None}
    first = next(iter(files))
    ids = [id for id in scored[first] if all(id in rows for rows in scored.values())]
    if not ids:
        raise InputError(f"{', '.join(files)}: no record with a score in common; nothing to evaluate")
    true = np.array([scored[first][id]["score"] for id in ids], dtype=float)
    # One resample a row, the same for all files: so differences are paired
    picks = [np.arange(len(ids)), *np.random.default_rng(seed).integers(0, len(ids), (resamples, len(ids)))]
    report = {"reference": first, "evaluated": len(ids), "resamples": resamples, "seed": seed, "files": {}}
    report["one_rater"] = against_others([scored[first][id] for id in ids])
    samples = {}
    for path, (rows, grid) in files.items():
        own = [scored[path][id] for id in ids]
        if [row["score"] for row in own] != true.tolist():
            raise InputError(f"{path}: its true scores differ from those of {first}; compare the same data")
        finished = [f for row in own for f in row["finished"]]
        entry = {"sha256": runs.sha256(path), "grid": str(grid), "records": len(rows), "cots": len(finished)}
        entry |= {"without_score": len(rows) - len(scored[path])}
        entry |= {"not_in_all_files": len(scored[path]) - len(ids)}
        entry |= {"unfinished_rate": finished.count(False) / len(finished)}
        entry |= {"off_grid_mean": float(np.mean([o for row in own for o in row["off_grid"]]))}
        report["files"][path] = entry | {"reliability": reliability(own, grid), "difference": {}}
        for kind in KINDS:
            values = np.array([row[kind] for row in own])
            now = sampled(values, own, grid, picks)
            before = samples.setdefault(kind, now)  # the first file's
            report["files"][path][kind] = {name: interval(s) for name, s in now.items()} | {
                "ties": ties(values)
            }
            differences = {name: interval(now[name] - before[name]) for name in now if name in before}
            report["files"][path]["difference"][kind] = differences
        report["files"][path]["against_others"] = against_others(own, KINDS[0])
    return report


def draw(files: dict[str, tuple[list[dict], Grid]], report: dict, path: Path) -> None:
    """Draw a column a file: predicted against true score, and the reliability of the score distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(files), figsize=(4 * len(files), 7.4), squeeze=False, layout="tight")
    for (name, (rows, grid)), (top, bottom) in zip(files.items(), axes.T, strict=True):
        true, values = np.array([(r["score"], r["prediction"]) for r in rows if r.get("score") is not None]).T
        jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(true)) * np.ptp(grid.values)
        top.plot(true + jitter, values, ".", alpha=0.25, markeredgewidth=0)
        if len(levels := np.unique(true)) <= 20:
            means = [values[true == level].mean() for level in levels]
            top.plot(levels, means, "o-", color="black", label="mean prediction")
        top.plot(grid.values, grid.values, "--", color="gray", label="prediction = true score")
        top.set(xlabel="true score", ylabel="prediction")
        top.set_title(name, fontsize=8)
        for token in grid.tokens:
            points = [p for p in report["files"][name]["reliability"] if p["score"] == token and p["n"] >= 10]
            both = [[p[name] for p in points] for name in ("predicted", "observed")]
            bottom.plot(*both, ".-", label=f"score {token}")
        bottom.plot([0, 1], [0, 1], "--", color="gray")
        bottom.set(xlabel="p(score), predicted", ylabel="share of records with that score")
        for axis in (top, bottom):
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cell(c: dict | float | str | None) -> str:
    if isinstance(c, float):
        return f"{c:.3f}"
    if not isinstance(c, dict):
        return str("" if c is None else c)
    return "undefined" if c["value"] is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**c)


def print_table(head: list[str], rows: list[list]) -> None:
    lines = [head, ["---"] * len(head), *([*map(cell, row)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print(f"| {' | '.join(map(str.ljust, line, widths))} |")
    print()


def evaluate_pairs(files: dict[str, tuple[list[dict], Grid]], resamples: int, seed: int) -> dict:
    """Return and print, for every file, how often the chosen response of a pair gets the higher score."""
    report = {"resamples": resamples, "seed": seed, "files": {}}
    for path, (rows, _) in files.items():
        found = pairs.compare(rows, resamples, seed)
        groups = [(*names, {name: interval(s) for name, s in samples.items()}) for *names, samples in found]
        print(f"{path}: 95 % bootstrap intervals over pairs\n")
        print_table(
            ["section", "subset", "pairs", *pairs.NAMES], [[*names, *of.values()] for *names, of in groups]
        )
        keys = ("section", "subset", "pairs")
        report["files"][path] = [dict(zip(keys, names, strict=True)) | of for *names, of in groups]
    return report


def show(report: dict) -> None:
    """Print the report: a row a metric, and for more than two files the predictions alone."""
    files = report["files"]
    kinds = KINDS if len(files) <= 2 else KINDS[:1]

    def table(columns: dict[str, dict]) -> None:
        names = dict.fromkeys(name for column in columns.values() for name in column)
        print_table(
            ["", *columns], [[name, *(column.get(name) for column in columns.values())] for name in names]
        )

    print(f"{report['evaluated']} records, 95 % bootstrap intervals\n")
    for number, (path, entry) in enumerate(files.items(), 1):
        print(
            f"{number}: {path}: {entry['unfinished_rate']:.1%} of {entry['cots']} CoTs unfinished,", end=" "
        )
        left_out = f"{entry['without_score']} without score, {entry['not_in_all_files']} not in all files"
        print(f"mean off-grid mass {entry['off_grid_mean']:.4f}, {left_out}")
    numbered = [(str(number), *item) for number, item in enumerate(files.items(), 1)]
    print()
    if raters := report["one_rater"]:
        of = {"one rater": raters} | {n: entry["against_others"] for n, _, entry in numbered}
        head = [f"{raters['ratings']} ratings, against the mean of the others", "r", "RMSE"]
        print_table(head, [[name, own["pearson"], own["rmse"]] for name, own in of.items()])
    table({f"{n} {kind}": entry[kind] for n, _, entry in numbered for kind in kinds})
    if len(files) > 1:
        print("Difference to 1 on the same records\n")
        table({f"{n} {kind}": entry["difference"][kind] for n, _, entry in numbered[1:] for kind in kinds})
        print(f"lowest RMSE: {min(files, key=lambda path: files[path]['prediction']['rmse']['value'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("predictions", nargs="*", default=["out/predictions.jsonl"], help="JSONL files of predict.py")
    add("--out", type=Path, default=Path("out/eval"), help="folder for metrics.json and figure.png")
    add("--grid", help="score grid; None: the one predict.py noted, else 1,2,3,4,5")
    add("--cots", type=runs.COUNT, help="use the first so many CoTs of each record; None: all")
    add("--pairs", action="store_true", help="judge pairs of records, told by `pair` and `chosen`")
    add("--renormalise", action="store_true", help="divide expected scores by their mass on the grid")
    add("--resamples", type=runs.COUNT, default=1000, help="bootstrap resamples of the records")
    add("--seed", type=runs.SEED, default=0, help="random seed of the bootstrap")
    args = parser.parse_args()
    runs.check_out(args)
    if len(set(args.predictions)) < len(args.predictions):
        raise InputError("the same prediction file is given twice; give each once")
    files = {path: read_predictions(path, args) for path in args.predictions}
    of = evaluate_pairs if args.pairs else compare
    report = of(files, args.resamples, args.seed)
    part = Path(f"{args.out}.part")
    part.mkdir(parents=True)
    if not args.pairs:
        draw(files, report, part / "figure.png")
    runs.write_whole(part / "metrics.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    part.rename(args.out)
    if not args.pairs:
        show(report)


if __name__ == "__main__":
    runs.run(main)
