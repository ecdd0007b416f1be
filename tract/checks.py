"""What is wrong with a record: mistakes that would show after hours, or never."""

import json
import re
from typing import Any

from tract.prompt import PARTS, SUFFIX

RESPONSES = re.compile(  # what data sets call a response, or one of several; not the feedback, in `output`
    r"(?!reference|output\Z)(\w+[ _])?"
    r"(response|completion|answer|rejected|generation|output)s?([ _]?[a-d\d])?",
    re.IGNORECASE,
)


def is_text(x: Any) -> bool:
    return isinstance(x, str)


def is_bool(x: Any) -> bool:
    return isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Tell whether x is a finite number; an integer of 400 digits is none."""
    return isinstance(x, int | float) and not is_bool(x) and abs(x) < 1e300


def are_numbers(x: Any) -> bool:
    return isinstance(x, list) and len(x) > 0 and all(map(is_number, x))


# What a field has to be: a test, and its words in the message
TEXT = (is_text, "a string; write it as one")
NUMBER = (is_number, "a number; remove the quotes")
EXTRAS = {  # what eval.py reads where it is there; so it is checked before the hours of judging
    "ratings": (are_numbers, "a list of numbers"),
    "chosen": (is_bool, "true or false; data/pairs/prepare.py makes records of chosen and rejected texts"),
    "weight": (lambda x: is_number(x) and x > 0, "a number above 0"),
    "pair_size": (is_number, "the number of responses in the pair"),
    "pair": TEXT,
    "section": TEXT,
    "subset": TEXT,
}
ALWAYS_READ = EXTRAS | {"id": TEXT, "score": NUMBER}
READ_IF_NEEDED = {"prompt": TEXT, "cot": TEXT, "prediction": NUMBER, "decoded": NUMBER}
READ_WITH_PREDICTION = {"suffix": TEXT, "grid": TEXT, "renormalised": (is_bool, "true or false")}


def check_record(record: dict, grid, need: tuple[str, ...]) -> str | None:
    """Return what is wrong with `record`, in one phrase with its remedy, or None.

    grid: a records.Grid. need: the fields that a stage reads; what nobody reads may hold anything.
    """
    # Fields that are missing, empty, or of another kind, as "4" for 4
    hints = {
        "cots": "; gen_cot.py adds it",
        "prompt": "; or instruction, response and rubric",
        "prediction": "; predict.py adds it",
        "grid": "; predict.py adds it",
    }
    for field in need:
        nothing_on_grid = field == "prediction" and field in record and record.get("renormalised") is True
        if record.get(field) is None and not nothing_on_grid:
            return f"field '{field}' is missing; this stage needs {', '.join(need)}{hints.get(field, '')}"
    kinds = ALWAYS_READ | {field: kind for field, kind in READ_IF_NEEDED.items() if field in need}
    if "prediction" in need:
        kinds |= READ_WITH_PREDICTION
    for field, (is_right, what) in kinds.items():
        value = record.get(field)
        if value is not None and not is_right(value):
            remedy = "; or rename it" if field in EXTRAS else ""
            return f"field '{field}' is {json.dumps(value)[:40]}, not {what}{remedy}"
        if is_text(value) and not value.strip():
            return f"field '{field}' is empty; fill it in or leave the record out"
    return check_content(record, grid, need)


def check_content(record: dict, grid, need: tuple[str, ...]) -> str | None:
    """Look for what the fields of a record say that can't be right, one by one or together."""
    # A score of another scale: no prediction could reach it
    score = record.get("score")
    low = grid.values[0]
    high = grid.values[-1]
    if score is not None and not low <= score <= high:
        return f"score {score:g} lies outside the grid ({low:g} to {high:g}); mend it or set --grid"
    # A response that was left out of the prompt: the judge would judge without having seen it
    unseen = not_in_prompt(record) if "prompt" in need else None
    if unseen:
        remedy = f"put it there, or rename 'prompt' to 'instruction' and add a 'rubric', or rename '{unseen}'"
        return f"field 'prompt' does not contain the text of '{unseen}', so no judge would see it; {remedy}"
    # A CoT that holds its score: the score after it would only be copied
    verdict = find_verdict(record["cot"], grid) if "cot" in need else None
    if verdict:
        remedy = "end it before that (data/prepare_helpers.py cuts feedback so): the score is no part of it"
        return f"field 'cot' holds '{verdict[0].strip()[:60]}'; {remedy}"
    # CoTs that end in other words than those before the score now, or a prompt that may ask for other words
    has_response = "prompt" in need and record.get("response") is not None  # so it may have been rendered
    suffix = grid.suffix.strip()
    if ("cots" in need or has_response) and record.get("suffix") not in (None, suffix):
        what = f"its CoTs were to end in '{record['suffix']}', not '{suffix}'"
        return f"{what}; write them anew or set --suffix"
    # A prompt that was rendered for other scores
    if has_response and record.get("grid") not in (None, str(grid)):
        return f"its prompt asks for the scores {record['grid']}, not {grid}; set --grid, or begin anew"
    # Lists that do not hold one entry a CoT, as score_probs of another grid
    n_scores = len(grid.tokens)
    entry_kinds = {
        "finished": is_bool,
        "cots": is_text,
        "off_grid": is_number,
        "score_probs": lambda x: are_numbers(x) and len(x) == n_scores,
    }
    for field, is_right in entry_kinds.items():
        if field not in need:
            continue
        entries = record[field]
        finished = record["finished"]
        are_lists = isinstance(entries, list) and isinstance(finished, list)
        if not (are_lists and entries and len(entries) == len(finished) and all(map(is_right, entries))):
            what = "one entry"
            if field == "score_probs":
                what = f"{n_scores} probabilities (is --grid right?)"
            return f"field '{field}' does not hold {what} a CoT; make this file with gen_cot.py or predict.py"
    return None


