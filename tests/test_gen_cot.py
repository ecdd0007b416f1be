"""Writing CoTs and reading scores: what the JSONL's own text gets, whatever the batch."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

import gen_cot
import predict
from encode import prefix_ids, prompt_ids, score_tokens, target_ids
from gen_cot import Judge, sample, write_cots
from loss import rail
from models import TINY_SEED, score_tensors
from records import SUFFIX, Grid

GRID = Grid()
PROMPTS = ["Is it good?", "Is this a much longer prompt, so that others are padded on the left?", "Why?"]
TOKENIZERS = ["mistral_tokenizer", "gpt2_tokenizer", "llama3_tokenizer"]


def how(**more):
    paper = ["--num-cots", "1"]  # all other options have the paper's values
    return SimpleNamespace(**vars(gen_cot.make_parser("", "", "", "").parse_args(paper)) | more)


def judge_of(tokenizer, ends: list[int] | None = None, **config) -> Judge:
    model, (suffix_ids, score_ids) = random_model(tokenizer, **config), score_tokens(tokenizer, GRID)
    ends, scores = ends or [tokenizer.eos_token_id], score_tensors(score_ids, GRID)
    tokenizer.positions = model.config.max_position_embeddings
    return Judge(model, tokenizer, GRID, suffix_ids, ends, scores)


def written(judge: Judge, texts: list[str], at_once=32, **more) -> list[list[gen_cot.Cot]]:
    records = [{"id": f"r{i}"} for i in range(len(texts))]
    return write_cots(judge, records, [prompt_ids(judge.tokenizer, t) for t in texts], how(**more), at_once)


def fresh(judge: Judge, prompt: str, cot: str):
    """The distribution of a forward pass over prompt + CoT + suffix, with no cache and no padding."""
    prefix = prefix_ids(judge.tokenizer, prompt_ids(judge.tokenizer, prompt), cot, GRID)
    with torch.no_grad():
        logits = judge.model(torch.tensor([prefix])).logits[0, -1]
    return rail(logits, **judge.scores)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_scores_of_cots_without_suffix_equal_a_fresh_forward_pass(request, name, monkeypatch):
    """Random CoTs mostly do not tokenise back to what was sampled; texts are padded to be read together."""
    judge = judge_of(request.getfixturevalue(name))
    for read, limit in ((2048, 12), (40, 12), (40, 1)):
        monkeypatch.setattr(gen_cot, "READ", read)
        monkeypatch.setattr(predict, "READ", read)
        cots = written(judge, PROMPTS, num_cots=3, max_new_tokens=limit)
        assert [len(own) for own in cots] == [3, 3, 3]
        assert not any(cot.finished or cot.scores for own in cots for cot in own)
        scores = iter(predict.score(judge, [cot.ids for own in cots for cot in own]))
        for prompt, own in zip(PROMPTS, cots, strict=True):
            for cot in own:
                for part, wanted in zip(next(scores), fresh(judge, prompt, cot.text), strict=True):
                    assert part == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_cot_that_ends_at_its_suffix_comes_with_its_scores(request, name, monkeypatch):
    """Whatever the random numbers, each row is made to write these ids; the logits are those of the model."""
    judge, steps = judge_of(request.getfixturevalue(name)), iter(range(100))
    ids = [*target_ids(judge.tokenizer, "The answer is good.", "1", SUFFIX)[:-1], 7]
    monkeypatch.setattr(gen_cot, "sample", lambda logits, *_: torch.full((len(logits),), ids[next(steps)]))
    for prompt, (cot,) in zip(PROMPTS, written(judge, PROMPTS, max_new_tokens=len(ids) + 9), strict=True):
        assert (cot.text, cot.finished) == ("The answer is good.", True)
        assert cot.scores.probs == pytest.approx(fresh(judge, prompt, cot.text).probs.tolist(), abs=1e-4)
    assert next(steps) == len(ids)  # a step a token, and one for the scores


def test_a_cot_that_training_would_encode_otherwise_is_to_be_read_again(gpt2_tokenizer, monkeypatch):
    judge, steps = judge_of(gpt2_tokenizer), iter(range(100))
    letters = [gpt2_tokenizer(letter).input_ids[0] for letter in "The answer is good."]
    ids = [*letters, *judge.suffix_ids, 7]
    monkeypatch.setattr(gen_cot, "sample", lambda logits, *_: torch.full((len(logits),), ids[next(steps)]))
    ((cot,),) = written(judge, ["Why?"])
    assert (cot.text, cot.finished, cot.scores) == ("The answer is good.", True, None)


@pytest.mark.parametrize("at_once", [16, 5, 1])
def test_rows_end_others_take_their_place_and_no_cot_depends_on_it(gpt2_tokenizer, at_once, monkeypatch):
    """A small vocabulary: among 32,000 nearly equal probabilities another batch's rounding may matter."""
    monkeypatch.setattr(gen_cot, "READ", 9 * at_once)  # prompts have 1 to 9 tokens: some are read together
    judge = judge_of(gpt2_tokenizer, ends=list(range(0, 290, 9)))  # one token in nine is an end
    prompts = [prompt_ids(gpt2_tokenizer, "Why? " * (1 + i % 4))[i % 3 :] for i in range(7)] + [[9]]
    records, args = [{"id": f"r{i}"} for i in range(8)], how(max_new_tokens=25, num_cots=2)
    together = write_cots(judge, records, prompts, args, at_once)
    assert len({len(cot.ids) for own in together for cot in own}) > 3
    for record, prompt, own in zip(records, prompts, together, strict=True):
        (alone,) = write_cots(judge, [record], [prompt], args, 9)
        assert [cot.text for cot in alone] == [cot.text for cot in own] and own[0].text != own[1].text


