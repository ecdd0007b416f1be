"""Self-generated CoTs: p_s writes a CoT for every training prompt; its score is dropped, the true one kept.

    python gen_cot.py --model out/run/stage1 --data train.jsonl --out out/run/cots.jsonl

Owns the one writing loop. A CoT is written until it reaches the suffix, ends, or runs into the token limit;
as rows end, the next prompts take their place. Interrupted, the same command goes on.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from loss import Rail, rail
from tract import hub, models, runs
from tract.encode import enable_thinking, prefix_ids, prompt_ids, score_tokens
from tract.models import decode, device, head, score_logits
from tract.records import ROOT, Grid, InputError, read_records
from tract.runs import COUNT, WEIGHT, Fault

NUCLEUS = 256  # tokens that nearly always hold the nucleus; where not, the whole vocabulary is sorted
READ = 2048  # tokens of texts that are read at a time: more would be no faster
CHUNK = 8  # batches' worth of prompts per call of `write`, and per write to OUT.part


class Judge(NamedTuple):  # a model with all it takes to write CoTs and to read scores
    model: torch.nn.Module
    tokenizer: object
    grid: Grid
    suffix_ids: list[int]
    ends: list[int]  # ids
    scores: dict[str, Tensor]  # score_ids (S,) and score_values (S,), as rail takes them


def load_judge(name: str, grid: Grid, bf16: bool, vllm: dict | None = None) -> Judge:
    """Load the judge of a folder, an alias or a hub id, into vLLM where its options are given.

    Raises InputError.
    """
    tokenizer = models.load_tokenizer(name)
    suffix_ids, score_ids = score_tokens(tokenizer, grid)
    scores = models.score_tensors(score_ids, grid)
    if vllm is not None:
        from tract.vllm_engine import Engine

        return Judge(Engine(name, tokenizer, bf16, vllm), tokenizer, grid, suffix_ids, [], scores)
    model = models.load_model(name, torch.bfloat16 if bf16 else torch.float32)
    ends = model.generation_config.eos_token_id  # Llama-3 has several
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    return Judge(model, tokenizer, grid, suffix_ids, sorted(ends), scores)


def sample(logits: Tensor, so_far: Tensor, uniform: Tensor, args) -> Tensor:
    """Draw next tokens by inverse CDF: repetition penalty, temperature, then the smallest set of mass top_p.

    logits (B, V), so_far (B, T): ids of prompt and CoT in any order, uniform (B,) in [0, 1) → ids (B,). A
    row's token depends on its own logits and number alone. A temperature below .001 takes the likeliest.
    """
    logits, penalty = logits.float(), args.repetition_penalty
    seen = logits.gather(1, so_far)
    logits = logits.scatter(1, so_far, torch.where(seen < 0, seen * penalty, seen / penalty))
    if args.temperature < 1e-3:
        return logits.argmax(-1)
    logits = logits / args.temperature
    log_total = logits.logsumexp(-1, keepdim=True)
    for likeliest in (NUCLEUS, logits.shape[-1]):  # sorting all can take longer than the model's step
        top, order = logits.topk(min(likeliest, logits.shape[-1]))
        probs = (top - log_total).exp()
        mass = probs.cumsum(-1)
        if bool((mass[:, -1] >= args.top_p).all()):
            break
    in_nucleus = mass - probs < args.top_p
    total = (probs * in_nucleus).sum(-1)
    rank = (mass <= (uniform * total)[:, None]).sum(-1)
    return order.gather(-1, rank.clamp(max=in_nucleus.sum(-1) - 1)[:, None])[:, 0]


def random_numbers(name: str, n: int) -> Tensor:
    """Draw n numbers that depend on `name` alone: but for rounding, a CoT is the same in any batch."""
    generator = torch.Generator().manual_seed(runs.seed_of(name))
    return torch.rand(n, generator=generator, dtype=torch.float64).float()


class Batch(NamedTuple):  # rows being written, padded on the left
    cache: DynamicCache
    mask: Tensor  # (B, T), 1 where a column of the cache holds a token of the row
    ids: Tensor  # (B, T + 1): the last column is not in the cache yet


def left_pad(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad ids on the left; returns them and a mask that is 1 where there is text, both (B, T)."""
    columns = max(2, *map(len, texts))
    ids = [[0] * (columns - len(text)) + text for text in texts]
    mask = [[0] * (columns - len(text)) + [1] * len(text) for text in texts]
    return torch.tensor(ids, device=device()), torch.tensor(mask, device=device())


