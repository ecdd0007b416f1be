"""Everything that only a large GPU can show, at the shapes of Mistral-7B and Llama-3.1-8B, with random weights.

    python bench/gpu.py --parts train --out results/gpu/gpu.jsonl      # each part ends in under ten minutes on an H200
    python bench/gpu.py --plan                                         # the cases of train, what memory they need; runs none
    python bench/gpu.py --rehearse                                     # all parts on small shapes, six minutes on a CPU

    train       steps on sequences of real lengths: LoRA and full, recomputed or kept, 1 to 8 at a time; the authors' style
                of loss and Hugging Face's Trainer; peak memory against what stage 1 says it expects
    judge       prompts of real lengths, batches up to what memory takes: tokens a second against the limit of the memory's
                bandwidth; the authors' style; 5 CoTs a prompt
    precision   score distributions in bf16 against fp32 on the same weights; do weights move at a learning rate of 1e-5?
    resume      stage 1 cut off and gone on with, against two runs that never stopped: the same losses?
    embedded    the main rows of the ablations on this device, next to the committed ones
    larger      the same rows with a seed model of 13 M parameters, pretrained here, and ten times the training records

A part is a series of cases, each printed as it ends; no new one is begun after --minutes. Every part adds one JSON line to
--out, and prints it last.
"""

import argparse
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import scipy.stats
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import judge  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import train_step  # noqa: E402
import workload  # noqa: E402

import models  # noqa: E402
import records  # noqa: E402
import runs  # noqa: E402
import stage1_train  # noqa: E402
from loss import rail  # noqa: E402
from models import Lora, device, has_bf16  # noqa: E402
from records import Example  # noqa: E402

PRECISION = torch.bfloat16 if has_bf16() else torch.float32


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def real_examples(n: int, vocabulary: int, scale: float) -> list[Example]:
    """Random tokens in the lengths of the MT-Bench judgements: prompts of median 1,310, CoT, suffix and score of 128."""
    prompts = workload.real_lengths(n, median=1310 * scale, spread=0.39, most=2800, seed=1)
    cots = workload.real_lengths(n, median=128 * scale, spread=0.275, most=280, seed=2)
    made = []
    for i, (prompt, cot) in enumerate(zip(prompts, cots, strict=True)):
        ids = torch.randint(10, vocabulary, (prompt + cot,), generator=torch.Generator().manual_seed(i)).tolist()
        made.append(Example(str(i), ids, prompt, len(ids) - 2, float(1 + i % 5)))
    return made


# ------------------------------------------------------------------------------------------------------------ train


class Case(NamedTuple):
    """Steps to be timed."""

    shape: str
    lora: Lora | None
    style: str  # ours, compiled, authors, trainer
    recomputed: bool
    sequences: int  # a step
    examples: list[Example]
    plan: list[list[int]]  # of examples, a window a step
    expected: models.Memory  # what stage 1 would say

    def facts(self) -> dict:
        return {
            "shape": self.shape, "lora": bool(self.lora), "style": self.style, "recomputed": self.recomputed,
            "sequences": self.sequences, "longest": max(len(e.ids) for e in self.examples),
            "expected_bytes": self.expected.total,
        }  # fmt: skip


def training_cases(args, shapes: dict) -> Iterator[Case]:
    """Those of one model together; those that change it for good last."""
    ours = [("ours", recomputed, n) for recomputed in (True, False) for n in (1, 2, 4, 8)]
    others = [("authors", True, 1), ("authors", True, 4), ("trainer", True, 1), ("trainer", True, 4)]
    others += [("compiled", True, 4), ("compiled", False, 4)]
    for shape, lora in (("mistral-7b", Lora()), ("mistral-7b", None), ("llama-3.1-8b", Lora())):
        config = shapes[shape]
        for style, recomputed, sequences in ours + others:
            examples = real_examples(args.steps * sequences, config.vocab_size, args.scale)
            windows = stage1_train.windows([len(e.ids) for e in examples], sequences, seed=0)
            # The largest last: in the first step the optimiser holds nothing yet
            plan = sorted(windows, key=lambda window: max(len(examples[i].ids) for i in window))
            largest = [examples[i] for i in plan[-1]]
            expected = memory.expect(
                config, lora, sequences=sequences, length=max(len(e.ids) for e in largest),
                supervised=sum(e.supervised for e in largest), bf16=args.plan or has_bf16(), gradient_checkpointing=recomputed,
            )  # fmt: skip
            yield Case(shape, lora, style, recomputed, sequences, examples, plan, expected)


