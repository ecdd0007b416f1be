"""CoT-RAIL: sample a CoT, then output the expected score Σ_v p(v | prompt, CoT) · v instead of the decoded one.

    python predict.py --model out/run/stage2 --data test.jsonl --out out/run/predictions.jsonl

Works with any checkpoint or hub model, the untrained seed included; records need no score. With --num-cots N the prediction
is the mean over N CoTs. With --no-cot the score follows the prompt: plain RAIL.
"""

import records
from gen_cot import Judgement, Sampling, judge_file, make_parser
from records import Grid


def predictions(judgement: Judgement, grid: Grid, *, renormalise: bool) -> dict:
    """The fields that a judgement adds to its record; see records.py for what each means."""
    expected, decoded = [], []
    for score in judgement.scores:
        expected.append(score.expected / (sum(score.probs) if renormalise else 1))
        decoded.append(grid.values[score.probs.index(max(score.probs))])
    return {
        "cots": judgement.cots,
        "finished": judgement.finished,
        "score_probs": [[significant(p) for p in score.probs] for score in judgement.scores],
        "off_grid": [significant(score.off_grid) for score in judgement.scores],
        "prediction": significant(sum(expected) / len(expected)),
        "decoded": sum(decoded) / len(decoded),
    }


def significant(number: float) -> float:
    """Seven digits, which is what fp32 holds: the files stay readable."""
    return float(f"{number:.7g}")


def main() -> None:
    parser = make_parser(
        __doc__, model="out/stage2", data=str(records.ROOT / "data/tiny/test.jsonl"), out="out/predictions.jsonl"
    )
    group = parser.add_argument_group("prediction")
    group.add_argument("--no-cot", action="store_true", help="write no CoT: plain RAIL")
    group.add_argument(
        "--renormalise",
        action="store_true",
        help="divide the expected score by the mass on the grid; the paper does not",
    )
    args = vars(parser.parse_args())
    sampling = Sampling(**{name: args.pop(name) for name in Sampling._fields})
    if args.pop("no_cot"):
        sampling = Sampling(max_new_tokens=0)
    renormalise = args["renormalise"]
    judge_file(
        **args, sampling=sampling, need=("id", "prompt"), with_scores=True,
        fields=lambda judgement, grid: predictions(judgement, grid, renormalise=renormalise),
    )  # fmt: skip


if __name__ == "__main__":
    records.run(main)
