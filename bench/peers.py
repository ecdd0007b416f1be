"""Compare training and judging here with what people would use instead: same weights, batches and results.

    python bench/peers.py --model out/real/smollm2 --data train.jsonl --fp32 --out results/speed/peers.json
    python bench/peers.py --shape mistral-7b --lora          # random weights of that size, no hub
    python bench/peers.py --table results/speed/peers.json   # the tables of docs/speed.md

Takes the options of stage1_train.py. Training: an optimiser step here; in the authors' style, with logits for
all positions; of Hugging Face's Trainer with that loss; of TRL's SFTTrainer, which has CE alone. The learning
rate is 0: AdamW does its work, but all steps meet the same weights. Judging: predict.py's loop, made to write
the CoTs of the data; transformers' generate, which writes as long, and a pass over each of those texts. The
first turn warms up and measures memory; in all, the same loss and gradient norm or scores have to come out.
"""

import contextlib
import gc
import io
import itertools
import json
import statistics
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import cost  # which puts the repository into sys.path
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from memory import SHAPES, estimate, peak_of, random_model, shape_of
from transformers.cache_utils import DynamicLayer

import stage1_train
from results.tables import table
from tract import models, ranks, runs, training, writing
from tract.batch import left_pad
from tract.encode import encode, encode_prefix
from tract.options import choose_grid, make_judging_parser, make_training_parser
from tract.records import ROOT, InputError, read_records
from tract.text import encode_prompt

TASKS = {"training": 0, "judging": 1, "judging-5": 5}  # CoTs a prompt
CONFIGS = SHAPES | {"tiny": transformers.AutoConfig.from_pretrained(models.TINY_SEED)}
OURS = "**this repository**"
ON_GPU = torch.cuda.is_available()


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(transformers.TrainerCallback):
    """Time a step. Gradients are there before, at 0, as in a step of several batches: all add to them."""

    def on_step_begin(self, *args, model, **options):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        self.started = now()

    def on_step_end(self, *args, **options):
        self.seconds = now() - self.started


def authors_loss(model, batch: dict, score_ids, score_values) -> torch.Tensor:
    """Return the CE that the model makes of `labels` plus the squared error, from logits of all positions.

    Without a mask, which padding on the right does not need: with one it would be slower.
    """
    labels = torch.full_like(batch["ids"], -100)
    labels[:, 1:][batch["supervised"][:, :-1]] = batch["targets"]
    output = model(input_ids=batch["ids"], labels=labels, use_cache=False)
    rows, columns = batch["supervised"].nonzero()[batch["is_score"]].T
    probs = output.logits[rows, columns].float().softmax(-1)[:, score_ids]
    errors = (probs * score_values).sum(-1) - batch["true_scores"][batch["is_score"]]
    return output.loss + errors.square().mean()


def with_loop(is_ours: bool, model, windows: list, scores: dict, args) -> dict:
    """Step as stage1_train.train does; returns what the last step has found, and its seconds."""
    optimiser, _ = training.make_optimiser(model, args, len(windows))
    clock = Clock()
    for window in windows:
        clock.on_step_begin(model=model)
        if is_ours:
            loss, ce, _ = stage1_train.accumulate_gradients(model, window, scores, args).tolist()
            found = {"loss": loss, "ce": ce}
        else:
            with models.autocast(args.bf16):
                loss = authors_loss(model, stage1_train.collate(window), **scores)
            loss.backward()
            found = {"loss": float(loss.detach())}
        found["norm"] = float(ranks.clip(model, args.clip))
        optimiser.step()
        optimiser.zero_grad()
        clock.on_step_end()
    return found | {"seconds": clock.seconds}


