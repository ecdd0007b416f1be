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
from tables import table  # noqa: E402

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
SWEEPS = [  # what changes, row with two stages, row of its stage 1 alone
    ("λ = 0.1", "lambda-0.1", "lambda-0.1-a1"),
    ("λ = 0.3", "lambda-0.3", "lambda-0.3-a1"),
    ("λ = 1", "tract", "a1"),
    ("λ = 3", "lambda-3", "lambda-3-a1"),
    ("λ = 10", "lambda-10", "lambda-10-a1"),
    ("score token out of the CE", "mask-score", None),
    ("2 CoTs a training prompt, half the epochs", "cots-2", None),
    ("4 CoTs a training prompt, a quarter of the epochs", "cots-4", None),
    ("300 training records, TRACT", "few-tract", None),
    ("300 training records, both stages CE", "few-ce", None),
]
GRIDS = ("15", "135", "12345")
OOD = "test_ood"


class Cells:
    """Hold the cells of metrics.json by (row, test, reading); one that was not run leaves its place empty."""

    def __init__(self, cells: list[dict]):
        self.of = {(c["row"], c["test"], c["reading"]): c for c in cells}
        self.test = next(c["test"] for c in cells if c["test"] in ("test", "valid"))

    def mean(self, row: str | None, metric: str, reading: str = "rail", test: str | None = None) -> str:
        cell = self.of.get((row, test or self.test, reading))
        if cell is None:
            return ""
        spread = "" if cell[metric]["sd"] is None else f" ± {cell[metric]['sd']:.3f}"
        return f"{cell[metric]['mean']:.3f}{spread}"

    def difference(self, row: str, metric: str, reading: str = "rail", test: str | None = None) -> str:
        cell = self.of.get((row, test or self.test, reading), {}).get("difference")
        return "" if cell is None else interval(cell[metric])


def interval(entry: dict) -> str:
    return "" if entry["value"] is None else "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**entry)


def name_of(row: str, reading: str) -> str:
    few = {"few-tract": "300 records: TRACT", "few-ce": "both stages CE, CoT-RAIL"}
    return few.get(row) or next(label for label, r, how, _ in LINES if (r, how) == (row, reading))


def methods(report: dict, cells: Cells) -> str:
    """Return the two tables of the methods, the ideal judges among them."""
    n, records, ideal = len(report["seeds"]), report["records"][cells.test], report["ideal"]
    main, more = [], []
    for label, row, reading, paper in LINES:
        if (row, cells.test, reading) not in cells.of:
            continue
        r, rmse, rho = (cells.mean(row, metric, reading) for metric in ("pearson", "rmse", "spearman"))
        many, ood = cells.mean(row, "pearson", f"{reading}@5"), cells.mean(row, "pearson", reading, OOD)
        to_tract = cells.difference(row, "pearson", reading)
        main.append([label, r, rmse, many, ood, to_tract, f"{paper:.3f}" if paper else ""])
        both = (cells.difference(row, metric, reading, OOD) for metric in ("pearson", "rmse"))
        more.append([label, rho, cells.difference(row, "rmse", reading), *both])
    for name, values in ideal[cells.test].items():
        ood = f"{ideal[OOD][name]['pearson']:.3f}" if OOD in ideal else ""
        main.append([f"*ideal {name}*", f"{values['pearson']:.3f}", f"{values['rmse']:.3f}", "", ood, "", ""])
    text = f"## Methods\n\n{n} seed{'s' * (n > 1)}, {records} records; mean ± standard deviation over seeds; "
    text += "differences with 95 % intervals over seeds and records.\n\n"
    head = ["method, prediction", "r", "RMSE", "r, 5 CoTs", "r, out of domain", "Δr to TRACT", "paper, r"]
    text += table(head, main) + "\n"
    head = ["method, prediction", "ρ", "ΔRMSE to TRACT", "Δr, out of domain", "ΔRMSE, out of domain"]
    return text + table(head, more)


def claims(report: dict) -> str:
    """Return the table of what is said to be better than what."""
    rows = []
    for claim in report["claims"]:
        names = " > ".join(name_of(*side) for side in (claim["better"], claim["than"]))
        where = "out of domain" if claim["test"] == OOD else "in domain"
        rows.append([names, where, *(interval(claim["difference"][m]) for m in ("pearson", "rmse"))])
    text = "## Claims\n\nFirst minus second, with 95 % intervals over seeds and records.\n\n"
    return text + table(["is it better?", "where", "Δr", "ΔRMSE"], rows)


