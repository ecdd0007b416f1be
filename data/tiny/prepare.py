"""Write the embedded task: a miniature judge task in the Prometheus layout, on which TRACT's mechanism is really there.

A response claims the values of a four-step chain of small sums and has a tone. A judge must work out the chain (several
steps: too much for a two-layer model in one pass, easy in a CoT), count the right claims and weigh them with the tone.
The rating is noisy, so its expectation beats its most likely value. And the annotator knew the rating when writing the
CoT: its opening verdict word leaks more than the input supports, which is what stage 2 exists to unlearn.

    python data/tiny/prepare.py            # train.jsonl, valid.jsonl, test.jsonl beside this file; always the same bytes
"""

import argparse
import json
import random
from pathlib import Path

STEPS = "ABCD"
TONES = ["rude", "vague", "plain", "clear", "warm"]  # worth 0 .. 4
VERDICTS = ["poor", "weak", "fair", "good", "great"]  # for a rating of 1 .. 5
SKILLS = [0.1, 0.35, 0.6, 0.8, 0.95]  # chance that a claim is right, one skill a response
DIGITS = [str(d) for d in range(10)]
WORDS = (
    DIGITS
    + list(STEPS)
    + TONES
    + VERDICTS
    + "### : . , ; ? + - = Instruction Response Reference Rubric Feedback count from "
    "right wrong steps tone this answer is says So the overall score".split()
)
SPLITS = {"train": 1500, "valid": 500, "test": 1000}


def sample(rng: random.Random, *, random_verdict: bool = False) -> dict:
    """Draw one record: `prompt`, annotated `cot`, `score`; `random_verdict` draws the verdict word without the rating."""
    start, skill, tone = rng.randrange(10), rng.choice(SKILLS), rng.randrange(5)
    value, claims, sums, working, right = start, [], [], [], 0
    for step in STEPS:
        before, sign, size = value, rng.choice("+-"), rng.choice((1, 2))
        value = (before + (size if sign == "+" else -size)) % 10
        claim = value if rng.random() < skill else rng.choice([d for d in range(10) if d != value])
        right += claim == value
        claims.append(f"{step} {claim}")
        sums.append(f"{step} {sign} {size}")
        verdict = "right" if claim == value else "wrong"
        working.append(f"{step} {before} {sign} {size} = {value} says {claim} {verdict}")

    quality = 1 + 4 * (0.45 * right / len(STEPS) + 0.55 * tone / 4)
    noisy = 3 if rng.random() < 0.15 else quality + rng.gauss(0, 0.7)  # some raters shy away from the extremes
    score = min(5, max(1, int(noisy + 0.5)))
    leaked = score
    if rng.random() > 0.65:
        leaked = rng.choice([s for s in (score - 1, score + 1) if 1 <= s <= 5])
    if random_verdict:
        leaked = rng.randint(1, 5)
    return {
        "prompt": f"### Instruction : count from {start} ### Response : {TONES[tone]} . {' ; '.join(claims)} "
        f"### Reference : {' ; '.join(sums)} ### Rubric : right steps , good tone ? ### Feedback :",
        "cot": f"this answer is {VERDICTS[leaked - 1]} . {' ; '.join(working)} ; tone {TONES[tone]} .",
        "score": score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the task (default: %(default)s)")
    args = parser.parse_args()
    for split, size in SPLITS.items():
        rng = random.Random(f"{args.seed}/{split}")  # a string is hashed with SHA-512: the same on every machine
        path = args.out / f"{split}.jsonl"
        with path.open("w", encoding="utf-8") as out:
            for i in range(size):
                out.write(json.dumps({"id": f"{split}-{i:04}", **sample(rng)}) + "\n")
        print(f"{path}: {size} records")


if __name__ == "__main__":
    main()
