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
    n, records, ideal = len(report["seeds"]), report["records"][cells.test], report["ideal"]
    main, more = [], []
    for label, row, reading, paper in LINES:
        if (row, cells.test, reading) not in cells.of:
            continue
        r, rmse = (cells.mean(row, metric, reading) for metric in ("pearson", "rmse"))
        many, ood = cells.mean(row, "pearson", f"{reading}@5"), cells.mean(row, "pearson", reading, OOD)
        to_tract = cells.difference(row, "pearson", reading)
        main.append([label, r, rmse, many, ood, to_tract, f"{paper:.3f}" if paper else ""])
        both = (cells.difference(row, metric, reading, OOD) for metric in ("pearson", "rmse"))
        more.append([label, cells.difference(row, "rmse", reading), *both, *cells.reliability(row, reading)])
    for name, values in ideal[cells.test].items():
        ood = f"{ideal[OOD][name]['pearson']:.3f}" if OOD in ideal else ""
        main.append([f"*ideal {name}*", f"{values['pearson']:.3f}", f"{values['rmse']:.3f}", "", ood, "", ""])
    text = f"## Methods\n\n{n} seed{'s' * (n > 1)}, {records} records; mean ± standard deviation over seeds; "
    text += "differences with 95 % intervals over seeds and records.\n\n"
    head = ["method, prediction", "r", "RMSE", "r, 5 CoTs", "r, out of domain", "Δr to TRACT", "paper, r"]
    text += table(head, main) + "\n"
    head = ["method, prediction", "ΔRMSE to TRACT", "Δr, out of domain", "ΔRMSE, out of domain"]
    return text + table([*head, "log score", "calibration error"], more)


def losses(cells: Cells) -> str:
    """Return the tables of losses: predictions, in and out of domain, and the score distribution."""
    found, spread = {cells.test: [], OOD: []}, []
    for targets, grid, loss in itertools.product(TARGETS, GRIDS, LOSSES):
        row = row_of(targets, grid, loss)
        if (row, cells.test, "rail") not in cells.of:
            continue
        names = [TARGETS[targets], " ".join(grid), LOSSES[loss]]
        how = "renormalised" if loss == "only-rps" else "rail"
        for test, rows in found.items():
            means = [cells.mean(row, m, how, test) for m in ("pearson", "rmse")]
            apart = [cells.difference(row, m, how, test) for m in ("pearson", "rmse")]
            rows.append([*names, *means, *apart])
        to_tract = cells.difference(row, "log_score", how)
        of_each = [*cells.reliability(row, how), to_tract, *cells.reliability(row, how, OOD)]
        spread.append([*names, *of_each])
    text, first = "", ["targets", "grid", "loss of stage 2"]
    for test, rows in found.items():
        text += f"## Losses, {'out of' if test == OOD else 'in'} domain\n\n"
        text += table([*first, "r", "RMSE", "Δr to TRACT", "ΔRMSE to TRACT"], rows) + "\n"
    head = ["log score", "calibration error", "Δ log score to TRACT"]
    head += ["log score, out of domain", "calibration error, out of domain"]
    return text + "## Losses, the score distribution\n\n" + table([*first, *head], spread)


def tables(report: dict) -> str:
    cells = Cells(report["cells"])
    return "\n".join([methods(report, cells), "## Whose CoTs?\n\n" + whose_cots(cells), losses(cells)])


def draw(report: dict, path: Path) -> None:
    """Draw methods, whose CoTs, losses by grid, and their calibration side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = Cells(report["cells"])
    test = cells.test
    options = {"layout": "constrained", "gridspec_kw": {"width_ratios": [1.5, 0.7, 1, 0.9]}}
    figure, (left, middle, right, last) = plt.subplots(1, 4, figsize=(17, 4.6), **options)

    lines = [line for line in LINES if line[1] != "seed" and (line[1], test, line[2]) in cells.of][::-1]
    for y, (_, row, reading, _) in enumerate(lines):
        color = "tab:orange" if row == "tract" else "tab:blue"
        bar(left, y, cells.of[row, test, reading]["pearson"], color)
    left.set_yticks(range(len(lines)), [line[0] for line in lines])
    for (name, values), style in zip(report["ideal"][test].items(), (":", "-.", "--"), strict=True):
        left.axvline(values["pearson"], color="black", linestyle=style, linewidth=1, label=f"ideal {name}")
    left.legend(frameon=False, fontsize=8, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    left.set_xlabel("Pearson's r (bar: mean, dots: seeds)")

    for label, row, color in (("p_s", "a1", "tab:blue"), ("p_tract", "tract", "tab:orange")):
        points = [(x, cells.of.get((row, t, "rail"))) for x, t in enumerate(("annotated", test))]
        if all(cell for _, cell in points):
            values = [cell["rmse"]["per_seed"] for _, cell in points]
            middle.plot([x for x, _ in points], values, ".-", color=color, alpha=0.6)
            middle.text(1.05, points[1][1]["rmse"]["mean"], label, color=color)
    middle.set_xticks([0, 1], ["annotated CoTs", "own CoTs"])
    middle.set(xlim=(-0.2, 1.6), ylabel="RMSE", title="whose CoTs?")

    colors = {
        "ce": "tab:blue",
        "ntl": "tab:red",
        "rps": "tab:purple",
        "two-hot": "tab:green",
        "tract": "tab:orange",
    }
    for (loss, color), (where, style) in itertools.product(colors.items(), ((test, "o-"), (OOD, "o:"))):
        found = [cells.of.get((row_of("real", grid, loss), where, "rail")) for grid in GRIDS]
        if all(found):
            label = LOSSES[loss] if where == test else None
            means = [c["rmse"]["mean"] for c in found]
            right.plot(range(3), means, style, color=color, label=label, markersize=4)
    right.set_xticks(range(3), [" ".join(grid) for grid in GRIDS])
    right.set(xlabel="score grid", ylabel="RMSE", xlim=(-0.25, 2.25), ylim=(0, 2.3))
    right.set_title("real-valued targets (dotted: out of domain)", fontsize=10)
    if right.lines:
        right.legend(frameon=False, fontsize=8)

    names = {"ce": "CE (or two-hot)", "ntl": "NTL", "rps": "RPS", "tract": "TRACT"}
    for y, loss in enumerate(names):
        if cell := cells.of.get((row_of("rating", "12345", loss), test, "rail")):
            bar(last, y, cell["calibration_error"], colors[loss])
    last.set_yticks(range(len(names)), names.values())
    last.set_xlabel("calibration error")
    last.set_title("score distribution, on ratings", fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="?", type=Path, default=HERE / "metrics.json")
    parser.add_argument(
        "--out", type=Path, help="folder of tables.md and figure.png; that of the metrics if none"
    )
    args = parser.parse_args()
    report, out = json.loads(args.metrics.read_text("utf-8")), args.out or args.metrics.parent
    text = tables(report)
    (out / "tables.md").write_text(text, "utf-8")
    draw(report, out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
