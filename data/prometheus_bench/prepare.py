"""Turn a bench file of prometheus-eval (MT Bench, Vicuna Bench, FLASK, Feedback Bench) into records.

    python data/prometheus_bench/prepare.py mt_bench_eval.json --out test.jsonl [--train train.jsonl]

The target score is the mean of the GPT-4 labels (`gpt4_score`, one or a list). --train also writes the GPT-4 feedbacks as
training records, one a feedback, each with the score that belongs to it. The files: github.com/prometheus-eval/prometheus-eval.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import records
from records import InputError


def as_list(value) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def convert(items: list[dict], name: str, path: str) -> tuple[list[dict], list[dict]]:
    """Test records (one an item) and training records (one a feedback) of a bench file's items.

    Raises InputError, naming the item, where the prompt or the labels are not what a bench file has.
    """
    test, train = [], []
    for number, item in enumerate(items):
        where = f"{path}: item {number}"
        if not isinstance(item, dict) or not isinstance(item.get("instruction"), str):
            raise InputError(f"{where}: no 'instruction' text; is this a bench file of prometheus-eval?")
        scores, feedbacks = as_list(item.get("gpt4_score")), as_list(item.get("gpt4_feedback"))
        if not scores or any(isinstance(s, bool) or not isinstance(s, int | float) for s in scores):
            raise InputError(f"{where}: 'gpt4_score' is {item.get('gpt4_score')!r}, neither a number nor a list of them")
        record = {"id": f"{name}-{number:04}", "prompt": records.clean_prompt(item["instruction"])}
        test.append(record | {"score": sum(scores) / len(scores)})
        for k, (feedback, score) in enumerate(zip(feedbacks, scores, strict=False), 1):
            if cot := records.clean_cot(str(feedback)):
                train.append(record | {"id": f"{record['id']}-{k}", "cot": cot, "score": score})
    return test, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=records.Help)
    parser.add_argument("file", help="JSON array of bench items")
    parser.add_argument("--out", required=True, help="JSONL file of test records")
    parser.add_argument("--train", help="JSONL file of training records, one a GPT-4 feedback")
    args = parser.parse_args()
    items = records.read_items(args.file)
    test, train = convert(items, Path(args.file).stem, args.file)
    feedbacks = sum(len(as_list(item.get("gpt4_feedback"))) for item in items)
    records.write_whole(args.out, "".join(map(records.to_line, test)))
    print(f"{args.out}: {len(test)} records of {len(items)} items")
    if args.train:
        records.write_whole(args.train, "".join(map(records.to_line, train)))
        left_out = feedbacks - len(train)
        print(f"{args.train}: {len(train)} records of {feedbacks} feedbacks ({left_out} without text or label left out)")


if __name__ == "__main__":
    records.run(main)
