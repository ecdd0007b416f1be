"""Write CoTs and read scores. For one prompt, and without a cache, it is this loop:

    cot = []
    while True:
        logits = model(prompt + cot)[-1]  # of the next token, (V,)
        if cot[-len(suffix) :] == suffix or cot[-1:] == [end_of_sequence] or len(cot) == limit:
            break
        cot.append(sample(logits, prompt + cot, uniform[len(cot)]))
    scores = rail(logits)  # after the suffix the score is not sampled: its distribution is read

`write` does this with many rows at once, padded on the left, over a cache. Rows that are done make room for
the next prompts. The scores of a row come with the step after its suffix and need no pass of their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from loss import Rail, rail
from tract import models, runs
from tract.batch import READ_TOKENS, Batch, join, keep, left_pad, read_prompts
from tract.encode import encode_prefix, score_tokens
from tract.models import decode, device, head, next_token_logits
from tract.records import Grid

GREEDY = 1e-3  # a temperature below this takes the likeliest token
NUCLEUS = 256  # tokens that nearly always hold the nucleus; where not, the whole vocabulary is sorted


class Loaded(NamedTuple):  # a model with all it takes to write CoTs and to read scores
    model: object  # of transformers, or vllm_engine.Engine
    tokenizer: object
    grid: Grid
    suffix_ids: list[int]
    ends: list[int]  # ids that end a sequence
    score_tensors: dict[str, Tensor]  # score_ids (S,) and score_values (S,), as rail takes them
    is_vllm: bool


def load_judge(name: str, grid: Grid, bf16: bool, engine="torch", engine_args=(), model=None) -> Loaded:
    """Load tokenizer and model, but for a `model` in training, which is taken as it is. Raises InputError."""
    tokenizer = models.load_tokenizer(name)
    suffix_ids, score_ids = score_tokens(tokenizer, grid)
    scores = models.score_tensors(score_ids, grid)
    if engine == "vllm":
        from tract.vllm_engine import Engine

        model = Engine(name, tokenizer, bf16, dict(engine_args))
        return Loaded(model, tokenizer, grid, suffix_ids, [], scores, is_vllm=True)
    model = model or models.load_model(name, torch.bfloat16 if bf16 else torch.float32)
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]  # Llama-3 has several
    ends = sorted({tokenizer.eos_token_id, *eos} - {None})
    return Loaded(model, tokenizer, grid, suffix_ids, ends, scores, is_vllm=False)


def sample(logits: Tensor, so_far: Tensor, uniform: Tensor, args) -> Tensor:
    """Draw next tokens by inverse CDF: repetition penalty, temperature, then the smallest set of mass top_p.

    logits (B, V), so_far (B, T): ids of prompt and CoT in any order, uniform (B,) in [0, 1) → ids (B,). Not
    torch.multinomial, whose one generator serves all rows: a row's token must not depend on its batch.
    """
    logits = logits.float()
    seen = logits.gather(1, so_far)
    penalised = torch.where(seen < 0, seen * args.repetition_penalty, seen / args.repetition_penalty)
    logits = logits.scatter(1, so_far, penalised)
    if args.temperature < GREEDY:
        return logits.argmax(-1)
    logits = logits / args.temperature
    probs, mass, ids = likeliest(logits, NUCLEUS)  # sorting all can take longer than the model's step
    if (mass[:, -1] < args.top_p).any():
        probs, mass, ids = likeliest(logits, logits.shape[-1])
    in_nucleus = (mass - probs) < args.top_p  # what lies before a token is not enough yet
    nucleus_mass = torch.where(in_nucleus, probs, 0).sum(-1)
    rank = (mass <= (uniform * nucleus_mass)[:, None]).sum(-1)  # so many tokens lie below the random number
    rank = rank.clamp(max=in_nucleus.sum(-1) - 1)  # rounding may have left the nucleus
    return ids.gather(-1, rank[:, None])[:, 0]


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the likeliest tokens in order: probabilities, these cumulated, and ids; all (B, count)."""
    top, ids = logits.topk(min(count, logits.shape[-1]))
    probs = (top - logits.logsumexp(-1, keepdim=True)).exp()
    return probs, probs.cumsum(-1), ids


def random_numbers(name: str, n: int) -> Tensor:
    """Draw n numbers that depend on `name` alone: but for rounding, a CoT is the same in any batch."""
    generator = torch.Generator().manual_seed(runs.seed_of(name))
    return torch.rand(n, generator=generator, dtype=torch.float64).float()


