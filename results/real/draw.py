"""Redraw tables.md and figure.png from the metrics.json of each task, as bench/real.py wrote them.

python results/real/draw.py                                            # from the *.json beside this file
python results/real/draw.py out/real/ists/metrics.json --out out/real  # of one run
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tables import Cells, bar, table, whose_cots  # noqa: E402

TASKS = {"ists": "Interpretable STS", "feedbackqa": "FeedbackQA"}
SHOWN = ("pearson", "rmse")
LINES = [  # label, row, reading
    ("untrained model, RAIL", "seed-no-cot", "rail"),
    ("untrained model, CoT-RAIL", "seed", "rail"),
    ("CE without CoT, decoded", "ce-no-cot", "decoded"),
    ("CE without CoT, RAIL", "ce-no-cot", "rail"),
    ("RAFT without CoT", "raft", "rail"),
    ("CE with CoT, decoded", "ce", "decoded"),
    ("A.1: stage 1 only", "a1", "rail"),
    ("A.3: both stages CE, decoded", "a2", "decoded"),
    ("A.2: both stages CE, CoT-RAIL", "a2", "rail"),
    ("TRACT", "tract", "rail"),
    ("TRACT, decoded", "tract", "decoded"),
    ("two-hot CE in stage 2", "two-hot", "rail"),
    ("RPS in stage 2", "rps", "rail"),
]


def overview(reports: dict[str, dict]) -> str:
    """Return one table of all tasks: baselines and methods, each with r and RMSE."""
    head = ["method, prediction"]
    baselines = {}  # label → task → r, RMSE
    methods = {label: {} for label, _, _ in LINES}
    for task, report in reports.items():
        cells = Cells(report["cells"])
        head += [f"{TASKS[task]}: r", "RMSE"]
        for name, values in report["baselines"].items():
            baselines.setdefault(f"*{name}*", {})[task] = [f"{values[metric]:.3f}" for metric in SHOWN]
        for label, row, reading in LINES:
            methods[label][task] = [cells.mean(row, metric, reading) for metric in SHOWN]
    rows = []
    for label, numbers in (baselines | methods).items():
        row = [number for task in reports for number in numbers.get(task, ["", ""])]
        if any(row):
            rows.append([label, *row])
    return table(head, rows)


def tables(report: dict) -> str:
    """Return the tables of one task: every method, and whose CoTs."""
    cells = Cells(report["cells"])
    rows = []
    for label, row, reading in LINES:
        cell = cells.find(row, reading)
        if not cell:
            continue
        interval = "[{low:.3f}, {high:.3f}]".format(**cell["pearson"])
        r = f"{cells.mean(row, 'pearson', reading)} {interval}"
        rmse = cells.mean(row, "rmse", reading)
        five_cots = [cells.mean(row, metric, f"{reading}@5") for metric in SHOWN]
        to_tract = [cells.difference(row, metric, reading) for metric in SHOWN]
        tied = f"{100 * cell['tied']:.1f} %" if reading == "decoded" else ""
        rows.append([label, len(cell["seeds"]), tied, r, rmse, *five_cots, *to_tract])
    for name, values in report["baselines"].items():
        r, rmse = (f"{values[metric]:.3f}" for metric in SHOWN)
        rows.append([f"*{name}*", "", "", r, rmse, "", "", "", ""])
    text = f"{report['records'][cells.test]} records; mean ± standard deviation of the seeds; 95 % intervals "
    text += "over seeds and records; tied: records where several scores are equally likely.\n\n"
    head = ["method, prediction", "seeds", "tied", "r", "RMSE", "r, 5 CoTs", "RMSE, 5 CoTs"]
    head += ["Δr to TRACT", "ΔRMSE to TRACT"]
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    head, *rows = ([row[i] for i in filled] for row in (head, *rows))
    return text + table(head, rows) + "\n" + whose_cots(cells)


def draw(reports: dict[str, dict], path: Path) -> None:
    """Draw, for each task, the methods and whose CoTs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (9, 3.8 * len(reports))
    options = {"layout": "constrained", "gridspec_kw": {"width_ratios": [1.7, 1]}}
    figure, axes = plt.subplots(len(reports), 2, figsize=size, squeeze=False, **options)
    for task, (left, right) in zip(reports, axes, strict=True):
        report = reports[task]
        cells = Cells(report["cells"])
        labels = []
        for label, row, reading in LINES[::-1]:
            cell = cells.find(row, reading)
            if cell:
                y = len(labels)
                r = cell["pearson"]
                bar(left, y, r, "tab:orange" if row == "tract" else "tab:blue")
                left.plot([r["low"], r["high"]], [y, y], color="black", linewidth=0.8)
                labels.append(label)
        left.set_yticks(range(len(labels)), labels)
        for name, style in (("ridge", ":"), ("one rater against the others", "--")):
            if name in report["baselines"]:
                baseline = report["baselines"][name]["pearson"]
                left.axvline(baseline, color="black", linestyle=style, linewidth=1, label=name)
        left.legend(frameon=False, fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        left.set_xlabel(f"{TASKS[task]}: Pearson's r (bar: mean, dots: seeds, line: 95 % interval)")
        for label, row, color in (("p_s", "a1", "tab:blue"), ("p_tract", "tract", "tab:orange")):
            annotated = cells.find(row, test="annotated")
            own = cells.find(row)
            if annotated and own:
                own_by_seed = dict(zip(own["seeds"], own["rmse"]["per_seed"], strict=True))
                for seed, rmse in zip(annotated["seeds"], annotated["rmse"]["per_seed"], strict=True):
                    if seed in own_by_seed:
                        right.plot([0, 1], [rmse, own_by_seed[seed]], ".-", color=color, alpha=0.6)
                right.text(1.05, own["rmse"]["mean"], label, color=color)
        right.set_xticks([0, 1], ["annotated CoTs", "own CoTs"])
        right.set(xlim=(-0.2, 1.6), ylabel="RMSE", title="whose CoTs?")
    figure.savefig(path, dpi=110)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    paths = [HERE / f"{task}.json" for task in TASKS]
    committed = [path for path in paths if path.is_file()]
    parser.add_argument("metrics", nargs="*", type=Path, default=committed)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of tables.md and figure.png")
    args = parser.parse_args()
    given = [json.loads(path.read_text("utf-8")) for path in args.metrics]
    reports = {task: report for task in TASKS for report in given if report["task"] == task}
    parts = [f"## {TASKS[task]}\n\n{tables(report)}" for task, report in reports.items()]
    text = "\n".join([overview(reports), *parts])
    (args.out / "tables.md").write_text(text, "utf-8")
    draw(reports, args.out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
