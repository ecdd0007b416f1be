"""Write the embedded task: a miniature judge task, on which TRACT's mechanism is really there.

A response claims the values of a four-step chain of small sums and has a tone. A judge must work out the
chain (several steps: too much for a two-layer model in one pass, easy in a CoT), count the right claims and
weigh them with the tone. The rating is noisy, so its expectation beats its most likely value. And the
annotator knew the rating when writing the CoT: its opening verdict word leaks more than the input supports,
which is what stage 2 exists to unlearn.

    python data/tiny/prepare.py --out DIR                  # {train,valid,test,test_ood}.jsonl
    python data/tiny/prepare.py --out DIR --targets real   # the same with real-valued scores: *_real.jsonl

The same options always give the same bytes; those of the files beside this script are the defaults.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.prepare_helpers import check_new, write_records
from tract import runs

STEPS = "ABCD"
TONES = ["rude", "vague", "plain", "clear", "warm"]  # worth 0 .. 4
VERDICTS = ["poor", "weak", "fair", "good", "great"]  # for a rating of 1 .. 5
NOISE = 0.7  # standard deviation of a rating around its mean
LEAK = 0.65  # chance that the verdict word is the rating; else it is one off
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


class Judging(NamedTuple):
    """What is judged, and how the rater judges it. The defaults are those of the training split."""

    tone_draws: int = 1  # the tone is the best of so many draws
    weight: float = 0.45  # of the right claims in the quality; the rest is tone
    shy: float = 0.15  # how often the rater avoids the extremes and gives a 3
    offset: float = 0.0  # how much higher than the quality the rater's mean is


TRAINING = Judging()
SPLITS = {  # records, and how they are judged
    "train": (1500, TRAINING),
    "valid": (500, TRAINING),
    "test": (1000, TRAINING),
    "test_ood": (1000, Judging(tone_draws=2, weight=0.65, shy=0.0, offset=-0.5)),
}
TARGETS = {  # what `score` holds, of a draw
    "rating": lambda draw: draw["rating"],  # one rater's, a whole number
    # half-way to the consensus of many
    "real": lambda draw: round((draw["rating"] + draw["quality"]) / 2, 3),
    "rounded": lambda draw: int(TARGETS["real"](draw) + 0.5),
}


def quality(judging: Judging, right: int, tone: int) -> float:
    """Return the rater's mean, before it is clipped, for so many right claims and a tone of 0 to 4."""
    return judging.offset + 1 + 4 * (judging.weight * right / len(STEPS) + (1 - judging.weight) * tone / 4)


def sample(rng: random.Random, judging: Judging = TRAINING, *, random_verdict: bool = False) -> dict:
    """Draw prompt, annotated cot, rating and quality; a random verdict word does not know the rating."""
    start = rng.randrange(10)
    skill = rng.choice(SKILLS)
    tone = max(rng.randrange(5) for _ in range(judging.tone_draws))
    value = start
    claims = []
    sums = []
    working = []
    right = 0
    for step in STEPS:
        before = value
        sign = rng.choice("+-")
        size = rng.choice((1, 2))
        value = (before + (size if sign == "+" else -size)) % 10
        claim = value if rng.random() < skill else rng.choice([d for d in range(10) if d != value])
        verdict = "wrong"
        if claim == value:
            verdict = "right"
            right += 1
        claims.append(f"{step} {claim}")
        sums.append(f"{step} {sign} {size}")
        working.append(f"{step} {before} {sign} {size} = {value} says {claim} {verdict}")

    mean = quality(judging, right, tone)
    noisy = 3 if rng.random() < judging.shy else mean + rng.gauss(0, NOISE)
    rating = min(5, max(1, int(noisy + 0.5)))
    leaked = rating
    if rng.random() > LEAK:
        leaked = rng.choice([s for s in (rating - 1, rating + 1) if 1 <= s <= 5])
    if random_verdict:
        leaked = rng.randint(1, 5)
    return {
        "prompt": f"### Instruction : count from {start} ### Response : {TONES[tone]} . {' ; '.join(claims)} "
        f"### Reference : {' ; '.join(sums)} ### Rubric : right steps , good tone ? ### Feedback :",
        "cot": f"this answer is {VERDICTS[leaked - 1]} . {' ; '.join(working)} ; tone {TONES[tone]} .",
        "rating": rating,
        "quality": min(5.0, max(1.0, mean)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    add("--seed", type=int, default=0, help="random seed of the task")
    add("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="which to write")
    add("--size", type=runs.COUNT, help="records of each split; None: 1500, 500, 1000, 1000")
    add("--targets", choices=TARGETS, default="rating", help="what to put into `score`")
    args = parser.parse_args()
    suffix = "" if args.targets == "rating" else f"_{args.targets}"
    paths = {split: args.out / f"{split}{suffix}.jsonl" for split in args.splits}
    check_new(*paths.values())
    files = {}
    for split, path in paths.items():
        size, judging = SPLITS[split]
        # A string is hashed with SHA-512: the same on every machine
        rng = random.Random(f"{args.seed}/{split}")
        files[path] = []
        for i in range(args.size or size):
            draw = sample(rng, judging)
            record = {"id": f"{split}-{i:04}", "prompt": draw["prompt"], "cot": draw["cot"]}
            files[path].append(record | {"score": TARGETS[args.targets](draw)})
    write_records(files)
    for path, records in files.items():
        print(f"{path}: {len(records)} records")


if __name__ == "__main__":
    runs.run(main)
