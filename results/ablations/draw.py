"""Redraw tables.md and figure.png from metrics.json, as bench/ablations.py wrote it.

python results/ablations/draw.py                                          # beside this file
python results/ablations/draw.py out/ablations/metrics.json               # beside that one
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tables import OOD, Cells, bar, table, whose_cots  # noqa: E402

LINES = [  # label, row, reading, the paper's mean r for Mistral-7B (arXiv 2503.04381, table 1 and ablations)
    ("untrained seed, decoded", "seed", "decoded", None),
    ("CE without CoT, decoded", "ce-no-cot", "decoded", 0.488),
    ("CE without CoT, RAIL", "ce-no-cot", "rail", None),
    ("RAFT without CoT", "raft", "rail", 0.623),
    ("RAFT without CoT, no CE", "raft-pure", "rail", None),
    ("CE with CoT, decoded", "ce", "decoded", 0.557),
    ("CE with CoT, CoT-RAIL", "ce", "rail", None),
    ("A.1: stage 1 only", "a1", "rail", 0.556),
    ("A.3: both stages CE, decoded", "a2", "decoded", 0.521),
    ("A.2: both stages CE, CoT-RAIL", "a2", "rail", 0.617),
    ("A.4: stage 2 from p_s", "a4", "rail", 0.515),
    ("TRACT", "tract", "rail", 0.650),
    ("TRACT, decoded", "tract", "decoded", None),
    ("TRACT, renormalised", "tract", "renormalised", None),
]
LOSSES = {  # row of bench/ablations.py → CE at the score, and penalty
    "tract": "TRACT: CE on the token, squared error",
    "ce": "CE on the token alone",
    "two-hot": "two-hot CE alone",
    "two-hot-tract": "two-hot CE, squared error",
    "rps": "CE on the token, RPS",
    "ntl": "CE on the token, NTL",
    "tract-0.3": "TRACT, λ = 0.3",
    "tract-3": "TRACT, λ = 3",
    "only-tract": "squared error, no CE on the score",
    "only-rps": "RPS, no CE on the score; renormalised",  # mass off the grid costs it nothing
}
TARGETS = {
    "rating": "ratings",
    "real": "real-valued",
    "rounded": "rounded",
    "few-rating": "ratings, 300 records",
    "few-real": "real-valued, 300 records",
}
GRIDS = ("15", "135", "12345")


def row_of(targets: str, grid: str, loss: str) -> str:
    """Return the row of bench/ablations.py; TRACT on ratings is one of the main rows."""
    row = f"{targets}-{grid}-{loss}"
    return "tract" if row == "rating-12345-tract" else row


def methods(report: dict, cells: Cells) -> str:
    """Return the two tables of the methods, the ideal judges among them."""
    n = len(report["seeds"])
    records = report["records"][cells.test]
    ideal = report["ideal"]
    predictions = []
    distributions = []
    for label, row, reading, paper in LINES:
        if not cells.find(row, reading):
            continue
        r = cells.mean(row, "pearson", reading)
        rmse = cells.mean(row, "rmse", reading)
        r_of_five = cells.mean(row, "pearson", f"{reading}@5")
        r_ood = cells.mean(row, "pearson", reading, OOD)
        r_to_tract = cells.difference(row, "pearson", reading)
        predictions.append([label, r, rmse, r_of_five, r_ood, r_to_tract, f"{paper:.3f}" if paper else ""])
        rmse_to_tract = cells.difference(row, "rmse", reading)
        to_tract_ood = [cells.difference(row, metric, reading, OOD) for metric in ("pearson", "rmse")]
        distributions.append([label, rmse_to_tract, *to_tract_ood, *cells.reliability(row, reading)])
    for name, values in ideal[cells.test].items():
        r = f"{values['pearson']:.3f}"
        rmse = f"{values['rmse']:.3f}"
        r_ood = f"{ideal[OOD][name]['pearson']:.3f}" if OOD in ideal else ""
        predictions.append([f"*ideal {name}*", r, rmse, "", r_ood, "", ""])
    seeds = "1 seed" if n == 1 else f"{n} seeds"
    text = f"## Methods\n\n{seeds}, {records} records; mean ± standard deviation over seeds; "
    text += "differences with 95 % intervals over seeds and records.\n\n"
    head = ["method, prediction", "r", "RMSE", "r, 5 CoTs", "r, out of domain", "Δr to TRACT", "paper, r"]
    text += table(head, predictions) + "\n"
    head = ["method, prediction", "ΔRMSE to TRACT", "Δr, out of domain", "ΔRMSE, out of domain"]
    return text + table([*head, "log score", "calibration error"], distributions)


def losses(cells: Cells) -> str:
    """Return the tables of losses: predictions, in and out of domain, and the score distribution."""
    predictions = {cells.test: [], OOD: []}
    distributions = []
    for targets, grid, loss in itertools.product(TARGETS, GRIDS, LOSSES):
        row = row_of(targets, grid, loss)
        if not cells.find(row):
            continue
        names = [TARGETS[targets], " ".join(grid), LOSSES[loss]]
        reading = "renormalised" if loss == "only-rps" else "rail"
        for test, rows in predictions.items():
            means = [cells.mean(row, metric, reading, test) for metric in ("pearson", "rmse")]
            to_tract = [cells.difference(row, metric, reading, test) for metric in ("pearson", "rmse")]
            rows.append([*names, *means, *to_tract])
        in_domain = [*cells.reliability(row, reading), cells.difference(row, "log_score", reading)]
        distributions.append([*names, *in_domain, *cells.reliability(row, reading, OOD)])
    text = ""
    first = ["targets", "grid", "loss of stage 2"]
    for test, rows in predictions.items():
        text += f"## Losses, {'out of' if test == OOD else 'in'} domain\n\n"
        text += table([*first, "r", "RMSE", "Δr to TRACT", "ΔRMSE to TRACT"], rows) + "\n"
    head = ["log score", "calibration error", "Δ log score to TRACT"]
    head += ["log score, out of domain", "calibration error, out of domain"]
    return text + "## Losses, the score distribution\n\n" + table([*first, *head], distributions)


def tables(report: dict) -> str:
    cells = Cells(report["cells"])
    parts = ["## Whose CoTs?\n\n" + whose_cots(cells), losses(cells)]
    if cells.test in report["records"]:  # there are other rows than those on real-valued scores
        parts.insert(0, methods(report, cells))
    return "\n".join(parts)


def draw(report: dict, path: Path) -> None:
    """Draw methods, whose CoTs, losses by grid, and their calibration side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = Cells(report["cells"])
    test = cells.test
    options = {"layout": "constrained", "gridspec_kw": {"width_ratios": [1.5, 0.7, 1, 0.9]}}
    figure, (left, middle, right, last) = plt.subplots(1, 4, figsize=(17, 4.6), **options)

    labels = []
    for label, row, reading, _ in LINES[::-1]:
        cell = cells.find(row, reading)
        if cell and row != "seed":
            bar(left, len(labels), cell["pearson"], "tab:orange" if row == "tract" else "tab:blue")
            labels.append(label)
    left.set_yticks(range(len(labels)), labels)
    ideal = report["ideal"].get(test, {})
    for name, style in zip(ideal, (":", "-.", "--"), strict=False):
        r = ideal[name]["pearson"]
        left.axvline(r, color="black", linestyle=style, linewidth=1, label=f"ideal {name}")
    left.legend(frameon=False, fontsize=8, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    left.set_xlabel("Pearson's r (bar: mean, dots: seeds)")

    for label, row, color in (("p_s", "a1", "tab:blue"), ("p_tract", "tract", "tab:orange")):
        annotated = cells.find(row, test="annotated")
        own = cells.find(row)
        if annotated and own:
            values = [cell["rmse"]["per_seed"] for cell in (annotated, own)]
            middle.plot([0, 1], values, ".-", color=color, alpha=0.6)
            middle.text(1.05, own["rmse"]["mean"], label, color=color)
    middle.set_xticks([0, 1], ["annotated CoTs", "own CoTs"])
    middle.set(xlim=(-0.2, 1.6), ylabel="RMSE", title="whose CoTs?")

    colors = {
        "ce": "tab:blue",
        "ntl": "tab:red",
        "rps": "tab:purple",
        "two-hot": "tab:green",
        "tract": "tab:orange",
    }
    for loss, (records, style) in itertools.product(colors, ((test, "o-"), (OOD, "o:"))):
        by_grid = [cells.find(row_of("real", grid, loss), test=records) for grid in GRIDS]
        if all(by_grid):
            label = LOSSES[loss] if records == test else None
            means = [cell["rmse"]["mean"] for cell in by_grid]
            right.plot(range(3), means, style, color=colors[loss], label=label, markersize=4)
    right.set_xticks(range(3), [" ".join(grid) for grid in GRIDS])
    right.set(xlabel="score grid", ylabel="RMSE", xlim=(-0.25, 2.25), ylim=(0, 2.3))
    right.set_title("real-valued targets (dotted: out of domain)", fontsize=10)
    if right.lines:
        right.legend(frameon=False, fontsize=8)

    names = {"ce": "CE (or two-hot)", "ntl": "NTL", "rps": "RPS", "tract": "TRACT"}
    for y, loss in enumerate(names):
        cell = cells.find(row_of("rating", "12345", loss))
        if cell:
            bar(last, y, cell["calibration_error"], colors[loss])
    last.set_yticks(range(len(names)), names.values())
    last.set_xlabel("calibration error")
    last.set_title("score distribution, on ratings", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("metrics", nargs="?", type=Path, default=HERE / "metrics.json")
    add("--out", type=Path, help="folder of tables.md and figure.png; that of the metrics if none")
    args = parser.parse_args()
    report = json.loads(args.metrics.read_text("utf-8"))
    out = args.out or args.metrics.parent
    text = tables(report)
    (out / "tables.md").write_text(text, "utf-8")
    draw(report, out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
