"""Read and clean the files of other people's data sets, for the prepare.py of each, and write records."""

import hashlib
import json
import os
import re
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from tract import runs
from tract.checks import find_verdict
from tract.hub import check_endpoint, one_line
from tract.records import Grid, InputError

SCORE = r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*5)?"  # 4, 4.0, 4/5, 4 out of 5
SAYS = r"(?:(?:the|an?|final|overall|score|rating|is|of)\b[\s,:=*]*)*"
RESULT = re.compile(rf"\[RESULT\][\s:=*(\"'\[]*{SAYS}(?:{SCORE})?[\s.!*\"')\]]*$", re.IGNORECASE)
ANNOUNCED = re.compile(
    r"\b(?i:(?:so|thus|hence|therefore),? the (?:overall|final) (?:score|rating))\b"
    rf"(?:(?: is| of| would be)?[\s:=*(\"'\[]*{SCORE}"  # wherever it is announced: so the overall score is 4
    rf"|[^.!?]*?{SCORE}(?=[\s*\"')\]]*(?:[.!?]|$)))"  # other words before it, at the end of a sentence
    r"|\bSo the overall[^.!?]*[.!?\s\"')]*$"  # a last sentence on "the overall quality"
)


def read_items(path: str | Path) -> list:
    """Read the rows of a JSON array or a JSONL file, objects or not. Raises InputError for any other file."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such file; download it first")
    number = 1
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if text.lstrip().startswith("["):
            items = json.loads(text)
        else:
            items = []
            for line in text.split("\n"):  # splitlines() would split at U+2028 too, which texts hold
                if line.strip():
                    items.append(json.loads(line))
                number += 1
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give a file that can be read") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: neither a JSON array nor JSONL ({error})") from None
    if not items:
        raise InputError(f"{path}: no rows in it; was it cut off while being downloaded?")
    return items


def read_texts(path: str | Path) -> list[list[str]]:
    """Read `texts` of the records in a file that a prepare.py wrote. Raises InputError."""
    texts_of_rows = [row.get("texts") if isinstance(row, dict) else None for row in read_items(path)]
    for number, texts in enumerate(texts_of_rows):
        if not isinstance(texts, list) or len(texts) != 2 or not all(map(is_text, texts)):
            raise InputError(f"{path}: row {number} has no two 'texts'; give files that this script wrote")
    return texts_of_rows


def read_hub(hub_id: str, split: str, file: str, by_hand: str):
    """Load a data set from the hub; without the hub, what an earlier run left of it. Raises InputError."""
    check_endpoint()
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(f"{hub}/api/datasets/{hub_id}", timeout=10).close()
    except HTTPError:
        pass  # the hub is there; `datasets` knows the token that a private data set asks for
    except (OSError, ValueError, HTTPException):
        # Before the import of `datasets`, which would try for half a minute and warn of every try
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import datasets

        return datasets.load_dataset(hub_id, split=split)
    except Exception as error:  # `datasets` and the libraries below it have no base class of errors in common
        what = f"can't be had from the hub ({type(error).__name__}: {one_line(error, 120)})"
        raise InputError(
            f"{hub_id}: {what}; download {file} from huggingface.co/datasets/{hub_id}, then: "
            f"python data/{by_hand} {file}"
        ) from None


def check_new(*paths: Path | str | None) -> None:
    """Refuse outputs that are there already, and make the folders they go to. Raises InputError.

    To be called before anything is read or downloaded. None is an output that was not asked for.
    """
    paths = [Path(path) for path in paths if path is not None]
    for path in paths:
        if os.path.lexists(path):
            raise InputError(f"{path}: is there already; choose another place for it, or remove it")
    if len({path.absolute() for path in paths}) < len(paths):
        raise InputError(f"{paths[0]}: given for two outputs; choose two names")
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent}: can't be a folder ({error.strerror}); choose another") from None


def write_records(files: dict[Path | str, list[dict]]) -> None:
    """Write JSONL files, all of them or none: a first one alone would stand in the way of a second try."""
    written = []
    try:
        for path, records in files.items():
            runs.write_whole(path, "".join(map(runs.to_line, records)))
            written.append(path)
    except BaseException:
        for path in written:
            Path(path).unlink()
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that gets the name `path` when it is filled, and vanishes if that fails."""
    # A name of its own: OUT.part could be somebody's
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", suffix=".part", dir=path.parent) as part:
        folder = Path(part) / path.name
        folder.mkdir()
        yield folder
        for file in folder.glob("*.safetensors"):  # which only their maker could read
            file.chmod(folder.stat().st_mode & 0o666)
        folder.rename(path)


