"""The training step against what people would use instead: the same losses and gradients, how long and in how much memory?

    python bench/train_step.py --vocabulary 32000                     # a small random model, a minute or two on a CPU
    python bench/train_step.py --model llama-3.2-1b --data train.jsonl --ways rows,authors,trainer

Ways to take the same optimiser steps, all in fp32 or bf16 autocast, all with AdamW and clipping:

    parts     this repository: head and loss on the supervised rows, a few at a time
    rows      the same with all supervised rows at once
    kept      parts, without recomputing the blocks
    packed    parts, all sequences of a batch in one row without padding, each attending to itself alone
    compiled  parts, every block compiled
    authors   this loop with logits for all positions, in fp32, as in the authors' release
    trainer   Hugging Face's Trainer with that loss
    trl       TRL's SFTTrainer, which has CE only; compared with ours at λ = 0 (pip install trl==1.16.0)

First all ways must agree on the loss of every step, and those in our loop on the gradients. Then they take turns, --rounds
times. Ends with one JSON line.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AttentionInterface, Trainer, TrainerCallback, TrainingArguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import machine  # noqa: E402
import workload  # noqa: E402

import models  # noqa: E402
import records  # noqa: E402
import runs  # noqa: E402
import stage1_train  # noqa: E402
from loss import Loss, rail  # noqa: E402
from models import has_bf16  # noqa: E402
from records import Example, Grid  # noqa: E402

LR, CLIP = 1e-4, 1.0
ours = stage1_train.backward  # the name in stage1_train is replaced while another way is measured


# ------------------------------------------------------------------------------------------------------- the ways


def full_logits_loss(logits: torch.Tensor, batch: dict, loss: Callable[..., Loss]) -> Loss:
    """The loss as the authors' release takes it: logits (B, T, V) of all positions, in fp32, most of them then ignored."""
    settings = loss.keywords
    logits = logits.float()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["predicts"]] = batch["targets"]
    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / settings["n_tokens"]
    at_score = torch.zeros_like(batch["predicts"])
    at_score[batch["predicts"]] = batch["is_score"]
    expected = rail(logits[at_score], score_ids=settings["score_ids"], score_values=settings["score_values"]).expected
    squared_error = (expected - batch["true_scores"]).square().sum() / settings["n_sequences"]
    return Loss(ce + settings["lam"] * squared_error, ce.detach(), squared_error.detach())


def authors(model, batch: dict, loss: Callable[..., Loss], *, bf16: bool) -> torch.Tensor:
    with stage1_train.computing(bf16):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    found = full_logits_loss(logits, batch, loss)
    found.total.backward()
    return torch.stack([found.total.detach(), found.ce, found.squared_error])


def own_sequence_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, lengths=None, **kwargs):
    """Attention of packed sequences (1, heads, T, width), each over itself alone."""
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    gqa = query.shape[1] != key.shape[1]
    out = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=gqa) for part in parts]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def packed(model, batch: dict, loss: Callable[..., Loss], *, bf16: bool) -> torch.Tensor:
    lengths = batch["attention_mask"].sum(-1)
    real = batch["attention_mask"].bool()
    one = {name: batch[name][real][None] for name in ("input_ids", "predicts")}
    one |= {name: batch[name] for name in ("targets", "is_score", "true_scores")}
    positions = torch.cat([torch.arange(n, device=real.device) for n in lengths.tolist()])[None]
    decoder = model.get_decoder()

    def supervised_rows(model, batch):
        hidden = decoder(
            input_ids=batch["input_ids"], position_ids=positions, use_cache=False, lengths=lengths.tolist()
        ).last_hidden_state  # fmt: skip
        return hidden[batch["predicts"]]

    implementation = model.config._attn_implementation
    model.set_attn_implementation("own_sequence")
    try:
        with machine.replaced(stage1_train, supervised_rows=supervised_rows):
            return ours(model, one, loss, bf16=bf16)
    finally:
        model.set_attn_implementation(implementation)


