"""Turn Interpretable STS (SemEval 2015 and 2016, task 2) into records: how similar are these two sentences?

    python data/ists/prepare.py --alignments DIR/test --gold DIR/gold --out test.jsonl
    python data/ists/prepare.py --alignments DIR/train --gold DIR/gold --out train.jsonl --without test.jsonl

The score, 0 to 5, is the mean of about five workers, from the gold files of the STS tasks. The CoT is another
annotator's alignment of the two sentences, chunk by chunk, put into words. --valid FILE holds some pairs out.
"""

import argparse
import hashlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.prepare_helpers import check_new, read_texts, sort_out, write_records
from tract import runs
from tract.records import InputError

PROMPT = """\
How similar in meaning are these two sentences, from 0 (unrelated) to 5 (the same)? Compare them first.

1: {}
2: {}"""
RELATIONS = {  # what the label of two chunks says; labels may end in _FACT or _POL
    "EQUI": "same",
    "SPE1": "1 says more",
    "SPE2": "2 says more",
    "SIMI": "similar",
    "REL": "related",
    "OPPO": "opposite",
}
SENTENCE = re.compile(r'<sentence id="(\d+)".*?</sentence>', re.DOTALL)


def key(*sentences: str) -> tuple[str, ...]:
    """Return what is the same in the two tokenisations that the alignments and the gold files use."""
    plain = (re.sub(r"-[LR]RB-", "", sentence).lower() for sentence in sentences)
    return tuple(re.sub(r"[^a-z0-9]", "", sentence) for sentence in plain)


def read_utf8(path: Path) -> str:
    """Read a text file in UTF-8. Raises InputError."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no file of text in UTF-8 ({error}); get it anew") from None


def read_gold(folder: Path) -> dict[tuple, tuple[list[float], list[str]]]:
    """Return the scores of every pair, and its sentences as they were shown. Raises InputError."""
    gold = {}
    for path in sorted(folder.glob("*.tsv")):
        for number, line in enumerate(read_utf8(path).rstrip("\n").split("\n"), 1):
            score, *pair = line.split("\t")
            if len(pair) != 2 or not re.fullmatch(r"[0-4](\.\d+)?|5(\.0+)?|", score):
                raise InputError(f"{path}:{number}: not score, sentence, sentence with tabs between them")
            if score:
                gold.setdefault(key(*pair), ([], pair))[0].append(float(score))
    if not gold:
        raise InputError(f"{folder}: no scores in *.tsv there; give the folder of the STS gold files")
    return gold


def words(chunk: str) -> str:
    """Undo the tokenisation of a chunk; '' where it holds no letter and no digit."""
    for old, new in ((r" (['’]\w|n't|[,.;:!?%])", r"\1"), (r"`` ?| ?''", '"'), (r"-[LR]RB- ?", "")):
        chunk = re.sub(old, new, chunk.strip())
    return chunk.strip(" ,.;:!?") if re.search(r"\w", chunk) else ""


def in_words(alignment: list[str]) -> str:
    """Put the lines of an alignment into words, in the order of the first sentence."""
    aligned = []  # position in the first sentence, text
    alone = {"1": [], "2": []}  # sentence → position in it, chunk
    for line in alignment:  # 1 2 <==> 1 2 // EQUI // 5 // A man <==> A man
        places, label, score, text = (part.strip() for part in line.split("//", 3))
        first, second = map(words, text.split("<==>"))
        position = int(places.split()[0])
        relation = RELATIONS.get(label.partition("_")[0])
        if relation and first and second:
            aligned.append((position, f"{first} / {second}: {relation}, {score}."))
        elif places.endswith(" 0") and first:
            alone["1"].append((position, first))
        elif places.startswith("0 ") and second:
            alone["2"].append((int(places.split("<==>")[1].split()[0]), second))
    parts = [text for _, text in sorted(aligned)]
    for sentence, chunks in alone.items():
        if chunks:
            parts.append(f"Only in {sentence}: {'; '.join(chunk for _, chunk in sorted(chunks))}.")
    return " ".join(parts)


def convert(source: str, block: re.Match, gold: dict, seen: set) -> dict | str:
    """Turn one aligned pair into a record, or say in a few words why it can't be one."""
    pair = re.findall(r"^// (.*)$", block[0], re.MULTILINE)
    if len(pair) != 2 or "<alignment>" not in block[0]:
        return "not two sentences and their alignment"
    if key(*pair) not in gold:
        return "no gold score"
    if key(*pair) in seen:
        return "a pair that is there already"
    seen.add(key(*pair))
    scores, shown = gold[key(*pair)]
    try:
        cot = in_words(re.findall(r"^.*<==>.*$", block[0].partition("<alignment>")[2], re.MULTILINE))
    except (ValueError, IndexError):
        return "an alignment that is not 'places // label // score // chunks'"
    if not cot:
        return "no chunk with a word in it"
    record = {"id": f"{source}-{block[1]}", "prompt": PROMPT.format(*shown), "cot": cot}
    return record | {"score": round(sum(scores) / len(scores), 2), "texts": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=runs.Help)
    add = parser.add_argument
    add("--alignments", type=Path, required=True, help="folder of .wa files")
    add("--gold", type=Path, required=True, help="folder of the gold files, *.tsv: score, sentence, sentence")
    add("--out", type=Path, required=True, help="JSONL file to write")
    add("--without", help="JSONL file of this script, whose pairs are left out")
    add("--valid", type=Path, help="JSONL file to write held-out pairs to")
    add("--valid-size", type=runs.COUNT, default=150, help="how many of them")
    add("--seed", type=runs.SEED, default=0, help="random seed of which they are")
    args = parser.parse_args()
    check_new(args.valid, args.out)
    seen = {key(*texts) for texts in read_texts(args.without)} if args.without else set()
    gold = read_gold(args.gold)
    made = []
    paths = sorted(args.alignments.glob("*.wa"))
    sources = [path.stem.split(".")[-1] for path in paths]  # of STSint.input.images.wa: images
    for path, source in zip(paths, sources, strict=True):
        name = source if sources.count(source) == 1 else path.stem
        made += [convert(name, block, gold, seen) for block in SENTENCE.finditer(read_utf8(path))]
    kept, left_out = sort_out(made, str(args.alignments))
    print(left_out, end="")
    order = sorted(kept, key=lambda r: hashlib.sha256(f"{args.seed}/{r['prompt']}".encode()).digest())
    held_out = set()
    files = {}
    if args.valid:
        held_out = {r["id"] for r in order[: args.valid_size]}
        files[args.valid] = [r for r in kept if r["id"] in held_out]
    files[args.out] = [r for r in kept if r["id"] not in held_out]
    if not files[args.out]:
        raise InputError(f"--valid-size {args.valid_size}: all {len(kept)} records; give a smaller one")
    write_records(files)
    for path, records in files.items():
        print(f"{path}: {len(records)} records")


if __name__ == "__main__":
    runs.run(main)
