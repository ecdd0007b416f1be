"""Stage 1: fine-tune the seed model on annotated CoTs with the CoT-RAFT loss → p_s. Owns the training loop.

    python stage1_train.py                                   # the embedded task, a minute on a laptop CPU
    python stage1_train.py --model mistral-7b                # Mistral-7B-Instruct-v0.2 on Feedback Collection
    python stage1_train.py --model SEED --data train.jsonl --valid valid.jsonl --out out/run/stage1

Writes an ordinary Hugging Face checkpoint to --out, or with LoRA (the 7B and 8B models) a PEFT adapter, with
log.jsonl (a line a step) and run.json. The defaults shown are those of the --model given.
"""

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from loss import Loss, cot_raft_loss
from tract import hub, models, ranks, runs
from tract.encode import Example, encode, score_tokens, thinks
from tract.models import TINY_SEED, device, score_logits
from tract.records import ROOT, InputError, read_records
from tract.runs import COUNT, SHARE, WEIGHT, Fault

# The paper's settings (its appendix; LLaMA-Factory's defaults where it is silent), and the embedded task's
PAPER = dict(lr=1e-5, epochs=2, batch_size=1, accumulation=8, warmup=0.1, weight_decay=0.0)
EMBEDDED = dict(lr=1e-3, epochs=4, batch_size=16, accumulation=1, warmup=0.05, weight_decay=0.01)
LORA_BY_DEFAULT = ("mistral-7b", "llama-3.1-8b", "prometheus-2-7b", "qwen3-8b")
LOGITS = 2**24  # logits held at a time: 64 MiB in fp32, and three times that with what the loss makes of them
BAD_STEPS = 10  # steps in a row without a finite loss after which training stops