def not_in_prompt(record: dict) -> str | None:
    """Return the first field with a text that the prompt should contain and does not, white space aside."""
    prompt = " ".join(record["prompt"].split())
    for field, value in record.items():
        should_be_seen = field in (*PARTS, "reference") or RESPONSES.fullmatch(field)
        if should_be_seen and not all(" ".join(text.split()) in prompt for text in texts_in(value)):
            return field
    return None


def texts_in(value: Any) -> list[str]:
    """Return all texts in a value: a response may be a list of messages, a rubric has a text a score."""
    if isinstance(value, dict):
        value = [content for key, content in value.items() if key != "role"]
    if isinstance(value, list):
        return [text for entry in value for text in texts_in(entry)]
    return [value] if is_text(value) else []


# The last sentence of a CoT as a verdict: its start, what leads up to a score, the score, nothing after it
START = r"(?:\A|\n|(?<=[.!?])(?<!No\.)\W)"
WORDS = r"[^.!?\n]*"
FEW_WORDS = r"[^.!?\n]{0,40}"
SCORE = "scores?|rating|grade"
GETS = "deserves|merits|earns|gets|receives"
LEADS = (
    r"[\W_]{0,20}",  # It is fine. **4**
    rf"{WORDS}\b(?:{SCORE}|marks?|verdict|overall)(?: *\([^()]*\))?\s*[^\w\s,(]\W*",  # Score (1-5): 4
    rf"{WORDS}\b(?:{SCORE})\b{FEW_WORDS}\bis (?:an? )?\W*",  # my score for it is 4
    rf"{WORDS}\b(?:I|we)\b{FEW_WORDS}\b(?:give|rate|score|assign|award)\b{FEW_WORDS} \W*",  # I give it 4
    rf"{WORDS}\b(?:{GETS}),? (?:an? )?(?:score (?:of )?)?\W*",  # it deserves a score of 4
    rf"{WORDS}\b(?:would be|hence|thus),? (?:an? |(?=score))(?:score (?:of )?)?\W*",  # it would be a 4
)
DIGITS = r"\d{1,3}(?:\.\d+)?"
UNIT = r"(?:\W*(?:/|out of)\s*\d+)?(?: points?| stars?)?(?: *\([^()]*\))?"  # 4/5, 4 stars, 4 (good)
END = r"(?:</\w+>|[\W_])*\Z"  # </score>, quotes, stops


def find_verdict(cot: str, grid) -> re.Match | None:
    """Find where a CoT gives its score away: announced by a suffix, or in the last sentence.

    "It does not meet the criteria for a score of 5" is no verdict, nor is an early "So the overall".
    """
    suffixes = "|".join(map(re.escape, (grid.suffix.strip(), SUFFIX.strip())))
    overall = r"So the overall (?:score|rating|grade|quality|evaluation|assessment)(?:[^.!?]|\.\d)*\W*\Z"
    announced = re.search(rf"{suffixes}|(?i:\[RESULT])|{overall}", cot)
    tokens = "|".join(map(re.escape, grid.tokens))
    closing = re.compile(f"{START}(?:{'|'.join(LEADS)})(?:{tokens}|{DIGITS}){UNIT}{END}", re.IGNORECASE)
    # Nowhere but at the end can it be, and the search is slow
    return announced or closing.search(cot, max(0, len(cot) - 300))
