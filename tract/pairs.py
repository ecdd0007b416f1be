"""Decide pairs by scores that were given one by one: accuracy, ties, and how sure the distributions are.

A pair has one chosen response and one or more others. Its credit is 1 where the chosen one alone has the
highest score, 1/k where it shares that with k − 1 others, else 0. A section's accuracy is the mean over its
pairs, weighted by `weight`; the total is the mean over sections. So counts RewardBench (arXiv 2403.13787).

    accuracy, ties           mean credit by the prediction; share of pairs whose chosen one shares the top
    decoded, ties_decoded    the same by the decoded score
    above, log_loss          mean P(chosen > other) under the two score distributions, ties counting one half,
                             and mean −log of it
"""

import numpy as np

from tract import runs
from tract.records import InputError

NAMES = ("accuracy", "ties", "decoded", "ties_decoded", "above", "log_loss")


def gather(rows: list[dict], path: str) -> list[list[dict]]:
    """Return the records of each pair, the chosen one first; name those left out. Raises InputError."""
    pairs = {}
    for row in rows:
        where = f"{path}: record {row['id']!r}"
        if not isinstance(row.get("chosen"), bool) or not isinstance(row.get("pair"), str):
            raise InputError(f"{where}: no 'pair' and 'chosen'; data/pairs/prepare.py makes such files")
        pair = pairs.setdefault(row["pair"], [])
        pair.append(row)
        for field in ("section", "subset", "weight"):
            if row.get(field) != pair[0].get(field):
                raise InputError(f"{where}: '{field}' differs within its pair; give both the same")
    broken = {name for name, pair in pairs.items() if [row["chosen"] for row in pair].count(True) != 1}
    broken |= {name for name, pair in pairs.items() if len(pair) == 1}
    runs.report(broken, "without one chosen and one other response left out", "pairs")
    unread = {name for name, pair in pairs.items() if any(row["prediction"] is None for row in pair)}
    runs.report(unread - broken, "with a record without prediction left out", "pairs")
    whole = [pair for name, pair in pairs.items() if name not in broken | unread]
    if not whole:
        raise InputError(f"{path}: no whole pair; predict.py has to judge all records of a pair")
    return [sorted(pair, key=lambda row: not row["chosen"]) for pair in whole]


def beats(a: np.ndarray, b: np.ndarray) -> float:
    """Return P(A > B) + P(A = B) / 2 for two score distributions (S,); one half where one has no mass."""
    if not (a.any() and b.any()):
        return 0.5
    a, b = a / a.sum(), b / b.sum()
    return float(a @ (np.cumsum(b) - b / 2))


def judge(pair: list[dict]) -> list[float]:
    """Return what NAMES says of one pair, the chosen record first."""
    found = []
    for kind in ("prediction", "decoded"):
        scores = np.array([row[kind] for row in pair])
        best = scores == scores.max()
        found += [best[0] / best.sum(), float(best[0] and best.sum() > 1)]
    probs = [np.mean(row["score_probs"], axis=0) for row in pair]
    above = np.array([beats(probs[0], other) for other in probs[1:]])
    return [*found, float(above.mean()), float(-np.log(above.clip(1e-7)).mean())]


def compare(pairs: list[list[dict]], resamples: int, seed: int) -> list[tuple[str, str, int, dict]]:
    """Return section, subset, number of pairs and values of NAMES, for subsets, then sections, then in total.

    subset is "" where all of a section is meant. Values (1 + resamples,): on the data and on resampled pairs.
    """
    random, subsets, sections = np.random.default_rng(seed), {}, {}
    for pair in pairs:
        first = pair[0]
        key = first.get("section", "all"), first.get("subset", "all"), first.get("weight", 1)
        subsets.setdefault(key, []).append(judge(pair))
    found = []
    for (section, subset, weight), values in subsets.items():
        values, n = np.array(values), len(values)  # (n, 6)
        picks = np.concatenate([np.arange(n)[None], random.integers(0, n, (resamples, n))])
        found.append((section, subset, n, values[picks].mean(1)))  # (1 + resamples, 6)
        sections.setdefault(section, []).append((n, weight * n, found[-1][-1]))
    means = {name: sum(w * m for _, w, m in of) / sum(w for _, w, _ in of) for name, of in sections.items()}
    found += [(name, "", sum(n for n, *_ in of), means[name]) for name, of in sections.items() if len(of) > 1]
    found.append(("total", "", sum(map(len, subsets.values())), sum(means.values()) / len(means)))
    return [(*names, dict(zip(NAMES, means.T, strict=True))) for *names, means in found]
