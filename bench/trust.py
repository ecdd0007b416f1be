"""Print what 90 % intervals are worth on results/real, constant or scaled: the table of docs/trust.md.

A half of a seed's test records calibrates, the other is judged: means over 200 random halves and three seeds.
Scaled intervals are wide where the standard deviation of the (renormalised) score distribution is large.
"""

import itertools

import numpy as np
from ablations import predictions

from tract.intervals import half_width
from tract.records import ROOT


def measure(task: str, row: str, kind: str) -> str:
    """Return a line of the table; score: Gneiting and Raftery (2007), lower is better."""
    found = []  # inside, inside in each third of the predictions, width, score
    for seed in (1, 2, 3):
        probs, true, values = predictions(f"{ROOT}/results/real/{task}/seed{seed}", f"{row}.test")
        predicted = probs[:, 0] @ values
        p = probs[:, 0] / probs[:, 0].sum(-1, keepdims=True)
        scale = np.sqrt(p @ values**2 - (p @ values) ** 2) if kind == "scaled" else np.ones(len(true))
        errors = np.abs(true - predicted) / scale
        for shuffle in range(200):
            half, other = np.array_split(np.random.default_rng(shuffle).permutation(len(true)), 2)
            reach = half_width(errors[half], 90) * scale
            low, high = np.clip([predicted - reach, predicted + reach], values[0], values[-1])
            missed = np.maximum(low - true, 0) + np.maximum(true - high, 0)
            thirds = np.array_split(other[np.argsort(predicted[other])], 3)
            inside = [np.mean(missed[group] == 0) for group in (other, *thirds)]
            found.append([*inside, np.mean((high - low)[other]), np.mean((high - low + 20 * missed)[other])])
    return f"| {task}, {row} | {kind} | {' | '.join(f'{mean:.2f}' for mean in np.mean(found, 0))} |"


if __name__ == "__main__":
    for names in itertools.product(("ists", "feedbackqa"), ("tract", "raft", "a1"), ("constant", "scaled")):
        print(measure(*names))
