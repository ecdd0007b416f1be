"""Measure what many records take beside the model: gen_cot.py with a stub for a judge, and eval.py.

    python bench/records.py --model CHECKPOINT --data records.jsonl --records 10000

Repeats the records of --data to so many. Prints, of each script in a process of its own, CPU seconds and by
how much the peak memory rises from what its imports take.
"""

import argparse
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval
import gen_cot
from tract import models, runs
from tract.encode import score_tokens
from tract.records import Grid, read_records
from tract.writing import Cot, Loaded

PROBS = {"score_probs": [[0.1, 0.2, 0.3, 0.2, 0.1]], "off_grid": [0.1], "grid": "1,2,3,4,5"}


def peak() -> float:
    """Return the peak memory of this process so far, in GiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load_stub(name: str, grid, *_) -> Loaded:
    tokenizer = models.load_tokenizer(name)
    suffix_ids, _ = score_tokens(tokenizer, grid)
    return Loaded(None, tokenizer, grid, suffix_ids, [], {}, is_vllm=False)


def write_stubs(judge: Loaded, records: list[dict], *_) -> list[list[Cot]]:
    return [[Cot("It is a good answer. " * 25, True, [])] for _ in records]


def measure(script, arguments: list) -> None:
    """Run a script's main in this process, with stubs in gen_cot.py, and print what it took."""
    before = peak()
    started = time.process_time()
    with (
        patch.object(gen_cot, "load_judge", load_stub),
        patch.object(gen_cot, "write_cots", write_stubs),
        patch.object(sys, "argv", ["", *map(str, arguments)]),
    ):
        script()
    print(f"{script.__module__}: {time.process_time() - started:.0f} s, {peak() - before:.2f} GiB\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("--model", required=True, help="folder with the tokenizer; its weights are not read")
    parser.add_argument("--data", type=Path, required=True, help="JSONL file with id, prompt and score")
    parser.add_argument("--records", type=runs.COUNT, default=10_000, help="how many, by repeating these")
    parser.add_argument("--resamples", type=runs.COUNT, default=1000, help="bootstrap resamples of eval.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = read_records(args.data, Grid(), ("id", "prompt", "score"))
        with open(folder / "data.jsonl", "wb") as data, open(folder / "judged.jsonl", "wb") as judged:
            for number in range(args.records):
                row = rows[number % len(rows)] | {"id": f"r{number}"}
                data.write(runs.to_line(row).encode())
                fields = {"prediction": 2.7 + number % 100 / 100, "decoded": 3, "cots": [""]}
                judgement = PROBS | fields | {"finished": [True], "renormalised": False}
                judged.write(runs.to_line(row | judgement).encode())
        cots = ["--model", args.model, "--data", folder / "data.jsonl", "--out", folder / "cots.jsonl"]
        judged = [folder / "judged.jsonl", "--resamples", args.resamples, "--out", folder / "eval"]
        for script, arguments in ((gen_cot.main, cots), (eval.main, judged)):
            process = get_context("spawn").Process(target=measure, args=(script, arguments))
            process.start()
            process.join()
            if process.exitcode:
                raise runs.Fault(f"{script.__module__}: did not end well, nothing is measured")


if __name__ == "__main__":
    runs.run(main)
