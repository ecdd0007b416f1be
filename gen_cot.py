"""Self-generated CoTs: p_s writes a CoT for every training prompt; its score is thrown away, the true one is kept.

    python gen_cot.py --model out/run/stage1 --data train.jsonl --out out/run/cots.jsonl

Owns the one generation path. A row writes its CoT until it reaches the suffix, ends, or runs into the token limit. Its text
is then encoded exactly as training would encode it, and whatever of that is not yet in the row's KV cache (most often one
token, for a CoT without suffix the whole suffix) is fed to the same cache: the logits that come out predict the score.
So the distribution is that of the JSONL's own text, with no second prefill.

Finished records are kept in OUT.part as they come; the same command goes on from there.
"""

import argparse
import copy
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import DynamicCache, DynamicLayer

import records
import runs
from loss import Rail, rail
from models import device, has_bf16, head, load_model, load_tokenizer, peak_memory, rows_that_fit
from records import Grid, Lines, ScoreTokens, Spool
from runs import Fault, InputError


class Sampling(NamedTuple):
    """How CoTs are sampled; the defaults are the paper's."""

    num_cots: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.03


TOGETHER = 8  # batches that take turns: where one row ends, the next of them takes its place


class Judgement(NamedTuple):
    """What a model wrote for one prompt; all lists have one entry a CoT."""

    cots: list[str]
    finished: list[bool]  # did the CoT reach the suffix by itself?
    tokens: list[int]  # how many were generated
    scores: list[Rail | None]  # as plain numbers; None if not asked for


# -------------------------------------------------------------------------------------------------- the decode loop


def sample(
    logits: Tensor, so_far: Tensor, uniform: Tensor, *, temperature: float, top_p: float, repetition_penalty: float
) -> Tensor:
    """Next tokens by inverse CDF: repetition penalty, temperature, then the smallest set of tokens with mass `top_p`.

    logits (B, V), so_far (B, T): ids of prompt and CoT, any order, repeats allowed; uniform (B,) in [0, 1) → ids (B,).
    A row's token depends on its own logits and number alone, not on its batch. Temperature 0 takes the most likely token.
    """
    logits = logits.float()
    seen = logits.gather(1, so_far)
    logits = logits.scatter(1, so_far, torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty))
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    log_total = logits.logsumexp(-1, keepdim=True)
    for likeliest in (NUCLEUS, logits.shape[-1]):  # to sort a whole vocabulary can take longer than the model's step
        top, order = logits.topk(min(likeliest, logits.shape[-1]))
        probs = (top - log_total).exp()
        mass = probs.cumsum(-1)
        if bool((mass[:, -1] >= top_p).all()):
            break
    in_nucleus = mass - probs < top_p
    total = (probs * in_nucleus).sum(-1)
    rank = (mass <= (uniform * total)[:, None]).sum(-1)
    return order.gather(-1, rank.clamp(max=in_nucleus.sum(-1) - 1)[:, None])[:, 0]


NUCLEUS = 256  # tokens among which the nucleus nearly always lies; where not, the whole vocabulary is sorted


class GrowingLayer(DynamicLayer):
    """A layer's keys and values with room ahead: a new token is written in place; DynamicLayer copies all the others."""

    room = 0  # columns of `held`; keys and values are views of those in use

    def hold(self, keys: Tensor, values: Tensor, rows: int, columns: int) -> None:
        self.room = columns + 128
        self.held = [x.new_empty(rows, x.shape[1], self.room, x.shape[3]) for x in (keys, values)]

    def use(self, columns: int) -> None:
        self.keys, self.values = (held[:, :, :columns] for held in self.held)

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        used, old = self.get_seq_length(), (self.keys, self.values)
        end = used + keys.shape[2]
        if end > self.room:
            self.hold(keys, values, len(keys), end)
            for held, x in zip(self.held, old if used else (), strict=False):
                held[:, :, :used] = x
        for held, x in zip(self.held, (keys, values), strict=True):
            held[:, :, used:end] = x
        self.use(end)
        return self.keys, self.values

    @classmethod
    def stacked(cls, parts: list[tuple["GrowingLayer", Tensor]], columns: int) -> "GrowingLayer":
        """A layer with these rows of these layers, right-aligned in so many columns."""
        layer, at = copy.copy(parts[0][0]), 0
        layer.hold(layer.keys, layer.values, sum(len(which) for _, which in parts), columns)
        for part, which in parts:
            for held, x in zip(layer.held, (part.keys, part.values), strict=True):
                own = x[:, :, -columns:][which]
                start = columns - own.shape[2]
                held[at : at + len(which), :, :start] = 0
                held[at : at + len(which), :, start:columns] = own
            at += len(which)
        layer.use(columns)
        return layer


