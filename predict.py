"""CoT-RAIL: sample a CoT, then output the expected score Σ_v p(v | prompt, CoT) · v, not the decoded one.

    python predict.py --model out/run/stage2 --data test.jsonl --out out/run/predictions.jsonl

Works with any checkpoint or hub model, the untrained seed included; records need no score. --num-cots N takes
the mean over N CoTs, --no-cot reads the score after the prompt (plain RAIL), --given takes the records' CoTs,
--renormalise divides by the mass on the grid.
"""

import json

from tract import intervals, runs
from tract.encode import prefix_ids, prompt_ids
from tract.files import Output, read_data, tokenising, writes_cots
from tract.options import choose_grid, make_writing_parser
from tract.records import off_grid_line, predicted, significant
from tract.writing import Cot, load_judge, score, write_cots

NEEDS = {  # --given → fields that records must have
    None: ("id", "prompt"),
    "cot": ("id", "prompt", "cot"),
    "cots": ("id", "prompt", "cots", "finished"),
}


def main() -> None:
    parser = make_writing_parser(__doc__, model="out/stage2", data="test.jsonl", out="out/predictions.jsonl")
    add = parser.source_of_cots.add_argument  # the group of --num-cots: they exclude each other
    add("--no-cot", action="store_true", help="write no CoT: plain RAIL")
    add("--given", choices=("cot", "cots"), help="score the CoTs in this field, write none")
    add = parser.add_argument_group("prediction").add_argument
    add("--renormalise", action="store_true", help="divide by the mass on the grid")
    add("--intervals", help="metrics.json of eval.py: adds `low` and `high` (docs/trust.md)")
    args = parser.parse_args()
    args.grid = choose_grid(args)
    args.intervals = intervals.read(args)
    output = Output(args)
    records = read_data(args, needs=NEEDS[args.given])
    judge = load_judge(args.model, args.grid, args.bf16, args.engine, args.engine_args)
    samples_cots = writes_cots(args)  # else they are given, or with --no-cot empty
    prompts = {}  # id → token ids
    ready_cots = {}  # id → CoTs that need no sampling
    lengths = {}  # id → tokens that are read before anything is sampled
    for record in tokenising(records):
        id = record["id"]
        prompts[id] = prompt_ids(judge.tokenizer, record["prompt"])
        if samples_cots:
            lengths[id] = len(prompts[id])
        else:
            ready_cots[id] = ready_cots_of(judge.tokenizer, record, prompts[id], args)
            lengths[id] = max(len(cot.ids) for cot in ready_cots[id])

    output.begin(judge, records, lengths)
    for chunk in output.chunks():
        with output.halving():  # out of memory: chunks() gives this chunk again, with a smaller at_once
            if samples_cots:
                chunk_prompts = [prompts[record["id"]] for record in chunk]
                chunk_cots = write_cots(judge, chunk, chunk_prompts, args, output.at_once)
            else:
                chunk_cots = [ready_cots[record["id"]] for record in chunk]
            # Where a sampled CoT reached the suffix, its score distribution came with it; the others lack it
            unscored = [cot for cots in chunk_cots for cot in cots if cot.scores is None]
            distributions = score(judge, [cot.ids for cot in unscored])
            for cot, distribution in zip(unscored, distributions, strict=True):
                cot.scores = distribution
            for record, cots in zip(chunk, chunk_cots, strict=True):
                output.add(record, fields_of(cots, args))
    lines = output.finish()  # of the whole file, with those of an earlier run
    rows = [json.loads(line) for line in lines]
    print(f"{args.out}: {off_grid_line(rows, args.grid)}")
    empty = [row["id"] for row in rows if row["prediction"] is None]
    runs.report(empty, "without any mass on the grid: nothing to renormalise, their prediction is null")


def ready_cots_of(tokenizer, record: dict, prompt: list[int], args) -> list[Cot]:
    """Return the CoTs that a record has (--given), for --no-cot an empty one, without scores."""
    if args.given == "cots":
        texts = record["cots"]
        finished = record["finished"]
    else:
        texts = [record["cot"]] if args.given == "cot" else [""]
        finished = [True]
    cots = []
    for text, is_finished in zip(texts, finished, strict=True):
        ids = prefix_ids(tokenizer, prompt, text, args.grid)  # prompt, CoT and suffix
        cots.append(Cot(text, is_finished, ids))
    return cots


def fields_of(cots: list[Cot], args) -> dict:
    """Return what predict.py adds to a record; the prediction is the mean over its CoTs."""
    # Round before computing, so that anyone can compute the prediction from the file
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
        "prediction": prediction,  # the mean of Σ_v p(v) · v over the CoTs
        "decoded": decoded,  # the mean of the likeliest scores
        **intervals.fields(prediction, args),
    }


if __name__ == "__main__":
    runs.run(main)
