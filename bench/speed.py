"""Time the scripts of this checkout against those of another: the same work, in turns, in fresh processes.

    git worktree add /tmp/before c779a78
    python bench/speed.py --against /tmp/before --out results/speed/speed.json   # 20 minutes on 2 cores
    python bench/speed.py --table results/speed/speed.json                       # the table of docs/speed.md

The model is small and random, with Mistral's proportions; records have the lengths of MT-Bench judgements
(median 1,310 tokens a prompt, 118 a CoT). For CoTs and judging both checkouts are made to write the CoTs of
the data, so that both have the same work; they pay for sampling all the same. Seconds are those of the
scripts' own run.json, without the imports.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
# A process that drives a script imports that script's checkout, not this one
sys.path.insert(0, sys.argv[2] if sys.argv[1:2] == ["--drive"] else str(ROOT))
try:
    from tract import runs
except ModuleNotFoundError:  # of checkouts in which all stood at the top
    import runs

TASKS = {  # name → script and options; what is not in both checkouts is sorted out in `command`
    "training step": "stage1_train.py --epochs 1 --batch-size 4 --accumulation 1 --full",
    "training step, LoRA": "stage1_train.py --epochs 1 --batch-size 4 --accumulation 1 --lora",
    "writing CoTs": "gen_cot.py --batch-size 8",
    "judging, 1 CoT a prompt": "predict.py --batch-size 8",
    "judging, 5 CoTs a prompt": "predict.py --batch-size 10 --num-cots 5",
    "scoring given CoTs": "predict.py --batch-size 8 --given cot",
}


def make_model(folder: Path) -> None:
    """Write a random checkpoint with the embedded task's tokenizer, its weights large: it heeds its input."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, MistralConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 8192}
    config = MistralConfig(sliding_window=None, initializer_range=0.2, **sizes)  # 32,000 tokens
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data/tiny/seed").save_pretrained(folder)


def make_records(path: Path, n: int) -> None:
    """Write n records of real length: the embedded task's words, strung together."""
    task = [json.loads(line) for line in (ROOT / "data/tiny/train.jsonl").read_text("utf-8").splitlines()]
    words = {name: " ".join(record[name] for record in task).split() for name in ("prompt", "cot")}
    sizes = {"prompt": (1310, 0.39, 2800), "cot": (118, 0.275, 270)}  # median, spread, limit
    rng = random.Random(3)
    with open(path, "w", encoding="utf-8") as out:
        for i in range(n):
            record = {"id": f"r{i}", "score": 1 + i % 5}
            for name, (median, spread, limit) in sizes.items():
                length = max(8, min(limit, round(median * math.exp(rng.gauss(0, spread)))))
                start = rng.randrange(len(words[name]) - length)
                record[name] = " ".join(words[name][start : start + length])
            out.write(runs.to_line(record))


def dictate(writing, texts: dict[str, list[int]]):
    """Return a patch under which CoTs of these names become these ids: they are the random numbers."""
    import torch

    sample = writing.sample

    def dictated(logits, so_far, uniform, *args, **options):
        sample(logits, so_far, torch.full_like(uniform, 0.5), *args, **options)
        return uniform.long()

    def numbers(name: str, n: int):
        return torch.tensor(texts[name] + [0] * (n - len(texts[name])), dtype=torch.float64)

    return patch.multiple(writing, sample=dictated, random_numbers=numbers)


