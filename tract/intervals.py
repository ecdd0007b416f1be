"""How far to trust a score: split conformal intervals around it (docs/trust.md). No torch here.

The half-width is the ⌈(n + 1) · level⌉-th smallest |prediction − true score| of n records: an exchangeable
one, judged in the same way, is off by no more with a probability of at least `level`.
"""

import math
from pathlib import Path

import numpy as np

from tract import hub
from tract.records import Grid, InputError, significant
from tract.scores import Predictions, read_run_json
from tract.settings import arguments

LEAST = {80: 4, 90: 9}  # level in % → fewest errors that give it: from there on ⌈(n + 1) · level⌉ ≤ n
WAY = "suffix no_cot given max_new_tokens temperature top_p repetition_penalty".split()  # options that count


def half_width(errors: np.ndarray, level: int) -> float | None:
    """Return the half-width at `level` % by absolute errors (n,); None where they are too few for it."""
    rank = math.ceil((len(errors) + 1) * level / 100)
    return float(np.sort(errors)[rank - 1]) if len(errors) >= LEAST[level] else None


def calibrate(path: str, file: Predictions, seed: int, groups: list) -> dict:
    """Return the half-widths by all n records, and how those by one half of them fare on the other.

    inside: the share of true scores in their interval. A level for which half of the groups are too few is
    None. way: how these were judged, as far as rows and NAME.run.json say. groups: which group each record is
    of; a group is on one half as a whole, and counts as one where a level needs so many.
    """
    rows, grid = file
    predictions = np.array([row["prediction"] for row in rows], dtype=float)
    errors = np.abs(predictions - [row["score"] for row in rows])
    drawn = np.random.default_rng(seed).permutation(np.unique(groups))
    groups_of_half = drawn[(len(drawn) + 1) // 2 :]
    in_half = np.isin(groups, groups_of_half)
    run = read_run_json(path)
    way = {name: run[name] for name in WAY if name in run}
    way |= {name: value for name, value in run.get("inputs", {}).items() if name != "data"}
    way |= {"grid": str(grid), "renormalise": rows[0]["renormalised"], "num_cots": len(rows[0]["finished"])}
    found = {"n": len(rows), "way": way, "80 %": None, "90 %": None}
    for level, least in LEAST.items():
        if len(groups_of_half) >= least:
            reach = half_width(errors[in_half], level)
            inside = float(np.mean(errors[~in_half] <= reach))
            found[f"{level} %"] = {"half_width": half_width(errors, level), "inside": inside}
    return found


def line(found: dict) -> str:
    """Return what `calibrate` found, in a line."""
    texts = []
    for level in ("80 %", "90 %"):
        text = "too few records"
        if found[level]:
            text = "± {half_width:.3g}, on the other half {inside:.1%} inside".format(**found[level])
        texts.append(f"{level}: {text}")
    return f"intervals for records like these: {'; '.join(texts)}"


def read(args) -> dict | None:
    """Read --intervals; refuse those of predictions that were made in another way. Raises InputError."""
    if args.intervals is None:
        return None
    name = f"--intervals {args.intervals}"
    try:
        (entry,) = hub.read_json(Path(args.intervals))["files"].values()
        found = entry["intervals"]
        way = dict(found["way"])
        n = found["n"]
        at_90 = found["90 %"]
        if at_90 is not None:
            float(at_90["half_width"])  # which `fields` will read
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{name}: no metrics.json of one judge; let eval.py make it of one file") from None
    asked = arguments(args)
    hub.folder_of(args.model)  # fetches the small files of a hub model, which identify it
    for group, model in (("model", args.model), ("base", hub.base_of(args.model))):
        asked |= {f"{group} {file}": value for file, value in hub.identity(model).items()}
    if args.given == "cots":
        way.pop("num_cots", None)  # then the records say how many
    for option, value in way.items():
        if asked.get(option) != value:
            what = f"{option} was {value!r:.40}, is {asked.get(option)!r:.40}"
            raise InputError(f"{name}: {what}; calibrate with predictions made in the same way")
    if at_90 is None:
        print(f"{name}: {n} records are too few for 90 %: low and high will be null")
    return found


def fields(prediction: float | None, calibration: dict | None, grid: Grid) -> dict:
    """Return what --intervals adds to a record: the ends of the 90 % interval, null where there is none."""
    if calibration is None:
        return {}
    if prediction is None or not calibration["90 %"]:
        return {"low": None, "high": None}
    reach = calibration["90 %"]["half_width"]
    low, high = np.clip([prediction - reach, prediction + reach], grid.values[0], grid.values[-1])
    return {"low": significant(low), "high": significant(high)}