def random_numbers(name: str, n: int) -> Tensor:
    """n uniform numbers that depend on `name` alone: but for rounding, a CoT is the same in any batch."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def feed(model, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """Append `ids` (B, N) to the cache; their hidden states (B, N, D).

    mask (B, T + N) marks the real tokens of the cache and of `ids`; positions (B, N) are theirs in their own sequence.
    """
    return model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state


class Batch(NamedTuple):
    """Rows being written. Each row's tokens are the last of its columns, so that rows can come and go."""

    cache: DynamicCache
    mask: Tensor  # (B, T), 1 where a column of the cache holds a token of the row
    ids: Tensor  # (B, T + 1): the last column is not in the cache yet


def gather(parts: list[tuple[Batch, Tensor]]) -> Batch:
    """One batch of these rows (indices) of these batches, without the columns that none of them needs."""
    first, which = parts[0]
    cache = copy.copy(first.cache)
    if can_join(cache):
        columns = max(1, *(int(batch.mask[which].sum(-1).max()) for batch, which in parts))
        layers = zip(*([(layer, which) for layer in batch.cache.layers] for batch, which in parts), strict=True)
        cache.layers = [GrowingLayer.stacked(list(layer), columns) for layer in layers]
    else:
        columns = first.mask.shape[1]
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[which], layer.values[which]

    def wide(x: Tensor, columns: int) -> Tensor:
        return F.pad(x, (columns - x.shape[1], 0))  # less than nothing crops

    mask = torch.cat([wide(batch.mask[which], columns) for batch, which in parts])
    return Batch(cache, mask, torch.cat([wide(batch.ids[which], columns + 1) for batch, which in parts]))


def can_join(cache: DynamicCache) -> bool:
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)  # a sliding window counts columns