def texts_of(data: Path, num_cots: int) -> dict[str, list[int]]:
    """Return CoTs and suffix as ids, by name; a prompt gets those of several records."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/tiny/seed")
    records = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    texts = {}
    for i, k in itertools.product(range(len(records)), range(num_cots)):
        text = f"{records[(i + k) % len(records)]['cot']} So the overall score is"
        texts[f"0/{records[i]['id']}/{k}"] = tokenizer(text, add_special_tokens=False).input_ids
    return texts


def drive(script: str, data: Path, *arguments: str) -> None:
    """Run a script of the checkout that was put first in sys.path, in this process."""
    if script != "stage1_train.py":
        num_cots = int(arguments[arguments.index("--num-cots") + 1]) if "--num-cots" in arguments else 1
        try:
            from tract import writing
        except ImportError:  # a checkout from before there was one
            import gen_cot as writing
        dictate(writing, texts_of(data, num_cots)).start()
    sys.argv = [script, "--data", str(data), *arguments]
    runs.run(importlib.import_module(script.removesuffix(".py")).main)


def measure(root: Path, task: str, folder: Path, out: Path) -> dict:
    """Run a task in a fresh process; returns its seconds, its peak memory and what it found."""
    script, *options = TASKS[task].split()
    trains = script == "stage1_train.py"
    data = folder / ("train.jsonl" if trains else "test.jsonl")
    if trains and "no --valid" not in (root / script).read_text("utf-8"):
        options += ["--val-fraction", "0"]  # before --valid, a share was held out
    options = [root, script, data, "--model", folder / "model", "--out", out, *options]
    command = [sys.executable, __file__, "--drive", *map(str, options)]
    log = open(f"{out}.log", "w", encoding="utf-8")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise runs.Fault(f"{task} failed at {root}: {Path(log.name).read_text('utf-8')[-2000:]}")
    if trains:
        run = json.loads((out / "run.json").read_text("utf-8"))
        found = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        seconds = run.get("tokens", run.get("counts", {}).get("tokens")) / run["tokens_per_second"]
    else:
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        # Renormalised: a random model puts next to nothing on the scores
        found = [p / sum(probs) for row in rows for probs in row.get("score_probs", []) for p in probs]
        dictated = {row["cot"] for row in rows}
        assert all(dictated.issuperset(row["cots"]) for row in rows)
        seconds = json.loads(out.with_suffix(".run.json").read_text("utf-8"))["wall_seconds"]
    return {"seconds": seconds, "peak_mib": usage.ru_maxrss / 1024, "found": found}


def summary(report: dict) -> str:
    """Return the measurements as a Markdown table."""
    from results.tables import table  # this checkout's: the other one may have none

    rows = []
    for task, entry in report["tasks"].items():
        times = sorted(after / before for before, after in zip(*entry["seconds"], strict=True))
        memory = [after / before for before, after in zip(*entry["peak_mib"], strict=True)]
        spread = f"{statistics.median(times):.2f} ({times[0]:.2f} to {times[-1]:.2f})"
        rows.append([task, spread, f"{statistics.median(memory):.2f}", f"{entry['differ']:.0e}"])
    head = ["task", "times as long as before", "peak memory, times as much", "differ by at most"]
    return table(head, rows)


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        return drive(sys.argv[3], Path(sys.argv[4]), *sys.argv[5:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to time")
    parser.add_argument("--rounds", type=runs.COUNT, default=3, help="turns that each checkout gets")
    parser.add_argument("--out", type=Path, help="JSON file to write; None: only print")
    parser.add_argument("--table", type=Path, help="only print the table of this JSON file")
    args = parser.parse_args()
    if args.table:
        return print(summary(json.loads(args.table.read_text("utf-8"))))
    report = {"arguments": vars(args), "order": "before, now", "tasks": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        make_records(folder / "train.jsonl", 24)
        make_records(folder / "test.jsonl", 10)
        for task in args.tasks:
            suffix = "" if "training" in task else ".jsonl"
            turns = ([], [])  # of the other checkout, and of this one
            for i, k in itertools.product(range(args.rounds), (0, 1)):
                root = (args.against, ROOT)[k].resolve()
                out = folder / f"{task.replace(' ', '-')}-{i}-{k}{suffix}"
                turns[k].append(measure(root, task, folder, out))
            entry = {key: [[m[key] for m in turn] for turn in turns] for key in ("seconds", "peak_mib")}
            pairs = zip(*(turn[0]["found"] for turn in turns), strict=True)
            entry["differ"] = max((abs(a - b) for a, b in pairs), default=0.0)
            report["tasks"][task] = entry
            print(task, json.dumps(entry), flush=True)
    if args.out:
        runs.write_whole(args.out, json.dumps(report, indent=1, default=str) + "\n")
    print(summary(report))


if __name__ == "__main__":
    runs.run(main)
