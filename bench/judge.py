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
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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
from records import Grid, ScoreTokens  # noqa: E402

MOST = 4096  # tokens of a text, at most


class Job(NamedTuple):
    """What all ways are given: prompts and what they write, as token ids, and how."""

    tokenizer: object
    prompts: list[list[int]]  # the longest first, as judge_file has them
    texts: list[list[int]]  # `num_cots` a prompt, each ending with the suffix
    sampling: Sampling
    grid: Grid
    tokens: ScoreTokens

    @classmethod
    def of(cls, tokenizer, rows: list[dict], num_cots: int) -> "Job":
        grid, n = Grid(), len(rows)
        prompts = [records.prompt_ids(tokenizer, row["prompt"]) for row in rows]
        cots = [rows[(i + k) % n]["cot"] for i in range(n) for k in range(num_cots)]  # a prompt's CoTs differ
        texts = [records.target_ids(tokenizer, cot, grid.tokens[0], grid.suffix)[:-1] for cot in cots]
        order = sorted(range(n), key=lambda i: -len(prompts[i]))
        return cls(
            tokenizer, [prompts[i] for i in order], [texts[i * num_cots + k] for i in order for k in range(num_cots)],
            Sampling(num_cots=num_cots, max_new_tokens=min(1024, max(map(len, texts)) + 2)), grid,
            records.score_tokens(tokenizer, grid),
        )  # fmt: skip

    def first(self, n: int) -> "Job":
        """Its first n prompts."""
        return self._replace(prompts=self.prompts[:n], texts=self.texts[: n * self.sampling.num_cots])

    @property
    def generated(self) -> int:
        return sum(map(len, self.texts))

    def decode_limit(self, work: machine.Work, where: dict, at_once: int) -> float:
        """Seconds that writing all texts takes at least, `at_once` rows a step, each as fast as arithmetic or memory allow."""
        n, rows = self.sampling.num_cots, min(at_once, len(self.texts))
        mean = statistics.mean(len(self.prompts[b // n]) + len(text) / 2 for b, text in enumerate(self.texts))
        flops, moved = work.decode([mean] * rows, 2 if has_bf16() else 4)
        return max(flops / where["peak_flops"], moved / where["bandwidth"]) * self.generated / rows


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


def ours(model, job: Job, *, batch_size: int, replace: dict, together: int) -> list[list[Rail]]:
    """Judged `together` prompts at a time, as judge_file does."""
    found, n = [], job.sampling.num_cots
    for i in range(0, len(job.prompts), together):
        part = job.prompts[i : i + together]
        with machine.replaced(gen_cot, **dictate(job.texts[i * n : (i + together) * n]), **replace):
            judged = gen_cot.judge(
                model, job.tokenizer, part, [str(j) for j in range(len(part))], sampling=job.sampling, grid=job.grid,
                tokens=job.tokens, with_scores=True, at_once=batch_size,
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
def authors(model, job: Job, *, batch_size: int, spent: Counter | None = None) -> list[list[Rail]]:
    """`spent` is told the seconds that went into CoTs and into scores."""
    found, n, end, spent = [], job.sampling.num_cots, job.tokenizer.eos_token_id, Counter() if spent is None else spent
    at_once = max(1, batch_size // n)
    ids = {"score_ids": torch.tensor(job.tokens.score_ids, device=device())}
    ids["score_values"] = torch.tensor(job.grid.values, device=device())
    settings = job.sampling._asdict()
    settings["num_return_sequences"] = settings.pop("num_cots")
    for i in range(0, len(job.prompts), at_once):
        part = job.prompts[i : i + at_once]
        width = max(map(len, part))
        own = [[*text, job.tokens.score_ids[0], end] for text in job.texts[i * n : (i + len(part)) * n]]
        batch = torch.tensor([[end] * (width - len(p)) + p for p in part], device=device())
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=device())
        with machine.timed(spent, "CoTs"):
            written = model.generate(
                batch, attention_mask=mask, do_sample=True, top_k=0, use_cache=True, eos_token_id=end, pad_token_id=end,
                logits_processor=LogitsProcessorList([Dictated(own, width)]), **settings,
            )  # fmt: skip
        with machine.timed(spent, "scores"):
            scores = []
            for row, line in enumerate(written[:, width:].tolist()):
                cot, _ = gen_cot.read_cot(job.tokenizer, line, job.grid.suffix)
                again = records.prefix_ids(job.tokenizer, part[row // n], cot, job.grid)
                scores.append(rail(model(torch.tensor([again], device=device())).logits[0].float()[-1], **ids))
        found += [scores[k : k + n] for k in range(0, len(scores), n)]
    return found


@contextmanager
def stopwatch():
    """Seconds that our way spends on reading prompts, on CoTs, in sampling and on the scores; the rest is bookkeeping."""
    spent, running = Counter(), []

    def watched(label: str, real):
        def run(*args, **options):
            if running:  # inside another of these
                return real(*args, **options)
            running.append(label)
            with machine.timed(spent, label):
                found = real(*args, **options)
            running.clear()
            return found

        return run

    names = {"read_prompts": "prompts", "read_scores": "scores", "sample": "sampling", "feed": "CoTs", "head": "CoTs"}
    with machine.replaced(gen_cot, **{name: watched(label, getattr(gen_cot, name)) for name, label in names.items()}):
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
    ways = args.ways.split(",")

    tokenizer = models.load_tokenizer(args.model or records.TINY_SEED)
    dtype = torch.bfloat16 if has_bf16() else torch.float32
    if args.model:
        model = models.load_model(args.model, dtype=dtype)
    else:
        # Weights so large that the model heeds what it reads, and is as sure of its next token as a trained one
        config = workload.shape(args.vocabulary, layers=args.layers, hidden=args.hidden, spread=0.2)
        model = workload.random_model(config, dtype, sharp=3)
    if args.data:
        rows = records.read_records(args.data, grid=Grid(), need=("id", "prompt", "cot"))
        rows = [rows[i] for i in range(min(len(rows), args.records))]
    else:
        rows = list(workload.long_records(args.records, prompt=args.prompt, cot=args.cot))
    job = Job.of(tokenizer, rows, args.num_cots)

    batch = max(1, args.batch_size // args.num_cots)
    several = gen_cot.TOGETHER * batch
    levers = {
        "ours": ({}, several),
        "no-refill": ({}, batch),
        "copying": ({"GrowingLayer": Copying}, several),
        "sorting": ({"NUCLEUS": 10**9}, several),
    }

    def run(way: str, job: Job = job) -> list[list[Rail]]:
        if way == "authors":
            return authors(model, job, batch_size=args.batch_size)
        replace, together = levers[way]
        return ours(model, job, batch_size=args.batch_size, replace=replace, together=together)

    def numbers(found: list[list[Rail]]) -> torch.Tensor:
        """Renormalised: a random model puts next to nothing on the scores, and nothing would be easy to agree on."""
        probs = torch.tensor([list(score.probs) for scores in found for score in scores])
        probs = probs / probs.sum(-1, keepdim=True)
        return torch.cat([probs @ torch.tensor(job.grid.values)[:, None], probs], 1)

    found = {way: numbers(run(way)) for way in ways}
    off = {way: float((found[way] - found[ways[0]]).abs().max()) for way in ways}
    for way in ways:
        print(f"{way:10} expected scores and probabilities off by {off[way]:.1e} at most", flush=True)
        assert off[way] < (5e-2 if has_bf16() else 1e-4), f"{way}: other scores than {ways[0]}"
    spread = float(found[ways[0]][:, 0].std())
    assert spread > 0.1, "all scores are the same: nothing was compared"

    peak = {
        way: machine.peak_of(lambda way=way: run(way, job.first(batch))) for way in ways
    }  # of a batch of the longest prompts
    times = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            times[way].append(machine.seconds(lambda way=way: run(way)) / len(rows))
    with stopwatch() as spent:
        whole = machine.seconds(lambda: run("ours"))

    # The limit: reading each prompt once, then writing
    where, work = machine.machine(), machine.Work.of(model)
    lengths = [len(p) for p in job.prompts]
    limit = work.prefill(lengths) / where["peak_flops"] + job.decode_limit(work, where, args.batch_size)
    median = {way: statistics.median(times[way]) for way in ways}
    result = {
        "bench": "judge", "machine": where, "arguments": vars(args), "prompt_tokens": sum(lengths),
        "generated_tokens": job.generated, "scores_off": off, "scores_spread": spread,
        "seconds_a_prompt": {way: round(median[way], 4) for way in ways},
        "times": {way: [round(t, 4) for t in times[way]] for way in ways},
        "tokens_per_second": {way: round(job.generated / len(rows) / median[way]) for way in ways},
        "peak_bytes": peak,
        "ratio_to_ours": {way: machine.median_ratio(times[way], times["ours"]) for way in ways},
        "share_of_limit": round(limit / len(rows) / median["ours"], 4),
        "where": {name: round(share / whole, 4) for name, share in spent.items()},
    }  # fmt: skip
    print(f"\n{'way':10} {'s/prompt':>8} {'ratio':>6} {'generated tok/s':>15} {'peak MiB':>8}")
    for way in ways:
        ratio = result["ratio_to_ours"][way]["median"]
        print(f"{way:10} {median[way]:8.3f} {ratio:6.2f} {result['tokens_per_second'][way]:15} {peak[way] / 2**20:8.0f}")
    machine.report(result, args.out)


if __name__ == "__main__":
    runs.run(main)
