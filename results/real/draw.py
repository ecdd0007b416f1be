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
    head, lines = ["method, prediction"], {}  # lines: label → what each task has
    for i, (task, report) in enumerate(reports.items()):
        cells, of_task = Cells(report["cells"]), {}
        head += [f"{TASKS[task]}: r", "RMSE"]
        for name, values in report["baselines"].items():
            of_task[f"*{name}*"] = [f"{values[metric]:.3f}" for metric in SHOWN]
        for label, row, reading in LINES:
            of_task[label] = [cells.mean(row, metric, reading) for metric in SHOWN]
        for label, numbers in of_task.items():
            lines.setdefault(label, [""] * 2 * len(reports))[2 * i : 2 * i + 2] = numbers
    order = sorted(lines, key=lambda label: not label.startswith("*"))  # baselines first
    return table(head, [[label, *lines[label]] for label in order if any(lines[label])])


def tables(report: dict) -> str:
    """Return the tables of one task: every method, and whose CoTs."""
    cells, rows = Cells(report["cells"]), []
    for label, row, reading in LINES:
        if cell := cells.of.get((row, cells.test, reading)):
            r, rmse = (cells.mean(row, metric, reading) for metric in SHOWN)
            within = "[{low:.3f}, {high:.3f}]".format(**cell["pearson"])
            many = [cells.mean(row, metric, f"{reading}@5") for metric in SHOWN]
            apart = [cells.difference(row, metric, reading) for metric in SHOWN]
            tied = f"{100 * cell['tied']:.1f} %" if reading == "decoded" else ""
            rows.append([label, len(cell["seeds"]), tied, f"{r} {within}", rmse, *many, *apart])
    for name, values in report["baselines"].items():
        both = [f"{values[metric]:.3f}" for metric in SHOWN]
        rows.append([f"*{name}*", "", "", *both, *[""] * 4])
    text = f"{report['records'][cells.test]} records; mean ± standard deviation of the seeds; 95 % intervals "
    text += "over seeds and records; tied: records where several scores are equally likely.\n\n"
    head = ["method, prediction", "seeds", "tied", "r", "RMSE", "r, 5 CoTs", "RMSE, 5 CoTs"]
    head += ["Δr to TRACT", "ΔRMSE to TRACT"]
    filled = [i for i in range(len(head)) if any(row[i] for row in rows)]
    rows = [[row[i] for i in filled] for row in (head, *rows)]
    return text + table(rows[0], rows[1:]) + "\n" + whose_cots(cells)


def draw(reports: dict[str, dict], path: Path) -> None:
    """Draw, for each task, the methods and whose CoTs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size, ratio = (9, 3.8 * len(reports)), {"width_ratios": [1.7, 1]}
    figure, axes = plt.subplots(
        len(reports), 2, figsize=size, layout="constrained", gridspec_kw=ratio, squeeze=False
    )
    for task, (left, right) in zip(reports, axes, strict=True):
        report, cells = reports[task], Cells(reports[task]["cells"])
        lines = [line for line in LINES if (line[1], cells.test, line[2]) in cells.of][::-1]
        for y, (_, row, reading) in enumerate(lines):
            color = "tab:orange" if row == "tract" else "tab:blue"
            bar(left, y, r := cells.of[row, cells.test, reading]["pearson"], color)
            left.plot([r["low"], r["high"]], [y, y], color="black", linewidth=0.8)
        left.set_yticks(range(len(lines)), [line[0] for line in lines])
        for name, style in (("ridge", ":"), ("one rater against the others", "--")):
            if name in report["baselines"]:
                r = report["baselines"][name]["pearson"]
                left.axvline(r, color="black", linestyle=style, linewidth=1, label=name)
        left.legend(frameon=False, fontsize=8, ncol=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        left.set_xlabel(f"{TASKS[task]}: Pearson's r (bar: mean, dots: seeds, line: 95 % interval)")
        for label, row, color in (("p_s", "a1", "tab:blue"), ("p_tract", "tract", "tab:orange")):
            points = [cells.of.get((row, test, "rail")) for test in ("annotated", cells.test)]
            if all(points):
                ends = [dict(zip(of["seeds"], of["rmse"]["per_seed"], strict=True)) for of in points]
                for seed in [seed for seed in ends[0] if seed in ends[1]]:
                    right.plot([0, 1], [end[seed] for end in ends], ".-", color=color, alpha=0.6)
                right.text(1.05, points[1]["rmse"]["mean"], label, color=color)
        right.set_xticks([0, 1], ["annotated CoTs", "own CoTs"])
        right.set(xlim=(-0.2, 1.6), ylabel="RMSE", title="whose CoTs?")
    figure.savefig(path, dpi=110)


def main() -> None:
    how = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(**how)
    committed = [path for task in TASKS if (path := HERE / f"{task}.json").is_file()]
    parser.add_argument("metrics", nargs="*", type=Path, default=committed)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of tables.md and figure.png")
    args = parser.parse_args()
    reports = [json.loads(path.read_text("utf-8")) for path in args.metrics]
    reports = {task: report for task in TASKS for report in reports if report["task"] == task}
    parts = [f"## {TASKS[task]}\n\n{tables(report)}" for task, report in reports.items()]
    text = "\n".join([overview(reports), *parts])
    (args.out / "tables.md").write_text(text, "utf-8")
    draw(reports, args.out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
