"""Print the tables of docs/speed.md from what bench/peers.py measured.

python results/speed/draw.py results/speed/peers.json
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from results.tables import filled_table

PEAK = 989e12  # FLOPS of an H100 or H200 in bf16, dense


def tables(report: dict) -> str:
    """Return the measurements as Markdown, a table a task."""
    parts = []
    for task_name, task in report["tasks"].items():
        rows = []
        first = next(iter(task["ways"].values()))["seconds"]  # ours
        for name, way in task["ways"].items():
            row = [name, "no time left", "", "", "", ""]
            # The last turn may have been cut short
            pairs = zip(way["seconds"], first, strict=False)
            ratios = sorted(seconds / ours for seconds, ours in pairs)
            if ratios:
                seconds = np.median(way["seconds"])
                spread = f"{np.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                row[1:4] = [f"{seconds:.2f}", spread, f"{task['tokens'] / seconds:.0f}"]
                if "flops" in task and not report["device"].startswith("CPU"):
                    row[4] = f"{task['flops'] / seconds / PEAK:.2%}"
            if "peak" in way:
                row[5] = f"{way['peak'] / 2**30:.2f} GiB"
            rows.append(row)
        head = [task_name, "s", "times as long", "tokens/s", "of an H200's FLOPS (MFU)", "peak memory"]
        parts += [filled_table(head, rows), task["note"]]
    return "\n".join(parts)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(tables(json.loads(Path(path).read_text("utf-8"))), end="")
