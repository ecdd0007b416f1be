"""CoT-RAIL: sample a CoT, then output the expected score Σ_v p(v | prompt, CoT) · v, not the decoded one.

    python predict.py --model out/run/stage2 --data test.jsonl --out out/run/predictions.jsonl

Works with any checkpoint or hub model, the untrained seed included; records need no score. --num-cots N takes
the mean over N CoTs, --no-cot reads the score after the prompt (plain RAIL), --given takes the records' CoTs.
"""

import json

import torch
from transformers import DynamicCache

import gen_cot
from gen_cot import READ, Cot, Judge, left_pad
from loss import Rail, rail
from tract import runs
from tract.encode import prefix_ids, prompt_ids
from tract.models import decode, score_logits
from tract.records import off_grid_line, predicted, significant


@torch.inference_mode()
def score(judge: Judge, texts: list[list[int]]) -> list[Rail]:
    """Read the score distribution after each text (prompt, CoT and suffix as ids) by a forward pass."""
    found = []
    while len(found) < len(texts):
        some = texts[len(found) :][: max(1, READ // max(map(len, texts)))]
        last = decode(judge.model, DynamicCache(), *left_pad(some))[:, -1]  # (B, D)
        scores = rail(score_logits(judge.model, last, judge.scores["score_ids"]), **judge.scores)
        found += [Rail(*(x[i].tolist() for x in scores)) for i in range(len(some))]
    return found


def main() -> None:
    parser = gen_cot.make_parser(__doc__, "out/stage2", "test.jsonl", "out/predictions.jsonl")
    add = parser.how_many.add_argument
    add("--no-cot", action="store_true", help="write no CoT: plain RAIL")
    add("--given", choices=("cot", "cots"), help="score the CoTs in this field, write none")
    parser.add_argument("--renormalise", action="store_true", help="divide by the mass on the grid")
    args = parser.parse_args()
    args.grid = runs.choose_grid(args)

    def given(record: dict) -> list[tuple[str, bool]]:
        if args.given == "cots":
            return list(zip(record["cots"], record["finished"], strict=True))
        return [(record["cot"], True)] if args.given else [("", True)] if args.no_cot else []

    def texts_of(judge: Judge, record: dict) -> list[list[int]]:
        prompt = prompt_ids(judge.tokenizer, record["prompt"])
        return [prefix_ids(judge.tokenizer, prompt, cot, args.grid) for cot, _ in given(record)] or [prompt]

    def answer(judge: Judge, records: list[dict], texts: list[list[list[int]]], at_once: int) -> list[dict]:
        if args.no_cot or args.given:
            pairs = [zip(given(r), own, strict=True) for r, own in zip(records, texts, strict=True)]
            judged = [[Cot(*cot, ids, None) for cot, ids in own] for own in pairs]
        else:
            judged = gen_cot.write_cots(judge, records, [prompt for (prompt,) in texts], args, at_once)
        unread = [cot.ids for cots in judged for cot in cots if cot.scores is None]
        fresh = iter(judge.model.score(judge, unread) if args.engine == "vllm" else score(judge, unread))
        judged = [[cot._replace(scores=cot.scores or next(fresh)) for cot in cots] for cots in judged]
        return [fields_of(cots) for cots in judged]

    def fields_of(cots: list[Cot]) -> dict:
        score_probs = [[significant(p) for p in cot.scores.probs] for cot in cots]
        prediction, decoded = predicted(score_probs, args.grid, args.renormalise)
        fields = {"cots": [cot.text for cot in cots], "finished": [cot.finished for cot in cots]}
        fields |= {"suffix": args.grid.suffix.strip(), "score_probs": score_probs}
        fields |= {"off_grid": [significant(cot.scores.off_grid) for cot in cots]}
        fields |= {"grid": str(args.grid), "renormalised": args.renormalise}
        return fields | {"prediction": prediction, "decoded": decoded}

    need = {None: (), "cot": ("cot",), "cots": ("cots", "finished")}[args.given]
    gen_cot.process_file(args, ("id", "prompt", *need), texts_of, answer)
    with open(args.out, "rb") as lines:
        rows = [json.loads(line) for line in lines]
    print(f"{args.out}: {off_grid_line(rows, args.grid)}")
    empty = [row["id"] for row in rows if row["prediction"] is None]
    runs.report(empty, "without any mass on the grid: nothing to renormalise, their prediction is null")


if __name__ == "__main__":
    runs.run(main)
