"""The JSONL record: its fields, its score grid and its reading. Neither torch nor a tokenizer here.

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
    low, high     float, 90 % interval around the prediction (--intervals); null where there is none
    ratings       list of numbers, the scores of several raters
    pair, pair_size, chosen, section, subset, weight
                  str, int, bool, str, str, number: which pair of responses this is one of, see pairs.py
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tract.checks import EXTRAS, check_record
from tract.prompt import PARTS, SUFFIX, render_prompt

ROOT = Path(__file__).resolve().parents[1]  # of the repository
# What predict.py adds, and what it does not take over from an earlier judge
PREDICTED = ("score_probs", "off_grid", "renormalised", "prediction", "decoded", "low", "high")
LARGEST = 1e6  # score: its square, and differences of one in it, are exact enough in fp32
GRIDS = "as in 1,2,3,4,5 or 1=0,3=50,5=100; for 1 to 10: 1,2,3,4,5,6,7,8,9,0=10 or letters, A=1,B=2,…"


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
        tokens = []
        values = []
        for entry in text.split(","):
            token, _, value = entry.partition("=")
            tokens.append(token.strip())
            try:
                values.append(float(value.strip() or token))
            except ValueError:
                raise InputError(f"--grid {text}: give numbers, {GRIDS}") from None
        ascending = values == sorted(set(values)) and all(map(math.isfinite, values))
        if ascending and max(map(abs, values)) > LARGEST:
            raise InputError(
                f"--grid {text}: losses in fp32 can't hold it; keep to {LARGEST:g}, in another unit"
            )
        different = len(set(tokens)) == len(tokens) and all(tokens)
        if len(tokens) < 2 or not different or not ascending:
            raise InputError(f"--grid {text}: give at least two different scores in ascending order, {GRIDS}")
        if not suffix.strip():
            raise InputError("--suffix is empty; give the words that stand between CoT and score")
        return cls(tuple(tokens), tuple(values), f" {suffix.strip()} ")

    def __str__(self) -> str:
        pairs = zip(self.tokens, self.values, strict=True)
        return ",".join(f"{token}={value}".removesuffix(".0") for token, value in pairs)

    def nearest(self, score: float) -> int:
        """Return the index of the grid point nearest to `score`, halves up."""
        width = self.values[-1] - self.values[0]
        # Rounded, for .15 is half-way from .1 to .2, in floats not quite
        distances = [round(abs(value - score) / width, 9) for value in self.values]
        smallest = min(distances)
        return max(i for i, distance in enumerate(distances) if distance == smallest)


def predicted(
    score_probs: list[list[float]], grid: Grid, renormalise: bool = False
) -> tuple[float | None, float]:
    """Return `prediction` (CoT-RAIL: Σ_v p(v) · v) and `decoded` (the most likely score), averaged over CoTs.

    score_probs: one list a CoT, p(score token) in the order of the grid. `renormalise` divides each expected
    score by its mass on the grid, which the paper does not. CoTs without such mass are then left out; the
    prediction is None where no CoT has any. Where several scores are equally likely, decoded is their mean,
    which leans to neither end of the scale.
    """
    expected = []
    decoded = []
    for probs in score_probs:
        mass = sum(probs)
        mean = sum(p * value for p, value in zip(probs, grid.values, strict=True))
        if not renormalise:
            expected.append(mean)
        elif mass > 0:
            expected.append(mean / mass)
        likeliest = [value for p, value in zip(probs, grid.values, strict=True) if p == max(probs)]
        decoded.append(sum(likeliest) / len(likeliest))
    prediction = significant(sum(expected) / len(expected)) if expected else None
    return prediction, sum(decoded) / len(decoded)


def updated(record: dict, fields: dict) -> dict:
    """Return a record with new fields, without what an earlier judge predicted."""
    return {name: value for name, value in record.items() if name not in PREDICTED} | fields


def significant(number: float) -> float:
    """Round to seven digits, which is what fp32 holds: the files stay readable."""
    return float(f"{number:.7g}")


def read_records(path: str | Path, grid: Grid, need: Iterable[str] = ("id", "prompt")) -> list[dict]:
    """Read a JSONL file of records with the fields `need`. Raises InputError, with path:line and remedy."""
    check_file(path, wanted="a JSONL file of records (data/*/prepare.py make some)")
    with open(path, "rb") as lines:
        records = records_of(lines, f"{path}:", grid, tuple(need))
    if not records:
        raise InputError(f"{path}: no records in it; was it cut off while being made?")
    return records


def check_file(path: str | Path, wanted: str) -> None:
    """Refuse what is not there, or can't be read twice. Raises InputError."""
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path}: no file but a folder or a pipe, which is read once; write it into a file")
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give {wanted}")


def records_of(lines: Iterable[bytes], place: str, grid: Grid, need: tuple[str, ...]) -> list[dict]:
    """Parse and check lines of JSON, render prompts. Raises InputError, which names place and number."""
    records = []
    line_of = {}  # id → number of its line
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{place}{number}"
        record = tidy(parse_line(line, where), number)
        if "prompt" in need and record.get("prompt") is None and any(record.get(x) for x in PARTS):
            try:
                record["prompt"] = render_prompt(record, grid)
            except ValueError as error:
                raise InputError(f"{where}: {error}") from None
        wrong = check_record(record, grid, need)
        if wrong:
            raise InputError(f"{where}: {wrong}")
        earlier = line_of.setdefault(record["id"], number)
        if earlier != number:
            what = f"id {record['id']!r} was already used in {place}{earlier}"
            raise InputError(f"{where}: {what}; change one")
        records.append(record)
    return records


def parse_line(line: bytes, where: str) -> dict:
    """Parse one JSONL line; refuse NaN, Infinity, 1e999 and halves of surrogate pairs. Raises InputError."""

    def finite(text: str) -> float:
        if not math.isfinite(float(text)):
            raise ValueError(f"{text} is not a number")
        return float(text)

    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=finite, parse_float=finite)
        json.dumps(record, ensure_ascii=False).encode()  # fails at half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); write one JSON object in UTF-8 a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: a {type(record).__name__}, not a JSON object; write one record a line")
    return record


def tidy(record: dict, number: int) -> dict:
    """Give a record an id, by default the number of its line; ids become texts, null extras are dropped."""
    record = {"id": None} | record  # the id comes first in its line
    if record["id"] is None:
        record["id"] = number
    for field in ("id", "pair"):
        if type(record.get(field)) is int:
            record[field] = str(record[field])
    if isinstance(record.get("ratings"), list):  # of raters who gave none
        record["ratings"] = [rating for rating in record["ratings"] if rating is not None] or None  # [] goes
    return {field: value for field, value in record.items() if value is not None or field not in EXTRAS}
