"""Decide pairs by scores that were given one by one: accuracy, ties, and how sure the distributions are.

A pair has one chosen response and one or more others. Its credit is 1 where the chosen one alone has the
highest score, 1/k where it shares that with k − 1 others, else 0. A section's accuracy is the mean over its
pairs, weighted by `weight`; the total is the mean over sections. So counts RewardBench (arXiv 2403.13787).

    accuracy, ties           mean credit by the prediction; share of pairs whose chosen one shares the top
    decoded, ties_decoded    the same by the decoded score
    above, log_loss          mean P(chosen > other) under the two score distributions, ties counting one half,
                             and mean −log of it
"""

from collections.abc import Callable

import numpy as np

from tract import runs
from tract.records import InputError
from tract.report import table
from tract.scores import Predictions, count_tied, off_grid_line, read_run_json

NAMES = ("accuracy", "ties", "decoded", "ties_decoded", "above", "log_loss")


def evaluate(files: dict[str, Predictions], resamples: int, seed: int, interval_of: Callable) -> dict:
    """Return and print, for every file, how often the chosen response of a pair gets the higher score.

    interval_of: makes of samples (1 + resamples,) a value with its limits, as in eval.py. Raises InputError.
    """
    report = {"resamples": resamples, "seed": seed, "files": {}}
    pairs_of = {}  # path → name of a pair → its records
    for path, (rows, _) in files.items():
        pairs_of[path] = {pair[0]["pair"]: pair for pair in gather(rows, path)}
    common = set.intersection(*map(set, pairs_of.values()))
    if not common:
        raise InputError(f"{', '.join(files)}: no whole pair in common to evaluate")
    for path, (_, grid) in files.items():
        print(f"{path}: 95 % bootstrap intervals over pairs\n")
        too_long = read_run_json(path).get("too_long", 0)
        if too_long:
            print(f"{too_long} more records were too long to be judged")
        runs.report(pairs_of[path].keys() - common, "left out: not whole in all files", "pairs")
        pairs = [pair for name, pair in pairs_of[path].items() if name in common]
        judged = [row for pair in pairs for row in pair]
        off_grid = off_grid_line(judged, grid)
        print(f"likeliest score tied in {count_tied(judged)} of {len(judged)} records; {off_grid}\n")
        rows_of_table = []
        entries = []
        for section, subset, n, means in compare(pairs, resamples, seed):
            intervals = {name: interval_of(values) for name, values in zip(NAMES, means.T, strict=True)}
            rows_of_table.append([section, subset, n, *intervals.values()])
            entries.append({"section": section, "subset": subset, "pairs": n} | intervals)
        print(table(["section", "subset", "pairs", *NAMES], rows_of_table), end="")
        report["files"][path] = entries
    return report


def gather(rows: list[dict], path: str) -> list[list[dict]]:
    """Return the records of each pair, the chosen one first; name those left out. Raises InputError."""
    pairs = {}
    for row in rows:
        where = f"{path}: record {row['id']!r}"
        if not isinstance(row.get("chosen"), bool) or not isinstance(row.get("pair"), str):
            raise InputError(f"{where}: no 'pair' and 'chosen'; data/pairs/prepare.py makes such files")
        pair = pairs.setdefault(row["pair"], [])
        pair.append(row)
        for field in ("section", "subset", "weight", "pair_size"):
            if row.get(field) != pair[0].get(field):
                raise InputError(f"{where}: '{field}' differs within its pair; give both the same")
    whole = []
    broken = []
    without_prediction = []
    for name, pair in pairs.items():
        chosen = [row for row in pair if row["chosen"]]
        rejected = [row for row in pair if not row["chosen"]]
        is_whole = len(pair) == pair[0].get("pair_size", len(pair))
        if len(chosen) != 1 or not rejected or not is_whole:
            broken.append(name)
        elif any(row["prediction"] is None for row in pair):
            without_prediction.append(name)
        else:
            whole.append(chosen + rejected)
    runs.report(broken, f"of {path} left out: not one response is chosen, or one is missing", "pairs")
    runs.report(without_prediction, f"of {path} left out: a record has no prediction", "pairs")
    if not whole:
        raise InputError(f"{path}: no whole pair; predict.py has to judge all records of a pair")
    return whole


def beats(probs: np.ndarray, other: np.ndarray) -> float:
    """Return P(A > B) + P(A = B) / 2, where A and B have the score distributions `probs` and `other` (S,).

    Both are divided by their mass on the grid; one half where one has no mass.
    """
    if not probs.any() or not other.any():
        return 0.5
    probs = probs / probs.sum()
    other = other / other.sum()
    return float(probs @ (np.cumsum(other) - other / 2))  # Σ_v P(A = v) · (P(B < v) + P(B = v) / 2)


def judge(pair: list[dict]) -> list[float]:
    """Return what NAMES says of one pair, the chosen record first."""
    values = []
    for kind in ("prediction", "decoded"):
        scores = np.array([row[kind] for row in pair])
        winners = np.flatnonzero(scores == scores.max())
        credit = 1 / len(winners) if 0 in winners else 0.0
        values += [credit, float(0 < credit < 1)]
    probs = [np.mean(row["score_probs"], axis=0) for row in pair]  # (S,) each, mean over the CoTs
    above = np.array([beats(probs[0], other) for other in probs[1:]])
    return [*values, float(above.mean()), float(-np.log(above.clip(1e-7)).mean())]


def compare(pairs: list[list[dict]], resamples: int, seed: int) -> list[tuple]:
    """Return a group for each subset, then for each section of several subsets, then one for all pairs.

    A group: its section, its subset ("" for all of a section), its number of pairs, and the means of NAMES
    over them (1 + resamples, 6), on the data, then on each resample.
    """
    subsets = {}  # (section, subset, weight) → what NAMES says of each pair
    for pair in pairs:
        first = pair[0]
        key = (first.get("section", "all"), first.get("subset", "all"), first.get("weight", 1))
        subsets.setdefault(key, []).append(judge(pair))
    random = np.random.default_rng(seed)
    groups = []
    sections = {}  # section → number of pairs, their weight together, and means, of each of its subsets
    for (section, subset, weight), judged in subsets.items():
        n = len(judged)
        values = np.array(judged)  # (n, 6)
        means = [values[random.integers(0, n, n)].mean(0) for _ in range(resamples)]
        means = np.array([values.mean(0), *means])  # (1 + resamples, 6)
        groups.append((section, subset, n, means))
        sections.setdefault(section, []).append((n, weight * n, means))
    section_means = []
    for section, subsets_of_section in sections.items():
        sizes, weights, means = zip(*subsets_of_section, strict=True)
        section_means.append(np.average(means, axis=0, weights=weights))
        if len(sizes) > 1:
            groups.append((section, "", sum(sizes), section_means[-1]))
    groups.append(("total", "", len(pairs), np.mean(section_means, axis=0)))
    return groups
