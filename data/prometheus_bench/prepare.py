"""Turn a bench file of prometheus-eval (MT Bench, Vicuna Bench, FLASK, Feedback Bench) into records.

    python data/prometheus_bench/prepare.py mt_bench_eval.json --out test.jsonl [--train train.jsonl]

The target score is the mean of the GPT-4 labels (`gpt4_score`, one or a list), or of the human ones where a
file has them. An item that lacks prompt or labels is left out, and counted with the reason. --train also
writes the GPT-4 feedbacks as training records, one a feedback, each with the score that belongs to it. The
files are at github.com/prometheus-eval/prometheus-eval.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import (
    check_new,
    clean_prompt,
    is_text,
    read_feedback,
    read_items,
    sort_out,
    write_records,
)
from tract import runs
from tract.checks import is_number


def as_list(value: Any) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def is_score(value: Any) -> bool:
    return is_number(value) and 1 <= value <= 5


def convert(item: Any, id: str, label: str) -> dict | str:
    """Turn an item into a test record, or say why it can't be one; `label` is the field of true scores."""
    if not isinstance(item, dict):
        return "not an object"
    if not is_text(item.get("instruction")):
        return "no text in 'instruction'"
    scores = as_list(item.get(label))
    if not scores or not all(map(is_score, scores)):
        return f"'{label}' is neither a number from 1 to 5 nor a list of such numbers"
    return {"id": id, "prompt": clean_prompt(item["instruction"]), "score": sum(scores) / len(scores)}


def feedbacks(item: dict, record: dict) -> list[dict | str]:
    """Turn each GPT-4 feedback of an item into a training record, or say why it can't be one."""
    scores = as_list(item.get("gpt4_score"))
    made = []
    for k, text in enumerate(as_list(item.get("gpt4_feedback"))):
        if not is_text(text):
            made.append("no text in 'gpt4_feedback'")
        elif k >= len(scores) or not is_score(scores[k]):
            made.append("no label of its own")
        else:
            judgement = read_feedback(text, scores[k])
            if isinstance(judgement, dict):
                judgement = record | judgement | {"id": f"{record['id']}-{k + 1}"}
            made.append(judgement)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("file", help="JSON array of bench items")
    add("--out", required=True, help="JSONL file of test records")
    labels = ("gpt4_score", "human_score")
    add("--label", choices=labels, default="gpt4_score", help="the true score; of several, the mean")
    add("--train", help="JSONL file of training records, one a GPT-4 feedback")
    args = parser.parse_args()
    check_new(args.train, args.out)
    items = read_items(args.file)
    name = Path(args.file).stem
    made = [convert(item, f"{name}-{number:04}", args.label) for number, item in enumerate(items)]
    test, left_out = sort_out(made, args.file)
    print(f"{len(items)} items read, {len(test)} kept\n{left_out}", end="")
    files = {args.out: test}
    if args.train:
        judgements = []
        for item, record in zip(items, made, strict=True):
            if isinstance(record, dict):
                judgements += feedbacks(item, record)
        train, left_out = sort_out(judgements, args.file)
        print(f"{len(judgements)} feedbacks read, {len(train)} kept\n{left_out}", end="")
        files = {args.train: train, args.out: test}
    write_records(files)
    for path, records in files.items():
        print(f"{path}: {len(records)} records")


if __name__ == "__main__":
    runs.run(main)
