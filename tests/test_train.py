"""The training loop: the same whatever the split, the padding or the order."""

import json
import random
import resource
import signal
from functools import partial

import pytest
import torch
from conftest import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig

import models
import records
import runs
import stage1_train
from loss import cot_raft_loss
from records import Example, Grid

VOCABULARY, SCORES = 23, [3, 4, 5, 6, 7]


class Words:  # all that random_model asks of a tokenizer
    eos_token_id = 2

    def __len__(self):
        return VOCABULARY


def examples(n: int, seed: int = 0) -> list[Example]:
    """Unequal lengths: prompts of 3 to 12 tokens, targets of 2 to 9."""
    rng = random.Random(seed)
    made = []
    for i in range(n):
        prompt = [1] + [rng.randrange(8, VOCABULARY) for _ in range(rng.randrange(2, 12))]
        score = rng.uniform(1, 5)
        target = [rng.randrange(8, VOCABULARY) for _ in range(rng.randrange(8))] + [SCORES[round(score) - 1], 2]
        ids = prompt + target
        made.append(Example(str(i), ids, len(prompt), len(ids) - 2, score))
    return made


LOSS = partial(cot_raft_loss, score_ids=torch.tensor(SCORES), score_values=torch.arange(1.0, 6.0))


def run(batch_size: int, accumulation: int, *, score_in_ce: bool = True, ce_sum: bool = False, checkpointing: bool = False):
    """Two epochs over 19 examples, 8 a step: the last window of an epoch has 3."""
    model = random_model(Words())
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    data = examples(19)
    size = batch_size * accumulation
    plan = [w for epoch in range(2) for w in stage1_train.windows([len(e.ids) for e in data], size, 3 + epoch)]
    optimiser, schedule = stage1_train.make_optimiser(model, lr=1e-3, warmup=0.2, weight_decay=0.1, steps=len(plan))
    lines = list(
        stage1_train.train(
            model, optimiser, schedule, data, plan, loss=partial(LOSS, score_in_ce=score_in_ce, ce_sum=ce_sum),
            score_in_ce=score_in_ce, pad_id=2, clip=1.0, batch_size=batch_size, bf16=False, label="test",
        )
    )  # fmt: skip
    return lines, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("options", [{}, {"score_in_ce": False}, {"ce_sum": True}, {"checkpointing": True}])
