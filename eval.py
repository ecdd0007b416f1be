"""Compare predictions with true scores: metrics, bootstrap intervals, differences, a figure. No torch here.

    python eval.py out/run/predictions.jsonl [more.jsonl ...] --out out/run/eval

Writes metrics.json and figure.png to --out and prints tables, for the prediction (CoT-RAIL) and the decoded
score. Several files are compared with the first, on the records they share and the same resamples of them.
Records without a score, or without a prediction (renormalised, no mass on the grid), are left out, counted.
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
import io
import json
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
from scipy import stats

from tract import pairs, runs
from tract.records import Grid, InputError, off_grid_line, parse_line, predicted, read_records


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


def tied(rows: list[dict]) -> int:
    """Return in how many records several scores are equally likely, and likeliest, after one of the CoTs."""
    return len([row for row in rows if any(probs.count(max(probs)) > 1 for probs in row["score_probs"])])


def noted_beside(path: str) -> dict:
    """Return the arguments in NAME.run.json, if it belongs to this file: `x` and `x.jsonl` have one."""
    noted = runs.read_json(Path(f"{path.removesuffix('.jsonl')}.run.json")).get("arguments")
    belongs = isinstance(noted, dict) and Path(str(noted.get("out", path))).name == Path(path).name
    return noted if belongs else {}


def scale_of(path: str, args) -> tuple[Grid, bool]:
    """Return the grid of a file of predict.py, and whether it is renormalised, as each of its rows says.

    Rows of older versions do not; NAME.run.json does. Raises InputError where nothing does, or rows differ.
    """
    if not Path(path).is_file() or path.encode(errors="replace").decode() != path:
        raise InputError(f"{path}: no plain file with a name in UTF-8; give a JSONL file of predict.py")
    first = None
    noted = None
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            row = parse_line(line, f"{path}:{number}") if line.strip() else {}
            if "prediction" not in row:
                continue  # read_records says so
            if noted is None:
                noted = {} if row.get("grid") else noted_beside(path)
            grid = row.get("grid") or noted.get("grid") or args.grid
            if grid is None:
                raise InputError(f"{path}:{number}: no 'grid' in it; say which with --grid, as in 1,2,3,4,5")
            renormalised = row.get("renormalised") or noted.get("renormalise") or args.renormalise
            scale = Grid.parse(str(grid)), bool(renormalised)
            first = first or scale
            if scale != first:
                differs = "'grid' or 'renormalised' differs from the first record's"
                raise InputError(f"{path}:{number}: {differs}; evaluate the two kinds apart")
    return first or (Grid(), False)


def read_predictions(path: str, args) -> tuple[list[dict], Grid]:
    """Read a file of predict.py, as it would be with other values of --grid, fewer CoTs, or renormalised."""
    written, renormalised = scale_of(path, args)
    grid = Grid.parse(args.grid) if args.grid else written
    if grid.tokens != written.tokens:
        raise InputError(
            f"--grid {args.grid}: {path} is on {written}; give the same scores, with other values"
        )
    rows = read_records(path, grid, ("id", "prediction", "decoded", "score_probs", "off_grid", "finished"))
    for row in rows:
        row["renormalised"] = renormalised
        if args.cots and args.cots > len(row["finished"]):
            raise InputError(f"{path}: record {row['id']!r} has fewer CoTs than --cots {args.cots}")
        row |= {field: row[field][: args.cots] for field in ("finished", "score_probs", "off_grid")}
        if args.grid or args.cots or args.renormalise:
            row["prediction"], row["decoded"] = predicted(row["score_probs"], grid, renormalised)
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


def compare(files: dict[str, tuple], resamples: int, seed: int) -> tuple[dict, dict[str, tuple]]:
    """Return all metrics, and the records they are of: those that have score and prediction in every file.

    Raises InputError where there is no such record, or where the files do not agree on the true scores.
    """
    usable = {path: {} for path in files}  # path → id → record
    for path, (rows, _) in files.items():
        scored = [row for row in rows if row.get("score") is not None]
        usable[path] = {row["id"]: row for row in scored if row["prediction"] is not None}
    first = next(iter(files))
    ids = [id for id in usable[first] if all(id in rows for rows in usable.values())]
    if not ids:
        raise InputError(f"{', '.join(files)}: no record with score and prediction in common to evaluate")
    common = {path: ([usable[path][id] for id in ids], grid) for path, (_, grid) in files.items()}
    true = [row["score"] for row in common[first][0]]
    # One resample a row, the same for all files: so differences are paired
    picks = [np.arange(len(ids)), *np.random.default_rng(seed).integers(0, len(ids), (resamples, len(ids)))]
    report = {"reference": first, "evaluated": len(ids), "resamples": resamples, "seed": seed, "files": {}}
    report["one_rater"] = against_others(common[first][0])
    samples = {}
    for path, (rows, grid) in common.items():
        if [row["score"] for row in rows] != true:
            raise InputError(f"{path}: its true scores differ from those of {first}; compare the same data")
        scores = [row.get("score") for row in files[path][0]]
        finished = [f for row in rows for f in row["finished"]]
        entry = {"sha256": runs.sha256(path), "grid": str(grid), "renormalised": rows[0]["renormalised"]}
        entry |= {"records": len(scores), "cots": len(finished), "without_score": scores.count(None)}
        entry |= {"without_prediction": len(scores) - scores.count(None) - len(usable[path])}
        entry |= {"not_in_all_files": len(usable[path]) - len(ids)}
        entry |= {"unfinished_rate": finished.count(False) / len(finished), "tied_likeliest": tied(rows)}
        entry |= {"off_grid_mean": float(np.mean([o for row in rows for o in row["off_grid"]]))}
        entry |= {"reliability": reliability(rows, grid), "difference": {}}
        for kind in KINDS:
            values = np.array([row[kind] for row in rows])
            found = sampled(values, rows, grid, picks)
            before = samples.setdefault(kind, found)  # the first file's
            entry[kind] = {name: interval(s) for name, s in found.items()} | {"ties": ties(values)}
            entry["difference"][kind] = {k: interval(s - before[k]) for k, s in found.items() if k in before}
        report["files"][path] = entry | {"against_others": against_others(rows, KINDS[0])}
    return report, common


def draw(common: dict[str, tuple], report: dict) -> bytes:
    """Return a PNG, a column a file: predicted against true score, and how reliable the distributions are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["text.parse_math"] = False  # a $ in the name of a file or a score is no formula
    figure, axes = plt.subplots(2, len(common), figsize=(4 * len(common), 7.4), squeeze=False, layout="tight")
    for (name, (rows, grid)), (top, bottom) in zip(common.items(), axes.T, strict=True):
        true, values = np.array([(row["score"], row["prediction"]) for row in rows]).T
        jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(true)) * np.ptp(grid.values)
        top.plot(true + jitter, values, ".", alpha=0.25, markeredgewidth=0)
        if len(levels := np.unique(true)) <= 20:
            means = [values[true == level].mean() for level in levels]
            top.plot(levels, means, "o-", color="black", label="mean prediction")
        top.plot(grid.values, grid.values, "--", color="gray", label="prediction = true score")
        top.set(xlabel="true score", ylabel="prediction")
        top.set_title(name[-50:], fontsize=8)  # a column has no room for more
        for token in grid.tokens:
            points = [p for p in report["files"][name]["reliability"] if p["score"] == token and p["n"] >= 10]
            both = [[p[name] for p in points] for name in ("predicted", "observed")]
            bottom.plot(*both, ".-", label=f"score {token}")
        bottom.plot([0, 1], [0, 1], "--", color="gray")
        bottom.set(xlabel="p(score), predicted", ylabel="share of records with that score")
        for axis in (top, bottom):
            axis.legend(frameon=False, fontsize=8)
    png = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters that the font has not: they become boxes
        figure.savefig(png, dpi=110)
    plt.close(figure)
    return png.getvalue()


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