def read_prompts(model, prompts: list[list[int]]) -> list[Batch]:
    """Batches of all prompts, in order, the last token of each still to be fed."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    columns = max(2, *map(len, prompts))
    if len(prompts) > 1 and len(prompts) * columns > READ and can_join(cache):
        half = len(prompts) // 2
        return read_prompts(model, prompts[:half]) + read_prompts(model, prompts[half:])
    ids = torch.tensor([[0] * (columns - len(p)) + p for p in prompts], device=device())  # (P, T + 1)
    mask = torch.tensor([[0] * (columns - len(p)) + [1] * (len(p) - 1) for p in prompts], device=device())  # (P, T)
    feed(model, cache, ids[:, :-1], mask, (mask.cumsum(-1) - 1).clamp(min=0))
    return [Batch(cache, mask, ids)]


READ = 2048  # tokens of prompts, with their padding, that are read at a time: more would be no faster, and padded more


class Written(NamedTuple):
    """Rows that are done, with their cache: where mask is 1, row i holds `cached[i]`, in order, and then leftovers."""

    rows: list[int]
    ids: list[list[int]]  # what was generated
    cached: list[list[int]]  # prompt and what was generated, but the last token, which was never fed
    cache: DynamicCache
    mask: Tensor  # (len(rows), T)


def decode(
    model,
    prompts: list[list[int]],
    names: list[str],
    *,
    sampling: Sampling,
    suffix_ids: list[int],
    end_ids: list[int],
    at_once: int,
) -> Iterator[Written]:
    """Sample `num_cots` rows a prompt until each reaches the suffix, an end of sequence or its token limit.

    Row b belongs to prompt b // num_cots and draws its random numbers by names[b]. At most `at_once` rows (but at least one
    prompt's) are in the batch: whenever a quarter of them is done, those are handed out and the next prompts take their place.
    """
    n, begun, batch = sampling.num_cots, 0, None
    # A model can't go beyond the positions it was made for, and the suffix and the score still have to fit
    positions = getattr(model.config, "max_position_embeddings", None) or 10**9
    room = positions - len(suffix_ids) - 2
    limit = [max(0, min(sampling.max_new_tokens, room - len(prompts[row // n]))) for row in range(len(names))]
    steps = max(1, *limit)
    uniform = torch.stack([random_numbers(name, steps) for name in names]).to(device())  # (rows, steps)
    suffix, ends, limit = (torch.tensor(x, device=device()) for x in (suffix_ids, end_ids, limit))
    rows, lengths, done = torch.zeros_like(limit[:0]), torch.zeros_like(limit), limit == 0  # rows: those in the batch

    while batch is not None or begun < len(prompts):
        # Whoever is done leaves, and the next prompts take their place
        over = done[rows]
        leave = batch is not None and 4 * int(over.sum()) >= len(rows)
        if leave:
            own, gone, new, cached = gather([(batch, over.nonzero()[:, 0])]), rows[over].tolist(), [], []
            columns = own.mask.sum(-1).tolist()
            for row, line, held, length in zip(gone, own.ids.tolist(), columns, lengths[gone].tolist(), strict=True):
                prompt = prompts[row // n]
                new.append(line[-held - 1 :][len(prompt) :][:length])
                cached.append((prompt + new[-1])[:-1])
            yield Written(gone, new, cached, own.cache, own.mask)
        stay = (~over if leave else torch.ones_like(over)).nonzero()[:, 0]
        parts, rows = [(batch, stay)] if len(stay) else [], rows[stay]
        more = min((max(at_once, n) - len(stay)) // n, len(prompts) - begun) if not parts or can_join(batch.cache) else 0
        if more > 0:
            for own in read_prompts(model, prompts[begun : begun + more]):
                parts.append((own, torch.arange(len(own.ids) * n, device=device()) // n))
            rows = torch.cat([rows, torch.arange(begun * n, (begun + more) * n, device=device())])
            begun += more
        if leave or more > 0:
            batch = gather(parts) if parts else None
            if batch is None or bool(done[rows].all()):
                continue

        # Everyone writes a token; rows that are done run along, `cached` ends before that
        position = batch.mask.sum(-1, keepdim=True)
        mask = torch.cat([batch.mask, torch.ones_like(position)], 1)
        hidden = feed(model, batch.cache, batch.ids[:, -1:], mask, position.clamp(max=positions - 1))
        token = sample(
            head(model, hidden[:, -1]), torch.where(mask > 0, batch.ids, batch.ids[:, -1:]),
            uniform[rows, lengths[rows].clamp(max=steps - 1)], temperature=sampling.temperature, top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
        batch = Batch(batch.cache, mask, torch.cat([batch.ids, token[:, None]], 1))
        lengths[rows] += (~done[rows]).long()
        tail = batch.ids[:, -len(suffix) :]
        at_suffix = (tail == suffix[-tail.shape[1] :]).all(-1) & (lengths[rows] >= len(suffix))
        done[rows] |= at_suffix | torch.isin(token, ends) | (lengths[rows] == limit[rows])


def read_scores(model, written: Written, wanted: list[list[int]], *, score_ids: Tensor, score_values: Tensor) -> Rail:
    """The score distribution after each of `wanted`, the ids of prompt + CoT + suffix as training encodes them.

    What the row's cache already holds of them is kept, the rest of the cache is masked, the rest of `wanted` is fed.
    """
    kept, tails = [], []
    for cached, ids in zip(written.cached, wanted, strict=True):
        shared = next((i for i, (a, b) in enumerate(zip(cached, ids, strict=False)) if a != b), min(len(cached), len(ids)))
        kept.append(min(shared, len(ids) - 1))  # the last token is fed in any case: its logits are what we are after
        tails.append(ids[kept[-1] :])
    longest = max(map(len, tails))
    ids = torch.tensor([tail + [0] * (longest - len(tail)) for tail in tails], device=device())
    real = torch.tensor([[1] * len(tail) + [0] * (longest - len(tail)) for tail in tails], device=device())
    start = torch.tensor(kept, device=device())[:, None]
    in_use = written.mask * (written.mask.cumsum(-1) <= start)
    positions = start + torch.arange(longest, device=device())
    hidden = feed(model, written.cache, ids, torch.cat([in_use, real], 1), positions)
    at_end = hidden[torch.arange(len(ids)), real.sum(-1) - 1]
    return rail(head(model, at_end), score_ids=score_ids, score_values=score_values)


def read_cot(tokenizer, ids: list[int], suffix: str) -> tuple[str, bool]:
    """The text of a generated CoT up to the suffix, and whether the suffix was reached."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cot, found, _ = text.partition(suffix.strip())
    return cot.strip(), bool(found)


