"""The training loop: the same whatever the split, the padding or the interruption."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from array import array
from functools import partial

import pytest
import torch
from conftest import ROOT, random_model
from transformers import AutoModelForCausalLM

import runs
import stage1_train
from encode import Example
from loss import cot_raft_loss
from models import TINY_SEED, head
from stage1_train import make_parser, windows

VOCABULARY, SCORES = 23, [3, 4, 5, 6, 7]


class Words:  # all that random_model asks of a tokenizer
    eos_token_id = 2

    def __len__(self):
        return VOCABULARY


def examples(n: int) -> list[Example]:
    """Make sequences of unequal lengths: prompts of 3 to 12 tokens, targets of 2 to 9."""
    rng, made = random.Random(0), []
    for i in range(n):
        score, start = rng.uniform(1, 5), rng.randrange(3, 13)
        ids = [1] + [rng.randrange(8, VOCABULARY) for _ in range(start - 1 + rng.randrange(8))]
        ids = array("i", [*ids, SCORES[round(score) - 1], 2])
        made.append(Example(str(i), ids, start, len(ids) - 2, score))
    return made


def fit(folder, batch_size: int, accumulation: int, *extra):
    """Train two epochs on 19 examples, 8 a step: an epoch's last window has 3. Returns log, weights, plan."""
    words = f"--epochs 2 --lr 1e-3 --warmup 0.2 --weight-decay 0.1 --batch-size {batch_size}".split()
    args = make_parser("", stage=1).parse_args([*words, *extra])
    data, model = examples(19), random_model(Words()).train()
    plan = [w for epoch in range(2) for w in windows(data, batch_size * accumulation, 3 + epoch)]
    grid = {"score_ids": torch.tensor(SCORES), "score_values": torch.arange(1.0, 6.0)}
    loss = partial(cot_raft_loss, **grid, score_in_ce=not args.mask_score, ce_sum=args.ce_sum)
    folder.mkdir()
    stage1_train.train(args, model, plan, data[:5], loss, 2, folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return lines, torch.cat([p.detach().flatten() for p in model.parameters()]), plan


@pytest.mark.parametrize("extra", [[], ["--mask-score", "--ce-sum"]])
def test_any_split_gives_the_same_losses_and_weights(extra, tmp_path, monkeypatch):
    """Also where the head sees a few rows at a time, with several scores among them or none."""
    lines, weights, _ = fit(tmp_path / "whole", 8, 1, *extra)
    assert len(lines) == 6 and all(line["taken"] for line in lines)
    seen = []  # rows that the head is applied to at once: never a prompt's, never more than LOGITS allow
    monkeypatch.setattr(stage1_train, "head", lambda model, x: seen.append(len(x)) or head(model, x))
    for i, (batch_size, accumulation, rows) in enumerate([(4, 2, 1000), (1, 8, 1000), (8, 1, 7), (2, 4, 1)]):
        monkeypatch.setattr(stage1_train, "LOGITS", rows * VOCABULARY)
        seen.clear()
        other_lines, other_weights, _ = fit(tmp_path / str(i), batch_size, accumulation, *extra)
        assert max(seen) <= rows and sum(seen) == 2 * sum(e.supervised for e in examples(19) + examples(5))
        for a, b in zip(lines, other_lines, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert other_lines[-1]["valid"]["ce"] == pytest.approx(lines[-1]["valid"]["ce"], abs=1e-5)
        torch.testing.assert_close(other_weights, weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask_score", [True, False])
def test_the_loop_equals_a_plain_one(mask_score, tmp_path):
    """Five steps against a loop with full logits, one sequence at a time, written from the formula."""
    lines, weights, plan = fit(tmp_path / "ours", 8, 1, *(["--mask-score"] if mask_score else []))
    model = random_model(Words())
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (weights != before).float().mean() > 0.99  # every weight moves
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    for line, window in zip(lines[:5], plan, strict=False):
        nll, squared, n = 0.0, 0.0, 0
        for e in window:
            log_p = model(torch.tensor([list(e.ids)])).logits[0].log_softmax(-1)
            expected = sum(log_p[e.score_position - 1, SCORES[v - 1]].exp() * v for v in range(1, 6))
            squared = squared + (expected - e.score) ** 2
            for t in set(range(e.start, len(e.ids))) - ({e.score_position} if mask_score else set()):
                nll, n = nll - log_p[t - 1, e.ids[t]], n + 1
        loss = nll / n + squared / len(window)
        assert line["loss"] == pytest.approx(loss.item(), abs=2e-5)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for p in model.parameters():  # decoupled weight decay of matrices alone, then Adam
            p.data.mul_(1 - line["lr"] * 0.1 if p.ndim >= 2 else 1)
        optimiser.param_groups[0]["lr"] = line["lr"]
        optimiser.step()


def test_every_example_once_an_epoch_in_windows_of_like_length():
    lengths = [random.Random(i).randrange(9, 99) for i in range(1003)]
    data = [Example(str(i), array("i", [0] * n), 1, 5, 1.0) for i, n in enumerate(lengths)]
    steps = windows(data, 8, seed=1)
    assert sorted(int(e.id) for step in steps for e in step) == list(range(1003))
    assert steps != windows(data, 8, seed=2)
    padded = sum(len(step) * max(len(e.ids) for e in step) for step in steps)
    assert padded < 1.08 * sum(lengths)  # windows drawn at random need 1.7


CUT_OFF = "--data train.jsonl --valid valid.jsonl --epochs 2 --save-every 4".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_records, run_script):
    """Leave alone the run that is cut off below."""
    folder = tmp_path_factory.mktemp("whole")
    for name, rows in (("train", tiny_records[:100]), ("valid", tiny_records[100:110])):
        (folder / f"{name}.jsonl").write_text("".join(map(runs.to_line, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_script("stage1_train", *CUT_OFF, "--out", "out")
    return folder


def killed() -> None:
    raise RuntimeError("killed")


def twice() -> None:
    signal.raise_signal(signal.SIGTERM)  # the first one waits for the step, the second does not
    signal.raise_signal(signal.SIGINT)


CASES = [(lambda: signal.raise_signal(signal.SIGTERM), 5, 5), (twice, 7, 4), (killed, 2, 0), (killed, 11, 8)]


@pytest.mark.parametrize("how, step, goes_on_after", CASES, ids=["sigterm", "twice", "early", "late"])
def test_a_run_that_was_cut_off_ends_the_same(how, step, goes_on_after, whole, lab, monkeypatch):
    real, calls, run = (
        torch.nn.utils.clip_grad_norm_,
        [],
        ["stage1_train", *CUT_OFF, "--out", lab.path / "cut"],
    )

    def clip(*args):  # between the gradients of a step and its line in the log
        calls.append(1)
        if len(calls) == step:
            how()
        return real(*args)

    monkeypatch.chdir(whole)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        with pytest.raises((SystemExit, RuntimeError)):
            lab.run(*run)
    assert not (lab.path / "cut").exists() and "lr was 0.001, is 0.1" in lab.fail(*run, "--lr", 0.1)[1]
    lab.run(*run, "--data", whole / "train.jsonl")  # the same file under another name
    assert (f"going on after step {goes_on_after}" in lab.capsys.readouterr().out) == bool(goes_on_after)
    for name in ("model.safetensors", "log.jsonl"):
        assert (lab.path / "cut" / name).read_bytes() == (whole / "out" / name).read_bytes()
    log = lab.read("cut/log.jsonl")
    assert [line["step"] for line in log if "valid" in line] == [7, 14] and log[-1]["valid"]["n"] == 10
    assert not {path.name for path in (lab.path / "cut").iterdir()} & runs.PASSING


def test_steps_that_are_not_finite_are_not_taken(lab, monkeypatch):
    real, calls = stage1_train.supervised_rows, []

    def broken(model, batch):
        calls.append(1)
        return real(model, batch) * (torch.nan if len(calls) in (2, 4, 5) else 1)

    monkeypatch.setattr(stage1_train, "supervised_rows", broken)
    monkeypatch.setattr(stage1_train, "BAD_STEPS", 2)
    arguments = ["--data", lab.write("t.jsonl", lab.rows[:96]), "--out", lab.path / "out", "--epochs", 1]
    code, said = lab.fail("stage1_train", *arguments)
    assert code == 1 and "stopped after 2 steps that were not finite" in said
    assert "step 2 not taken, not finite: train-" in said and "no --valid: nothing is held out" in said
    lab.run("stage1_train", *arguments)  # the state can be gone on from
    log = lab.read("out/log.jsonl")
    assert [line["taken"] for line in log] == [True, False, True, False, False, True]
    weights = AutoModelForCausalLM.from_pretrained(lab.path / "out").state_dict().values()
    assert log[1]["loss"] is None and all(torch.isfinite(p).all() for p in weights)


@pytest.mark.parametrize("script, limit", [("stage1_train", 400_000), ("gen_cot", 45_000)])
def test_a_full_disk_is_one_message_and_loses_nothing(script, limit, lab):
    """A limit on the size of a file is what a full disk looks like; without it the same command goes on."""
    data, out = lab.write("t.jsonl", lab.rows[:100]), lab.path / "out"
    arguments = ["--model", TINY_SEED, "--data", data, "--out", out]
    arguments += ["--epochs", 1, "--save-every", 3] if script == "stage1_train" else ["--batch-size", 2]
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, no_limit[1]))
    try:
        code, said = lab.fail(script, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    assert code == 1 and said.strip().splitlines()[-1].endswith(runs.GO_ON)
    assert not (lab.path / "out").exists() and (lab.path / "out.part").exists()
    lab.run(script, *arguments)
    assert (lab.path / "out").exists() and not (lab.path / "out.part").exists()


def test_nothing_that_is_there_is_touched(lab):
    """Whatever is at OUT or OUT.part, if no run of these settings made it; a second process is refused."""
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
    """A run ends where there is no git; progress in a log is a few lines; --clip 0 does not clip."""
    arguments = ["--data", lab.write("train.jsonl", lab.rows[:64]), "--out", lab.path / "out", "--clip", "0"]
    command = [sys.executable, ROOT / "stage1_train.py", *arguments]
    done = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, check=True)
    assert json.loads((lab.path / "out/run.json").read_text())["git_commit"] is None
    log = lab.read("out/log.jsonl")
    assert len(log) == 16 and log[-1]["loss"] < log[0]["loss"] - 0.5 and done.stderr.count("step/s") <= 4


def test_default_data_are_fetched(lab, monkeypatch):
    """`--model mistral-7b` in a fresh clone: the script says what is not there and has prepare.py get it."""
    calls, failed = [], subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(stage1_train, "ROOT", lab.path)
    monkeypatch.setattr(stage1_train.subprocess, "run", lambda command: calls.append(command) or failed)
    code, said = lab.fail("stage1_train", "--model", "mistral-7b")
    prepare = lab.path / "data/feedback_collection/prepare.py"
    assert code == 2 and calls == [[sys.executable, prepare]]
    assert f"train.jsonl: not there yet; {prepare} gets it" in said


def test_dry_run_shows_the_loss_mask_and_what_is_left_out(lab):
    """Nothing is written, and what is longer than the model can read is not trained on."""
    model = shutil.copytree(TINY_SEED, lab.path / "short")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 109}))
    rows = [lab.rows[0] | {"score": 3.4}, lab.rows[1], lab.rows[2] | {"cot": "right " * 90}]
    data, options = lab.write("t.jsonl", rows), ["--out", lab.path / "out", "--lora", "--mask-score"]
    lab.run("stage1_train", "--model", model, "--data", data, *options, "--dry-run")
    shown = lab.capsys.readouterr().out
    parts = ["53 tokens without loss:\n<s> ### Inst", "tokens with CE:\nthis answer is good .", '"lora": 8']
    parts += [
        "without CE: '3' (id",
        "squared error to 3.4 is read",
        "last token, with CE: '</s>'",
        "2 examples,",
    ]
    parts += ["1 records left out, longer than 109 tokens: train-0002"]
    assert all(part in shown for part in parts) and not list(lab.path.glob("out*"))
