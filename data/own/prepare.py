"""Turn data of your own into records: a table (CSV, JSON, Parquet), a folder of save_to_disk, a hub data set.

    python data/own/prepare.py answers.csv --map instruction=question response=answer score=rating \\
        --set rubric="Is it right?" --valid-fraction 0.1 --out out/own/train.jsonl

A column that is called as a field (tract/records.py) is taken as it is; --map names the column of any field,
--set gives a field the same text in all rows. A CoT is cut where it announces its score. A row that can't be
a record is left out, and counted with the reason; rows count from 1, in a CSV file the header is row 1.
--valid-fraction holds out prompts with all their rows in valid.jsonl beside --out: prompt and --seed decide.
"""

import argparse
import csv
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import prepare_helpers as helpers
from tract import runs
from tract.checks import check_record, is_number
from tract.hub import one_line
from tract.prompt import PARTS, render_prompt
from tract.records import Grid, InputError, significant

TEXTS = ("id", "prompt", *PARTS, "reference", "cot")
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+|\d+,\d\d?)\s*")  # 4, 3.5, 3,5; 1,000 might be either
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def pair(text: str) -> tuple[str, str]:
    field, value = text.split("=", 1)
    return field, value


def read_rows(source: str, split: str) -> list:
    """Read all rows; of CSV each cell is a text, for a guess would make 7 of 007. Raises InputError."""
    path = Path(source)
    kind = path.suffix.lower()
    if kind in (".json", ".jsonl"):
        return helpers.read_items(path)
    if not path.exists() and kind not in FORMATS and source.count("/") == 1:
        return list(helpers.read_hub(source, split, "FILE", "own/prepare.py"))
    try:
        if path.is_dir() or kind == ".parquet":
            import datasets

            datasets.disable_progress_bars()
            read = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_parquet
            found = read(source)
            if isinstance(found, dict) and split not in found:
                raise ValueError(f"no split {split!r} but {', '.join(found)}; see --split")
            return list(found[split] if isinstance(found, dict) else found)
        if kind not in FORMATS:
            raise ValueError(f"a format that is not known, {kind!r}")
        csv.field_size_limit(2**31 - 1)  # of a cell
        with open(path, encoding="utf-8-sig", newline="") as file:
            separator = max(",;\t", key=file.readline().count)  # the one that the header has most of
            file.seek(0)
            return read_table(csv.reader(file, delimiter=separator, strict=True))
    except Exception as error:  # csv, `datasets` and pyarrow have no base class of errors in common
        what = f"can't be read ({type(error).__name__}: {one_line(error)})"
        raise InputError(f"{source}: {what}; give {', '.join(FORMATS)} in UTF-8, or a folder") from None


def read_table(cells: Iterable[list[str]]) -> list:
    """Turn lines of cells, the first of them names of columns, into rows; an empty line stays one: None."""
    header, *lines = cells
    if not header:
        raise ValueError("its first line, which names the columns, is empty")
    for name in header:
        if name and header.count(name) > 1:
            raise ValueError(f"two columns are called {name!r}")
    rows = []
    for line in lines:
        extra = {None: line[len(header) :]} if len(line) > len(header) else {}
        rows.append(dict(zip(header, line, strict=False)) | extra if line else None)
    return rows


def choose_columns(args: argparse.Namespace, rows: list) -> dict[str, str]:
    """Return the column of each field: those of --map, then columns that are called as a field."""
    columns = dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row if name is not None)
    sources = dict(args.map)
    twice = [field for field in sources if field in dict(args.set)]
    if twice:
        raise InputError(f"{twice[0]}: is in --map and in --set; leave one of them out")
    if "ratings" in sources and args.ratings:
        raise InputError("ratings: is in --map, and --ratings names columns; leave one of them out")
    asked = [*sources.values(), *args.ratings]
    for column in [*asked, *filter(None, [args.group])]:
        if column not in columns:
            there = ", ".join(map(repr, columns))
            raise InputError(f"{args.source}: has no column {column!r}; its columns are {there}")
    taken_as_it_is = TEXTS if args.ratings else (*TEXTS, "score", "ratings")
    for column in columns:
        if column in taken_as_it_is and column not in [*sources, *dict(args.set), *asked]:
            sources[column] = column
    unused = [repr(column) for column in columns if column not in [*asked, *sources.values(), args.group]]
    print(f"not used: {', '.join(unused) or 'no column'}")
    return sources


def read_cell(value: Any, field: str) -> Any:
    """Return what is in a cell: None for nothing, 1 for 1.0, as integers beside gaps become floats."""
    value = json.loads(json.dumps(value, default=str))  # of dates and decimals, texts
    if value is None or value != value or not str(value).strip():
        return None
    if field == "score" and NUMBER.fullmatch(str(value)):
        value = float(str(value).replace(",", "."))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if field == "id":
        value = re.sub(r"\A(\d+)\.0\Z", r"\1", str(value))
    return str(value) if field in TEXTS and is_number(value) else value


