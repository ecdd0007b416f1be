"""The page report.html: what eval.py prints, its figure, and all records. Skip this file at first."""

import base64

from jinja2 import Environment, FileSystemLoader  # comes with torch

from tract.records import ROOT, predicted
from tract.scores import Predictions

FIELDS = ("id", "score", "prediction", "decoded", "finished", "score_probs", "off_grid")


def render(common: dict[str, Predictions], printed: str, figure: bytes) -> str:
    """Fill in page.html: a page that needs no other file. printed: by eval.py's show. figure: a PNG."""
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
