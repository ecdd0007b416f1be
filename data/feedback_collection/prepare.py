"""Turn Feedback Collection (100K GPT-4 feedbacks with scores, CC-BY-4.0) into training records.

    python data/feedback_collection/prepare.py                        # from the hub, about 1 GB
    python data/feedback_collection/prepare.py --file new_feedback_collection.json

Reads the hub data set through `datasets`, or a local JSON array or JSONL file with the same fields.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import records
from records import InputError

HUB_ID = "prometheus-eval/Feedback-Collection"
RESULT = re.compile(r"\[RESULT\]\s*(\d+)")


def convert(row: dict, number: int, where: str) -> dict:
    """One row as a record; raises InputError, naming the row, where its prompt, feedback or score can't be found."""
    prompt, output = row.get("instruction"), row.get("output") or row.get("orig_feedback")
    if not isinstance(prompt, str) or not isinstance(output, str):
        raise InputError(f"{where}: needs the texts 'instruction' and 'output', the fields of {HUB_ID}")
    found = RESULT.search(output)
    score = row.get("orig_score") or (found and found[1])
    if not str(score).isdigit():
        raise InputError(f"{where}: no score, neither in 'orig_score' nor as '[RESULT] 4' at the end of 'output'")
    cot = records.clean_cot(output)
    if not cot:
        raise InputError(f"{where}: its feedback is empty")
    return {"id": f"fc-{number:06}", "prompt": records.clean_prompt(prompt), "cot": cot, "score": int(score)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=records.Help)
    parser.add_argument("--file", help="local JSON array or JSONL file; None: the hub data set")
    parser.add_argument("--out", default=str(Path(__file__).parent / "train.jsonl"), help="JSONL file of training records")
    args = parser.parse_args()
    if args.file:
        rows = records.read_items(args.file)
    else:
        import datasets

        try:
            rows = datasets.load_dataset(HUB_ID, split="train")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{HUB_ID}: can't be had from the hub ({type(error).__name__}); download its file and give --file"
            ) from None
    converted = [convert(row, n, f"{args.file or HUB_ID}: row {n}") for n, row in enumerate(rows)]
    unmarked = sum("So the overall" not in row["output"] for row in rows if row.get("output"))
    records.write_whole(args.out, "".join(map(records.to_line, converted)))
    print(f"{args.out}: {len(converted)} records, {unmarked} of them from feedback without 'So the overall'")


if __name__ == "__main__":
    records.run(main)
