"""Redraw tables.md from gpu.jsonl, as bench/gpu.py wrote it; of every part its last line counts.

python results/gpu/draw.py
python results/gpu/draw.py rehearsal.jsonl --out tables.md
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from tables import table  # noqa: E402


def percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def train(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        if "left_out" in case:
            found = [case["left_out"], "", "", "", ""]
        else:
            ratio = case.get("expected_to_peak", "")
            found = [
                case["tokens_per_second"], percent(case["mfu"]), percent(case["hardware"]),
                f"{case['peak_bytes'] / 2**30:.1f} GiB", ratio,
            ]  # fmt: skip
        trained, blocks = "LoRA" if case["lora"] else "all weights", "recomputed" if case["recomputed"] else "kept"
        rows.append([case["shape"], trained, case["style"], blocks, case["sequences"], *found])
    head = ["shape", "trained", "style", "blocks", "sequences", "tokens/s", "MFU", "hardware", "peak", "expected / peak"]
    return table(head, rows)


def judge(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        for way in ("ours", "authors"):
            if found := case.get(way):
                longer = f"{found['seconds'] / case['ours']['seconds']:.2f}"
                rows.append([
                    case["shape"], case["num_cots"], case["at_once"], way, f"{found['seconds'] / case['prompts']:.3f}", longer,
                    found["generated_per_second"], found.get("decoded_per_second", ""),
                    percent(found.get("share_of_decode_limit")), percent(found["scores_share"]),
                ])  # fmt: skip
    head = [
        "shape", "CoTs", "at once", "way", "s a prompt", "times as long", "tokens/s", "tokens/s, decoding alone",
        "share of its limit", "time for scores",
    ]  # fmt: skip
    return table(head, rows)


def ablations(cases: list[dict]) -> str:
    """Pearson's r of every row, test and reading; of the part embedded beside the committed one."""
    cells = [case for case in cases if "row" in case]
    if "within" in cells[0]:
        rows = [[*(c[name] for name in ("row", "test", "reading")), f"{c['pearson']:.3f}",
                 f"{c['committed']:.3f} ± {c['spread']:.3f}", "yes" if c["within"] else "no"] for c in cells]  # fmt: skip
        return table(["row", "test", "reading", "r here", "r committed, where 95 % would lie", "within"], rows)
    rows = [[*(c[name] for name in ("row", "test", "reading")), *(f"{c[metric]['mean']:.3f}" for metric in ("pearson", "rmse"))]
            for c in cells]  # fmt: skip
    made = table(["row", "test", "reading", "r", "RMSE"], rows)
    claims = next(case["claims"] for case in cases if "claims" in case)
    rows = []
    for claim in claims:
        differences = [claim["difference"][metric] for metric in ("pearson", "rmse")]
        rows.append([" ".join(claim["better"]), " ".join(claim["than"]), claim["test"],
                     *(f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in differences)])  # fmt: skip
    return made + "\n" + table(["is it better?", "than", "test", "Δr", "ΔRMSE"], rows)


def plainly(cases: list[dict]) -> str:
    return "".join(f"    {json.dumps(case)}\n" for case in cases)


def targets(parts: dict[str, list[dict]]) -> str:
    """What was aimed at, on the Mistral shape, and what came of it."""
    trained = [case for case in parts.get("train", []) if case["style"] == "ours" and "mfu" in case]
    rows = []
    for lora, name in ((True, "LoRA"), (False, "all weights")):
        if mine := [case["mfu"] for case in trained if case["lora"] == lora and case["shape"] == "mistral-7b"]:
            rows.append([f"{name}: best MFU", "45 % or more", percent(max(mine))])
    if ratios := [case["expected_to_peak"] for case in trained]:
        rows.append(["expected / measured peak memory", "0.9 to 1.1", f"{min(ratios)} to {max(ratios)}"])
    if judged := [case["ours"]["share_of_decode_limit"] for case in parts.get("judge", []) if case["num_cots"] == 1]:
        rows.append(["decoding: best share of its limit", "50 % or more", percent(max(judged))])
    return table(["", "target", "measured"], rows)


PARTS = {"train": train, "judge": judge, "precision": plainly, "resume": plainly, "embedded": ablations, "larger": ablations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=HERE / "gpu.jsonl", help="what bench/gpu.py wrote")
    parser.add_argument("--out", type=Path, default=HERE / "tables.md", help="file to write")
    args = parser.parse_args()
    lines = {line["part"]: line for line in map(json.loads, args.data.read_text("utf-8").splitlines())}
    made = [f"## Targets\n\n{targets({part: line['cases'] for part, line in lines.items()})}"]
    for part, draw in PARTS.items():
        if line := lines.get(part):
            on = f"{line['machine']['device']}, {line['seconds']} s{', cut off' if line['cut_off'] else ''}"
            made.append(f"## {part}: {on}\n\n{draw(line['cases'])}")
    args.out.write_text("\n".join(made), "utf-8")
    print(args.out)


if __name__ == "__main__":
    main()
