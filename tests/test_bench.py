"""The benches: what they compare does the same work, and their arithmetic is that of torch's own counter."""

import argparse
import itertools
import json
import subprocess
import sys

import gpu
import machine
import pytest
import torch
import workload
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode


def last_line(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_flops_are_those_that_torch_counts():
    """Torch counts the whole square of plain attention, of which half is causal, and no recomputation in its backward pass."""
    model, length = workload.random_model(workload.shape(1000, layers=2, hidden=128), torch.float32), 96
    model.set_attn_implementation("eager")
    work, ids = machine.Work.of(model), torch.ones(1, length, dtype=torch.long)
    square = work.attention * length**2
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, logits_to_keep=1)
    assert work.prefill([length]) + square == pytest.approx(counter.get_total_flops(), rel=0.01)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    trained, recomputed = work.training([length], length, lora=False, recomputed=True)
    assert trained + (6 - 3.5) * square == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert recomputed - trained == pytest.approx(work.prefill([length]) - 2 * work.head)


def test_every_way_to_train_gives_the_same_losses_and_gradients(tiny_records, write_jsonl, run_script, capsys):
    """The bench itself asserts it, of each way; here on sequences of unequal length."""
    rows = [row | {"prompt": " ".join(row["prompt"].split()[: 20 + 2 * i])} for i, row in enumerate(tiny_records[:12])]
    sizes = ["--model", "data/tiny/seed", "--data", write_jsonl("a.jsonl", rows), "--sequences", 6, "--rounds", 1]
    run_script("train_step", *sizes, "--ways", "parts,rows,kept,packed,authors,trainer")
    found = last_line(capsys)
    assert set(found["ways"]) == {"parts", "rows", "kept", "packed", "authors", "trainer"}
    assert found["padding"] > 0 and 0 < found["ways"]["authors"]["gradients_off"] < 1e-4


def test_logits_of_all_positions_take_more_memory(run_script, capsys):
    sizes = ["--vocabulary", 8000, "--layers", 1, "--hidden", 64, "--length", 64, "--examples", 8, "--rounds", 1]
    run_script("train_step", *sizes, "--ways", "parts,authors")
    ways = last_line(capsys)["ways"]
    assert ways["authors"]["extra_bytes"] > 3 * ways["parts"]["extra_bytes"]


@pytest.mark.parametrize("num_cots", [1, 2])
def test_every_way_to_judge_finds_the_same_scores(run_script, capsys, num_cots):
    sizes = ["--vocabulary", 500, "--layers", 2, "--hidden", 64, "--records", 5, "--prompt", 40, "--cot", 12, "--rounds", 1]
    run_script("judge", *sizes, "--num-cots", num_cots, "--batch-size", 3)
    found = last_line(capsys)
    assert 0 < found["scores_off"]["authors"] < 1e-4 and found["scores_spread"] > 0.1
    assert set(found["ratio_to_ours"]) == {"ours", "authors", "no-refill", "copying", "sorting"}
    assert 0.5 < sum(found["where"].values()) <= 1


def test_the_gpu_bench_runs_and_all_its_parts_are_drawn(run_script, monkeypatch, capsys, tmp_path):
    """One part of the rehearsal, which needs no GPU; then the tables of the whole committed one."""
    monkeypatch.chdir(ROOT)
    run_script("gpu", "--rehearse", "--parts", "precision", "--out", tmp_path / "gpu.jsonl")
    line = last_line(capsys)
    assert line == json.loads((tmp_path / "gpu.jsonl").read_text()) and line["rehearsal"] and not line["cut_off"]
    *spread, moved = line["cases"]
    assert [case["shape"] for case in spread] == ["mistral-7b", "llama-3.1-8b"]
    assert moved["moved_at_1e-5"]["fp32"] > 0.99 > 0.9 > moved["moved_at_1e-5"]["seen in bf16"]

    draw = [sys.executable, ROOT / "results/gpu/draw.py", ROOT / "results/gpu/rehearsal.jsonl", "--out", tmp_path / "tables.md"]
    subprocess.run(draw, check=True)
    drawn = (tmp_path / "tables.md").read_text("utf-8")
    assert [part.split(":")[0] for part in drawn.split("\n## ")[1:]] == list(gpu.PARTS)


def test_the_largest_batch_comes_when_the_optimiser_holds_its_state():
    """Only then is the peak of the steps what stage 1 expects."""
    options = argparse.Namespace(steps=4, scale=0.05, plan=False)
    shapes = {name: workload.shape(500, layers=1, hidden=64) for name in workload.REAL}
    for case in itertools.islice(gpu.training_cases(options, shapes), 4):
        longest = [max(len(case.examples[i].ids) for i in window) for window in case.plan]
        assert len(longest) == 4 and longest[-1] == max(longest) == case.facts()["longest"]
        assert sorted(i for window in case.plan for i in window) == list(range(4 * case.sequences))
