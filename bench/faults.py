"""Kill every long stage at random points, fill its disk, and see whether anything differs in the end.

    python bench/faults.py --out results/faults/faults.json  # six minutes on 2 cores

Each of the four stages runs undisturbed, then killed with SIGKILL at random points and started again, then
with a limit on the size of a file, as on a full disk. What it writes has to be the same in every byte.
"""

import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runs
from models import TINY_SEED
from records import ROOT

DATA = str(ROOT / "data/tiny/valid.jsonl")  # 500 records
TRAIN = ["--model", TINY_SEED, "--epochs", "2", "--save-every", "10", "--data"]
WRITE = ["--batch-size", "8", "--data", DATA, "--model"]
STAGES = {  # what a stage makes → its command, which reads what the undisturbed stages made
    "stage1": ["stage1_train.py", *TRAIN, DATA],
    "cots.jsonl": ["gen_cot.py", *WRITE, "stage1"],
    "stage2": ["stage2_train.py", *TRAIN, "cots.jsonl"],
    "predictions.jsonl": ["predict.py", *WRITE, "stage2"],
}


def start(before: Path, out: Path, stderr: int = subprocess.DEVNULL) -> subprocess.Popen:
    """Start the stage that makes `out` from what lies in `before`."""
    words = [before / word if (before / word).exists() else word for word in STAGES[out.name]]
    command = [sys.executable, *words, "--out", out]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def content(out: Path) -> list[bytes]:
    """Return what must be the same in every byte; last what grows with the work."""
    names = ("model.safetensors", "log.jsonl") if out.is_dir() else ("",)
    return [(out / name).read_bytes() for name in names]


def bytes_kept(out: Path) -> int:
    """Return the size of what grows with the work, while it is under way."""
    growing = Path(f"{out}.part", "records.jsonl" if out.suffix else "log.jsonl")
    return growing.stat().st_size if growing.is_file() else 0


def kill(before: Path, out: Path, kills: int) -> dict:
    """Kill a stage when its work has got to random sizes, give its command again, and let it end at last."""
    whole, found = content(before / out.name), {"killed": 0, "left_work": 0}
    for _ in range(kills):
        size = random.uniform(bytes_kept(out), 0.9 * len(whole[-1]))
        process = start(before, out)
        while process.poll() is None and bytes_kept(out) < size:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))  # records are written a chunk at a time; this is into the next
        process.kill()
        found["killed"] += process.wait() == -signal.SIGKILL
        found["left_work"] += bytes_kept(out) > 0
    found["exit_code"] = 0 if out.exists() else start(before, out).wait()
    return found | {"differs": content(out) != whole}


def fill_disk(before: Path, out: Path) -> dict:
    """Run a stage with a limit on the size of a file that its output does not fit in, then without."""
    process, limit = start(before, out, stderr=subprocess.PIPE), 1 << (17 if out.suffix else 20)  # bytes
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    lines = process.communicate()[1].replace("\r", "\n").replace(str(out.parent), "OUT").splitlines()
    found = {"exit_code": process.returncode, "looked_finished": out.exists(), "bytes_kept": bytes_kept(out)}
    found["message"] = [line for line in lines if line.strip() and "%|" not in line]  # no progress bar
    found["exit_code_with_room"] = start(before, out).wait()
    return found | {"differs": content(out) != content(before / out.name)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--out", type=Path, default=Path("out/faults.json"), help="JSON file to write")
    parser.add_argument("--kills", type=runs.COUNT, default=3, help="kills a stage")
    args, report = parser.parse_args(), {}
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "undisturbed")
        for name in STAGES:
            if start(before, before / name).wait():
                raise runs.Fault(f"{name}: does not run undisturbed")
            report[name] = {"killed": kill(before, Path(folder, "killed", name), args.kills)}
            report[name]["disk_full"] = fill_disk(before, Path(folder, "full", name))
            print(name, json.dumps(report[name]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(args.out, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    runs.run(main)
