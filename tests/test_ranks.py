"""Training under torchrun: what one process would have, whatever the number of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file


def torchrun(ranks: int, *options) -> subprocess.Popen:
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        ranks,
        "--master-port",
        29500 + os.getpid() % 1000,
    ]
    command = [sys.executable, *launch, ROOT / "stage1_train.py", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


CASES = [
    (2, "--lora --batch-size 1 --accumulation 8"),
    (3, "--gradient-checkpointing --batch-size 4 --accumulation 2"),
]


@pytest.mark.parametrize("ranks, options", CASES)
def test_ranks_give_what_one_process_gives(ranks, options, lab):
    """Ten steps of 8 examples of unequal lengths, the last of an epoch of 1: the others have no work."""
    data, few = lab.write("train.jsonl", lab.rows[:33]), lab.write("few.jsonl", lab.rows[40:45])
    how = ["--data", data, "--valid", few, "--epochs", 2, "--lr", 1e-4, *options.split()]
    lab.run("stage1_train", *how, "--out", lab.path / "one")
    process = torchrun(ranks, *how, "--out", lab.path / "many")
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and said.count("stage 1 done") == 1, said
    one, many = lab.read("one/log.jsonl"), lab.read("many/log.jsonl")
    assert len(one) == len(many) == 10
    for a, b in zip(one, many, strict=True):
        assert a.pop("valid", {}) == pytest.approx(b.pop("valid", {}), rel=1e-5)
        assert a == pytest.approx(b, rel=1e-5)
    name = "adapter_model.safetensors" if "lora" in options else "model.safetensors"
    weights, other = load_file(lab.path / "one" / name), load_file(lab.path / "many" / name)
    assert all(abs(weights[key] - other[key]).max() < 1e-5 for key in weights)


def test_when_a_rank_is_killed_all_end_and_the_state_goes_on(lab, capsys):
    """Go on in one process: how many there are is no setting of a run."""
    how = ["--data", lab.write("train.jsonl", lab.rows[:32]), "--epochs", 25, "--lr", 1e-5, "--save-every", 2]
    process = torchrun(2, *how, "--out", lab.path / "many")
    log, deadline = lab.path / "many.part/log.jsonl", time.time() + 60
    while time.time() < deadline and not (log.is_file() and log.read_text().count("\n") > 5):
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode and len(log.read_text().splitlines()) < 50
    lab.run("stage1_train", *how, "--out", lab.path / "many")
    assert "going on after step" in capsys.readouterr().out
    lab.run("stage1_train", *how, "--out", lab.path / "one")
    assert len(lab.read("many/log.jsonl")) == 50
    weights, other = (load_file(lab.path / name / "model.safetensors") for name in ("one", "many"))
    assert all(abs(weights[key] - other[key]).max() < 1e-5 for key in weights)
