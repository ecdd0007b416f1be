"""Compare predictions with true scores: metrics with bootstrap intervals, paired differences, a figure. No torch here.

    python eval.py out/run/predictions.jsonl [more.jsonl ...] --out out/run/eval

Writes metrics.json and figure.png to --out and prints a table. Every metric is given for the prediction (CoT-RAIL) and for
the decoded score. Several files are compared on the records they share: the difference of each to the first, with an
interval from the same resampled records for both. What has no score is counted, never dropped in silence.
"""

import argparse
import json
import math
import time
import warnings
from pathlib import Path

import numpy as np
from scipy import stats

import records
from records import Grid, InputError


def correlation(of, a: np.ndarray, b: np.ndarray) -> float:
    """A scipy correlation, NaN where one side is constant and it is undefined."""
    return math.nan if a.std() == 0 or b.std() == 0 else float(of(a, b)[0])


METRICS = {  # (predicted (n,), true (n,)) → number
    "pearson": lambda p, y: correlation(stats.pearsonr, p, y),
    "spearman": lambda p, y: correlation(stats.spearmanr, p, y),
    "kendall": lambda p, y: correlation(stats.kendalltau, p, y),
    "rmse": lambda p, y: float(np.sqrt(np.mean((p - y) ** 2))),
    "mae": lambda p, y: float(np.mean(np.abs(p - y))),
}


