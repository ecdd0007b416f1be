"""Read and clean the files of other people's data sets, for the prepare.py of each."""

import json
import os
import urllib.request
from pathlib import Path
from typing import Any

from records import InputError


def read_items(path: str) -> list:
    """Read the rows of a JSON array or a JSONL file, objects or not. Raises InputError for any other file."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; download it first")
    number = 1
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if text.lstrip().startswith("["):
            items = json.loads(text)
        else:
            items = []
            for line in text.split("\n"):
                items += [json.loads(line)] if line.strip() else []
                number += 1
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: neither a JSON array nor JSONL ({error})") from None
    if not items:
        raise InputError(f"{path}: no rows in it; was it cut off while being downloaded?")
    return items


def read_hub(hub_id: str, split: str, file: str, by_hand: str):
    """Load a data set from the hub; without the hub, what an earlier run left of it. Raises InputError."""
    try:
        hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        urllib.request.urlopen(f"{hub}/api/datasets/{hub_id}", timeout=10).close()
    except OSError:
        # Before the import of `datasets`, which would try for half a minute and warn of every try
        os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets

    try:
        return datasets.load_dataset(hub_id, split=split)
    except Exception as error:  # `datasets` and the libraries below it have no base class of errors in common
        raise InputError(
            f"{hub_id}: can't be had from the hub ({type(error).__name__}); download {file} from "
            f"huggingface.co/datasets/{hub_id}, then: python data/{by_hand} {file}"
        ) from None


def sort_out(made: list, path: str) -> tuple[list, str]:
    """Split what rows became into records, in their order, and lines that count the reasons for the others.

    made: for each row a record (or a list of them), or a text that says why there is none. Raises InputError
    where nothing could be kept.
    """
    kept, reasons = [], {}
    for number, record in enumerate(made):
        if isinstance(record, str):
            reasons.setdefault(record, []).append(number)
        else:
            kept.append(record)
    if not kept:
        first = made[0] if made else "there is none"
        raise InputError(f"{path}: nothing to keep, row 0: {first}; is it the right file?")
    lines = []
    for reason, rows in reasons.items():
        examples = ", ".join(map(str, rows[:3])) + (", …" if len(rows) > 3 else "")
        lines.append(f"left out {len(rows)}: {reason} (row {examples})\n")
    return kept, "".join(lines)


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


def clean_cot(feedback: str) -> str:
    """Cut a feedback where it announces the score ("So the overall", else "[RESULT]"), as the paper does."""
    cot = feedback.partition("So the overall")[0].partition("[RESULT]")[0]
    return cot.removeprefix("Feedback:").strip()
