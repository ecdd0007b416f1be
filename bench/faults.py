"""Kill every long stage at random points, fill its disk, and see whether anything is lost, doubled or different.

    python bench/faults.py --out results/faults/faults.json          # about 15 minutes on 2 cores

Each of the four stages first runs undisturbed. Then it is started, killed with SIGKILL at a random point of its work and
started again with the same command, over and over; whenever it gets to its end, its files are compared byte by byte with the
undisturbed ones. Then the same once with a limit on the size of a file (what a full disk looks like to a program). Last, what
it costs to be able to go on. Ends with one JSON line.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import records  # noqa: E402
import runs  # noqa: E402

FILES = {  # the files of a stage that must be the same in every byte
    "stage1": ["stage1/model.safetensors", "stage1/log.jsonl"],
    "cots": ["cots.jsonl"],
    "stage2": ["stage2/model.safetensors", "stage2/log.jsonl"],
    "predictions": ["predictions.jsonl"],
}


def commands(data: Path, before: Path, out: Path) -> dict[str, list]:
    """The four stages; each reads what the undisturbed run left in `before` and writes to `out`."""
    train = ["--model", records.TINY_SEED, "--epochs", 2, "--save-every", 10]
    return {
        "stage1": ["stage1_train.py", *train, "--data", data, "--out", out / "stage1"],
        "cots": ["gen_cot.py", "--model", before / "stage1", "--data", data, "--out", out / "cots.jsonl"],
        "stage2": ["stage2_train.py", *train, "--data", before / "cots.jsonl", "--out", out / "stage2"],
        "predictions": ["predict.py", "--model", before / "stage2", "--data", data, "--out", out / "predictions.jsonl"],
    }


def start(command: list, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL, **options)


def progress(out: Path, stage: str) -> int:
    """Bytes of the file that grows with every step or batch; 0 before the first."""
    growing = out / (f"{stage}.part/log.jsonl" if "stage" in stage else f"{stage}.jsonl.part")
    return growing.stat().st_size if growing.is_file() else 0


def time_to_first_step(process: subprocess.Popen, out: Path, stage: str) -> float:
    """Seconds from the start to the first growth of the stage's file."""
    began, size = time.time(), progress(out, stage)
    while process.poll() is None and progress(out, stage) <= size:
        size = min(size, progress(out, stage))  # a resumed log is cut back to the saved state first
        time.sleep(0.01)
    return time.time() - began


def compare(stage: str, before: Path, out: Path) -> dict:
    """Of the stage's files: how many differ, and of its lines, how many are lost, doubled or different."""
    result = {"files_different": 0, "lost": 0, "doubled": 0, "different": 0}
    for name in FILES[stage]:
        result["files_different"] += (before / name).read_bytes() != (out / name).read_bytes()
        if name.endswith(".jsonl"):
            wanted, found = ((folder / name).read_text("utf-8").splitlines() for folder in (before, out))
            key = "step" if name.endswith("log.jsonl") else "id"
            ids = [json.loads(line)[key] for line in found]
            result["lost"] += len({json.loads(line)[key] for line in wanted} - set(ids))
            result["doubled"] += len(ids) - len(set(ids))
            result["different"] += len(set(wanted) - set(found))
    return result


