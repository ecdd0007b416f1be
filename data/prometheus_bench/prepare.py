"""Turn a bench file of prometheus-eval (MT Bench, Vicuna Bench, FLASK, Feedback Bench) into records.

    python data/prometheus_bench/prepare.py mt_bench_eval.json --out test.jsonl [--train train.jsonl]

The target score is the mean of the GPT-4 labels (`gpt4_score`, one or a list), or of the human ones where a file has them. An
item that lacks prompt or labels is left out, and counted with the reason. --train also writes the GPT-4 feedbacks as
training records, one a feedback, each with the score that belongs to it. The files: github.com/prometheus-eval/prometheus-eval.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import records
import runs


def as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def is_score(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def convert(item, id: str, label: str) -> dict | str:
    """One item as a test record, or in a few words why it can't be one; `label` is the field of its true scores."""
    if not isinstance(item, dict) or not isinstance(item.get("instruction"), str) or not item["instruction"].strip():
        return "no text in 'instruction'"
    scores = as_list(item.get(label))
    if not scores or not all(map(is_score, scores)):
        return f"'{label}' is neither a number nor a list of numbers"
    return {"id": id, "prompt": records.clean_prompt(item["instruction"]), "score": sum(scores) / len(scores)}


def feedbacks(item: dict, record: dict) -> list[dict | str]:
    """A training record for each GPT-4 feedback of an item, or why it can't be one."""
    texts, scores = as_list(item.get("gpt4_feedback")), as_list(item.get("gpt4_score"))
    found = []
    for k, text in enumerate(texts):
        cot = records.clean_cot(str(text or ""))
        right = k < len(scores) and is_score(scores[k])
        made = record | {"id": f"{record['id']}-{k + 1}", "cot": cot, "score": scores[k]} if right else "no label of its own"
        found.append(made if cot else "no text in 'gpt4_feedback'")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    parser.add_argument("file", help="JSON array of bench items")
    parser.add_argument("--out", required=True, help="JSONL file of test records")
    parser.add_argument(
        "--label", choices=("gpt4_score", "human_score"), default="gpt4_score", help="the true score; of several, the mean"
    )
    parser.add_argument("--train", help="JSONL file of training records, one a GPT-4 feedback")
    args = parser.parse_args()
    items, name = records.read_items(args.file), Path(args.file).stem
    made = [convert(item, f"{name}-{number:04}", args.label) for number, item in enumerate(items)]
    test, left_out = records.sort_out(made, args.file)
    runs.write_whole(args.out, "".join(map(runs.to_line, test)))
    print(f"{len(items)} items read, {len(test)} kept\n{left_out}{args.out}: {len(test)} records")
    if args.train:
        pairs = zip(items, made, strict=True)
        found = [f for item, record in pairs if isinstance(record, dict) for f in feedbacks(item, record)]
        train, left_out = records.sort_out(found, args.file)
        runs.write_whole(args.train, "".join(map(runs.to_line, train)))
        print(f"{len(found)} feedbacks read, {len(train)} kept\n{left_out}{args.train}: {len(train)} records")


if __name__ == "__main__":
    runs.run(main)
