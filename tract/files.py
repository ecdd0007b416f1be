"""JSONL in, JSONL out, going on where it was cut off."""

import json
import shutil
import time
from array import array
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from tract import hub, runs
from tract.records import InputError, read_records, updated
from tract.runs import Fault
from tract.text import encode_prompt, thinking_setting
from tract.writing import GREEDY, Loaded

CHUNK = 8  # batches' worth of prompts that are judged together, and then written to OUT.part


def has_to_sample(args) -> bool:
    return not args.no_cot and not args.given


def longest_prompt(judge: Loaded, args) -> int:
    """Return how many tokens can be read: --max-length, or less where the model has fewer positions."""
    reserve = len(judge.suffix_ids) + 3 if has_to_sample(args) else 0  # a token, suffix, score and its end
    return min(args.max_length, judge.tokenizer.positions - reserve)


def check_writing_options(args) -> None:
    """Refuse options that do not go together with each other or with the model. Raises InputError."""
    if args.engine_args and args.engine != "vllm":
        raise InputError("--engine-args: are for --engine vllm")
    if has_to_sample(args) and args.num_cots > 1 and args.temperature < GREEDY:
        raise InputError("--temperature 0: all CoTs of a prompt would be the same; leave out --num-cots")
    trained = hub.training_arguments(args.model)
    if trained and trained.get("no_cot") and not args.no_cot:
        raise InputError(f"{args.model}: was trained without CoTs, knows none; use predict.py --no-cot")
    if trained and args.no_cot and not trained.get("no_cot"):
        raise InputError(f"{args.model}: was trained with CoTs, needs one; leave out --no-cot")


def read_data(args, needs: tuple[str, ...]) -> list[dict]:
    """Read the records of --data, or a share of them; check all that needs no weights. Raises InputError."""
    check_writing_options(args)
    records = read_records(args.data, args.grid, needs)
    suffix = args.grid.suffix.strip()
    asks_for_result = "[RESULT]" in records[0]["prompt"] and "[RESULT]" not in suffix
    if asks_for_result and has_to_sample(args) and not hub.training_arguments(args.model):
        print(f"{args.data}: prompts ask for [RESULT], CoTs are to end in '{suffix}': --suffix '[RESULT]'?")
    if args.shard is None:
        return records
    number, shares = args.shard
    start = len(records) * (number - 1) // shares
    share = records[start : len(records) * number // shares]  # consecutive, so that cat restores the order
    if not share:
        raise InputError(f"--shard {number}/{shares}: there are fewer records than shares; make fewer")
    return share


def encode_prompts(tokenizer, records: list[dict]) -> dict[str, array]:
    """Return the token ids of each record's prompt, by its id, as int32: lists take eight times as much."""
    prompts = {}
    for record in tqdm(records, desc="tokenise", unit="record", delay=5, leave=False):
        prompts[record["id"]] = array("i", encode_prompt(tokenizer, record["prompt"]))
    return prompts


class Output:
    """The file --out in the making: hands records out in chunks, and takes their new fields.

    What is finished lies in OUT.part; the same command goes on from there to the same bytes.
    """

    def __init__(self, args):
        """Refuse an --out that is there already. Raises InputError."""
        runs.check_out(args.out)
        self.run_json = Path(f"{str(args.out).removesuffix('.jsonl')}.run.json")
        if self.run_json.exists() and not Path(f"{args.out}.part").exists():
            raise InputError(f"{self.run_json}: is there already, and of another file; choose another --out")
        self.started = time.time()
        self.args = args
        self.at_once = args.batch_size  # sequences

    def begin(self, judge: Loaded, records: list[dict], lengths: dict[str, int]) -> None:
        """Leave out what is longer (in tokens) than fits; find what is finished. Raises InputError."""
        self.longest = longest_prompt(judge, self.args)
        self.too_long = [id for id, length in lengths.items() if length > self.longest]
        self.records = [record for record in records if lengths[record["id"]] <= self.longest]
        if not self.records:
            what = f"all {len(records)} records are longer than {self.longest} tokens"
            raise InputError(f"{self.args.data}: {what}, the shortest has {min(lengths.values())}")
        self.longest_first = sorted(self.records, key=lambda record: -lengths[record["id"]])
        self.enable_thinking = thinking_setting(judge.tokenizer)
        self.part, self.settings, self.lock = runs.begin(self.args)
        self.lines = {}  # id → line of a finished record, bytes: an emoji makes a str four times as long
        self.file = self.part / "records.jsonl"
        if self.file.is_file():
            with open(self.file, "rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):  # else it was cut off
                        self.lines[json.loads(line)["id"]] = line
            runs.write_whole(self.file, lambda file: file.writelines(self.lines.values()))
            print(f"{self.part}: going on after {len(self.lines)} finished records")

    def write(self, judge_chunk: Callable[[list[dict], int], list[dict]]) -> None:
        """Let judge_chunk(records, sequences at a time) make the new fields of each record, and keep them.

        The longest come first: if memory runs out, it does so at once; then half as many sequences are taken.
        A chunk that an interruption cut off comes whole again, for in other batches sums round differently.
        """
        left = self.longest_first
        with runs.progress(len(left), len(self.lines), self.args.out.stem, "record") as bar:
            while left:
                chunk = left[: max(1, CHUNK * self.at_once // self.args.num_cots)]
                new = [record["id"] for record in chunk if record["id"] not in self.lines]
                if new:
                    try:
                        new_fields = judge_chunk(chunk, self.at_once)
                    except torch.OutOfMemoryError:
                        new_fields = None
                    if new_fields is None:
                        self.halve()
                        continue  # with a smaller chunk
                    for record, fields in zip(chunk, new_fields, strict=True):
                        if record["id"] not in self.lines:
                            self.lines[record["id"]] = runs.to_line(updated(record, fields)).encode()
                    with open(self.file, "ab") as file:
                        file.writelines(self.lines[id] for id in new)
                    bar.update(len(new))
                left = left[len(chunk) :]

    def halve(self) -> None:
        """Go on with half as many sequences at a time. Raises Fault where that is less than one."""
        if self.at_once == 1:
            raise Fault(f"{self.part}: out of memory; lower --max-length or --num-cots")
        torch.cuda.empty_cache()  # only now: the error, until it was handled, held tensors
        self.at_once //= 2
        tqdm.write(f"out of memory: going on with {self.at_once} sequences at a time")

    def finish(self) -> list[bytes]:
        """Write run.json, then --out in the order of the data, and print what came out; returns the lines."""
        args = self.args
        lines = [self.lines[record["id"]] for record in self.records]
        rows = map(json.loads, lines)  # one at a time
        unfinished = [row["id"] for row in rows if not all(row["finished"])]
        facts = {"records": len(lines), "too_long": len(self.too_long), "unfinished": len(unfinished)}
        facts |= {"sequences_at_once": self.at_once, "enable_thinking": self.enable_thinking}
        runs.write_run(self.run_json, args, self.settings, self.started, **facts)
        runs.write_whole(args.out, lambda file: file.writelines(lines))  # last: where it is, everything is
        shutil.rmtree(self.part)
        self.lock.close()
        runs.report(self.too_long, f"left out, longer than {self.longest} tokens")
        runs.report(unfinished, "with a CoT that did not reach the suffix by itself")
        if has_to_sample(args) and 2 * len(unfinished) > len(lines):
            never = f"most CoTs never came to '{args.grid.suffix.strip()}'"
            print(f"{never}: does the prompt ask for these words? --suffix names others")
        print(f"{args.out}: {len(lines)} records in {time.time() - self.started:.0f} s")
        return lines
