"""Compute what TRACT costs, from FLOPs and bytes alone: memory and GPU hours by model, and both of --fsdp.

    python bench/cost.py    # a table of docs/speed.md, two of docs/scale.md

Lengths are about those of MT-Bench judgements.
"""

import itertools

import torch
from memory import SHAPES, estimate, shape_of  # which puts the repository into sys.path
from transformers import LlamaConfig

from results.speed.draw import PEAK
from results.tables import table
from tract import runs

PROMPT = 1200  # tokens
COT = 130  # tokens
EPOCHS = 2  # passes over the data in each stage
# Of an H100 SXM, whose data sheet says 989 TFLOPs in bf16 and 3.35 TB a second, the assumed share
TRAINING = 0.4 * PEAK
READING = 0.5 * PEAK
WRITING = 0.6 * 3.35e12
ROWS = 64  # CoTs written at a time
SMALLER = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}
SMALLER |= {"vocab_size": 128256, "intermediate_size": 8192, "tie_word_embeddings": True}
MODELS = {"llama-3.2-1b": LlamaConfig(**SMALLER)} | SHAPES


def weights_of(model) -> tuple[int, int]:
    """Return the weights of the decoder's matrices, which every token meets, and those of the head."""
    linear = [m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)]
    return sum(linear), model.get_output_embeddings().weight.numel()


def reading(model, tokens: int, heads: int) -> float:
    """Return the FLOPs of one forward pass over a sequence, with `heads` tokens that go through the head."""
    decoder, head = weights_of(model)
    # In attention four a layer, channel and pair of tokens, of which half are masked
    attention = 2 * model.config.num_hidden_layers * model.config.hidden_size * tokens**2
    return 2 * (decoder * tokens + head * heads) + attention


def training(model, lora: bool, checkpointing: bool, prompt: int = PROMPT, cot: int = COT) -> float:
    """Return the FLOPs of training on a sequence."""
    passes = 2  # forward, and the gradients of the activations
    if not lora:
        passes += 1  # the gradients of the weights: next to none with LoRA
    if checkpointing:
        passes += 1  # activations anew
    return passes * reading(model, prompt + cot, cot)


def hours(model, lora: bool, records: int) -> list[float]:
    """Return the GPU hours of stage 1, CoTs and stage 2 on so many records, and of judging 10,000."""
    stage = EPOCHS * records * training(model, lora, True) / TRAINING / 3600
    prompt = reading(model, PROMPT, 1) / READING / 3600
    config = model.config
    # Read for each token written: a share of the weights, keys and values, two bytes each
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (PROMPT + COT / 2)
    cot = COT * 2 * (sum(weights_of(model)) / ROWS + cached) / WRITING / 3600
    return [stage, records * (prompt + cot), stage, 1e4 * (prompt + cot)]


def main() -> None:
    """Print memory and hours by model, and what --fsdp leaves on each GPU."""
    models = {name: shape_of(config) for name, config in MODELS.items()}
    rows = []
    for name, lora, n in itertools.product(SHAPES, (8, None), (1, 4)):
        row = [name, "LoRA" if lora else "all weights", n]
        for checkpointing in (True, False):
            parts = estimate(models[name], lora, (n, 3000, 250), True, checkpointing)
            row.append(f"{sum(parts.values()) / 2**30:.0f} GiB")
        rows.append(row)
    head = ["model", "trained", "sequences of 3,000 tokens", "checkpointed", "all activations kept"]
    print(table(head, rows))
    rows = []
    for name, lora in itertools.product(models, (True, False)):
        parts = hours(models[name], lora, 100_000)
        numbers = [f"{x:.1f}" for x in (*parts, sum(parts))]
        rows.append([name, "LoRA" if lora else "all weights", *numbers])
    steps = ["stage 1", "CoTs", "stage 2", "judging 10,000", "all"]
    print(table(["H100 hours for 100,000 records", "trained", *steps], rows))
    rows = []
    for name in SHAPES:
        model = models[name]
        whole = sum(estimate(model, None, (1, 3000, 250), True, True).values())
        decoder, _ = weights_of(model)  # 16 bytes of each: weight, gradient, AdamW
        shares = [(whole - 16 * decoder * (n - 1) / n) / 2**30 for n in (1, 2, 4, 8, 32)]
        step = training(model, False, True) / TRAINING
        exchange = [3 * 4 * decoder / speed for speed in (450e9, 50e9)]  # gathered twice, summed once
        rows.append([name, *(f"{x:.0f}" for x in shares), *(f"{x:.2f}" for x in (step, *exchange))])
    head = ["--fsdp: GiB a GPU, on", "1", "2", "4", "8", "32 GPUs", "s to compute a sequence"]
    print(table([*head, "s to exchange weights, 450 GB/s", "50 GB/s"], rows), end="")


if __name__ == "__main__":
    runs.run(main)