def evaluate_pairs(files: dict[str, tuple], resamples: int, seed: int) -> dict:
    """Return and print, for every file, how often the chosen response of a pair gets the higher score."""
    report = {"resamples": resamples, "seed": seed, "files": {}}
    for path, (rows, grid) in files.items():
        print(f"{path}: 95 % bootstrap intervals over pairs\n")
        whole = pairs.gather(rows, path)
        rows = [row for pair in whole for row in pair]
        print(f"likeliest score tied in {tied(rows)} of {len(rows)} records; {off_grid_line(rows, grid)}\n")
        table, report["files"][path] = [], []
        for section, subset, n, samples in pairs.compare(whole, resamples, seed):
            values = {name: interval(s) for name, s in samples.items()}
            table.append([section, subset, n, *values.values()])
            report["files"][path].append({"section": section, "subset": subset, "pairs": n} | values)
        print_table(["section", "subset", "pairs", *pairs.NAMES], table)
    return report


def show(report: dict, common: dict[str, tuple]) -> None:
    """Print the report: a row a metric, and for more than two files the predictions alone."""
    files = report["files"]
    kinds = KINDS if len(files) <= 2 else KINDS[:1]

    def table(columns: dict[str, dict]) -> None:
        names = dict.fromkeys(name for column in columns.values() for name in column)
        rows = [[name, *(column.get(name) for column in columns.values())] for name in names]
        print_table(["", *columns], rows)

    print(f"{report['evaluated']} records, 95 % bootstrap intervals\n")
    for number, (path, entry) in enumerate(files.items(), 1):
        left_out = f"{entry['without_score']} without score, {entry['not_in_all_files']} not in all files"
        left_out += f", {entry['without_prediction']} without prediction"
        print(f"{number}: {path}: {entry['records']} records, {left_out}")
        unfinished = f"{entry['unfinished_rate']:.1%} of {entry['cots']} CoTs unfinished"
        tied_in = f"likeliest score tied in {entry['tied_likeliest']} records"
        print(f"   {unfinished}, {tied_in}, {off_grid_line(*common[path])}")
    print()
    numbered = [(str(number), *item) for number, item in enumerate(files.items(), 1)]
    if raters := report["one_rater"]:
        judges = {"one rater": raters} | {n: entry["against_others"] for n, _, entry in numbered}
        head = [f"{raters['ratings']} ratings, against the mean of the others", "r", "RMSE"]
        print_table(head, [[name, found["pearson"], found["rmse"]] for name, found in judges.items()])
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
    add("--grid", help="the same scores with other values; None: the grid that the file says")
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
    if args.pairs:
        report = evaluate_pairs(files, args.resamples, args.seed)
    else:
        report, common = compare(files, args.resamples, args.seed)
        figure = draw(common, report)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside --out, under a name of its own: what a killed run or another one leaves is in nobody's way
    with tempfile.TemporaryDirectory(prefix=f"{args.out.name}.part-", dir=args.out.parent) as part:
        whole = Path(part) / "eval"
        whole.mkdir()
        runs.write_whole(whole / "metrics.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if not args.pairs:
            runs.write_whole(whole / "figure.png", lambda out: out.write(figure))
        runs.check_out(args)  # again, for another eval.py may have made it
        whole.rename(args.out)
    if not args.pairs:
        show(report, common)


if __name__ == "__main__":
    runs.run(main)