def test_accumulation_gives_the_same_losses_and_weights(options):
    lines, weights = run(8, 1, **options)
    assert len(lines) == 6 and all(line["taken"] for line in lines)
    for split in ((4, 2), (2, 4), (1, 8)):
        other_lines, other_weights = run(*split, **options)
        for a, b in zip(lines, other_lines, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        torch.testing.assert_close(other_weights, weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("score_in_ce", [True, False])
def test_the_loop_equals_a_plain_one(score_in_ce):
    """Five steps against a loop with full logits, one sequence at a time, written from the formula."""
    lines, _ = run(8, 1, score_in_ce=score_in_ce)
    model, data = random_model(Words()), examples(19)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    steps = [w for epoch in range(2) for w in stage1_train.windows([len(e.ids) for e in data], 8, seed=3 + epoch)]
    for line, step in zip(lines[:5], steps, strict=False):
        nll, squared, n = 0.0, 0.0, 0
        for e in (data[i] for i in step):
            log_p = model(torch.tensor([e.ids])).logits[0].log_softmax(-1)
            expected = sum(log_p[e.score_position - 1, SCORES[v - 1]].exp() * v for v in range(1, 6))
            squared = squared + (expected - e.score) ** 2
            for t in range(1, len(e.ids)):
                if t >= e.start and (score_in_ce or t != e.score_position):
                    nll, n = nll - log_p[t - 1, e.ids[t]], n + 1
        loss = nll / n + squared / len(step)
        assert line["loss"] == pytest.approx(loss.item(), abs=2e-5)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for p in model.parameters():  # decoupled weight decay of matrices alone, then Adam at the scheduled rate
            p.data.mul_(1 - line["lr"] * 0.1 if p.ndim >= 2 else 1)
        optimiser.param_groups[0]["lr"] = line["lr"]
        optimiser.step()


@pytest.mark.parametrize("options", [{}, {"score_in_ce": False, "ce_sum": True, "lam": 3.0}, {"ce_weight": 0.0}])
def test_rows_a_few_at_a_time_give_the_same_loss_and_gradients(options):
    """However few rows the head sees at once, with parts that hold several scores and parts that hold none."""
    batch, found = stage1_train.collate(examples(9), pad_id=2), []
    loss = partial(LOSS, **options, n_tokens=50, n_sequences=9)
    for rows in (1000, 7, 1):
        model = random_model(Words()).double()
        numbers = stage1_train.backward(model, batch, loss, bf16=False, logits=rows * VOCABULARY)
        found.append([numbers.double(), *(p.grad for p in model.parameters())])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=1e-6)
    assert found[0][0][0] > 0 and all(gradient.abs().sum() > 0 for gradient in found[0][1:])


def test_the_loop_moves_every_weight():
    before = torch.cat([p.detach().flatten() for p in random_model(Words()).parameters()])
    _, after = run(8, 1)
    assert (after != before).float().mean() > 0.99


def test_padding_does_not_change_logits_or_hide_the_end_of_sequence():
    model, batch = random_model(Words()), examples(5)
    together = stage1_train.collate(batch, pad_id=2)  # padding equals end of sequence
    with torch.no_grad():
        batches = [together, *(stage1_train.collate([e], pad_id=2) for e in batch)]
        rows, *alone = (models.head(model, stage1_train.supervised_rows(model, b)) for b in batches)
        alone = torch.cat(alone)
        full = model(torch.tensor([batch[1].ids])).logits[0]
    torch.testing.assert_close(rows, alone, atol=1e-4, rtol=1e-4)
    assert together["targets"].tolist() == [id for e in batch for id in e.ids[e.start :]]
    assert (together["targets"] == 2).sum() == len(batch)
    torch.testing.assert_close(alone[together["is_score"]][1], full[batch[1].score_position - 1], atol=1e-4, rtol=1e-4)


def test_every_example_once_an_epoch_and_windows_of_like_length():
    lengths = [random.Random(i).randrange(10, 200) for i in range(1003)]
    steps = stage1_train.windows(lengths, 8, seed=1)
    assert sorted(i for step in steps for i in step) == list(range(1003))
    padding = sum(len(s) * max(lengths[i] for i in s) for s in steps) / sum(lengths)
    assert padding < 1.08  # windows drawn at random need 1.7
    assert steps != stage1_train.windows(lengths, 8, seed=2)


def test_held_out_by_prompt_alone():
    prompts = [f"Rate {i}." for i in range(4000)]
    share = sum(stage1_train.held_out(prompt, 0.05, seed=0) for prompt in prompts) / len(prompts)
    assert 0.04 < share < 0.06
    assert not any(stage1_train.held_out(prompt, 0.0, seed=0) for prompt in prompts)


def test_checkpoint_opens_without_us_and_run_json_tells_all(tiny_records, write_jsonl, run_script, tmp_path, capsys):
    data = write_jsonl("train.jsonl", [*tiny_records[:60], tiny_records[60] | {"prompt": "says " * 200}])
    out = tmp_path / "stage1"
    run_script("stage1_train", "--data", data, "--out", out, "--epochs", 1, "--max-length", 150, "--val-fraction", 0.2)
    assert "1 records left out, longer than --max-length 150: train-0060" in capsys.readouterr().out

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.float32 and tokenizer.chat_template
    run = json.loads((out / "run.json").read_text())
    assert run["grid"] == "1=1,2=2,3=3,4=4,5=5" and run["stage"] == 1 and run["arguments"]["lr"] == 1e-3
    assert run["inputs"] == {str(data): runs.sha256(data)}
    assert run["counts"]["trained"] + run["counts"]["held_out"] == 60 and run["counts"]["too_long"] == 1
    assert run["held_out"]["n"] == run["counts"]["held_out"] and run["held_out"]["rmse"] > 0
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, len(log) + 1)) and "held_out" in log[-1]
    assert run["own_cots"] == log[-1]["own_cots"] and run["own_cots"]["n"] == run["held_out"]["n"]
    assert records.choose_grid(None, None, str(out)) == Grid()

    # An output folder that holds a run is not written over; stage 2 does not start from p_s or on annotated CoTs
    for script, arguments, message in (
        ("stage1_train", ["--data", data, "--out", out], "already holds a finished run"),
        ("stage2_train", ["--data", data, "--out", tmp_path / "2"], "only gen_cot.py adds self-generated CoTs"),
        ("stage2_train", ["--data", data, "--out", tmp_path / "2", "--model", out], "stage 2 starts from the seed model"),
        ("predict", ["--data", data, "--out", tmp_path / "p.jsonl", "--model", out, "--grid", "1,5"], "was trained on"),
    ):
        with pytest.raises(SystemExit) as exit:
            run_script(script, *arguments)
        error = capsys.readouterr().err
        assert exit.value.code == 2 and message in error and error.count("\n") == 1


