"""Does training take the memory that stage 1 says it will? Expected against measured, on models of real shapes.

    python bench/memory.py --out results/memory/memory.json        # about five minutes on a CPU
    python bench/memory.py --fit                                   # estimates for 7B and 8B, nothing is run
    python bench/memory.py --model mistral-7b --length 1500        # on a GPU, random weights of a model's exact shape

Each case takes two optimiser steps of two batches each in stage 1's loop, on random tokens of which a quarter is supervised.
Measured is the peak of what tensors hold: in bf16 as on a GPU, which a CPU can do as well if slowly, and on a CPU in fp32 too.
Ends with one JSON line.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import machine  # noqa: E402
import workload  # noqa: E402

import models  # noqa: E402
import runs  # noqa: E402
from models import Lora  # noqa: E402
from stage1_train import make_optimiser, train  # noqa: E402

SHAPES = {  # small enough for a laptop, with the proportions of the real ones
    "Mistral, vocabulary 32k": MistralConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2, sliding_window=None,
    ),
    "Llama-3.1, vocabulary 128k": LlamaConfig(
        vocab_size=128256, hidden_size=512, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=2,
    ),
}  # fmt: skip


def expect(config, lora: Lora | None, **sizes) -> models.Memory:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return models.expected_memory(folder, lora, **sizes)


def fit() -> None:
    """What stage 1 will say of the 7B and 8B models on a GPU: nothing is measured here."""
    print("| model | trained | sequences of 3,000 tokens | checkpointed | all activations kept |\n" + "| --- " * 5 + "|")
    for name, config in workload.REAL.items():
        for lora in (Lora(), None):
            for sequences in (1, 4):
                cells = [name, "LoRA" if lora else "all weights", str(sequences)]
                for checkpointing in (True, False):
                    sizes = {"sequences": sequences, "length": 3000, "supervised": 250 * sequences, "bf16": True}
                    cells.append(f"{expect(config, lora, gradient_checkpointing=checkpointing, **sizes).total / 2**30:.0f} GiB")
                print("| " + " | ".join(cells) + " |")


def measure(
    config, lora: Lora | None, *, bf16: bool, sequences: int, length: int, gradient_checkpointing: bool, steps: int = 2
) -> dict:
    """Expected and measured bytes of a training step on a model of this shape."""
    expected = expect(
        config, lora, sequences=sequences, length=length, supervised=sequences * (length // 4),
        bf16=bf16, gradient_checkpointing=gradient_checkpointing,
    )  # fmt: skip
    held = []

    def run() -> None:
        model = workload.random_model(config, torch.bfloat16 if bf16 and lora else torch.float32)
        held.append(network := models.with_adapters(model, lora) if lora else model)
        if gradient_checkpointing:
            models.checkpoint_activations(network)
        optimiser, schedule = make_optimiser(network, lr=1e-5, warmup=0.1, weight_decay=0.0, steps=steps)
        examples = workload.random_examples(2 * sequences, length, config.vocab_size)
        lines = train(
            network, optimiser, schedule, examples, [range(2 * sequences)] * steps, loss=workload.loss_of(), score_in_ce=True,
            pad_id=0, clip=1.0, batch_size=sequences, bf16=bf16, label="",
        )  # fmt: skip
        assert all(line["taken"] for line in lines)

    measured = machine.peak_of(run)
    return {
        "bf16": bf16, "lora": bool(lora), "gradient_checkpointing": gradient_checkpointing, "sequences": sequences,
        "length": length, "expected": expected._asdict() | {"total": expected.total}, "measured": measured,
        "expected_to_measured": round(expected.total / measured, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--model", help="alias, folder or hub id whose shape is taken; None: two small shapes")
    parser.add_argument("--sequences", type=runs.COUNT, default=4, help="in a batch")
    parser.add_argument("--length", type=runs.COUNT, default=512, help="tokens a sequence")
    parser.add_argument("--only", choices=("full", "lora"), help="one of both ways to train")
    parser.add_argument("--out", type=Path, help="JSON file; None: only print")
    parser.add_argument("--fit", action="store_true", help="only print what is expected of the 7B and 8B models")
    args = parser.parse_args()
    if args.fit:
        return fit()
    shapes = {args.model: AutoConfig.from_pretrained(models.resolve(args.model))} if args.model else SHAPES
    cases = []
    ways = [args.only] if args.only else ["full", "lora"]
    precisions = (True,) if models.has_bf16() else (False, True)
    for (name, config), way, bf16, checkpointing in itertools.product(shapes.items(), ways, precisions, (True, False)):
        case = {"shape": name} | measure(
            config, Lora() if way == "lora" else None, bf16=bf16, sequences=args.sequences, length=args.length,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        cases.append(case)
        print(
            f"{name:28}{way:6}{'bf16' if bf16 else 'fp32':6}{'checkpointed' if checkpointing else 'all kept':13} "
            f"expected {case['expected']['total'] / 2**30:7.2f} GiB, measured {case['measured'] / 2**30:7.2f} GiB, "
            f"ratio {case['expected_to_measured']:.2f}"
        )
    report = {"bench": "memory", "machine": machine.machine(), "cases": cases}
    if args.out:
        runs.write_whole(args.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps({"device": report["machine"]["device"], "ratios": [case["expected_to_measured"] for case in cases]}))


if __name__ == "__main__":
    runs.run(main)
