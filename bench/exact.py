"""Compare scores read in bf16 with those of fp32.

    python bench/exact.py --model out/real/smollm2 --data out/real/ists/test.jsonl --grid 0,1,2,3,4,5

Reads the score after the annotated CoT of some records in fp32, then in bf16 with three heads; the scripts
have the second. Prints how many records have several likeliest scores, in how many the likeliest is not that
of fp32, and by how much the renormalised expectation is off.
"""

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from loss import rail
from results.tables import table
from tract import models, runs, writing
from tract.encode import encode_prefix, encode_prompt
from tract.records import Grid, read_records


def in_bf16(model, hidden, score_ids):
    """Return what the head gives in the model's own precision."""
    return models.head(model, hidden)


HEADS = {  # each takes what `in_bf16` takes
    "bf16": in_bf16,
    "bf16, the head's score columns in fp32": models.next_token_logits,
    "bf16, all of the head in fp32": lambda model, hidden, score_ids: (
        hidden.float() @ model.get_output_embeddings().weight.float().T
    ),
}


def compare(args, records: list[dict], grid: Grid) -> None:
    """Print the table of how far each way is from fp32."""
    probs = {}  # name → p(score), (n, S)
    for bf16, heads in ((False, {"fp32 throughout": in_bf16}), (True, HEADS)):
        judge = writing.load_judge(args.model, grid, bf16)
        prompts = [encode_prompt(judge.tokenizer, record["prompt"]) for record in records]
        pairs = zip(prompts, records, strict=True)
        texts = [encode_prefix(judge.tokenizer, prompt, record["cot"], grid) for prompt, record in pairs]
        # What the head sees where predict.py reads the score of each text, (n, D)
        with patch.object(writing, "next_token_logits", wraps=models.next_token_logits) as spy:
            writing.score(judge, texts)
        hidden = torch.cat([call.args[1] for call in spy.call_args_list])
        for name, head in heads.items():
            logits = head(judge.model, hidden, judge.score_tensors["score_ids"])
            probs[name] = rail(logits, **judge.score_tensors).probs.double()
    values = torch.tensor(grid.values, dtype=torch.float64)
    exact = probs["fp32 throughout"]
    wanted = exact @ values / exact.sum(1)
    rows = []
    for name, p in probs.items():
        tied = ((p == p.max(1, keepdim=True).values).sum(1) > 1).sum().item()
        differ = (p.argmax(1) != exact.argmax(1)).sum().item()
        error = (p @ values / p.sum(1) - wanted).square().mean().sqrt() / (values[-1] - values[0])
        rows.append([name, tied, differ, f"{error:.4f}"])
    print(table(["arithmetic", f"tied, of {len(records)}", "likeliest differs", "rms error / range"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("--model", default="out/real/smollm2", help="checkpoint folder, or hub id")
    add("--data", default="out/real/ists/test.jsonl", help="JSONL file of records with CoTs")
    add("--grid", default="0,1,2,3,4,5", help="score grid")
    add("--records", type=runs.COUNT, default=50, help="how many of them, the first ones")
    args = parser.parse_args()
    grid = Grid.parse(args.grid)
    records = read_records(args.data, grid, ("id", "prompt", "cot", "score"))[: args.records]
    compare(args, records, grid)


if __name__ == "__main__":
    runs.run(main)
