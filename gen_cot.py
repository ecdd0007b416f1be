"""Self-generated CoTs: p_s writes a CoT for every training prompt; its score is dropped, the true one kept.

    python gen_cot.py --model out/run/stage1 --data train.jsonl --out out/run/cots.jsonl

p_s, trained on annotated CoTs in stage 1, has to judge by its own. So stage 2 learns from those: each record
gets a CoT as p_s samples it, good or bad, and keeps its true score. With --num-cots N it gets N,
each an example of its own in stage 2. A CoT ends where it reaches the suffix ("So the overall score is"); one
that ends otherwise is marked as not `finished`, and stage 2 leaves it out.

After an interruption the same command goes on. The sampling is tract/writing.py, the files tract/files.py.
"""

from tract import runs
from tract.encode import encode_prompt
from tract.files import Output, read_data, tokenising
from tract.options import choose_grid, make_writing_parser
from tract.writing import load_judge, write_cots


def main() -> None:
    parser = make_writing_parser(__doc__, model="out/stage1", data="train.jsonl", out="out/cots.jsonl")
    args = parser.parse_args()
    args.grid = choose_grid(args)  # a Grid: that of --grid, else the one that p_s was trained on
    output = Output(args)
    records = read_data(args, needs=("id", "prompt", "score"))
    p_s = load_judge(args.model, args.grid, args.bf16, args.engine, args.engine_args)
    prompts = {}  # id → token ids
    for record in tokenising(records):
        prompts[record["id"]] = encode_prompt(p_s.tokenizer, record["prompt"])

    lengths = {id: len(prompt) for id, prompt in prompts.items()}
    output.begin(p_s, records, lengths)  # drops what is too long, goes on after the records already written
    for chunk in output.chunks():
        with output.halving():  # out of memory: chunks() gives this chunk again, with a smaller at_once
            chunk_prompts = [prompts[record["id"]] for record in chunk]
            written = write_cots(p_s, chunk, chunk_prompts, args, output.at_once)
            for record, cots in zip(chunk, written, strict=True):
                # What p_s would give as a score (cot.scores) is dropped; the record keeps its true score
                fields = {
                    "cots": [cot.text for cot in cots],
                    "finished": [cot.finished for cot in cots],
                    "suffix": args.grid.suffix.strip(),  # that these CoTs were to end in
                    "grid": str(args.grid),
                }
                output.add(record, fields)
    output.finish()


if __name__ == "__main__":
    runs.run(main)
