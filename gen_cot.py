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
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

import records
import runs
from loss import Rail, rail
from models import device, has_bf16, head, load_model, load_tokenizer
from records import Grid, ScoreTokens
from runs import Fault, InputError


class Sampling(NamedTuple):
    """How CoTs are sampled; the defaults are the paper's."""

    num_cots: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 0.9
    repetition_penalty: float = 1.03


class Judgement(NamedTuple):
    """What a model wrote for one prompt; all lists have one entry a CoT."""

    cots: list[str]
    finished: list[bool]  # did the CoT reach the suffix by itself?
    tokens: list[int]  # how many were generated
    scores: list[Rail | None]  # as plain numbers; None if not asked for


# -------------------------------------------------------------------------------------------------- the decode loop


def sample(
    logits: Tensor, seen: Tensor, uniform: Tensor, *, temperature: float, top_p: float, repetition_penalty: float
) -> Tensor:
    """Next tokens by inverse CDF: repetition penalty, temperature, then the smallest set of tokens with mass `top_p`.

    logits (B, V), seen (B, V) bool: tokens of the prompt and the CoT so far, uniform (B,) in [0, 1) → token ids (B,).
    A row's token depends on its own logits and number alone, not on its batch. Temperature 0 takes the most likely token.
    """
    logits = logits.float()
    penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    mass = probs.cumsum(-1)
    in_nucleus = mass - probs < top_p
    total = (probs * in_nucleus).sum(-1)
    rank = (mass <= (uniform * total)[:, None]).sum(-1)
    return order.gather(-1, rank.clamp(max=in_nucleus.sum(-1) - 1)[:, None])[:, 0]


