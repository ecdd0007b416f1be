"""Compare predictions with true scores: metrics with bootstrap intervals, paired differences, a figure. No torch here.

    python eval.py out/run/predictions.jsonl [more.jsonl ...] --out out/run/eval
    python eval.py --logs out/run/stage1/log.jsonl out/run/stage2/log.jsonl --out out/run/eval

Writes metrics.json and figure.png to --out and prints a table. Every metric is given for the prediction (CoT-RAIL) and for
the decoded score. Several files are compared on the records they share: the difference of each to the first, with an
interval from the same resampled records for both. What has no score is counted, never dropped in silence.
"""

import argparse
import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import stats

import records
import runs
from records import Grid
from runs import InputError


def correlation(of, a: np.ndarray, b: np.ndarray) -> float:
    """A correlation, NaN where one side is constant and it is undefined."""
    return math.nan if np.ptp(a) == 0 or np.ptp(b) == 0 else float(of(a, b))


KINDS = ("prediction", "decoded")  # CoT-RAIL, and the most likely score
METRICS = {  # (predicted (n,), true (n,)) → number
    "pearson": lambda p, y: correlation(lambda p, y: np.corrcoef(p, y)[0, 1], p, y),
    "spearman": lambda p, y: correlation(lambda p, y: stats.spearmanr(p, y)[0], p, y),
    "kendall": lambda p, y: correlation(lambda p, y: stats.kendalltau(p, y)[0], p, y),
    "rmse": lambda p, y: float(np.sqrt(np.mean((p - y) ** 2))),
    "mae": lambda p, y: float(np.mean(np.abs(p - y))),
}


