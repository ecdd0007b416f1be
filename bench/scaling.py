"""How time and memory grow: with the records of a file, and with length, vocabulary, batch and CoTs of one step.

    python bench/scaling.py --out results/speed/scaling.json       # a small random model, a quarter of an hour on a CPU
    python bench/scaling.py --axes records --records 1000,10000,100000

`records` starts stage 1 and gen_cot.py on files of real length, each in a process of its own, and stops them where training or
generation would begin: seconds of tokenisation, seconds of all else, and bytes of memory beyond those before the file was read.
The other axes vary one size of a training step or of judging and keep the rest. Printed with each axis is its exponent: the
slope of a straight line through log(size), log(seconds or bytes); 1 is proportional, 0 is flat. Ends with one JSON line.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import judge  # noqa: E402
import machine  # noqa: E402
import workload  # noqa: E402

import gen_cot  # noqa: E402
import models  # noqa: E402
import records  # noqa: E402
import runs  # noqa: E402
import stage1_train  # noqa: E402


def exponent(sizes: list[float], found: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    slope, _ = statistics.linear_regression([math.log(x) for x in sizes], [math.log(y) for y in found])
    return round(slope, 3)


# -------------------------------------------------------------------------------------------------- a file of records


class Started(Exception):
    pass


def start_up(script: str, data: str, model: str) -> dict:
    """In this process: all that stage 1 or gen_cot.py do up to their first step."""
    spent = 0.0

    def timed(real):
        def run(*args, **options):
            nonlocal spent
            started = time.perf_counter()
            try:
                return real(*args, **options)
            finally:
                spent += time.perf_counter() - started

        return run

    def begin(*args, **options):
        raise Started

    records.prompt_ids, records.target_ids = timed(records.prompt_ids), timed(records.target_ids)
    sys.argv = [script, "--data", data, "--model", model]
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        sys.argv += ["--out", f"{folder}/out"]
        module, name = (stage1_train, "train") if script == "stage1_train" else (gen_cot, "judge")
        setattr(module, name, begin)
        started = time.perf_counter()
        try:
            module.main()
        except Started:
            whole = time.perf_counter() - started
    return {"seconds": whole, "tokenisation": spent, "bytes": models.peak_memory() - before}


def resident() -> int:
    """Bytes that this process holds in memory now."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * 4096


def of_records(sizes: list[int]) -> dict:
    found = {script: [] for script in ("stage1_train", "gen_cot")}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = models.load_tokenizer(records.TINY_SEED)
        tokenizer.save_pretrained(f"{folder}/model")
        workload.random_model(workload.shape(len(tokenizer), layers=1), torch.float32).save_pretrained(f"{folder}/model")
        for n in sizes:
            data = f"{folder}/{n}.jsonl"
            with open(data, "w", encoding="utf-8") as out:
                out.writelines(map(runs.to_line, workload.long_records(n)))
            for script, own in found.items():
                command = [sys.executable, __file__, "--start-up", script, "--data", data, "--model", f"{folder}/model"]
                line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
                own.append({"records": n, "file_bytes": Path(data).stat().st_size} | json.loads(line))
                own[-1]["beyond_tokenisation"] = own[-1]["seconds"] - own[-1]["tokenisation"]
                print(
                    f"{script:13} {n:7} records, {own[-1]['file_bytes'] / 2**20:6.0f} MiB: "
                    f"{own[-1]['tokenisation']:6.1f} s of tokenisation, {own[-1]['beyond_tokenisation']:5.1f} s of all else, "
                    f"{own[-1]['bytes'] / 2**20:5.0f} MiB of memory",
                    flush=True,
                )
    for script, own in found.items():
        slopes = {key: exponent(sizes, [row[key] for row in own]) for key in ("seconds", "beyond_tokenisation", "bytes")}
        found[script] = {"rows": own, "exponents": slopes}
        print(f"{script:13} exponents: {slopes}")
    return found


# ------------------------------------------------------------------------------------------- one step, one judgement


