"""The JSONL record: its fields, its score grid and its checks. Neither torch nor a tokenizer here.

One JSON object a line, the same fields through all stages; unknown fields are handed on:

    id            str, unique in its file; without one, the number of the line
    prompt        str, the whole formatted judge prompt
    instruction, response, rubric, reference (optional)
                  in place of a prompt: it is then rendered with the Prometheus template. Beside a prompt,
                  each has to be part of it
    cot           str, the annotated chain of thought, without a score
    score         number inside the range of the score grid; 3.67, a mean of three annotators, is as good as 4
    cots          list of str, self-generated CoTs (gen_cot.py, predict.py)
    finished      list of bool, one a CoT: did it reach the suffix by itself?
    suffix        str, the words that these CoTs were to end in
    score_probs   list of lists, one a CoT: p(score token | prompt, CoT) in the order of the grid (predict.py)
    off_grid      list of float, one a CoT: off-grid mass, the probability of all that is no score
    grid          str, the score grid of score_probs, as --grid takes it
    renormalised  bool, was the prediction divided by the mass on the grid?
    prediction    float, CoT-RAIL: the expected score, averaged over the CoTs; null where it was to be
                  renormalised and there was nothing on the grid
    decoded       float, the most likely score (the mean of several equally likely), averaged over the CoTs
    ratings       list of numbers, the scores of several raters
    pair, chosen, section, subset, weight
                  str, bool, str, str, number: which pair of responses this is one of, see pairs.py
"""

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tract.prompt import PARTS, render_prompt

ROOT = Path(__file__).resolve().parents[1]  # of the repository
OFF_GRID = 0.05  # mean off-grid mass above which predictions are not on the scale any more
SUFFIX = " So the overall score is "  # between CoT and score, unless --suffix says otherwise
GRIDS = "as in 1,2,3,4,5 or 1=0,3=50,5=100; for 1 to 10: 1,2,3,4,5,6,7,8,9,0=10 or letters, A=1,B=2,…"
RESPONSES = re.compile(  # what data sets call a response, or one of several
    r"(response|completion|answer|rejected)s?([ _]?[a-d\d])?|output[ _]?[a-d\d]", re.IGNORECASE
)


class InputError(Exception):
    """A mistake that the caller can mend; its text says what is wrong, where, and what to do."""


class Grid(NamedTuple):
    """Hold the scores that are single tokens: `tokens[i]` in the text is worth `values[i]`, ascending."""

    tokens: tuple[str, ...] = ("1", "2", "3", "4", "5")
    values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    suffix: str = SUFFIX  # between CoT and score, with the spaces around it

    @classmethod
    def parse(cls, text: str, suffix: str = SUFFIX) -> "Grid":
        """Read `1,2,3,4,5` or `1=0,3=50,5=100` (token=value). Raises InputError."""
        pairs = [[part.strip() for part in pair.partition("=")] for pair in text.split(",")]
        tokens = tuple(token for token, _, _ in pairs)
        try:
            values = tuple(float(value or token) for token, _, value in pairs)
        except ValueError:
            raise InputError(f"--grid {text}: give numbers, {GRIDS}") from None
        ascending = all(a < b for a, b in itertools.pairwise(values)) and all(map(math.isfinite, values))
        if len(tokens) < 2 or len(set(tokens)) < len(tokens) or not all(tokens) or not ascending:
            raise InputError(f"--grid {text}: give at least two different scores in ascending order, {GRIDS}")
        if not suffix.strip():
            raise InputError("--suffix is empty; give the words that stand between CoT and score")
        return cls(tokens, values, f" {suffix.strip()} ")

    def __str__(self) -> str:
        return ",".join(f"{t}={v:.12g}" for t, v in zip(self.tokens, self.values, strict=True))

    def nearest(self, score: float) -> int:
        """Return the index of the grid point nearest to `score`, halves up."""
        return min(range(len(self.values)), key=lambda i: (abs(self.values[i] - score), -self.values[i]))


def predicted(
    score_probs: list[list[float]], grid: Grid, renormalise: bool = False
) -> tuple[float | None, float]:
    """Return `prediction` (CoT-RAIL: Σ_v p(v) · v) and `decoded` (the most likely score), averaged over CoTs.

    score_probs: one list a CoT, p(score token) in the order of the grid. `renormalise` divides each expected
    score by its mass on the grid, which the paper does not. CoTs without such mass are then left out; the
    prediction is None where no CoT has any. Where several scores are equally likely, decoded is their mean,
    which leans to neither end of the scale.
    """
    expected, decoded = [], []
    for probs in score_probs:
        mean, mass = sum(p * v for p, v in zip(probs, grid.values, strict=True)), sum(probs)
        if not renormalise:
            expected.append(mean)
        elif mass > 0:
            expected.append(mean / mass)
        likeliest = [v for p, v in zip(probs, grid.values, strict=True) if p == max(probs)]
        decoded.append(sum(likeliest) / len(likeliest))
    prediction = significant(sum(expected) / len(expected)) if expected else None
    return prediction, sum(decoded) / len(decoded)


