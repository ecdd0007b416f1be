"""The training loop: the same as a plain one, whatever the split and the padding."""

import math
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import stage1_train
from tract import options, training
from tract.encode import Example, encode, score_tokens
from tract.examples import plan_epoch
from tract.models import TINY_SEED
from tract.records import Grid


def plain_loss(model, window: list[Example], score_ids: list[int], options: str):
    """Compute CE and mean penalty from full logits, one sequence at a time, as the formulas say."""
    nll, penalty, n = 0.0, 0.0, 0
    for e in window:
        log_p = model(torch.tensor([list(e.ids)])).logits[0].log_softmax(-1)
        p = log_p[e.score_position - 1, score_ids].exp()
        if "ntl" in options:
            apart = sum(p[v - 1] * abs(v - e.score) for v in range(1, 6)) / p.sum()
        else:
            apart = (sum(p[v - 1] * v for v in range(1, 6)) - e.score) ** 2
        penalty = penalty + apart
        for t in set(range(e.start, len(e.ids))) - ({e.score_position} if "none" in options else set()):
            nll, n = nll - log_p[t - 1, e.ids[t]], n + 1
    return nll / (len(window) if "sum" in options else n), penalty / len(window)


def plain_training(plan: list[list[Example]], how: tuple):
    """Train the seed on a plan. Returns the model, and loss, norm of the gradient and rate of each step."""
    model, steps = AutoModelForCausalLM.from_pretrained(TINY_SEED), []
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    for number, window in enumerate(plan):
        rate = 1e-3 * (1 + math.cos(math.pi * (number - 1) / 5)) / 2 if number else 0.0  # one step of warm-up
        loss = sum(plain_loss(model, window, *how))
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for p in model.parameters():  # decoupled weight decay of matrices alone, then Adam
            p.data.mul_(1 - rate * 0.1 if p.ndim >= 2 else 1)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        steps.append((loss.item(), norm.item(), rate))
    return model, steps


SPLITS = [(8, 1, 10_000), (1, 8, 10_000), (8, 1, 7), (2, 4, 1)]  # --batch-size, --accumulation, rows a head


@pytest.mark.parametrize("options", ["--gradient-checkpointing", "--score-ce none", "--ce-sum --penalty ntl"])
def test_the_loop_equals_a_plain_one_for_any_split(options, lab, tiny_tokenizer, monkeypatch):
    """Train on real-valued scores, 8 or in the end 3 examples a step, with the head over a few rows."""
    rows = [r | {"score": 0.9 * r["score"] + 0.2} for r in lab.rows[:19]]
    for i, row in enumerate(rows):
        row["cot"] = " ".join(row["cot"].split()[: 9 + 2 * i])
    data, valid = lab.write("train.jsonl", rows), lab.write("valid.jsonl", rows[:5])
    _, score_ids = score_tokens(tiny_tokenizer, Grid())
    examples = [encode(tiny_tokenizer, r, Grid(), score_ids) for r in rows]
    plan = [window for epoch in range(2) for window in plan_epoch(examples, 8, f"3/{epoch}")]
    model, steps = plain_training(plan, (score_ids, options))
    with torch.no_grad():
        ce, squared = plain_loss(model, examples[:5], score_ids, "")
    last = sum(e.n_supervised for e in plan[-1])  # which are looked at once more: are the weights spoilt?
    seen = []  # rows that the head is applied to at once: never a prompt's, never more than MAX_LOGITS
    logits = stage1_train.next_token_logits
    monkeypatch.setattr(stage1_train, "next_token_logits", lambda *x: seen.append(len(x[1])) or logits(*x))
    command = ["stage1_train", "--data", data, "--valid", valid, "--epochs", 2, "--seed", 3, *options.split()]
    command += ["--lr", 1e-3, "--warmup", 0.2, "--weight-decay", 0.1]
    for batch_size, accumulation, most in SPLITS:
        monkeypatch.setattr(stage1_train, "MAX_LOGITS", most * model.config.vocab_size)
        out = lab.path / f"out{len(seen)}"
        seen.clear()
        lab.run(*command, "--batch-size", batch_size, "--accumulation", accumulation, "--out", out)
        assert max(seen) <= most and sum(seen) - last == 2 * sum(
            e.n_supervised for e in examples + examples[:5]
        )
        log = lab.read(f"{out.name}/log.jsonl")
        for line, (loss, norm, rate) in zip(log, steps, strict=True):
            assert line["loss"] == pytest.approx(loss, abs=2e-5, rel=2e-6)  # fp32 holds no more of 21
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-3) and line["lr"] == pytest.approx(rate)
        assert ["valid" in line for line in log] == [False, False, True] * 2
        held_out = {"n": 5, "ce": ce.item(), "rmse": squared.sqrt().item()}
        assert log[-1]["valid"] == pytest.approx(held_out, abs=1e-4)
        weights = AutoModelForCausalLM.from_pretrained(out).parameters()
        torch.testing.assert_close([*weights], [*model.parameters()], atol=2e-5, rtol=0)


