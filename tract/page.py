"""The page report.html: what eval.py prints, its figure, and the records."""

import base64
import json

from jinja2 import Environment, FileSystemLoader  # comes with torch

from tract.records import ROOT, predicted
from tract.scores import Predictions

FIELDS = ("id", "score", "prediction", "decoded", "finished", "score_probs", "off_grid")
ROOM = 30_000_000  # bytes of records, some 5,000 of MT-Bench's length: browsers open more but slowly


def worst(common: dict[str, Predictions]) -> dict[str, Predictions]:
    """Return the records that the page has room for: those with the largest error in one of the files."""
    size = 0
    kept = []
    columns = [file.rows for file in common.values()]
    records = list(zip(*columns, strict=True))  # a row of each file
    errors = [max(abs(row["prediction"] - row["score"]) for row in rows) for rows in records]
    for number in sorted(range(len(records)), key=lambda number: -errors[number]):
        for row in records[number]:
            size += len(json.dumps([row.get(name) for name in (*FIELDS, "prompt", "cots")]))
        if size > ROOM and kept:
            break
        kept.append(number)
    kept.sort()  # as in the file
    return {path: Predictions([rows[n] for n in kept], grid) for path, (rows, grid) in common.items()}


def left_out(listed: dict[str, Predictions], n: int) -> str:
    """Return a line that says which of n records the page lists, "" where these are all."""
    room = len(next(iter(listed.values())).rows)
    return "" if room == n else f"report.html lists the {room} of {n} records with the largest errors\n"


def render(common: dict[str, Predictions], printed: str, figure: bytes) -> str:
    """Fill in page.html: it needs no other file. printed: by report.describe. figure: a PNG."""
    files = []
    for path, (rows, grid) in common.items():
        entries = []
        for row in rows:
            entry = {name: row[name] for name in FIELDS} | {"nearest": grid.nearest(row["score"])}
            entry["expected"] = [predicted([p], grid, row["renormalised"])[0] for p in row["score_probs"]]
            entry["cots"] = list(map(str, row["cots"])) if isinstance(row.get("cots"), list) else []
            entry["prompt"] = str(row.get("prompt") or "")  # may be anything, as may `cots`: nobody checked
            if files and files[0]["rows"][len(entries)]["prompt"] == entry["prompt"]:
                del entry["prompt"]  # the longest text, once is enough
            entries.append(entry)
        files.append({"path": path, "scores": [*grid.values, "off the grid"], "rows": entries})
    # Text stays text: autoescape sees to the HTML, tojson to the script tag, where it escapes <, >, & and '
    pages = Environment(loader=FileSystemLoader(ROOT / "tract"), autoescape=True)
    png = base64.b64encode(figure).decode()
    return pages.get_template("page.html").render(files=files, printed=printed.strip(), png=png)
