"""What eval.py reads: files of predictions, their grids, what is in them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from tract.hub import read_json, sha256
from tract.records import Grid, InputError, check_file, parse_line, predicted, read_records

OFF_GRID = 0.05  # mean off-grid mass above which predictions are not on the scale any more


class Predictions(NamedTuple):
    """Hold records of a file of predict.py, and the score grid that they are on."""

    rows: list[dict]
    grid: Grid


def read_predictions(path: str, grid: str | None, cots: int | None, renormalise: bool) -> Predictions:
    """Read a file of predict.py, as it would be with other values of its grid, fewer CoTs, or renormalised.

    grid: the same tokens with these values; cots: use the first so many; renormalise: divide each expected
    score by its mass on the grid. Raises InputError, with what is wrong and where.
    """
    written = grid_of(path)
    wanted = Grid.parse(grid) if grid else written
    if wanted.tokens != written.tokens:
        raise InputError(f"--grid {grid}: {path} is on {written}; give the same scores, with other values")
    need = ("id", "prediction", "decoded", "score_probs", "off_grid", "finished", "grid")
    rows = read_records(path, wanted, need)
    text_of_grid = rows[0]["grid"]
    was_renormalised = rows[0].get("renormalised", False)
    for row in rows:
        if row["grid"] != text_of_grid or row.get("renormalised", False) != was_renormalised:
            differs = "'grid' or 'renormalised' differs from the first record's"
            raise InputError(f"{path}: record {row['id']!r}: {differs}; evaluate the two kinds apart")
        row["renormalised"] = was_renormalised or renormalise
        if cots and cots > len(row["finished"]):
            raise InputError(f"{path}: record {row['id']!r} has fewer CoTs than --cots {cots}")
        for field in ("finished", "score_probs", "off_grid"):
            row[field] = row[field][:cots]
        if grid or cots or renormalise:
            row["prediction"], row["decoded"] = predicted(row["score_probs"], wanted, row["renormalised"])
    return Predictions(rows, wanted)


def grid_of(path: str) -> Grid:
    """Return the grid that the first row of a file of predict.py names. Raises InputError, with path:line."""
    if path.encode(errors="replace").decode() != path:
        raise InputError(f"{path}: its name is not UTF-8, as metrics.json is; rename it")
    check_file(path, "a JSONL file of predict.py")
    with open(path, "rb") as lines:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        number, first = next(numbered, (1, b"{}"))
    where = f"{path}:{number}"
    text = parse_line(first, where).get("grid")
    if not isinstance(text, str):
        return Grid()  # read_records says that it names none
    try:
        return Grid.parse(text)
    except InputError as error:
        raise InputError(f"{where}: its 'grid' is none ({error}); judge anew with predict.py") from None


def read_run_json(path: str) -> dict:
    """Return arguments and facts of NAME.run.json, if it is of this file: `x` and `x.jsonl` share it."""
    run = read_json(Path(f"{path.removesuffix('.jsonl')}.run.json"))
    arguments = run.get("arguments")
    if not isinstance(arguments, dict):
        return {}
    belongs = Path(str(arguments.get("out", path))).name == Path(path).name
    facts = {"inputs": run.get("inputs", {}), "too_long": run.get("too_long", 0)}
    return arguments | facts if belongs else {}


def keep_common(files: dict[str, Predictions]) -> dict[str, Predictions]:
    """Return, for each path, only the records that have a score and a prediction in every file.

    Raises InputError where there is no such record, or where the files do not agree on the true scores.
    """
    usable = {}  # path → id → record
    for path, (rows, _) in files.items():
        usable[path] = {}
        for row in rows:
            if row.get("score") is not None and row["prediction"] is not None:
                usable[path][row["id"]] = row
    first = next(iter(files))
    in_all_files = set.intersection(*map(set, usable.values()))
    ids = [id for id in usable[first] if id in in_all_files]
    if not ids:
        raise InputError(f"{', '.join(files)}: no record with score and prediction in common to evaluate")
    common = {}
    for path, (_, grid) in files.items():
        common[path] = Predictions([usable[path][id] for id in ids], grid)
        if any(usable[path][id]["score"] != usable[first][id]["score"] for id in ids):
            raise InputError(f"{path}: its true scores differ from those of {first}; compare the same data")
    return common


def facts_of_file(path: str, file: Predictions, common: Predictions) -> dict:
    """Return what a file is, how many of its records are not in `common` and why, and how sound those are."""
    rows, grid = common
    scored = [row for row in file.rows if row.get("score") is not None]
    predicted_too = [row for row in scored if row["prediction"] is not None]
    finished = [flag for row in rows for flag in row["finished"]]
    return {
        "sha256": sha256(path),
        "grid": str(grid),
        "renormalised": rows[0]["renormalised"],
        "records": len(file.rows),
        "too_long": read_run_json(path).get("too_long", 0),
        "cots": len(finished),
        "without_score": len(file.rows) - len(scored),
        "without_prediction": len(scored) - len(predicted_too),
        "not_in_all_files": len(predicted_too) - len(rows),
        "unfinished_rate": finished.count(False) / len(finished),
        "tied_likeliest": count_tied(rows),
        "off_grid_mean": float(np.mean([mass for row in rows for mass in row["off_grid"]])),
        "reliability": reliability(rows, grid),
    }


def groups_of(rows: list[dict], field: str) -> list[str]:
    """Return which group each record is of, as this field of it says. Raises InputError."""
    groups = []
    for row in rows:
        if type(row.get(field)) not in (str, int):
            what = f"record {row['id']!r} has no text or whole number there"
            raise InputError(f"--group {field}: {what}; give a field that all have")
        groups.append(str(row[field]))
    if len(set(groups)) < 2:
        raise InputError(f"--group {field}: all records are of one group, {groups[0]!r}; leave it out")
    return groups


def count_tied(rows: list[dict]) -> int:
    """Return in how many records several scores are equally likely, and likeliest, after one of the CoTs."""
    return len([row for row in rows if any(probs.count(max(probs)) > 1 for probs in row["score_probs"])])


def off_grid_line(rows: list[dict], grid: Grid) -> str:
    """Return a line on the mean off-grid mass of judged records, with what to do where predictions suffer.

    rows: as predict.py writes them. What was not renormalised lies lower by the mass off the grid.
    """
    off_grid = [sum(row["off_grid"]) / len(row["off_grid"]) for row in rows]
    mean = sum(off_grid) / len(rows)
    line = f"mean off-grid mass {mean:.4f}"
    if any(row["renormalised"] for row in rows):
        return line
    below = 0
    for row, mass in zip(rows, off_grid, strict=True):
        if mass > OFF_GRID and row["prediction"] < grid.values[0]:
            below += 1
    if mean <= OFF_GRID and not below:
        return line
    line += ": as much of every score is missing"
    if below:
        line += f"; {below} predictions lie below {grid.values[0]:g}"
    return f"{line}. --renormalise divides by the mass on the grid"


def reliability(rows: list[dict], grid: Grid) -> list[dict]:
    """Return, for each score and bin of its probability, how often it was the (nearest) true score."""
    bins = 10
    probs = np.array([np.mean(row["score_probs"], axis=0) for row in rows])  # (n, S), mean over the CoTs
    true = np.array([grid.nearest(row["score"]) for row in rows])  # (n,)
    bin_numbers = np.minimum((probs * bins).astype(int), bins - 1)  # (n, S)
    points = []
    for s, token in enumerate(grid.tokens):
        for bin_number in np.unique(bin_numbers[:, s]):
            inside = bin_numbers[:, s] == bin_number
            point = {"score": token, "n": int(inside.sum()), "predicted": float(probs[inside, s].mean())}
            points.append(point | {"observed": float((true[inside] == s).mean())})
    return points
