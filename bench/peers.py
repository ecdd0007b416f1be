"""Compare training and judging here with what people would use instead: same weights, batches and results.

    python bench/peers.py --model out/real/smollm2 --data train.jsonl --fp32 --out results/speed/peers.json
    python bench/peers.py --shape mistral-7b --lora          # random weights of that size, no hub
    python bench/peers.py --table results/speed/peers.json   # the tables of docs/speed.md

Training: an optimiser step here; in the authors' style, with logits for all positions; of Hugging Face's
Trainer with that loss; of TRL's SFTTrainer, which has CE alone. The learning rate is 0: AdamW does its work,
but all steps meet the same weights and have to find the same loss and gradient norm. Judging: predict.py's
engine; transformers' generate, then each text read anew; vLLM where installed. The first two are made to
write the CoTs of the data, and pay for sampling; vLLM writes its own, of that length at most, and reads the
same texts. The first turn checks and measures memory, the others are timed.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import transformers
from cost import training as flops_of  # which puts the repository into sys.path
from memory import SHAPES, estimate, peak_of, random_model
from speed import dictate, make_records
from transformers.cache_utils import DynamicLayer

import stage1_train
from results.tables import table
from tract import models, ranks, runs, training, writing
from tract.batch import left_pad
from tract.encode import encode, encode_prefix, encode_prompt
from tract.examples import plan_epoch
from tract.judge import predict_from
from tract.options import make_judging_parser, make_training_parser
from tract.records import Grid, InputError, read_records

PEAK = 989e12  # FLOPs a second of an H100 or H200 in bf16, dense, by its data sheet
TASKS = {"training": 0, "judging": 1, "judging-5": 5}  # CoTs a prompt
CONFIGS = SHAPES | {"tiny": transformers.AutoConfig.from_pretrained(models.TINY_SEED)}
VLLM = {"gpu_memory_utilization": 0.2, "max_model_len": 4096, "enable_chunked_prefill": False}
OURS = "**this repository**"
ON_GPU = torch.cuda.is_available()


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(transformers.TrainerCallback):
    """Time steps. Gradients are there before, at 0: all ways add to them, so that memory can be compared."""

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


def ours(model, window: list, scores: dict, args) -> dict:
    loss, ce, _ = stage1_train.accumulate_gradients(model, window, scores, args)
    return {"loss": loss, "ce": ce}


def authors(model, window: list, scores: dict, args) -> dict:
    with torch.autocast(models.device().type, torch.bfloat16, enabled=args.bf16):
        loss = authors_loss(model, stage1_train.collate(window), **scores)
    loss.backward()
    return {"loss": loss.detach()}


def with_loop(gradients, model, windows: list, scores: dict, args) -> dict:
    """Step as stage1_train.train does; returns loss, gradient norm and seconds of the last step."""
    optimiser, _ = training.make_optimiser(model, args, len(windows))
    clock = Clock()
    for window in windows:
        clock.on_step_begin(model=model)
        found = gradients(model, window, scores, args)
        found["norm"] = ranks.clip(model, args.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        clock.on_step_end()
    return {name: float(value) for name, value in found.items()} | {"seconds": clock.seconds}


def with_trainer(is_trl: bool, model, windows: list, scores: dict, args) -> dict:
    """Do the same with Hugging Face's Trainer and the authors' loss, or with TRL's SFTTrainer and CE."""
    settings = {"max_steps": len(windows), "per_device_train_batch_size": args.batch_size, "bf16": args.bf16}
    settings |= {
        "learning_rate": 0.0,
        "max_grad_norm": args.clip,
        "use_cpu": models.device().type == "cpu",
        "logging_steps": 1,
    }
    settings |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "output_dir": "/tmp"}
    settings |= {"remove_unused_columns": False, "train_sampling_strategy": "sequential"}
    # The model recomputes activations already
    settings |= {"gradient_checkpointing": False, "dataloader_pin_memory": False}
    clock = Clock()
    data = [example for window in windows for example in window]
    if is_trl:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        ids = [list(e.ids) for e in data]
        labels = [[-100] * e.start + list(e.ids[e.start :]) for e in data]
        data = Dataset.from_dict({"input_ids": ids, "labels": labels})
        options = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(model, options, train_dataset=data, processing_class=args.tokenizer)
    else:
        options = transformers.TrainingArguments(**settings)
        trainer = transformers.Trainer(model, options, stage1_train.collate, data)
        trainer.compute_loss = lambda model, batch, **rest: authors_loss(model, batch, **scores)
    trainer.add_callback(clock)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    for module, name in itertools.product(model.modules(), ("forward", "_is_accelerate_prepared")):
        vars(module).pop(name, None)  # what they put around the model's own forward goes again
    last = trainer.state.log_history[-2]  # [-1] sums up
    found = {"ce": last["loss"]} if is_trl else {"loss": last["loss"], "norm": last["grad_norm"]}
    return found | {"seconds": clock.seconds}


