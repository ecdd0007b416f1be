"""What surrounds a training that may be cut off at any moment: state, log, signals."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import get_cosine_schedule_with_warmup

from tract import curves, hub, ranks, runs
from tract.card import card
from tract.encode import Example
from tract.runs import Fault
from tract.text import thinking_setting

BAD_STEPS = 10  # steps in a row without a finite loss after which training stops
MEASURES = {"ce": "CE {:.3f} a token", "rmse": "RMSE {:.3f}", "r": "r {:.3f}", "finished": "{:.0%} finished"}


def begin(args) -> tuple:
    """Make OUT.part, or go on with it; returns it, its settings and its lock, which rank 0 alone has."""
    found = (Path(f"{args.out}.part"), None, None)
    if not ranks.rank():
        found = runs.begin(args)
    ranks.wait()
    return found


def save_checkpoint(args, model, tokenizer, part: Path, settings: dict, started: float, facts: dict) -> None:
    """Write the checkpoint and run.json, and only then give all the name args.out. Raises Fault."""
    weights = ranks.together(model.state_dict()) if args.fsdp else None
    if ranks.rank():
        return
    log = curves.read_log(part)
    skipped = len([line for line in log if not line["taken"]])
    if skipped:
        print(f"{skipped} of {len(log)} steps were not finite and not taken, see log.jsonl")
    if skipped == len(log):
        raise Fault(f"{part}: no step was finite, nothing was trained; remove it, and try a lower --lr")
    whole = part / "whole"
    try:
        model.save_pretrained(whole, state_dict=weights)
        tokenizer.save_pretrained(whole)
    except Exception as error:  # of a full disk, each library says it in its own way
        raise Fault(f"{part}: the checkpoint can't be written ({error}); {runs.GO_ON}") from None
    shutil.copy(part / "log.jsonl", whole)
    (whole / "README.md").unlink(missing_ok=True)  # peft's, a form to fill in
    facts |= {"last_step": log[-1], "enable_thinking": thinking_setting(tokenizer)}
    run = runs.write_run(whole / "run.json", args, settings, started, **facts)
    for name in ("README.md", "curves.png"):
        try:  # a training of hours does not fail for want of a page about it
            content = card(run) if name == "README.md" else curves.draw({"": log}).savefig
            runs.write_whole(whole / name, content)
        except Exception as error:
            print(f"{args.out}: without {name} ({hub.one_line(error)})")
    runs.finish(part, args.out)
    print(f"{args.out}: stage {args.stage} done in {time.time() - started:.0f} s")


def make_optimiser(model, args, steps: int):
    """Make AdamW and its schedule: a linear warm-up over the share --warmup of steps, then a cosine to 0."""
    groups = {}  # matrices decay, norms and biases do not; weights that FSDP spreads go by themselves
    for weight in model.parameters():
        if weight.requires_grad:
            decay = args.weight_decay if weight.ndim >= 2 else 0.0
            kind = (decay, ranks.is_spread(weight))
            group = groups.setdefault(kind, {"params": [], "weight_decay": decay})
            group["params"].append(weight)
    # fused: one pass over the weights, and on a GPU no second copy of them
    optimiser = torch.optim.AdamW(list(groups.values()), lr=args.lr, betas=(0.9, 0.999), fused=True)
    return optimiser, get_cosine_schedule_with_warmup(optimiser, round(args.warmup * steps), steps)


class Journal:
    """Log each step to folder/log.jsonl, save the state every so often, and go on from there."""

    def __init__(self, args, folder: Path, model, optimiser, schedule, n_steps: int):
        self.args = args
        self.folder = folder
        self.n_steps = n_steps
        self.valid_label = "held out, without CoTs" if args.no_cot else "held out, on the CoTs given"
        if args.stage == 3:
            self.valid_label = "held out, on its own CoTs"
        self.trained = (model, optimiser, schedule)
        self.bad_steps = 0  # in a row
        self.stopping = False

    def __enter__(self) -> "Journal":
        self.done = load_state(self.folder, *self.trained)
        self.log = open(os.devnull if ranks.rank() else self.folder / "log.jsonl", "a", buffering=1)
        label = f"stage {self.args.stage}"
        self.bar = runs.progress(self.n_steps, self.done, label, "step", quiet=ranks.rank() > 0)
        self.old_handlers = {n: signal.signal(n, self.stop) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
        self.log.close()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame) -> None:
        """Stop after the step in flight; at the second SIGINT or SIGTERM, at once."""
        if self.stopping:
            signal.default_int_handler(number, frame)
        self.stopping = True

    def remaining(self, plan: list) -> Iterator[tuple[int, list[Example]]]:
        """Yield the steps that are still to be taken: their numbers, from 1 on, and their examples."""
        for step, window in enumerate(plan[self.done :], self.done + 1):
            # For dropout: other numbers in each step and on each rank, and the same after an interruption
            torch.manual_seed(runs.seed_of(f"{self.args.seed}/{step}/{ranks.rank()}"))
            yield step, window

    def end_step(self, window: list[Example], line: dict) -> None:
        """Log a step, save the state where that is due, stop if asked to. Raises Fault, KeyboardInterrupt."""
        step = line["step"]
        self.bar.set_postfix(loss=line["loss"], refresh=False)
        for name in ("loss", "ce", "penalty", "grad_norm"):
            if not math.isfinite(line[name]):
                line[name] = None  # JSON knows no NaN
        if not all(math.isfinite(x) for x in line.get("valid", {}).values()):
            del line["valid"]
            self.bar.write(f"step {step}: {self.valid_label}: not finite")
        self.log.write(json.dumps(line) + "\n")
        self.bar.update()
        self.bad_steps = 0 if line["taken"] else self.bad_steps + 1
        if not line["taken"]:
            ids = ", ".join(dict.fromkeys(example.id for example in window))  # stage 3: several CoTs each
            self.bar.write(f"step {step} not taken, not finite: {ids}")
        if "valid" in line:
            when = f"step {step}"
            if self.args.stage < 3:
                when = f"epoch {step * self.args.epochs // self.n_steps}"
            values = ", ".join(MEASURES[name].format(x) for name, x in line["valid"].items() if name != "n")
            self.bar.write(f"{when}: {self.valid_label}: {values}")
        stopping = ranks.anyone(self.stopping)
        too_bad = self.bad_steps == BAD_STEPS
        if step % self.args.save_every == 0 or step == self.n_steps or too_bad or stopping:
            if not ranks.rank():
                os.fsync(self.log.fileno())  # the log may be ahead of the state, never behind
            save_state(self.folder, *self.trained, step)
            ranks.wait()
        if too_bad:
            what = f"stopped after {BAD_STEPS} steps that were not finite"
            raise Fault(f"{self.folder}: {what}; try a lower --lr")
        if stopping:
            raise KeyboardInterrupt(f"{self.folder}: stopped after step {step}; the same command goes on")


def save_state(folder: Path, model, optimiser, schedule, step: int) -> None:
    """Save all that a run needs to end as if it had never stopped. Raises Fault."""
    state = {"step": step, "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict()}
    state["weights"] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = ranks.together(state)
    if not ranks.rank():
        runs.write_whole(folder / "state.pt", partial(torch.save, state))


def load_state(folder: Path, model, optimiser, schedule) -> int:
    """Put model, optimiser, schedule and log back to where they were saved; returns the step, 0 for none."""
    log = folder / "log.jsonl"
    path = folder / "state.pt"
    if not path.is_file():
        if not ranks.rank():
            log.unlink(missing_ok=True)
        return 0
    # Mapped, not read: under torchrun every process does this, and a state can take most of the memory
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    weights = dict(model.named_parameters())
    saved = {name: ranks.spread_like(weights[name], x) for name, x in state["weights"].items()}
    model.load_state_dict(saved, strict=False)
    # With --fsdp a rank keeps its share of what AdamW has for a weight
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    for i, moments in state["optimiser"]["state"].items():
        for name, moment in moments.items():
            moments[name] = ranks.spread_like(trained[i], moment)
    optimiser.load_state_dict(state["optimiser"])
    schedule.load_state_dict(state["schedule"])
    if not ranks.rank():
        lines = log.read_text("utf-8").splitlines(keepends=True)
        runs.write_whole(log, "".join(lines[: state["step"]]))
    print(f"{folder}: going on after step {state['step']}")
    return state["step"]
