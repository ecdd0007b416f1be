"""Self-generated CoTs: p_s writes a CoT for every training prompt; p_s's score is dropped, the true one kept.

    python gen_cot.py --model out/run/stage1 --data train.jsonl --out out/run/cots.jsonl

p_s was trained on annotated CoTs, but a judge has to score after CoTs that it wrote itself. So stage 2 trains
on such CoTs: each record gets one as p_s samples it, good or bad, and keeps its true score. With --num-cots N
it gets N, each an example of its own in stage 2. A CoT ends where it reaches the suffix ("So the overall
score is"); one that ends otherwise is marked as not `finished`, and stage 2 leaves it out.

After an interruption the same command goes on. The sampling is tract/writing.py, the files tract/files.py.
"""

from tract import hub, runs
from tract.files import Output, encode_prompts, read_data
from tract.options import choose_grid, make_writing_parser
from tract.writing import load_judge, write_cots


def main() -> None:
    parser = make_writing_parser(__doc__, model="out/stage1", data=None, out="out/cots.jsonl")
    args = parser.parse_args()
    args.data = args.data or hub.training_data(args.model)  # by default what p_s was trained on
    args.grid = choose_grid(args)  # a Grid: that of --grid, else the one that p_s was trained on
    output = Output(args)
    records = read_data(args, needs=("id", "prompt", "score"))
    p_s = load_judge(args.model, args.grid, args.bf16, args.engine, args.engine_args)
    prompts = encode_prompts(p_s.tokenizer, records)  # id → token ids
    lengths = {id: len(prompt) for id, prompt in prompts.items()}
    output.begin(p_s, records, lengths)  # leaves out what is too long, goes on after records already written

    def sample_chunk(chunk: list[dict], at_once: int) -> list[dict]:
        """Return each record's new fields; sample at most `at_once` CoTs at a time."""
        chunk_prompts = [prompts[record["id"]].tolist() for record in chunk]
        new_fields = []
        # A CoT's random numbers depend only on args.seed, its record's id and its number in the record
        for cots in write_cots(p_s, chunk, chunk_prompts, args, at_once):
            # What p_s would give as a score (cot.scores) is dropped; the record keeps its true score
            fields = {
                "cots": [cot.text for cot in cots],
                "finished": [cot.finished for cot in cots],
                "suffix": args.grid.suffix.strip(),  # what ends a CoT; no part of cot.text
                "grid": str(args.grid),
            }
            new_fields.append(fields)
        return new_fields

    output.write(sample_chunk)  # chunk after chunk; out of memory, it retries with a lower at_once
    output.finish()


if __name__ == "__main__":
    runs.run(main)
