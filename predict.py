"""CoT-RAIL: sample a CoT, then output the expected score Σ_v p(v | prompt, CoT) · v instead of the decoded one.

    python predict.py --model out/run/stage2 --data test.jsonl --out out/run/predictions.jsonl

Works with any checkpoint or hub model, the untrained seed included; records need no score. With --num-cots N the prediction
is the mean over N CoTs. With --no-cot the score follows the prompt: plain RAIL. With --given the CoTs are those of the
records: annotated ones, or what another model wrote.
"""

import runs
from gen_cot import Judgement, Sampling, judge_file, make_parser
from records import Grid, predicted, significant


def predictions(judgement: Judgement, grid: Grid, *, renormalise: bool) -> dict:
    """The fields that a judgement adds to its record; see records.py for what each means."""
    score_probs = [[significant(p) for p in score.probs] for score in judgement.scores]
    prediction, decoded = predicted(score_probs, grid, renormalise=renormalise)
    return {
        "cots": judgement.cots,
        "finished": judgement.finished,
        "score_probs": score_probs,
        "off_grid": [significant(score.off_grid) for score in judgement.scores],
        "prediction": prediction,
        "decoded": decoded,
    }


def main() -> None:
    parser = make_parser(__doc__, model="out/stage2", data=str(runs.ROOT / "data/tiny/test.jsonl"), out="out/predictions.jsonl")
    group = parser.add_argument_group("prediction")
    without = group.add_mutually_exclusive_group()
    without.add_argument("--no-cot", action="store_true", help="write no CoT: plain RAIL")
    without.add_argument("--given", choices=("cot", "cots"), help="score the CoTs in this field, write none")
    group.add_argument(
        "--renormalise",
        action="store_true",
        help="divide the expected score by the mass on the grid; the paper does not",
    )
    args = vars(parser.parse_args())
    sampling = Sampling(**{name: args.pop(name) for name in Sampling._fields})
    if args.pop("no_cot"):
        sampling = Sampling(max_new_tokens=0)
    renormalise, given = args["renormalise"], args["given"]
    need = {None: (), "cot": ("cot",), "cots": ("cots", "finished")}[given]
    judge_file(
        **args, sampling=sampling, need=("id", "prompt", *need), with_scores=True,
        fields=lambda judgement, grid: predictions(judgement, grid, renormalise=renormalise),
    )  # fmt: skip


if __name__ == "__main__":
    runs.run(main)