def with_trainer(is_trl: bool, model, windows: list, scores: dict, args) -> dict:
    """Do the same with Hugging Face's Trainer and the authors' loss, or with TRL's SFTTrainer and CE."""
    settings = {"max_steps": len(windows), "per_device_train_batch_size": args.batch_size}
    settings |= {"learning_rate": args.lr, "max_grad_norm": args.clip, "logging_steps": 1}
    settings |= {"bf16": args.bf16, "use_cpu": not ON_GPU, "dataloader_pin_memory": False}
    settings |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    settings |= {"gradient_checkpointing": False}  # the model does that by itself
    settings |= {"output_dir": "/tmp", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    examples = [example for window in windows for example in window]
    if is_trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        ids = [list(example.ids) for example in examples]
        labels = [[-100] * e.start + list(e.ids[e.start :]) for e in examples]
        data = Dataset.from_dict({"input_ids": ids, "labels": labels})
        options = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(model, options, train_dataset=data, processing_class=args.tokenizer)
    else:
        options = transformers.TrainingArguments(**settings)
        trainer = transformers.Trainer(model, options, stage1_train.collate, examples)
        trainer.compute_loss = lambda model, batch, **rest: authors_loss(model, batch, **scores)
    clock = Clock()
    trainer.add_callback(clock)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    for module, name in itertools.product(model.modules(), ("forward", "_is_accelerate_prepared")):
        vars(module).pop(name, None)  # what they put around the model's own forward goes again
    last = trainer.state.log_history[-2]  # [-1] sums up
    found = {"ce": last["loss"]} if is_trl else {"loss": last["loss"], "norm": last["grad_norm"]}
    return found | {"seconds": clock.seconds}


def ways_to_train(args, records: list[dict]) -> tuple[dict, dict]:
    """Return the ways to train, and what is known of the step."""
    args.tokenizer = models.load_tokenizer(args.model)
    _, score_ids = writing.score_tokens(args.tokenizer, args.grid)
    checkpointing = args.gradient_checkpointing
    model = models.load_for_training(args.model, args.lora, checkpointing, args.bf16, args.four_bit)
    examples = [encode(args.tokenizer, record, args.grid, score_ids) for record in records]
    examples.sort(key=lambda example: len(example.ids))
    start = (len(examples) - args.batch_size) // 2
    if start < 0:
        raise InputError(f"{args.data}: has fewer than {args.batch_size} records; lower --batch-size")
    window = examples[start : start + args.batch_size]
    # A step on a few tokens goes before: it makes the state of AdamW
    short = [example._replace(ids=example.ids[-16:], start=8, score_position=14) for example in window]
    given = (model, [short, window], models.score_tensors(score_ids, args.grid), args)
    ways = {OURS: partial(with_loop, True, *given), "authors' style": partial(with_loop, False, *given)}
    ways["Hugging Face Trainer, the same loss"] = partial(with_trainer, False, *given)
    if find_spec("trl"):
        ways["TRL SFTTrainer, CE alone"] = partial(with_trainer, True, *given)
    plain = shape_of(model.config)  # without adapters
    flops = [cost.training(plain, args.lora, False, e.start, e.n_supervised) for e in window]
    shape = (len(window), len(window[-1].ids), max(example.n_supervised for example in window))
    parts = estimate(plain, args.lora, shape, args.bf16, checkpointing, args.four_bit)
    peak = sum(parts.values()) / 2**30
    facts = {"tokens": sum(len(example.ids) for example in window), "flops": sum(flops)}
    facts["weights"] = sum(weight.nbytes for weight in model.parameters())
    facts["note"] = f"Our peak, as bench/memory.py estimates it: {peak:.2f} GiB.\n"
    return ways, facts


def ways_to_judge(args, records: list[dict], num_cots: int) -> tuple[dict, dict]:
    """Return the ways to judge, and what is known of the task."""
    loaded = writing.load_judge(args.model, args.grid, args.bf16)
    loaded.tokenizer.positions = 10**6  # with --shape it is that of a small model
    records = records[: args.texts]
    n = max(1, len(records) // num_cots)
    prompts = [encode_prompt(loaded.tokenizer, record["prompt"]) for record in records[:n]]
    prompts.sort(key=len, reverse=True)  # as predict.py does
    texts = []  # prompt, CoT and suffix as ids
    written = {}  # name of a CoT → it and its suffix as ids
    for i, k in itertools.product(range(n), range(num_cots)):
        cot = records[(i + k) % len(records)]["cot"]
        texts.append(encode_prefix(loaded.tokenizer, prompts[i], cot, args.grid))
        written[f"{i}/{k}"] = texts[-1][len(prompts[i]) :]
    settings = make_judging_parser("").parse_args([f"--num-cots={num_cots}"])
    sample = writing.sample

    # Our loop is made to write the CoTs of the data: their ids travel as its random numbers, and what samples
    # a token hands them on
    def dictated(logits, so_far, uniform, settings):
        sample(logits, so_far, torch.rand_like(uniform), settings)  # which takes its time all the same
        return uniform.long()

    def numbers(name: str, n: int) -> torch.Tensor:
        return F.pad(torch.tensor(written[name]).float(), (0, n - len(written[name])))

    def ours() -> dict:
        with patch.multiple(writing, sample=dictated, random_numbers=numbers):
            cots = sorted(writing.write(loaded, prompts, list(written), settings, len(written)))
        return {"probs": normalised([scores.probs for _, _, scores in cots])}

    @torch.inference_mode()
    def authors() -> dict:
        ids, mask = left_pad(prompts)
        longest = max(map(len, written.values())) + 2  # score and end of sequence
        options = {name: getattr(settings, name) for name in ("temperature", "top_p", "repetition_penalty")}
        options |= {"do_sample": True, "top_k": 0, "num_return_sequences": num_cots, "use_cache": True}
        options |= {"min_new_tokens": longest, "max_new_tokens": longest, "pad_token_id": 0}
        loaded.model.generate(ids, attention_mask=mask, **options)
        probs = []
        for text in texts:
            logits = loaded.model(torch.tensor([text], device=models.device())).logits[0, -1]
            probs.append(logits.float().softmax(-1)[loaded.score_tensors["score_ids"]].tolist())
        return {"probs": normalised(probs)}

    facts = {"tokens": sum(map(len, written.values())), "note": ""}
    facts["weights"] = sum(weight.nbytes for weight in loaded.model.parameters())
    return {OURS: ours, "authors' style: generate, then read each text anew": authors}, facts


def normalised(rows: list[list[float]]) -> list[float]:
    """Divide each row by its sum: a random model has next to nothing on the scores."""
    return (np.array(rows) / np.sum(rows, 1, keepdims=True)).ravel().tolist()


def share_of(owner, name: str, run) -> float:
    """Return which share of the time of run() the calls of owner.name take; each is waited for."""
    function = getattr(owner, name)
    times = [now()]  # of the start, then before and after each call, then of the end

    def timed(*args, **options):
        times.append(now())
        found = function(*args, **options)
        times.append(now())
        return found

    with patch.object(owner, name, timed):
        run()
    return sum(np.diff(times)[1::2]) / (now() - times[0])


def take_turns(ways: dict, task: dict, args, deadline: float, save) -> None:
    """Let the ways take turns, ours first; nothing is begun that would outlast the deadline.

    task: what is known of it; its `ways` get seconds and peak memory. Raises Fault where results differ.
    """
    task["ways"] = {name: {"seconds": [], "took": 0} for name in ways}
    expected = {}
    tolerance = 5e-2 if args.bf16 else 1e-4
    for turn, name in itertools.product(range(args.rounds + 1), ways):
        way = task["ways"][name]
        if time.time() + way["took"] > deadline:
            continue
        gc.collect()  # a trainer holds its AdamW in a cycle
        started = now()
        if turn == 0 and (ON_GPU or "flops" in task):  # to measure judging would take long on a CPU
            extra, found = peak_of(ways[name])
            way["peak"] = task["weights"] + extra
        else:
            found = ways[name]()
        way["took"] = now() - started
        seconds = found.pop("seconds", way["took"])
        expected = expected or found
        for key in sorted(found.keys() & expected.keys()):
            if not np.allclose(found[key], expected[key], tolerance, tolerance):  # NaN is close to nothing
                raise runs.Fault(f"{name}: {key} is {found[key]}, ours {expected[key]}")
        print(f"{name}, turn {turn}: {seconds:.2f} s", flush=True)
        if turn:
            way["seconds"].append(seconds)
        save()


def tables(report: dict) -> str:
    """Return the measurements as Markdown, a table a task."""
    parts = []
    for task_name, task in report["tasks"].items():
        rows = []
        for name, way in task["ways"].items():
            pairs = zip(way["seconds"], task["ways"][OURS]["seconds"], strict=False)  # some had no time left
            ratios = sorted(seconds / ours for seconds, ours in pairs)
            row = [name, "no time left", "", "", "", ""]
            if ratios:
                seconds = statistics.median(way["seconds"])
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                row[1:4] = [f"{seconds:.2f}", spread, f"{task['tokens'] / seconds:.0f}"]
                if "flops" in task and not report["device"].startswith("CPU"):
                    row[4] = f"{task['flops'] / seconds / cost.PEAK:.2%}"
            if "peak" in way:
                row[5] = f"{way['peak'] / 2**30:.2f} GiB"
            rows.append(row)
        head = [task_name, "s", "times as long", "tokens/s", "of an H200's FLOPS (MFU)", "peak memory"]
        filled = [column for column in range(len(head)) if any(row[column] for row in rows)]
        head, *rows = [[row[column] for column in filled] for row in [head, *rows]]
        parts += [table(head, rows), task["note"]]
    return "\n".join(parts)


def main() -> None:
    defaults = {"any other": stage1_train.DEFAULTS["any other"] | {"batch_size": 4, "lr": 0.0}}
    parser = make_training_parser(__doc__, stage=1, defaults=defaults)
    add = parser.add_argument_group("comparison").add_argument
    add("--shape", choices=CONFIGS, help="random weights of this size, and made records")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to compare")
    add("--texts", type=runs.COUNT, default=10, help="CoTs that are judged at a time")
    add("--rounds", type=runs.COUNT, default=3, help="timed turns of each way")
    add("--minutes", type=float, default=1e6, help="time for all; nothing is begun that would take longer")
    add("--table", type=Path, help="only print the tables of this JSON file")
    parser.set_defaults(out=Path("out/peers.json"))
    args = parser.parse_args()
    if args.table:
        return print(tables(runs.read_json(args.table)), end="")
    runs.check_out(args.out)
    args.grid = choose_grid(args)
    in_place = contextlib.nullcontext()
    if args.shape and args.four_bit:
        raise InputError("--4bit: is for --model")
    if args.shape:
        args.data = ROOT / "data/tiny/train.jsonl"
        in_place = patch.object(models, "load_model", partial(random_model, CONFIGS[args.shape]))
    records = read_records(args.data, args.grid, ("id", "prompt", "cot", "score"))
    if args.shape:  # as long as MT-Bench's, of 1,300 and 120 tokens
        records = [r | {"prompt": f"{r['prompt']} " * 25, "cot": f"{r['cot']} " * 2} for r in records[:100]]
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    report = {"arguments": vars(args).copy(), "device": device, "tasks": {}}

    def save() -> None:
        runs.write_whole(args.out, json.dumps(report, indent=1, default=str) + "\n")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    save()  # or fail at once
    started = time.time()
    for number, name in enumerate(args.tasks, 1):
        with in_place:
            num_cots = TASKS[name]  # 0 for training
            ways, task = ways_to_judge(args, records, num_cots) if num_cots else ways_to_train(args, records)
        report["tasks"][name] = task
        deadline = started + 60 * args.minutes * number / len(args.tasks)
        take_turns(ways, task, args, deadline, save)
        if name != "training" and time.time() < deadline:
            copying = share_of(DynamicLayer, "update", ways[OURS])
            reading = share_of(writing, "read_scores", ways[OURS])
            task["note"] = f"Of our time {copying:.1%} copies the cache, {reading:.1%} reads scores.\n"
            save()
        del ways  # and with them the model
        gc.collect()
    print(tables(report), end="")


if __name__ == "__main__":
    runs.run(main)
