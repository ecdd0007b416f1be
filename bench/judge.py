"""Judging - a CoT and its score distribution - against the authors' way: the same texts and scores, how long and why?

    python bench/judge.py                                        # a small random model, a few minutes on a CPU
    python bench/judge.py --num-cots 5
    python bench/judge.py --model llama-3.2-1b --data test.jsonl --batch-size 32

Ways to judge the same prompts:

    ours       gen_cot.judge, the path of gen_cot.py and predict.py
    authors    transformers' generate in batches until all rows have ended; then each text anew, alone, with logits for all
               its positions, for the score distribution
    no-refill  ours, but a batch has to end before the next one begins
    copying    ours with transformers' cache, which copies all keys and values for every token
    sorting    ours with the whole vocabulary sorted for every token

All ways write the CoTs of the data (field cot), whatever the model would say, so that all have the same work to do; they pay
for sampling all the same. First all must find the same score distributions. Then they take turns, --rounds times. Ends with
one JSON line.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import machine  # noqa: E402
import workload  # noqa: E402

import gen_cot  # noqa: E402
import models  # noqa: E402
import records  # noqa: E402
import runs  # noqa: E402
from gen_cot import Sampling  # noqa: E402
from loss import Rail, rail  # noqa: E402
from models import device, has_bf16  # noqa: E402
from records import Grid  # noqa: E402

MOST = 4096  # tokens of a text, at most


def dictate(texts: list[list[int]]) -> dict:
    """What to replace in gen_cot so that row b writes texts[b]: its random numbers say which row and step they are for."""
    written = torch.zeros(len(texts) * MOST, dtype=torch.long, device=device())
    for row, ids in enumerate(texts):
        written[row * MOST : row * MOST + len(ids)] = torch.tensor(ids, device=device())
    real, rows = gen_cot.sample, itertools.count()

    def sample(logits, so_far, uniform, **options):
        real(logits, so_far, torch.full_like(uniform, 0.5), **options)
        return written[uniform.long()]

    return {"sample": sample, "random_numbers": lambda name, n: next(rows) * MOST + torch.arange(n, dtype=torch.float64)}


def ours(model, tokenizer, prompts, texts, *, sampling, grid, tokens, batch_size, replace, together) -> list[list[Rail]]:
    """Judged `together` prompts at a time, as judge_file does."""
    found, n = [], sampling.num_cots
    for i in range(0, len(prompts), together):
        part = prompts[i : i + together]
        with machine.replaced(gen_cot, **dictate(texts[i * n : (i + together) * n]), **replace):
            judged = gen_cot.judge(
                model, tokenizer, part, [str(j) for j in range(len(part))], sampling=sampling, grid=grid, tokens=tokens,
                with_scores=True, at_once=batch_size,
            )  # fmt: skip
            found += [judgement.scores for _, judgement in sorted(judged)]
    return found


class Copying(gen_cot.GrowingLayer):
    """transformers' way to add a token."""

    update = DynamicLayer.update


class Dictated(LogitsProcessor):
    """Makes row b of a generate call write texts[b]."""

    def __init__(self, texts: list[list[int]], width: int):
        self.texts, self.width = texts, width

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.width
        ids = torch.tensor([[text[min(step, len(text) - 1)]] for text in self.texts], device=scores.device)
        return scores.scatter(1, ids, 1e4)


