"""Turn Feedback Collection (100K GPT-4 feedbacks with scores, CC-BY-4.0) into training records.

    python data/feedback_collection/prepare.py                        # from the hub, about 1 GB
    python data/feedback_collection/prepare.py --file new_feedback_collection.json

Reads the hub data set through `datasets`, or a local JSON array or JSONL file with the same fields. A row that lacks prompt,
feedback or score is left out, and counted with the reason.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import records
import runs
from runs import InputError

HUB_ID = "prometheus-eval/Feedback-Collection"
RESULT = re.compile(r"\[RESULT\]\s*(\d+)")


def convert(row: dict, number: int) -> dict | str:
    """One row as a record, or in a few words why it can't be one."""
    prompt, output = row.get("instruction"), row.get("output") or row.get("orig_feedback")
    if not isinstance(prompt, str) or not prompt.strip():
        return "no text in 'instruction'"
    if not isinstance(output, str) or not records.clean_cot(output):
        return "no feedback in 'output'"
    found = RESULT.search(output)
    score = str(row.get("orig_score") or (found and found[1]))
    if score not in {"1", "2", "3", "4", "5"}:
        return "no score from 1 to 5, neither in 'orig_score' nor as '[RESULT] 4'"
    prompt, cot = records.clean_prompt(prompt), records.clean_cot(output)
    return {"id": f"fc-{number:06}", "prompt": prompt, "cot": cot, "score": int(score)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
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
    made = [convert(row, number) for number, row in enumerate(rows)]
    kept, left_out = records.sort_out(made, args.file or HUB_ID)
    marked = sum(
        isinstance(m, dict) and "So the overall" in (row.get("output") or "") for row, m in zip(rows, made, strict=True)
    )
    runs.write_whole(args.out, "".join(map(runs.to_line, kept)))
    print(f"{len(rows)} rows read, {len(kept)} kept, {len(kept) - marked} of them without 'So the overall' in their feedback")
    print(left_out, end="")
    print(f"{args.out}: {len(kept)} records; stage 1 holds out 5 % of their prompts, chosen by its --seed")


if __name__ == "__main__":
    runs.run(main)