def off_grid_line(rows: list[dict], grid: Grid) -> str:
    """Return a line on the mean off-grid mass of judged records, with what to do where predictions suffer.

    rows: as predict.py writes them. What was not renormalised lies lower by the mass off the grid.
    """
    off_grid = [sum(row["off_grid"]) / len(row["off_grid"]) for row in rows]
    mean = sum(off_grid) / len(rows)
    line = f"mean off-grid mass {mean:.4f}"
    if any(row["renormalised"] for row in rows):
        return line
    suffering = [row for row, mass in zip(rows, off_grid, strict=True) if mass > OFF_GRID]
    below = [row["id"] for row in suffering if row["prediction"] < grid.values[0]]
    if mean <= OFF_GRID and not below:
        return line
    below = f"; {len(below)} predictions lie below {grid.values[0]:g}" if below else ""
    return f"{line}: as much of every score is missing{below}. --renormalise divides by the mass on the grid"


def significant(number: float) -> float:
    """Round to seven digits, which is what fp32 holds: the files stay readable."""
    return float(f"{number:.7g}")


def read_records(path: str | Path, grid: Grid, need: Iterable[str] = ("id", "prompt")) -> list[dict]:
    """Read a JSONL file of records with the fields `need`. Raises InputError, with path:line and remedy."""
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path}: no file but a folder or a pipe, which is read once; write it into a file")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a JSONL file of records (data/*/prepare.py make some)")
    records, first_seen, need = [], {}, tuple(need)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = tidy(parse_line(line, where), number)
            if "prompt" in need and record.get("prompt") is None and any(record.get(x) for x in PARTS):
                try:
                    record["prompt"] = render_prompt(record, grid)
                except ValueError as error:
                    raise InputError(f"{where}: {error}") from None
            wrong = check_record(record, grid, need)
            if wrong is None and record["id"] in first_seen:
                wrong = f"id {record['id']!r} was already used in line {first_seen[record['id']]}; change one"
            if wrong:
                raise InputError(f"{where}: {wrong}")
            first_seen[record["id"]] = number
            records.append(record)
    if not records:
        raise InputError(f"{path}: no records in it; was it cut off while being made?")
    return records


def parse_line(line: bytes, where: str) -> dict:
    """Parse one JSONL line; refuse NaN, Infinity, 1e999 and halves of surrogate pairs. Raises InputError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)

    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=refuse, parse_float=finite)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); write one JSON object in UTF-8 a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: a {type(record).__name__}, not a JSON object; write one record a line")
    return record


def tidy(record: dict, number: int) -> dict:
    """Give a record an id, by default the number of its line; ids become texts, null extras are dropped."""
    record = {"id": None} | record
    if record["id"] is None:
        record["id"] = number
    for field in ("id", "pair"):
        if type(record.get(field)) is int:
            record[field] = str(record[field])
    return {field: value for field, value in record.items() if value is not None or field not in EXTRAS}


def is_number(x: Any) -> bool:
    """Tell whether x is a finite number; an integer of 400 digits is none."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300


TEXT = (lambda x: isinstance(x, str), "a string; write it as one")
NUMBER = (is_number, "a number; remove the quotes")
BOOL = (lambda x: isinstance(x, bool), "true or false")
EXTRAS = {  # what eval.py reads where it is there: a test, and what the field has to be
    "ratings": (lambda x: isinstance(x, list) and x and all(map(is_number, x)), "a list of numbers"),
    "chosen": (BOOL[0], "true or false; data/pairs/prepare.py makes records of chosen and rejected texts"),
    "weight": (lambda x: is_number(x) and x > 0, "a number above 0"),
    **dict.fromkeys(("pair", "section", "subset"), TEXT),
}
FIELDS = EXTRAS | {
    **dict.fromkeys(("id", "prompt", "cot", "suffix", "grid"), TEXT),
    **dict.fromkeys(("score", "prediction", "decoded"), NUMBER),
    "renormalised": BOOL,
}