def train(args, shapes: dict, where: dict) -> Iterator[dict]:
    for (shape, lora), cases in itertools.groupby(training_cases(args, shapes), key=lambda case: (case.shape, case.lora)):
        model = workload.random_model(shapes[shape], PRECISION if lora else torch.float32)
        model = (models.with_adapters(model, lora) if lora else model).train()
        for case in cases:
            yield case.facts() | steps(model, case, where)
            model.zero_grad(set_to_none=True)
            clear()
        del model
        clear()


def steps(model, case: Case, where: dict) -> dict:
    """Rate, memory and losses of the case's steps."""
    if case.expected.total > 0.97 * models.memory_there():
        return {"left_out": "not expected to fit"}
    (models.checkpoint_activations if case.recomputed else train_step.keep_activations)(model)
    models.cast_by_autocast(model)
    if case.style == "compiled":
        models.compile_blocks(model)
    if case.style == "trainer":
        way = train_step.with_trainer
    else:
        way = partial(train_step.loop, backward=train_step.authors if case.style == "authors" else train_step.ours)
    run = partial(
        way, model, case.examples, case.plan, loss=workload.loss_of(), options=argparse.Namespace(sequences=case.sequences)
    )
    own, taken = sum(p.numel() * p.element_size() for p in model.parameters()), []
    try:
        peak = own + machine.peak_of(lambda: taken.extend(run()))
    except (runs.Fault, torch.OutOfMemoryError):
        return {"left_out": "out of memory"}
    # Each step has its own lengths: work and time are summed over all but the first, which warms up
    losses, times = taken
    second = sum(times[1:])
    work, flops, hardware, tokens = machine.Work.of(model), 0.0, 0.0, 0
    for window in case.plan[1:]:
        lengths, supervised = [len(case.examples[i].ids) for i in window], sum(case.examples[i].supervised for i in window)
        of_model, of_hardware = work.training(lengths, supervised, lora=bool(case.lora), recomputed=case.recomputed)
        flops, hardware, tokens = flops + of_model, hardware + of_hardware, tokens + sum(lengths)
    found = {
        "tokens_per_second": round(tokens / second), "mfu": round(flops / second / where["peak_flops"], 4),
        "hardware": round(hardware / second / where["peak_flops"], 4), "peak_bytes": peak, "last_loss": round(losses[-1], 5),
    }  # fmt: skip
    return found | ({"expected_to_peak": round(case.expected.total / peak, 3)} if case.style == "ours" else {})


# ------------------------------------------------------------------------------------------------------------ judge


