"""What surrounds stage 3: prompts, the model's own CoTs, held-out records, best weights."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch

from tract import runs
from tract.encode import Example, score_tokens
from tract.examples import leave_out_too_long, plan_epoch
from tract.files import encode_prompts
from tract.judge import read_missing_scores
from tract.models import autocast
from tract.options import make_training_parser
from tract.records import InputError, read_records
from tract.runs import COUNT, WEIGHT, Fault, number
from tract.writing import GREEDY, Cot, Loaded, score, write_cots

EVERY = 10  # steps after which held-out records are judged, the state is saved, a collapse looked for


def read_options(description: str, defaults: dict[str, dict], loss: dict) -> argparse.Namespace:
    """Read the options of stage 3, and put `loss` among them, where the code shared with stage 1 looks."""
    parser = make_training_parser(description, stage=3, defaults=defaults)
    add = parser.add_argument_group("stage 3").add_argument
    add("--num-cots", type=number(int, 2), default=4, help="CoTs a prompt (K)")
    add("--prompts", type=COUNT, default=8, help="prompts an optimiser step")
    add("--steps", type=COUNT, default=100, help="optimiser steps")
    add("--beta", dest="lam", type=WEIGHT, default=1.0, help="β, weight of the squared error; 0: none")
    add("--advantage", choices=("leave-one-out", "group"), default="leave-one-out", help="see loss.py")
    what = "−(ŷ − y*)²; 1 if the likeliest score is the nearest to y*, else 0; a control that teaches nothing"
    add("--reward", choices=("squared", "exact", "random"), default="squared", help=what)
    # So that CoTs are drawn from the model's own distribution
    parser.set_defaults(lr=None, temperature=1.0, top_p=1.0, repetition_penalty=1.0)
    parser.set_defaults(**loss, warmup=0.0, save_every=EVERY, fsdp=False, dry_run=False)
    args = parser.parse_args()
    if args.temperature < GREEDY:
        raise InputError("--temperature 0: all CoTs of a prompt would be the same; stage 3 compares them")
    if args.lr is None:  # adapters take ten times as much, as in REAL's paper
        args.lr = 1e-5 if args.lora else 1e-6
    return args


def load_prompts(args, path: str | None, tokenizer) -> list[Example]:
    """Read records as examples of prompts alone, without CoTs yet; [] without a path. Raises InputError."""
    if path is None:
        return []
    suffix_ids, _ = score_tokens(tokenizer, args.grid)
    longest = min(args.max_length, tokenizer.positions - len(suffix_ids) - 3)  # a token, suffix, score, end
    records = read_records(path, args.grid, ("id", "prompt", "score"))
    prompt_ids = encode_prompts(tokenizer, records)
    prompts = []
    for record in records:
        ids = prompt_ids[record["id"]]
        n = len(ids)  # nothing is supervised yet
        prompts.append(Example(record["id"], ids, start=n, score_position=n, score=float(record["score"])))
    return leave_out_too_long(path, prompts, longest)


def plan_steps(prompts: list[Example], size: int, steps: int, seed: int) -> list[list[Example]]:
    """Return the prompts of each step, pass after pass over all of them."""
    plan = []
    while len(plan) < steps:
        plan += plan_epoch(prompts, size, f"{seed}/{len(plan)}")
    return plan[:steps]


def write_own(args, judge: Loaded, prompts: list[Example], when: int | str, num_cots: int) -> list[list[Cot]]:
    """Let the model in training write CoTs for each prompt; random numbers depend on seed, `when` and id.

    A CoT that missed the suffix gets it, in its `ids`, and its score is read after it.
    """
    sampling = argparse.Namespace(**vars(args) | {"seed": f"{args.seed}/{when}", "num_cots": num_cots})
    records = [{"id": prompt.id} for prompt in prompts]
    ids = [list(prompt.ids) for prompt in prompts]
    check_weights(args, judge, prompts)  # and leave the model in eval mode
    with autocast(args.bf16):
        # Nothing is kept for a backward pass, so more sequences fit than in training
        groups = write_cots(judge, records, ids, sampling, at_once=8 * args.batch_size)
        read_missing_scores(judge, groups)
    judge.model.train()
    return groups


def check_weights(args, judge: Loaded, prompts: list[Example]) -> None:
    """Score the first prompt, and raise Fault if that score is not finite. Leaves the model in eval mode."""
    judge.model.eval()  # in training mode, gradient checkpointing would turn the cache off
    with autocast(args.bf16):
        expected = score(judge, [list(prompts[0].ids)])[0].expected
    if not math.isfinite(expected):
        raise Fault(f"{args.out}.part: the last step spoilt the weights; remove it, and try a lower --lr")


def facts_of(groups: list[list[Cot]]) -> dict:
    """Return the share of CoTs that are finished, the number that the suffix was forced on, mean tokens."""
    cots = [cot for group in groups for cot in group]
    forced = sum(1 for cot in cots if not cot.finished)
    length = mean(len(cot.sampled) for cot in cots)
    return {"finished": 1 - forced / len(cots), "forced": forced, "length": length}


def evaluate(args, judge: Loaded, prompts: list[Example]) -> dict:
    """Judge each held-out prompt on one CoT of the model's, with the same random numbers every time.

    Returns their number n, the RMSE, Pearson's r (0 where all predictions are the same), and the share of
    finished CoTs.
    """
    groups = write_own(args, judge, prompts, "valid", num_cots=1)
    cots = [group[0] for group in groups]
    expected = torch.tensor([cot.scores.expected for cot in cots], dtype=torch.float64)
    true = torch.tensor([prompt.score for prompt in prompts], dtype=torch.float64)
    r = torch.corrcoef(torch.stack([expected, true]))[0, 1].nan_to_num()
    rmse = (expected - true).square().mean().sqrt()
    return {"n": len(prompts), "rmse": float(rmse), "r": float(r), "finished": facts_of(groups)["finished"]}


def best_of(log: list[dict]) -> dict:
    """Return {"step": …, "valid": …} of the lowest held-out RMSE in a log; step 0 is before training."""
    found = [{"step": 0, "valid": log[0]["valid_before"]}]
    found += [{"step": line["step"], "valid": line["valid"]} for line in log if "valid" in line]
    return min(found, key=lambda tried: tried["valid"]["rmse"])


def keep_best(folder: Path, model, step: int, log: list[dict], held_out: list[Example]) -> None:
    """Save the weights if none before were better on `held_out`; `step` 0 is before training.

    To be called after end_step: a run killed between the two calls this again, with the same weights.
    """
    if held_out and (step == 0 or best_of(log)["step"] == step):
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        runs.write_whole(folder / "best.pt", partial(torch.save, weights))


def load_best(folder: Path, model, log: list[dict]) -> dict:
    """Put the best weights into the model, if records were held out; returns what run.json says of them."""
    if "valid_before" not in log[0]:
        return {}
    weights = torch.load(folder / "best.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(weights, strict=False)
    best = best_of(log)
    rmse = best["valid"]["rmse"]
    before = log[0]["valid_before"]["rmse"]
    print(f"kept: the weights after step {best['step']}, RMSE {rmse:.3f}; before training {before:.3f}")
    return {"valid_before": log[0]["valid_before"], "kept": best}


def say_collapse(log: list[dict], say: Callable[[str], None]) -> None:
    """Every EVERY steps, say what fell clearly since the first of them."""
    if len(log) % EVERY or len(log) == EVERY:
        return
    for name in ("finished", "reward"):
        values = [line[name] for line in log]
        first = values[:EVERY]
        last = values[-EVERY:]
        # More than four deviations: the difference of two means over 10 steps has one of σ · √(2/10)
        margin = 2 * stdev(first)
        if name == "finished":
            margin = max(0.1, margin)
        if mean(last) < mean(first) - margin:
            fell = f"{name} fell from {mean(first):.3f} to {mean(last):.3f}, means of {EVERY} steps"
            say(f"step {len(log)}: COLLAPSE? {fell}; stop, and try a lower --lr")
