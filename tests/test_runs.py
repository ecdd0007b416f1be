"""What a run leaves behind when it is cut off, on a full disk, beside files of one's own, without git."""

import io
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import gen_cot
import predict
import stage1_train
from tract import hub, options, runs, settings
from tract.models import TINY_SEED

TRAINING = "--data train.jsonl --valid valid.jsonl --epochs 2 --batch-size 8 --save-every 4 --seed 5"
RUNS = {  # script → options
    "stage1_train": TRAINING.split(),
    "predict": f"--model {TINY_SEED} --data valid.jsonl --batch-size 8 --seed 5".split(),
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
    (folder / "train.jsonl").write_text("".join(map(runs.to_line, tiny_records[:50])))
    (folder / "valid.jsonl").write_text("".join(map(runs.to_line, tiny_records[:24])))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("tract.files.CHUNK", 1)
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
    where = {"stage1_train": (torch.nn.utils, "clip_grad_norm_"), "predict": (predict, "write_cots")}[script]
    real, calls, limits = getattr(*where), [], resource.getrlimit(resource.RLIMIT_FSIZE)
    run, part = [script, *RUNS[script], "--out", lab.path / script], lab.path / f"{script}.part"

    def stepping(*args):  # in training, between the gradients of a step and its line in the log
        calls.append(1)
        if len(calls) == step:
            cut_off(how)
        return real(*args)

    monkeypatch.chdir(whole)
    monkeypatch.setattr("tract.files.CHUNK", 1)
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


def test_what_decides_a_result_and_changed_is_named_and_nothing_else(lab, tiny_tokenizer, monkeypatch):
    model, out = lab.checkpoint(tiny_tokenizer), lab.path / "o.jsonl"
    data = lab.write("few.jsonl", lab.rows[:2])
    run = ["gen_cot", "--model", model, "--data", data, "--max-new-tokens", 2, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(gen_cot, "write_cots", lambda *_: cut_off("killed"))
        lab.fail(*run)
        lab.fail(*run, "--seed", 1)  # where nothing was done yet, anything may change
        lab.fail(*run)
    (lab.path / "o.jsonl.part/records.jsonl").touch()
    weights = (model / "model.safetensors").read_bytes()
    changes = {"model model.safetensors": weights[:-1] + b"@"}
    changes["model chat_template.jinja"] = b"{{ messages[0].content }}"
    for what, content in changes.items():
        file = model / what.removeprefix("model ")
        was = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        assert f"({what} was " in lab.fail(*run)[1]
        file.unlink() if was is None else file.write_bytes(was)
    with monkeypatch.context() as patch:
        patch.setattr(settings.metadata, "version", lambda name: "0.1")
        assert "(version of torch was " in lab.fail(*run)[1]
        patch.undo()
        patch.setattr(settings, "CODE", [ROOT / "loss.py", ROOT / "README.md"])
        assert "(code of gen_cot.py was " in lab.fail(*run)[1]
    lab.run(*run)


def test_options_of_vllm_that_decide_nothing_are_not_compared(lab):
    data = str(lab.write("t.jsonl", lab.rows[:1]))
    parser = options.make_writing_parser("", TINY_SEED, data, "o.jsonl")
    both = []
    for share, length in (("0.5", 1024), ("0.9", 2048)):
        args = parser.parse_args(
            ["--engine-args", f"gpu_memory_utilization={share}", f"max_model_len={length}"]
        )
        args.grid = options.choose_grid(args)
        found = runs.settings_of(args)
        both.append({name: found[name] for name in found if name.startswith("vLLM")})
    assert both == [{"vLLM max_model_len": 1024}, {"vLLM max_model_len": 2048}]
    out = ("gen_cot", "--model", TINY_SEED, "--data", data, "--out", lab.path / "out")
    assert "are for --engine vllm" in lab.fail(*out, "--engine-args", "a=1")[1]


def test_training_that_is_killed_as_it_gets_its_name_is_not_done_again(whole, lab, monkeypatch):
    """Leave nothing in OUT that only going on needs, and files that others may read."""
    run = ["stage1_train", *RUNS["stage1_train"], "--out", lab.path / "out"]
    monkeypatch.chdir(whole)
    for name in ("rename", "chmod"):
        with monkeypatch.context() as patch:
            patch.setattr(runs.Path, name, lambda *_: cut_off("killed"))
            lab.fail(*run)
    with monkeypatch.context() as patch:
        patch.setattr(runs.shutil, "rmtree", lambda *_: cut_off("killed"))
        patch.setattr("stage1_train.accumulate_gradients", lambda *_: pytest.fail("trains again"))
        lab.fail(*run)
    files = {path.name for path in (lab.path / "out").iterdir()}
    assert files == {path.name for path in (whole / "stage1_train").iterdir()} and not files & runs.PASSING
    for name in ("log.jsonl", "model.safetensors"):
        assert (lab.path / "out" / name).read_bytes() == (whole / "stage1_train" / name).read_bytes()
    assert {path.stat().st_mode & 0o777 for path in (lab.path / "out").iterdir()} == {0o644}


def test_a_model_with_dropout_goes_on_to_the_same_weights(lab, tiny_tokenizer, monkeypatch):
    model = lab.checkpoint(tiny_tokenizer, attention_dropout=0.5)
    run = ["stage1_train", "--model", model, "--data", lab.write("few.jsonl", lab.rows[:16]), "--lr", 1e-3]
    run += ["--epochs", 2, "--batch-size", 4, "--accumulation", 1, "--save-every", 1, "--out"]
    lab.run(*run, lab.path / "whole")
    real, calls = stage1_train.accumulate_gradients, []

    def stepping(*args):
        calls.append(1)
        return cut_off("killed") if len(calls) == 4 else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(stage1_train, "accumulate_gradients", stepping)
        lab.fail(*run, lab.path / "cut")
    lab.run(*run, lab.path / "cut")
    whole, cut = ((lab.path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_what_the_machine_lacks_is_said_as_it_is(lab, monkeypatch):
    with pytest.raises(runs.Fault, match="No such file or directory") as error:
        runs.write_whole(lab.path / "none/file", "text")
    assert "is the disk full?" not in str(error.value)
    os.mkfifo(lab.path / "pipe")
    judge = ("predict", "--model", TINY_SEED, "--out", lab.path / "out")
    code, said = lab.fail(*judge, "--data", lab.path / "pipe")
    assert code == 2 and "write it into a file" in said
    monkeypatch.setattr(hub.os, "access", lambda path, mode: Path(path).suffix != ".safetensors")
    said = str(hub.refusal(TINY_SEED, OSError("No such file")))  # as safetensors calls it
    assert "model.safetensors: can't be read; let its owner" in said


def test_a_terminal_that_knows_ascii_alone_gets_all_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    runs.run(lambda: print("λ = 1"))
    sys.stdout.seek(0)
    assert sys.stdout.read() == "\\u03bb = 1\n"


def test_nothing_that_is_there_is_touched(lab):
    """Refuse what is at OUT, or at OUT.part unless a run of these settings made it, and a second process."""
    data, path = lab.write("train.jsonl", lab.rows[:4]), lab.path
    for name in ("mine", "b.part", "d.part", "e.part"):
        (path / name).mkdir()
    (path / "link").symlink_to(path / "mine")
    for name in ("b.part/thesis.tex", "c.part", "d.part/settings.json"):
        (path / name).write_text("{mine")
    cases = dict.fromkeys(("mine", "link", "train.jsonl"), "is there already; choose")
    cases |= {"b": "no run made it", "c": "no run made it", "d": "is broken", "e": "another process is"}
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    with open(path / "e.part/lock", "ab") as held:
        runs.fcntl.flock(held, runs.fcntl.LOCK_EX)
        for script in ("stage1_train", "predict"):
            for out, message in cases.items():
                code, said = lab.fail(script, "--model", TINY_SEED, "--data", data, "--out", path / out)
                assert code == 2 and message in said and str(path / out) in said.strip().splitlines()[-1]
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_what_belongs_to_another_file_or_can_not_be_a_folder_is_refused_at_once(lab):
    """NAME.run.json goes with NAME and NAME.jsonl alike."""
    run = [
        "predict",
        "--model",
        TINY_SEED,
        "--no-cot",
        "--data",
        lab.write("few.jsonl", lab.rows[:2]),
        "--out",
    ]
    lab.run(*run, lab.path / "x.jsonl")
    assert "x.run.json: is there already" in lab.fail(*run, lab.path / "x")[1]
    code, said = lab.fail(*run, lab.path / "few.jsonl/out.jsonl")
    assert code == 2 and "few.jsonl is a file, no folder" in said


def test_without_git_in_a_log_file_and_clip_0(lab, monkeypatch):
    """Run without git, write few lines of progress to a log, and train with --clip 0."""
    monkeypatch.setenv("PATH", "")
    data = lab.write("train.jsonl", lab.rows[:64])
    lab.run("stage1_train", "--data", data, "--out", lab.path / "out", "--clip", "0")
    assert json.loads((lab.path / "out/run.json").read_text())["git_commit"] is None
    log = lab.read("out/log.jsonl")
    assert len(log) == 16 and log[-1]["loss"] < log[0]["loss"] - 0.5
    assert lab.capsys.readouterr().err.count("step/s") <= 4
