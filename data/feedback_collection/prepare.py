"""Turn Feedback Collection (100,000 GPT-4 feedbacks with scores, CC-BY-4.0) into training records.

    python data/feedback_collection/prepare.py                        # from the hub, about 1 GB
    python data/feedback_collection/prepare.py --file new_feedback_collection.json

Reads the hub data set through `datasets`, or its file, a JSON array or JSONL with the same fields. Writes
train.jsonl and valid.jsonl to --out. Which side a record is on depends on its prompt and --seed alone, so no
prompt is on both. A row that lacks prompt, feedback or score is left out, and counted with the reason.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import runs
from data.prepare_helpers import clean_cot, clean_prompt, is_text, read_hub, read_items, sort_out

HUB_ID = "prometheus-eval/Feedback-Collection"
FILE = "new_feedback_collection.json"  # what the data set is called there
RESULT = re.compile(r"\[RESULT\]\s*(\d+)")


def convert(row: Any, number: int) -> dict | str:
    """Turn a row into a record, or say in a few words why it can't be one."""
    if not isinstance(row, dict):
        return "not an object"
    prompt, output = row.get("instruction"), row.get("output") or row.get("orig_feedback")
    if not is_text(prompt):
        return "no text in 'instruction'"
    if not is_text(output) or not clean_cot(output):
        return "no feedback in 'output'"
    found = RESULT.search(output)
    try:
        score = float(
            str(row.get("orig_score") or (found and found[1]))
        )  # 4, 4.0, "4" and "4.0" are all there
    except ValueError:
        score = None
    if score not in (1, 2, 3, 4, 5):
        return "no score from 1 to 5, neither in 'orig_score' nor as '[RESULT] 4'"
    record = {"id": f"fc-{number:06}", "prompt": clean_prompt(prompt), "cot": clean_cot(output)}
    return record | {"score": int(score)}


def is_held_out(prompt: str, fraction: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed}/{prompt.strip()}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("--file", help="local JSON array or JSONL file; None: the hub data set")
    add("--out", type=Path, default=Path(__file__).parent, help="folder of train.jsonl and valid.jsonl")
    add("--valid-fraction", type=runs.SHARE, default=0.05, help="share of the prompts that is held out")
    add("--seed", type=runs.SEED, default=0, help="random seed of what is held out")
    args = parser.parse_args()
    rows = (
        read_items(args.file)
        if args.file
        else read_hub(HUB_ID, "train", FILE, "feedback_collection/prepare.py --file")
    )
    made, unmarked = [], 0
    for number, row in enumerate(rows):
        made.append(convert(row, number))
        unmarked += isinstance(made[-1], dict) and "So the overall" not in str(row.get("output"))
    kept, left_out = sort_out(made, args.file or HUB_ID)
    print(f"{len(rows)} rows read, {len(kept)} kept, {unmarked} of them without 'So the overall' in 'output'")
    print(left_out, end="")

    args.out.mkdir(parents=True, exist_ok=True)
    sides = {"train": [], "valid": []}
    for record in kept:
        held_out = is_held_out(record["prompt"], args.valid_fraction, args.seed)
        sides["valid" if held_out else "train"].append(record)
    for name, side in sides.items():
        path, prompts = args.out / f"{name}.jsonl", {record["prompt"].strip() for record in side}
        runs.write_whole(path, "".join(map(runs.to_line, side)))
        print(f"{path}: {len(side)} records with {len(prompts)} different prompts")
        if not side:
            print(f"{path}: is empty; choose another --valid-fraction, or another --seed")


if __name__ == "__main__":
    runs.run(main)
