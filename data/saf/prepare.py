"""Turn SAF (Filighera et al., 2022) into records: how much of the question does this answer get right?

    python data/saf/prepare.py SAF --out out/saf

Writes train.jsonl, valid.jsonl (training answers held out) and two tests, unseen_answers.jsonl and
unseen_questions.jsonl. The score, 0 to 1, is the graders', the CoT their feedback.
"""

import argparse
import random
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import check_new, sort_out, write_records
from tract import runs
from tract.checks import find_verdict
from tract.records import Grid, InputError

SPLITS = ("unseen_questions", "unseen_answers", "training")  # tests first: training leaves out what they have
EMPTY = {"", "no response", "no submission", "empty response", "empty submission"}
RUBRIC = "How much of what the question asks for does the answer get right, measured by the reference answer?"
PROMPT = """{rubric} Explain, then give a score: 1 nothing, 2 a quarter, 3 half, 4 three quarters, 5 all.

Question: {instruction}
Reference answer: {reference}
Answer: {response}"""
CUT = " […]"  # stands for words that were cut off


def text_of(node: ElementTree.Element, path: str, max_words: int = sys.maxsize) -> str:
    """Return the first words of an element below `node`, in one line; '' where there are none."""
    words = (node.findtext(path) or "").split()
    return " ".join(words[:max_words]) + (CUT if len(words) > max_words else "")


def convert(answer: ElementTree.Element, common: dict, split: str, seen: dict, args) -> dict | str:
    """Turn a student's answer into a record, or say in a few words why it can't be one.

    common: fields of all answers to the question. seen: (question, words) → split, score; a record is added.
    """
    words = " ".join(re.findall(r"\w+", text_of(answer, "response").lower()))
    if words in EMPTY:
        return "an empty submission"
    cot = text_of(answer, "response_feedback")
    score = text_of(answer, "score")
    if not answer.get("id") or not cot or not re.fullmatch(r"0(\.\d+)?|1(\.0+)?", score):
        return "no id, no feedback or no score from 0 to 1"
    if find_verdict(cot, Grid()):
        return "a feedback that ends in a number, as if it held the score"
    key = (common["instruction"], words)
    if key in seen:
        earlier_split, earlier_score = seen[key]
        which = "the same" if earlier_score == float(score) else "another"
        return f"in {earlier_split} already, with {which} score"
    seen[key] = (split, float(score))
    parts = common | {"response": text_of(answer, "response", args.max_words), "rubric": RUBRIC}
    record = {"id": answer.get("id"), "prompt": PROMPT.format(**parts), "cot": cot, "score": float(score)}
    return record | parts | {"texts": [parts["reference"], parts["response"]]}


def read_split(split: str, seen: dict, args) -> list[dict]:
    """Return the records of a folder, questions named by file; print what is left out. Raises InputError."""
    made = []
    ids = []
    folder = args.folder / split
    if (folder / "english").is_dir():  # later versions have a folder for each language
        folder /= "english"
    for path in sorted(folder.glob("*.xml")):
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, LookupError, ValueError) as error:  # also of an unknown encoding
            raise InputError(f"{path}: no XML ({error}); get it anew") from None
        common = {"question": path.stem, "instruction": text_of(root, "questionText")}
        common["reference"] = text_of(root, ".//referenceAnswer", args.max_words)
        if not all(common.values()):
            raise InputError(f"{path}: no question and reference answer; is it a file of SAF?")
        ids += [answer.get("id") for answer in root.iter("studentAnswer")]
        made += [convert(answer, common, split, seen, args) for answer in root.iter("studentAnswer")]
    kept, left_out = sort_out(made, str(folder), ids, "id")
    print(f"{split}: {len(made)} answers\n{left_out}", end="")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("folder", type=Path, help="folder with training, unseen_answers and unseen_questions")
    add("--out", type=Path, required=True, help="folder to write to")
    add("--max-words", type=runs.COUNT, default=100, help="words of an answer or reference; the rest is cut")
    add("--valid-size", type=runs.COUNT, default=150, help="how many training answers are held out")
    add("--seed", type=runs.SEED, default=0, help="random seed of which, and of the order")
    args = parser.parse_args()
    # train.jsonl comes last, as a sign that all are there
    paths = [args.out / f"{name}.jsonl" for name in (*SPLITS[:2], "valid", "train")]
    check_new(*paths)
    seen = {}
    *tests, training = [read_split(split, seen, args) for split in SPLITS]
    if len(training) <= args.valid_size:
        raise InputError(f"--valid-size {args.valid_size}: all {len(training)} answers; give a smaller one")
    random.Random(args.seed).shuffle(training)
    sides = [*tests, training[: args.valid_size], training[args.valid_size :]]
    files = dict(zip(paths, sides, strict=True))
    write_records(files)
    for path, records in files.items():
        cut = sum(CUT in record["prompt"] for record in records)
        print(f"{path}: {len(records)} records, {cut} with texts cut to {args.max_words} words")


if __name__ == "__main__":
    runs.run(main)
