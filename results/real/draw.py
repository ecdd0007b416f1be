"""Redraw tables.md and figure.png from the metrics.json of each task, as bench/real.py wrote them.

python results/real/draw.py                             # from the *.json beside this file
python results/real/draw.py out/real/ists/metrics.json  # of one run, beside it
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tables import Cells, bar, filled_table, table, whose_cots  # noqa: E402

TASKS = {
    "ists": "Interpretable STS",
    "ists-cpu": "Interpretable STS (CPU)",
    "feedbackqa": "FeedbackQA",
    "saf": "SAF",
    "saf-cpu": "SAF (CPU)",
}
FRONT = ("Interpretable STS", "FeedbackQA")  # in table and figure of the README
NAMES = {"pearson": "r", "rmse": "RMSE"}
RATER = "one rater against the others"  # on true scores of fewer raters: not to be put beside the rows
LINES = [  # label, row, reading
    ("untrained model, RAIL", "seed-no-cot", "rail"),
    ("untrained model, CoT-RAIL", "seed", "rail"),
    ("CE without CoT, decoded", "ce-no-cot", "decoded"),
    ("CE without CoT, RAIL", "ce-no-cot", "rail"),
    ("RAFT without CoT", "raft", "rail"),
    ("CE with CoT, decoded", "ce", "decoded"),
    ("CE with CoT, CoT-RAIL", "ce", "rail"),
    ("A.1: stage 1 only", "a1", "rail"),
    ("A.3: both stages CE, decoded", "a2", "decoded"),
    ("A.2: both stages CE, CoT-RAIL", "a2", "rail"),
    ("TRACT", "tract", "rail"),
    ("TRACT, decoded", "tract", "decoded"),
    ("λ = .02 in stage 2", "tract-0.02", "rail"),
    ("CE in stage 2", "token", "rail"),
    ("CE in stage 2, score weight 1", "ce-w1", "rail"),
    ("two-hot CE in stage 2", "two-hot", "rail"),
    ("two-hot CE in stage 2, score weight 1", "two-hot-w1", "rail"),
    ("RPS in stage 2", "rps", "rail"),
]


class Tested(NamedTuple):  # the rows of a task on one of its tests
    name: str
    cells: Cells
    baselines: dict[str, dict[str, float]]  # label → metric → value
    records: int
    groups: int | None  # that the intervals resample; None: single records


def tests_in(reports: list[dict]) -> list[Tested]:
    """Return the tests of all reports, in the order of TASKS."""
    tests = []
    for report in sorted(reports, key=lambda report: list(TASKS).index(report["task"])):
        for test, baselines in report["baselines"].items():
            name = TASKS[report["task"]]
            if len(report["baselines"]) > 1:
                name += ", " + test.replace("_", " ")
            groups = report["groups"].get(test)
            cells = Cells(report["cells"], test)
            comparable = {label: values for label, values in baselines.items() if label != RATER}
            tests.append(Tested(name, cells, comparable, report["records"][test], groups))
    return tests


def overview(tests: list[Tested], *metrics: str) -> str:
    """Return one table of all tests: baselines and methods, each with these metrics."""
    head = ["method, prediction"]
    baselines = {}  # label → name of the test → numbers
    methods = {label: {} for label, _, _ in LINES}
    for test in tests:
        first, *rest = (NAMES[metric] for metric in metrics)
        head += [f"{test.name}: {first}", *rest]
        for label, values in test.baselines.items():
            baselines.setdefault(f"*{label}*", {})[test.name] = [f"{values[m]:.3f}" for m in metrics]
        for label, row, reading in LINES:
            methods[label][test.name] = [test.cells.mean(row, metric, reading) for metric in metrics]
    rows = []
    for label, numbers in (baselines | methods).items():
        row = [number for test in tests for number in numbers.get(test.name, [""] * len(metrics))]
        if any(row):
            rows.append([label, *row])
    return table(head, rows)


def tables(test: Tested) -> str:
    """Return the tables of one test: every method, and whose CoTs."""
    cells = test.cells
    rows = []
    for label, row, reading in LINES:
        cell = cells.find(row, reading)
        if not cell:
            continue
        interval = "[{low:.3f}, {high:.3f}]".format(**cell["pearson"])
        r = f"{cells.mean(row, 'pearson', reading)} {interval}"
        rmse = cells.mean(row, "rmse", reading)
        five_cots = [cells.mean(row, metric, f"{reading}@5") for metric in NAMES]
        to_tract = [cells.difference(row, metric, reading) for metric in NAMES]
        tied = f"{100 * cell['tied']:.1f} %" if reading == "decoded" else ""
        rows.append([label, len(cell["seeds"]), tied, r, rmse, *five_cots, *to_tract])
    for name, values in test.baselines.items():
        r, rmse = (f"{values[metric]:.3f}" for metric in NAMES)
        rows.append([f"*{name}*", "", "", r, rmse, "", "", "", ""])
    records = f"{test.records} records"
    resampled = "records"
    if test.groups:
        records += f" of {test.groups} questions"
        resampled = "questions"
    if any(len(cell["seeds"]) > 1 for cell in cells.cells.values()):
        resampled = f"seeds and {resampled}"
    text = f"{records}; mean ± standard deviation of the seeds; 95 % intervals over {resampled}; "
    text += "tied: records where several scores are equally likely. r of a constant counts as 0.\n\n"
    head = ["method, prediction", "seeds", "tied", "r", "RMSE", "r, 5 CoTs", "RMSE, 5 CoTs"]
    head += ["Δr to TRACT", "ΔRMSE to TRACT"]
    return text + filled_table(head, rows) + "\n" + whose_cots(cells)


def draw(tests: list[Tested], path: Path) -> None:
    """Draw, for each test, the methods and whose CoTs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (9, 3.8 * len(tests))
    options = {"layout": "constrained", "gridspec_kw": {"width_ratios": [1.7, 1]}}
    figure, axes = plt.subplots(len(tests), 2, figsize=size, squeeze=False, **options)
    for test, (left, right) in zip(tests, axes, strict=True):
        cells = test.cells
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
        ridge = test.baselines["ridge"]["pearson"]
        left.axvline(ridge, color="black", linestyle=":", linewidth=1, label="ridge")
        left.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
        left.set_xlabel(f"{test.name}: Pearson's r (bar: mean, dots: seeds, line: 95 % interval)")
        for label, row, color in (("p_s", "a1", "tab:blue"), ("p_tract", "tract", "tab:orange")):
            annotated = cells.find(row, test=f"{cells.diagnosed}annotated")
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
    parser.add_argument(
        "--out", type=Path, help="folder of tables.md and figure.png; None: that of the first"
    )
    args = parser.parse_args()
    out = args.out or args.metrics[0].parent
    given = [json.loads(path.read_text("utf-8")) for path in args.metrics]
    tests = tests_in(given)
    parts = [f"## {test.name}\n\n{tables(test)}" for test in tests]
    front = [test for test in tests if test.name in FRONT]
    rest = [test for test in tests if test.name not in FRONT]
    overviews = [overview(group, *NAMES) for group in (front, rest) if group]
    text = "\n".join([*overviews, *parts])
    (out / "tables.md").write_text(text, "utf-8")
    draw(front or tests, out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
