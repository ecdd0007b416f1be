"""What a run leaves behind when it is cut off, on a full disk, beside files of one's own, without git."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import gen_cot
import runs
from models import TINY_SEED

RUNS = {  # script → options
    "stage1_train": "--data train.jsonl --valid valid.jsonl --epochs 2 --save-every 4 --seed 5".split(),
    "predict": f"--model {TINY_SEED} --data valid.jsonl --batch-size 1 --seed 5".split(),
}
FILES = {"stage1_train": ["stage1_train/log.jsonl", "stage1_train/model.safetensors"], "predict": ["predict"]}
CUTS = [  # script, in which step or chunk, what happens, exit code, what the next run goes on after
    ("stage1_train", 5, [signal.SIGTERM], 130, "step 5"),  # waits for the step
    ("stage1_train", 7, [signal.SIGTERM, signal.SIGINT], 130, "step 4"),  # the second does not
    ("stage1_train", 2, "killed", 137, ""),
    ("stage1_train", 11, "killed", 137, "step 8"),
    ("stage1_train", 7, "disk full", 1, "step 4"),
    ("predict", 3, "killed", 137, "16 finished records"),
    ("predict", 3, "disk full", 1, "finished records"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_records, run_script):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "train.jsonl").write_text("".join(map(runs.to_line, tiny_records[:100])))
    (folder / "valid.jsonl").write_text("".join(map(runs.to_line, tiny_records[:24])))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for script, options in RUNS.items():
            run_script(script, *options, "--out", script)
    return folder


def cut_off(how: str | list) -> None:
    if how == "killed":
        raise SystemExit(137)
    if how == "disk full":  # a limit on the size of a file looks like it, and leaves a torn line
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, resource.RLIM_INFINITY))
    else:
        for number in how:
            signal.raise_signal(number)


@pytest.mark.parametrize("script, step, how, code, kept", CUTS)
def test_a_run_that_was_cut_off_ends_the_same(script, step, how, code, kept, whole, lab, monkeypatch):
    """Refuse to go on with other settings; go on with the same data under another name."""
    where = {"stage1_train": (torch.nn.utils, "clip_grad_norm_"), "predict": (gen_cot, "write_cots")}[script]
    real, calls, limits = getattr(*where), [], resource.getrlimit(resource.RLIMIT_FSIZE)
    run, part = [script, *RUNS[script], "--out", lab.path / script], lab.path / f"{script}.part"

    def stepping(*args):  # in training, between the gradients of a step and its line in the log
        calls.append(1)
        if len(calls) == step:
            cut_off(how)
        return real(*args)

    monkeypatch.chdir(whole)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(*where, stepping)
            found, said = lab.fail(*run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert found == code and part.exists() and not (lab.path / script).exists()
    assert said.strip().endswith(runs.GO_ON) == (how == "disk full")
    assert "seed was 5, is 6" in lab.fail(*run, "--seed", 6)[1]
    data = RUNS[script][RUNS[script].index("--data") + 1]
    lab.run(*run, "--data", shutil.copy(data, lab.path / "renamed.jsonl"))
    said = lab.capsys.readouterr().out
    assert ("going on after" in said) == bool(kept) and kept in said and not part.exists()
    for name in FILES[script]:
        assert (lab.path / name).read_bytes() == (whole / name).read_bytes()


def test_nothing_that_is_there_is_touched(lab):
    """Refuse what is at OUT, or at OUT.part unless a run of these settings made it, and a second process."""
    data, path = lab.write("train.jsonl", lab.rows[:4]), lab.path
    for name in ("mine", "b.part", "d.part", "e.part"):
        (path / name).mkdir()
    (path / "link").symlink_to(path / "mine")
    for name in ("b.part/thesis.tex", "c.part", "d.part/settings.json"):
        (path / name).write_text("{mine")
    cases = {name: "is there already; choose" for name in ("mine", "link", "train.jsonl")}
    cases |= {"b": "no run made it", "c": "no run made it", "d": "is broken", "e": "another process is"}
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    with open(path / "e.part/lock", "ab") as held:
        runs.fcntl.flock(held, runs.fcntl.LOCK_EX)
        for script in ("stage1_train", "predict"):
            for out, message in cases.items():
                code, said = lab.fail(script, "--model", TINY_SEED, "--data", data, "--out", path / out)
                assert code == 2 and message in said and str(path / out) in said.strip().splitlines()[-1]
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_without_git_in_a_log_file_and_clip_0(lab):
    """Run without git, write few lines of progress to a log, and train with --clip 0."""
    arguments = ["--data", lab.write("train.jsonl", lab.rows[:64]), "--out", lab.path / "out", "--clip", "0"]
    command = [sys.executable, ROOT / "stage1_train.py", *arguments]
    bare = {"PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=bare, capture_output=True, text=True, check=True)
    assert json.loads((lab.path / "out/run.json").read_text())["git_commit"] is None
    log = lab.read("out/log.jsonl")
    assert len(log) == 16 and log[-1]["loss"] < log[0]["loss"] - 0.5 and done.stderr.count("step/s") <= 4