def remove(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()


def add(total: dict, more: dict) -> None:
    for key, value in more.items():
        total[key] = total.get(key, 0) + value


def kill_and_go_on(
    stage: str, command: list, before: Path, out: Path, *, kills: int, seconds: float, rng: random.Random
) -> dict:
    """Kill the stage `kills` times, each between its first and its last step; compare whenever it ends."""
    total = {"kills": 0, "resumes_that_kept_work": 0, "ends": 0, "looked_finished_too_early": 0}
    waits = []
    while True:
        kept = progress(out, stage) > 0
        process = start(command, stderr=subprocess.DEVNULL)
        waits.append(time_to_first_step(process, out, stage))
        if total["kills"] < kills:
            try:
                process.wait(rng.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        code = process.wait()
        total["resumes_that_kept_work"] += kept
        finished = (out / FILES[stage][0].split("/")[0]).exists()
        if code == -signal.SIGKILL:
            total["kills"] += 1
            if not finished:
                continue
            # Killed after its last act: what has its final name has to be whole
            total["looked_finished_too_early"] += compare(stage, before, out)["files_different"] > 0
        elif code != 0:
            raise SystemExit(f"{stage}: ended with exit code {code}")
        total["ends"] += 1
        add(total, compare(stage, before, out))
        if total["kills"] >= kills:
            return total | {"seconds_to_first_step": round(statistics.median(waits), 2)}
        remove(out)


def fill_disk(stage: str, command: list, before: Path, out: Path) -> dict:
    """Run with a limit on the size of a file, then without; one message, exit code 1, nothing that looks finished."""
    remove(out)
    limit = (
        (1 << 20) if "stage" in stage else (256 << 10)
    )  # above the prompts, which are in a file as well, below the judgements

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(command, stderr=subprocess.PIPE, preexec_fn=limited, text=True)
    error = process.communicate()[1].replace("\r", "\n").splitlines()
    message = [line for line in error if line.strip() and "%|" not in line]  # not the progress bar
    finished = (out / FILES[stage][0].split("/")[0]).exists()
    kept = progress(out, stage)
    again = start(command, stderr=subprocess.DEVNULL).wait()
    result = {"limit_bytes": limit, "exit_code": process.returncode, "traceback": any("Traceback" in line for line in error)}
    result |= {"looked_finished": finished, "bytes_kept": kept, "exit_code_with_room": again, **compare(stage, before, out)}
    return result | {"message": message[-1].replace(str(out), "OUT") if message else ""}


def cost_of_state(out: Path, *, save_every: int) -> dict:
    """Size of the state, and the share of training time that saving it takes at the default --save-every."""
    import torch

    import models
    import stage1_train

    model = models.load_model(records.TINY_SEED, dtype=torch.float32)
    optimiser, schedule = stage1_train.make_optimiser(model, lr=1e-4, warmup=0.0, weight_decay=0.0, steps=100)
    ids = torch.randint(4, 50, (16, 110))
    steps, saves = [], []
    for _ in range(30):
        began = time.time()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        steps.append(time.time() - began)
    state = stage1_train.State(out, model, optimiser, schedule)
    for _ in range(10):
        began = time.time()
        state.save(1)
        saves.append(time.time() - began)
    size, parameters = state.path.stat().st_size, sum(p.numel() for p in model.parameters())
    share = statistics.median(saves) / (statistics.median(saves) + save_every * statistics.median(steps))
    return {
        "parameters": parameters,
        "state_bytes": size,
        "bytes_per_parameter": round(size / parameters, 2),
        "save_every": save_every,
        "share_of_time_saving": round(share, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--out", type=Path, default=Path("out/faults.json"), help="JSON file to write")
    parser.add_argument("--kills", type=int, default=10, help="kills a stage")
    parser.add_argument("--records", type=int, default=600, help="records of the embedded task to work on")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the points of killing")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    report: dict = {"machine": f"{os.cpu_count()} CPU cores, {platform.system()}", "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        data, before, out = (Path(folder) / name for name in ("data.jsonl", "before", "out"))
        lines = (ROOT / "data/tiny/train.jsonl").read_text("utf-8").splitlines(keepends=True)
        data.write_text("".join(lines[: args.records]), "utf-8")
        for stage in FILES:
            undisturbed = commands(data, before, before)[stage]
            process = start(undisturbed, stderr=subprocess.DEVNULL)
            first = time_to_first_step(process, before, stage)
            began = time.time()
            if process.wait() != 0:
                raise SystemExit(f"{stage}: does not run undisturbed")
            seconds = time.time() - began
            remove(out)
            command = commands(data, before, out)[stage]
            killed = kill_and_go_on(stage, command, before, out, kills=args.kills, seconds=seconds, rng=rng)
            killed["seconds_to_first_step_undisturbed"] = round(first, 2)
            report["stages"][stage] = {"killed": killed, "disk_full": fill_disk(stage, command, before, out)}
            print(stage, json.dumps(report["stages"][stage]), flush=True)
        report["state"] = cost_of_state(Path(folder), save_every=200)
    total: dict = {}
    for stage in report["stages"].values():
        add(total, {key: value for key, value in stage["killed"].items() if "seconds" not in key})
    report["total"] = total
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(args.out, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps({"total": total, "state": report["state"]}))


if __name__ == "__main__":
    runs.run(main)
