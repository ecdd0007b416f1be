"""Redraw tables.md from speed.jsonl, scaling.json and demo.json, as the benches wrote them.

python results/speed/draw.py
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tables import table  # noqa: E402

WAYS = {
    "parts": "**this repository**",
    "rows": "all supervised rows at once",
    "kept": "blocks not recomputed",
    "compiled": "blocks compiled",
    "packed": "sequences packed",
    "authors": "authors' style: logits for all positions",
    "trainer": "Hugging Face Trainer, the same loss",
    "trl": "TRL SFTTrainer, CE only",
}
JUDGES = {
    "ours": "**this repository**",
    "no-refill": "a batch ends before the next begins",
    "copying": "transformers' cache",
    "sorting": "whole vocabulary sorted",
    "authors": "authors' style: generate, then read each text anew",
}
# What an H200 can do (FLOP/s in bf16, bytes/s), and the paper's models: parameters of blocks and head, 2 x layers x width,
# numbers of a token's keys and values
H200 = (790e12, 4.3e12)
SIZES = {"Mistral-7B": (6.98e9, 0.131e9, 2 * 32 * 4096, 65536), "Llama-3.1-8B": (6.98e9, 0.525e9, 2 * 32 * 4096, 65536)}


def ratio(entry: dict) -> str:
    return f"{entry['median']:.2f} ({entry['low']:.2f} to {entry['high']:.2f})"


def training(runs: list[dict]) -> str:
    rows = []
    for run in runs:
        asked = run["arguments"]
        on = f"real lengths, {run['padding']:.0%} padding" if asked["data"] else f"{asked['vocabulary'] // 1000}k"
        for way, label in WAYS.items():
            if own := run["ways"].get(way):
                memory = f"{own['extra_bytes'] / 2**20:.0f} MiB" if own["extra_bytes"] else ""
                times = f"{own['extra_bytes'] / run['ways']['parts']['extra_bytes']:.1f}" if memory else ""
                rows.append([on, label, f"{own['seconds']:.2f}", ratio(own["ratio_to_parts"]), memory, times])
    head = ["vocabulary", "way", "s a step", "times as long", "extra memory", "times as much"]
    return table(head, rows)


def judging(runs: list[dict]) -> str:
    rows = []
    for run in runs:
        for way, label in JUDGES.items():
            if way in run["seconds_a_prompt"]:
                own = [f"{run['seconds_a_prompt'][way]:.2f}", ratio(run["ratio_to_ours"][way]), f"{run['scores_off'][way]:.0e}"]
                rows.append([run["arguments"]["num_cots"], label, *own])
    return table(["CoTs a prompt", "way", "s a prompt", "times as long", "scores differ by at most"], rows)


def scaling(axes: dict) -> str:
    rows = []
    for script, found in axes["records"].items():
        for row in found["rows"]:
            own = [f"{row[key]:.1f} s" for key in ("tokenisation", "beyond_tokenisation")]
            rows.append([f"{script}.py", f"{row['records']:,}", *own, f"{row['bytes'] / 2**20:.0f} MiB"])
    files = table(["", "records of real length", "tokenisation", "all else until the first step", "memory"], rows)
    rows = []
    for axis, found in axes.items():
        if axis != "records":
            name = next(iter(found["rows"][0]))
            sizes = [row[name] for row in found["rows"]]
            rows.append(
                [axis, f"{sizes[0]:,} to {sizes[-1]:,}", *(found["exponents"].get(key, "") for key in ("seconds", "bytes"))]
            )
    return files + "\n" + table(["varied", "from, to", "exponent of time", "exponent of extra memory"], rows)


def predicted() -> str:
    """Arithmetic, nothing measured: sequences of 1,310 + 130 tokens, trained on four at a time, judged 64 at a time."""
    rows, (flops, bandwidth) = [], H200
    prompt, cot = 1310, 130
    for name, (blocks, head, attention, kv) in SIZES.items():
        length = prompt + cot
        step = 8 * blocks * length + 4.5 * attention * length**2
        training = (step + 6 * head * length) / (step + 6 * head * cot)
        vocabulary = head // 4096
        logits = [4 * length * vocabulary * 18 / 2**30, min(4 * cot, 2**24 // vocabulary) * vocabulary * 16 / 2**30]
        read = (2 * blocks * prompt + attention * prompt**2) / flops
        token = max(2 * (blocks + head) * 64 / flops, 2 * (blocks + head + kv * 64 * length) / bandwidth) / 64
        again = (2 * (blocks + head) * length + attention * length**2) / flops
        judged = (read + cot * token + again) / (read + cot * token)
        rows.append([name, f"{training:.2f}", f"{logits[0]:.2f} GiB", f"{logits[1]:.2f} GiB", f"{judged:.2f}"])
    head = [
        "",
        "training step, authors' style: times as long",
        "logits, authors' style",
        "logits, here",
        "judging: times as long",
    ]
    return table(head, rows)


def demo(before: dict, after: dict) -> str:
    rows = [[name, f"{seconds} s", f"{after[name]} s"] for name, seconds in before.items()]
    return table(["`make demo`", "before", "after"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "tables.md", help="file to write")
    args = parser.parse_args()
    runs = [json.loads(line) for line in (HERE / "speed.jsonl").read_text("utf-8").splitlines()]
    parts = [
        "## Training step", training([run for run in runs if run["bench"] == "train_step"]),
        "## Judging", judging([run for run in runs if run["bench"] == "judge"]),
        "## Scaling", scaling(json.loads((HERE / "scaling.json").read_text("utf-8"))["axes"]),
        "## Predicted for 7B on an H200, not measured", predicted(),
        "## The demo", demo(*json.loads((HERE / "demo.json").read_text("utf-8")).values()),
    ]  # fmt: skip
    args.out.write_text("\n".join(parts), "utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