@torch.inference_mode()
def judge(
    model,
    tokenizer,
    prompts: list[list[int]],
    names: list[str],
    *,
    sampling: Sampling,
    grid: Grid,
    tokens: ScoreTokens,
    with_scores: bool,
    at_once: int,
    given: list[list[str]] | None = None,
) -> Iterator[tuple[int, Judgement]]:
    """Write `num_cots` CoTs for each prompt (token ids) and, if asked, read the score distribution after each.

    Yields (index of the prompt, judgement) as they are finished, in any order. A prompt's CoTs depend on its name, and on
    its own tokens: for what `at_once` is, see decode. `max_new_tokens` 0 writes no CoT: the suffix follows the prompt, and
    the scores are those of plain RAIL; or, where `given` holds `num_cots` CoTs a prompt, those after them.
    """
    n = sampling.num_cots
    names = [f"{name}/{k}" for name in names for k in range(n)]
    ends = model.generation_config.eos_token_id  # Llama-3 has several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])}
    grid_tensors = {
        "score_ids": torch.tensor(tokens.score_ids, device=device()),
        "score_values": torch.tensor(grid.values, device=device()),
    }
    judged = {p: Judgement([""] * n, [False] * n, [0] * n, [None] * n) for p in range(len(prompts))}
    missing = [n] * len(prompts)
    for written in decode(
        model, prompts, names, sampling=sampling, suffix_ids=tokens.suffix_ids, end_ids=sorted(ends), at_once=at_once
    ):
        for row, ids in zip(written.rows, written.ids, strict=True):
            own, k = judged[row // n], row % n
            own.cots[k], own.finished[k] = (given[row // n][k], True) if given else read_cot(tokenizer, ids, grid.suffix)
            own.tokens[k] = len(ids)
        if with_scores:
            texts = [(prompts[row // n], judged[row // n].cots[row % n]) for row in written.rows]
            wanted = [records.prefix_ids(tokenizer, prompt, cot, grid) for prompt, cot in texts]
            result = read_scores(model, written, wanted, **grid_tensors)
            for i, row in enumerate(written.rows):
                judged[row // n].scores[row % n] = Rail(*(part[i].tolist() for part in result))
        for row in written.rows:
            missing[row // n] -= 1
            if not missing[row // n]:
                yield row // n, judged.pop(row // n)


# ------------------------------------------------------------------------------------------------- a file of records


class PartFile:
    """A JSONL output under way, `OUT.part`: records are appended and flushed as they come, in any order.

    The first line holds the run's settings. The same command goes on where it was cut off (a torn last line is dropped);
    other settings are refused, and so is a second process. `finish` writes OUT in input order, whole or not at all.
    """

    def __init__(self, out: Path, settings: dict, overwrite: bool):
        if out.is_dir():
            raise InputError(f"{out}: a folder; give the name of a JSONL file as --out")
        runs.choose_out(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
        self.out, self.path, self.done = out, Path(f"{out}.part"), {}  # done: id → which line
        self.file = runs.lock(self.path)
        self.lines, before, whole = Lines(self.file), None, 0
        self.file.seek(0, os.SEEK_END if overwrite else os.SEEK_SET)
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            if before is None:
                before = json.loads(line)
            else:
                self.done[json.loads(line)["id"]] = len(self.lines)
                self.lines.starts.append(whole)
            whole += len(line)
        self.file.truncate(whole)
        if before is None:
            self.file.write(runs.to_line(settings).encode())
        else:
            runs.same_settings(self.path, before, json.loads(json.dumps(settings)))
        if self.done:
            print(f"{self.path}: going on after {len(self.done)} finished records")

    def add(self, record: dict) -> None:
        try:
            self.lines.append(record)
        except OSError as error:
            raise Fault(f"{self.path}: {error.strerror}; {runs.GO_ON}") from None
        self.done[record["id"]] = len(self.lines) - 1

    def finish(self, order: list[str]) -> None:
        """Write the records with these ids to OUT and remove OUT.part."""
        runs.write_whole(self.out, (self.lines.line(self.done[id]) for id in order))
        self.path.unlink()
        self.file.close()


def judge_file(
    *,
    model: str,
    data: str,
    out: Path,
    need: tuple[str, ...],
    sampling: Sampling,
    grid: str | None,
    suffix: str | None,
    batch_size: int | None,
    max_length: int,
    seed: int,
    overwrite: bool,
    with_scores: bool,
    fields: Callable[[Judgement, Grid], dict],
    given: str | None = None,
    **facts,
) -> None:
    """Judge every record of `data` with `model`; write it to `out` with the `fields` of its judgement added.

    `given` names the field, cot or cots, whose CoTs are scored in place of sampled ones.

    Beside it, in OUT's name with .run.json, goes what was asked and counted; `facts` go there as they are.
    """
    started = time.time()
    if runs.read_run(model).get("no_cot") and sampling.max_new_tokens:
        raise InputError(f"{model}: was trained without CoTs and can't write any; use it with predict.py --no-cot")
    grid = records.choose_grid(grid, suffix, model)
    all_records = records.read_records(data, grid=grid, need=need)
    tokenizer = load_tokenizer(model)
    tokens = records.score_tokens(tokenizer, grid)
    settings = runs.model_settings(model) | {
        "data": data,
        "sha256": runs.sha256(data),
        "grid": str(grid),
        "suffix": grid.suffix,
    }

    def cots_given(record: dict) -> list[str]:
        return record["cots"] if given == "cots" else [record["cot"]]

    if given:
        sampling = sampling._replace(num_cots=len(cots_given(all_records[0])), max_new_tokens=0)
        if uneven := next((r["id"] for r in all_records if len(cots_given(r)) != sampling.num_cots), None):
            raise InputError(f"{data}: record {uneven!r} has another number of CoTs than the first; make it the same for all")
    settings |= {"max_length": max_length, "seed": seed, "given": given} | sampling._asdict() | facts
    part = PartFile(out, settings, overwrite)

    # Tokenise once; what it gives is kept in a file without a name
    prompts, lengths = Spool(), {}
    for record in tqdm(all_records, desc="tokenise", unit="record", dynamic_ncols=True, delay=5, leave=False):
        ids = records.prompt_ids(tokenizer, record["prompt"])
        prompts.append(ids)
        after = [len(records.prefix_ids(tokenizer, ids, cot, grid)) for cot in cots_given(record)] if given else [len(ids)]
        lengths[record["id"]] = max(after)
    network = load_model(model, dtype=torch.bfloat16 if has_bf16() else torch.float32)
    room = getattr(network.config, "max_position_embeddings", None) or 10**9
    room -= 0 if given else len(tokens.suffix_ids) + 2  # what is given has its suffix already
    too_long = records.too_long(lengths, min(max_length, room))
    names = all_records.ids
    fitting = [i for i, id in enumerate(names) if id not in too_long]
    # Like lengths together, the longest first: if memory binds, at once
    fitting.sort(key=lambda i: -lengths[names[i]])

    at_once, most, generated, i = 1, 10**9, 0, 0
    with tqdm(total=len(fitting), initial=len(part.done), desc=out.stem, unit="record", dynamic_ncols=True) as bar:
        while i < len(fitting):
            longest = lengths[names[fitting[i]]] + sampling.max_new_tokens
            at_once = min(batch_size or rows_that_fit(network, longest), most)
            # What is judged together stays together, also where some was done before: in another batch, sums round differently
            together = fitting[i : i + max(1, TOGETHER * at_once // sampling.num_cots)]
            i += len(together)
            if all(names[j] in part.done for j in together):
                continue
            try:
                for k, judgement in judge(
                    network, tokenizer, [prompts[j] for j in together], [f"{seed}/{names[j]}" for j in together],
                    sampling=sampling, grid=grid, tokens=tokens, with_scores=with_scores, at_once=at_once,
                    given=[cots_given(all_records[j]) for j in together] if given else None,
                ):  # fmt: skip
                    if names[together[k]] not in part.done:
                        part.add(all_records[together[k]] | fields(judgement, grid))
                        generated += sum(judgement.tokens)
                        bar.set_postfix(tok_s=f"{generated / (time.time() - bar.start_t):.0f}", at_once=at_once, refresh=False)
                        bar.update()
            except torch.OutOfMemoryError:
                if at_once <= sampling.num_cots:
                    raise Fault(f"{part.path}: out of memory with a single prompt; lower --max-length or --num-cots") from None
                most, i = at_once // 2, i - len(together)
                torch.cuda.empty_cache()
                bar.write(f"out of memory: going on with {most} sequences at a time")

    order = [id for id in names if id not in too_long]
    unfinished = []
    if sampling.max_new_tokens:
        unfinished = [id for id in order if not all(part.lines[part.done[id]]["finished"])]
    counts = {
        "records": len(order),
        "too_long": len(too_long),
        "unfinished": len(unfinished),
        "tokens_generated": generated,
    }
    runs.write_run(
        out.with_suffix(".run.json"), arguments=settings, inputs=[data], started=started, grid=str(grid), counts=counts,
        sequences_at_once=at_once, device=str(device()), bf16=has_bf16(), peak_memory_bytes=peak_memory(),
    )  # fmt: skip
    part.finish(order)  # after run.json: where OUT is, everything is
    runs.report(sorted(too_long), f"left out, longer than --max-length {max_length} or than the model can read")
    runs.report(unfinished, "with a CoT that did not reach the suffix by itself")
    print(f"{out}: {len(order)} records")


def make_parser(description: str, *, model: str, data: str, out: str) -> argparse.ArgumentParser:
    """The options of both scripts that generate."""
    parser = argparse.ArgumentParser(description=description, formatter_class=runs.Help, allow_abbrev=False)
    group = parser.add_argument_group("what goes in and out")
    group.add_argument("--model", default=model, help=f"checkpoint folder, hub id or one of {', '.join(records.MODELS)}")
    group.add_argument("--data", default=data, help="JSONL file of records")
    group.add_argument("--out", type=Path, default=Path(out), help="JSONL file to write")
    group = parser.add_argument_group("sampling")
    paper = Sampling()
    group.add_argument("--num-cots", type=runs.COUNT, default=paper.num_cots, help="CoTs a prompt")
    group.add_argument(
        "--max-new-tokens", type=runs.COUNT, default=paper.max_new_tokens, help="tokens; a longer CoT is unfinished"
    )
    group.add_argument(
        "--temperature", type=runs.WEIGHT, default=paper.temperature, help="0 always takes the most likely token"
    )
    group.add_argument(
        "--top-p",
        type=runs.number(float, 1e-6, 1),
        default=paper.top_p,
        help="sample from the smallest set of tokens with this mass",
    )
    group.add_argument(
        "--repetition-penalty", type=runs.number(float, 1e-6), default=paper.repetition_penalty, help="1 is none"
    )
    group.add_argument(
        "--batch-size",
        type=runs.COUNT,
        help="sequences on the device at a time; None: as many as free memory takes; on a CPU 32",
    )
    runs.add_common_arguments(parser)
    return parser


def main() -> None:
    parser = make_parser(__doc__, model="out/stage1", data=str(runs.ROOT / "data/tiny/train.jsonl"), out="out/cots.jsonl")
    args = vars(parser.parse_args())
    sampling = Sampling(**{name: args.pop(name) for name in Sampling._fields})
    judge_file(
        **args, sampling=sampling, need=("id", "prompt", "score"), with_scores=False,
        fields=lambda judgement, grid: {"cots": judgement.cots, "finished": judgement.finished},
    )  # fmt: skip


if __name__ == "__main__":
    runs.run(main)
