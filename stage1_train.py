"""Stage 1: fine-tune the seed model on annotated CoTs with the CoT-RAFT loss → p_s. Owns the one training loop.

    python stage1_train.py                                   # the embedded task, a minute or two on a laptop CPU
    python stage1_train.py --model mistral-7b                # Mistral-7B-Instruct-v0.2 on Feedback Collection
    python stage1_train.py --model SEED --data train.jsonl --out out/run/stage1

Writes an ordinary Hugging Face checkpoint to --out, with log.jsonl (a line a step) and, last, run.json. Until then the
folder is called OUT.part. The defaults shown below are those of the --model given; without one, of the embedded task.
"""

import argparse
import hashlib
import json
import math
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup
from transformers.utils import logging as transformers_logging

import records
from loss import Loss, cot_raft_loss, rail
from records import IGNORE, TINY_SEED, Example, InputError

# The paper's settings (arXiv 2503.04381, appendix, with LLaMA-Factory's defaults where it is silent) and those of the
# embedded task, where a model of 0.4 M parameters has to learn from 1,500 records.
PAPER = dict(
    data=str(records.ROOT / "data/feedback_collection/train.jsonl"),
    lr=1e-5, epochs=2, batch_size=1, accumulation=8, warmup=0.1, weight_decay=0.0, gradient_checkpointing=True,
)  # fmt: skip
EMBEDDED = dict(
    data=str(records.ROOT / "data/tiny/train.jsonl"),
    lr=2e-3, epochs=4, batch_size=16, accumulation=1, warmup=0.05, weight_decay=0.01, gradient_checkpointing=False,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ loading the model


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bf16() -> bool:
    """bf16 where the hardware computes in it; on a CPU it is mostly slower, so fp32 there."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def load_tokenizer(name: str):
    """Tokenizer of an alias, a checkpoint folder or a hub id. Raises InputError where there is none."""
    name = records.MODELS.get(name, name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{name}: a folder, but no checkpoint (no config.json in it); give the --out of a training stage")
    transformers_logging.set_verbosity_error()  # its tracebacks and hints would bury our one line
    transformers_logging.disable_progress_bar()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: neither a checkpoint folder nor a model that can be had from the hub; known names are "
            f"{', '.join(records.MODELS)} ({str(error).splitlines()[0][:120]})"
        ) from None


def load_model(name: str, *, dtype: torch.dtype):
    """Causal language model of an alias, a checkpoint folder or a hub id, on the device, in eval mode."""
    name = records.MODELS.get(name, name)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device()).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: its weights can't be loaded ({str(error).splitlines()[0][:160]})") from None
    # The loss applies the head to supervised rows alone; that is the whole model only if nothing comes after the head.
    ids = torch.arange(3, device=device())[None]
    with torch.no_grad():
        if not torch.allclose(head(model, model.get_decoder()(ids).last_hidden_state), model(ids).logits, rtol=1e-2, atol=1e-2):
            raise InputError(
                f"{name}: scales or caps its logits after the head, which this code does not follow; choose another"
            )
    return model


def head(model, hidden: Tensor) -> Tensor:
    return model.get_output_embeddings()(hidden)  # (..., D) → (..., V)


# ------------------------------------------------------------------------------------------------------ the batches


def collate(examples: list[Example], pad_id: int) -> dict[str, Tensor]:
    """Right-padded batch. `predicts` marks the supervised rows: positions whose *next* token carries loss.

    There is no attention mask: causal attention never looks to the right, and padding rows are never supervised. What is
    padding goes by length, not by token, for padding may well equal end of sequence.
    """
    longest = max(len(e.ids) for e in examples)
    input_ids = torch.full((len(examples), longest), pad_id)  # (B, T)
    labels = torch.full_like(input_ids, IGNORE)
    is_score = torch.zeros_like(input_ids, dtype=torch.bool)
    for b, e in enumerate(examples):
        input_ids[b, : len(e.ids)] = torch.tensor(e.ids)
        labels[b, : len(e.ids) - 1] = torch.tensor(e.labels[1:])  # shifted: labels[t] is what position t predicts
        if e.score_position is not None:
            is_score[b, e.score_position - 1] = True
    predicts = labels != IGNORE
    return {
        "input_ids": input_ids.to(device()),
        "predicts": predicts.to(device()),  # (B, T) bool, R of them True
        "targets": labels[predicts].to(device()),  # (R,)
        "is_score": is_score[predicts].to(device()),  # (R,)
        "true_scores": torch.tensor([e.score for e in examples if e.score is not None], device=device()),  # (B,)
    }


def supervised_logits(model, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the supervised rows alone, (R, V): the head never sees prompt or padding, which is most of a batch."""
    hidden = model.get_decoder()(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return head(model, hidden[batch["predicts"]])  # (B, T, D) → (R, D) → (R, V)


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


def train(
    model,
    examples: list[Example],
    *,
    loss: Callable[..., Loss],
    score_in_ce: bool,
    pad_id: int,
    lr: float,
    warmup: float,
    weight_decay: float,
    clip: float,
    epochs: int,
    batch_size: int,
    accumulation: int,
    seed: int,
    bf16: bool,
    label: str,
) -> Iterator[dict]:
    """AdamW with a cosine schedule, one step per `batch_size · accumulation` examples. Yields a log line after each step.

    `loss` is cot_raft_loss with everything set but the batch and its divisors. Those belong to the whole step, so that
    loss and gradient are the same for every split into micro-batches. Raises InputError when loss or gradient is not finite.
    """
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]  # norms and biases are not decayed
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999))
    lengths = [len(e.ids) for e in examples]
    total = epochs * math.ceil(len(examples) / (batch_size * accumulation))
    schedule = get_cosine_schedule_with_warmup(optimiser, round(warmup * total), total)

    model.train()
    step, tokens, started = 0, 0, time.time()
    with tqdm(total=total, desc=label, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(epochs):
            for window in windows(lengths, batch_size * accumulation, seed + epoch):
                window = [examples[i] for i in window]
                n_sequences = sum(e.score is not None for e in window)
                n_tokens = sum(label != IGNORE for e in window for label in e.labels) - (0 if score_in_ce else n_sequences)

                parts = []
                for i in range(0, len(window), batch_size):
                    batch = collate(window[i : i + batch_size], pad_id)
                    with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
                        logits = supervised_logits(model, batch)
                    micro = {key: batch[key] for key in ("targets", "is_score", "true_scores")}
                    part = loss(logits, **micro, n_tokens=n_tokens, n_sequences=n_sequences)
                    part.total.backward()
                    parts.append(torch.stack([part.total.detach(), part.ce, part.squared_error]))

                grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
                value, ce, squared_error = torch.stack(parts).sum(0).tolist()
                step += 1
                if not math.isfinite(value) or not math.isfinite(grad_norm):
                    ids = ", ".join(e.id for e in window)
                    raise InputError(f"step {step}: the loss or its gradient is not finite (records {ids}); try a lower --lr")
                line = {"step": step, "epoch": epoch, "loss": value, "ce": ce, "squared_error": squared_error}
                line |= {"grad_norm": grad_norm, "lr": schedule.get_last_lr()[0]}
                optimiser.step()
                schedule.step()
                optimiser.zero_grad(set_to_none=True)

                tokens += sum(len(e.ids) for e in window)
                bar.set_postfix(
                    loss=f"{value:.3f}",
                    ce=f"{ce:.3f}",
                    se=f"{squared_error:.3f}",
                    tok_s=f"{tokens / (time.time() - started):.0f}",
                )
                bar.update()
                yield line | {"tokens": tokens, "epoch_done": step % (total // epochs) == 0}
    model.eval()


@torch.no_grad()
def evaluate(
    model, examples: list[Example], *, score_ids: Tensor, score_values: Tensor, pad_id: int, batch_size: int, bf16: bool
) -> dict:
    """Teacher-forced metrics on held-out examples: CE (mean over tokens) and squared error apart, RMSE, Pearson's r."""
    was_training = model.training
    model.eval()
    examples = sorted(examples, key=lambda e: len(e.ids))
    nll, n_tokens, predicted, true = 0.0, 0, [], []
    for i in range(0, len(examples), batch_size):
        batch = collate(examples[i : i + batch_size], pad_id)
        with torch.autocast(device().type, torch.bfloat16, enabled=bf16):
            logits = supervised_logits(model, batch)
        nll += float(torch.nn.functional.cross_entropy(logits.float(), batch["targets"], reduction="sum"))
        n_tokens += len(batch["targets"])
        predicted += rail(logits[batch["is_score"]], score_ids=score_ids, score_values=score_values).expected.tolist()
        true += batch["true_scores"].tolist()
    model.train(was_training)
    both = torch.tensor([predicted, true], dtype=torch.float64)
    squared_error = float((both[0] - both[1]).square().mean())
    pearson = float(torch.corrcoef(both)[0, 1]) if len(true) > 1 else math.nan
    return {
        "n": len(true),
        "ce": nll / n_tokens,
        "squared_error": squared_error,
        "rmse": math.sqrt(squared_error),
        "pearson": pearson if math.isfinite(pearson) else None,  # undefined where the prediction is constant
    }


def held_out(id: str, fraction: float, seed: int) -> bool:
    """Decided by the id alone, so that both stages hold out the same prompts whatever the order or number of records."""
    digest = hashlib.sha256(f"{seed}/{id}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


# -------------------------------------------------------------------------------------------------------- one stage


def fit(
    all_records: list[dict],
    *,
    stage: int,
    cots_of: Callable[[dict], list[str]],
    model: str,
    data: str,
    out: Path,
    overwrite: bool,
    grid: records.Grid,
    no_cot: bool,
    max_length: int,
    val_fraction: float,
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
    seed: int,
    **facts,
) -> None:
    """Train `model` on every (record, CoT) pair and write the checkpoint to `out`. `facts` go into run.json as they are."""
    started = time.time()
    arguments = locals().copy()
    for name in ("all_records", "cots_of", "facts", "started"):
        del arguments[name]
    arguments["grid"] = str(grid)
    records.choose_out(out, overwrite)
    torch.manual_seed(seed)

    # Records → examples
    tokenizer = load_tokenizer(model)
    tokens = records.score_tokens(tokenizer, grid)
    training, validation = [], []
    for record in all_records:
        side = validation if held_out(record["id"], val_fraction, seed) else training
        cots = [""] if no_cot else cots_of(record)
        for k, cot in enumerate(cots, 1):
            name = record["id"] if len(cots) == 1 else f"{record['id']}#{k}"
            side.append(
                records.encode(
                    tokenizer, record | {"id": name, "cot": cot}, grid=grid, score_ids=tokens.score_ids, no_cot=no_cot
                )
            )
    if not training:
        raise InputError(f"{data}: nothing to train on; all records are held out or without a CoT")
    too_long = records.too_long({e.id: len(e.ids) for e in training}, max_length)
    training = [e for e in training if e.id not in too_long]
    validation = [e for e in validation if len(e.ids) <= max_length]
    supervised = sum(label != IGNORE for e in training for label in e.labels)
    counts = {"tokens": sum(len(e.ids) for e in training), "supervised_tokens": supervised}
    print(
        f"{len(training)} examples to train on, {len(validation)} held out, {counts['tokens']} tokens, "
        f"{supervised / counts['tokens']:.0%} of them supervised"
    )
    if not tokenizer.chat_template:
        print(f"{model}: no chat template; the prompt is given as it is, with a newline after it")
    if lam and (span := grid.values[-1] - grid.values[0]) != 4:
        print(f"note: on this grid --lambda {lam * 16 / span**2:g} weighs the squared error as {lam:g} does on 1 to 5")

    # Seed model → p_s (stage 1) or p_tract (stage 2)
    network = load_model(model, dtype=torch.float32)  # at lr 1e-5, weights in bf16 would not move at all
    if gradient_checkpointing:
        # Two names of one method: transformers renamed it after 5.17
        checkpointing = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        checkpointing({"use_reentrant": False})
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    score_ids = torch.tensor(tokens.score_ids, device=device())
    score_values = torch.tensor(grid.values, device=device())

    def loss(logits: Tensor, **batch) -> Loss:
        return cot_raft_loss(
            logits, score_ids=score_ids, score_values=score_values,
            lam=lam, ce_weight=ce_weight, score_in_ce=not mask_score, ce_sum=ce_sum, **batch,
        )  # fmt: skip

    part = Path(f"{out}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    metrics: dict = {}
    with open(part / "log.jsonl", "w", encoding="utf-8", buffering=1) as log:
        for line in train(
            network, training, loss=loss, score_in_ce=not mask_score, pad_id=pad_id, lr=lr, warmup=warmup,
            weight_decay=weight_decay, clip=clip, epochs=epochs, batch_size=batch_size, accumulation=accumulation,
            seed=seed, bf16=has_bf16(), label=f"stage {stage}",
        ):  # fmt: skip
            if line.pop("epoch_done") and validation:
                metrics = evaluate(
                    network, validation, score_ids=score_ids, score_values=score_values,
                    pad_id=pad_id, batch_size=batch_size, bf16=has_bf16(),
                )  # fmt: skip
                line["held_out"] = metrics
            log.write(json.dumps(line) + "\n")

    # Checkpoint, then run.json, then the final name: a folder called `out` is always whole
    network.save_pretrained(part)
    tokenizer.save_pretrained(part)
    seconds = time.time() - started
    peak = (
        torch.cuda.max_memory_allocated()
        if torch.cuda.is_available()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    records.write_run(
        part / "run.json", arguments=arguments, inputs=[data], started=started, stage=stage, grid=str(grid), no_cot=no_cot,
        counts=counts | {"trained": len(training), "held_out": len(validation), "too_long": len(too_long)},
        held_out=metrics or None, last_step=line, tokens_per_second=round(line["tokens"] / seconds),
        peak_memory_bytes=peak, device=str(device()), bf16=has_bf16(), **facts,
    )  # fmt: skip
    if out.exists():
        shutil.rmtree(out)
    part.rename(out)
    if metrics:
        print("held out: " + "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()))
    records.report(too_long, f"left out, longer than --max-length {max_length}")
    print(f"{out}: stage {stage} done in {seconds:.0f} s")


def make_parser(description: str, *, stage: int) -> argparse.ArgumentParser:
    """The options of both training stages. Which defaults they have depends on --model, so that is looked at first."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default=TINY_SEED)
    embedded = Path(first.parse_known_args()[0].model).resolve() == Path(TINY_SEED)
    data = {} if stage == 1 else {"data": "out/cots.jsonl"}

    parser = argparse.ArgumentParser(description=description, formatter_class=records.Help)
    group = parser.add_argument_group("what goes in and out")
    group.add_argument(
        "--model", default=TINY_SEED, help=f"seed model: a folder, a hub id or one of {', '.join(records.MODELS)}"
    )
    group.add_argument("--data", help="JSONL file of records")
    group.add_argument("--out", type=Path, default=Path(f"out/stage{stage}"), help="folder of the checkpoint")
    group.add_argument("--no-cot", action="store_true", help="train on the score alone, without any CoT")
    group.add_argument(
        "--val-fraction", type=float, default=0.05, help="share of the records held out, chosen by id and --seed"
    )
    group = parser.add_argument_group("loss: ce-weight · CE + λ · squared error")
    group.add_argument("--lambda", dest="lam", type=float, default=1.0, help="λ, weight of the squared error; 0 leaves CE")
    group.add_argument("--ce-weight", type=float, default=1.0, help="weight of the cross-entropy; 0 leaves pure RAFT")
    group.add_argument(
        "--mask-score", action="store_true", help="keep the score token out of the CE, as the authors' code does"
    )
    group.add_argument(
        "--ce-sum", action="store_true", help="CE summed over a sequence, as in the formula, not its mean over tokens"
    )
    group = parser.add_argument_group("optimiser")
    group.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    group.add_argument("--epochs", type=int, help="passes over the data")
    group.add_argument("--batch-size", type=int, help="sequences on the device at a time")
    group.add_argument("--accumulation", type=int, help="batches an optimiser step")
    group.add_argument("--warmup", type=float, help="share of the steps with rising learning rate; a cosine follows")
    group.add_argument("--weight-decay", type=float, help="of weight matrices")
    group.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    group.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations: slower, far less memory",
    )
    records.add_common_arguments(parser)
    parser.set_defaults(**(EMBEDDED if embedded else PAPER) | data)
    return parser


def main() -> None:
    args = make_parser(__doc__, stage=1).parse_args()
    args.grid = records.choose_grid(args.grid, args.model)
    need = ("id", "prompt", "score") if args.no_cot else ("id", "prompt", "cot", "score")
    fit(
        records.read_records(args.data, grid=args.grid, need=need),
        stage=1,
        cots_of=lambda record: [record["cot"]],
        **vars(args),
    )


if __name__ == "__main__":
    records.run(main)
