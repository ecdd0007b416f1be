"""Draw what trainings have logged: a panel a quantity, a colour a run.

    python -m tract.curves out/run/stage1 out/run/stage2 --out both.png

A run is its folder OUT; while it still trains, its log is read from OUT.part.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from tract import runs
from tract.records import InputError

PANELS = {"loss": "loss", "ce": "CE", "penalty": "penalty", "valid": "held-out RMSE", "lr": "learning rate"}
STAGE_3 = {"reward": "mean reward", "finished": "share of finished CoTs"}  # which its log has as well
NOISY = ("loss", "ce", "penalty")  # and they fall by an order of magnitude in the first steps


def read_log(out: Path) -> list[dict]:
    """Return the lines of log.jsonl in OUT or OUT.part; the last may be cut off. Raises InputError."""
    for path in (out / "log.jsonl", Path(f"{out}.part/log.jsonl")):
        if path.is_file():
            whole_lines = path.read_bytes().split(b"\n")[:-1]
            try:
                log = [json.loads(line) for line in whole_lines]
                for name in PANELS:
                    points(log, name)  # fails where a line lacks it
            except (ValueError, KeyError, TypeError):
                log = []
            if not log:
                raise InputError(f"{path}: has no step yet, or no training wrote it")
            return log
    raise InputError(f"{out}: no log.jsonl in it or in {out}.part; give the --out of a training")


def points(log: list[dict], name: str) -> np.ndarray:
    """Return steps and values (2, n) of a quantity; a step that was not taken has no loss."""
    if name == "valid":
        pairs = [(line["step"], line["valid"]["rmse"]) for line in log if "valid" in line]
    else:
        lines = [line for line in log if name in PANELS or name in line]  # of PANELS all, or a KeyError
        pairs = [(line["step"], line[name]) for line in lines if line["taken"] or name == "lr"]
    return np.array(pairs, dtype=float).reshape(-1, 2).T


def draw(logs: dict[str, list[dict]]):
    """Return a matplotlib Figure of the runs' logs, by their names.

    Thin lines are single steps, thick ones means over a fiftieth of the run, dotted ones steps not taken.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["text.parse_math"] = False  # a $ in the name of a folder is no formula
    panels = PANELS | STAGE_3
    names = [name for name in panels if any(points(log, name).size for log in logs.values())]
    figure = Figure(figsize=(18, 3.5 + len(logs) / 4), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        positive = all((points(log, name)[1] > 0).all() for log in logs.values())  # not all in stage 3
        axis.set(title=panels[name], xlabel="step", yscale="log" if name in NOISY and positive else "linear")
        for number, log in enumerate(logs.values()):
            color = f"C{number}"
            steps, values = points(log, name)
            if name in NOISY and steps.size:
                axis.plot(steps, values, color=color, alpha=0.3, linewidth=0.5)
                width = len(steps) // 50 + 1
                values = np.convolve(values, np.full(width, 1 / width), "valid")
                steps = steps[width - 1 :]
            axis.plot(steps, values, color=color, marker="o" if name == "valid" or len(steps) == 1 else "")
            skipped = [line["step"] for line in log if not line["taken"]]
            axis.vlines(skipped, 0, 1, color, "dotted", transform=axis.get_xaxis_transform())
    if len(logs) > 1:
        labels = [name.encode(errors="replace").decode() for name in logs]
        figure.legend(axes[-1].lines, labels, loc="outside lower center")  # the last panel has a line a run
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("runs", nargs="+", type=Path, help="folders OUT of trainings, ended or under way")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG file to write")
    args = parser.parse_args()
    runs.check_out(args.out)
    if args.out.suffix != ".png":
        raise InputError(f"--out {args.out}: the picture is a PNG; give a name that ends in .png")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure = draw({str(out): read_log(out) for out in args.runs})
    runs.write_whole(args.out, figure.savefig)


if __name__ == "__main__":
    runs.run(main)
