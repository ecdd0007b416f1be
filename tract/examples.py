"""What comes before a training: fitting options, data, examples, a plan of its steps."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from tract import hub, models, ranks, runs
from tract.adapters import four_bit_options
from tract.encode import Example, encode
from tract.records import InputError, read_records


def check_training_options(args) -> None:
    """Refuse an --out that is there, and options that do not go with each other or the model: InputError."""
    if not args.dry_run:
        runs.check_out(args.out)
    if args.fsdp and (args.lora or not ranks.launched()):
        raise InputError("--fsdp: spreads all weights over the processes of torchrun; start so, with --full")
    no_ce_at_score = args.ce_weight == 0 or args.score_ce == "none" or args.score_weight == 0
    if args.stage < 3 and args.lam == 0 and no_ce_at_score:
        raise InputError("--lambda 0: then nothing trains the score; leave it out, or what turns off its CE")
    if args.score_weight is not None and (args.score_ce == "none" or args.ce_weight == 0):
        raise InputError(
            "--score-weight: weighs nothing with --score-ce none or --ce-weight 0; leave one out"
        )
    if hub.is_four_bit(args.model) and not args.lora:
        raise InputError(f"{args.model}: its base is in 4 bits, which --full can't train; leave out --full")
    if args.four_bit and not args.lora:
        raise InputError("--4bit: weights in 4 bits can't be trained, adapters on them can; add --lora")
    four_bit_options(args.four_bit, torch.float32)  # is the library there?
    rank = hub.read(args.model, "adapter_config.json").get("r", args.lora)
    if args.lora and args.lora != rank:
        raise InputError(f"--lora {args.lora}: {args.model} has adapters of rank {rank}; leave out --lora")


def read_examples(
    args, path: str | None, need: tuple, cots_of: Callable, tokenizer, score_ids: list[int]
) -> list[Example]:
    """Encode every (record, CoT) pair of a file that is not too long; [] without one. Raises InputError."""
    if path is None:
        return []
    records = read_records(path, args.grid, need)
    examples = []
    quiet = ranks.rank() > 0
    for record in tqdm(records, desc="tokenise", unit="record", delay=5, leave=False, disable=quiet):
        cots = [""] if args.no_cot else cots_of(record)
        for number, cot in enumerate(cots, 1):
            id = record["id"] if len(cots) == 1 else f"{record['id']}#{number}"
            record_with_cot = record | {"id": id, "cot": cot}
            examples.append(encode(tokenizer, record_with_cot, args.grid, score_ids, args.no_cot))
    if not examples:
        raise InputError(f"{path}: no CoT in it is finished; train stage 1 longer, or --keep-unfinished")
    unknown = sum(example.ids.count(tokenizer.unk_token_id) for example in examples)
    share = unknown / sum(len(example.ids) for example in examples)
    if share > 0.05:
        print(f"{path}: {share:.0%} of its tokens are unknown words to {args.model}; is --model right?")
    return leave_out_too_long(path, examples, min(args.max_length, tokenizer.positions))


def leave_out_too_long(path: str, examples: list[Example], longest: int) -> list[Example]:
    """Return the examples that fit; report the others. Raises InputError where none does."""
    fitting = [example for example in examples if len(example.ids) <= longest]
    if not fitting:
        shortest = min(len(example.ids) for example in examples)
        raise InputError(f"{path}: all are longer than {longest} tokens, the shortest has {shortest}")
    too_long = [example.id for example in examples if len(example.ids) > longest]
    runs.report(too_long, f"left out, longer than {longest} tokens")
    return fitting


def plan_epoch(examples: list[Example], size: int, name: str) -> list[list[Example]]:
    """Split an epoch into windows of `size` examples, one an optimiser step, in an order drawn by `name`.

    The examples of a window are of like length, which leaves little padding: they are sorted within 50 steps,
    then the steps are shuffled.
    """
    generator = torch.Generator().manual_seed(runs.seed_of(name))
    shuffled = [examples[i] for i in torch.randperm(len(examples), generator=generator)]
    windows = []
    for start in range(0, len(shuffled), 50 * size):
        by_length = sorted(shuffled[start : start + 50 * size], key=lambda example: len(example.ids))
        windows += [by_length[i : i + size] for i in range(0, len(by_length), size)]
    return [windows[i] for i in torch.randperm(len(windows), generator=generator)]


def show_example(args, tokenizer, example: Example, score_ids: list[int]) -> None:
    """Print the options, and an example with its loss mask: what --dry-run is for."""
    print(json.dumps(vars(args) | {"grid": str(args.grid)}, default=str, indent=2))
    ids = example.ids
    start = example.start
    score = example.score_position
    print(f"\nrecord {example.id}, {start} tokens without loss:\n{tokenizer.decode(ids[:start])}")
    print(f"\n{score - start} tokens with CE:\n{tokenizer.decode(ids[start:score])}")
    token = f"{tokenizer.decode([ids[score]])!r} (id {ids[score]})"
    print(f"\ntoken {score}: {token}, CE at the score: {args.score_ce}. Here the penalty")
    print(f"({args.penalty}) to {example.score:g} is read, from p of the ids {' '.join(map(str, score_ids))}")
    print(f"\nlast token, with CE: {tokenizer.decode([ids[-1]])!r}\n\n--dry-run: nothing was written")


def print_plan(args, examples: list[Example], held_out: list[Example], tokens: int, steps: int) -> None:
    """Print how much there is to train on, and what λ would be on the grid 1 to 5: penalties grow with it."""
    share = sum(example.n_supervised for example in examples) / tokens
    print(f"{len(examples)} examples, {tokens} tokens, {share:.0%} supervised; {steps} steps")
    print(f"{len(held_out)} held out" if held_out else "no --valid: nothing is held out")
    width = args.grid.values[-1] - args.grid.values[0]
    if args.lam and width != 4:
        lam_of_1 = (4 / width) ** 2 if args.penalty == "squared" else 4 / width  # weighs as 1 on 1 to 5
        weight = f"λ = {args.lam:g} weighs as much as {args.lam / lam_of_1:.3g} on 1 to 5"
        print(f"the grid is {width:g} wide: {weight}; --lambda {lam_of_1:.3g} would weigh as much as 1")


def fetch_default_data(args, default: str) -> None:
    """Complete args.valid if args.data are the default, and run the prepare.py beside them to get both."""
    path = Path(default).resolve()
    if Path(args.data).resolve() != path:
        return
    args.valid = args.valid or str(path.with_name("valid.jsonl"))
    ranks.join()
    if not path.is_file():  # what can be refused at once comes first: the download takes long
        check_training_options(args)
        models.load_tokenizer(args.model)
        prepare = path.with_name("prepare.py")
        if not ranks.rank():
            print(f"{path}: not there yet; {prepare} gets it", flush=True)
            code = subprocess.run([sys.executable, prepare]).returncode
            if code:
                raise SystemExit(code)
    ranks.wait()


def print_memory(model) -> None:
    """Print what training takes for sure on this device, and what the device has."""
    takes = 0
    for weight in model.parameters():
        here = weight.to_local() if ranks.is_spread(weight) else weight
        bytes_each = here.element_size() + (12 if weight.requires_grad else 0)  # gradient and two moments
        takes += here.numel() * bytes_each
    if torch.cuda.is_available():
        has = torch.cuda.mem_get_info()[1]
    else:
        has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(f"memory: weights, gradients and AdamW take {takes / 2**30:.2f} GiB, activations more;", end=" ")
    print(f"{models.device()} has {has / 2**30:.2f} GiB (bench/memory.py estimates the whole)")
