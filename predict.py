"""CoT-RAIL: sample a CoT, then output the expected score Σ_v p(v | prompt, CoT) · v, not the decoded one.

    python predict.py --model out/run/stage2 --data test.jsonl --out out/run/predictions.jsonl

Works with any checkpoint or hub model, the untrained seed included; records need no score. --num-cots N takes
the mean over N CoTs, --no-cot reads the score after the prompt (plain RAIL), --given takes the records' CoTs,
--renormalise divides by the mass on the grid.
"""

import json

from tract import runs
from tract.encode import prefix_ids, prompt_ids
from tract.files import Output, read_data, tokenising, writes_cots
from tract.options import choose_grid, make_writing_parser
from tract.records import off_grid_line, predicted, significant
from tract.writing import Cot, load_judge, score, write_cots


def main() -> None:
    parser = make_writing_parser(__doc__, model="out/stage2", data="test.jsonl", out="out/predictions.jsonl")
    add = parser.source_of_cots.add_argument  # the group of --num-cots: they exclude each other
    add("--no-cot", action="store_true", help="write no CoT: plain RAIL")
    add("--given", choices=("cot", "cots"), help="score the CoTs in this field, write none")
    parser.add_argument("--renormalise", action="store_true", help="divide by the mass on the grid")
    args = parser.parse_args()
    args.grid = choose_grid(args)
    output = Output(args)
    needs = ["id", "prompt"]
    if args.given:
        needs.append(args.given)
    if args.given == "cots":
        needs.append("finished")
    records = read_data(args, needs=tuple(needs))
    judge = load_judge(args.model, args.grid, args.bf16, args.engine, args.engine_args)
    writes = writes_cots(args)
    prompts = {}  # id → token ids
    given = {}  # id → CoTs that need no writing
    lengths = {}  # id → tokens that are read before anything is written
    for record in tokenising(records):
        id = record["id"]
        prompts[id] = prompt_ids(judge.tokenizer, record["prompt"])
        if writes:
            lengths[id] = len(prompts[id])
        else:
            given[id] = given_cots(judge.tokenizer, record, prompts[id], args)
            lengths[id] = max(len(cot.ids) for cot in given[id])

    output.begin(judge, records, lengths)
    for chunk in output.chunks():
        with output.halving():  # catches that memory runs out: the next chunk is this one, in smaller batches
            if writes:
                chunk_prompts = [prompts[record["id"]] for record in chunk]
                chunk_cots = write_cots(judge, chunk, chunk_prompts, args, output.at_once)
            else:
                chunk_cots = [given[record["id"]] for record in chunk]
            # CoTs that reached the suffix mostly come with their scores; unfinished and given ones are read
            unread = [cot for cots in chunk_cots for cot in cots if cot.scores is None]
            scores_of_unread = score(judge, [cot.ids for cot in unread])
            for cot, scores in zip(unread, scores_of_unread, strict=True):
                cot.scores = scores
            for record, cots in zip(chunk, chunk_cots, strict=True):
                output.add(record, fields_of(cots, args))
    lines = output.finish()  # of the whole file, with those of an earlier run
    rows = [json.loads(line) for line in lines]
    print(f"{args.out}: {off_grid_line(rows, args.grid)}")
    empty = [row["id"] for row in rows if row["prediction"] is None]
    runs.report(empty, "without any mass on the grid: nothing to renormalise, their prediction is null")


def given_cots(tokenizer, record: dict, prompt: list[int], args) -> list[Cot]:
    """Return the CoTs that a record brings, for --no-cot an empty one, without scores."""
    texts = [""]  # --no-cot
    finished = [True]
    if args.given == "cot":
        texts = [record["cot"]]
    if args.given == "cots":
        texts = record["cots"]
        finished = record["finished"]
    cots = []
    for text, is_finished in zip(texts, finished, strict=True):
        ids = prefix_ids(tokenizer, prompt, text, args.grid)  # prompt, CoT and suffix
        cots.append(Cot(text, is_finished, ids))
    return cots


def fields_of(cots: list[Cot], args) -> dict:
    """Return what predict.py adds to a record; the prediction is the mean over its CoTs."""
    # Rounded first: the prediction can be computed from what the file holds
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
    }


if __name__ == "__main__":
    runs.run(main)