def of_training(axis: str, sizes: list[int], rounds: int) -> dict:
    """Seconds and extra bytes of a batch, forward and backward, with one size varied."""
    rows = []
    for size in sizes:
        own = {"length": 512, "vocabulary": 32000, "sequences": 4} | {axis: size}
        model = workload.random_model(workload.shape(own["vocabulary"]), torch.float32)
        models.checkpoint_activations(model.train())
        examples = workload.random_examples(own["sequences"], own["length"], own["vocabulary"])
        batch = stage1_train.collate(examples, 0)
        run = partial(stage1_train.backward, model, batch, workload.loss_of(), bf16=models.has_bf16())
        run()
        bytes_ = machine.peak_of(run)
        rows.append({axis: size, "seconds": statistics.median(machine.seconds(run) for _ in range(rounds)), "bytes": bytes_})
    return report("training step", axis, sizes, rows)


def of_judging(axis: str, sizes: list[int], rounds: int) -> dict:
    """Seconds of judging the same prompts, with one size varied."""
    tokenizer, texts, rows = models.load_tokenizer(records.TINY_SEED), list(workload.long_records(16, prompt=300, cot=30)), []
    for size in sizes:
        own = {"num_cots": 1, "batch_size": 16, "vocabulary": 32000} | {axis: size}
        model = workload.random_model(workload.shape(own["vocabulary"], spread=0.2), torch.float32, sharp=3)
        job = judge.Job.of(tokenizer, texts, own["num_cots"])
        run = partial(judge.ours, model, job, batch_size=own["batch_size"], replace={}, together=len(texts))
        run()
        rows.append({axis: size, "seconds": statistics.median(machine.seconds(run) for _ in range(rounds))})
    return report("judging", axis, sizes, rows)


def report(what: str, axis: str, sizes: list[int], rows: list[dict]) -> dict:
    slopes = {key: exponent(sizes, [row[key] for row in rows]) for key in rows[0] if key != axis}
    for row in rows:
        extra = f"  {row['bytes'] / 2**20:7.0f} MiB extra" if "bytes" in row else ""
        print(f"{what:13} {axis} {row[axis]:7}: {row['seconds']:7.3f} s{extra}")
    print(f"{what:13} {axis} exponents: {slopes}", flush=True)
    return {"rows": rows, "exponents": slopes}


AXES = {
    "length": partial(of_training, "length", [256, 512, 1024, 2048]),
    "vocabulary": partial(of_training, "vocabulary", [32000, 64000, 128000, 256000]),
    "batch": partial(of_training, "sequences", [1, 2, 4, 8, 16]),
    "judge-batch": partial(of_judging, "batch_size", [1, 4, 16]),
    "judge-cots": partial(of_judging, "num_cots", [1, 2, 4]),
    "judge-vocabulary": partial(of_judging, "vocabulary", [32000, 128000, 256000]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help, allow_abbrev=False)
    parser.add_argument("--axes", default=",".join(["records", *AXES]), help="which to vary")
    parser.add_argument("--records", default="1000,10000,100000", help="sizes of the file")
    parser.add_argument("--rounds", type=runs.COUNT, default=3, help="of which the median is taken")
    parser.add_argument("--threads", type=runs.COUNT, default=1, help="of a CPU, for all axes but records")
    parser.add_argument("--out", type=Path, help="JSON file; None: only print")
    parser.add_argument("--start-up", choices=("stage1_train", "gen_cot"), help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start_up:
        print(json.dumps(start_up(args.start_up, args.data, args.model)))
        return
    found = {}
    for axis in args.axes.split(","):
        if axis == "records":
            found[axis] = of_records([int(n) for n in args.records.split(",")])
        else:
            torch.set_num_threads(args.threads)
            found[axis] = AXES[axis](args.rounds)
    result = {"bench": "scaling", "machine": machine.machine(), "axes": found}
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        runs.write_whole(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps({"bench": "scaling"} | {axis: own.get("exponents", own) for axis, own in found.items()}))


if __name__ == "__main__":
    runs.run(main)