def judging(args, shapes: dict, where: dict) -> Iterator[dict]:
    tokenizer = models.load_tokenizer(records.TINY_SEED)
    for shape, config in shapes.items():
        model = workload.random_model(config, PRECISION, sharp=6)  # of 4,096 numbers at .02: as sure as a trained model
        most = models.rows_that_fit(model, round(args.scale * 3080))  # the longest prompts and CoTs
        cases = [(("ours", "authors"), 1, min(16, most)), (("ours",), 1, most), (("ours",), 5, most)]
        cases += [(("ours",), 1, n) for n in (64, 256) if n < most]
        for ways, num_cots, at_once in cases:
            n = 24 if "authors" in ways else max(args.steps, 4 * at_once // num_cots)
            rows = list(workload.long_records(n, prompt=1310 * args.scale, cot=118 * args.scale))
            job = judge.Job.of(tokenizer, rows, num_cots)
            yield {"shape": shape, "num_cots": num_cots, "at_once": at_once, "prompts": n} | {
                way: judged(way, model, job, at_once, where) for way in ways
            }
            clear()
        del model
        clear()


def judged(way: str, model, job: judge.Job, at_once: int, where: dict) -> dict:
    """Rates and where the time went, of all prompts at one go."""
    if way == "authors":
        spent = Counter()
        second = machine.seconds(lambda: judge.authors(model, job, batch_size=at_once, spent=spent))
    else:
        with judge.stopwatch() as spent:
            second = machine.seconds(lambda: judge.ours(model, job, batch_size=at_once, replace={}, together=len(job.prompts)))
    found = {
        "seconds": round(second, 2), "where": {part: round(own, 2) for part, own in spent.items()},
        "generated_per_second": round(job.generated / second), "scores_share": round(spent["scores"] / second, 4),
    }  # fmt: skip
    if way == "ours":  # the authors' CoTs contain the reading of the prompts
        decoding = spent["CoTs"] + spent["sampling"]
        found["decoded_per_second"] = round(job.generated / decoding)
        found["share_of_decode_limit"] = round(job.decode_limit(machine.Work.of(model), where, at_once) / decoding, 4)
    return found


# ------------------------------------------------------------------------------------------------ precision, resume


def precision(args, shapes: dict, where: dict) -> Iterator[dict]:
    """The same random weights, in bf16 and in fp32 with the same rounded weights; then ten steps at 1e-5."""
    loss = workload.loss_of()
    scores_of = {name: loss.keywords[name] for name in ("score_ids", "score_values")}
    for shape, config in shapes.items():
        model = workload.random_model(config, PRECISION, sharp=6)
        texts = [e.ids for e in real_examples(16, config.vocab_size, args.scale)]

        @torch.inference_mode()
        def scores(model=model, texts=texts) -> torch.Tensor:
            at_end = [model.get_decoder()(torch.tensor([text], device=device())).last_hidden_state[:, -1] for text in texts]
            return torch.cat([rail(models.head(model, h), **scores_of).probs for h in at_end])

        low = scores()
        model.float()
        high = scores()
        low, high = (probs / probs.sum(-1, keepdim=True) for probs in (low, high))  # random weights put little on scores
        yield {
            "shape": shape, "total_variation": round(float((low - high).abs().sum(-1).mean() / 2), 5),
            "expected_score": round(float(((low - high) @ scores_of["score_values"]).abs().mean()), 5),
        }  # fmt: skip
        del model, scores
        clear()
    config = shapes["mistral-7b"]
    model = workload.random_model(config, torch.float32).train()
    models.checkpoint_activations(model)
    before = {name: p.detach()[:64].clone() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    examples, options = real_examples(10, config.vocab_size, args.scale), argparse.Namespace(sequences=1)
    plan = [[i] for i in range(10)]
    train_step.loop(model, examples, plan, backward=train_step.ours, loss=loss, options=options, lr=1e-5)
    after = {name: p[:64] for name, p in model.named_parameters() if name in before}
    moved = [(after[name] != old).float().mean() for name, old in before.items()]
    in_bf16 = [(after[name].bfloat16() != old.bfloat16()).float().mean() for name, old in before.items()]
    shares = {"fp32": torch.stack(moved).mean(), "seen in bf16": torch.stack(in_bf16).mean()}
    yield {"moved_at_1e-5": {name: round(float(share), 5) for name, share in shares.items()}}


def resume(args, shapes: dict, where: dict) -> Iterator[dict]:
    """Stage 1 on the embedded task: twice whole, and once stopped by a signal after its first saved state."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "stage1_train.py", "--epochs", "1", "--save-every", "10", "--eval-size", "0"]
        for out in ("whole", "again"):
            subprocess.run([*command, "--out", f"{folder}/{out}"], check=True, capture_output=True)
        cut = subprocess.Popen([*command, "--out", f"{folder}/cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while cut.poll() is None and not Path(f"{folder}/cut.part/state.pt").is_file():
            time.sleep(0.02)
        cut.send_signal(signal.SIGTERM)
        cut.wait()
        stopped = len(Path(f"{folder}/cut.part/log.jsonl").read_text("utf-8").splitlines())
        subprocess.run([*command, "--out", f"{folder}/cut"], check=True, capture_output=True)
        logs = [Path(f"{folder}/{name}/log.jsonl").read_text("utf-8").splitlines() for name in ("whole", "again", "cut")]
        whole, again, cut = ([json.loads(line)["loss"] for line in log] for log in logs)
    apart = {
        name: max(abs(a - b) for a, b in zip(whole, other, strict=True)) for name, other in (("cut", cut), ("again", again))
    }
    yield {"stopped_after": stopped, "steps": len(whole), "losses_differ_from_the_whole_run_by_at_most": apart}


# ------------------------------------------------------------------------------------------------ embedded, larger


def ablations(args, out: Path, rows: list[str], seeds: int, **settings) -> dict:
    """What bench/ablations.py finds with these settings; what is in `out` already is not made again."""
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / f"{out.name}.json"
    file.write_text(json.dumps({"generate": {} if args.rehearse else {"batch-size": 512}} | settings))
    subprocess.run(
        [sys.executable, ROOT / "bench/ablations.py", "--rows", *rows, "--seeds", *map(str, range(1, seeds + 1)),
         "--num-cots", "1" if args.rehearse else "5", "--jobs", str(min(8, os.cpu_count())), "--settings", file, "--out", out],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return json.loads((out / "metrics.json").read_text("utf-8"))


def embedded(args, shapes: dict, where: dict) -> Iterator[dict]:
    """Pearson's r of the main rows here: would as many new seeds of the committed runs lie as near, 95 times in 100?"""
    rows, seeds = (["a1", "tract"], 1) if args.rehearse else (["main"], 2)
    committed = json.loads((ROOT / "results/ablations/metrics.json").read_text("utf-8"))
    names = ("row", "test", "reading")
    there = {tuple(cell[name] for name in names): cell["pearson"] for cell in committed["cells"]}
    for cell in ablations(args, args.work / "embedded", rows, seeds, train=committed["settings"]["train"])["cells"]:
        key = {name: cell[name] for name in names}
        if before := there.get(tuple(key.values())):
            n = len(before["per_seed"])
            spread = float(scipy.stats.t.ppf(0.975, n - 1)) * before["sd"] * math.sqrt(1 / n + 1 / seeds)
            here = cell["pearson"]["mean"]
            yield key | {
                "pearson": here, "committed": before["mean"], "spread": spread, "within": abs(here - before["mean"]) <= spread,
            }  # fmt: skip


def larger(args, shapes: dict, where: dict) -> Iterator[dict]:
    """Pearson's r of the main rows, and their differences to each other, with a larger seed model and more records."""
    seed, size, rows, seeds = ["--hidden", "512", "--layers", "4", "--lr", "0.001", "--steps", "2000"], 15_000, ["main"], 3
    if args.rehearse:
        seed, size, rows, seeds = ["--hidden", "64", "--layers", "2", "--steps", "20"], 60, ["a1", "tract"], 1
    model = args.work / "larger-seed"
    if not model.is_dir():
        subprocess.run(
            [sys.executable, ROOT / "data/tiny/make_seed.py", *seed, "--out", model], check=True, capture_output=True
        )
    train = {"lr": 3e-4, "epochs": 2, "batch-size": 32, "accumulation": 1, "warmup": 0.05, "weight-decay": 0.01}
    train |= {"no-gradient-checkpointing": ""}
    report = ablations(args, args.work / "larger", rows, seeds, train=train, seed_model=str(model), size=size)
    yield {"settings": report["settings"], "seeds": seeds}
    for cell in report["cells"]:
        yield {name: cell[name] for name in ("row", "test", "reading", "pearson", "rmse")}
    yield {"claims": report["claims"]}


PARTS = {"train": train, "judge": judging, "precision": precision, "resume": resume}
PARTS |= {"embedded": embedded, "larger": larger}


def plan(args, shapes: dict) -> None:
    """What stage 1 would say of every case of the part train, in bf16."""
    print(f"{'shape':14}{'trained':8}{'style':10}{'blocks':12}{'sequences':>9}{'longest':>9}  expected memory, an estimate")
    for case in training_cases(args, shapes):
        trained, blocks = "LoRA" if case.lora else "all", "recomputed" if case.recomputed else "kept"
        print(
            f"{case.shape:14}{trained:8}{case.style:10}{blocks:12}{case.sequences:9}"
            f"{case.facts()['longest']:9}  {case.expected}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to run")
    parser.add_argument("--plan", action="store_true", help="print the cases of train and the memory they are expected to take")
    parser.add_argument("--rehearse", action="store_true", help="small shapes and short texts: does all of it run?")
    parser.add_argument("--steps", type=runs.COUNT, default=6, help="training steps a case, of which the first warms up")
    parser.add_argument("--minutes", type=runs.WEIGHT, default=8.0, help="after which a part begins no new case")
    parser.add_argument("--work", type=Path, default=Path("out/gpu"), help="folder for what the parts make on their way")
    parser.add_argument("--out", type=Path, help="JSONL file to add a line a part to; None: only print")
    args = parser.parse_args()
    os.chdir(ROOT)
    args.scale, shapes = 1.0, workload.REAL
    if args.plan:
        return plan(args, shapes)
    if args.rehearse:
        args.scale, args.steps = 0.05, 2
        shapes = {"mistral-7b": workload.shape(2000, layers=2, hidden=128), "llama-3.1-8b": workload.shape(8000, layers=2)}
    where = machine.machine()
    for name in args.parts:
        started, cases, cut_off = time.time(), [], False
        for case in PARTS[name](args, shapes, where):
            cases.append(case)
            print(json.dumps(case), flush=True)
            cut_off = time.time() - started > 60 * args.minutes
            if cut_off:
                break
        result = {"bench": "gpu", "part": name, "rehearsal": args.rehearse, "machine": where, "cut_off": cut_off}
        machine.report(result | {"seconds": round(time.time() - started), "cases": cases}, args.out)


if __name__ == "__main__":
    runs.run(main)