def collate(examples: list[Example], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right. `predicts` marks the supervised rows: positions whose *next* token carries loss.

    No attention mask: causal attention never looks to the right, and padding is never supervised. It is told
    by length, not by token, for the padding token may well be the end of sequence.
    """
    ids = torch.full((len(examples), max(len(e.ids) for e in examples)), pad_id)  # (B, T)
    predicts, is_score, true_scores = torch.zeros(3, *ids.shape)
    for b, e in enumerate(examples):
        ids[b, : len(e.ids)] = torch.tensor(e.ids)
        predicts[b, e.start - 1 : len(e.ids) - 1] = 1
        is_score[b, e.score_position - 1], true_scores[b, e.score_position - 1] = 1, e.score
    batch = {"ids": ids, "predicts": predicts.bool()}  # (B, T), R of `predicts` are True
    labels = {"targets": ids.roll(-1, 1), "is_score": is_score.bool(), "true_scores": true_scores}
    batch |= {name: label[batch["predicts"]] for name, label in labels.items()}  # (R,)
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def supervised_rows(model, batch: dict[str, Tensor], bf16: bool) -> Tensor:
    """Return the last hidden states of the supervised rows, (R, D): the head never sees prompt or padding."""
    with autocast(bf16):
        hidden = model.get_decoder()(input_ids=batch["ids"], use_cache=False).last_hidden_state  # (B, T, D)
    return hidden[batch["predicts"]]


def loss_in_parts(model, rows: Tensor, batch: dict, loss: Callable[..., Loss], bf16: bool) -> Iterator[Loss]:
    """Yield the loss of a few supervised rows at a time: no more than LOGITS logits exist at once."""
    size = max(1, LOGITS // model.config.get_text_config().vocab_size)
    for i in range(0, len(rows), size):
        labels = {name: batch[name][i : i + size] for name in ("targets", "is_score", "true_scores")}
        with autocast(bf16):
            part = loss(score_logits(model, rows[i : i + size], loss.keywords["score_ids"]), **labels)
        yield part


def autocast(bf16: bool) -> torch.autocast:
    """Compute matrix products in bf16, if so asked. No autocast cache: each weight is used once per pass."""
    return torch.autocast(device().type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def windows(examples: list[Example], size: int, seed: str) -> list[list[Example]]:
    """Plan an epoch: windows of `size` examples of like length, one an optimiser step, in random order.

    seed: a text that names the epoch. Numbers that follow each other would give runs that share epochs.
    """
    # Sort by length within chunks of 50 steps (less padding), then shuffle the steps
    random = torch.Generator().manual_seed(runs.seed_of(seed))
    order = [examples[i] for i in torch.randperm(len(examples), generator=random)]
    chunks = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
    order = [e for chunk in chunks for e in sorted(chunk, key=lambda e: len(e.ids))]
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    return [steps[i] for i in torch.randperm(len(steps), generator=random)]


def train(args, model, plan: list, valid: list[Example], loss: Callable, pad_id: int, folder: Path) -> int:
    """Take one optimiser step for each window of the plan, and log it to folder/log.jsonl.

    loss: cot_raft_loss, without batch and divisors. Goes on from folder/state.pt. Returns tokens a second.
    """
    optimiser, schedule = make_optimiser(model, args, steps=len(plan))
    done = load_state(folder, model, optimiser, schedule)
    stop, bad, started = [], 0, time.time()
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one stops after the step, the second at once
        signal.signal(number, lambda n, _: signal.default_int_handler(n, _) if stop else stop.append(n))
    bar = runs.progress(len(plan), done, f"stage {args.stage}", "step", quiet=ranks.rank() > 0)
    with open(os.devnull if ranks.rank() else folder / "log.jsonl", "a", buffering=1) as log, bar:
        for step, window in enumerate(plan[done:], done + 1):
            # Divisors of the whole step: loss and gradient are the same for every split into micro-batches
            n_tokens = sum(e.supervised - (args.score_ce == "none") for e in window)
            loss_of_step = partial(loss, n_tokens=n_tokens, n_sequences=len(window))
            sums = torch.zeros(3, device=device())  # loss, CE, penalty
            # A micro-batch that does not count only keeps one rank in step with the others
            for examples, counts in ranks.micro_batches(window, args.batch_size):
                batch = collate(examples, pad_id)
                hidden = supervised_rows(model, batch, args.bf16)  # (R, D): forward, but for the head
                rows = hidden.detach().requires_grad_()
                for part in loss_in_parts(model, rows, batch, loss_of_step, args.bf16):
                    (counts * part.total).backward()  # adds to rows.grad, frees the logits of this part
                    sums += counts * torch.stack([part.total.detach(), part.ce, part.penalty])
                hidden.backward(rows.grad)
            ranks.add_up([sums, *ranks.gradients(model)])
            norm = ranks.clip(model, args.clip or math.inf)
            loss_sum, ce, penalty = sums.tolist()
            numbers = {"loss": loss_sum, "ce": ce, "penalty": penalty, "grad_norm": float(norm)}
            taken = all(map(math.isfinite, numbers.values()))
            if taken:
                optimiser.step()
            line = {"step": step, "taken": taken, "lr": schedule.get_last_lr()[0]}
            line |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
            schedule.step()
            optimiser.zero_grad(set_to_none=True)

            if valid and step % (len(plan) // args.epochs) == 0:
                line["valid"] = evaluate(model, valid, loss, pad_id, args)
            log.write(json.dumps(line) + "\n")
            bar.set_postfix(loss=numbers["loss"], refresh=False)
            bar.update()
            bad = 0 if taken else bad + 1
            if not taken:
                bar.write(f"step {step} not taken, not finite: {', '.join(e.id for e in window)}")
            stopping = ranks.anyone(bool(stop))
            if step % args.save_every == 0 or step == len(plan) or bad == BAD_STEPS or stopping:
                if not ranks.rank():
                    os.fsync(log.fileno())  # the log may be ahead of the state, never behind
                save_state(folder, model, optimiser, schedule, step)
                ranks.wait()
            if bad == BAD_STEPS:
                raise Fault(f"{folder}: stopped after {bad} steps that were not finite; try a lower --lr")
            if stopping:
                raise KeyboardInterrupt(f"{folder}: stopped after step {step}; the same command goes on")
    return round(sum(len(e.ids) for window in plan[done:] for e in window) / (time.time() - started))


@torch.no_grad()
def evaluate(model, examples: list[Example], loss: Callable[..., Loss], pad_id: int, args) -> dict:
    """Return mean CE a token and RMSE on held-out examples, on their CoTs as given."""
    model.eval()
    order, sums = sorted(examples, key=lambda e: len(e.ids)), torch.zeros(2, device=device())
    n_tokens = sum(e.supervised for e in examples)
    usual = {"score_ce": "token", "penalty": "squared", "ce_sum": False}  # so that runs compare
    loss = partial(loss, **usual, n_tokens=n_tokens, n_sequences=len(examples))
    for some, counts in ranks.micro_batches(order, args.batch_size):
        batch = collate(some, pad_id)
        rows = supervised_rows(model, batch, args.bf16)
        for part in loss_in_parts(model, rows, batch, loss, args.bf16):
            sums += counts * torch.stack([part.ce, part.penalty])
    ranks.add_up([sums])
    model.train()
    return {"n": len(examples), "ce": float(sums[0]), "rmse": float(sums[1].sqrt())}


def make_optimiser(model, args, steps: int):
    """Make AdamW and its schedule: a linear warm-up over the share --warmup of steps, then a cosine to 0."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kinds = {}  # weight matrices apart from norms and biases, and what FSDP spreads apart from the rest
    for p in trained:
        kinds.setdefault((p.ndim >= 2, ranks.is_spread(p)), []).append(p)
    decay = args.weight_decay
    groups = [{"params": of, "weight_decay": decay * matrix} for (matrix, _), of in kinds.items()]
    # fused: one pass over the weights, and on a GPU no second copy of them
    optimiser = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
    return optimiser, get_cosine_schedule_with_warmup(optimiser, round(args.warmup * steps), steps)


def save_state(folder: Path, model, optimiser, schedule, step: int) -> None:
    """Save all that a run needs to end as if it had never stopped. Raises Fault."""
    state = {"step": step, "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
    state |= {"weights": {name: p for name, p in model.named_parameters() if p.requires_grad}}
    state |= {"random": torch.get_rng_state(), "random_on_gpus": torch.cuda.get_rng_state_all()}
    state = ranks.together(state)
    if not ranks.rank():
        runs.write_whole(folder / "state.pt", partial(torch.save, state))


def load_state(folder: Path, model, optimiser, schedule) -> int:
    """Put model, optimiser, schedule and log back to where they were saved; returns the step, 0 for none."""
    log, path = folder / "log.jsonl", folder / "state.pt"
    if not path.is_file():
        if not ranks.rank():
            log.unlink(missing_ok=True)
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    weights = dict(model.named_parameters())
    saved = {name: ranks.spread_like(weights[name], x) for name, x in state["weights"].items()}
    model.load_state_dict(saved, strict=False)
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    for i, moments in state["optimiser"]["state"].items():
        moments |= {name: ranks.spread_like(trained[i], x) for name, x in moments.items()}
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(state["random"])
    torch.cuda.set_rng_state_all(state["random_on_gpus"][: torch.cuda.device_count()])  # maybe none
    if not ranks.rank():
        runs.write_whole(log, "".join(log.read_text("utf-8").splitlines(keepends=True)[: state["step"]]))
    print(f"{folder}: going on after step {state['step']}")
    return state["step"]


def run_stage(args, need: tuple[str, ...], cots_of: Callable[[dict], list[str]]) -> None:
    """Train args.model on every (record, CoT) pair of args.data; leave all in args.out.

    need: fields that the records have. cots_of(record): its CoTs. Raises InputError or Fault.
    """
    started = time.time()
    ranks.join()
    runs.check_out(args)
    if args.fsdp and (args.lora or not ranks.launched()):
        raise InputError("--fsdp: spreads all weights (--full) over the processes that torchrun starts")
    rank = hub.read(args.model, "adapter_config.json").get("r", args.lora)
    if args.lora and args.lora != rank:
        raise InputError(f"--lora {args.lora}: {args.model} has adapters of rank {rank}; leave that away")
    tokenizer = models.load_tokenizer(args.model)
    _, score_ids = score_tokens(tokenizer, args.grid)
    how = (args, need, cots_of, tokenizer, score_ids)
    examples, held_out = read_examples(args.data, *how), read_examples(args.valid, *how) if args.valid else []
    size = args.batch_size * args.accumulation
    plan = []
    for epoch in range(args.epochs):
        plan += windows(examples, size, f"{args.seed}/{epoch}")
    tokens, share = sum(len(e.ids) for e in examples), sum(e.supervised for e in examples)
    print(f"{len(examples)} examples, {tokens} tokens, {share / tokens:.0%} supervised; {len(plan)} steps")
    print(f"{len(held_out)} held out" if held_out else "no --valid: nothing is held out")
    width = args.grid.values[-1] - args.grid.values[0]
    if args.lam and width != 4:  # the squared error grows with the square of the scale, the others with it
        scale = (4 / width) ** (2 if args.penalty == "squared" else 1)
        weight = f"λ = {args.lam:g} weighs as much as {args.lam / scale:g} on 1 to 5"
        print(f"the grid is {width:g} wide: {weight}; --lambda {scale:.2g} would weigh as much as 1")
    if args.dry_run:
        return show(args, tokenizer, examples[0], score_ids)

    # Seed model → p_s (stage 1) or p_tract (stage 2)
    others = Path(f"{args.out}.part"), None, None
    part, settings, _lock = others if ranks.rank() else runs.begin(args)  # the lock is held until the end
    ranks.wait()
    whole = part / "whole"  # what --out will be
    if ranks.anyone((whole / "run.json").is_file()):  # killed just before it was
        print(f"{part}: is trained already")
        return None if ranks.rank() else runs.finish(part, args.out)
    torch.manual_seed(args.seed)
    model = models.load_for_training(args.model, args.lora, args.gradient_checkpointing, args.bf16)
    if args.fsdp:
        ranks.spread(model)
    models.print_memory(model)
    choices = {name: getattr(args, name) for name in ("lam", "penalty", "ce_weight", "score_ce", "ce_sum")}
    loss = partial(cot_raft_loss, **models.score_tensors(score_ids, args.grid), **choices)
    pad_id = tokenizer.eos_token_id  # nothing depends on it, and the padding token may have no embedding
    try:
        speed = train(args, model, plan, held_out, loss, pad_id, part)
        weights = ranks.together(model.state_dict()) if args.fsdp else None
        if ranks.rank():
            return
        log = [json.loads(line) for line in (part / "log.jsonl").read_text("utf-8").splitlines()]
        check_end(part, [line["taken"] for line in log])
        model.save_pretrained(whole, state_dict=weights)
        tokenizer.save_pretrained(whole)
    except torch.OutOfMemoryError:
        raise Fault(f"{part}: out of memory; lower --batch-size or --max-length, or use --lora") from None
    except SafetensorError as error:
        raise Fault(f"{part}: the checkpoint can't be written ({error}); {runs.GO_ON}") from None

    # run.json, then the final name: a folder called args.out is always whole
    shutil.copy(part / "log.jsonl", whole)
    (whole / "README.md").unlink(missing_ok=True)  # peft's, a form to fill in
    facts = {"examples": len(examples), "tokens": tokens, "tokens_per_second": speed, "last_step": log[-1]}
    facts |= {"enable_thinking": thinks(tokenizer)}
    runs.write_run(whole / "run.json", args, settings, started, **facts)
    runs.finish(part, args.out)
    print(f"{args.out}: stage {args.stage} done in {time.time() - started:.0f} s")


def check_end(part: Path, taken: list[bool]) -> None:
    """Refuse to call a training done that ended in steps that were not finite; say how many. Raises Fault."""
    skipped = taken.count(False)
    if skipped:
        print(f"{skipped} of {len(taken)} steps were not finite and not taken, see log.jsonl")
    if not any(taken[-2:]):
        raise Fault(f"{part}: the last steps were not finite, the weights are spoilt; remove it, lower --lr")


def read_examples(path: str, args, need: tuple, cots_of: Callable, tokenizer, score_ids) -> list[Example]:
    """Read records and encode every (record, CoT) pair that is not too long. Raises InputError."""
    longest, examples = min(args.max_length, tokenizer.positions), []
    records = read_records(path, args.grid, need)
    for record in tqdm(
        records, desc="tokenise", unit="record", delay=5, leave=False, disable=ranks.rank() > 0
    ):
        cots = [""] if args.no_cot else cots_of(record)
        for k, cot in enumerate(cots, 1):
            named = record | {"id": record["id"] if len(cots) == 1 else f"{record['id']}#{k}", "cot": cot}
            examples.append(encode(tokenizer, named, args.grid, score_ids, args.no_cot))
    fitting = [e for e in examples if len(e.ids) <= longest]
    if not examples:
        raise InputError(f"{path}: no CoT in it is finished; train stage 1 longer, or --keep-unfinished")
    if not fitting:
        shortest = min(len(e.ids) for e in examples)
        raise InputError(f"{path}: all are longer than {longest} tokens, the shortest has {shortest}")
    runs.report((e.id for e in examples if len(e.ids) > longest), f"left out, longer than {longest} tokens")
    return fitting


def show(args, tokenizer, e: Example, score_ids: list[int]) -> None:
    """Print the options, and an example with its loss mask."""
    print(json.dumps(vars(args) | {"grid": str(args.grid)}, default=str, indent=2))
    start, score, token = e.start, e.score_position, repr(tokenizer.decode([e.ids[e.score_position]]))
    print(f"\nrecord {e.id}, {start} tokens without loss:\n{tokenizer.decode(e.ids[:start])}")
    print(f"\n{score - start} tokens with CE:\n{tokenizer.decode(e.ids[start:score])}")
    print(f"\ntoken {score}: {token} (id {e.ids[score]}), CE at the score: {args.score_ce}. Here the penalty")
    print(f"({args.penalty}) to {e.score:g} is read, from p of the ids {' '.join(map(str, score_ids))}")
    print(f"\nlast token, with CE: {tokenizer.decode([e.ids[-1]])!r}\n\n--dry-run: nothing was written")


def make_parser(description: str, stage: int) -> argparse.ArgumentParser:
    """Make the options of both training stages; which defaults they have depends on --model."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default=TINY_SEED)
    first.add_argument("--help", "-h", action="store_true")  # which shall not wait for the hub
    asked = first.parse_known_args()[0]
    seed, own_rank = asked.model, 8
    try:  # p_s is trained on as its seed was (A.4)
        seed = hub.trained(asked.model, offline=asked.help).get("model", seed)
        own_rank = hub.read(asked.model, "adapter_config.json", offline=asked.help).get("r", own_rank)
    except InputError:  # which is said when the options are read
        pass
    embedded = Path(seed).resolve() == Path(TINY_SEED)
    large = hub.resolve(seed) in map(hub.resolve, LORA_BY_DEFAULT)
    data = ROOT / "data" / ("tiny" if embedded else "feedback_collection") / "train.jsonl"

    parser = argparse.ArgumentParser(description=description, formatter_class=runs.Help, allow_abbrev=False)
    add = parser.add_argument_group("what goes in and out").add_argument
    add("--model", default=TINY_SEED, help=f"seed model: folder, hub id or one of {', '.join(hub.MODELS)}")
    add("--data", default=str(data) if stage == 1 else "out/cots.jsonl", help="JSONL file of records")
    add("--valid", help="JSONL file of held-out records; None: that of stage 1's default --data, or none")
    add("--out", type=Path, default=Path(f"out/stage{stage}"), help="folder of the checkpoint")
    add("--dry-run", action="store_true", help="only show options and an example with its loss mask")
    add = parser.add_argument_group("what is trained").add_mutually_exclusive_group().add_argument
    rank = {"nargs": "?", "const": own_rank, "default": own_rank if large else None}
    what = f"adapters of this rank, or of rank {own_rank}, on all linear layers; None: all weights"
    add("--lora", **rank, type=COUNT, metavar="RANK", help=what)
    full = {"action": "store_const", "const": None, "dest": "lora", "default": argparse.SUPPRESS}
    add("--full", **full, help="all weights, in fp32")
    add = parser.add_argument_group("loss: ce-weight · CE + λ · penalty, as in loss.py").add_argument
    add("--lambda", dest="lam", type=WEIGHT, default=1.0, help="λ, weight of the penalty; 0 leaves CE")
    add("--penalty", choices=("squared", "rps", "ntl"), default="squared", help="distance to the true score")
    add("--ce-weight", type=WEIGHT, default=1.0, help="weight of the CE; 0 leaves the penalty alone")
    add("--score-ce", choices=("token", "two-hot", "none"), default="token", help="what CE sees at the score")
    add("--ce-sum", action="store_true", help="sum CE over a sequence, as the formula; else mean of tokens")
    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=WEIGHT, help="peak learning rate of AdamW")
    add("--epochs", type=COUNT, help="passes over the data")
    add("--batch-size", type=COUNT, help="sequences on the device at a time")
    add("--accumulation", type=COUNT, help="batches an optimiser step")
    add("--warmup", type=SHARE, help="share of the steps with rising learning rate; a cosine follows")
    add("--weight-decay", type=WEIGHT, help="of weight matrices")
    add("--clip", type=WEIGHT, default=1.0, help="largest norm of the gradient; 0: any")
    add("--fsdp", action="store_true", help="under torchrun: spread weights, gradients and AdamW (--full)")
    recompute = {"action": argparse.BooleanOptionalAction, "default": not embedded}
    add("--gradient-checkpointing", **recompute, help="recompute activations: slower, far less memory")
    add("--save-every", type=COUNT, default=200, help="steps after which the state is saved, to go on from")
    runs.add_common_arguments(parser, models.has_bf16())
    parser.set_defaults(**(EMBEDDED if embedded else PAPER), stage=stage, no_cot=False)
    return parser


def main() -> None:
    parser = make_parser(__doc__, stage=1)
    parser.add_argument("--no-cot", action="store_true", help="train on the score alone, without any CoT")
    args = parser.parse_args()
    default = Path(parser.get_default("data"))
    if Path(args.data).resolve() == default:
        args.valid = args.valid or str(default.with_name("valid.jsonl"))
        ranks.join()
        if not default.is_file():  # it is large: look at the rest first
            runs.check_out(args)
            models.load_tokenizer(args.model)
        if not default.is_file() and not ranks.rank():
            print(f"{default}: not there yet; {default.with_name('prepare.py')} gets it", flush=True)
            if code := subprocess.run([sys.executable, default.with_name("prepare.py")]).returncode:
                raise SystemExit(code)
        ranks.wait()
    args.grid = runs.choose_grid(args)
    need = ("id", "prompt", "score") if args.no_cot else ("id", "prompt", "cot", "score")
    run_stage(args, need, cots_of=lambda record: [record["cot"]])


if __name__ == "__main__":
    runs.run(main)
