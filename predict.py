"""CoT-RAIL: sample a CoT, then output the expected score Σ_v p(v | prompt, CoT) · v, not the decoded one.

    python predict.py --model out/run/stage2 --data test.jsonl --out out/run/predictions.jsonl

Works with any checkpoint or hub model, the untrained seed included; records need no score. --num-cots N takes
the mean over N CoTs, --no-cot reads the score after prompt and suffix (plain RAIL), --given takes the CoTs
of the records, --renormalise divides by the mass on the grid, --intervals adds how far to trust a score.
"""

import json

from tract import intervals, runs
from tract.files import Output, encode_prompts, has_to_sample, read_data
from tract.judge import NEEDS, predict_from, ready_cots_of
from tract.options import choose_grid, make_judging_parser
from tract.scores import off_grid_line
from tract.writing import load_judge, write_cots


def main() -> None:
    args = make_judging_parser(__doc__).parse_args()
    args.grid = choose_grid(args)  # a Grid: that of --grid, else the one that the judge was trained on
    args.intervals = intervals.read(args)  # until here a path, now that file's content, or None
    output = Output(args)
    records = read_data(args, needs=NEEDS[args.given])  # --given says which CoTs, if any
    judge = load_judge(args.model, args.grid, args.bf16, args.engine, args.engine_args)
    samples_cots = has_to_sample(args)  # not with --given, nor with --no-cot
    prompts = encode_prompts(judge.tokenizer, records)  # id → token ids
    lengths = {id: len(prompt) for id, prompt in prompts.items()}  # in tokens; of the prompt alone
    if not samples_cots:  # the model will read cot.ids: prompt, a CoT that is there (or none) and suffix
        for record in records:
            prompt_ids = prompts[record["id"]].tolist()
            cots = ready_cots_of(judge, record, prompt_ids, args.given)
            lengths[record["id"]] = max(len(cot.ids) for cot in cots)

    output.begin(judge, records, lengths)

    def judge_chunk(chunk: list[dict], at_once: int) -> list[dict]:
        """Return each record's new fields; sample at most `at_once` CoTs at a time."""
        chunk_prompts = [prompts[record["id"]].tolist() for record in chunk]
        if samples_cots:
            cots_of_chunk = write_cots(judge, chunk, chunk_prompts, args, at_once)
        else:
            cots_of_chunk = []
            for record, prompt_ids in zip(chunk, chunk_prompts, strict=True):
                cots_of_chunk.append(ready_cots_of(judge, record, prompt_ids, args.given))
        # CoT-RAIL (tract/judge.py): Σ_v p(v) · v after each CoT, then the mean over CoTs. p is that of
        # `rail` (loss.py), rounded to what --out holds, so that anyone can recompute the prediction
        return predict_from(judge, cots_of_chunk, args)

    output.write(judge_chunk)  # chunk after chunk; out of memory, it retries with a lower at_once
    lines = output.finish()  # all lines of the file, also those that an interrupted run wrote
    rows = [json.loads(line) for line in lines]
    print(f"{args.out}: {off_grid_line(rows, args.grid)}")
    empty = [row["id"] for row in rows if row["prediction"] is None]
    runs.report(empty, "without any mass on the grid: nothing to renormalise, their prediction is null")


if __name__ == "__main__":
    runs.run(main)
