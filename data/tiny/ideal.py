"""The best possible judges of the embedded task, with no training: expectations under the model that drew it.

Three know different things, and a trained judge can at best become one of them:

    no-cot     E[score | tone]: the chain was not worked out
    one-stage  E[score | right claims, tone, verdict] with a verdict drawn from p(verdict | tone): it takes
               the verdict word for the annotator's, as training on annotated CoTs teaches it, and has to
               write that word itself
    two-stage  E[score | right claims, tone]: it knows that its own verdict is worth nothing

They know how the training split is judged, on whichever split they are asked.

    python data/tiny/ideal.py data/tiny/test.jsonl data/tiny/test_ood.jsonl     # Pearson's r and RMSE of each
"""

import math
import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.tiny.prepare import LEAK, NOISE, SKILLS, STEPS, TONES, TRAINING, quality
from eval import METRICS
from tract import runs
from tract.records import Grid, InputError, read_records

RATINGS = np.arange(1, 6)


def rating_probs(right: int, tone: int) -> np.ndarray:
    """Return p(rating | right claims, tone), (5,): a normal around the quality, and the shy rater's 3."""
    mean = quality(TRAINING, right, tone)
    edges = [-math.inf, 1.5, 2.5, 3.5, 4.5, math.inf]
    below = np.array([0.5 * (1 + math.erf((edge - mean) / (NOISE * math.sqrt(2)))) for edge in edges])
    return np.where(RATINGS == 3, TRAINING.shy, 0) + (1 - TRAINING.shy) * np.diff(below)


def right_probs() -> np.ndarray:
    """Return p(number of right claims), (5,): a binomial for each skill, all equally likely."""
    n = len(STEPS)
    counts = range(n + 1)
    return np.array([np.mean([math.comb(n, r) * s**r * (1 - s) ** (n - r) for s in SKILLS]) for r in counts])


def verdict_probs(rating: int) -> np.ndarray:
    """Return p(verdict | rating), (5,): mostly the rating itself, else one off."""
    one_off = np.abs(RATINGS - rating) == 1
    probs = np.zeros(len(RATINGS))
    probs[RATINGS == rating] = LEAK
    probs[one_off] = (1 - LEAK) / one_off.sum()
    return probs


VERDICT_PROBS = np.array([verdict_probs(rating) for rating in RATINGS])  # rows are ratings


def predict(record: dict, *, real: bool = False) -> dict[str, float]:
    """Return what the ideal judges predict for a record; `real` for targets half-way to the consensus."""
    tone = next(t for t, word in enumerate(TONES) if f"Response : {word} ." in record["prompt"])
    right = record["cot"].count(" right")

    def expected(probs: np.ndarray, right: int) -> float:
        rating = float(probs @ RATINGS)
        return (rating + quality(TRAINING, right, tone)) / 2 if real else rating

    by_right = [rating_probs(r, tone) for r in range(len(STEPS) + 1)]
    verdicts = right_probs() @ np.array(by_right) @ VERDICT_PROBS
    verdict = random.Random(record["id"]).choices(range(5), verdicts)[0]
    posterior = by_right[right] * VERDICT_PROBS[:, verdict]
    return {
        "no-cot": float(right_probs() @ [expected(probs, r) for r, probs in enumerate(by_right)]),
        "one-stage": expected(posterior / posterior.sum(), right),
        "two-stage": expected(by_right[right], right),
    }


def metrics(path: str | Path) -> dict[str, dict[str, float]]:
    """Return Pearson's r and RMSE of each ideal judge on a file of the task; NAME_real has real targets."""
    rows = read_records(path, Grid(), need=("id", "prompt", "cot", "score"))
    true = np.array([row["score"] for row in rows], dtype=float)
    predicted = [predict(row, real=Path(path).stem.endswith("_real")) for row in rows]
    columns = {name: np.array([p[name] for p in predicted]) for name in predicted[0]}
    return {name: {m: METRICS[m](p, true) for m in ("pearson", "rmse")} for name, p in columns.items()}


def main() -> None:
    if not sys.argv[1:]:
        raise InputError("give files of the task, as data/tiny/test.jsonl")
    for path in sys.argv[1:]:
        for name, values in metrics(path).items():
            print(f"{path}  {name:10} r {values['pearson']:.3f}  RMSE {values['rmse']:.3f}")


if __name__ == "__main__":
    runs.run(main)