AttentionInterface.register("own_sequence", own_sequence_attention)


def collate(examples: list[Example], pad_id: int, real=stage1_train.collate) -> dict[str, torch.Tensor]:
    """Stage 1's batch, with the attention mask that the others want."""
    batch = real(examples, pad_id)
    lengths = torch.tensor([len(e.ids) for e in examples], device=batch["input_ids"].device)
    mask = torch.arange(batch["input_ids"].shape[1], device=lengths.device) < lengths[:, None]
    return batch | {"attention_mask": mask.long()}


def loop(model, examples, plan, *, backward, loss, options, lr: float = LR) -> tuple[list[float], list[float]]:
    """Losses and seconds of stage 1's steps, with `backward` in the place of its own."""
    optimiser, schedule = stage1_train.make_optimiser(model, lr=lr, warmup=0.0, weight_decay=0.0, steps=len(plan))
    losses, times = [], []
    with machine.replaced(stage1_train, backward=backward, collate=collate, tqdm=partial(tqdm, file=open(os.devnull, "w"))):
        lines = stage1_train.train(
            model, optimiser, schedule, examples, plan, loss=loss, score_in_ce=True, pad_id=0, clip=CLIP,
            batch_size=options.sequences, bf16=has_bf16(), label="",
        )  # fmt: skip
        started = time.perf_counter()
        for line in lines:
            machine.synchronise()
            times.append(time.perf_counter() - started)
            losses.append(line["loss"])
            started = time.perf_counter()
    return losses, times


class Clock(TrainerCallback):
    """When each step of a Trainer began and ended."""

    def __init__(self):
        self.times, self.started = [], 0.0

    def on_step_begin(self, *args, **kwargs):
        machine.synchronise()
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        machine.synchronise()
        self.times.append(time.perf_counter() - self.started)


def trainer_settings(steps: int, options) -> dict:
    """Ours, in Trainer's words. The model comes with its blocks already set to be recomputed."""
    return dict(
        output_dir=tempfile.gettempdir(), max_steps=steps, per_device_train_batch_size=options.sequences, learning_rate=LR,
        lr_scheduler_type="cosine", warmup_steps=0, weight_decay=0.0, max_grad_norm=CLIP, bf16=has_bf16(), report_to="none",
        save_strategy="no", logging_strategy="steps", logging_steps=1, disable_tqdm=True, remove_unused_columns=False,
        gradient_checkpointing=False, use_cpu=not torch.cuda.is_available(), train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
    )  # fmt: skip


def with_trainer(model, examples, plan, *, loss, options):
    """Hugging Face's Trainer, its loss replaced by the authors' style of ours."""
    losses, clock = [], Clock()
    models.cast_by_autocast(model, False)  # as peft leaves it

    class SameLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            counts = {"n_tokens": len(inputs["targets"]), "n_sequences": len(inputs["true_scores"])}
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
            found = full_logits_loss(logits, inputs, partial(loss, **counts))
            losses.append(float(found.total.detach()))
            return found.total

    settings = TrainingArguments(**trainer_settings(len(plan), options))
    data = [examples[i] for window in plan for i in window]
    pad = partial(collate, pad_id=0)
    SameLoss(model=model, args=settings, train_dataset=data, data_collator=pad, callbacks=[clock]).train()
    return losses, clock.times


