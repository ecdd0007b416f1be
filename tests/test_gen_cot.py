"""Generation: one cache for CoT and score, and a CoT that does not depend on its batch."""

import itertools
import json
import shutil

import pytest
import torch
from conftest import random_model
from transformers.cache_utils import DynamicLayer

import gen_cot
import records
from gen_cot import Sampling, decode, judge, sample
from loss import rail
from records import Grid

GRID = Grid()
PROMPTS = ["Is it good?", "Is this a much longer prompt, so that the others are padded on the left by a good deal?", "Why?"]


def batch_of(prompts: list[str]) -> list[dict]:
    return [{"id": f"r{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]


def judged(model, tokenizer, batch, at_once=32, **sampling):
    prompts, names = [records.prompt_ids(tokenizer, r["prompt"]) for r in batch], [f"0/{r['id']}" for r in batch]
    results = judge(
        model, tokenizer, prompts, names, sampling=Sampling(**sampling), grid=GRID, with_scores=True, at_once=at_once,
        tokens=records.score_tokens(tokenizer, GRID),
    )  # fmt: skip
    return [result for _, result in sorted(results)]


def fresh_scores(model, tokenizer, prompt: str, cot: str):
    """The same distribution from a forward pass over prompt + CoT + suffix, with no cache and no padding."""
    prefix = records.prefix_ids(tokenizer, records.prompt_ids(tokenizer, prompt), cot, GRID)
    ids = torch.tensor(records.score_tokens(tokenizer, GRID).score_ids)
    with torch.no_grad():
        return rail(model(torch.tensor([prefix])).logits[0, -1], score_ids=ids, score_values=torch.tensor(GRID.values))


def write_this(model, ids: list[int]) -> None:
    """Make a model generate `ids`, whatever the prompt: its head is told at each call what comes next."""
    head, calls = model.lm_head, iter(ids)

    def forced(hidden):
        logits = head(hidden)
        token = next(calls, None)
        return logits if token is None else logits.index_fill(-1, torch.tensor([token]), 1000.0)

    model.get_output_embeddings = lambda: forced


@pytest.mark.parametrize("name", ["mistral_tokenizer", "gpt2_tokenizer", "llama3_tokenizer"])
@pytest.mark.parametrize("num_cots", [1, 3])
@pytest.mark.parametrize("limit", [0, 1, 12])
def test_scores_from_the_cache_equal_a_fresh_forward_pass(request, name, num_cots, limit):
    """Left padding, several CoTs, forced suffixes, and random CoTs that mostly do not tokenise back to what was sampled."""
    tokenizer = request.getfixturevalue(name)
    model = random_model(tokenizer)
    results = judged(model, tokenizer, batch_of(PROMPTS), num_cots=num_cots, max_new_tokens=limit)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert len(result.cots) == num_cots and result.finished == [False] * num_cots
        assert (result.cots == [""] * num_cots) == (limit == 0)
        for cot, score in zip(result.cots, result.scores, strict=True):
            fresh = fresh_scores(model, tokenizer, prompt, cot)
            assert score.probs == pytest.approx(fresh.probs.tolist(), abs=1e-4)
            assert score.expected == pytest.approx(fresh.expected.item(), abs=1e-4)
            assert score.off_grid == pytest.approx(fresh.off_grid.item(), abs=1e-4)


@pytest.mark.parametrize("name", ["mistral_tokenizer", "gpt2_tokenizer", "llama3_tokenizer"])
def test_a_cot_ends_at_its_suffix_and_needs_one_more_token_for_its_scores(request, name, monkeypatch):
    """What is fed after the prompt is every token of CoT and suffix once: no second prefill."""
    tokenizer = request.getfixturevalue(name)
    fed, feed = [], gen_cot.feed

    def spy(model, cache, ids, *args, **kwargs):
        fed.append(ids.shape[1])
        return feed(model, cache, ids, *args, **kwargs)

    monkeypatch.setattr(gen_cot, "feed", spy)
    ids = records.target_ids(tokenizer, "The answer is good.", "1")[:-1]
    model = random_model(tokenizer)
    write_this(model, ids)
    results = judged(model, tokenizer, batch_of(PROMPTS), max_new_tokens=len(ids) + 10)
    assert fed[1:] == [1] * (len(ids) + 1)  # the last token of the prompt is among them
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert (result.cots, result.finished, result.tokens) == (["The answer is good."], [True], [len(ids)])
        fresh = fresh_scores(random_model(tokenizer), tokenizer, prompt, "The answer is good.")
        assert result.scores[0].probs == pytest.approx(fresh.probs.tolist(), abs=1e-4)


@pytest.mark.parametrize("at_once", [16, 5, 1])
def test_rows_leave_the_batch_others_join_and_no_cot_depends_on_it(gpt2_tokenizer, at_once, monkeypatch):
    """Rows end at different steps and make room for the next prompts; each is decoded as if it had always been alone.

    A small vocabulary: among 32,000 nearly equal probabilities another batch's rounding may well change what is drawn.
    """
    monkeypatch.setattr(gen_cot, "READ", 9 * at_once)  # prompts have 3 to 9 tokens: some are read together, some alone
    model = random_model(gpt2_tokenizer)
    model.generation_config.eos_token_id = list(range(0, len(gpt2_tokenizer), 9))  # about one token in nine ends a row
    batch = [{"id": str(i), "prompt": "Why? " * (1 + i % 4)} for i in range(8)]
    together = judged(model, gpt2_tokenizer, batch, at_once, max_new_tokens=25, num_cots=2)
    lengths = [n for result in together for n in result.tokens]
    assert len(set(lengths)) > 3 and max(lengths) <= 25
    for record, result in zip(batch, together, strict=True):
        (alone,) = judged(model, gpt2_tokenizer, [record], max_new_tokens=25, num_cots=2)
        assert alone.cots == result.cots and alone.tokens == result.tokens and result.cots[0] != result.cots[1]
        for cot, score in zip(result.cots, result.scores, strict=True):
            fresh = fresh_scores(model, gpt2_tokenizer, record["prompt"], cot)
            assert score.probs == pytest.approx(fresh.probs.tolist(), abs=1e-4)


def test_a_cache_that_grows_in_place_holds_what_one_that_copies_holds():
    ours, theirs = gen_cot.GrowingLayer(), DynamicLayer()
    for n in (7, 1, 1, 127, 1, 300, 1):
        keys, values = torch.randn(2, 3, 4, n, 5)
        for layer in (ours, theirs):
            layer.update(keys, values)
        torch.testing.assert_close((ours.keys, ours.values), (theirs.keys, theirs.values), rtol=0, atol=0)
    assert ours.get_seq_length() == 438


def test_a_model_is_not_asked_beyond_its_positions(mistral_tokenizer):
    model = random_model(mistral_tokenizer, max_position_embeddings=32)
    suffix = records.score_tokens(mistral_tokenizer, GRID).suffix_ids
    prompt = records.prompt_ids(mistral_tokenizer, "Why?")
    (written,) = decode(model, [prompt], ["a"], sampling=Sampling(), suffix_ids=suffix, end_ids=[], at_once=1)
    assert len(prompt) + len(written.ids[0]) + len(suffix) + 2 == 32


def test_sampling_follows_the_nucleus_and_the_penalty():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    so_far = torch.tensor([[0, 0]])
    uniform = (torch.arange(10000) + 0.5) / 10000
    repeated = logits.expand(10000, 4), so_far.expand(10000, 2), uniform
    drawn = sample(*repeated, temperature=1.0, top_p=0.9, repetition_penalty=1.0)
    shares = torch.bincount(drawn, minlength=4) / 10000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=1e-3, rtol=0)
    greedy = sample(logits, so_far, torch.zeros(1), temperature=0, top_p=1.0, repetition_penalty=1.0)
    assert greedy.tolist() == [0]
    # log .5 · 2 = log .25 < log .3
    assert sample(logits, so_far, torch.zeros(1), temperature=0, top_p=1.0, repetition_penalty=2.0).tolist() == [1]


def test_a_nucleus_that_is_not_among_the_likeliest_is_found_all_the_same(monkeypatch):
    """A peaked and a flat row: with the whole vocabulary sorted and with a part of it, the same tokens."""
    logits = torch.randn(200, 600, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.5, 5.0]).repeat(100)[:, None]
    given = (logits, torch.zeros(200, 1, dtype=torch.long), torch.linspace(0, 0.999, 200))
    drawn = []
    for likeliest in (600, 20):
        monkeypatch.setattr(gen_cot, "NUCLEUS", likeliest)
        drawn.append(sample(*given, temperature=1.0, top_p=0.9, repetition_penalty=1.0).tolist())
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 100


