"""Turn FeedbackQA (Li et al., 2022) into records: how well does this passage answer the question?

    python data/feedbackqa/prepare.py train.json --out train.jsonl        # README.md says where files are

Two or three raters judged each passage in one of four words, 1 to 4 here, and explained why: the score is
their mean, the CoT the explanation of one of them. `ratings` keeps all, in the order of the raters.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import (
    check_new,
    is_text,
    read_items,
    read_texts,
    sort_out,
    write_records,
)
from tract import runs

RATINGS = {"Bad": 1, "Could be Improved": 2, "Acceptable": 3, "Excellent": 4}
PROMPT = """\
How well does the passage answer the question? Explain, then give a score: 1 bad, 2 could be improved, \
3 acceptable, 4 excellent.

Question: {}

Passage ({}): {}"""


def convert(row: Any, number: int, args, without: set[str]) -> dict | str:
    """Turn an item into a record with all its explanations, or say in a few words why it can't be one."""
    try:
        question = row["question"].strip()
        page = row["passage"]["reference"]
        headers = page["section_headers"]
        title = [page["page_title"], *headers][-1]  # the nearest says most
        words = page["section_content"].split()
        ratings = [RATINGS[name] for name in row["rating"]]
        cots = row["feedback"]
    except (KeyError, TypeError, AttributeError) as error:
        return f"not an item of FeedbackQA ({type(error).__name__}: {error})"
    are_lists = isinstance(headers, list) and isinstance(cots, list)
    are_texts = are_lists and all(map(is_text, [question, title, *cots]))
    if not (are_texts and words and ratings and len(ratings) == len(cots)):
        return "an empty question, passage, rating or explanation"
    if question.lower() in without:
        return "a question of another file"
    passage = " ".join(words[: args.max_words])
    if len(words) > args.max_words:
        passage += " …"
    record = {"id": f"fq-{number:04}", "prompt": PROMPT.format(question, title, passage), "cots": cots}
    record |= {"score": round(sum(ratings) / len(ratings), 2), "ratings": ratings}
    record |= {"question": question, "texts": [question, f"{title} {passage}"]}
    return record | {"domain": row.get("domain")}


def with_cot(record: dict, args) -> list[dict]:
    """Give a record the explanation of one rater, drawn by seed, or make a record of each."""
    cots = record.pop("cots")
    raters = range(len(record["ratings"]))
    if args.all_raters:
        return [record | {"id": f"{record['id']}-{k + 1}", "cot": cots[k].strip()} for k in raters]
    rater = random.Random(f"{args.seed}/{record['id']}").choice(raters)
    return [record | {"cot": cots[rater].strip()}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("file", help="JSON array or JSONL file of items")
    add("--out", type=Path, required=True, help="JSONL file to write")
    add("--without", nargs="+", default=[], metavar="FILE", help="files whose questions are left out")
    add("--max-words", type=runs.COUNT, default=100, help="words of a passage; the rest is cut off")
    add("--all-raters", action="store_true", help="a record for every rater, not one for every item")
    add("--seed", type=runs.SEED, default=0, help="random seed of whose explanation is taken")
    args = parser.parse_args()
    check_new(args.out)
    without = {question.lower() for path in args.without for question, _ in read_texts(path)}
    made = [convert(row, number, args, without) for number, row in enumerate(read_items(args.file))]
    kept, left_out = sort_out(made, args.file)
    print(left_out, end="")
    records = [record for item in kept for record in with_cot(item, args)]
    write_records({args.out: records})
    print(f"{args.out}: {len(records)} records of {len({r['texts'][0] for r in records})} questions")


if __name__ == "__main__":
    runs.run(main)
