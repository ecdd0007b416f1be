"""Stage 1: fine-tune the seed model on annotated CoTs with the CoT-RAFT loss → p_s. Owns the one training loop.

    python stage1_train.py                                   # the embedded task, a minute or two on a laptop CPU
    python stage1_train.py --model mistral-7b                # Mistral-7B-Instruct-v0.2 on Feedback Collection
    python stage1_train.py --model SEED --data train.jsonl --out out/run/stage1

Writes an ordinary Hugging Face checkpoint to --out, or with LoRA (the 7B and 8B models) an ordinary PEFT adapter, with
log.jsonl (a line a step) and, last, run.json. Until then the folder is called OUT.part. The defaults shown below are those of
the --model given; without one, of the embedded task. With --dry-run it says what it would do and loads no weights.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

import models
import records
import runs
from gen_cot import Sampling, judge
from loss import Loss, cot_raft_loss, rail
from models import LOGITS, Lora, device, has_bf16, head, load_tokenizer
from records import TINY_SEED, Example, Grid, Spool
from runs import Fault, InputError

# The paper's settings (arXiv 2503.04381, appendix, with LLaMA-Factory's defaults where it is silent) and those of the
# embedded task, where a model of 0.4 M parameters has to learn from 1,500 records.
PAPER = dict(
    data=str(runs.ROOT / "data/feedback_collection/train.jsonl"),
    lr=1e-5, epochs=2, batch_size=1, accumulation=8, warmup=0.1, weight_decay=0.0, gradient_checkpointing=True,
)  # fmt: skip
EMBEDDED = dict(
    data=str(runs.ROOT / "data/tiny/train.jsonl"),
    lr=1e-3, epochs=4, batch_size=16, accumulation=1, warmup=0.05, weight_decay=0.01, gradient_checkpointing=False,
)  # fmt: skip
LORA_BY_DEFAULT = ("mistral-7b", "llama-3.1-8b", "prometheus-2-7b")


# ------------------------------------------------------------------------------------------------------ the batches


class Examples(Spool):
    """Encoded sequences; in memory is how long each is, and how much of it carries loss."""

    def __init__(self):
        super().__init__()
        self.lengths, self.supervised = array("q"), array("q")

    def append(self, example: Example) -> None:
        super().append(example)
        self.lengths.append(len(example.ids))
        self.supervised.append(example.supervised)


def collate(examples: list[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded batch. `predicts` marks the supervised rows: positions whose *next* token carries loss.

    There is no attention mask: causal attention never looks to the right, and padding rows are never supervised. What is
    padding goes by length, not by token, for padding may well equal end of sequence.
    """
    longest = max(len(e.ids) for e in examples)
    input_ids = torch.full((len(examples), longest), pad_id)  # (B, T)
    predicts, is_score = torch.zeros(2, *input_ids.shape, dtype=torch.bool)
    for b, e in enumerate(examples):
        input_ids[b, : len(e.ids)] = torch.tensor(e.ids)
        predicts[b, e.start - 1 : len(e.ids) - 1] = True
        if e.score_position is not None:
            is_score[b, e.score_position - 1] = True
    return {
        "input_ids": input_ids.to(device()),
        "predicts": predicts.to(device()),  # (B, T) bool, R of them True
        "targets": input_ids.roll(-1, 1)[predicts].to(device()),  # (R,)
        "is_score": is_score[predicts].to(device()),  # (R,)
        "true_scores": torch.tensor([e.score for e in examples if e.score is not None], device=device()),  # (B,)
    }


