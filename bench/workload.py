"""Models and records of real size, made on the spot: what the other benches run on when they are given no others.

Lengths are those of the MT-Bench judgements that the paper tests on, in Mistral's tokens: prompts of median 1,310, feedback of
median 118. The text is the embedded task's, strung together, in its own small tokenizer; a model may have more words than that.
"""

import itertools
import math
import random
from collections.abc import Iterator
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from loss import cot_raft_loss
from models import device
from records import Example, Grid, read_items
from runs import ROOT

BLOCKS = dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8
)  # fmt: skip
REAL = {  # the shapes of the paper's models
    "mistral-7b": MistralConfig(vocab_size=32000, sliding_window=None, max_position_embeddings=32768, **BLOCKS),
    "llama-3.1-8b": LlamaConfig(vocab_size=128256, max_position_embeddings=131072, **BLOCKS),
}


def shape(vocabulary: int, *, layers: int = 4, hidden: int = 256, spread: float = 0.02) -> MistralConfig:
    """A small model with Mistral's proportions; `spread` is the standard deviation of its weights."""
    return MistralConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64), num_key_value_heads=max(1, hidden // 256), sliding_window=None,
        max_position_embeddings=8192, pad_token_id=0, initializer_range=spread,
    )  # fmt: skip


def random_model(config, dtype: torch.dtype, *, sharp: float = 1.0, seed: int = 0):
    """Random weights, made on the device; those of the head `sharp` times as large, so that fewer tokens are likely."""
    torch.manual_seed(seed)
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharp)
    return model


def random_examples(n: int, length: int, vocabulary: int, *, share: float = 0.25) -> list[Example]:
    """Sequences of one length, of which the last `share` carries loss."""
    ids = torch.randint(10, vocabulary, (n, length), generator=torch.Generator().manual_seed(0)).tolist()
    start = length - round(share * length)
    scores = itertools.cycle((1.0, 2.0, 3.67, 5.0))
    return [Example(str(i), row, start, length - 2, score) for i, (row, score) in enumerate(zip(ids, scores, strict=False))]


SCORE_IDS = [3, 4, 5, 6, 7]  # of random tokens


def loss_of(score_ids: list[int] = SCORE_IDS) -> partial:
    """CoT-RAFT on the scores 1 to 5, on the device."""
    values = torch.arange(1.0, 6.0, device=device())
    return partial(cot_raft_loss, lam=1.0, score_ids=torch.tensor(score_ids, device=device()), score_values=values)


def real_lengths(n: int, *, median: float, spread: float, most: int, seed: int = 0) -> list[int]:
    """Lengths drawn from a lognormal distribution; `spread` is the standard deviation of their logarithms."""
    rng = random.Random(seed)
    return [max(8, min(most, round(median * math.exp(rng.gauss(0, spread))))) for _ in range(n)]


def long_records(n: int, *, prompt: float = 1310, cot: float = 118) -> Iterator[dict]:
    """Records of real length. Prompt and CoT have so many words as median; every word is one token."""
    task = read_items(str(ROOT / "data/tiny/train.jsonl"))
    words = {name: " ".join(record[name] for record in task).split() for name in ("prompt", "cot")}
    lengths = {
        "prompt": real_lengths(n, median=prompt, spread=0.39, most=2800, seed=1),
        "cot": real_lengths(n, median=cot, spread=0.275, most=270, seed=2),
    }
    rng = random.Random(3)
    for i in range(n):
        texts = {}
        for name, own in words.items():
            start = rng.randrange(len(own) - lengths[name][i])
            texts[name] = " ".join(own[start : start + lengths[name][i]])
        yield {"id": f"r{i}", **texts, "score": Grid().values[i % 5]}