def train(args, name: str, records: list[dict], num_cots: int) -> tuple[dict, dict]:
    """Return the ways to train, and what is known of the step."""
    options = [f"--batch-size={args.batch_size}", "--lr=0", "--bf16" if args.bf16 else "--fp32"]
    settings = make_training_parser("", stage=1, defaults=stage1_train.DEFAULTS).parse_args(options)
    settings.tokenizer = models.load_tokenizer(name)
    _, score_ids = writing.score_tokens(settings.tokenizer, Grid())
    model = models.load_for_training(name, args.lora, True, args.bf16)
    examples = [encode(settings.tokenizer, record, Grid(), score_ids) for record in records]
    plan = plan_epoch(examples, args.batch_size, "peers")
    plan.sort(key=lambda window: sum(len(e.ids) for e in window))
    window = plan[len(plan) // 2]
    # A step on a few tokens goes before: it makes the state of AdamW
    short = [e._replace(ids=e.ids[-16:], start=8, score_position=14) for e in window]
    given = (model, [short, window], models.score_tensors(score_ids, Grid()), settings)
    ways = {OURS: partial(with_loop, ours, *given), "authors' style": partial(with_loop, authors, *given)}
    ways["Hugging Face Trainer, the same loss"] = partial(with_trainer, False, *given)
    if find_spec("trl"):
        ways["TRL SFTTrainer, CE alone"] = partial(with_trainer, True, *given)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    flops = [flops_of(model.config, args.lora, False, e.start, e.n_supervised) for e in window]
    shape = (len(window), max(len(e.ids) for e in window), max(e.n_supervised for e in window))
    expected = sum(estimate(model.config, args.lora, shape, args.bf16, True).values())
    task = {"tokens": sum(len(e.ids) for e in window), "held": 12 * trained}  # bytes of gradients and AdamW
    if ON_GPU:
        task |= {
            "flops": sum(flops),
            "notes": [f"Our step at its peak, as estimated: {expected / 2**30:.1f} GiB\n"],
        }
    return ways, task


def judge(args, name: str, records: list[dict], num_cots: int) -> tuple[dict, dict]:
    """Return the ways to judge, and what is known of the task."""
    loaded = writing.load_judge(name, Grid(), args.bf16)
    loaded.tokenizer.positions = 10**6
    score_ids = loaded.scores["score_ids"].tolist()
    n = max(1, args.texts // num_cots)
    prompts = [encode_prompt(loaded.tokenizer, record["prompt"]) for record in records[:n]]
    prompts.sort(key=len, reverse=True)  # as predict.py does
    whole = []  # prompt, CoT and suffix as ids
    texts = {}  # name of a CoT → it and its suffix
    for i, k in itertools.product(range(len(prompts)), range(num_cots)):
        cot = records[(i + k) % len(records)]["cot"]
        whole.append(encode_prefix(loaded.tokenizer, prompts[i], cot, Grid()))
        texts[f"0/{i}/{k}"] = whole[-1][len(prompts[i]) :]
    settings = make_judging_parser("").parse_args([f"--num-cots={num_cots}", f"--batch-size={len(whole)}"])
    vars(settings).update(grid=Grid(), intervals=None)
    names = [{"id": i} for i in range(len(prompts))]

    def ours() -> dict:
        with dictate(writing, texts):
            cots = writing.write_cots(loaded, names, prompts, settings, len(whole))
        judged = predict_from(loaded, cots, settings)
        return {"probs": [probs for fields in judged for probs in fields["score_probs"]]}

    @torch.inference_mode()
    def authors() -> dict:
        ids, mask = left_pad(prompts)
        end = loaded.tokenizer.eos_token_id
        dictated = [[*text, score_ids[0], end] for text in texts.values()]

        def allowed(row: int, so_far) -> list[int]:
            return dictated[row][len(so_far) - ids.shape[1] :][:1] or [end]

        options = {name: getattr(settings, name) for name in ("temperature", "top_p", "repetition_penalty")}
        options |= {
            "use_cache": True,
            "do_sample": True,
            "top_k": 0,
            "num_return_sequences": num_cots,
            "max_new_tokens": 1024,
        }
        options |= {"eos_token_id": end, "pad_token_id": end, "prefix_allowed_tokens_fn": allowed}
        loaded.model.generate(ids, attention_mask=mask, **options)
        texts_read = [torch.tensor([text], device=models.device()) for text in whole]
        logits = [loaded.model(text).logits[0, -1].float() for text in texts_read]
        return {"probs": [each.softmax(-1)[score_ids].tolist() for each in logits]}

    ways = {OURS: ours, "authors' style: generate, then read each text anew": authors}
    if args.model and find_spec("vllm"):
        vllm = writing.load_judge(name, Grid(), args.bf16, "vllm", VLLM)
        limit = sum(map(len, texts.values())) // len(texts)
        shorter = argparse.Namespace(**vars(settings) | {"max_new_tokens": limit})

        def with_vllm() -> dict:
            writing.write_cots(vllm, names, prompts, shorter, len(whole))
            return {"probs": [rail.probs for rail in writing.score(vllm, whole)]}

        ways["vLLM"] = with_vllm
    return ways, {"tokens": sum(map(len, texts.values())), "held": 0, "notes": []}


def share_of(owner, name: str, run) -> float:
    """Return which share of the time of run() the calls of owner.name take; each is waited for."""
    function = getattr(owner, name)
    seconds = []

    def timed(*args, **options):
        started = now()
        found = function(*args, **options)
        seconds.append(now() - started)
        return found

    started = now()
    with patch.object(owner, name, timed):
        run()
    return sum(seconds) / (now() - started)


def apart(found: dict, expected: dict) -> float:
    """Return the largest difference of what both have found, relative where a number is larger than 1."""
    differences = [torch.zeros(1)]
    for name in found.keys() & expected.keys():
        both = torch.tensor([found[name], expected[name]], dtype=torch.float64)
        if name == "probs":  # a random model has next to nothing on the scores
            both = both / both.sum(-1, keepdim=True)
        differences.append((both.diff(dim=0) / both.clamp(min=1)).abs().flatten())
    return float(torch.cat(differences).max())  # NaN, if there is any


def take_turns(ways: dict, task: dict, args, deadline: float, save) -> None:
    """Let the ways take turns; nothing is begun that would outlast the deadline.

    task: what is known of it; gets its `ways`, with seconds, memory and how far each is from ours, the first.
    Raises Fault where one has not found the same.
    """
    expected = {}
    task["ways"] = {name: {"seconds": [], "differ": 0.0, "took": 0.0} for name in ways}
    for turn, name in itertools.product(range(args.rounds + 1), ways):
        way = task["ways"][name]
        if "failed" in way or time.time() + way["took"] > deadline:
            continue
        found = {}
        started = now()
        try:
            if turn == 0 and (task["held"] or ON_GPU):  # to measure judging would take long on a CPU
                way["extra_bytes"] = peak_of(lambda: found.update(ways[name]())) - task["held"]  # noqa: B023
                if ON_GPU:
                    peak = torch.cuda.max_memory_allocated() / 2**30
                    task["notes"].append(f"{name}: {peak:.1f} GiB at its peak, all included.\n")
            else:
                found.update(ways[name]())
        except torch.OutOfMemoryError:
            way["failed"] = "out of memory"
            continue
        way["took"] = now() - started
        seconds = found.pop("seconds", way["took"])
        expected = expected or found
        difference = apart(found, expected)
        print(f"{name}, turn {turn}: {seconds:.2f} s, differs by {difference:.0e}", flush=True)
        if not difference < (5e-2 if args.bf16 else 1e-4):
            raise runs.Fault(f"{name}: has found {found}, ours {expected}")
        way["differ"] = max(way["differ"], difference)
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
            row = [name, way.get("failed", "no time left"), "", "", "", "", ""]
            if ratios:
                seconds = statistics.median(way["seconds"])
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
                row[1:4] = [f"{seconds:.2f}", spread, f"{task['tokens'] / seconds:.0f}"]
                row[4] = f"{task['flops'] / seconds / PEAK:.0%}" if "flops" in task else ""
                row[5] = f"{way['extra_bytes'] / 2**20:.0f} MiB" if "extra_bytes" in way else ""
                row[6] = f"{way['differ']:.0e}"
            rows.append(row)
        head = [task_name, "s", "times as long", "tokens/s", "MFU", "extra memory", "differs by"]
        parts.append(table(head, rows))
        parts += task.get("notes", [])
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True).add_argument
    which("--model", help="checkpoint folder or hub id")
    which("--shape", choices=CONFIGS, help="random weights of this size")
    which("--table", type=Path, help="only print the tables of this JSON file")
    add("--data", type=Path, help="JSONL file of records with CoT and score; None: made, of real length")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to compare")
    add("--lora", action="store_const", const=8, help="train adapters of rank 8, not all weights")
    add("--bf16", action="store_true", default=models.has_bf16(), help="compute in bf16")
    add("--fp32", action="store_false", dest="bf16", help="compute in fp32")
    add("--batch-size", type=runs.COUNT, default=4, help="sequences of a training step")
    add("--texts", type=runs.COUNT, default=10, help="CoTs that are judged at a time")
    add("--rounds", type=runs.COUNT, default=3, help="timed turns of each way")
    add("--minutes", type=float, default=1e6, help="time for all; nothing is begun that would take longer")
    add("--out", type=Path, default=Path("out/peers.json"), help="JSON file, written after every turn")
    args = parser.parse_args()
    if args.table:
        print(tables(runs.read_json(args.table)), end="")
        return
    end = time.time() + 60 * args.minutes
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    report = {"arguments": vars(args), "device": device, "tasks": {}}
    in_place = contextlib.nullcontext()
    if args.shape:
        in_place = patch.object(models, "load_model", partial(random_model, CONFIGS[args.shape]))

    def save() -> None:
        runs.write_whole(args.out, json.dumps(report, indent=1, default=str) + "\n")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    save()  # or fail at once
    with in_place, tempfile.TemporaryDirectory() as folder:
        if not args.data:
            args.data = Path(folder, "made.jsonl")
            make_records(args.data, max(args.batch_size * 4, args.texts))
        records = read_records(args.data, Grid(), ("id", "prompt", "cot", "score"))
        if len(records) < args.batch_size:
            raise InputError(f"{args.data}: has fewer than {args.batch_size} records; lower --batch-size")
        for number, task in enumerate(args.tasks, 1):
            compare = judge if TASKS[task] else train
            ways, facts = compare(args, args.model or models.TINY_SEED, records, TASKS[task])
            report["tasks"][task] = facts
            # Half of the time that is left, the last task all of it
            deadline = end if number == len(args.tasks) else (time.time() + end) / 2
            take_turns(ways, facts, args, deadline, save)
            if ON_GPU and task == "judging":
                copying = share_of(DynamicLayer, "update", ways[OURS])
                reading = share_of(writing, "read_scores", ways[OURS])
                facts["notes"] += [
                    f"Of our time {copying:.0%} copies the cache, {reading:.0%} reads scores.\n"
                ]
                save()
            del ways  # and with them the model
    print(tables(report), end="")


if __name__ == "__main__":
    runs.run(main)
