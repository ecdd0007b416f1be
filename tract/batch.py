"""Rows of token ids over one cache, padded on the left: read prompts into it, join two batches, keep rows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from tract.models import decode, device

READ_TOKENS = 2048  # tokens of texts that are read at a time: more would be no faster


class Batch(NamedTuple):  # rows being written, padded on the left
    cache: DynamicCache
    mask: Tensor  # (B, T), 1 where a column of the cache holds a token of the row
    ids: Tensor  # (B, T + 1): the last column is not in the cache yet


def left_pad(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad ids on the left; returns them and a mask that is 1 where there is text, both (B, T)."""
    columns = max(2, *map(len, texts))  # all but the last go into the cache, which can't be empty
    ids = [[0] * (columns - len(text)) + text for text in texts]
    mask = [[0] * (columns - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids, device=device()), torch.tensor(mask, device=device())


def read_prompts(model, prompts: list[list[int]]) -> Batch:
    """Fill a cache with prompts, all but the last token of each, about READ_TOKENS tokens at a time."""
    if len(prompts) > 1 and sum(map(len, prompts)) > READ_TOKENS:
        half = len(prompts) // 2
        return join(read_prompts(model, prompts[:half]), read_prompts(model, prompts[half:]))
    ids, mask = left_pad(prompts)
    cache = DynamicCache()
    decode(model, cache, ids[:, :-1], mask[:, :-1])
    return Batch(cache, mask[:, :-1], ids)


def join(upper: Batch, lower: Batch) -> Batch:
    """Put two batches below each other, padded on the left to the longer."""
    columns = max(upper.mask.shape[1], lower.mask.shape[1])
    upper = widen(upper, columns)
    lower = widen(lower, columns)
    for layer, below in zip(upper.cache.layers, lower.cache.layers, strict=True):
        layer.keys = torch.cat([layer.keys, below.keys])
        layer.values = torch.cat([layer.values, below.values])
    return Batch(upper.cache, torch.cat([upper.mask, lower.mask]), torch.cat([upper.ids, lower.ids]))


def widen(batch: Batch, columns: int) -> Batch:
    """Pad a batch on the left to this many columns of its cache."""
    missing = columns - batch.mask.shape[1]
    for layer in batch.cache.layers:  # (B, heads, T, head size)
        layer.keys = F.pad(layer.keys, (0, 0, missing, 0))
        layer.values = F.pad(layer.values, (0, 0, missing, 0))
    return Batch(batch.cache, F.pad(batch.mask, (missing, 0)), F.pad(batch.ids, (missing, 0)))


def keep(batch: Batch, rows: list[int]) -> Batch:
    """Keep these rows, repeats allowed, without the columns that none of them needs."""
    rows = torch.tensor(rows, dtype=torch.long, device=device())
    columns = max([1, *batch.mask[rows].sum(-1).tolist()])
    for layer in batch.cache.layers:
        layer.keys = layer.keys[rows, :, -columns:]
        layer.values = layer.values[rows, :, -columns:]
    return Batch(batch.cache, batch.mask[rows, -columns:], batch.ids[rows, -columns - 1 :])