def check_record(record: dict, grid: Grid, need: Iterable[str]) -> str | None:
    """Return what is wrong with `record`, in one phrase with its remedy, or None.

    A field that is not in `need` may hold anything, but for what eval.py reads after the hours of judging.
    """
    for field in need:
        nothing_on_grid = field == "prediction" and field in record and record.get("renormalised") is True
        if record.get(field) is None and not nothing_on_grid:
            hint = {"cots": "; gen_cot.py adds it", "prompt": "; or instruction, response and rubric"}
            return f"field '{field}' is missing; this stage needs {', '.join(need)}{hint.get(field, '')}"
    read = {"id", "score", *EXTRAS, *need}
    if "prediction" in need:
        read |= {"suffix", "grid", "renormalised"}
    for field, (is_right, what) in FIELDS.items():
        value = record.get(field) if field in read else None
        if value is not None and not is_right(value):
            return f"field '{field}' is {json.dumps(value)[:40]}, not {what}"
        if isinstance(value, str) and not value.strip():
            return f"field '{field}' is empty; fill it in or leave the record out"
    low, high, scores = grid.values[0], grid.values[-1], len(grid.tokens)
    if record.get("score") is not None and not low <= record["score"] <= high:
        return f"score {record['score']:g} lies outside the grid ({low:g} to {high:g}); mend it or set --grid"
    unseen = not_in_prompt(record) if "prompt" in need else None
    if unseen:
        remedy = f"put it into the prompt, leave 'prompt' away (it is then rendered), or rename '{unseen}'"
        return f"field 'prompt' does not contain the text of '{unseen}', so no judge would see it; {remedy}"
    verdict = find_verdict(record["cot"], grid) if "cot" in need else None
    if verdict:
        remedy = "end it before that (data/prepare_helpers.py cuts feedback so): the score is no part of it"
        return f"field 'cot' holds '{verdict[0].strip()[:60]}'; {remedy}"
    suffix = grid.suffix.strip()
    if "cots" in need and record.get("suffix") not in (None, suffix):
        return (
            f"its CoTs were to end in '{record['suffix']}', not '{suffix}'; write them anew or set --suffix"
        )
    per_cot = {
        "finished": BOOL[0],
        "cots": TEXT[0],
        "off_grid": is_number,
        "score_probs": lambda x: isinstance(x, list) and len(x) == scores and all(map(is_number, x)),
    }
    for field in (name for name in per_cot if name in need):
        entries, finished = record[field], record["finished"]
        right = isinstance(entries, list) and isinstance(finished, list) and len(entries) == len(finished) > 0
        if not right or not all(map(per_cot[field], entries)):
            what = f"{scores} probabilities (is --grid right?)" if field == "score_probs" else "one entry"
            return f"field '{field}' does not hold {what} a CoT; make this file with gen_cot.py or predict.py"
    return None


def not_in_prompt(record: dict) -> str | None:
    """Return the first field with a text that the prompt should contain and does not, white space aside."""
    prompt = " ".join(record["prompt"].split())
    for field, value in record.items():
        if field in (*PARTS, "reference") or RESPONSES.fullmatch(field):
            if isinstance(value, dict):
                value = list(value.values())
            texts = value if isinstance(value, list) else [value]
            if not all(" ".join(text.split()) in prompt for text in texts if isinstance(text, str)):
                return field
    return None


def find_verdict(cot: str, grid: Grid) -> re.Match | None:
    """Find where a CoT gives its score away: announced by a suffix, or in the last sentence.

    "It does not meet the criteria for a score of 5" is no verdict, nor is an early "So the overall".
    """
    suffixes = "|".join(map(re.escape, (grid.suffix.strip(), SUFFIX.strip())))
    tokens = "|".join(map(re.escape, grid.tokens))
    words = r"[^.!?\n]*"  # of one sentence
    few_words = r"[^.!?\n]{0,40}"
    names = "scores?|rating|grade"
    before = (
        r"[\W_]{0,20}",  # It is fine. **4**
        rf"{words}\b(?:{names}|marks?|verdict|overall)(?: *\([^()]*\))?\s*[^\w\s,(]\W*",  # Score (1-5): 4
        rf"{words}\b(?:{names})\b{few_words}\bis (?:an? )?\W*",  # my score for it is 4
        rf"{words}\bI\b{few_words}\b(?:give|rate|score|assign|award) {few_words}(?<= )\W*",  # I give it a 4
    )
    score = rf"(?:{tokens}|\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*\d+)?(?: points?| stars?)?"  # 4.5 / 5 points
    last = rf"(?:\A|\n|(?<=[.!?])(?<!No\.)\W)(?:{'|'.join(before)}){score}(?:</\w+>|[\W_])*\Z"
    announced = rf"(?-i:{suffixes}|So the overall(?:[^.!?]|\.\d)*\W*\Z)|\[RESULT]"
    close_to_the_end = max(0, len(cot) - 300)  # nowhere else can it be, and the search is slow
    return re.compile(announced, re.IGNORECASE).search(cot) or re.compile(last, re.IGNORECASE).search(
        cot, close_to_the_end
    )