def supervised_rows(model, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states of the supervised rows alone, (R, D): the head never sees prompt or padding, most of a batch."""
    hidden = model.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return hidden[batch["predicts"]]  # (B, T, D) → (R, D)


def in_parts(
    hidden: Tensor, batch: dict[str, Tensor], vocabulary: int, logits: int = LOGITS
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The supervised rows, as many at a time as have so many logits, with what the loss wants to know of them."""
    rows = max(1, logits // vocabulary)
    is_score = batch["is_score"].split(rows)
    true_scores = batch["true_scores"].split([int(part.sum()) for part in is_score])
    parts = zip(hidden.split(rows), batch["targets"].split(rows), is_score, true_scores, strict=True)
    for part, *of_part in parts:
        yield part, dict(zip(("targets", "is_score", "true_scores"), of_part, strict=True))


def windows(lengths: list[int], size: int, seed: int) -> list[list[int]]:
    """One epoch: indices in windows of `size`, one an optimiser step, of similar length, in random order.

    Shuffled, then sorted by length within stretches of 50 windows: little padding, and still another mix every epoch.
    """
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=random).tolist()
    stretches = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    order = [i for stretch in stretches for i in sorted(stretch, key=lambda i: lengths[i])]
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    return [steps[i] for i in torch.randperm(len(steps), generator=random).tolist()]


# --------------------------------------------------------------------------------------------------------- the loop

LESS_MEMORY = (
    "lower --batch-size and raise --accumulation by the same factor (the result stays the same), lower --max-length, "
    "use --gradient-checkpointing, or --lora in place of --full"
)


def computing(bf16: bool) -> torch.autocast:
    """Matrix products in bf16. No weight is used twice in a pass, so there is nothing to win from keeping its bf16 copy."""
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def backward(model, batch: dict[str, Tensor], loss: Callable[..., Loss], *, bf16: bool, logits: int = LOGITS) -> Tensor:
    """Add a batch's gradients to the model's; its total loss, CE and squared error.

    The loss is a sum over rows, so head and loss can go over a few rows at a time, each part's logits being freed before
    the next: nothing of the size of rows x vocabulary is ever held. What they leave at the rows goes through the decoder once.
    """
    with computing(bf16):
        hidden = supervised_rows(model, batch)  # (R, D)
    gradients, losses = [], []
    for part, of_part in in_parts(hidden.detach(), batch, model.config.vocab_size, logits):
        part.requires_grad_()
        with computing(bf16):
            scored = loss(head(model, part), **of_part)
        scored.total.backward()
        gradients.append(part.grad)
        losses.append(torch.stack([scored.total.detach(), scored.ce, scored.squared_error]))
    hidden.backward(torch.cat(gradients))
    return torch.stack(losses).sum(0)


def make_optimiser(model, *, lr: float, warmup: float, weight_decay: float, steps: int):
    """AdamW and its schedule: a linear warm-up over the share `warmup` of the steps, then a cosine down to 0."""
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]  # norms and biases are not decayed
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    # In one pass over the weights; the default one takes several and, on a GPU, another copy of all that is trained
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)
    return optimiser, get_cosine_schedule_with_warmup(optimiser, round(warmup * steps), steps)


def train(
    model,
    optimiser,
    schedule,
    examples: Sequence[Example],
    plan: list[list[int]],
    *,
    loss: Callable[..., Loss],
    score_in_ce: bool,
    pad_id: int,
    clip: float,
    batch_size: int,
    bf16: bool,
    label: str,
    done: int = 0,
) -> Iterator[dict]:
    """One optimiser step for each window of the plan (indices of examples), `batch_size` of them at a time. Yields log lines.

    `loss` is cot_raft_loss with everything set but the batch and its divisors. Those belong to the whole step, so that loss
    and gradient are the same for every split into micro-batches. A step whose loss or gradient is not finite is not taken:
    its line says so and has None for what is not finite. The first `done` steps are skipped: an earlier run took them.
    """
    model.train()
    tokens = 0
    with tqdm(total=len(plan), initial=done, desc=label, unit="step", dynamic_ncols=True) as bar:
        for step in range(done + 1, len(plan) + 1):
            window = [examples[i] for i in plan[step - 1]]
            n_sequences = sum(e.score is not None for e in window)
            n_tokens = sum(e.supervised for e in window) - (0 if score_in_ce else n_sequences)
            of_window = partial(loss, n_tokens=n_tokens, n_sequences=n_sequences)

            parts = []
            for i in range(0, len(window), batch_size):
                batch = collate(window[i : i + batch_size], pad_id)
                try:
                    parts.append(backward(model, batch, of_window, bf16=bf16))
                except RuntimeError as error:  # torch.OutOfMemoryError is one; on a CPU there is only its text
                    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                        raise
                    size, length = batch["input_ids"].shape
                    raise Fault(
                        f"out of memory in step {step}, on {size} x {length} tokens (sequences x the longest), "
                        f"{len(batch['targets'])} of them supervised; {LESS_MEMORY}"
                    ) from None

            grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
            numbers = dict(zip(("loss", "ce", "squared_error"), torch.stack(parts).sum(0).tolist(), strict=True))
            numbers |= {"grad_norm": grad_norm, "lr": schedule.get_last_lr()[0]}
            finite = all(map(math.isfinite, numbers.values()))
            if finite:
                optimiser.step()
            else:
                numbers = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
                bar.write(f"step {step} not taken, its loss or gradient is not finite: {', '.join(e.id for e in window)}")
            schedule.step()
            optimiser.zero_grad(set_to_none=True)

            tokens += sum(len(e.ids) for e in window)
            shown = {name: f"{numbers[name]:.3f}" for name in ("loss", "ce", "squared_error") if numbers[name] is not None}
            bar.set_postfix(shown | {"tok_s": f"{tokens / (time.time() - bar.start_t):.0f}"})
            bar.update()
            yield {"step": step, **numbers, "taken": finite}
    model.eval()


