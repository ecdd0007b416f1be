"""What the machine can do at most, and how much work a training step and a decode step are: what the other benches divide by.

N is the number of parameters in the blocks, H of the head (vocabulary x hidden size), s the supervised share of the tokens, and
A = 2 · layers · hidden size · tokens of the sequence: one token's causal attention, forward. FLOPs a token are then

    all weights trained   6N + 6sH + 3.5A     with recomputed blocks   8N + 6sH + 4.5A
    LoRA                  4N + 4sH + 3.5A     with recomputed blocks   6N + 4sH + 4.5A

MFU (model FLOPs utilisation) counts the left column only; hardware use counts what was recomputed, too.
"""

import json
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from models import device, has_bf16


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - started


def peak_rate(n: int | None = None) -> float:
    """FLOP/s of a matrix product in the precision that training computes in: the best of several."""
    n = n or (8192 if torch.cuda.is_available() else 1024)
    a, b = torch.randn(2, n, n, device=device(), dtype=torch.bfloat16 if has_bf16() else torch.float32)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(12))


def bandwidth() -> float:
    """Bytes/s of memory: a large copy, counted once read and once written."""
    a = torch.empty(2**32 if torch.cuda.is_available() else 2**28, dtype=torch.uint8, device=device()).fill_(1)
    b = torch.empty_like(a)
    return 2 * a.numel() / min(seconds(lambda: b.copy_(a)) for _ in range(8))


@contextmanager
def timed(spent: Counter, name: str):
    """Adds the seconds that its block takes to spent[name]."""
    synchronise()
    started = time.perf_counter()
    yield
    synchronise()
    spent[name] += time.perf_counter() - started


def machine() -> dict:
    """What every result says of where it was measured."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "bf16": has_bf16(),
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "peak_flops": round(peak_rate()), "bandwidth": round(bandwidth()),
    }  # fmt: skip


def cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def peak_of(run: Callable[[], object]) -> int:
    """Bytes that tensors hold at the peak of run(), beyond what they held before.

    On a GPU what the allocator counts, on a CPU the sum of the profiler's allocations and releases.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [(e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        peak = max(peak, now)
    return peak


def report(result: dict, out: Path | None) -> None:
    """The bench's last line, JSON; added to the file `out` as well, if there is one."""
    line = json.dumps(result, default=str)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line, flush=True)


@contextmanager
def replaced(module: ModuleType, **names):
    """The module with other values under these names: how one lever at a time is moved."""
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


class Work(NamedTuple):
    """The sizes that the formulas above speak of."""

    blocks: int  # N
    head: int  # H
    attention: int  # A of a sequence of one token
    kv: int  # numbers that a token's keys and values are

    @classmethod
    def of(cls, model) -> "Work":
        config = model.config.get_text_config()
        h, heads = config.hidden_size, config.num_attention_heads
        width = getattr(config, "head_dim", None) or h // heads
        own = [p for name, p in model.get_decoder().layers.named_parameters() if "lora_" not in name]
        kv = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
        return cls(sum(p.numel() for p in own), config.vocab_size * h, 2 * config.num_hidden_layers * heads * width, kv)

    def training(self, lengths: list[int], supervised: int, *, lora: bool, recomputed: bool) -> tuple[float, float]:
        """FLOPs of one pass forward and backward: of the model, and of the hardware."""
        tokens, squares = sum(lengths), sum(t * t for t in lengths)
        model = (4 if lora else 6) * (tokens * self.blocks + supervised * self.head) + 3.5 * self.attention * squares
        return model, model + (2 * tokens * self.blocks + self.attention * squares if recomputed else 0)

    def prefill(self, lengths: list[int]) -> float:
        """FLOPs of reading prompts; the head sees one position of each."""
        return sum(2 * t * self.blocks + self.attention * t * t + 2 * self.head for t in lengths)

    def decode(self, lengths: list[int], size: int) -> tuple[float, float]:
        """FLOPs, and bytes moved at least, of one token for each of these sequences; a number has `size` bytes."""
        flops = sum(2 * (self.blocks + self.head) + 2 * self.attention * t for t in lengths)
        return flops, size * (self.blocks + self.head + self.kv * sum(lengths))


def median_ratio(slow: list[float], fast: list[float]) -> dict:
    """How many times as long, pair by pair: what is measured one after the other sees the same machine."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    return {"median": round(statistics.median(ratios), 3), "low": round(ratios[0], 3), "high": round(ratios[-1], 3)}
