"""Training under torchrun: what one process would have, whatever the number of processes."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run
from safetensors.torch import load_file

from tract import ranks, training

MODEL_CODE = "transformers.models.mistral.modeling_mistral"
AS_TORCHRUN = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "CUDA_VISIBLE_DEVICES": ""}
CASES = {  # options → how many ranks begin, how many go on, whether head and embeddings are tied
    "--lora --batch-size 1 --accumulation 8": (3, 2, False),
    "--fsdp --batch-size 2 --accumulation 4": (2, 3, False),
    "--fsdp --gradient-checkpointing --batch-size 8 --accumulation 1": (3, 1, True),
}


def work(rank: int, environment: dict, stop: bool, options: list[str], log: str) -> None:
    """Be one rank; at its fourth step the last one is asked to stop."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    clip, calls = ranks.clip, []

    def stopping(*args):
        calls.append(1)
        if stop and len(calls) == 4 and rank == int(environment["WORLD_SIZE"]) - 1:
            signal.raise_signal(signal.SIGTERM)
        return clip(*args)

    ranks.clip = stopping
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run("stage1_train", *options)


def start(n: int, options: list[str], log: Path, stop: bool = False) -> list[int]:
    """Run n ranks as torchrun starts them, without its three imports of torch; returns their exit codes."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(
        ["conftest", "stage1_train", "peft", "torch.distributed.fsdp", "matplotlib.figure", MODEL_CODE]
    )
    environment = AS_TORCHRUN | {"WORLD_SIZE": str(n), "MASTER_PORT": str(20000 + time.time_ns() % 9999)}
    how = (environment, stop, list(map(str, options)), str(log))
    processes = [fork.Process(target=work, args=(rank, *how)) for rank in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # some may still wait for one that has ended
    return codes


@pytest.mark.parametrize("options", CASES)
def test_ranks_give_what_one_process_gives(options, lab, tiny_tokenizer):
    """Six steps of 8 examples of unequal lengths, the last of an epoch of 1: the others have no work.

    After the fourth, one rank is asked to stop: all do, and another number of them goes on.
    """
    begin, go_on, tied = CASES[options]
    model = lab.checkpoint(tiny_tokenizer, tie_word_embeddings=tied)
    data, few = lab.write("train.jsonl", lab.rows[:17]), lab.write("few.jsonl", lab.rows[40:45])
    how = ["--model", model, "--data", data, "--valid", few, "--epochs", 2, "--lr", 1e-4, "--clip", 3]
    how += ["--warmup", 0, *options.split()]
    lab.run("stage1_train", *(word for word in how if word != "--fsdp"), "--out", lab.path / "one")
    how, said = [*how, "--out", lab.path / "many"], lab.path / "said"
    assert start(begin, how, said, stop=True) == [130] * begin, said.read_text()
    assert start(go_on, how, said) == [0] * go_on, said.read_text()
    assert said.read_text().count("going on after step 4") == said.read_text().count("stage 1 done") == 1
    one, many = lab.read("one/log.jsonl"), lab.read("many/log.jsonl")
    assert len(one) == len(many) == 6
    for a, b in zip(one, many, strict=True):
        assert a.pop("valid", {}) == pytest.approx(b.pop("valid", {}), rel=1e-5)
        assert a == pytest.approx(b, rel=1e-5, abs=1e-7)  # a squared error near 0 has fewer digits
    name = "adapter_model.safetensors" if "lora" in options else "model.safetensors"
    weights, other = load_file(lab.path / "one" / name), load_file(lab.path / "many" / name)
    assert weights.keys() == other.keys()
    assert all(abs(weights[key] - other[key]).max() < 1e-5 for key in weights)


def test_dropout_is_drawn_anew_in_each_step_and_rank_and_the_same_after_an_interruption(monkeypatch):
    def drawn(done: int) -> list[float]:
        journal = SimpleNamespace(done=done, args=SimpleNamespace(seed=3))
        return [float(torch.rand(1)) for _ in training.Journal.remaining(journal, [[]] * 4)]

    whole = drawn(0)
    assert len(set(whole)) == 4 and drawn(2) == whole[2:]
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    assert not set(drawn(0)) & set(whole)


def test_fsdp_is_for_all_weights_and_several_processes(lab, monkeypatch):
    message = "spreads all weights over the processes of torchrun"
    out = ["--data", lab.write("few.jsonl", lab.rows[:2]), "--out", lab.path / "out"]
    code, said = lab.fail("stage1_train", "--fsdp", *out)
    assert code == 2 and message in said
    monkeypatch.setattr(ranks, "launched", lambda: True)
    monkeypatch.setattr(ranks, "join", lambda: None)
    code, said = lab.fail("stage1_train", "--fsdp", "--lora", *out)
    assert code == 2 and message in said


def test_when_a_rank_is_killed_all_end_and_the_state_goes_on(lab, capsys):
    """Go on in one process: how many there are is no setting of a run."""
    how = ["--data", lab.write("train.jsonl", lab.rows[:32]), "--epochs", 10, "--lr", 1e-5, "--save-every", 2]
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        2,
        "--master-port",
        29500 + os.getpid() % 999,
    ]
    command = [sys.executable, *launch, ROOT / "stage1_train.py", *how, "--out", lab.path / "many"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(list(map(str, command)), env=environment, **pipes)
    log, deadline = lab.path / "many.part/log.jsonl", time.time() + 60
    while time.time() < deadline and not (log.is_file() and log.read_text().count("\n") > 5):
        time.sleep(0.01)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode and len(log.read_text().splitlines()) < 20
    lab.run("stage1_train", *how, "--out", lab.path / "many")
    assert "going on after step" in capsys.readouterr().out
    lab.run("stage1_train", *how, "--out", lab.path / "one")
    assert len(lab.read("many/log.jsonl")) == 20
    weights, other = (load_file(lab.path / name / "model.safetensors") for name in ("one", "many"))
    assert all(abs(weights[key] - other[key]).max() < 1e-5 for key in weights)
