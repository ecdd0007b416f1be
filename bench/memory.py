"""Estimate the memory that training takes: does a model fit?

    python bench/memory.py --model mistral-7b --4bit
    python bench/memory.py --model mistral-7b --full --batch-size 4 --length 2000

It takes the options of stage1_train.py. The estimate is what tensors hold at the peak of a step, in bf16 but
with --fp32, from the shapes alone; what CUDA and its allocator take comes on top. bench/peers.py measures.
"""

import itertools
import sys
from copy import deepcopy
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import stage1_train
from tract import hub, models, runs
from tract.options import make_training_parser
from tract.records import InputError

SHAPES = {  # transformers' defaults are those of Mistral-7B; no hub is needed for these
    "mistral-7b": MistralConfig(sliding_window=None),
    "llama-3.1-8b": LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8),
}
FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight in NF4, of its block's scale, of that one's


def shape_of(config):
    """Make a model without weights: the shapes of all tensors are there, and nothing is in them."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def estimate(model, lora: int | None, batch: tuple, bf16: bool, checkpointing: bool, four_bit=False) -> dict:
    """Return the bytes at the peak of a step, by what takes them, for blocks like those of Llama and Mistral.

    Such a block has RMSNorm, a gated MLP, and attention that stores no matrix of scores. model: as `shape_of`
    makes it. lora: the rank, None for all weights. batch: sequences, tokens of each, and how many of these
    carry loss.
    """
    config = model.config.get_text_config()
    sequences, length, supervised = batch
    parameters = sum(p.numel() for p in model.parameters())
    linear = [m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    trained = sum(m.in_features + m.out_features for m in linear) * lora if lora else parameters

    compute = 2 if bf16 else 4  # bytes of a number in the matrix products
    stream = compute if lora else 4  # of one between the blocks: weights in fp32 make it fp32
    h = config.hidden_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    mlp = getattr(config, "intermediate_size", None) or 4 * h  # GPT-2 and its like do not say
    width = getattr(config, "head_dim", None) or h // heads
    # A block keeps for its backward pass, bytes a token: of each norm the input in fp32, and for its weight
    # what it made of that; of attention q, k, v and output; of the MLP gate, its activation, up, the product
    block = 2 * 4 * h * (1 if lora else 2) + compute * (2 * width * (heads + kv_heads) + 4 * mlp)
    # and what its layers (with LoRA the adapters) see, which each casts for itself from fp32 to bf16
    block += compute * h * (5 if compute < stream else 2)
    kept = sequences * length * config.num_hidden_layers * (stream * h if checkpointing else block)
    if bf16 and not lora and not checkpointing:  # the bf16 copies of the weights
        kept += 2 * sum(m.weight.numel() for m in linear)
    # The logits of a part in fp32, their log-softmax and its gradient; the head in bf16
    rows = min(sequences * supervised, max(1, stage1_train.MAX_LOGITS // config.vocab_size))
    working = 12 * rows * config.vocab_size + (2 * config.vocab_size * h if bf16 and not lora else 0)
    recomputed = sequences * length * block if checkpointing else 0
    weights = parameters * (compute if lora else 4) + (4 * trained if lora else 0)
    if four_bit:
        sizes = [m.weight.numel() for m in linear]
        weights -= (compute - FOUR_BITS) * sum(sizes)
        recomputed += compute * max(sizes, default=0)  # the layer that is being multiplied is unpacked
    return {
        "weights": weights,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "activations": kept,
        "logits or a recomputed block": max(working, recomputed),
    }


def peak_of(run) -> tuple[int, object]:
    """Return the bytes that tensors hold at the peak of run(), beyond those before, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        return torch.cuda.max_memory_allocated() - before, found
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events)), found


def random_model(config, name: str, dtype: torch.dtype, **options):
    """Make a model on the device; given a config, it can take the place of models.load_model."""
    with models.device():  # a copy, for what trains a model may change its config
        return AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype).eval()


def main() -> None:
    parser = make_training_parser(__doc__, stage=1, defaults=stage1_train.DEFAULTS)
    add = parser.add_argument_group("memory").add_argument
    add("--length", type=runs.COUNT, default=3000, help="tokens of a sequence")
    add("--supervised", type=runs.COUNT, default=250, help="how many of them carry loss: CoT and score")
    parser.set_defaults(bf16=True)
    args = parser.parse_args()
    if args.four_bit and not args.lora:
        raise InputError("--4bit: is for --lora")
    try:
        name = hub.resolve(hub.base_of(args.model) or args.model)
        config = SHAPES.get(args.model) or AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise hub.refusal(args.model, error) from None
    model = shape_of(config)
    batch = (args.batch_size, args.length, args.supervised)
    parts = estimate(model, args.lora, batch, args.bf16, args.gradient_checkpointing, args.four_bit)
    total = sum(parts.values()) / 2**30
    print(f"{args.model}: {total:.2f} GiB at the peak of a step")
    for part, size in parts.items():
        print(f"{size / 2**30:8.2f} {part}")
    # 1.5 GiB for CUDA and its allocator is a guess
    gpus = (f"a GPU of {size} GiB" for size in (8, 12, 16, 24, 40, 48, 80, 141) if size >= total + 1.5)
    print(f"fits {next(gpus, 'no GPU of up to 141 GiB')}")


if __name__ == "__main__":
    runs.run(main)