def read_prompts(model, prompts: list[list[int]]) -> Batch:
    """Fill a cache with prompts, all but the last token of each, about READ tokens at a time."""
    if len(prompts) > 1 and sum(map(len, prompts)) > READ:
        half = len(prompts) // 2
        return join([read_prompts(model, prompts[:half]), read_prompts(model, prompts[half:])])
    ids, mask = left_pad(prompts)
    decode(model, cache := DynamicCache(), ids[:, :-1], mask[:, :-1])
    return Batch(cache, mask[:, :-1], ids)


def join(batches: list[Batch]) -> Batch:
    """Put batches below each other, padded on the left to the longest."""
    columns = max(batch.mask.shape[1] for batch in batches)
    for layers in zip(*(batch.cache.layers for batch in batches), strict=True):
        for name in ("keys", "values"):
            tensors = [getattr(layer, name) for layer in layers]  # (B, heads, T, head size)
            setattr(layers[0], name, torch.cat([F.pad(x, (0, 0, columns - x.shape[2], 0)) for x in tensors]))
    masks = [F.pad(batch.mask, (columns - batch.mask.shape[1], 0)) for batch in batches]
    ids = [F.pad(batch.ids, (columns + 1 - batch.ids.shape[1], 0)) for batch in batches]
    return Batch(batches[0].cache, torch.cat(masks), torch.cat(ids))


def keep(batch: Batch, rows: Tensor) -> Batch:
    """Keep these rows (a mask, or indices, repeats allowed), without the columns that none of them needs."""
    columns = max([1, *batch.mask[rows].sum(-1).tolist()])
    for layer in batch.cache.layers:
        layer.keys, layer.values = (x[rows, :, -columns:] for x in (layer.keys, layer.values))
    return Batch(batch.cache, batch.mask[rows, -columns:], batch.ids[rows, -columns - 1 :])


