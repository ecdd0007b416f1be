"""Redraw tables.md and figure.png from metrics.json, as bench/ablations.py wrote it.

python results/ablations/draw.py                                          # beside this file
python results/ablations/draw.py out/ablations/metrics.json --out out/ablations
"""

import argparse
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
    *((f"λ = {v}", "tract" if v == 1 else f"lambda-{v}", "a1" if v == 1 else f"lambda-{v}-a1") for v in (0.1, 0.3, 1, 3, 10)),
    ("score token out of the CE", "mask-score", None),
    ("2 CoTs a training prompt, half the epochs", "cots-2", None),
    ("4 CoTs a training prompt, a quarter of the epochs", "cots-4", None),
    ("300 training records, TRACT", "few-tract", None),
    ("300 training records, both stages CE", "few-ce", None),
]


class Cells:
    """The cells of metrics.json; a cell that was not run is left empty."""

    def __init__(self, cells: list[dict]):
        self.of = {(c["row"], c["test"], c["reading"]): c for c in cells}
        self.test = next(c["test"] for c in cells if c["test"] in ("test", "valid"))

    def mean(self, row: str | None, metric: str, *, reading: str = "rail", test: str | None = None) -> str:
        cell = self.of.get((row, test or self.test, reading))
        if cell is None:
            return ""
        spread = "" if cell[metric]["sd"] is None else f" ± {cell[metric]['sd']:.3f}"
        return f"{cell[metric]['mean']:.3f}{spread}"

    def difference(self, row: str, metric: str, *, reading: str = "rail", test: str | None = None) -> str:
        cell = self.of.get((row, test or self.test, reading), {}).get("difference")
        return "" if cell is None else interval(cell[metric])


def interval(entry: dict) -> str:
    return "" if entry["value"] is None else "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**entry)


def name_of(row: str, reading: str) -> str:
    few = {"few-tract": "300 records: TRACT", "few-ce": "both stages CE, CoT-RAIL"}
    return few.get(row) or next(label for label, r, how, _ in LINES if (r, how) == (row, reading))


