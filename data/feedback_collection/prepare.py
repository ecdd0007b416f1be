"""Turn Feedback Collection (100,000 GPT-4 feedbacks with scores, CC-BY-4.0) into training records.

    python data/feedback_collection/prepare.py                        # from the hub, about 1 GB
    python data/feedback_collection/prepare.py new_feedback_collection.json

Reads the hub data set through `datasets`, or its file, a JSON array or JSONL with the same fields. Writes
train.jsonl and valid.jsonl to --out. Which side a record is on depends on its instruction and --seed alone:
all responses to an instruction are on one side. A row that lacks prompt, feedback or score, or whose scores
disagree, is left out, and counted with the reason.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import (
    check_new,
    clean_prompt,
    is_held_out,
    is_text,
    read_feedback,
    read_hub,
    read_items,
    sort_out,
    write_records,
)
from tract import runs

HUB_ID = "prometheus-eval/Feedback-Collection"
FILE = "new_feedback_collection.json"  # what the data set is called there
SCORES = {"1": 1, "2": 2, "3": 3, "4": 4, "5": 5}
NO_SCORE = "no score from 1 to 5, neither in 'orig_score' nor as '[RESULT] 4'"


def convert(row: Any, number: int) -> tuple[dict, str] | str:
    """Turn a row into a record and its instruction, or say in a few words why it can't be one."""
    if not isinstance(row, dict):
        return "not an object"
    prompt = row.get("instruction")
    output = row.get("output") or row.get("orig_feedback")
    if not is_text(prompt):
        return "no text in 'instruction'"
    if not is_text(output):
        return "no feedback in 'output'"
    score = row.get("orig_score")
    label = "" if score is None else str(score).strip().removesuffix(".0")  # 4, 4.0, "4" and "4.0" are there
    if label not in ("", *SCORES):
        return NO_SCORE
    judgement = read_feedback(output, SCORES.get(label))
    if isinstance(judgement, str):
        return judgement
    if judgement["score"] not in SCORES.values():
        return NO_SCORE
    record = {"id": f"fc-{number:06}", "prompt": clean_prompt(prompt), "cot": judgement["cot"]}
    record["score"] = int(judgement["score"])
    return record, instruction_of(row)


def instruction_of(row: dict) -> str:
    """Return what a row's responses answer; the whole prompt where it is not in the usual form."""
    instruction = row.get("orig_instruction")
    if not is_text(instruction):
        _, _, rest = row["instruction"].partition("###The instruction to evaluate:")
        instruction, _, _ = rest.partition("###Response to evaluate:")
    if not instruction.strip():
        instruction = clean_prompt(row["instruction"])
    return " ".join(instruction.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("file", nargs="?", help="JSON array or JSONL file; none: the hub data set")
    add("--out", type=Path, default=Path(__file__).parent, help="folder of train.jsonl and valid.jsonl")
    add("--valid-fraction", type=runs.SHARE, default=0.05, help="share of the instructions that is held out")
    add("--seed", type=runs.SEED, default=0, help="random seed of what is held out")
    args = parser.parse_args()
    # train.jsonl comes last: stage1_train.py takes it for a sign that both are there
    valid_path = args.out / "valid.jsonl"
    train_path = args.out / "train.jsonl"
    check_new(valid_path, train_path)
    if args.file:
        rows = read_items(args.file)
    else:
        rows = read_hub(HUB_ID, "train", FILE, "feedback_collection/prepare.py")
    made = []
    unmarked = 0
    for number, row in enumerate(rows):
        made.append(convert(row, number))
        if isinstance(made[-1], tuple) and "So the overall" not in str(row.get("output")):
            unmarked += 1
    kept, left_out = sort_out(made, args.file or HUB_ID)
    print(f"{len(rows)} rows read, {len(kept)} kept, {unmarked} of them without 'So the overall' in 'output'")
    print(left_out, end="")

    sides = {valid_path: [], train_path: []}
    instructions = {valid_path: set(), train_path: set()}
    for record, instruction in kept:
        held_out = is_held_out(instruction, args.valid_fraction, args.seed)
        path = valid_path if held_out else train_path
        sides[path].append(record)
        instructions[path].add(instruction)
    write_records(sides)
    for path, side in sides.items():
        print(f"{path}: {len(side)} records with {len(instructions[path])} different instructions")
        if not side:
            print(f"{path}: is empty; choose another --valid-fraction, or another --seed")


if __name__ == "__main__":
    runs.run(main)