def whose_cots(report: dict, cells: Cells) -> str:
    """Return the RMSE of p_s and p_tract on whose CoTs, and how much of a prediction is the CoT's."""
    rows = []
    for name, row, of_p_s, paper in (
        ("p_s", "a1", cells.test, ".12 → .63"),
        ("p_tract", "tract", "p_s", ".45 → .45"),
    ):
        on = [cells.mean(row, "rmse", test=test) for test in ("annotated", of_p_s, cells.test)]
        rows.append([name, *on, paper])
    head = ["RMSE of", "on annotated CoTs", "on the CoTs of p_s", "on its own CoTs"]
    text = "## Whose CoTs?\n\n" + table([*head, "paper, training → own CoTs"], rows) + "\n"
    rows = []
    for row, of in report["variance"].items():
        within, between = (sum(of[part]) / len(of[part]) for part in ("within", "between"))
        rows.append([row, f"{within:.3f}", f"{between:.3f}", f"{within / (within + between):.0%}"])
    head = ["variance of the prediction", "between CoTs of one record", "between records", "share of the CoT"]
    return text + table(head, rows)


def sweeps(cells: Cells) -> str:
    """Return the table of the rows in which one setting differs."""
    rows = []
    for label, row, first in SWEEPS:
        if (row, cells.test, "rail") in cells.of:
            own = [cells.mean(row, "pearson"), cells.mean(row, "rmse"), cells.mean(row, "pearson", test=OOD)]
            alone = [cells.mean(first, "pearson"), cells.mean(first, "rmse")]
            rows.append([label, *own, cells.difference(row, "pearson"), *alone])
    head = ["what changes", "r", "RMSE", "r, out of domain", "Δr", "stage 1 alone, r", "stage 1 alone, RMSE"]
    text = "## One setting at a time\n\nΔr is to TRACT; with 300 records, of CE to TRACT.\n\n"
    return text + table(head, rows)


def scale(cells: Cells) -> str:
    """Return the table of score grids that are coarser than the targets."""
    rows = []
    for grid, targets, where in itertools.product(GRIDS, ("real", "rounded"), ("in", "out of")):
        ce, tract = f"{targets}-{grid}-ce", f"{targets}-{grid}-tract"
        test = cells.test if where == "in" else OOD
        if (ce, test, "rail") in cells.of and (tract, test, "rail") in cells.of:
            means = [cells.mean(row, m, test=test) for m in ("pearson", "rmse") for row in (tract, ce)]
            of_ce = [cells.difference(ce, m, test=test) for m in ("pearson", "rmse")]
            rows.append([" ".join(grid), targets, where, *means, *of_ce])
    head = ["grid", "training targets", "domain", "TRACT, r", "CE, r", "TRACT, RMSE", "CE, RMSE"]
    text = "## Grids coarser than the targets\n\nStage 2 with either loss on the same CoTs, those of p_s; "
    text += "CoT-RAIL; all tested on real-valued targets.\n\n"
    return text + table([*head, "Δr of CE", "ΔRMSE of CE"], rows)


def tables(report: dict) -> str:
    cells = Cells(report["cells"])
    parts = [methods(report, cells), claims(report), whose_cots(report, cells), sweeps(cells), scale(cells)]
    return "\n".join(parts)


def draw(report: dict, path: Path) -> None:
    """Draw methods, whose CoTs, and grids side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = Cells(report["cells"])
    test = cells.test
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(15, 4.6), layout="constrained", gridspec_kw={"width_ratios": [1.5, 0.8, 1]}
    )

    lines = [line for line in LINES if line[1] != "seed" and (line[1], test, line[2]) in cells.of][::-1]
    for y, (_, row, reading, _) in enumerate(lines):
        cell = cells.of[row, test, reading]["pearson"]
        left.barh(y, cell["mean"], color="tab:orange" if row == "tract" else "tab:blue", alpha=0.35)
        left.plot(cell["per_seed"], [y] * len(cell["per_seed"]), ".", color="black", markersize=4)
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
    middle.set(xlim=(-0.2, 1.4), ylabel="RMSE", title="whose CoTs?")

    for loss, color in (("ce", "tab:blue"), ("tract", "tab:orange")):
        for targets, style in (("real", "o-"), ("rounded", "s--")):
            found = [cells.of.get((f"{targets}-{grid}-{loss}", test, "rail")) for grid in GRIDS]
            if all(found):
                name = f"{'TRACT' if loss == 'tract' else 'CE'}, {targets} targets"
                right.plot(range(3), [c["rmse"]["mean"] for c in found], style, color=color, label=name)
    right.set_xticks(range(3), [" ".join(grid) for grid in GRIDS])
    right.set(xlabel="score grid", ylabel="RMSE on real-valued targets", ylim=(0, None))
    right.set_title("grids coarser than the targets")
    if right.lines:
        right.legend(frameon=False, fontsize=8)
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