def rows_of(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of its own with these rows; the given one stays as it is."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        layer.keys, layer.values = layer.keys[rows], layer.values[rows]
    return part


def random_numbers(name: str, n: int) -> Tensor:
    """n uniform numbers that depend on `name` alone: but for rounding, a CoT is the same in any batch."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def feed(model, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor, rows_at: Tensor | None = None) -> Tensor:
    """Append `ids` (B, N) to the cache; logits (B, V) of the last of them, or of column `rows_at` (B,) in each row.

    mask (B, T + N) marks the real tokens of the cache and of `ids`; positions (B, N) are theirs in their own sequence.
    """
    hidden = model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state  # (B, N, D)
    rows_at = torch.full_like(ids[:, 0], -1) if rows_at is None else rows_at
    return head(model, hidden[torch.arange(len(ids)), rows_at])


class Written(NamedTuple):
    """Rows that are done, with their cache: where mask is 1, row i holds `cached[i]`, in order, and then leftovers."""

    rows: list[int]
    ids: list[list[int]]  # what was generated
    cached: list[list[int]]  # prompt and what was generated, but its last token, which was never fed
    cache: DynamicCache
    mask: Tensor  # (len(rows), T)


def decode(
    model, prompts: list[list[int]], names: list[str], *, sampling: Sampling, suffix_ids: list[int], end_ids: list[int]
) -> Iterator[Written]:
    """Sample `num_cots` rows a prompt until each reaches the suffix, an end of sequence or its token limit.

    P prompts, B = P · num_cots rows, row b belongs to prompt b // num_cots and draws its random numbers by names[b].
    Whenever half of the rows are done they are handed out and the batch goes on without them.
    """
    n, width = sampling.num_cots, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device())  # (P, T), left-padded
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device())
    cache = DynamicCache(config=model.config)
    logits = feed(model, cache, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))  # (P, V): each prompt is read once
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=device())
    for p, prompt in enumerate(prompts):
        seen[p, prompt] = True

    cache.batch_repeat_interleave(n)
    logits, seen, mask = (x.repeat_interleave(n, 0) for x in (logits, seen, mask))  # (B, ...)
    # A model can't go beyond the positions it was made for, and the suffix and the score still have to fit
    room = (getattr(model.config, "max_position_embeddings", None) or 10**9) - len(suffix_ids) - 2
    limit = torch.tensor([max(0, min(sampling.max_new_tokens, room - len(prompts[b // n]))) for b in range(len(names))])
    steps = int(limit.max())
    uniform = torch.stack([random_numbers(name, steps) for name in names]).to(device())  # (B, steps)
    written = torch.zeros(len(names), steps, dtype=torch.long, device=device())
    suffix, ends, limit = torch.tensor(suffix_ids).to(mask), torch.tensor(end_ids).to(mask), limit.to(mask)
    rows = torch.arange(len(names), device=device())  # those of the B rows that are still in the batch
    lengths = torch.zeros_like(rows)
    done, token = limit == 0, torch.zeros_like(rows)

    for step in range(steps + 1):
        if 2 * int(done.sum()) >= len(rows):
            own = rows[done].tolist()
            new = [written[row, : lengths[row]].tolist() for row in own]
            cached = [prompts[row // n] + line[:-1] for row, line in zip(own, new, strict=True)]
            yield Written(own, new, cached, rows_of(cache, done), mask[done])
            if done.all():
                return
            cache = rows_of(cache, ~done)
            rows, logits, seen, mask, token, done = (x[~done] for x in (rows, logits, seen, mask, token, done))
        if step > 0:
            position = mask.sum(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)  # done rows run along; `cached` ends before that
            logits = feed(model, cache, token[:, None], mask, position)
        token = sample(
            logits, seen, uniform[rows, step], temperature=sampling.temperature, top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
        )  # fmt: skip
        seen.scatter_(1, token[:, None], True)
        written[rows, step] = token
        lengths[rows] += (~done).long()
        tail = written[rows, max(0, step + 1 - len(suffix)) : step + 1]
        at_suffix = (tail == suffix).all(-1) if tail.shape[1] == len(suffix) else torch.zeros_like(done)
        done = done | at_suffix | torch.isin(token, ends) | (limit[rows] == step + 1)


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
    logits = feed(model, written.cache, ids, torch.cat([in_use, real], 1), positions, rows_at=real.sum(-1) - 1)
    return rail(logits, score_ids=score_ids, score_values=score_values)


def read_cot(tokenizer, ids: list[int], suffix: str) -> tuple[str, bool]:
    """The text of a generated CoT up to the suffix, and whether the suffix was reached."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    cot, found, _ = text.partition(suffix.strip())
    return cot.strip(), bool(found)


@torch.inference_mode()
def judge(
    model,
    tokenizer,
    batch: list[dict],
    *,
    sampling: Sampling,
    grid: Grid,
    tokens: ScoreTokens,
    seed: int,
    with_scores: bool,
    given: list[list[str]] | None = None,
) -> list[Judgement]:
    """Write `num_cots` CoTs for each record's prompt and, if asked, read the score distribution after each.

    `max_new_tokens` 0 writes no CoT: the suffix follows the prompt, and the scores are those of plain RAIL; or, where
    `given` holds `num_cots` CoTs a record, those after them.
    """
    n = sampling.num_cots
    prompts = [records.prompt_ids(tokenizer, record["prompt"]) for record in batch]
    names = [f"{seed}/{record['id']}/{k}" for record in batch for k in range(n)]
    ends = model.generation_config.eos_token_id  # Llama-3 has several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])}
    grid_tensors = {
        "score_ids": torch.tensor(tokens.score_ids, device=device()),
        "score_values": torch.tensor(grid.values, device=device()),
    }
    judged = [Judgement([""] * n, [False] * n, [0] * n, [None] * n) for _ in batch]
    for written in decode(model, prompts, names, sampling=sampling, suffix_ids=tokens.suffix_ids, end_ids=sorted(ends)):
        for row, ids in zip(written.rows, written.ids, strict=True):
            own, k = judged[row // n], row % n
            own.cots[k], own.finished[k] = (given[row // n][k], True) if given else read_cot(tokenizer, ids, grid.suffix)
            own.tokens[k] = len(ids)
        if with_scores:
            pairs = [(batch[row // n]["prompt"], judged[row // n].cots[row % n]) for row in written.rows]
            wanted = [records.prefix_ids(tokenizer, prompt, cot, grid) for prompt, cot in pairs]
            result = read_scores(model, written, wanted, **grid_tensors)
            for i, row in enumerate(written.rows):
                judged[row // n].scores[row % n] = Rail(*(part[i].tolist() for part in result))
    return judged


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
        self.out, self.path, self.done = out, Path(f"{out}.part"), {}
        self.file = runs.lock(self.path)
        whole = b"" if overwrite else self.path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]
        self.file.truncate(len(whole))
        before, *done = [json.loads(line) for line in whole.splitlines()] or [None]
        settings = json.loads(json.dumps(settings))
        if before is None:
            self.file.write(runs.to_line(settings))
        else:
            runs.same_settings(self.path, before, settings)
        self.done = {record["id"]: record for record in done}
        if self.done:
            print(f"{self.path}: going on after {len(self.done)} finished records")

    def add(self, record: dict) -> None:
        try:
            self.file.write(runs.to_line(record))
            self.file.flush()
        except OSError as error:
            raise Fault(f"{self.path}: {error.strerror}; {runs.GO_ON}") from None
        self.done[record["id"]] = record

    def finish(self, whole: list[dict]) -> None:
        """Write the records to OUT and remove OUT.part."""
        runs.write_whole(self.out, "".join(map(runs.to_line, whole)))
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
    batch_size: int,
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
    given_cots = {r["id"]: r["cots"] if given == "cots" else [r["cot"]] for r in all_records} if given else {}
    if given:
        sampling = sampling._replace(num_cots=len(given_cots[all_records[0]["id"]]), max_new_tokens=0)
        if uneven := [id for id, cots in given_cots.items() if len(cots) != sampling.num_cots]:
            raise InputError(
                f"{data}: record {uneven[0]!r} has another number of CoTs than the first; make it the same for all"
            )
    settings |= {"max_length": max_length, "seed": seed, "given": given} | sampling._asdict() | facts
    part = PartFile(out, settings, overwrite)

    def length(record: dict) -> int:
        prompt = record["prompt"]
        if given:
            return max(len(records.prefix_ids(tokenizer, prompt, cot, grid)) for cot in given_cots[record["id"]])
        return len(records.prompt_ids(tokenizer, prompt))

    lengths = {r["id"]: length(r) for r in all_records}
    network = load_model(model, dtype=torch.bfloat16 if has_bf16() else torch.float32)
    room = (getattr(network.config, "max_position_embeddings", None) or max_length) - len(tokens.suffix_ids) - 2
    too_long = records.too_long(lengths, min(max_length, room))
    fitting = [r for r in all_records if r["id"] not in too_long]
    fitting.sort(key=lambda r: -lengths[r["id"]])  # like lengths together, the longest first: if memory binds, at once

    at_once, generated, i = max(1, batch_size // sampling.num_cots), 0, 0
    with tqdm(total=len(fitting), initial=len(part.done), desc=out.stem, unit="record", dynamic_ncols=True) as bar:
        while i < len(fitting):
            batch = fitting[i : i + at_once]
            new = [r["id"] not in part.done for r in batch]
            if any(new):
                # A batch that was cut off is judged again whole: in another batch, sums round differently
                try:
                    judged = judge(
                        network, tokenizer, batch,
                        sampling=sampling, grid=grid, tokens=tokens, seed=seed, with_scores=with_scores,
                        given=[given_cots[r["id"]] for r in batch] if given else None,
                    )  # fmt: skip
                except torch.OutOfMemoryError:
                    if at_once == 1:
                        raise Fault(
                            f"{part.path}: out of memory with a single prompt; lower --max-length or --num-cots"
                        ) from None
                    at_once //= 2
                    torch.cuda.empty_cache()
                    bar.write(f"out of memory: going on with {at_once} prompts at a time")
                    continue
                for record, judgement in itertools.compress(zip(batch, judged, strict=True), new):
                    part.add(record | fields(judgement, grid))
                    generated += sum(judgement.tokens)
                bar.set_postfix(tok_s=f"{generated / (time.time() - bar.start_t):.0f}", prompts_at_once=at_once)
                bar.update(sum(new))
            i += len(batch)

    done = [part.done[r["id"]] for r in all_records if r["id"] not in too_long]
    unfinished = [r["id"] for r in done if sampling.max_new_tokens and not all(r["finished"])]
    counts = {
        "records": len(done),
        "too_long": len(too_long),
        "unfinished": len(unfinished),
        "tokens_generated": generated,
    }
    runs.write_run(
        out.with_suffix(".run.json"), arguments=settings, inputs=[data], started=started,
        grid=str(grid), counts=counts, device=str(device()), bf16=has_bf16(),
    )  # fmt: skip
    part.finish(done)  # after run.json: where OUT is, everything is
    runs.report(sorted(too_long), f"left out, longer than --max-length {max_length} or than the model can read")
    runs.report(unfinished, "with a CoT that did not reach the suffix by itself")
    print(f"{out}: {len(done)} records")


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
    group.add_argument("--batch-size", type=runs.COUNT, default=32, help="sequences on the device at a time")
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