@torch.inference_mode()
def authors(model, tokenizer, prompts, texts, *, sampling, grid, tokens, batch_size) -> list[list[Rail]]:
    found, n, end = [], sampling.num_cots, tokenizer.eos_token_id
    at_once = max(1, batch_size // n)
    ids = {"score_ids": torch.tensor(tokens.score_ids, device=device())}
    ids["score_values"] = torch.tensor(grid.values, device=device())
    for i in range(0, len(prompts), at_once):
        part = prompts[i : i + at_once]
        width = max(map(len, part))
        own = [[*text, tokens.score_ids[0], end] for text in texts[i * n : (i + len(part)) * n]]
        batch = torch.tensor([[end] * (width - len(p)) + p for p in part], device=device())
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device())
        written = model.generate(
            batch, attention_mask=mask, do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0,
            repetition_penalty=sampling.repetition_penalty, max_new_tokens=sampling.max_new_tokens, use_cache=True,
            num_return_sequences=n, eos_token_id=end, pad_token_id=end,
            logits_processor=LogitsProcessorList([Dictated(own, width)]),
        )  # fmt: skip
        scores = []
        for row, line in enumerate(written[:, width:].tolist()):
            cot, _ = gen_cot.read_cot(tokenizer, line, grid.suffix)
            again = records.prefix_ids(tokenizer, part[row // n], cot, grid)
            scores.append(rail(model(torch.tensor([again], device=device())).logits[0].float()[-1], **ids))
        found += [scores[k : k + n] for k in range(0, len(scores), n)]
    return found


@contextmanager
def stopwatch():
    """Seconds that our way spends on reading prompts, on CoTs, in sampling and on the scores; the rest is bookkeeping."""
    spent, running = Counter(), []

    def timed(name: str, real):
        def run(*args, **options):
            if running:  # inside another of these
                return real(*args, **options)
            running.append(name)
            machine.synchronise()
            started = time.perf_counter()
            found = real(*args, **options)
            machine.synchronise()
            spent[running.pop()] += time.perf_counter() - started
            return found

        return run

    names = {"read_prompts": "prompts", "read_scores": "scores", "sample": "sampling", "feed": "CoTs", "head": "CoTs"}
    with machine.replaced(gen_cot, **{name: timed(label, getattr(gen_cot, name)) for name, label in names.items()}):
        yield spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help, allow_abbrev=False)
    parser.add_argument("--model", help="alias, folder or hub id; None: a random small one")
    parser.add_argument("--vocabulary", type=runs.COUNT, default=32000, help="of the random model")
    parser.add_argument("--layers", type=runs.COUNT, default=4, help="of the random model")
    parser.add_argument("--hidden", type=runs.COUNT, default=256, help="size of the random model")
    parser.add_argument("--data", help="JSONL file with prompt and cot; None: texts of real length")
    parser.add_argument("--records", type=runs.COUNT, default=32, help="to judge")
    parser.add_argument("--prompt", type=float, default=1310, help="median tokens of the prompts that are made")
    parser.add_argument("--cot", type=float, default=118, help="median tokens of the CoTs that are made")
    parser.add_argument("--num-cots", type=runs.COUNT, default=1, help="CoTs a prompt")
    parser.add_argument("--batch-size", type=runs.COUNT, default=8, help="sequences at a time")
    parser.add_argument("--ways", default="ours,authors,no-refill,copying,sorting", help="which to compare")
    parser.add_argument("--rounds", type=runs.COUNT, default=3, help="turns that each way gets")
    parser.add_argument("--threads", type=runs.COUNT, default=1, help="of a CPU")
    parser.add_argument("--out", type=Path, help="JSON file to add the result to, a line; None: only print")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways, grid = args.ways.split(","), Grid()

    tokenizer = models.load_tokenizer(args.model or records.TINY_SEED)
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    if args.model:
        model = models.load_model(args.model, dtype=dtype)
    else:
        # Weights so large that the model heeds what it reads, and is as sure of its next token as a trained one
        config = workload.shape(args.vocabulary, layers=args.layers, hidden=args.hidden, spread=0.2)
        model = workload.random_model(config, dtype, sharp=3)
    tokens = records.score_tokens(tokenizer, grid)
    if args.data:
        rows = records.read_records(args.data, grid=grid, need=("id", "prompt", "cot"))
        rows = [rows[i] for i in range(min(len(rows), args.records))]
    else:
        rows = list(workload.long_records(args.records, prompt=args.prompt, cot=args.cot))
    prompts = [records.prompt_ids(tokenizer, row["prompt"]) for row in rows]
    pairs = sorted(zip(prompts, rows, strict=True), key=lambda pair: -len(pair[0]))  # as judge_file does; for all ways
    prompts = [prompt for prompt, _ in pairs]
    n = args.num_cots
    cots = [rows[(i + k) % len(rows)]["cot"] for i in range(len(rows)) for k in range(n)]  # a prompt's CoTs differ
    texts = [records.target_ids(tokenizer, cot, grid.tokens[0], grid.suffix)[:-1] for cot in cots]

    sampling = Sampling(num_cots=n, max_new_tokens=min(1024, max(map(len, texts)) + 2))
    same = dict(sampling=sampling, grid=grid, tokens=tokens, batch_size=args.batch_size)
    batch = max(1, args.batch_size // n)
    several = gen_cot.TOGETHER * batch
    levers = {
        "ours": ({}, several),
        "no-refill": ({}, batch),
        "copying": ({"GrowingLayer": Copying}, several),
        "sorting": ({"NUCLEUS": 10**9}, several),
    }

    def run(way: str, first: int = len(prompts)) -> list[list[Rail]]:
        some = model, tokenizer, prompts[:first], texts[: first * n]
        if way == "authors":
            return authors(*some, **same)
        replace, together = levers[way]
        return ours(*some, **same, replace=replace, together=together)

    def numbers(found: list[list[Rail]]) -> torch.Tensor:
        """Renormalised: a random model puts next to nothing on the scores, and nothing would be easy to agree on."""
        probs = torch.tensor([list(score.probs) for scores in found for score in scores])
        probs = probs / probs.sum(-1, keepdim=True)
        return torch.cat([probs @ torch.tensor(grid.values)[:, None], probs], 1)

    found = {way: numbers(run(way)) for way in ways}
    off = {way: float((found[way] - found[ways[0]]).abs().max()) for way in ways}
    for way in ways:
        print(f"{way:10} expected scores and probabilities off by {off[way]:.1e} at most", flush=True)
        assert off[way] < (5e-2 if has_bf16() else 1e-4), f"{way}: other scores than {ways[0]}"
    spread = float(found[ways[0]][:, 0].std())
    assert spread > 0.1, "all scores are the same: nothing was compared"

    peak = {way: machine.peak_of(lambda way=way: run(way, batch)) for way in ways}  # of a batch of the longest prompts
    times = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            times[way].append(machine.seconds(lambda way=way: run(way)) / len(prompts))
    with stopwatch() as spent:
        whole = machine.seconds(lambda: run("ours"))

    # The limit: reading each prompt once, then a token of every row a step, each step as fast as arithmetic or memory allow
    where, work = machine.machine(), machine.Work.of(model)
    lengths, rows_at_once = [len(p) for p in prompts], min(args.batch_size, len(texts))
    mean = statistics.mean(len(prompts[b // n]) + len(text) / 2 for b, text in enumerate(texts))
    flops, moved = work.decode([mean] * rows_at_once, 2 if has_bf16() else 4)
    step = max(flops / where["peak_flops"], moved / where["bandwidth"])
    limit = work.prefill(lengths) / where["peak_flops"] + step * sum(map(len, texts)) / rows_at_once
    median = {way: statistics.median(times[way]) for way in ways}
    result = {
        "bench": "judge", "machine": where, "arguments": vars(args), "prompt_tokens": sum(lengths),
        "generated_tokens": sum(map(len, texts)), "scores_off": off, "scores_spread": spread,
        "seconds_a_prompt": {way: round(median[way], 4) for way in ways},
        "times": {way: [round(t, 4) for t in times[way]] for way in ways},
        "tokens_per_second": {way: round(sum(map(len, texts)) / len(prompts) / median[way]) for way in ways},
        "peak_bytes": peak,
        "ratio_to_ours": {way: machine.median_ratio(times[way], times["ours"]) for way in ways},
        "share_of_limit": round(limit / len(prompts) / median["ours"], 4),
        "where": {name: round(share / whole, 4) for name, share in spent.items()},
    }  # fmt: skip
    print(f"\n{'way':10} {'s/prompt':>8} {'ratio':>6} {'generated tok/s':>15} {'peak MiB':>8}")
    for way in ways:
        ratio = result["ratio_to_ours"][way]["median"]
        print(f"{way:10} {median[way]:8.3f} {ratio:6.2f} {result['tokens_per_second'][way]:15} {peak[way] / 2**20:8.0f}")
    machine.report(result, args.out)


if __name__ == "__main__":
    runs.run(main)
