"""Turn pairs of responses, of which people prefer one, into records for predict.py, one a response.

    python data/pairs/prepare.py --out pairs.jsonl                              # RewardBench, from the hub
    python data/pairs/prepare.py Natural.json Neighbor.json --out pairs.jsonl   # LLMBar, a subset a file
    python data/pairs/prepare.py */dataset.json --out pairs.jsonl               # the same: a subset a folder

Sees by itself what a row is: RewardBench (prompt, chosen, rejected), RewardBench 2 (lists of these), LLMBar
(input, output_1, output_2, label), or whole rendered prompts as in prometheus-eval's files
(chosen_instruction, rejected_instruction). The records of a pair share `pair`, `pair_size`, `subset`,
`section` and `weight`, and one of them is `chosen`.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import (
    check_new,
    clean_prompt,
    is_text,
    read_hub,
    read_items,
    sort_out,
    write_records,
)
from tract import runs
from tract.records import InputError

HUB_IDS = {"rewardbench": "allenai/reward-bench", "rewardbench2": "allenai/reward-bench-2"}
SPLITS = {"rewardbench": "filtered", "rewardbench2": "test"}
RUBRIC = "Is the response helpful, correct and harmless, and does it do what the instruction asks for?"
SECTIONS = {  # of RewardBench (arXiv 2403.13787): section → how its subsets begin
    "Chat": ("alpacaeval", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": ("mt-bench-hard", "llmbar"),
    "Safety": ("refusals", "xstest", "donotanswer"),
    "Reasoning": ("math-prm", "hep"),
}
WEIGHTS = {"math-prm": 984 / 447}  # its 447 pairs count as much as the 984 of code


def texts_of(row: Any) -> tuple[list, list, str] | str:
    """Return chosen texts, rejected texts and their field, or say in a few words why there are none."""
    if not isinstance(row, dict):
        return "not an object"
    if "chosen_instruction" in row:
        return [row["chosen_instruction"]], [row.get("rejected_instruction")], "prompt"
    if "output_1" in row:
        first = row["output_1"]
        second = row.get("output_2")
        label = str(row.get("label")).strip()
        if label in ("1", "1.0"):
            return [first], [second], "response"
        if label in ("2", "2.0"):
            return [second], [first], "response"
        return "'label' is neither 1 nor 2"
    chosen = row.get("chosen")
    chosen = chosen if isinstance(chosen, list) else [chosen]
    rejected = row.get("rejected")
    rejected = rejected if isinstance(rejected, list) else [rejected]
    if row.get("subset") == "Ties":
        return "of the subset Ties, which has a rule of its own"
    return chosen, rejected, "response"


def convert(row: Any, pair: str, file: str, rubric: str) -> list[dict] | str:
    """Turn a row into a record a response, or say in a few words why it can't be one."""
    texts = texts_of(row)
    if isinstance(texts, str):
        return texts
    chosen, rejected, field = texts
    if len(chosen) != 1 or not rejected or not all(map(is_text, chosen + rejected)):
        return "not one chosen and at least one rejected text"
    common = {"pair": pair, "pair_size": len(chosen + rejected), "subset": str(row.get("subset") or file)}
    if field == "response":
        instruction = row.get("prompt", row.get("input"))
        if not is_text(instruction):
            return "no text in 'prompt' or 'input'"
        common |= {"instruction": instruction, "rubric": rubric}
    sections = [name for name, begins in SECTIONS.items() if common["subset"].startswith(begins)]
    common |= {"section": [*sections, common["subset"]][0], "weight": WEIGHTS.get(common["subset"], 1)}
    clean = clean_prompt if field == "prompt" else str
    records = []
    for k, text in enumerate(chosen + rejected):
        record = {"id": f"{pair}-{k + 1}"} | common
        records.append(record | {field: clean(text), "chosen": k == 0})
    return records


def names_of(files: list[str]) -> list[str]:
    """Name each file: its stem, or its folder where others have that stem too, or else all of its path.

    Raises InputError where a file is given twice.
    """
    real = [os.path.realpath(file) for file in files]
    for file, path in zip(files, real, strict=True):
        if real.count(path) > 1:
            raise InputError(f"{file}: given twice; leave one out")
    paths = [Path(os.path.abspath(file)) for file in files]
    stems = [path.stem for path in paths]
    names = [path.stem if stems.count(path.stem) == 1 else path.parent.name for path in paths]
    return names if len(set(names)) == len(names) else files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("files", nargs="*", help="JSON arrays or JSONL files; none: RewardBench from the hub")
    add("--hub", choices=HUB_IDS, help="which of them; None: rewardbench")
    add("--out", required=True, help="JSONL file to write")
    add("--rubric", default=RUBRIC, help="what the judge is to look at, for rows without a rendered prompt")
    args = parser.parse_args()
    if args.files and args.hub:
        raise InputError("--hub: without files, it says which data set is fetched; leave one of them out")
    check_new(args.out)
    names = names_of(args.files)
    sources = {name: (file, read_items(file)) for name, file in zip(names, args.files, strict=True)}
    if not sources:
        name = args.hub or "rewardbench"
        rows = read_hub(HUB_IDS[name], SPLITS[name], f"{name}.json", "pairs/prepare.py")
        sources = {name: (HUB_IDS[name], rows)}
    records = []
    for name, (source, rows) in sources.items():
        made = [convert(row, f"{name}-{n:04}", name, args.rubric) for n, row in enumerate(rows)]
        kept, left_out = sort_out(made, source)
        records += [record for pair in kept for record in pair]
        print(f"{source}: {len(rows)} rows read, {len(kept)} pairs kept\n{left_out}", end="")
    write_records({args.out: records})
    print(f"{args.out}: {len(records)} records")


if __name__ == "__main__":
    runs.run(main)