def test_an_interrupted_file_goes_on_and_ends_the_same(tiny_records, write_jsonl, run_script, tmp_path, monkeypatch, capsys):
    data, out = write_jsonl("train.jsonl", tiny_records[:12]), tmp_path / "p.jsonl"
    arguments = ["--model", records.TINY_SEED, "--data", data, "--batch-size", 1, "--seed", 5]
    run_script("predict", *arguments, "--out", tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == [r["id"] for r in tiny_records[:12]]
    assert all(row["finished"] == [True] and row["score"] == r["score"] for row, r in zip(rows, tiny_records, strict=False))

    real = gen_cot.judge

    def cut_off(*args, **kwargs):
        yield from itertools.islice(real(*args, **kwargs), 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(gen_cot, "judge", cut_off)
    with pytest.raises(SystemExit):
        run_script("predict", *arguments, "--out", out)
    part = tmp_path / "p.jsonl.part"
    assert not out.exists() and part.exists()
    part.write_bytes(part.read_bytes()[:-20])  # the last line is torn
    with pytest.raises(SystemExit):
        run_script("predict", *arguments, "--out", out, "--top-p", 0.5)
    assert "top_p was 0.9, is 0.5" in capsys.readouterr().err
    monkeypatch.setattr(gen_cot, "judge", real)
    run_script("predict", *arguments, "--out", out)
    assert out.read_bytes() == whole and not part.exists()
    assert "going on after 4 finished records" in capsys.readouterr().out

    # What is finished is not written over
    with pytest.raises(SystemExit):
        run_script("predict", *arguments, "--out", out)
    assert "already holds a finished run" in capsys.readouterr().err


def test_gen_cot_keeps_the_annotated_cot_and_the_true_score(tiny_records, write_jsonl, run_script, tmp_path):
    data, out = write_jsonl("train.jsonl", tiny_records[:3]), tmp_path / "cots.jsonl"
    run_script("gen_cot", "--model", records.TINY_SEED, "--data", data, "--out", out, "--num-cots", 2)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{key: row[key] for key in r} for row, r in zip(rows, tiny_records, strict=False)] == tiny_records[:3]
    assert all(len(row["cots"]) == 2 and row["finished"] == [True, True] and len(row) == 6 for row in rows)


def test_out_of_memory_halves_the_batch(tiny_records, write_jsonl, run_script, tmp_path, monkeypatch, capsys):
    data, real, sizes = write_jsonl("train.jsonl", tiny_records[:25]), gen_cot.judge, []

    def small_device(*args, **options):
        sizes.append((len(args[2]), options["at_once"]))
        yield from itertools.islice(real(*args, **options), 3 if options["at_once"] > 3 else None)
        if options["at_once"] > 3:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(gen_cot, "judge", small_device)
    out = tmp_path / "cots.jsonl"
    run_script("gen_cot", "--model", records.TINY_SEED, "--data", data, "--out", out, "--batch-size", 8)
    assert sizes == [(25, 8), (25, 4), (16, 2), (9, 2)] and len(out.read_text().splitlines()) == 25
    assert "out of memory: going on with 2 sequences at a time" in capsys.readouterr().out


def test_given_cots_are_scored_as_they_stand(tiny_records, write_jsonl, run_script, tmp_path, capsys):
    """Annotated CoTs get the distribution of a fresh pass; CoTs of an earlier run get the one they had there.

    Also those that filled the model to its last position.
    """
    data, model = write_jsonl("test.jsonl", tiny_records[:6]), str(shutil.copytree(records.TINY_SEED, tmp_path / "short"))
    config = json.loads((tmp_path / "short/config.json").read_text())
    (tmp_path / "short/config.json").write_text(json.dumps(config | {"max_position_embeddings": 112}))
    run_script("predict", "--model", model, "--data", data, "--out", tmp_path / "own.jsonl", "--num-cots", 2)
    run_script(
        "predict", "--model", model, "--data", tmp_path / "own.jsonl", "--out", tmp_path / "again.jsonl", "--given", "cots"
    )
    run_script("predict", "--model", model, "--data", data, "--out", tmp_path / "cot.jsonl", "--given", "cot")
    own, again, cot = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in ("own", "again", "cot")
    )
    assert not all(done for row in own for done in row["finished"])
    network, tokenizer = gen_cot.load_model(model, dtype=torch.float32), gen_cot.load_tokenizer(model)
    for before, after, annotated, record in zip(own, again, cot, tiny_records[:6], strict=True):
        assert after["cots"] == before["cots"] and len(after["finished"]) == 2
        for k in (0, 1):
            assert after["score_probs"][k] == pytest.approx(before["score_probs"][k], abs=1e-4)
        assert annotated["cots"] == [record["cot"]]
        fresh = fresh_scores(network, tokenizer, record["prompt"], record["cot"])
        assert annotated["score_probs"][0] == pytest.approx(fresh.probs.tolist(), abs=1e-4)

    own[3] = own[3] | {"cots": own[3]["cots"][:1], "finished": [True]}
    with pytest.raises(SystemExit) as exit:
        uneven = write_jsonl("uneven.jsonl", own)
        run_script("predict", "--model", model, "--data", uneven, "--out", tmp_path / "x.jsonl", "--given", "cots")
    assert exit.value.code == 2 and "'train-0003' has another number of CoTs" in capsys.readouterr().err