def test_a_model_that_changes_its_logits_after_the_head_is_refused(tmp_path):
    """The loss sees the head's output; where that is not what the model predicts with, training would be wrong in silence."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    config = CohereConfig(**small, vocab_size=VOCABULARY, logit_scale=0.0625, initializer_range=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(runs.InputError, match="scales or caps its logits"):
        models.load_model(str(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--data", "empty.jsonl"], "empty.jsonl: no records in it"),
        (["--data", "good.jsonl", "--model", "folder"], "folder: a folder, but no checkpoint"),
        (["--data", "good.jsonl", "--model", "no/such-model"], "no/such-model: neither a checkpoint folder nor a model"),
        (["--data", "good.jsonl", "--max-length", 10], "all 3 records are longer than --max-length 10"),
        (["--data", "good.jsonl", "--grid", "1,2,x"], "--grid 1,2,x"),
        (["--data", "good.jsonl", "--out", "mine", "--overwrite"], "mine: a folder that holds something else"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, tiny_records, write_jsonl, run_script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl("good.jsonl", tiny_records[:3])
    write_jsonl("empty.jsonl", [])
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(SystemExit) as exit:
        run_script("stage1_train", "--out", "out", *arguments, "--val-fraction", 0)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and (tmp_path / "mine/thesis.tex").exists()


def interrupt_at(monkeypatch, step: int, how) -> None:
    """Let `how` happen right after the given step of the next training run."""
    real = stage1_train.train

    def train(*args, **kwargs):
        for line in real(*args, **kwargs):
            if line["step"] == step:
                how()
            yield line

    monkeypatch.setattr(stage1_train, "train", train)


def killed() -> None:
    raise RuntimeError("killed")


CUT_OFF = ["--epochs", 2, "--save-every", 4, "--val-fraction", 0.1, "--eval-size", 4]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_records, run_script):
    """The run that is cut off below, left alone."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "train.jsonl").write_text("".join(map(runs.to_line, tiny_records[:100])))
    run_script("stage1_train", "--data", folder / "train.jsonl", "--out", folder / "out", *CUT_OFF)
    return folder


@pytest.mark.parametrize(
    "how, step, goes_on_after",
    [(lambda: signal.raise_signal(signal.SIGTERM), 5, 5), (killed, 7, 4), (killed, 2, 0), (killed, 11, 8)],
    ids=["sigterm", "killed", "killed before the first save", "killed in the second epoch"],
)
def test_a_run_that_was_cut_off_ends_the_same(how, step, goes_on_after, whole, run_script, tmp_path, monkeypatch, capsys):
    out, arguments = tmp_path / "cut", ["--data", whole / "train.jsonl", *CUT_OFF]
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, how)
        with pytest.raises((SystemExit, RuntimeError)):
            run_script("stage1_train", *arguments, "--out", out)
    assert not out.exists()
    capsys.readouterr()
    if goes_on_after:
        with pytest.raises(SystemExit):
            run_script("stage1_train", *arguments, "--out", out, "--lr", 0.1)
        assert "lr was 0.001, is 0.1" in capsys.readouterr().err
    run_script("stage1_train", *arguments, "--out", out)
    assert (f"going on after step {goes_on_after}" in capsys.readouterr().out) == bool(goes_on_after)
    for name in ("model.safetensors", "log.jsonl"):
        assert (out / name).read_bytes() == (whole / "out" / name).read_bytes()
    left = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == left | {"chat_template.jinja", "log.jsonl", "run.json"}