def test_out_of_memory_names_what_takes_less(lab, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stage1_train, "accumulate_gradients", full)
    data = lab.write("train.jsonl", lab.rows[:2])
    code, said = lab.fail("stage1_train", "--data", data, "--out", lab.path / "out")
    assert code == 1 and "out.part: out of memory; lower --batch-size (and raise --accumulation)" in said


def test_every_example_once_an_epoch_in_windows_of_like_length():
    lengths = [random.Random(i).randrange(9, 99) for i in range(1003)]
    data = [Example(str(i), range(n), 1, 5, 1.0) for i, n in enumerate(lengths)]
    steps = plan_epoch(data, 8, "1/0")
    assert sorted(int(e.id) for step in steps for e in step) == list(range(1003))
    assert not any(steps == plan_epoch(data, 8, seed) for seed in ("1/1", "2/0", "0/1"))
    padded = sum(len(step) * max(len(e.ids) for e in step) for step in steps)
    assert padded < 1.08 * sum(lengths)  # windows drawn at random need 1.7


def test_steps_that_are_not_finite_are_not_taken(lab, monkeypatch):
    real, calls = stage1_train.supervised_states, []

    def broken(*batch):
        calls.append(1)
        return real(*batch) * (torch.nan if len(calls) in (2, 4, 5) else 1)

    monkeypatch.setattr(stage1_train, "supervised_states", broken)
    monkeypatch.setattr(training, "BAD_STEPS", 2)
    arguments = ["--data", lab.write("t.jsonl", lab.rows[:96]), "--out", lab.path / "out", "--epochs", 1]
    code, said = lab.fail("stage1_train", *arguments)
    assert code == 1 and "stopped after 2 steps that were not finite" in said
    assert "step 2 not taken, not finite: train-" in said and "no --valid: nothing is held out" in said
    lab.run("stage1_train", *arguments)  # the state can be gone on from
    log = lab.read("out/log.jsonl")
    assert [line["taken"] for line in log] == [True, False, True, False, False, True]
    weights = AutoModelForCausalLM.from_pretrained(lab.path / "out").state_dict().values()
    assert log[1]["loss"] is None and all(torch.isfinite(p).all() for p in weights)


def test_held_out_measures_that_are_not_finite_are_said_and_not_logged(lab, monkeypatch):
    found = {"n": 2, "ce": 1.0, "rmse": math.nan}
    real, calls = stage1_train.evaluate, []

    def broken(*args):  # after the first of two epochs
        calls.append(1)
        return found if len(calls) == 1 else real(*args)

    monkeypatch.setattr(stage1_train, "evaluate", broken)
    data = lab.write("t.jsonl", lab.rows[:16])
    lab.run("stage1_train", "--data", data, "--valid", data, "--epochs", 2, "--out", lab.path / "out")
    assert "step 1: held out, on the CoTs given: not finite" in lab.capsys.readouterr().out
    assert ["valid" in line for line in lab.read("out/log.jsonl")] == [False, True]


def test_a_training_that_ends_in_steps_that_are_not_finite_is_not_done(lab, monkeypatch):
    rows, calls = stage1_train.supervised_states, []
    broken = lambda *batch: calls.append(1) or rows(*batch) * (torch.nan if len(calls) > 1 else 1)  # noqa: E731
    monkeypatch.setattr(stage1_train, "supervised_states", broken)
    arguments = ["--data", lab.write("t.jsonl", lab.rows[:48]), "--out", lab.path / "out", "--epochs", 1]
    for _ in range(2):  # the same command again does not make it whole
        code, said = lab.fail("stage1_train", *arguments)
        assert code == 1 and "the last steps spoilt the weights" in said
    assert not (lab.path / "out").exists()
    monkeypatch.undo()
    one_step = [*arguments[:2], "--out", lab.path / "other", "--epochs", 1, "--batch-size", 48, "--warmup", 0]
    code, said = lab.fail("stage1_train", *one_step, "--lr", 1e38)
    assert code == 1 and "the last steps spoilt the weights" in said  # though its loss was finite