def bootstrap(
    values: dict[str, np.ndarray], true: np.ndarray, *, resamples: int, seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Every metric of every column of `values` on the data (entry 0) and on `resamples` resamples of its records.

    All columns see the same resampled records, so that differences between them are paired.
    """
    random = np.random.default_rng(seed)
    n = len(true)
    picks = [np.arange(n), *(random.integers(0, n, n) for _ in range(resamples))]
    return {
        name: {metric: np.array([of(column[pick], true[pick]) for pick in picks]) for metric, of in METRICS.items()}
        for name, column in values.items()
    }


def interval(samples: np.ndarray) -> dict:
    """The value on the data and the 95 % percentile interval; null where undefined (a constant prediction, one record)."""
    value, resampled = samples[0], samples[1:][np.isfinite(samples[1:])]
    if not math.isfinite(value) or not len(resampled):
        return {"value": None, "low": None, "high": None}
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": float(value), "low": float(low), "high": float(high)}


def grid_of(path: str, asked: str | None) -> Grid:
    """The grid that predict.py noted beside its file, unless one is asked for."""
    noted = Path(path).with_suffix(".run.json")
    if asked or not noted.is_file():
        return Grid.parse(asked) if asked else Grid()
    return Grid.parse(json.loads(noted.read_text("utf-8"))["grid"])


def reliability(rows: list[dict], grid: Grid, bins: int = 10) -> list[dict]:
    """For each score and each bin of its predicted probability: how often was it the (nearest) true score?"""
    points = []
    probs = np.array([np.mean(row["score_probs"], axis=0) for row in rows])  # (n, S), mean over the CoTs
    true = np.array([grid.nearest(row["score"]) for row in rows])
    for s, token in enumerate(grid.tokens):
        which = np.minimum((probs[:, s] * bins).astype(int), bins - 1)
        for b in np.unique(which):
            here = which == b
            point = {"score": token, "n": int(here.sum()), "predicted": float(probs[here, s].mean())}
            points.append(point | {"observed": float((true[here] == s).mean())})
    return points


def draw(files: dict[str, list[dict]], grids: dict[str, Grid], reliable: dict[str, list[dict]], path: Path) -> None:
    """One column a file: predicted against true score, and the reliability of the score distribution."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(files), figsize=(4 * len(files), 7.4), squeeze=False, layout="constrained")
    for column, (name, rows) in enumerate(files.items()):
        grid, top, bottom = grids[name], axes[0, column], axes[1, column]
        true = np.array([row["score"] for row in rows])
        predicted = np.array([row["prediction"] for row in rows])
        jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(rows)) * (grid.values[-1] - grid.values[0])
        top.plot(true + jitter, predicted, ".", alpha=0.25, markeredgewidth=0)
        levels = np.unique(true)
        if len(levels) <= 20:
            top.plot(
                levels,
                [predicted[true == level].mean() for level in levels],
                "o-",
                color="black",
                label="mean prediction",
            )
        top.plot(grid.values, grid.values, "--", color="gray", label="prediction = true score")
        top.set(title=name, xlabel="true score", ylabel="prediction")
        top.legend(frameon=False, fontsize=8)
        for token in grid.tokens:
            points = [p for p in reliable[name] if p["score"] == token]
            bottom.plot([p["predicted"] for p in points], [p["observed"] for p in points], ".-", label=token)
        bottom.plot([0, 1], [0, 1], "--", color="gray")
        bottom.set(xlabel="p(score), predicted", ylabel="share of records with that score", xlim=(0, 1), ylim=(0, 1))
        bottom.legend(frameon=False, fontsize=8, title="score")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def cell(entry: dict, digits: int = 3) -> str:
    if entry["value"] is None:
        return "undefined"
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def print_table(header: list[str], rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=records.Help)
    parser.add_argument("predictions", nargs="*", default=["out/predictions.jsonl"], help="JSONL files of predict.py")
    parser.add_argument("--out", type=Path, default=Path("out/eval"), help="folder for metrics.json and figure.png")
    parser.add_argument("--grid", help="score grid; None: the one predict.py noted, else 1,2,3,4,5")
    parser.add_argument("--resamples", type=int, default=1000, help="bootstrap resamples of the records")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation at --out")
    args = parser.parse_args()
    started = time.time()
    records.choose_out(args.out / "metrics.json", args.overwrite)
    if len(set(args.predictions)) < len(args.predictions):
        raise InputError("the same prediction file is given twice; give each once")

    # Read; keep what has a score and, of several files, what they share
    grids = {path: grid_of(path, args.grid) for path in args.predictions}
    need = ("id", "prediction", "decoded", "score_probs", "off_grid", "finished")
    rows = {path: records.read_records(path, grid=grids[path], need=need) for path in args.predictions}
    counts = {
        path: {"records": len(r), "without_score": sum(x.get("score") is None for x in r)} for path, r in rows.items()
    }
    scored = {path: {x["id"]: x for x in r if x.get("score") is not None} for path, r in rows.items()}
    first = args.predictions[0]
    shared = [id for id in scored[first] if all(id in s for s in scored.values())]
    if not shared:
        raise InputError(f"{', '.join(args.predictions)}: no record with a score in common; nothing to evaluate")
    for path in args.predictions:
        counts[path] |= {"evaluated": len(shared), "not_in_all_files": len(scored[path]) - len(shared)}
        if any(scored[path][id]["score"] != scored[first][id]["score"] for id in shared):
            raise InputError(
                f"{path}: its true scores differ from those of {first}; compare predictions of the same data"
            )
    rows = {path: [scored[path][id] for id in shared] for path in args.predictions}
    true = np.array([row["score"] for row in rows[first]], dtype=float)

    # Measure
    columns = {
        (path, kind): np.array([row[kind] for row in r])
        for path, r in rows.items()
        for kind in ("prediction", "decoded")
    }
    samples = bootstrap(columns, true, resamples=args.resamples, seed=args.seed)
    reliable = {path: reliability(r, grids[path]) for path, r in rows.items()}
    report: dict = {"first": first, "resamples": args.resamples, "seed": args.seed, "files": {}}
    for path, r in rows.items():
        finished = [f for row in r for f in row["finished"]]
        off_grid = [o for row in r for o in row["off_grid"]]
        report["files"][path] = {
            "sha256": records.sha256(path),
            "grid": str(grids[path]),
            **counts[path],
            "cots": len(finished),
            "unfinished_rate": 1 - float(np.mean(finished)),
            "off_grid_mean": float(np.mean(off_grid)),
            **{kind: {m: interval(s) for m, s in samples[path, kind].items()} for kind in ("prediction", "decoded")},
            "reliability": reliable[path],
        }
        if path != first:
            report["files"][path]["difference_to_first"] = {
                kind: {m: interval(s - samples[first, kind][m]) for m, s in samples[path, kind].items()}
                for kind in ("prediction", "decoded")
            }

    # Show
    args.out.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw(rows, grids, reliable, args.out / "figure.png")
    report["seconds"] = round(time.time() - started, 1)
    records.write_whole(args.out / "metrics.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")

    print(f"{len(shared)} records, 95 % bootstrap intervals\n")
    table = [
        [Path(path).stem, kind, *(cell(report["files"][path][kind][m]) for m in METRICS)]
        for path in rows for kind in ("prediction", "decoded")
    ]  # fmt: skip
    print_table(["file", "score", *METRICS], table)
    if len(rows) > 1:
        print(f"\nDifference to {Path(first).stem} on the same records\n")
        table = [
            [Path(path).stem, kind, *(cell(report["files"][path]["difference_to_first"][kind][m]) for m in METRICS)]
            for path in rows if path != first for kind in ("prediction", "decoded")
        ]  # fmt: skip
        print_table(["file", "score", *METRICS], table)
    print()
    for path, entry in report["files"].items():
        missing = "".join(
            f", {entry[key]} {key.replace('_', ' ')}" for key in ("without_score", "not_in_all_files") if entry[key]
        )
        print(
            f"{path}: {entry['unfinished_rate']:.1%} of {entry['cots']} CoTs unfinished, mean off-grid mass {entry['off_grid_mean']:.4f}{missing}"
        )
    print(f"{args.out}/metrics.json, {args.out}/figure.png")


if __name__ == "__main__":
    records.run(main)