@torch.inference_mode()
def write(judge: Judge, prompts: list[list[int]], names: list[str], args, at_once: int) -> Iterator[tuple]:
    """Sample a CoT for each name until the suffix, an end of sequence or the limit, `at_once` rows at a time.

    Row b is of prompt b // args.num_cots. Yields row, ids and the score distribution (Rail) after them.
    """
    model, n, begun, batch = judge.model, args.num_cots, 0, None
    room = judge.tokenizer.positions - len(judge.suffix_ids) - 2  # suffix and score still have to fit
    limits = [min(args.max_new_tokens, room - len(prompts[row // n])) for row in range(len(names))]
    uniform = torch.stack([random_numbers(name, max(limits) + 1) for name in names]).to(device())
    suffix, ends, limits = (torch.tensor(x, device=device()) for x in (judge.suffix_ids, judge.ends, limits))
    rows = length = limits[:0]  # (B,): which rows are in the batch, and how many tokens each has written
    while begun < len(prompts) or len(rows):
        more = min((max(at_once, n) - len(rows)) // n, len(prompts) - begun)
        if more and 4 * len(rows) <= 3 * at_once:  # a quarter is free: read the next prompts
            new = read_prompts(model, prompts[begun : begun + more])
            new = keep(new, torch.arange(more * n, device=device()) // n)
            batch = join([batch, new]) if len(rows) else new
            rows = torch.cat([rows, torch.arange(begun * n, (begun + more) * n, device=device())])
            length, begun = F.pad(length, (0, more * n)), begun + more

        mask = F.pad(batch.mask, (0, 1), value=1)
        hidden = decode(model, batch.cache, batch.ids[:, -1:], mask)[:, -1]  # (B, D)
        logits = head(model, hidden)  # (B, V)
        tail = batch.ids[:, -len(suffix) :]
        over = (tail == suffix[-tail.shape[1] :]).all(-1) & (length >= len(suffix))
        over |= torch.isin(batch.ids[:, -1], ends) & (length > 0) | (length == limits[rows])
        so_far = torch.where(mask > 0, batch.ids, batch.ids[:, -1:])
        token = sample(logits, so_far, uniform[rows, length], args)  # for rows that are over it is ignored
        batch = Batch(batch.cache, mask, torch.cat([batch.ids, token[:, None]], 1))
        if bool(over.any()):
            scores = rail(score_logits(model, hidden[over], judge.scores["score_ids"]), **judge.scores)
            gone = zip(rows[over].tolist(), length[over].tolist(), batch.ids[over, :-1].tolist(), strict=True)
            for i, (row, written, ids) in enumerate(gone):
                yield row, ids[len(ids) - written :], Rail(*(x[i].tolist() for x in scores))
            batch, rows, length = keep(batch, ~over), rows[~over], length[~over]
        length = length + 1


class Cot(NamedTuple):  # what a judge wrote or was given
    text: str
    finished: bool  # did it reach the suffix by itself?
    ids: list[int]  # prompt, CoT and suffix, as training encodes them
    scores: Rail | None  # the score distribution after `ids`; None where it has not been read


def write_cots(judge: Judge, records: list[dict], prompts: list, args, at_once: int) -> list[list[Cot]]:
    """Write args.num_cots CoTs for each record, with the scores that came with them, where those hold."""
    names, cots = [f"{args.seed}/{r['id']}/{k}" for r in records for k in range(args.num_cots)], []
    how = (judge, prompts, names, args)
    for row, ids, scores in sorted(
        judge.model.write(*how) if args.engine == "vllm" else write(*how, at_once)
    ):
        prompt = prompts[row // args.num_cots]
        text = judge.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text, finished, _ = text.partition(judge.grid.suffix.strip())
        wanted = prefix_ids(judge.tokenizer, prompt, text, judge.grid)
        while len(wanted) >= judge.tokenizer.positions:
            # Half a character, where a CoT was cut off, takes more ids than were written: leave it out
            text = text[:-1]
            wanted = prefix_ids(judge.tokenizer, prompt, text, judge.grid)
        # A CoT without suffix, or one that training would encode otherwise, has to be read again
        cots.append(Cot(text.strip(), bool(finished), wanted, scores if wanted == prompt + ids else None))
    return [cots[i : i + args.num_cots] for i in range(0, len(cots), args.num_cots)]


def process_file(args, need: tuple[str, ...], texts_of: Callable, answer: Callable) -> None:
    """Add fields to every record of args.data and write it to args.out, in the order of the data.

    texts_of(judge, record): lists of ids that it is judged from. answer(judge, records, texts, at_once): new
    fields of some records, which stay together when going on: in another batch sums round differently.
    """
    started, writes = time.time(), not (args.no_cot or args.given)
    runs.check_out(args)
    if args.engine_args and args.engine != "vllm":
        raise InputError("--engine-args: are for --engine vllm")
    trained = hub.trained(args.model)
    if trained and trained.get("no_cot") and not args.no_cot:
        raise InputError(f"{args.model}: was trained without CoTs, knows none; use predict.py --no-cot")
    if trained and args.no_cot and not trained.get("no_cot"):
        raise InputError(f"{args.model}: was trained with CoTs, needs one; leave --no-cot away")
    records = read_records(args.data, args.grid, need)
    suffix = args.grid.suffix.strip()
    if not trained and writes and "[RESULT]" in records[0]["prompt"] and "[RESULT]" not in suffix:
        print(f"{args.data}: prompts ask for [RESULT], CoTs are to end in '{suffix}': --suffix '[RESULT]'?")
    if args.shard:  # one after another, so that `cat` leaves them in order
        i, n = args.shard
        records = records[len(records) * (i - 1) // n : len(records) * i // n]
        if not records:
            raise InputError(f"--shard {i}/{n}: there are fewer records than shares; make fewer")
    vllm = dict(args.engine_args) if args.engine == "vllm" else None
    judge = load_judge(args.model, args.grid, args.bf16, vllm)
    bar = tqdm(records, desc="tokenise", unit="record", delay=5, leave=False)
    texts = {r["id"]: texts_of(judge, r) for r in bar}
    length = {id: max(map(len, ids)) for id, ids in texts.items()}
    reserve = len(judge.suffix_ids) + 3 if writes else 0  # for a token of a CoT, the suffix and the score
    longest = min(args.max_length, judge.tokenizer.positions - reserve)
    fitting = [r for r in records if length[r["id"]] <= longest]
    if not fitting:
        raise InputError(f"{args.data}: all {len(records)} records are longer than {longest} tokens")

    part, settings, _lock = runs.begin(args)  # held until the end
    lines, done = part / "records.jsonl", {}  # done: id → line
    if lines.is_file():
        whole = lines.read_bytes().split(b"\n")[:-1]  # without a last line that was cut off
        done = {json.loads(line)["id"]: line.decode() + "\n" for line in whole}
        runs.write_whole(lines, "".join(done.values()))
        print(f"{part}: going on after {len(done)} finished records")
    left = sorted(fitting, key=lambda r: -length[r["id"]])
    at_once, bar = args.batch_size, runs.progress(len(fitting), len(done), args.out.stem, "record")
    with open(lines, "a", encoding="utf-8") as out, bar:
        while left:  # the longest first: if memory binds, at once
            chunk = left[: max(1, CHUNK * at_once // args.num_cots)]
            new = {r["id"] for r in chunk} - done.keys()
            try:
                answers = answer(judge, chunk, [texts[r["id"]] for r in chunk], at_once) if new else []
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise Fault(f"{part}: out of memory; lower --max-length or --num-cots") from None
                at_once //= 2
                bar.write(f"out of memory: going on with {at_once} sequences at a time")
                torch.cuda.empty_cache()
                continue
            for r, fields in zip(chunk, answers, strict=bool(new)):
                if r["id"] in new:
                    done[r["id"]] = runs.to_line(r | fields)
                    out.write(done[r["id"]])
            out.flush()
            bar.update(len(new))
            left = left[len(chunk) :]

    unfinished = [r["id"] for r in fitting if not all(json.loads(done[r["id"]])["finished"])]
    record = Path(f"{str(args.out).removesuffix('.jsonl')}.run.json")
    facts = {"unfinished": len(unfinished), "sequences_at_once": at_once}
    runs.write_run(record, args, settings, started, **facts, enable_thinking=enable_thinking(judge.tokenizer))
    runs.write_whole(args.out, "".join(done[r["id"]] for r in fitting))  # last: where OUT is, everything is
    shutil.rmtree(part)
    runs.report(length.keys() - done.keys(), f"left out, longer than {longest} tokens")
    runs.report(unfinished, "with a CoT that did not reach the suffix by itself")
    if writes and 2 * len(unfinished) > len(fitting):
        print(
            f"most CoTs never came to '{suffix}': does the prompt ask for these words? --suffix names others"
        )
    print(f"{args.out}: {len(fitting)} records in {time.time() - started:.0f} s")


def part(text: str) -> tuple[int, int]:
    """Parse --shard: 2/8 is the second of eight shares."""
    i, n = map(int, text.split("/"))
    if not 1 <= i <= n:
        raise ValueError
    return i, n


def option(text: str) -> tuple[str, object]:
    """Parse one of --engine-args: its value is JSON, or else the text itself."""
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def make_parser(description: str, model: str, data: str, out: str) -> argparse.ArgumentParser:
    """Make the options of both scripts that write CoTs; `how_many` is the group of --num-cots."""
    parser = argparse.ArgumentParser(description=description, formatter_class=runs.Help, allow_abbrev=False)
    add = parser.add_argument_group("what goes in and out").add_argument
    add("--model", default=model, help=f"checkpoint folder, hub id or one of {', '.join(hub.MODELS)}")
    add("--data", default=str(ROOT / "data/tiny" / data), help="JSONL file of records")
    add("--out", type=Path, default=Path(out), help="JSONL file to write")
    group = parser.add_argument_group("sampling (the defaults are the paper's)")
    parser.how_many, add = group.add_mutually_exclusive_group(), group.add_argument
    parser.how_many.add_argument("--num-cots", type=COUNT, default=1, help="CoTs a prompt")
    add("--max-new-tokens", type=COUNT, default=1024, help="tokens; a longer CoT is unfinished")
    add("--temperature", type=WEIGHT, default=1.0, help="0 always takes the most likely token")
    add("--top-p", type=runs.number(float, 1e-6, 1), default=0.9, help="mass that tokens are sampled from")
    add("--repetition-penalty", type=runs.number(float, 1e-6), default=1.03, help="1 is none")
    add("--batch-size", type=COUNT, default=32, help="sequences at a time; halved when memory runs out")
    add = parser.add_argument_group("many records (docs/scale.md)").add_argument
    add("--shard", type=part, metavar="I/N", help="take the I-th of N shares of the records; cat joins them")
    add("--engine", choices=("torch", "vllm"), default="torch", help="vllm: see vllm_engine.py")
    add("--engine-args", nargs="+", type=option, default=[], metavar="KEY=VALUE", help="for vLLM's LLM(...)")
    runs.add_common_arguments(parser, models.has_bf16())
    parser.set_defaults(no_cot=False, given=None)
    return parser


def main() -> None:
    args = make_parser(__doc__, "out/stage1", "train.jsonl", "out/cots.jsonl").parse_args()
    args.grid = runs.choose_grid(args)

    def answer(judge: Judge, records: list[dict], texts: list[list[list[int]]], at_once: int) -> list[dict]:
        written = write_cots(judge, records, [prompt for (prompt,) in texts], args, at_once)
        suffix = args.grid.suffix.strip()
        return [
            {"cots": [c.text for c in cots], "finished": [c.finished for c in cots], "suffix": suffix}
            for cots in written
        ]

    need = ("id", "prompt", "score")
    process_file(args, need, lambda judge, r: [prompt_ids(judge.tokenizer, r["prompt"])], answer)


if __name__ == "__main__":
    runs.run(main)