@torch.inference_mode()
def write(judge: Loaded, prompts: list[list[int]], names: list[str], args, at_once: int) -> Iterator[tuple]:
    """Sample a CoT with the random numbers of each name, up to the suffix, an end of sequence or the limit.

    CoT c is for prompt c // args.num_cots; about `at_once` grow together. Yields c, its ids, Rail after them.
    """
    suffix = judge.suffix_ids
    num_cots = args.num_cots
    room = judge.tokenizer.positions - len(suffix) - 2  # suffix, score and end of sequence have to fit
    limits = [min(args.max_new_tokens, room - len(prompts[c // num_cots])) for c in range(len(names))]
    uniform = torch.stack([random_numbers(name, max(limits) + 1) for name in names]).to(device())
    batch = None
    cot_of_row = []  # c of each row of the batch
    lengths = []  # how many tokens it has written
    prompts_read = 0
    while cot_of_row or prompts_read < len(prompts):
        free_rows = max(at_once, num_cots) - len(cot_of_row)
        n_new = min(free_rows // num_cots, len(prompts) - prompts_read)
        if n_new and 4 * len(cot_of_row) <= 3 * at_once:  # not for less than a quarter: it takes a pass
            new = read_prompts(judge.model, prompts[prompts_read : prompts_read + n_new])
            new = keep(new, [row // num_cots for row in range(n_new * num_cots)])  # a row for each CoT
            batch = join(batch, new) if cot_of_row else new
            cot_of_row += range(prompts_read * num_cots, (prompts_read + n_new) * num_cots)
            lengths += [0] * (n_new * num_cots)
            prompts_read += n_new

        mask = F.pad(batch.mask, (0, 1), value=1)
        hidden = decode(judge.model, batch.cache, batch.ids[:, -1:], mask)[:, -1]  # (B, D)
        logits = head(judge.model, hidden)  # (B, V)
        done = []  # rows
        for row, tail in enumerate(batch.ids[:, -len(suffix) :].tolist()):
            reached_suffix = lengths[row] >= len(suffix) and tail == suffix
            wrote_eos = lengths[row] > 0 and tail[-1] in judge.ends
            hit_limit = lengths[row] == limits[cot_of_row[row]]
            if reached_suffix or wrote_eos or hit_limit:
                done.append(row)
        if done:
            for row, scores in zip(done, read_scores(judge, hidden[done]), strict=True):
                ids = batch.ids[row].tolist()
                yield cot_of_row[row], ids[len(ids) - lengths[row] :], scores

        so_far = torch.where(mask > 0, batch.ids, batch.ids[:, -1:])  # padding is not to be penalised
        token = sample(logits, so_far, uniform[cot_of_row, lengths], args)  # ignored where a row is done
        batch = Batch(batch.cache, mask, torch.cat([batch.ids, token[:, None]], 1))
        going = [row for row in range(len(cot_of_row)) if row not in done]
        if done:
            batch = keep(batch, going)
        cot_of_row = [cot_of_row[row] for row in going]
        lengths = [lengths[row] + 1 for row in going]


def read_scores(judge: Loaded, hidden: Tensor) -> list[Rail]:
    """Read the score distributions that hidden states (B, D) predict, as plain numbers."""
    logits = next_token_logits(judge.model, hidden, judge.score_tensors["score_ids"])
    columns = [column.tolist() for column in rail(logits, **judge.score_tensors)]
    return [Rail(*row) for row in zip(*columns, strict=True)]


@torch.inference_mode()
def score(judge: Loaded, texts: list[list[int]]) -> list[Rail]:
    """Read the score distribution after each text (prompt, CoT and suffix as ids) by a forward pass."""
    if judge.is_vllm:
        return judge.model.score(judge, texts)
    found = []
    at_once = max(1, READ_TOKENS // max(map(len, texts), default=1))
    for start in range(0, len(texts), at_once):
        ids, mask = left_pad(texts[start : start + at_once])
        hidden = decode(judge.model, DynamicCache(), ids, mask)[:, -1]  # (B, D)
        found += read_scores(judge, hidden)
    return found


@dataclass
class Cot:  # what a judge wrote or was given
    text: str
    finished: bool  # did it reach the suffix by itself?
    ids: list[int]  # prompt, CoT and suffix, as training encodes them
    scores: Rail | None = None  # the score distribution after `ids`; None where it has not been read
    sampled: list[int] | None = None  # the tokens as they were drawn, after the prompt; None for a given CoT


def write_cots(judge: Loaded, records: list[dict], prompts: list, args, at_once: int) -> list[list[Cot]]:
    """Write args.num_cots CoTs for each record, with the scores that came with them, where those hold."""
    num_cots = args.num_cots
    names = [f"{args.seed}/{record['id']}/{k}" for record in records for k in range(num_cots)]
    if judge.is_vllm:
        written = judge.model.write(judge, prompts, names, args)
    else:
        written = write(judge, prompts, names, args, at_once)
    cots = []
    for number, ids, scores in sorted(written):
        prompt = prompts[number // num_cots]
        text = judge.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text, found_suffix, _ = text.partition(judge.grid.suffix.strip())
        encoded = encode_prefix(judge.tokenizer, prompt, text, judge.grid)
        while len(encoded) >= judge.tokenizer.positions:
            # Half a character, where a CoT was cut off, takes more ids than were written: leave it out
            text = text[:-1]
            encoded = encode_prefix(judge.tokenizer, prompt, text, judge.grid)
        # A CoT without suffix, or one that training would encode otherwise, has to be read again
        valid_scores = scores if encoded == prompt + ids else None
        cots.append(Cot(text.strip(), bool(found_suffix), encoded, valid_scores, ids))
    return [cots[start : start + num_cots] for start in range(0, len(cots), num_cots)]