def sort_out(made: list, path: str, names: Sequence | None = None, kind: str = "row") -> tuple[list, str]:
    """Split what rows became into records, in their order, and lines that count the reasons for the others.

    made: for each row a record (or a list of them), or a text that says why there is none. names: what each
    row is called, by default by its number from 0; kind: what these names are. Raises InputError where
    nothing could be kept.
    """
    kept = []
    reasons = {}  # reason → names of the rows
    names = names or range(len(made))
    for name, record in zip(names, made, strict=True):
        reason = record if isinstance(record, str) else None
        try:
            json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:
            reason = "NaN, Infinity or half of a surrogate pair in it"
        if reason:
            reasons.setdefault(reason, []).append(name)
        else:
            kept.append(record)
    if not kept:
        reason = next(iter(reasons), "there is none")
        first = f"{kind} {names[0]}" if made else "first row"
        raise InputError(f"{path}: nothing to keep, {first}: {reason}; is it the right file?")
    lines = []
    for reason, rows in reasons.items():
        examples = ", ".join(map(str, rows[:3])) + (", …" if len(rows) > 3 else "")
        lines.append(f"left out {len(rows)}: {reason} ({kind} {examples})\n")
    return kept, "".join(lines)


def is_held_out(group: str, fraction: float, seed: int) -> bool:
    """Decide by hash: more rows, or rows in another order, leave a group on its side."""
    digest = hashlib.sha256(f"{seed}/{group}".encode()).digest()
    return int.from_bytes(digest[:8]) < fraction * 2**64


def is_text(value: Any) -> bool:
    """Tell whether a value is a text, not empty, that UTF-8 can hold: half of a surrogate pair it can't."""
    try:
        return isinstance(value, str) and bool(value.encode().strip())
    except UnicodeEncodeError:
        return False


def clean_prompt(instruction: str) -> str:
    """Cut a Prometheus prompt after its closing "###Feedback:"; some files put quotes and commas there."""
    before, marker, after = instruction.rpartition("###Feedback:")
    return before + marker if marker and not after.strip(" \n\"',") else instruction.strip()


def read_feedback(feedback: str, label: float | None = None) -> dict | str:
    """Split a feedback into its reasoning, `cot`, and `score`, or say in a few words why that can't be done.

    label: the score that stands beside the feedback, if one does; the feedback must not contradict it.
    """
    cot, announced = split_feedback(feedback, Grid())
    scores = announced if label is None else [label, *announced]
    if not cot:
        return "no feedback before the score"
    if find_verdict(cot, Grid()):
        return "a verdict amid the feedback, or a '[RESULT]' that is no score from 1 to 5"
    if len(set(scores)) > 1:
        return "scores that disagree"
    return {"cot": cot, "score": scores[0] if scores else None}


def clean_cot(feedback: str, grid: Grid) -> str:
    """Cut a feedback where it announces the score ("So the overall", else "[RESULT]"), as the paper does."""
    return split_feedback(feedback, grid)[0]


def split_feedback(feedback: str, grid: Grid) -> tuple[str, list[float]]:
    """Return the reasoning of a feedback, and all scores that are announced after it."""
    cot = feedback.strip()
    scores = []
    verdict = last_verdict(cot, grid)
    while verdict:
        numbers = re.findall(SCORE, verdict[0])
        scores += map(float, numbers[-1:])  # the last of "Score (1-5): 4"
        cot = cot[: verdict.start()].rstrip()
        verdict = last_verdict(cot, grid)
    return cot.removeprefix("Feedback:").strip(), scores


def last_verdict(text: str, grid: Grid) -> re.Match | None:
    """Find the last announcement of a score, or a last sentence that is one."""
    for pattern in (RESULT, ANNOUNCED):
        matches = list(pattern.finditer(text))
        if matches:
            return matches[-1]
    verdict = find_verdict(text, grid)
    return verdict if verdict and verdict.end() == len(text) else None
