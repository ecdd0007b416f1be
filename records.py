"""The JSONL record: its fields, its score grid and its checks. Neither torch nor a tokenizer here.

One JSON object a line, the same fields through all stages; unknown fields are handed on:

    id            str, unique in its file; without one, the number of the line
    prompt        str, the whole formatted judge prompt
    instruction, response, rubric, reference (optional)
                  in place of a prompt: it is then rendered with the Prometheus template
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
"""

import itertools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from data.prometheus_prompt import render_prompt

ROOT = Path(__file__).resolve().parent
OFF_GRID = 0.05  # mean off-grid mass above which predictions are not on the scale any more
SUFFIX = " So the overall score is "  # between CoT and score, unless --suffix says otherwise


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
            raise InputError(f"--grid {text}: give numbers, as in 1,2,3,4,5 or 1=0,3=50,5=100") from None
        ascending = all(a < b for a, b in itertools.pairwise(values)) and all(map(math.isfinite, values))
        if len(tokens) < 2 or len(set(tokens)) < len(tokens) or not ascending:
            raise InputError(f"--grid {text}: give at least two different scores in ascending order")
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
    mean = sum(sum(row["off_grid"]) / len(row["off_grid"]) for row in rows) / len(rows)
    below = sum(row["prediction"] is not None and row["prediction"] < grid.values[0] for row in rows)
    line = f"mean off-grid mass {mean:.4f}"
    if any(row["renormalised"] for row in rows) or (mean <= OFF_GRID and not below):
        return line
    below = f"; {below} predictions lie below {grid.values[0]:g}" if below else ""
    return f"{line}: as much of every score is missing{below}. --renormalise divides by the mass on the grid"


def significant(number: float) -> float:
    """Round to seven digits, which is what fp32 holds: the files stay readable."""
    return float(f"{number:.7g}")


def read_records(path: str | Path, grid: Grid, need: Iterable[str] = ("id", "prompt")) -> list[dict]:
    """Read a JSONL file of records with the fields `need`. Raises InputError, with path:line and remedy."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; give a JSONL file of records (data/*/prepare.py make some)")
    records, first_seen = [], {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = {"id": str(number)} | parse_line(line, where)
            if "prompt" not in record and {"instruction", "response", "rubric"} <= record.keys():
                try:
                    record["prompt"] = render_prompt(record)
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
    """Parse one JSONL line; refuse NaN, Infinity and halves of surrogate pairs. Raises InputError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        record = json.loads(line.decode("utf-8-sig"), parse_constant=refuse)
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); write one JSON object in UTF-8 a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: a {type(record).__name__}, not a JSON object; write one record a line")
    return record


def is_number(x: Any) -> bool:
    """Tell whether x is a finite number; an integer of 400 digits is none."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300


def check_record(record: dict, grid: Grid, need: Iterable[str]) -> str | None:
    """Return what is wrong with `record`, in one phrase with its remedy, or None."""
    for field in need:
        if record.get(field) is None:
            hint = {"cots": "; gen_cot.py adds it", "prompt": "; or instruction, response and rubric"}
            return f"field '{field}' is missing; this stage needs {', '.join(need)}{hint.get(field, '')}"
    for field in ("id", "prompt", "cot"):
        text = record.get(field)
        if text is not None and not isinstance(text, str):
            return f"field '{field}' is {json.dumps(text)[:40]}, not a string; write it as one"
        if text is not None and not text.strip():
            return f"field '{field}' is empty; fill it in or leave the record out"
    if grid.suffix.strip() in (record.get("cot") or ""):
        return f"field 'cot' holds '{grid.suffix.strip()}'; end it before that, the score comes from 'score'"
    for field in ("score", "prediction", "decoded"):
        if record.get(field) is not None and not is_number(record[field]):
            return f"field '{field}' is {json.dumps(record[field])[:40]}, not a number; remove the quotes"
    low, high, scores = grid.values[0], grid.values[-1], len(grid.tokens)
    if record.get("score") is not None and not low <= record["score"] <= high:
        return f"score {record['score']:g} lies outside the grid ({low:g} to {high:g}); mend it or set --grid"
    per_cot = {
        "finished": lambda x: type(x) is bool,
        "cots": lambda x: isinstance(x, str),
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
