"""Everything that only a large GPU can show, at the shapes of Mistral-7B and Llama-3.1-8B, with random weights.

    python bench/gpu.py --parts train --out results/gpu/gpu.jsonl      # each part stays under ten minutes on an H200
    python bench/gpu.py --rehearse                                     # all parts on small shapes, a few minutes on a CPU

    train       steps on sequences of real lengths: LoRA and full, recomputed or kept, 1 to 8 at a time; the authors' style
                of loss and Hugging Face's Trainer; peak memory against what stage 1 says it expects
    judge       prompts of real lengths, batches up to what memory takes: tokens a second against the limit of the memory's
                bandwidth; the authors' style; 5 CoTs a prompt
    precision   score distributions in bf16 against fp32 on the same weights; do weights move at a learning rate of 1e-5?
    resume      stage 1 cut off and gone on with, against a run that never stopped: the same losses?
    embedded    the main rows of the ablations on this device, next to the committed ones
    larger      the same rows with a seed model of 13 M parameters, pretrained here, and ten times the training records

Every part adds one JSON line to --out, and prints it last.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import judge  # noqa: E402
import machine  # noqa: E402
import memory  # noqa: E402
import train_step  # noqa: E402
import workload  # noqa: E402

import gen_cot  # noqa: E402
import models  # noqa: E402
import records  # noqa: E402
import runs  # noqa: E402
import stage1_train  # noqa: E402
from loss import rail  # noqa: E402
from models import Lora, device, has_bf16  # noqa: E402
from records import Example, Grid  # noqa: E402

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


def train(args, shapes: dict, where: dict) -> dict:
    cases, loss = [], workload.loss_of()
    for name, lora in (("mistral-7b", Lora()), ("mistral-7b", None), ("llama-3.1-8b", Lora())):
        config = shapes[name]
        model = workload.random_model(config, PRECISION if lora else torch.float32)
        model = (models.with_adapters(model, lora) if lora else model).train()
        own, work = sum(p.numel() * p.element_size() for p in model.parameters()), machine.Work.of(model)
        for style, kept, sequences in (
            *(("ours", kept, n) for kept in (False, True) for n in (1, 2, 4, 8)),
            *((style, False, n) for style in ("authors", "trainer", "compiled") for n in (1, 4)),
        ):
            examples = real_examples(args.steps * sequences, config.vocab_size, args.scale)
            plan = stage1_train.windows([len(e.ids) for e in examples], sequences, seed=0)
            largest = max(plan, key=lambda window: max(len(examples[i].ids) for i in window))
            length = max(len(examples[i].ids) for i in largest)
            expected = memory.expect(
                config, lora, sequences=sequences, length=length, supervised=sum(examples[i].supervised for i in largest),
                bf16=has_bf16(), gradient_checkpointing=not kept,
            )  # fmt: skip
            case = {"shape": name, "lora": bool(lora), "style": style, "recomputed": not kept, "sequences": sequences}
            case |= {"expected_bytes": expected.total, "longest": length}
            cases.append(case)
            if expected.total > 0.97 * models.memory_there():
                case["left_out"] = "not expected to fit"
                continue
            if kept:
                getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
            else:
                models.checkpoint_activations(model)
            if style == "compiled":
                models.compile_blocks(model)
            options = argparse.Namespace(sequences=sequences)
            if style == "trainer":
                run = partial(train_step.with_trainer, model, examples, plan, loss=loss, options=options)
            else:
                way = train_step.authors if style == "authors" else train_step.ours
                run = partial(train_step.loop, model, examples, plan, backward=way, loss=loss, options=options)
            found = []
            try:
                peak = own + machine.peak_of(lambda run=run, found=found: found.append(run()))
            except (runs.Fault, torch.OutOfMemoryError):
                case["left_out"] = "out of memory"
                model.zero_grad(set_to_none=True)
                clear()
                continue
            ((losses, times),) = found
            # Each step has its own lengths: work and time are summed over all but the first, which warms up
            steps = [[examples[i] for i in window] for window in plan[1:]]
            flops = [0.0, 0.0]
            for step in steps:
                done = work.training(
                    [len(e.ids) for e in step], sum(e.supervised for e in step), lora=bool(lora), recomputed=not kept
                )
                flops = [a + b for a, b in zip(flops, done, strict=True)]
            second, tokens = sum(times[1:]), sum(len(e.ids) for step in steps for e in step)
            case |= {
                "tokens_per_second": round(tokens / second), "mfu": round(flops[0] / second / where["peak_flops"], 4),
                "hardware": round(flops[1] / second / where["peak_flops"], 4), "peak_bytes": peak,
                "expected_to_peak": round(expected.total / peak, 3), "last_loss": round(losses[-1], 5),
            }  # fmt: skip
            print(json.dumps(case), flush=True)
            clear()
        del model
        clear()
    return {"cases": cases}


# ------------------------------------------------------------------------------------------------------------ judge


def judging(args, shapes: dict, where: dict) -> dict:
    cases, grid = [], Grid()
    tokenizer = models.load_tokenizer(records.TINY_SEED)
    tokens = records.score_tokens(tokenizer, grid)
    for name, config in shapes.items():
        model = workload.random_model(config, PRECISION, sharp=6)  # of 4,096 numbers at .02: as sure as a trained model
        work = machine.Work.of(model)
        most = models.rows_that_fit(model, round(args.scale * 2000))
        for ways, num_cots, at_once in (
            *((["ours"], 1, n) for n in (16, 64, 256, 512) if n < most), (["ours"], 1, most),
            (["ours", "authors"], 1, 16), (["ours"], 5, most),
        ):  # fmt: skip
            n = 24 if "authors" in ways else max(args.steps, 2 * at_once // num_cots)
            rows = list(workload.long_records(n, prompt=1310 * args.scale, cot=118 * args.scale))
            prompts = sorted((records.prompt_ids(tokenizer, row["prompt"]) for row in rows), key=len, reverse=True)
            cots = [rows[(i + k) % n]["cot"] for i in range(n) for k in range(num_cots)]
            texts = [records.target_ids(tokenizer, cot, "1", grid.suffix)[:-1] for cot in cots]
            sampling = gen_cot.Sampling(num_cots=num_cots, max_new_tokens=max(map(len, texts)) + 2)
            same = dict(sampling=sampling, grid=grid, tokens=tokens, batch_size=at_once)
            case = {"shape": name, "num_cots": num_cots, "at_once": at_once, "prompts": n}
            generated = sum(map(len, texts))
            for way in ways:
                ours = partial(judge.ours, model, tokenizer, prompts, texts, **same, replace={}, together=n)
                run = ours if way == "ours" else partial(judge.authors, model, tokenizer, prompts, texts, **same)
                with judge.stopwatch() as spent:
                    second = machine.seconds(run)
                case |= {f"{way}_seconds": round(second, 2), f"{way}_generated_per_second": round(generated / second)}
                if way == "ours":
                    # The limit of decoding alone: every step moves the weights once and the rows' keys and values
                    mean = statistics.mean(len(prompts[b // num_cots]) + len(text) / 2 for b, text in enumerate(texts))
                    flops, moved = work.decode([mean] * at_once, 2 if has_bf16() else 4)
                    step = max(flops / where["peak_flops"], moved / where["bandwidth"])
                    decoding = spent["CoTs"] + spent["sampling"]
                    case["where"] = {part: round(own, 2) for part, own in spent.items()}
                    case["decoded_per_second"] = round(generated / decoding)
                    case["share_of_decode_limit"] = round(generated * step / at_once / decoding, 4)
            cases.append(case)
            print(json.dumps(case), flush=True)
            clear()
        del model
        clear()
    return {"cases": cases}


# -------------------------------------------------------------------------------------- precision, resume, embedded


def precision(args, shapes: dict, where: dict) -> dict:
    """The same random weights, in bf16 and in fp32 with the same rounded weights; then ten steps at 1e-5."""
    found = {}
    loss = workload.loss_of()
    scores_of = {name: loss.keywords[name] for name in ("score_ids", "score_values")}
    for name, config in shapes.items():
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
        apart = (low - high).abs()
        found[name] = {
            "total_variation": round(float(apart.sum(-1).mean() / 2), 5),
            "expected_score": round(float(((low - high) @ scores_of["score_values"]).abs().mean()), 5),
        }
        del model
        clear()
    config = shapes["mistral-7b"]
    model = workload.random_model(config, torch.float32).train()
    models.checkpoint_activations(model)
    before = {name: p.detach()[:64].clone() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    examples, options = real_examples(10, config.vocab_size, args.scale), argparse.Namespace(sequences=1)
    train_step.LR = 1e-5
    train_step.loop(model, examples, [[i] for i in range(10)], backward=train_step.ours, loss=loss, options=options)
    after = dict(model.named_parameters())
    moved = [(after[name][:64] != old).float().mean() for name, old in before.items()]
    in_bf16 = [(after[name][:64].bfloat16() != old.bfloat16()).float().mean() for name, old in before.items()]
    found["moved_at_1e-5"] = {"fp32": round(float(torch.stack(moved).mean()), 5)}
    found["moved_at_1e-5"]["seen_in_bf16"] = round(float(torch.stack(in_bf16).mean()), 5)
    return found


def resume(args, shapes: dict, where: dict) -> dict:
    """Stage 1 on the embedded task, once whole and once stopped by a signal after its first saved state."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "stage1_train.py", "--epochs", "1", "--save-every", "10", "--eval-size", "0"]
        subprocess.run([*command, "--out", f"{folder}/whole"], check=True, capture_output=True)
        cut = subprocess.Popen([*command, "--out", f"{folder}/cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while cut.poll() is None and not Path(f"{folder}/cut.part/state.pt").is_file():
            time.sleep(0.02)
        cut.send_signal(signal.SIGTERM)
        cut.wait()
        stopped = len(Path(f"{folder}/cut.part/log.jsonl").read_text("utf-8").splitlines())
        subprocess.run([*command, "--out", f"{folder}/cut"], check=True, capture_output=True)
        logs = [Path(f"{folder}/{name}/log.jsonl").read_text("utf-8").splitlines() for name in ("whole", "cut")]
        whole, cut = ([json.loads(line)["loss"] for line in log] for log in logs)
    apart = max(abs(a - b) for a, b in zip(whole, cut, strict=True))
    return {"stopped_after": stopped, "steps": len(whole), "losses_differ_by_at_most": apart}


def embedded(args, shapes: dict, where: dict) -> dict:
    """Pearson's r of the main rows here, and the mean and standard deviation over the committed seeds."""
    rows = ["a1", "tract"] if args.rehearse else ["main"]
    out = args.work / "ablations"
    command = [sys.executable, ROOT / "bench/ablations.py", "--rows", *rows, "--seeds", "1", "--out", out, "--jobs", "2"]
    subprocess.run([*command, *(["--num-cots", "1"] if args.rehearse else [])], check=True, stdout=subprocess.DEVNULL)
    table = {}
    for path, column in ((out / "metrics.json", "here"), (ROOT / "results/ablations/metrics.json", "committed")):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            key = f"{cell['row']}, {cell['test']}, {cell['reading']}"
            table.setdefault(key, {})[column] = [cell["pearson"]["mean"], cell["pearson"]["sd"]]
    return {"pearson": {key: own for key, own in table.items() if "here" in own}}


def larger(args, shapes: dict, where: dict) -> dict:
    """Pearson's r of the main rows, and their differences to each other, with a larger seed model and more records."""
    seed, size, rows = ["--hidden", "512", "--layers", "4", "--lr", "0.001", "--steps", "2000"], 15_000, ["main"]
    if args.rehearse:
        seed, size, rows = ["--hidden", "64", "--layers", "2", "--steps", "20"], 60, ["a1", "tract"]
    args.work.mkdir(parents=True, exist_ok=True)
    model, out, settings = args.work / "larger-seed", args.work / "larger", args.work / "larger.json"
    if not model.is_dir():
        subprocess.run(
            [sys.executable, ROOT / "data/tiny/make_seed.py", *seed, "--out", model], check=True, capture_output=True
        )
    flags = {"lr": 3e-4, "epochs": 2, "batch-size": 32, "accumulation": 1, "warmup": 0.05, "weight-decay": 0.01}
    flags |= {"no-gradient-checkpointing": ""}
    settings.write_text(json.dumps({"train": flags, "seed_model": str(model), "size": size}))
    command = [sys.executable, ROOT / "bench/ablations.py", "--rows", *rows, "--settings", settings, "--out", out]
    seeds = ["1"] if args.rehearse else ["1", "2", "3"]
    subprocess.run([*command, "--seeds", *seeds, "--num-cots", "1", "--jobs", "4"], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "metrics.json").read_text("utf-8"))
    cells = {f"{c['row']}, {c['test']}, {c['reading']}": [c["pearson"]["mean"], c["pearson"]["sd"]] for c in report["cells"]}
    return {"settings": report["settings"], "pearson": cells, "claims": report["claims"]}


PARTS = {"train": train, "judge": judging, "precision": precision, "resume": resume}
PARTS |= {"embedded": embedded, "larger": larger}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which to run")
    parser.add_argument("--rehearse", action="store_true", help="small shapes and short texts: does all of it run?")
    parser.add_argument("--steps", type=runs.COUNT, default=6, help="training steps a case, of which the first warms up")
    parser.add_argument("--work", type=Path, default=Path("out/gpu"), help="folder for what the parts make on their way")
    parser.add_argument("--out", type=Path, help="JSONL file to add a line a part to; None: only print")
    args = parser.parse_args()
    os.chdir(ROOT)
    args.scale = 0.05 if args.rehearse else 1.0
    if args.rehearse:
        shapes = {"mistral-7b": workload.shape(2000, layers=2, hidden=128), "llama-3.1-8b": workload.shape(8000, layers=2)}
        args.steps = 2
    else:
        shapes = workload.REAL
    where = machine.machine()
    for name in args.parts:
        started = time.time()
        found = PARTS[name](args, shapes, where)
        result = {"bench": "gpu", "part": name, "rehearsal": args.rehearse, "machine": where}
        machine.report(result | {"seconds": round(time.time() - started), **found}, args.out)


if __name__ == "__main__":
    runs.run(main)