def test_a_second_process_on_the_same_output_is_refused(tiny_records, write_jsonl, run_script, tmp_path, capsys):
    data = write_jsonl("train.jsonl", tiny_records[:4])
    (tmp_path / "stage1.part").mkdir()
    for script, out, held in (("stage1_train", "stage1", "stage1.part/lock"), ("predict", "p.jsonl", "p.jsonl.part")):
        model = ["--model", records.TINY_SEED, "--data", data]
        with runs.lock(tmp_path / held), pytest.raises(SystemExit) as exit:
            run_script(script, *model, "--out", tmp_path / out)
        assert exit.value.code == 2 and "another process is writing this output" in capsys.readouterr().err


def test_steps_that_are_not_finite_are_not_taken(tiny_records, write_jsonl, run_script, tmp_path, monkeypatch, capsys):
    data, out = write_jsonl("train.jsonl", tiny_records[:96]), tmp_path / "stage1"
    real, calls = stage1_train.supervised_rows, []

    def broken(model, batch):
        calls.append(1)
        return real(model, batch) * (torch.nan if len(calls) in (2, 4, 5) else 1)

    monkeypatch.setattr(stage1_train, "supervised_rows", broken)
    arguments = ["--data", data, "--out", out, "--epochs", 1, "--val-fraction", 0, "--max-bad-steps", 2]
    with pytest.raises(SystemExit) as exit:
        run_script("stage1_train", *arguments)
    shown, code = capsys.readouterr(), exit.value.code
    del exit  # and with it the frame that holds the lock
    assert code == 1 and "stopped after 2 steps in a row that were not finite" in shown.err
    assert "step 2 not taken, its loss or gradient is not finite: train-" in shown.out + shown.err
    run_script("stage1_train", *arguments)  # the state can be gone on from
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["taken"] for line in log] == [True, False, True, False, False, True]
    assert log[1]["loss"] is None and json.loads((out / "run.json").read_text())["steps_not_taken"] == 3
    assert all(torch.isfinite(p).all() for p in AutoModelForCausalLM.from_pretrained(out).parameters())


def test_the_second_signal_stops_at_once():
    with stage1_train.StopSignal() as _, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the first one waits for the step
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("script", ["stage1_train", "gen_cot"])
def test_a_full_disk_is_one_message_and_loses_nothing(script, tiny_records, write_jsonl, run_script, tmp_path, capsys):
    """A limit on the size of a file is what a full disk looks like; without it the same command goes on."""
    data, out = write_jsonl("train.jsonl", tiny_records[:100]), tmp_path / "out"
    arguments = ["--model", records.TINY_SEED, "--data", data, "--out", out]
    arguments += ["--epochs", 1, "--save-every", 3] if script == "stage1_train" else []
    no_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (45_000 if script == "gen_cot" else 400_000, no_limit[1]))
    try:
        with pytest.raises(SystemExit) as exit:
            run_script(script, *arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, no_limit)
    error, code = capsys.readouterr().err.strip().splitlines(), exit.value.code
    del exit  # and with it the frame that holds the lock
    assert code == 1 and error[-1].startswith(f"{out}.part") and error[-1].endswith(runs.GO_ON)
    assert not out.exists() and (tmp_path / "out.part").exists()
    run_script(script, *arguments)
    assert out.exists() and not (tmp_path / "out.part").exists()