@torch.no_grad()
def evaluate(
    model, examples: Examples, *, score_ids: Tensor, score_values: Tensor, pad_id: int, batch_size: int, bf16: bool
) -> dict:
    """Teacher-forced metrics on held-out examples: CE (mean over tokens) and squared error apart, RMSE, Pearson's r."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: examples.lengths[i])
    nll, n_tokens, predicted, true = 0.0, 0, [], []
    for i in range(0, len(order), batch_size):
        batch = collate([examples[j] for j in order[i : i + batch_size]], pad_id)
        with computing(bf16):
            hidden = supervised_rows(model, batch)
        for part, of_part in in_parts(hidden, batch, model.config.vocab_size):
            with computing(bf16):
                logits = head(model, part)
            nll += float(torch.nn.functional.cross_entropy(logits.float(), of_part["targets"], reduction="sum"))
            scores = rail(logits[of_part["is_score"]], score_ids=score_ids, score_values=score_values)
            predicted += scores.expected.tolist()
        n_tokens += len(batch["targets"])
        true += batch["true_scores"].tolist()
    model.train(was_training)
    return {"ce": nll / n_tokens} | agreement(predicted, true)


def evaluate_on_own_cots(
    model, tokenizer, held: list[dict], *, grid: Grid, max_new_tokens: int, batch_size: int, seed: int, bf16: bool
) -> dict:
    """The metrics that count: on CoTs that the model writes itself, as it will have to in prediction."""
    was_training = model.training
    model.eval()
    tokens, judged = records.score_tokens(tokenizer, grid), {}
    prompts = [records.prompt_ids(tokenizer, record["prompt"]) for record in held]
    while not judged:
        try:
            with computing(bf16), torch.compiler.set_stance("force_eager"):  # else compiled anew for every length
                judged = dict(
                    judge(
                        model, tokenizer, prompts, [f"{seed}/{record['id']}" for record in held], grid=grid, tokens=tokens,
                        sampling=Sampling(max_new_tokens=max_new_tokens), with_scores=True, at_once=batch_size,
                    )
                )  # fmt: skip
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise Fault(f"out of memory while judging a held-out prompt; {LESS_MEMORY}, or --eval-size 0") from None
            batch_size //= 2
            torch.cuda.empty_cache()
    model.train(was_training)
    judged = [judged[i] for i in range(len(held))]
    unfinished = sum(not judgement.finished[0] for judgement in judged)
    predicted = [judgement.scores[0].expected for judgement in judged]
    return agreement(predicted, [record["score"] for record in held]) | {"unfinished": unfinished}


def agreement(predicted: list[float], true: list[float]) -> dict:
    both = torch.tensor([predicted, true], dtype=torch.float64)
    squared_error = float((both[0] - both[1]).square().mean())
    pearson = float(torch.corrcoef(both)[0, 1]) if len(true) > 1 else math.nan
    return {
        "n": len(true),
        "squared_error": squared_error,
        "rmse": math.sqrt(squared_error),
        "pearson": pearson if math.isfinite(pearson) else None,  # undefined where the prediction is constant
    }


def held_out(prompt: str, fraction: float, seed: int) -> bool:
    """Decided by the prompt alone: both stages hold out the same ones, and no prompt with several CoTs is on both sides."""
    digest = hashlib.sha256(f"{seed}/{prompt}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


# ------------------------------------------------------------------------------------------- stopping and going on


class State:
    """The whole state of a run under way, PART/state.pt: what a run needs to end as if it had never stopped."""

    def __init__(self, part: Path, model, optimiser, schedule):
        self.path, self.log = part / "state.pt", part / "log.jsonl"
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimiser, self.schedule = optimiser, schedule

    def save(self, step: int) -> None:
        """Write beside, flush to disk, rename: the state is the one before or the one after, whole. Raises Fault."""
        state = {"step": step, "weights": self.weights, "random": torch.get_rng_state()}
        state |= {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict()}
        beside = self.path.with_suffix(".tmp")
        try:
            with open(beside, "wb") as out:
                torch.save(state, out)
                out.flush()
                os.fsync(out.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            beside.unlink(missing_ok=True)
            raise Fault(f"{self.path}: can't be written ({str(error).splitlines()[0][:120]}); {runs.GO_ON}") from None
        beside.replace(self.path)

    def load(self) -> int:
        """Put model, optimiser, schedule and log back to where they were saved; how many steps that was, 0 for none."""
        if not self.path.is_file():
            self.log.unlink(missing_ok=True)
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parameter in self.weights.items():
                parameter.copy_(state["weights"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        lines = self.log.read_text("utf-8").splitlines(keepends=True)[: state["step"]]
        runs.write_whole(self.log, "".join(lines))
        print(f"{self.path.parent}: going on after step {state['step']}")
        return state["step"]


class StopSignal:
    """While it is entered, the first SIGINT or SIGTERM only sets `asked`; the second one stops at once."""

    def __enter__(self) -> None:
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


# -------------------------------------------------------------------------------------------------------- one stage


def make_examples(
    all_records: Sequence[dict],
    encode: Callable[[dict], Example],
    cots_of: Callable[[dict], list[str]],
    *,
    val_fraction: float,
    max_length: int,
    seed: int,
) -> tuple[Examples, Examples, set[str]]:
    """One example a (record, CoT) pair: those to train on, those held out, and the ids of those that were too long."""
    training, validation, lengths = Examples(), Examples(), {}
    for record in tqdm(all_records, desc="tokenise", unit="record", dynamic_ncols=True, delay=5, leave=False):
        side = validation if held_out(record["prompt"], val_fraction, seed) else training
        cots = cots_of(record)
        names = [record["id"]] if len(cots) == 1 else [f"{record['id']}#{k}" for k in range(1, len(cots) + 1)]
        for name, cot in zip(names, cots, strict=True):
            example = encode(record | {"id": name, "cot": cot})
            lengths[name] = len(example.ids)
            if lengths[name] <= max_length:
                side.append(example)
    return training, validation, records.too_long(lengths, max_length)


def show(tokenizer, examples: Examples, tokens: records.ScoreTokens, *, max_length: int, score_in_ce: bool) -> None:
    """What the model will be trained on: how long the sequences are, and one of them with its loss mask."""

    def spread(numbers: Sequence[int]) -> str:
        return f"{min(numbers)} to {max(numbers)}, median {statistics.median(numbers):.0f}"

    print(f"tokens a sequence: {spread(examples.lengths)} (--max-length {max_length})")
    print(f"tokens with loss:  {spread(examples.supervised)}")
    example = examples[0]
    start, score = example.start, example.score_position
    print(f"\nrecord {example.id}, {start} tokens without loss:\n{tokenizer.decode(example.ids[:start])}")
    if start < score:
        print(f"\n{score - start} tokens with CE:\n{tokenizer.decode(example.ids[start:score])}")
    print(
        f"\ntoken {score}, {'with' if score_in_ce else 'without'} CE: {tokenizer.decode([example.ids[score]])!r} "
        f"(id {example.ids[score]}). The squared error to {example.score:g} is read here, "
        f"from the probabilities of ids {' '.join(map(str, tokens.score_ids))}"
    )
    print(f"\nlast token, with CE: {tokenizer.decode([example.ids[-1]])!r} (id {example.ids[-1]})\n")


def fit(
    all_records: list[dict],
    *,
    stage: int,
    cots_of: Callable[[dict], list[str]],
    model: str,
    data: str,
    out: Path,
    overwrite: bool,
    grid: Grid,
    no_cot: bool,
    max_length: int,
    val_fraction: float,
    eval_every: int | None,
    eval_size: int,
    full: bool,
    lora_rank: int,
    lora_alpha: int,
    merge: bool,
    lam: float,
    ce_weight: float,
    mask_score: bool,
    ce_sum: bool,
    lr: float,
    warmup: float,
    weight_decay: float,
    clip: float,
    epochs: int,
    batch_size: int,
    accumulation: int,
    gradient_checkpointing: bool,
    compile_blocks: bool,
    seed: int,
    save_every: int,
    max_bad_steps: int,
    dry_run: bool,
    **facts,
) -> None:
    """Train `model` on every (record, CoT) pair and write the checkpoint to `out`. `facts` go into run.json as they are."""
    started = time.time()
    arguments = locals().copy()
    for name in ("all_records", "cots_of", "facts", "started", "dry_run"):
        del arguments[name]
    arguments |= {"grid": str(grid), "suffix": grid.suffix}
    settings = {name: value for name, value in arguments.items() if name not in ("out", "overwrite", "save_every")}
    settings |= facts | runs.model_settings(model) | {"sha256": runs.sha256(data), "stage": stage}
    settings = json.loads(json.dumps(settings, default=str))
    runs.choose_out(out, overwrite)
    torch.manual_seed(seed)

    # Records → examples
    tokenizer = load_tokenizer(model)
    tokens = records.score_tokens(tokenizer, grid)
    encode = partial(records.encode, tokenizer, grid=grid, score_ids=tokens.score_ids, no_cot=no_cot)
    training, validation, too_long = make_examples(
        all_records, encode, (lambda record: [""]) if no_cot else cots_of,
        val_fraction=val_fraction, max_length=max_length, seed=seed,
    )  # fmt: skip
    if not training:
        raise InputError(f"{data}: nothing to train on; all its records are held out, too long or without a CoT")
    counts = {"tokens": sum(training.lengths), "supervised_tokens": sum(training.supervised)}
    print(
        f"{len(training)} examples to train on, {len(validation)} held out, {counts['tokens']} tokens, "
        f"{counts['supervised_tokens'] / counts['tokens']:.0%} of them supervised"
    )
    if lam and (span := grid.values[-1] - grid.values[0]) != 4:
        print(f"note: on this grid --lambda {lam * 16 / span**2:g} weighs the squared error as {lam:g} does on 1 to 5")
    side = (r for r in all_records if held_out(r["prompt"], val_fraction, seed) and r["id"] not in too_long)
    held = list(itertools.islice(side, max(eval_size, 0)))
    longest_cot = max(training.supervised)

    # Epochs → steps
    size = batch_size * accumulation
    plan = [window for epoch in range(epochs) for window in windows(training.lengths, size, seed + epoch)]

    # Will it fit?
    lora = None if full else Lora(lora_rank, lora_alpha)
    micro = [window[i : i + batch_size] for window in plan for i in range(0, len(window), batch_size)]
    largest = max(micro, key=lambda batch: len(batch) * max(training.lengths[i] for i in batch))
    expect = partial(
        models.expected_memory, model, lora, sequences=len(largest), length=max(training.lengths[i] for i in largest),
        supervised=sum(training.supervised[i] for i in largest), bf16=has_bf16(),
    )  # fmt: skip
    expected = expect(gradient_checkpointing=gradient_checkpointing)
    there = models.memory_there()
    print(f"expected memory, an estimate: {expected}; {device()} has {there / 2**30:.2f} GiB")
    if expected.total > there:
        print(f"this will hardly fit: {LESS_MEMORY}")
    elif gradient_checkpointing and (kept := expect(gradient_checkpointing=False)).total < 0.8 * there:
        print(f"--no-gradient-checkpointing would be faster and take {kept.total / 2**30:.2f} GiB, an estimate too")
    if dry_run:
        show(tokenizer, training, tokens, max_length=max_length, score_in_ce=not mask_score)
        print(json.dumps(arguments, indent=1, default=str, ensure_ascii=False))
        runs.report(sorted(too_long), f"left out, longer than --max-length {max_length}")
        print(f"{len(plan)} steps; nothing was loaded and nothing written")
        return

    # A run that was cut off here goes on, if it was the same
    part = Path(f"{out}.part")
    part.mkdir(parents=True, exist_ok=True)
    kept = runs.lock(part / "lock")
    if overwrite:
        (part / "state.pt").unlink(missing_ok=True)
    if (part / "state.pt").is_file():
        runs.same_settings(part, json.loads((part / "settings.json").read_text("utf-8")), settings)
    runs.write_whole(part / "settings.json", json.dumps(settings))

    # Seed model → p_s (stage 1) or p_tract (stage 2)
    network = models.load_for_training(model, lora)
    if gradient_checkpointing:
        models.checkpoint_activations(network)
    if compile_blocks:
        models.compile_blocks(network)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    score_ids = torch.tensor(tokens.score_ids, device=device())
    score_values = torch.tensor(grid.values, device=device())

    loss = partial(
        cot_raft_loss, score_ids=score_ids, score_values=score_values,
        lam=lam, ce_weight=ce_weight, score_in_ce=not mask_score, ce_sum=ce_sum,
    )  # fmt: skip
    optimiser, schedule = make_optimiser(network, lr=lr, warmup=warmup, weight_decay=weight_decay, steps=len(plan))

    state = State(part, network, optimiser, schedule)
    done, bad_steps, loop_started, stop = state.load(), 0, time.time(), StopSignal()
    lines = train(
        network, optimiser, schedule, training, plan, loss=loss, score_in_ce=not mask_score, pad_id=pad_id, clip=clip,
        batch_size=batch_size, bf16=has_bf16(), label=f"stage {stage}", done=done,
    )  # fmt: skip
    every = eval_every or len(plan) // epochs
    with stop, closing(lines), open(part / "log.jsonl", "a", encoding="utf-8", buffering=1) as log:
        for line in lines:
            if validation and (line["step"] % every == 0 or line["step"] == len(plan)):
                line["held_out"] = evaluate(
                    network, validation, score_ids=score_ids, score_values=score_values,
                    pad_id=pad_id, batch_size=batch_size, bf16=has_bf16(),
                )  # fmt: skip
                if held and not no_cot:
                    line["own_cots"] = evaluate_on_own_cots(
                        network, tokenizer, held, grid=grid, max_new_tokens=min(1024, 2 * longest_cot),
                        batch_size=max(batch_size, 16), seed=seed, bf16=has_bf16(),
                    )  # fmt: skip
            log.write(json.dumps(line) + "\n")
            bad_steps = 0 if line["taken"] else bad_steps + 1
            if line["step"] % save_every == 0 or bad_steps == max_bad_steps or stop.asked:
                os.fsync(log.fileno())  # the log may be ahead of the state, never behind
                state.save(line["step"])
            if bad_steps == max_bad_steps:
                raise Fault(f"{part}: stopped after {bad_steps} steps in a row that were not finite; try a lower --lr")
            if stop.asked:
                raise KeyboardInterrupt(f"{part}: stopped after step {line['step']}; the same command goes on from there")
    seconds = time.time() - loop_started

    # Checkpoint, then run.json, then the final name: a folder called `out` is always whole
    state.save(len(plan))
    try:
        network.save_pretrained(part)
        tokenizer.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # peft's model card, a form to fill in
        peak = models.peak_memory()
        if merge and lora:
            models.merged(str(part)).save_pretrained(part / "merged")
            tokenizer.save_pretrained(part / "merged")
    except SafetensorError as error:
        raise Fault(f"{part}: the checkpoint can't be written ({error}); {runs.GO_ON}") from None
    log = [json.loads(line) for line in (part / "log.jsonl").read_text("utf-8").splitlines()]
    metrics = {name: log[-1].get(name) for name in ("held_out", "own_cots")}
    runs.write_run(
        part / "run.json", arguments=arguments, inputs=[data], started=started, stage=stage,
        grid=str(grid), suffix=grid.suffix, no_cot=no_cot,
        counts=counts | {"trained": len(training), "held_out": len(validation), "too_long": len(too_long)},
        **metrics, last_step=log[-1], steps_not_taken=sum(not line["taken"] for line in log),
        resumed_after_step=done, tokens_per_second=round(sum(training.lengths[i] for w in plan[done:] for i in w) / seconds),
        expected_memory_bytes=expected._asdict(), peak_memory_bytes=peak, device=str(device()), bf16=has_bf16(), **facts,
    )  # fmt: skip
    if merge and lora:
        shutil.copy(part / "run.json", part / "merged/run.json")
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)
    for leftover in ("state.pt", "settings.json", "lock"):
        (out / leftover).unlink(missing_ok=True)
    kept.close()
    for name, values in metrics.items():
        if values:
            shown = (f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
            print(f"{ON[name]:24} {'  '.join(shown)}")
    runs.report(sorted(too_long), f"left out, longer than --max-length {max_length}")
    print(f"{out}: stage {stage} done in {time.time() - started:.0f} s")


ON = {"held_out": "held out, CoTs as given:", "own_cots": "held out, own CoTs:"}


def fit_each(all_records: list[dict], *, lam: list[float], out: Path, overwrite: bool, dry_run: bool, **options) -> None:
    """`fit` with each λ, where there are several: to OUT.lambda-λ, of which the best becomes OUT.

    The best has the lowest RMSE on self-generated CoTs of held-out prompts (without CoT, on held-out prompts).
    """
    options |= {"overwrite": overwrite, "dry_run": dry_run}
    if len(lam) == 1 or dry_run:
        fit(all_records, lam=lam[0], out=out, **options)
        return
    runs.choose_out(out, overwrite)
    tried = {}
    for value in lam:
        own = Path(f"{out}.lambda-{value:g}")
        if (run := runs.read_run(str(own))) and not overwrite:
            now = options | {"grid": str(options["grid"]), "sha256": runs.sha256(options["data"])}
            now = json.loads(json.dumps(now, default=str))
            before = run["arguments"] | {"overwrite": overwrite, "sha256": run["inputs"][options["data"]]}
            runs.same_settings(own, *({k: of[k] for k in before if k in now} for of in (before, now)))
        else:
            fit(all_records, lam=value, out=own, **options)
        tried[value] = runs.read_run(str(own))
    judged_on = "held_out" if options["no_cot"] else "own_cots"
    if not all(run[judged_on] for run in tried.values()):
        raise InputError(f"{out}: no prompt is held out to choose λ on; raise --val-fraction")
    print(f"\n{'λ':>6}  {'RMSE, own CoTs':>14}  {'r':>6}  {'RMSE, CoTs as given':>19}  {'r':>6}")
    for value, run in tried.items():
        cells = [run[on][metric] if run[on] else None for on in ("own_cots", "held_out") for metric in ("rmse", "pearson")]
        cells = ["–" if cell is None else f"{cell:.3f}" for cell in cells]
        print(f"{value:>6g}  {cells[0]:>14}  {cells[1]:>6}  {cells[2]:>19}  {cells[3]:>6}")
    best = min(tried, key=lambda value: tried[value][judged_on]["rmse"])
    chosen = Path(f"{out}.lambda-{best:g}")
    lambdas = {f"{value:g}": {on: run[on] for on in ("own_cots", "held_out")} for value, run in tried.items()}
    runs.write_whole(chosen / "run.json", json.dumps(tried[best] | {"lambdas": lambdas}, indent=2, ensure_ascii=False) + "\n")
    if out.exists():
        shutil.rmtree(out)
    chosen.rename(out)
    print(f"{out}: λ = {best:g}; the others stay beside it")


def weights(text: str) -> list[float]:
    """An argparse type: weights, separated by commas."""
    return [runs.WEIGHT(part) for part in text.split(",")]


def make_parser(description: str, *, stage: int) -> argparse.ArgumentParser:
    """The options of both training stages. Which defaults they have depends on --model, so that is looked at first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default=TINY_SEED)
    model = first.parse_known_args()[0].model
    seed = runs.read_run(model).get("arguments", {}).get("model", model)  # p_s is trained on as its seed was (A.4)
    embedded = Path(seed).resolve() == Path(TINY_SEED)
    large = models.resolve(seed) in map(models.resolve, LORA_BY_DEFAULT)
    data = {} if stage == 1 else {"data": "out/cots.jsonl"}

    parser = argparse.ArgumentParser(description=description, formatter_class=runs.Help, allow_abbrev=False)
    group = parser.add_argument_group("what goes in and out")
    group.add_argument(
        "--model", default=TINY_SEED, help=f"seed model: a folder, a hub id or one of {', '.join(records.MODELS)}"
    )
    group.add_argument("--data", help="JSONL file of records")
    group.add_argument("--out", type=Path, default=Path(f"out/stage{stage}"), help="folder of the checkpoint")
    group.add_argument("--no-cot", action="store_true", help="train on the score alone, without any CoT")
    group.add_argument("--val-fraction", type=runs.SHARE, default=0.05, help="share of the prompts held out, chosen by --seed")
    group.add_argument(
        "--eval-every", type=runs.COUNT, help="steps after which held-out prompts are judged; None: after each epoch"
    )
    group.add_argument("--eval-size", type=int, default=100, help="held-out records judged with self-generated CoTs")
    group.add_argument("--dry-run", action="store_true", help="say what would be trained on and what it takes; load no weights")
    group = parser.add_argument_group("what is trained")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--full", action="store_true", help="all weights, in fp32")
    either.add_argument("--lora", action="store_false", dest="full", help="adapters on all linear layers; the base is frozen")
    group.add_argument("--lora-rank", type=runs.COUNT, default=Lora().rank, help="of the adapters")
    group.add_argument("--lora-alpha", type=runs.COUNT, default=Lora().alpha, help="adapters are scaled by alpha / rank")
    group.add_argument("--merge", action="store_true", help="with LoRA: also write the merged model, in fp32, to OUT/merged")
    group = parser.add_argument_group("loss: ce-weight · CE + λ · squared error")
    group.add_argument(
        "--lambda",
        dest="lam",
        type=weights,
        default="1",
        help="λ, weight of the squared error; 0 leaves CE; of several, as in 0.3,1,3, the best is kept",
    )
    group.add_argument("--ce-weight", type=runs.WEIGHT, default=1.0, help="weight of the cross-entropy; 0 leaves pure RAFT")
    group.add_argument(
        "--mask-score", action="store_true", help="keep the score token out of the CE, as the authors' code does"
    )
    group.add_argument(
        "--ce-sum", action="store_true", help="CE summed over a sequence, as in the formula, not its mean over tokens"
    )
    group = parser.add_argument_group("optimiser")
    group.add_argument("--lr", type=runs.WEIGHT, help="peak learning rate of AdamW")
    group.add_argument("--epochs", type=runs.COUNT, help="passes over the data")
    group.add_argument("--batch-size", type=runs.COUNT, help="sequences on the device at a time")
    group.add_argument("--accumulation", type=runs.COUNT, help="batches an optimiser step")
    group.add_argument("--warmup", type=runs.SHARE, help="share of the steps with rising learning rate; a cosine follows")
    group.add_argument("--weight-decay", type=runs.WEIGHT, help="of weight matrices")
    group.add_argument("--clip", type=runs.WEIGHT, default=1.0, help="largest norm of the gradient")
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations: slower, far less memory",
    )
    group.add_argument(
        "--compile", action="store_true", dest="compile_blocks", help="torch.compile the blocks: later to start, then faster"
    )
    group.add_argument(
        "--save-every", type=runs.COUNT, default=200, help="steps after which the whole state is saved, to go on from"
    )
    group.add_argument(
        "--max-bad-steps", type=runs.COUNT, default=10, help="stop after this many steps in a row that are not finite"
    )
    runs.add_common_arguments(parser)
    parser.set_defaults(**(EMBEDDED if embedded else PAPER) | data | {"full": not large})
    return parser


def main() -> None:
    args = make_parser(__doc__, stage=1).parse_args()
    args.grid = records.choose_grid(args.grid, vars(args).pop("suffix"), args.model)
    need = ("id", "prompt", "score") if args.no_cot else ("id", "prompt", "cot", "score")
    fit_each(
        records.read_records(args.data, grid=args.grid, need=need),
        stage=1,
        cots_of=lambda record: [record["cot"]],
        **vars(args),
    )


if __name__ == "__main__":
    runs.run(main)
