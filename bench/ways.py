"""The ways to train and to judge that bench/peers.py compares; each returns what it found, and its seconds.

Training: an optimiser step here; in the authors' style, with logits for all positions; of Hugging Face's
Trainer with that loss; of TRL's SFTTrainer, which has CE alone. Judging: predict.py's loop, made to write the
CoTs of the data; transformers' generate, which writes as long, and a pass over each of those texts.
"""

import itertools
import time
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import cost  # which puts the repository into sys.path
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from memory import estimate, shape_of
from transformers.cache_utils import DynamicLayer

import stage1_train
from tract import models, ranks, training, writing
from tract.batch import left_pad
from tract.encode import encode, encode_prefix
from tract.options import make_judging_parser
from tract.records import InputError
from tract.text import encode_prompt

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


def authors_step(model, window: list, scores: dict, optimiser, args) -> dict:
    """Do what stage1_train.take_step does, with the authors' loss."""
    with models.autocast(args.bf16):
        loss = authors_loss(model, stage1_train.collate(window), **scores)
    loss.backward()
    norm = ranks.clip(model, args.clip)
    optimiser.step()
    optimiser.zero_grad()
    return {"loss": float(loss.detach()), "grad_norm": float(norm)}


def with_loop(take_step, model, windows: list, scores: dict, args) -> dict:
    """Take a step for each window; return what the last one has found, and its seconds."""
    optimiser, _ = training.make_optimiser(model, args, len(windows))
    clock = Clock()
    for window in windows:
        clock.on_step_begin(model=model)
        found = take_step(model, window, scores, optimiser, args)
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

        rows = [{"input_ids": [*e.ids], "labels": [-100] * e.start + [*e.ids[e.start :]]} for e in examples]
        data = Dataset.from_list(rows)
        options = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(model, options, train_dataset=data, processing_class=args.tokenizer)
    else:
        options = transformers.TrainingArguments(**settings)
        trainer = transformers.Trainer(model, options, stage1_train.collate, examples)
        trainer.compute_loss = lambda model, batch, **rest: authors_loss(model, batch, **scores)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    for module, name in itertools.product(model.modules(), ("forward", "_is_accelerate_prepared")):
        vars(module).pop(name, None)  # what they put around the model's own forward goes again
    last = trainer.state.log_history[-2]  # [-1] sums up
    found = {"ce": last["loss"]} if is_trl else {"loss": last["loss"], "grad_norm": last["grad_norm"]}
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
    ways = {
        OURS: partial(with_loop, stage1_train.take_step, *given),
        "authors' style": partial(with_loop, authors_step, *given),
        "Hugging Face Trainer, the same loss": partial(with_trainer, False, *given),
    }
    if find_spec("trl"):
        ways["TRL SFTTrainer, CE alone"] = partial(with_trainer, True, *given)
    plain = shape_of(model.config)  # without adapters
    shape = (len(window), len(window[-1].ids), max(example.n_supervised for example in window))
    peak = sum(estimate(plain, args.lora, shape, args.bf16, checkpointing, args.four_bit).values())
    facts = {
        "tokens": sum(len(example.ids) for example in window),
        "flops": sum(cost.training(plain, args.lora, False, e.start, e.n_supervised) for e in window),
        "weights": sum(weight.nbytes for weight in model.parameters()),
        "note": f"Our peak, as bench/memory.py estimates it: {peak / 2**30:.2f} GiB.\n",
    }
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
        started = now()
        with patch.multiple(writing, sample=dictated, random_numbers=numbers):
            cots = sorted(writing.write(loaded, prompts, list(written), settings, len(written)))
        return found([scores.probs for _, _, scores in cots], started)

    @torch.inference_mode()
    def authors() -> dict:
        started = now()
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
        return found(probs, started)

    def found(probs: list[list[float]], started: float) -> dict:
        seconds = now() - started
        # Each row divided by its sum: a random model has next to nothing on the scores
        return {"probs": (np.array(probs) / np.sum(probs, 1, keepdims=True)).ravel(), "seconds": seconds}

    facts = {"tokens": sum(map(len, written.values())), "note": ""}
    facts["weights"] = sum(weight.nbytes for weight in loaded.model.parameters())
    return {OURS: ours, "authors' style: generate, then read each text anew": authors}, facts


def shares(judge) -> str:
    """Say which shares of the time of judge() the cache and the scores take; each call is waited for."""
    spent = {DynamicLayer.update: 0.0, writing.read_scores: 0.0}

    def timed(function):
        def run(*args, **options):
            started = now()
            found = function(*args, **options)
            spent[function] += now() - started
            return found

        return run

    copying = patch.object(DynamicLayer, "update", timed(DynamicLayer.update))
    reading = patch.object(writing, "read_scores", timed(writing.read_scores))
    with copying, reading:
        seconds = judge()["seconds"]
    cache, scores = (part / seconds for part in spent.values())
    return f"Of our time {cache:.1%} copies the cache, {scores:.1%} reads scores.\n"