def convert(row: Any, sources: dict[str, str], args: argparse.Namespace, id: str) -> dict | str:
    """Turn a row into a record, with this id if it has none, or say in a few words why it can't be one."""
    if not isinstance(row, dict) or None in row:
        return "no object, or more cells than the header has"
    record = {"id": id} | {field: read_cell(text, field) for field, text in args.set}
    for field, column in sources.items():
        value = read_cell(row.get(column), field)
        if field == "cot" and helpers.is_text(value):
            value = helpers.clean_cot(value, args.grid)
            if not value:
                return f"a text in {column!r} that only announces a score"
        if value is not None:
            record[field] = value
        elif field in (*PARTS, "prompt", "cot", "score"):
            return f"nothing in {column!r}"
    ratings = [row.get(column) for column in args.ratings] or record.pop("ratings", [])
    if not isinstance(ratings, list):
        return "'ratings' is no list; name the columns of the raters with --ratings"
    ratings = [read_cell(rating, "score") for rating in ratings]
    ratings = [rating for rating in ratings if rating is not None]
    scores = [*ratings, record["score"]] if "score" in record else ratings
    if not all(map(is_number, scores)) or (args.ratings and not ratings):
        return "a score or rating that is no number"
    low, *_, high = args.grid.values
    if scores and not low <= min(scores) <= max(scores) <= high:
        return f"a score or rating outside {low:g} to {high:g}, the scale of --grid"
    if ratings:
        record["ratings"] = ratings
        record.setdefault("score", read_cell(significant(sum(ratings) / len(ratings)), "score"))
    try:
        prompt = record.get("prompt") or render_prompt(record, args.grid)
    except ValueError as error:
        return str(error)
    need = ("prompt", "cot") if "cot" in record else ("prompt",)
    return check_record(record | {"prompt": prompt}, args.grid, need) or record


def is_cut(record: dict, row: dict, sources: dict[str, str]) -> bool:
    """Tell whether the CoT of a record is less than what its row says."""
    if "cot" not in sources:
        return False
    text = str(row[sources["cot"]]).strip().removeprefix("Feedback:")
    return record["cot"] != text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    several = {"nargs": "+", "action": "extend", "default": []}
    add("source", help=f"file ({', '.join(FORMATS)}), folder of save_to_disk, or OWNER/NAME on the hub")
    add("--map", **several, type=pair, metavar="FIELD=COLUMN", help="which column a field is in")
    add("--set", **several, type=pair, metavar="FIELD=TEXT", help="a text that all rows have in common")
    add("--ratings", **several, metavar="COLUMN", help="scores of several raters; `score` is their mean")
    add("--grid", type=Grid.parse, default=Grid(), help="the scores, as the other scripts take them")
    add("--out", type=Path, required=True, help="JSONL file to write")
    add("--valid-fraction", type=runs.SHARE, default=0.0, help="share of the prompts that is held out")
    add("--group", metavar="COLUMN", help="hold out by this column, not by the prompt")
    add("--split", default="train", help="split of a folder or of a hub data set")
    add("--seed", type=runs.SEED, default=0, help="random seed of what is held out")
    args = parser.parse_args()
    valid = args.out.with_name("valid.jsonl") if args.valid_fraction else None
    helpers.check_new(args.out, valid)
    rows = read_rows(args.source, args.split)
    sources = choose_columns(args, rows)
    first = 2 if Path(args.source).suffix.lower() in (".csv", ".tsv") else 1
    made = []
    groups = {}  # id → what is held out together
    shortened = []  # numbers of rows whose CoT was cut
    numbers = []  # of the rows, in the file
    for number, row in enumerate(rows, first):
        if row is None:
            continue  # an empty line of a table
        numbers.append(number)
        record = convert(row, sources, args, f"{Path(args.source).stem}-{number}")
        if isinstance(record, dict):
            if record["id"] in groups:
                record = "an id that an earlier row has"
            else:
                group = row.get(args.group) if args.group else record.get("instruction", record.get("prompt"))
                groups[record["id"]] = " ".join(str(group).split())
                if is_cut(record, row, sources):
                    shortened.append(number)
        made.append(record)
    kept, left_out = helpers.sort_out(made, args.source, numbers)
    taken = ", ".join(f"{field} from {column!r}" for field, column in sources.items())
    print(f"{len(made)} rows read, {len(kept)} kept: {taken}\n{left_out}", end="")
    runs.report(shortened, "with a CoT that was cut where it announces its score", unit="rows")
    sides = {path: [] for path in (args.out, valid) if path}
    for record in kept:
        held_out = helpers.is_held_out(groups[record["id"]], args.valid_fraction, args.seed)
        sides[valid if held_out else args.out].append(record)
    for path, side in sides.items():
        if not side:
            raise InputError(f"{path}: would be empty; choose another --valid-fraction, --group or --seed")
    helpers.write_records(sides)
    for path, side in sides.items():
        print(f"{path}: {len(side)} records in {len({groups[record['id']] for record in side})} groups")


if __name__ == "__main__":
    runs.run(main)