def with_trl(model, examples, plan, *, loss, options):
    """TRL's SFTTrainer on the same tokens and loss mask; its loss is CE."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    clock = Clock()
    models.cast_by_autocast(model, False)
    data = [examples[i] for window in plan for i in window]
    rows = [{"input_ids": e.ids, "labels": [-100] * e.start + e.ids[e.start :]} for e in data]
    settings = SFTConfig(
        **trainer_settings(len(plan), options), max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=options.tokenizer, callbacks=[clock]
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], clock.times


# --------------------------------------------------------------------------------------------------- the comparison


def gradients(model, way: Callable, batch: dict, loss) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    way(model, batch, loss, bf16=has_bf16())
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def keep_activations(model) -> None:
    """Undo models.checkpoint_activations."""
    getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()


def extra_memory(model, run: Callable[[], object]) -> int:
    """Bytes at the peak of one batch beyond weights and gradients: the second batch of a step, when gradients are there."""
    run()
    peak = machine.peak_of(run)
    model.zero_grad(set_to_none=True)
    return peak


def load(args) -> tuple[Callable[[], torch.nn.Module], list[Example]]:
    """What makes the model anew, always the same, and the examples."""
    if args.data:
        grid = Grid()
        args.tokenizer = models.load_tokenizer(args.model)
        ids = records.score_tokens(args.tokenizer, grid).score_ids
        rows = records.read_records(args.data, grid=grid, need=("id", "prompt", "cot", "score"))
        rows = [rows[i] for i in range(min(len(rows), args.examples))]
        examples = [records.encode(args.tokenizer, row, grid=grid, score_ids=ids) for row in rows]
        examples = [e for e in examples if len(e.ids) <= args.max_length]
        args.score_ids = ids
    else:
        vocabulary = args.vocabulary if not args.model else models.empty_model(args.model).config.vocab_size
        examples = workload.random_examples(args.examples, args.length, vocabulary)
        args.score_ids = workload.SCORE_IDS
        args.tokenizer = models.load_tokenizer(args.model or records.TINY_SEED)

    def make():
        lora = models.Lora() if args.lora else None
        if args.model and not args.random:
            model = models.load_for_training(args.model, lora)
        else:
            config = workload.shape(args.vocabulary, layers=args.layers, hidden=args.hidden)
            config = models.empty_model(args.model).config if args.model else config
            model = workload.random_model(config, torch.bfloat16 if has_bf16() and lora else torch.float32)
            torch.manual_seed(0)
            model = models.with_adapters(model, lora) if lora else model
        models.checkpoint_activations(model)
        return model.train()

    return make, examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help, allow_abbrev=False)
    parser.add_argument("--model", help="alias, folder or hub id; None: a random small one")
    parser.add_argument("--random", action="store_true", help="of --model take the shape alone")
    parser.add_argument("--vocabulary", type=runs.COUNT, default=32000, help="of the random model")
    parser.add_argument("--layers", type=runs.COUNT, default=4, help="of the random model")
    parser.add_argument("--hidden", type=runs.COUNT, default=256, help="size of the random model")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8")
    parser.add_argument("--data", help="JSONL file for stage 1; None: random tokens, a quarter of them with loss")
    parser.add_argument("--examples", type=runs.COUNT, default=16, help="of the data")
    parser.add_argument("--length", type=runs.COUNT, default=512, help="tokens of a random sequence")
    parser.add_argument("--max-length", type=runs.COUNT, default=3000, help="longer records are left out")
    parser.add_argument("--sequences", type=runs.COUNT, default=4, help="in a batch, which is a step")
    parser.add_argument("--ways", default="parts,rows,kept,authors,trainer", help="which to compare")
    parser.add_argument("--rounds", type=runs.COUNT, default=3, help="turns that each way gets")
    parser.add_argument("--threads", type=runs.COUNT, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON file to add the result to, a line; None: only print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways = args.ways.split(",")

    make, examples = load(args)
    plan = stage1_train.windows([len(e.ids) for e in examples], args.sequences, seed=0)
    plan = [window for window in plan if len(window) == args.sequences]
    used = [examples[i] for window in plan for i in window]
    loss = workload.loss_of(args.score_ids)
    plain = partial(loss.func, **loss.keywords | {"lam": 0.0})

    backwards = {
        "parts": ours, "kept": ours, "compiled": ours, "rows": partial(ours, logits=10**12), "packed": packed,
        "authors": authors,
    }  # fmt: skip
    runners = {name: partial(loop, backward=way, loss=loss, options=args) for name, way in backwards.items()}
    runners |= {"trainer": partial(with_trainer, loss=loss, options=args), "trl": partial(with_trl, loss=plain, options=args)}
    runners["parts, CE"] = partial(runners["parts"].func, backward=ours, loss=plain, options=args)
    ways += ["parts, CE"] if "trl" in ways else []

    def model_for(way: str):
        model = make()
        if way == "kept":
            keep_activations(model)
        if way == "compiled":
            models.compile_blocks(model)
        return model

    # The same losses, step by step, and the same gradients
    losses = {way: runners[way](model_for(way), examples, plan[:3])[0] for way in ways}
    for way in ways:
        reference = losses["parts, CE" if way in ("trl", "parts, CE") else "parts"]
        off = max(abs(a - b) / abs(b) for a, b in zip(losses[way], reference, strict=True))
        print(f"{way:10} losses {', '.join(f'{loss:.5f}' for loss in losses[way])}; off by {off:.1e} at most", flush=True)
        assert off < (1e-2 if has_bf16() else 1e-4), f"{way}: other losses than ours"
    batch = collate([examples[i] for i in plan[0]], 0)
    of_step = partial(loss, n_tokens=len(batch["targets"]), n_sequences=len(batch["true_scores"]))
    model, memory, off = make(), {}, {}
    own = gradients(model, ours, batch, of_step)
    for way in (way for way in ways if way in backwards):
        model = model_for(way)
        off[way] = float((gradients(model, backwards[way], batch, of_step) - own).norm() / own.norm())
        assert off[way] < (5e-2 if has_bf16() else 1e-4), f"{way}: other gradients than ours, off by {off[way]}"
        memory[way] = extra_memory(model, lambda way=way, model=model: backwards[way](model, batch, of_step, bf16=has_bf16()))

    # In turn
    times = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            _, taken = runners[way](model_for(way), examples, plan)
            times[way].append(statistics.mean(taken[1:]))  # the first step warms up
    lengths = [len(e.ids) for e in used]
    supervised, steps = sum(e.supervised for e in used), len(plan)
    longest = [max(len(examples[i].ids) for i in window) for window in plan]
    where, work = machine.machine(), machine.Work.of(model)
    found = {}
    for way in ways:
        flops, hardware = work.training(lengths, supervised, lora=args.lora, recomputed=way != "kept")
        second = statistics.median(times[way])
        found[way] = {
            "seconds": round(second, 4), "times": [round(t, 4) for t in times[way]],
            "tokens_per_second": round(sum(lengths) / steps / second),
            "mfu": round(flops / steps / second / where["peak_flops"], 4),
            "hardware": round(hardware / steps / second / where["peak_flops"], 4) if way in backwards else None,
            "extra_bytes": memory.get(way), "gradients_off": off.get(way),
            "ratio_to_parts": machine.median_ratio(times[way], times["parts, CE" if way == "trl" else "parts"]),
        }  # fmt: skip
    result = {
        "bench": "train_step", "machine": where, "arguments": {k: v for k, v in vars(args).items() if k != "tokenizer"},
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": sum(lengths), "supervised": supervised,
        "padding": round(1 - sum(lengths) / (args.sequences * sum(longest)), 4), "ways": found,
    }  # fmt: skip
    print(f"\n{'way':10} {'s/step':>8} {'ratio':>6} {'tok/s':>7} {'MFU':>6} {'extra MiB':>9}")
    for way, own in found.items():
        extra = f"{own['extra_bytes'] / 2**20:9.0f}" if own["extra_bytes"] else f"{'–':>9}"
        print(
            f"{way:10} {own['seconds']:8.3f} {own['ratio_to_parts']['median']:6.2f} {own['tokens_per_second']:7} "
            f"{own['mfu']:6.1%} {extra}"
        )
    machine.report(result, args.out)


if __name__ == "__main__":
    runs.run(main)
