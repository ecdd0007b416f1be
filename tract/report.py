"""What eval.py leaves behind: lines and tables, a figure, files."""

import io
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np

from tract import intervals, runs
from tract.scores import Predictions, off_grid_line

FEW_GROUPS = 20  # below which percentile intervals of a bootstrap over groups cover too little


def describe(report: dict, common: dict[str, Predictions]) -> str:
    """Return what eval.py prints: lines on each file, then tables; of more than two, only predictions."""
    files = report["files"]
    text = f"{report['evaluated']} records, 95 % bootstrap intervals"
    if "group" in report:
        text += f" over {report['groups']} groups of like '{report['group']}'"
        if report["groups"] < FEW_GROUPS:
            text += ": so few say little about other groups, intervals are too narrow"
    text += "\n\n"
    for number, (path, entry) in enumerate(files.items(), 1):
        left_out = f"{entry['without_score']} without score, {entry['not_in_all_files']} not in all files"
        left_out += f", {entry['without_prediction']} without prediction"
        text += f"{number}: {path}: {entry['records']} records, {left_out}\n"
        if entry["too_long"]:
            text += f"   {entry['too_long']} more were too long to be judged\n"
        unfinished = f"{entry['unfinished_rate']:.1%} of {entry['cots']} CoTs unfinished"
        tied = f"likeliest score tied in {entry['tied_likeliest']} records"
        file = common[path]
        text += f"   {unfinished}, {tied}, {off_grid_line(file.rows, file.grid)}\n"
        text += f"   {intervals.line(entry['intervals'])}\n"
    text += "\n"
    one_rater = report["one_rater"]
    if one_rater:
        lines = [["one rater", one_rater["pearson"], one_rater["rmse"]]]
        for number, entry in enumerate(files.values(), 1):
            judge = entry["against_others"]
            if judge:
                lines.append([str(number), judge["pearson"], judge["rmse"]])
        head = f"{one_rater['ratings']} ratings, against the mean of the others"
        text += table([head, "r", "RMSE"], lines)
    kinds = ["prediction", "decoded"] if len(files) <= 2 else ["prediction"]
    metrics = {}
    differences = {}
    for number, entry in enumerate(files.values(), 1):
        for kind in kinds:
            metrics[f"{number} {kind}"] = entry[kind]
            if number > 1:
                differences[f"{number} {kind}"] = entry["difference"][kind]
    text += table_of_metrics(metrics)
    if differences:
        best = min(files, key=lambda path: files[path]["prediction"]["rmse"]["value"])
        text += "Difference to 1 on the same records\n\n"
        text += f"{table_of_metrics(differences)}lowest RMSE: {best}\n"
    return text


def table(head: list[str], rows: list[list]) -> str:
    """Return a Markdown table and an empty line; a cell is a text, a number, an interval or None."""
    cells = [[cell_text(value) for value in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    widths = [max(len(text) for text in column) for column in zip(*lines, strict=True)]
    text = ""
    for line in lines:
        text += f"| {' | '.join(map(str.ljust, line, widths))} |\n"
    return text + "\n"


def table_of_metrics(columns: dict[str, dict]) -> str:
    """Return a table, a column an entry and a row a metric; where a column has none, its cell is empty."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name) for column in columns.values())] for name in names]
    return table(["", *columns], rows)


def cell_text(value: dict | float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if not isinstance(value, dict):
        return "" if value is None else str(value)
    return "undefined" if value["value"] is None else "{value:.3f} [{low:.3f}, {high:.3f}]".format(**value)


def draw(common: dict[str, Predictions], report: dict) -> bytes:
    """Return a PNG, a column a file: predicted against true score, and how reliable the distributions are."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a $ in the name of a file or a score is no formula
    figure = Figure(figsize=(4 * len(common), 7.4), layout="tight")
    axes = figure.subplots(2, len(common), squeeze=False)
    for column, (path, (rows, grid)) in enumerate(common.items()):
        top = axes[0, column]
        bottom = axes[1, column]
        true = np.array([row["score"] for row in rows], dtype=float)
        values = np.array([row["prediction"] for row in rows], dtype=float)
        jitter = np.random.default_rng(0).uniform(-0.02, 0.02, len(true)) * np.ptp(grid.values)
        top.plot(true + jitter, values, ".", alpha=0.25, markeredgewidth=0)
        levels = np.unique(true)
        if len(levels) <= 20:
            means = [values[true == level].mean() for level in levels]
            top.plot(levels, means, "o-", color="black", label="mean prediction")
        top.plot(grid.values, grid.values, "--", color="gray", label="prediction = true score")
        top.set(xlabel="true score", ylabel="prediction")
        top.set_title(path[-50:], fontsize=8)  # a column has no room for more
        for token in grid.tokens:
            points = [p for p in report["files"][path]["reliability"] if p["score"] == token and p["n"] >= 10]
            observed = [p["observed"] for p in points]
            bottom.plot([p["predicted"] for p in points], observed, ".-", label=f"score {token}")
        bottom.plot([0, 1], [0, 1], "--", color="gray")
        bottom.set(xlabel="p(score), predicted", ylabel="share of records with that score")
    for axis in axes.flat:
        axis.legend(frameon=False, fontsize=8)
    png = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters that the font has not: they become boxes
        figure.savefig(png, dpi=110)
    return png.getvalue()


def write(out: Path, report: dict, figure: bytes | None = None, page: str = "") -> None:
    """Write metrics.json and, with a figure, figure.png and report.html to a new folder, all or none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside --out, under a name of its own: what a killed run or another one leaves is in nobody's way
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.part-", dir=out.parent) as part:
        whole = Path(part) / "eval"
        whole.mkdir()
        runs.write_whole(whole / "metrics.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        if figure is not None:
            runs.write_whole(whole / "figure.png", lambda out: out.write(figure))
            runs.write_whole(whole / "report.html", page)
        runs.check_out(out)  # again, for another eval.py may have made it
        whole.rename(out)