def tables(report: dict) -> str:
    cells, ideal, ideal_ood = Cells(report["cells"]), report["ideal"], report["ideal"].get("test_ood")
    test, n = cells.test, len(report["seeds"])
    about = f"{n} seed{'s' * (n > 1)}, {report['records'][test]} records; mean ± standard deviation over seeds"

    main, more = [], []
    for label, row, reading, paper in LINES:
        if (row, test, reading) not in cells.of:
            continue
        main.append([
            label, cells.mean(row, "pearson", reading=reading), cells.mean(row, "rmse", reading=reading),
            cells.mean(row, "pearson", reading=f"{reading}@5"),
            cells.mean(row, "pearson", reading=reading, test="test_ood"), cells.difference(row, "pearson", reading=reading),
            f"{paper:.3f}" if paper else "",
        ])  # fmt: skip
        more.append([
            label, cells.mean(row, "spearman", reading=reading), cells.difference(row, "rmse", reading=reading),
            *(cells.difference(row, metric, reading=reading, test="test_ood") for metric in ("pearson", "rmse")),
        ])  # fmt: skip
    for name, values in ideal[test].items():
        out_of_domain = f"{ideal_ood[name]['pearson']:.3f}" if ideal_ood else ""
        main.append([f"*ideal {name}*", f"{values['pearson']:.3f}", f"{values['rmse']:.3f}", "", out_of_domain, "", ""])
    header = ["method, prediction", "r", "RMSE", "r, 5 CoTs", "r, out of domain", "Δr to TRACT", "paper, r"]
    text = f"## Methods\n\n{about}; differences with 95 % intervals over seeds and records.\n\n" + table(header, main)
    header = ["method, prediction", "ρ", "ΔRMSE to TRACT", "Δr, out of domain", "ΔRMSE, out of domain"]
    text += "\n" + table(header, more)

    rows = []
    for claim in report["claims"]:
        names = [name_of(*side) for side in (claim["better"], claim["than"])]
        where = "out of domain" if claim["test"] == "test_ood" else "in domain"
        rows.append([" > ".join(names), where, *(interval(claim["difference"][m]) for m in ("pearson", "rmse"))])
    header = ["is it better?", "where", "Δr", "ΔRMSE"]
    text += "\n## Claims\n\nFirst minus second, with 95 % intervals over seeds and records.\n\n" + table(header, rows)

    rows = [["p_s", *(cells.mean("a1", "rmse", test=t) for t in ("annotated", test)), cells.mean("a1", "rmse"), ".12 → .63"]]
    on = [cells.mean("tract", "rmse", test=t) for t in ("annotated", "p_s")]
    rows.append(["p_tract", *on, cells.mean("tract", "rmse"), ".45 → .45"])
    header = ["RMSE of", "on annotated CoTs", "on the CoTs of p_s", "on its own CoTs", "paper, training → own CoTs"]
    text += "\n## Whose CoTs?\n\n" + table(header, rows) + "\n"
    rows = []
    for row, of in report["variance"].items():
        within, between = (sum(of[part]) / len(of[part]) for part in ("within", "between"))
        rows.append([row, f"{within:.3f}", f"{between:.3f}", f"{within / (within + between):.0%}"])
    header = ["variance of the prediction", "between CoTs of one record", "between records", "share of the CoT"]
    text += table(header, rows)

    rows = []
    for label, row, first in SWEEPS:
        if (row, test, "rail") not in cells.of:
            continue
        rows.append([
            label, cells.mean(row, "pearson"), cells.mean(row, "rmse"), cells.mean(row, "pearson", test="test_ood"),
            cells.difference(row, "pearson"), cells.mean(first, "pearson"), cells.mean(first, "rmse"),
        ])  # fmt: skip
    header = ["what changes", "r", "RMSE", "r, out of domain", "Δr", "stage 1 alone, r", "stage 1 alone, RMSE"]
    text += "\n## One setting at a time\n\nΔr is to TRACT; with 300 records, of CE to TRACT.\n\n" + table(header, rows)

    rows = []
    for grid in ("15", "135", "12345"):
        for targets in ("real", "rounded"):
            for test_on, where in ((test, "in"), ("test_ood", "out of")):
                ce, tract = f"{targets}-{grid}-ce", f"{targets}-{grid}-tract"
                if (ce, test_on, "rail") not in cells.of or (tract, test_on, "rail") not in cells.of:
                    continue
                rows.append([
                    " ".join(grid), targets, where,
                    *(cells.mean(row, metric, test=test_on) for metric in ("pearson", "rmse") for row in (tract, ce)),
                    cells.difference(ce, "pearson", test=test_on), cells.difference(ce, "rmse", test=test_on),
                ])  # fmt: skip
    header = ["grid", "training targets", "domain", "TRACT, r", "CE, r", "TRACT, RMSE", "CE, RMSE", "Δr of CE", "ΔRMSE of CE"]
    text += "\n## Grids coarser than the targets\n\nStage 2 with either loss on the same CoTs, those of p_s; CoT-RAIL; "
    text += "all tested on real-valued targets.\n\n" + table(header, rows)
    return text


def draw(report: dict, path: Path) -> None:
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
            middle.plot([x for x, _ in points], [c["rmse"]["per_seed"] for _, c in points], ".-", color=color, alpha=0.6)
            middle.text(1.05, points[1][1]["rmse"]["mean"], label, color=color)
    middle.set_xticks([0, 1], ["annotated CoTs", "own CoTs"])
    middle.set(xlim=(-0.2, 1.4), ylabel="RMSE", title="whose CoTs?")

    grids = ["15", "135", "12345"]
    for loss, color in (("ce", "tab:blue"), ("tract", "tab:orange")):
        for targets, style in (("real", "o-"), ("rounded", "s--")):
            found = [cells.of.get((f"{targets}-{grid}-{loss}", test, "rail")) for grid in grids]
            if all(found):
                name = f"{'TRACT' if loss == 'tract' else 'CE'}, {targets} targets"
                right.plot(range(3), [c["rmse"]["mean"] for c in found], style, color=color, label=name)
    right.set_xticks(range(3), [" ".join(grid) for grid in grids])
    right.set(xlabel="score grid", ylabel="RMSE on real-valued targets", title="grids coarser than the targets", ylim=(0, None))
    if right.lines:
        right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", nargs="?", type=Path, default=HERE / "metrics.json")
    parser.add_argument("--out", type=Path, help="folder for tables.md and figure.png (default: that of the metrics)")
    args = parser.parse_args()
    report, out = json.loads(args.metrics.read_text("utf-8")), args.out or args.metrics.parent
    text = tables(report)
    (out / "tables.md").write_text(text, "utf-8")
    draw(report, out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
