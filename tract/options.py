"""The options of the scripts that run a model, with their defaults; None may be filled in."""

import argparse
import json
from pathlib import Path

from tract import hub, models
from tract.records import ROOT, Grid, InputError
from tract.runs import COUNT, SEED, SHARE, WEIGHT, Help, number


def make_training_parser(description: str, stage: int, defaults: dict[str, dict]) -> argparse.ArgumentParser:
    """Make the options of a training stage; those of stages 1 and 2 that stage 3 has no use for, it lacks.

    defaults: model → default of each option; those of "any other" are for models that it does not name.
    """
    model = "out/stage2" if stage == 3 else models.TINY_SEED
    seed, trained = asked_for(model)
    defaults = defaults_of(seed, defaults) | trained  # a judge goes on as it was trained
    data = str(ROOT / defaults.pop("data"))
    lora = defaults.pop("lora")
    rank = lora or 8  # the paper's is 8
    # As a text, since argparse takes a number that equals the default for one that was not given
    default = None if lora is None else str(lora)

    parser = make_parser(description)
    add = parser.add_argument  # what matters most comes first, in no group
    names = ", ".join(hub.MODELS)
    what = "p_tract: folder or hub id" if stage == 3 else f"seed model: folder, hub id or one of {names}"
    add("--model", default=model, help=what)
    add("--data", default="out/cots.jsonl" if stage == 2 else data, help="JSONL file of records")
    add("--out", type=Path, default=Path(f"out/stage{stage}"), help="folder of the checkpoint")
    if stage < 3:
        add("--epochs", type=COUNT, help="passes over the data")
    add = parser.add_mutually_exclusive_group().add_argument
    what = f"adapters of this rank, or of rank {rank}, on all linear layers; None: all weights"
    add("--lora", nargs="?", type=COUNT, const=rank, default=default, metavar="RANK", help=what)
    full = {"action": "store_const", "const": None, "dest": "lora", "default": argparse.SUPPRESS}
    add("--full", **full, help="all weights, in fp32")
    add = parser.add_argument_group("checks").add_argument
    add("--valid", help="JSONL file of held-out records; None: in stage 1, that beside its default --data")
    if stage < 3:
        add("--dry-run", action="store_true", help="fetch default data, show options and an example's mask")
        add_loss(parser)
    else:
        add_sampling(parser)
    add = parser.add_argument_group("optimiser").add_argument
    what = "peak learning rate of AdamW"
    if stage == 3:
        what = "constant learning rate of AdamW; None: 1e-5 for adapters, else 1e-6"
    add("--lr", type=WEIGHT, help=what)
    add("--batch-size", type=COUNT, help="sequences on the device at a time")
    add("--weight-decay", type=WEIGHT, help="of weight matrices")
    add("--clip", type=WEIGHT, default=1.0, help="largest norm of the gradient; 0: any")
    if stage < 3:
        add("--accumulation", type=COUNT, help="batches an optimiser step")
        add("--warmup", type=SHARE, help="share of the steps with rising learning rate; a cosine follows")
        add("--fsdp", action="store_true", help="under torchrun: spread weights, gradients, AdamW (--full)")
        add("--save-every", type=COUNT, default=200, help="steps after which the state is saved")
    what = "with --lora: keep the base in 4 bits (NF4, needs bitsandbytes)"
    add("--4bit", dest="four_bit", action="store_true", help=what)
    recompute = argparse.BooleanOptionalAction
    add("--gradient-checkpointing", action=recompute, help="recompute activations: slower, far less memory")
    add_common(parser)
    parser.set_defaults(**defaults, stage=stage, no_cot=False)
    return parser


def add_loss(parser: argparse.ArgumentParser) -> None:
    """Add the options of the loss in stages 1 and 2."""
    add = parser.add_argument_group("loss: ce-weight · CE + λ · penalty, as in loss.py").add_argument
    add("--lambda", dest="lam", type=WEIGHT, default=1.0, help="λ, weight of the penalty; 0: CE only")
    add("--penalty", choices=("squared", "rps", "ntl"), default="squared", help="distance to the true score")
    add("--ce-weight", type=WEIGHT, default=1.0, help="weight of the CE; 0: the penalty only")
    add("--score-ce", choices=("token", "two-hot", "none"), default="token", help="what CE sees at the score")
    add("--score-weight", type=WEIGHT, help="weight of the CE at the score, as λ's; None: one token's share")
    add("--ce-sum", action="store_true", help="sum CE over a sequence, as the formula; else mean of tokens")


def make_parser(description: str) -> argparse.ArgumentParser:
    usage = "%(prog)s [options]"  # all of them would be ten lines, at every mistake
    return argparse.ArgumentParser(
        usage=usage, description=description, formatter_class=Help, allow_abbrev=False
    )


