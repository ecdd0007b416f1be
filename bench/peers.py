"""Compare training and judging here with what people would use instead: same weights, batches and results.

    python bench/peers.py --model out/real/smollm2 --data train.jsonl --fp32 --out out/peers.json
    python bench/peers.py --shape mistral-7b --lora          # random weights of that size, no hub

Takes the options of stage1_train.py for model, data and memory. The ways to do it are those of bench/ways.py.
The learning rate is 0: AdamW does its work, but all steps meet the same weights. The first turn warms up and
measures memory (of judging only on a GPU); in all turns the same loss and gradient norm, or scores, have to
come out. Every turn is written to --out, a JSON file: one may stop it.
"""

import contextlib
import gc
import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from memory import SHAPES, peak_of, random_model  # which puts the repository into sys.path
from ways import ON_GPU, OURS, shares, ways_to_judge, ways_to_train

import stage1_train
from results.speed.draw import tables
from tract import models, runs
from tract.options import choose_grid, make_training_parser
from tract.records import ROOT, InputError, read_records

TASKS = {"training": 0, "judging": 1, "judging-5": 5}  # CoTs a prompt
CONFIGS = SHAPES | {"tiny": transformers.AutoConfig.from_pretrained(models.TINY_SEED)}


def take_turns(ways: dict, task: dict, rounds: int, tolerance: float, save) -> None:
    """Let the ways take turns, ours first, and save() after each.

    task: what is known of it; its `ways` get seconds and peak memory. Raises Fault where results differ.
    """
    task["ways"] = {name: {"seconds": []} for name in ways}
    expected = {}
    for turn, name in itertools.product(range(rounds + 1), ways):
        way = task["ways"][name]
        gc.collect()  # a trainer holds its AdamW in a cycle
        if turn == 0 and (ON_GPU or "flops" in task):  # to measure judging would take long on a CPU
            extra, found = peak_of(ways[name])
            way["peak"] = task["weights"] + extra
        else:
            found = ways[name]()
        seconds = found.pop("seconds")
        expected = expected or found
        for key, value in found.items():
            if not np.allclose(value, expected[key], tolerance, tolerance):  # NaN equals nothing
                raise runs.Fault(f"{name}: {key} is {value}, ours {expected[key]}")
        print(f"{name}, turn {turn}: {seconds:.2f} s", flush=True)
        if turn:
            way["seconds"].append(seconds)
        save()


def main() -> None:
    defaults = {"any other": stage1_train.DEFAULTS["any other"] | {"batch_size": 4, "lr": 0.0}}
    parser = make_training_parser(__doc__, stage=1, defaults=defaults)
    add = parser.add_argument_group("comparison").add_argument
    add("--shape", choices=CONFIGS, help="random weights of this size, and made records")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to compare, in this order")
    add("--texts", type=runs.COUNT, default=10, help="CoTs that are judged at a time")
    add("--rounds", type=runs.COUNT, default=3, help="timed turns of each way")
    parser.set_defaults(out=Path("out/peers.json"))
    args = parser.parse_args()
    runs.check_out(args.out)
    args.grid = choose_grid(args)
    if args.shape and args.four_bit:
        raise InputError("--4bit: is for --model")
    args.data = ROOT / "data/tiny/train.jsonl" if args.shape else args.data
    records = read_records(args.data, args.grid, ("id", "prompt", "cot", "score"))
    if args.shape:  # prompts and CoTs as long as MT-Bench's, of 1,300 and 120 tokens
        records = [r | {"prompt": f"{r['prompt']} " * 25, "cot": f"{r['cot']} " * 2} for r in records[:100]]
        models.load_model = partial(random_model, CONFIGS[args.shape])
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    report = {"arguments": vars(args).copy(), "device": device, "tasks": {}}

    def save() -> None:
        runs.write_whole(args.out, json.dumps(report, indent=1, default=str) + "\n")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    save()  # or fail at once
    tolerance = 5e-2 if args.bf16 else 1e-4
    with contextlib.suppress(KeyboardInterrupt):
        for name in args.tasks:
            num_cots = TASKS[name]  # 0 for training
            ways, task = ways_to_judge(args, records, num_cots) if num_cots else ways_to_train(args, records)
            report["tasks"][name] = task
            take_turns(ways, task, args.rounds, tolerance, save)
            if num_cots:
                task["note"] = shares(ways[OURS])
            save()
            del ways  # and with them the model, before the next one is loaded
            gc.collect()
    print(tables(report), end="")


if __name__ == "__main__":
    runs.run(main)
