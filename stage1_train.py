"""Stage 1: fine-tune the seed model on annotated CoTs with the CoT-RAFT loss → p_s. Owns the training loop.

    python stage1_train.py                                   # the task in data/tiny, a minute on a laptop CPU
    python stage1_train.py --model mistral-7b                # Mistral-7B-Instruct-v0.2 on Feedback Collection
    python stage1_train.py --model SEED --data train.jsonl --valid valid.jsonl --out out/run/stage1

Writes an ordinary Hugging Face checkpoint to --out, or with LoRA (the 7B and 8B models) a PEFT adapter, with
log.jsonl (a line a step) and run.json. --help shows the defaults of the --model that is given with it.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from loss import Loss, cot_raft_loss
from tract import models, ranks, runs, training
from tract.encode import Example, score_tokens
from tract.examples import (
    check_training_options,
    fetch_default_data,
    plan_epoch,
    print_memory,
    print_plan,
    read_examples,
    show_example,
)
from tract.models import autocast, device, next_token_logits
from tract.options import choose_grid, make_training_parser
from tract.runs import Fault

# What the options are by default, for each --model
PAPER = {
    "data": "data/feedback_collection/train.jsonl",
    "lr": 1e-5,
    "epochs": 2,
    "batch_size": 1,
    "accumulation": 8,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "gradient_checkpointing": True,
    "lora": 8,  # rank of the adapters; None: all weights are trained
}
DEFAULTS = {
    "mistral-7b": PAPER,
    "llama-3.1-8b": PAPER,
    "prometheus-2-7b": PAPER,
    "qwen3-8b": PAPER,
    "any other": PAPER | {"lora": None},
    "data/tiny/seed": {  # the embedded task
        "data": "data/tiny/train.jsonl",
        "lr": 1e-3,
        "epochs": 4,
        "batch_size": 16,
        "accumulation": 1,
        "warmup": 0.05,
        "weight_decay": 0.01,
        "gradient_checkpointing": False,
        "lora": None,
    },
}
MAX_LOGITS = 2**24  # at a time: 64 MiB in fp32, and 64 each for their log-softmax and their gradient


def collate(examples: list[Example]) -> dict[str, Tensor]:
    """Pad examples on the right; `supervised` marks the R positions whose *next* token carries loss.

    There is no attention mask: causal attention never looks to the right, and padding is never supervised. So
    any token will do as padding.
    """
    shape = (len(examples), max(len(example.ids) for example in examples))  # (B, T)
    ids = torch.full(shape, examples[0].ids[0])
    supervised = torch.zeros(shape, dtype=torch.bool)
    is_score = torch.zeros(shape, dtype=torch.bool)
    true_scores = torch.zeros(shape)
    weights = torch.tensor([example.weight for example in examples])  # (B,)
    for b, example in enumerate(examples):
        length = len(example.ids)
        ids[b, :length] = torch.tensor(example.ids)
        supervised[b, example.start - 1 : length - 1] = True  # position t predicts token t + 1
        is_score[b, example.score_position - 1] = True
        true_scores[b, example.score_position - 1] = example.score
    batch = {
        "ids": ids,  # (B, T)
        "supervised": supervised,  # (B, T)
        "targets": ids.roll(-1, dims=1)[supervised],  # (R,), next tokens; no last position is supervised
        "is_score": is_score[supervised],  # (R,)
        "true_scores": true_scores[supervised],  # (R,)
        "weights": weights[:, None].expand(shape)[supervised],  # (R,), of the CE: 1 except in stage 3
    }
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def supervised_states(model, batch: dict[str, Tensor], bf16: bool) -> Tensor:
    """Return the decoder's last hidden states at the supervised positions, (R, D).

    The head, which makes logits of them, sees these positions alone.
    """
    with autocast(bf16):
        output = model.get_decoder()(input_ids=batch["ids"], use_cache=False)
    return output.last_hidden_state[batch["supervised"]]  # (B, T, D) → (R, D)


def loss_in_parts(model, states: Tensor, batch: dict, loss_options: dict, bf16: bool) -> Iterator[Loss]:
    """Yield the loss of a few supervised positions at a time: no more than MAX_LOGITS exist at once.

    loss_options: the arguments of cot_raft_loss that `batch` does not hold. With the divisors n_tokens and
    n_sequences of a step among them, the parts add up to the batch's share of the step's loss.
    """
    size = max(1, MAX_LOGITS // model.config.get_text_config().vocab_size)
    for start in range(0, len(states), size):
        positions = slice(start, start + size)
        # The labels of these positions, (r,) each: all of the batch but what made the states
        labels = {name: x[positions] for name, x in batch.items() if name not in ("ids", "supervised")}
        with autocast(bf16):
            # (r, V); those of the score tokens are computed in fp32, for bf16 would blur their distribution
            logits = next_token_logits(model, states[positions], loss_options["score_ids"])
            part = cot_raft_loss(logits, **labels, **loss_options)
        del logits  # which this frame would hold while the caller runs the backward pass
        yield part


def accumulate_gradients(model, window: list[Example], loss_options: dict, args) -> Tensor:
    """Backpropagate a window (a step's examples) by micro-batches; return this process's loss, CE, penalty.

    Losses are divided by the tokens and sequences of the whole window: they add up to the same however it is
    split.
    """
    n_tokens = sum(example.n_supervised for example in window)
    if args.score_ce == "none":  # the score tokens have no CE (stage 3 does not use n_tokens)
        n_tokens -= len(window)
    divisors = {"n_tokens": n_tokens, "n_sequences": len(window)}
    loss_options = divisors | loss_options  # the right side wins: stage 3 brings its own n_sequences
    sums = torch.zeros(3, device=device())
    for micro_batch in ranks.micro_batches(window, args.batch_size):
        batch = collate(micro_batch)
        states = supervised_states(model, batch, args.bf16)  # (R, D)
        # In short: cot_raft_loss(next_token_logits(model, states, score_ids), ...).total.backward()
        # But then R × V logits exist at once, which is gigabytes. So cut the graph between decoder and head,
        # and go through the head part by part. Each part fills in its rows of cut.grad, the gradient that
        # then goes through the decoder.
        cut = states.detach().requires_grad_()
        cut.grad = torch.zeros_like(cut)  # remains so in a batch without loss (an idle process of torchrun)
        for part in loss_in_parts(model, cut, batch, loss_options, args.bf16):
            part.total.backward()
            sums += torch.stack([part.total.detach(), part.ce, part.penalty])
        states.backward(cut.grad)
    return sums


def take_step(model, window: list[Example], loss_options: dict, optimiser, args) -> dict:
    """Take an optimiser step, unless something in it is not finite; return what log.jsonl says of it."""
    sums = accumulate_gradients(model, window, loss_options, args)
    # Sums in place over the processes of torchrun; without torchrun it does nothing
    ranks.add_up([sums, *ranks.gradients(model)])
    norm = ranks.clip(model, args.clip or math.inf)
    loss, ce, penalty = sums.tolist()
    measured = {"loss": loss, "ce": ce, "penalty": penalty, "grad_norm": float(norm)}
    finite = all(map(math.isfinite, measured.values()))
    if finite:  # one bad step would spoil all weights; after many in a row, the journal gives up
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return {"taken": finite, "lr": optimiser.param_groups[0]["lr"], **measured}


def train(args, model, plan: list[list], held_out: list, loss_options: dict, folder: Path) -> None:
    """Take one optimiser step for each window of examples in the plan, and log it to folder/log.jsonl.

    loss_options: arguments of cot_raft_loss that are the same for every batch. Where an earlier run left a
    folder/state.pt, it goes on from there.
    """
    steps_per_epoch = len(plan) // args.epochs
    optimiser, schedule = training.make_optimiser(model, args, steps=len(plan))
    with training.Journal(args, folder, model, optimiser, schedule, len(plan)) as journal:
        for step, window in journal.remaining(plan):  # steps count from 1
            line = {"step": step, **take_step(model, window, loss_options, optimiser, args)}
            schedule.step()
            if held_out and step % steps_per_epoch == 0:
                line["valid"] = evaluate(model, held_out, loss_options, args)
            journal.end_step(window, line)
    # Logged losses precede their steps: without --valid nothing has tried the last weights
    last = evaluate(model, plan[-1], loss_options, args)
    if not math.isfinite(last["ce"]):
        raise Fault(f"{folder}: the last steps spoilt the weights; remove it, and try a lower --lr")


@torch.no_grad()
def evaluate(model, examples: list[Example], loss_options: dict, args) -> dict:
    """Return the mean CE a token and the RMSE on examples, held out or not, with the CoTs they have."""
    model.eval()
    # The same measures whichever loss is trained with, so that runs can be compared
    plain_loss = {"score_ce": "token", "score_weight": None, "penalty": "squared", "ce_sum": False}
    loss_options = loss_options | plain_loss
    loss_options["n_tokens"] = sum(example.n_supervised for example in examples)
    loss_options["n_sequences"] = len(examples)
    sums = torch.zeros(2, device=device())  # CE, squared error
    by_length = sorted(examples, key=lambda example: len(example.ids))
    for micro_batch in ranks.micro_batches(by_length, args.batch_size):
        batch = collate(micro_batch)
        states = supervised_states(model, batch, args.bf16)
        for part in loss_in_parts(model, states, batch, loss_options, args.bf16):
            sums += torch.stack([part.ce, part.penalty])
    ranks.add_up([sums])
    model.train()
    return {"n": len(examples), "ce": float(sums[0]), "rmse": float(sums[1].sqrt())}


def run_stage(args, need: tuple[str, ...], cots_of: Callable[[dict], list[str]]) -> None:
    """Train args.model on every (record, CoT) pair of args.data; write the checkpoint to args.out.

    need: fields that every record must have. cots_of(record): the CoTs to train on; not called with
    stage 1's --no-cot. Raises InputError or Fault.
    """
    started = time.time()
    ranks.join()
    check_training_options(args)
    tokenizer = models.load_tokenizer(args.model)
    _, score_ids = score_tokens(tokenizer, args.grid)
    examples = read_examples(args, args.data, need, cots_of, tokenizer, score_ids)
    held_out = read_examples(args, args.valid, need, cots_of, tokenizer, score_ids)  # [] without --valid
    plan = []
    for epoch in range(args.epochs):
        plan += plan_epoch(examples, args.batch_size * args.accumulation, f"{args.seed}/{epoch}")
    tokens = sum(len(example.ids) for example in examples)
    print_plan(args, examples, held_out, tokens, len(plan))
    if args.dry_run:
        show_example(args, tokenizer, examples[0], score_ids)
        return

    folder, settings, _lock = training.begin(args)  # OUT.part; the lock is held until the end
    torch.manual_seed(args.seed)
    checkpointing = args.gradient_checkpointing
    # The seed (A.4: p_s); after `train`, p_s (stage 1) or p_tract (stage 2)
    model = models.load_for_training(args.model, args.lora, checkpointing, args.bf16, args.four_bit)
    if args.fsdp:
        ranks.spread(model)
    print_memory(model)
    loss_options = models.score_tensors(score_ids, args.grid)  # score_ids and score_values
    for name in ("lam", "penalty", "ce_weight", "score_ce", "score_weight", "ce_sum"):
        loss_options[name] = getattr(args, name)
    try:
        train(args, model, plan, held_out, loss_options, folder)
    except torch.OutOfMemoryError:
        remedy = "lower --batch-size (and raise --accumulation) or --max-length, or train adapters: --lora"
        raise Fault(f"{folder}: out of memory; {remedy}") from None
    facts = {"examples": len(examples), "tokens": tokens}
    training.save_checkpoint(args, model, tokenizer, folder, settings, started, facts)


def main() -> None:
    parser = make_training_parser(__doc__, stage=1, defaults=DEFAULTS)
    add = parser.add_argument_group("stage 1").add_argument
    add("--no-cot", action="store_true", help="train on the score alone, without any CoT")
    args = parser.parse_args()
    fetch_default_data(args, parser.get_default("data"))
    args.grid = choose_grid(args)
    need = ("id", "prompt", "score") if args.no_cot else ("id", "prompt", "cot", "score")
    run_stage(args, need, cots_of=lambda record: [record["cot"]])


if __name__ == "__main__":
    runs.run(main)