def asked_for(default: str) -> tuple[str, dict]:
    """Return the seed of the --model asked for and, if it is a judge, how it was trained: lora, four_bit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", default=default)
    parser.add_argument("--help", "-h", action="store_true")  # which shall not wait for the hub
    asked = parser.parse_known_args()[0]
    try:
        return hub.origin(asked.model, offline=asked.help)
    except InputError:  # which is reported when the options are read
        return asked.model, {}


def defaults_of(model: str, defaults: dict[str, dict]) -> dict:
    """Return the defaults of a model by its name; a folder is meant from here, or from ROOT."""
    # The seed of p_s was typed by whoever trained it, mostly in ROOT
    meant = {hub.resolve(model), str((ROOT / model).resolve())}
    for name, settings in defaults.items():
        if hub.resolve(name) in meant or str(ROOT / name) in meant:
            return settings
    return defaults["any other"]


def make_writing_parser(description: str, model: str, data: str | None, out: str) -> argparse.ArgumentParser:
    """Make the options of gen_cot.py and predict.py; `source_of_cots` is the group that --num-cots is in."""
    parser = make_parser(description)
    add = parser.add_argument  # what matters most comes first, in no group
    add("--model", default=model, help=f"checkpoint folder, hub id or one of {', '.join(hub.MODELS)}")
    add("--data", default=data, help="JSONL file of records; None: in gen_cot.py those of --model's training")
    add("--out", type=Path, default=Path(out), help="JSONL file to write")
    add("--batch-size", type=COUNT, default=32, help="sequences at a time; halved when memory runs out")
    parser.source_of_cots = parser.add_mutually_exclusive_group()
    parser.source_of_cots.add_argument("--num-cots", type=COUNT, default=1, help="CoTs a prompt")
    add_sampling(parser)
    add = parser.add_argument_group("many records (docs/scale.md)").add_argument
    add("--shard", type=shard, metavar="I/N", help="take the I-th of N shares of the records; cat joins them")
    add("--engine", choices=("torch", "vllm"), default="torch", help="vllm: see vllm_engine.py")
    add("--engine-args", nargs="+", type=setting, default=[], metavar="KEY=VALUE", help="for vLLM's LLM(...)")
    add_common(parser)
    parser.set_defaults(no_cot=False, given=None)  # predict.py has these options, gen_cot.py has not
    return parser


def make_judging_parser(description: str) -> argparse.ArgumentParser:
    """Make the options of predict.py, which Judge has as well."""
    data = str(ROOT / "data/tiny/test.jsonl")
    parser = make_writing_parser(description, "out/stage2", data, "out/predictions.jsonl")
    add = parser.source_of_cots.add_argument  # the group of --num-cots: they exclude each other
    add("--no-cot", action="store_true", help="write no CoT: plain RAIL")
    add("--given", choices=("cot", "cots"), help="score the CoTs in this field, write none")
    add = parser.add_argument_group("prediction").add_argument
    add("--renormalise", action="store_true", help="divide by the mass on the grid")
    add("--intervals", help="metrics.json of eval.py: adds `low` and `high` (docs/trust.md)")
    return parser


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the options of how CoTs are sampled, with the paper's defaults."""
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=COUNT, default=1024, help="tokens; a longer CoT is unfinished")
    add("--temperature", type=WEIGHT, default=1.0, help="0 always takes the most likely token")
    add("--top-p", type=number(float, 1e-6, 1), default=0.9, help="mass that tokens are sampled from")
    add("--repetition-penalty", type=number(float, 1e-6), default=1.03, help="1 is none")


def shard(text: str) -> tuple[int, int]:
    """Parse --shard: 2/8 is the second of eight shares."""
    number, shares = map(int, text.split("/"))
    if not 1 <= number <= shares:
        raise ValueError
    return number, shares


def setting(text: str) -> tuple[str, object]:
    """Parse one of --engine-args: its value is JSON, or else the text itself."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that mean the same in every script that runs a model."""
    group = parser.add_argument_group("common")
    add = group.add_argument
    add("--grid", help="1,2,3,4,5 or token=value pairs, 1=0,3=50,5=100; None: the checkpoint's, else 1 to 5")
    add("--suffix", help="words between CoT and score; None: the checkpoint's or 'So the overall score is'")
    add("--max-length", type=COUNT, default=3000, help="tokens; longer records are left out, and counted")
    add("--seed", type=SEED, default=0, help="random seed")
    add = group.add_mutually_exclusive_group().add_argument
    parser.set_defaults(bf16=models.has_bf16())
    both = {"dest": "bf16", "default": argparse.SUPPRESS}  # the help of the first names the default of both
    where = "the default on a GPU that has it, else --fp32; new CPUs do it fast, too"
    add("--bf16", action="store_true", **both, help=f"compute in bf16: {where}")
    add("--fp32", action="store_false", **both, help="compute in fp32")


def choose_grid(args: argparse.Namespace) -> Grid:
    """Return the grid asked for, else the checkpoint's or the default. Raises InputError."""
    made = hub.training_arguments(args.model)
    try:
        default = Grid.parse(made["grid"], made["suffix"]) if made else Grid()
    except InputError as error:
        raise InputError(f"{args.model}: its run.json is not ours, or broken ({error}); remove it") from None
    suffix = default.suffix if args.suffix is None else args.suffix
    grid = Grid.parse(args.grid or str(default), suffix)
    if made and grid != default:
        was = f"{args.model} was trained on {default} after '{default.suffix.strip()}'"
        raise InputError(f"--grid or --suffix: {was}; leave both out")
    return grid