MIXED = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWS = {"mistral": {}, "qwen2": {"use_sliding_window": True, "max_window_layers": 1}, "gemma3_text": MIXED}


@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_shorter_than_the_text_and_mixed_layers(kind, gpt2_tokenizer, monkeypatch):
    """Several CoTs, rows that end at different steps, prompts beyond the window: as in a plain pass."""
    options = {"model_type": kind, "sliding_window": 8, **WINDOWS[kind]}
    judge = judge_of(gpt2_tokenizer, ends=list(range(0, 290, 9)), **options)
    monkeypatch.setattr(gen_cot, "sample", lambda logits, *_: logits.argmax(-1))
    prompts = [prompt_ids(gpt2_tokenizer, text) for text in PROMPTS]
    for row, ids, _ in gen_cot.write(judge, prompts, list("abcdef"), how(num_cots=2, max_new_tokens=20), 4):
        with torch.no_grad():
            logits = judge.model(torch.tensor([prompts[row // 2] + ids])).logits[0]
        assert logits[len(prompts[row // 2]) - 1 : -1].argmax(-1).tolist() == ids
    scores = predict.score(judge, [prompts[1], prompts[0]])
    with torch.no_grad():
        plain = judge.model(torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)[judge.scores["score_ids"]]
    assert scores[1].probs == pytest.approx(plain.tolist(), abs=1e-5)


def test_a_model_is_not_asked_beyond_its_positions(mistral_tokenizer):
    judge = judge_of(mistral_tokenizer, max_position_embeddings=32)
    prompt = prompt_ids(mistral_tokenizer, "Why?")
    ((_, ids, _),) = gen_cot.write(judge, [prompt], ["a"], how(), 1)
    assert len(prompt) + len(ids) + len(judge.suffix_ids) + 2 == 32


def test_sampling_follows_the_nucleus_and_the_penalty(monkeypatch):
    logits, so_far = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[0, 0]])
    uniform = (torch.arange(10000) + 0.5) / 10000
    drawn = sample(logits.expand(10000, 4), so_far.expand(10000, 2), uniform, how(repetition_penalty=1.0))
    shares = torch.bincount(drawn, minlength=4) / 10000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=1e-3, rtol=0)
    for temperature in (0, 1e-40):
        assert sample(logits, so_far, torch.zeros(1), how(temperature=temperature)).tolist() == [0]
    # log .5 · 2 = log .25 < log .3
    assert sample(logits, so_far, torch.zeros(1), how(temperature=0, repetition_penalty=2.0)).tolist() == [1]
    # A peaked and a flat row: with the whole vocabulary sorted and with a part of it, the same tokens
    logits = torch.randn(200, 600) * torch.tensor([0.5, 5.0]).repeat(100)[:, None]
    given, found = (logits, torch.zeros(200, 1, dtype=torch.long), torch.linspace(0, 0.999, 200)), []
    for likeliest in (600, 20):
        monkeypatch.setattr(gen_cot, "NUCLEUS", likeliest)
        found.append(sample(*given, how()).tolist())
    assert found[0] == found[1] and len(set(found[0])) > 100


def test_an_interrupted_file_goes_on_and_ends_the_same(lab, monkeypatch):
    data, out = lab.write("train.jsonl", lab.rows[:24]), lab.path / "p.jsonl"
    arguments = ["predict", "--model", TINY_SEED, "--data", data, "--batch-size", 1, "--seed", 5]
    lab.run(*arguments, "--out", lab.path / "whole.jsonl")
    assert [r["id"] for r in lab.read("whole.jsonl")] == [r["id"] for r in lab.rows[:24]]
    real, calls = gen_cot.write_cots, []

    def cut_off(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(gen_cot, "write_cots", cut_off)
        assert lab.fail(*arguments, "--out", out)[0] == 130
    lines = lab.path / "p.jsonl.part/records.jsonl"
    assert not out.exists() and lines.read_bytes().count(b"\n") == 16
    lines.write_bytes(lines.read_bytes()[:-20])  # the last line is torn
    assert "top_p was 0.9, is 0.5" in lab.fail(*arguments, "--out", out, "--top-p", 0.5)[1]
    lab.run(*arguments, "--out", out)
    assert out.read_bytes() == (lab.path / "whole.jsonl").read_bytes() and not lines.parent.exists()
    assert "going on after 15 finished records" in lab.capsys.readouterr().out


def test_out_of_memory_halves_the_batch(lab, monkeypatch):
    real, sizes = gen_cot.write_cots, []

    def small_device(judge, records, prompts, args, at_once):
        sizes.append((len(records), at_once))
        if at_once > 2:
            raise torch.OutOfMemoryError
        return real(judge, records, prompts, args, at_once)

    monkeypatch.setattr(gen_cot, "write_cots", small_device)
    data = ["--data", lab.write("train.jsonl", lab.rows[:25]), "--batch-size", 8]
    lab.run("gen_cot", "--model", TINY_SEED, *data, "--out", lab.path / "c.jsonl")
    assert sizes == [(25, 8), (25, 4), (16, 2), (9, 2)]
    assert "out of memory: going on with 2 sequences at a time" in lab.capsys.readouterr().out
    for row, r in zip(lab.read("c.jsonl"), lab.rows, strict=False):  # the true score is kept
        assert {key: row[key] for key in r} == r and len(row["cots"]) == len(row["finished"]) == 1


def test_given_cots_are_scored_as_they_stand(lab):
    """CoTs of an earlier run get the distribution they had there, also those that filled all positions."""
    model, own = shutil.copytree(TINY_SEED, lab.path / "short"), lab.path / "own.jsonl"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 112}))
    predict = ["predict", "--model", model, "--data"]
    lab.run(*predict, lab.write("test.jsonl", lab.rows[:6]), "--out", own, "--num-cots", 2)
    lab.run(*predict, own, "--out", lab.path / "again.jsonl", "--given", "cots")
    lab.run(*predict, lab.path / "test.jsonl", "--out", lab.path / "cot.jsonl", "--given", "cot")
    before, after, cot = (lab.read(f"{name}.jsonl") for name in ("own", "again", "cot"))
    assert not all(done for row in before for done in row["finished"]) and len(before) == len(after) == 6
    judge = gen_cot.load_judge(str(model), GRID)
    for old, new, annotated, record in zip(before, after, cot, lab.rows, strict=False):
        assert new["cots"] == old["cots"] and annotated["cots"] == [record["cot"]]
        for k in (0, 1):
            assert new["score_probs"][k] == pytest.approx(old["score_probs"][k], abs=1e-4)
        probs = fresh(judge, record["prompt"], record["cot"]).probs
        assert annotated["score_probs"][0] == pytest.approx(probs.tolist(), abs=1e-4)