def test_a_training_that_took_no_step_is_not_done(lab):
    """In fewer steps than it gives up after, too."""
    few = ("--data", lab.write("few.jsonl", lab.rows[:32]), "--epochs", 1, "--out", lab.path / "out")
    code, said = lab.fail("stage1_train", *few, "--score-weight", 1e299)
    assert code == 1 and "no step was finite, nothing was trained" in said and not (lab.path / "out").exists()
    code, said = lab.fail("stage1_train", *few, "--score-weight", 1, "--ce-weight", 0)
    assert code == 2 and "--score-weight: weighs nothing" in said


def test_default_data_are_fetched(lab, monkeypatch):
    """Run `--model mistral-7b` in a fresh clone: prepare.py gets what is not there."""
    calls, failed = [], subprocess.CompletedProcess([], 2)
    monkeypatch.setattr(options, "ROOT", lab.path)
    monkeypatch.setattr("tract.examples.models.load_tokenizer", lambda name: None)  # it is on the hub
    monkeypatch.setattr("tract.examples.subprocess.run", lambda command: calls.append(command) or failed)
    code, said = lab.fail("stage1_train", "--model", "mistral-7b")
    prepare = lab.path / "data/feedback_collection/prepare.py"
    assert code == 2 and calls == [[sys.executable, prepare]]
    assert f"train.jsonl: not there yet; {prepare} gets it" in said


def test_dry_run_shows_the_loss_mask_and_what_is_left_out(lab, tiny_tokenizer):
    """Write nothing, and leave out what is longer than the model can read."""
    rows = [lab.rows[0] | {"score": 3.4}, lab.rows[1], lab.rows[2] | {"cot": "right " * 90}]
    model, data = lab.checkpoint(tiny_tokenizer, max_position_embeddings=109), lab.write("t.jsonl", rows)
    options = ["--out", lab.path / "out", "--lora", "--score-ce", "none", "--dry-run"]
    lab.run("stage1_train", "--model", model, "--data", data, *options)
    shown = lab.capsys.readouterr().out
    assert '"lora": 8' in shown and "2 examples," in shown
    assert "1 records left out, longer than 109 tokens: train-0002" in shown
    assert "53 tokens without loss:\n<s> ### Inst" in shown
    assert "tokens with CE:\nthis answer is good ." in shown and "last token, with CE: '</s>'" in shown
    assert "CE at the score: none. Here the penalty\n(squared) to 3.4 is read" in shown
    lab.run("stage1_train", "--data", lab.write("odd.jsonl", [rows[0] | {"prompt": "xyzzy " * 9}]), *options)
    assert "of its tokens are unknown words to " in lab.capsys.readouterr().out
    assert not list(lab.path.glob("out*"))


def test_bf16_can_be_asked_for_where_it_is_not_the_default(lab):
    """Losses and predictions are near those of fp32 and not the same; the weights stay fp32."""
    data, losses, predictions = lab.write("train.jsonl", lab.rows[:8]), [], []
    for how in ("--fp32", "--bf16"):
        lab.run("stage1_train", "--data", data, "--epochs", 1, how, "--out", lab.path / how)
        losses.append(lab.read(f"{how}/log.jsonl")[0]["loss"])
        judge = ("--model", TINY_SEED, "--data", data, "--no-cot", how)
        lab.run("predict", *judge, "--out", lab.path / f"{how}.jsonl")
        predictions.append(lab.read(f"{how}.jsonl")[0]["prediction"])
    for fp32, bf16 in (losses, predictions):
        assert fp32 != bf16 and fp32 == pytest.approx(bf16, rel=0.02)
    trained = AutoModelForCausalLM.from_pretrained(lab.path / "--bf16")
    assert all(p.dtype == torch.float32 for p in trained.parameters())