def bootstrap(
    values: dict[str, np.ndarray], true: np.ndarray, *, resamples: int, seed: int, metrics: Iterable[str] = tuple(METRICS)
) -> dict[str, dict[str, np.ndarray]]:
    """Every metric of every column of `values` on the data (entry 0) and on `resamples` resamples of its records.

    A column is (n,), or (S, n) for S training runs with different seeds: then the metric is the mean over the runs, and the
    runs are resampled as well. All columns see the same resampled records and runs, so that differences are paired.
    """
    random = np.random.default_rng(seed)
    n, seeds = len(true), max(map(len, map(np.atleast_2d, values.values())))
    picks = [(range(seeds), np.arange(n))]
    for _ in range(resamples):
        picks.append((random.integers(0, seeds, seeds) if seeds > 1 else range(1), random.integers(0, n, n)))

    def on(pick: np.ndarray, column: np.ndarray, of) -> list[float]:
        return [of(run[pick], true[pick]) for run in np.atleast_2d(column)]

    return {
        name: {
            metric: np.array([np.mean(np.array(on(pick, column, METRICS[metric]))[list(which)]) for which, pick in picks])
            for metric in metrics
        }
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


def again(row: dict, grid: Grid, *, cots: int | None, renormalise: bool) -> dict:
    """A record as it would be had predict.py been given --num-cots `cots` or --renormalise. Raises InputError."""
    if cots and cots > len(row["finished"]):
        raise InputError(f"record {row['id']!r} has {len(row['finished'])} CoTs, fewer than --cots {cots}")
    row = row | {field: row[field][:cots] for field in ("finished", "score_probs", "off_grid")}
    row["prediction"], row["decoded"] = records.predicted(row["score_probs"], grid, renormalise=renormalise)
    return row


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


def pyplot():
    """matplotlib, imported only where something is drawn, and for files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(files: dict[str, list[dict]], grids: dict[str, Grid], report: dict, path: Path) -> None:
    """One column a file: predicted against true score, and the reliability of the score distribution."""
    plt = pyplot()
    figure, axes = plt.subplots(2, len(files), figsize=(4 * len(files), 7.4), squeeze=False, layout="constrained")
    for (name, rows), (top, bottom) in zip(files.items(), axes.T, strict=True):
        grid, rows = grids[name], [row for row in rows if row.get("score") is not None]
        true = np.array([row["score"] for row in rows])
        predicted = np.array([row["prediction"] for row in rows])
        jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(rows)) * (grid.values[-1] - grid.values[0])
        top.plot(true + jitter, predicted, ".", alpha=0.25, markeredgewidth=0)
        levels = np.unique(true)
        if len(levels) <= 20:
            means = [predicted[true == level].mean() for level in levels]
            top.plot(levels, means, "o-", color="black", label="mean prediction")
        top.plot(grid.values, grid.values, "--", color="gray", label="prediction = true score")
        limits = min(grid.values[0], predicted.min()), max(grid.values[-1], predicted.max())
        top.set(title=Path(name).stem, xlabel="true score", ylabel="prediction", ylim=limits)
        top.legend(frameon=False, fontsize=8)
        for token in grid.tokens:
            bins = [p for p in report["files"][name]["reliability"] if p["score"] == token and p["n"] >= 10]  # fewer: noise
            bottom.plot([p["predicted"] for p in bins], [p["observed"] for p in bins], ".-", label=token)
        bottom.plot([0, 1], [0, 1], "--", color="gray")
        bottom.set(xlabel="p(score), predicted", ylabel="share of records with that score", xlim=(0, 1), ylim=(0, 1))
        bottom.legend(frameon=False, fontsize=8, title="score")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_logs(logs: list[str], path: Path) -> None:
    """RMSE on held-out prompts while training: on the CoTs of the data, and on those the model writes itself."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(logs), figsize=(4.2 * len(logs), 3.4), squeeze=False, sharey=True, layout="constrained")
    for log, axis in zip(logs, axes[0], strict=True):
        if not Path(log).is_file():
            raise InputError(f"{log}: no such file; give the log.jsonl in a folder of a training stage")
        lines = [json.loads(line) for line in Path(log).read_text("utf-8").splitlines()]
        for key, style, label in (("held_out", "o-", "CoTs it was trained on"), ("own_cots", "s--", "its own CoTs")):
            points = [(line["step"], line[key]["rmse"]) for line in lines if line.get(key)]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(title=log, xlabel="step", ylabel="RMSE, held-out prompts", ylim=(0, None))
        axis.title.set_fontsize(8)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(files: dict[str, list[dict]], grids: dict[str, Grid], *, resamples: int, seed: int) -> dict:
    """All metrics of all files, on the records that have a score and are in every file; the first file is the reference.

    Raises InputError where there is no such record, or where the files do not agree on the true scores.
    """
    scored = {path: {row["id"]: row for row in rows if row.get("score") is not None} for path, rows in files.items()}
    first = next(iter(files))
    ids = [id for id in scored[first] if all(id in rows for rows in scored.values())]
    if not ids:
        raise InputError(f"{', '.join(files)}: no record with a score in common; nothing to evaluate")
    for path, rows in scored.items():
        if any(rows[id]["score"] != scored[first][id]["score"] for id in ids):
            raise InputError(f"{path}: its true scores differ from those of {first}; compare predictions of the same data")

    true = np.array([scored[first][id]["score"] for id in ids], dtype=float)
    columns = {(path, kind): np.array([scored[path][id][kind] for id in ids]) for path in files for kind in KINDS}
    samples = bootstrap(columns, true, resamples=resamples, seed=seed)
    report: dict = {"reference": first, "evaluated": len(ids), "resamples": resamples, "seed": seed, "files": {}}
    for path, rows in files.items():
        evaluated = [scored[path][id] for id in ids]
        finished = [f for row in evaluated for f in row["finished"]]
        entry = report["files"][path] = {
            "sha256": runs.sha256(path),
            "grid": str(grids[path]),
            "records": len(rows),
            "without_score": len(rows) - len(scored[path]),
            "not_in_all_files": len(scored[path]) - len(ids),
            "cots": len(finished),
            "unfinished_rate": finished.count(False) / len(finished),
            "off_grid_mean": float(np.mean([o for row in evaluated for o in row["off_grid"]])),
        }
        for kind in KINDS:
            entry[kind] = {metric: interval(s) for metric, s in samples[path, kind].items()}
        if path != first:
            entry["difference"] = {
                kind: {metric: interval(s - samples[first, kind][metric]) for metric, s in samples[path, kind].items()}
                for kind in KINDS
            }
        entry["reliability"] = reliability(evaluated, grids[path])
    return report


def show(report: dict) -> None:
    """The report as tables on the terminal."""

    def cell(entry: dict) -> str:
        return "undefined" if entry["value"] is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**entry)

    def table(entries: dict[str, dict]) -> None:
        rows = [[Path(path).stem, kind, *map(cell, entry[kind].values())] for path, entry in entries.items() for kind in KINDS]
        rows.insert(0, ["file", "score", *METRICS])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows.insert(1, ["-" * width for width in widths])
        for row in rows:
            print("| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |")
        print()

    files = report["files"]
    print(f"{report['evaluated']} records, 95 % bootstrap intervals\n")
    table(files)
    if len(files) > 1:
        print(f"Difference to {Path(report['reference']).stem} on the same records\n")
        table({path: entry["difference"] for path, entry in files.items() if "difference" in entry})
    for path, entry in files.items():
        missing = [f", {entry[key]} {key.replace('_', ' ')}" for key in ("without_score", "not_in_all_files") if entry[key]]
        print(f"{path}: {entry['unfinished_rate']:.1%} of {entry['cots']} CoTs unfinished, ", end="")
        print(f"mean off-grid mass {entry['off_grid_mean']:.4f}{''.join(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("predictions", nargs="*", default=["out/predictions.jsonl"], help="JSONL files of predict.py")
    parser.add_argument("--out", type=Path, default=Path("out/eval"), help="folder for metrics.json and figure.png")
    parser.add_argument("--grid", help="score grid; None: the one predict.py noted, else 1,2,3,4,5")
    parser.add_argument("--cots", type=runs.COUNT, help="use the first so many CoTs of each record; None: all")
    parser.add_argument("--renormalise", action="store_true", help="divide expected scores by the mass on the grid")
    parser.add_argument("--resamples", type=runs.COUNT, default=1000, help="bootstrap resamples of the records")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the bootstrap")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation at --out")
    parser.add_argument("--logs", nargs="+", help="draw the held-out RMSE in these log.jsonl of training stages, and no more")
    args = parser.parse_args()
    if args.logs:
        args.out.mkdir(parents=True, exist_ok=True)
        draw_logs(args.logs, args.out / "training.png")
        print(f"{args.out}/training.png")
        return
    runs.choose_out(args.out / "metrics.json", args.overwrite)
    if len(set(args.predictions)) < len(args.predictions):
        raise InputError("the same prediction file is given twice; give each once")

    grids = {path: grid_of(path, args.grid) for path in args.predictions}
    need = ("id", "prediction", "decoded", "score_probs", "off_grid", "finished")
    files = {path: records.read_records(path, grid=grids[path], need=need) for path in args.predictions}
    if args.cots or args.renormalise:
        files = {
            path: [again(row, grids[path], cots=args.cots, renormalise=args.renormalise) for row in rows]
            for path, rows in files.items()
        }
    report = compare(files, grids, resamples=args.resamples, seed=args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    draw(files, grids, report, args.out / "figure.png")
    runs.write_whole(args.out / "metrics.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    show(report)
    print(f"{args.out}/metrics.json, {args.out}/figure.png")


if __name__ == "__main__":
    runs.run(main)
