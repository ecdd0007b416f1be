"""CoT-RAIL: sample a CoT, then output the expected score Σ_v p(v | prompt, CoT) · v, not the decoded one.

    python predict.py --model out/run/stage2 --data test.jsonl --out out/run/predictions.jsonl

Works with any checkpoint or hub model, the untrained seed included; records need no score. --num-cots N takes
the mean over N CoTs, --no-cot reads the score after the prompt (plain RAIL), --given takes the records' CoTs.
"""

import json

from tract import runs
from tract.encode import prefix_ids, prompt_ids
from tract.files import Output, make_parser, read_data, tokenising
from tract.records import off_grid_line, predicted, significant
from tract.writing import Cot, load_judge, score, write_cots


def main() -> None:
    parser = make_parser(__doc__, model="out/stage2", data="test.jsonl", out="out/predictions.jsonl")
    add = parser.source_of_cots.add_argument
    add("--no-cot", action="store_true", help="write no CoT: plain RAIL")
    add("--given", choices=("cot", "cots"), help="score the CoTs in this field, write none")
    parser.add_argument("--renormalise", action="store_true", help="divide by the mass on the grid")
    args = parser.parse_args()
    args.grid = runs.choose_grid(args)
    output = Output(args)
    fields_of_cots = {None: (), "cot": ("cot",), "cots": ("cots", "finished")}[args.given]
    records = read_data(args, needs=("id", "prompt", *fields_of_cots))
    judge = load_judge(args.model, args.grid, args.bf16, args.engine, args.engine_args)
    lengths = {}
    prompts = {}  # where the judge is to write the CoTs
    given = {}  # or else the CoTs themselves
    for record in tokenising(records):
        id = record["id"]
        prompt = prompt_ids(judge.tokenizer, record["prompt"])
        if args.no_cot or args.given:
            given[id] = given_cots(judge.tokenizer, record, prompt, args)
            lengths[id] = max(len(cot.ids) for cot in given[id])
        else:
            prompts[id] = prompt
            lengths[id] = len(prompt)

    output.begin(judge, records, lengths)
    for chunk in output.chunks():
        with output.halving():  # if memory runs out, the chunk comes again with fewer sequences at a time
            if args.no_cot or args.given:
                judged = [given[record["id"]] for record in chunk]
            else:
                chunk_prompts = [prompts[record["id"]] for record in chunk]
                judged = write_cots(judge, chunk, chunk_prompts, args, output.at_once)
            unread = [cot for cots in judged for cot in cots if cot.scores is None]
            for cot, scores in zip(unread, score(judge, [cot.ids for cot in unread]), strict=True):
                cot.scores = scores  # of a CoT just written they are mostly there, from its last step
            for record, cots in zip(chunk, judged, strict=True):
                output.add(record, fields_of(cots, args))
    rows = [json.loads(line) for line in output.finish()]
    print(f"{args.out}: {off_grid_line(rows, args.grid)}")
    empty = [row["id"] for row in rows if row["prediction"] is None]
    runs.report(empty, "without any mass on the grid: nothing to renormalise, their prediction is null")


def given_cots(tokenizer, record: dict, prompt: list[int], args) -> list[Cot]:
    """Return the CoTs that a record brings, for --no-cot an empty one, without scores."""
    cots = [("", True)]  # --no-cot
    if args.given == "cot":
        cots = [(record["cot"], True)]
    if args.given == "cots":
        cots = zip(record["cots"], record["finished"], strict=True)
    return [Cot(text, finished, prefix_ids(tokenizer, prompt, text, args.grid)) for text, finished in cots]


def fields_of(cots: list[Cot], args) -> dict:
    """Return what predict.py adds to a record; the prediction is the mean over its CoTs."""
    score_probs = [[significant(p) for p in cot.scores.probs] for cot in cots]
    prediction, decoded = predicted(score_probs, args.grid, args.renormalise)
    return {
        "cots": [cot.text for cot in cots],
        "finished": [cot.finished for cot in cots],
        "suffix": args.grid.suffix.strip(),
        "score_probs": score_probs,
        "off_grid": [significant(cot.scores.off_grid) for cot in cots],
        "grid": str(args.grid),
        "renormalised": args.renormalise,
        "prediction": prediction,  # CoT-RAIL: Σ_v p(v) · v
        "decoded": decoded,  # the likeliest score
    }


if __name__ == "__main__":
    runs.run(main)
