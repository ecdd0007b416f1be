"""Writing CoTs and reading scores: what the JSONL's own text gets, whatever the batch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gen_cot
import stage1_train
from loss import Rail, rail
from tract import batch, models, options, writing
from tract.encode import encode_prefix, encode_target
from tract.files import encode_prompts
from tract.models import TINY_SEED
from tract.records import SUFFIX, Grid
from tract.text import encode_prompt
from tract.writing import Loaded, load_judge, sample

GRID, COT = Grid(), "The answer is good."
PROMPTS = ["Is it good?", "Is this a much longer prompt, so that others are padded on the left?", "Why?"]
ROWS = [{"id": f"r{i}", "prompt": prompt, "cot": COT} for i, prompt in enumerate(PROMPTS)]


def how(**more):
    """Return the paper's options, but for those that are given."""
    return SimpleNamespace(**vars(options.make_writing_parser("", "", "", "").parse_args([])) | more)


@torch.no_grad()
def plain(judge: Loaded, ids: list[int]) -> tuple[torch.Tensor, Rail]:
    """Return logits and the last score distribution by a pass with no cache and no padding."""
    logits = judge.model(torch.tensor([ids])).logits[0]
    return logits, rail(logits[-1], **judge.score_tensors)


def judged(lab, judge: Loaded, data: Path, *options) -> list[dict]:
    """Run predict.py and compare all distributions with a plain pass over prompt, CoT and suffix."""
    out = lab.path / f"{len(list(lab.path.iterdir()))}.jsonl"
    lab.run("predict", "--model", lab.path / "seed", "--data", data, "--out", out, *options)
    for row in lab.read(out.name):
        prompt = encode_prompt(judge.tokenizer, row["prompt"])
        for cot, probs, off_grid in zip(row["cots"], row["score_probs"], row["off_grid"], strict=True):
            _, wanted = plain(judge, encode_prefix(judge.tokenizer, prompt, cot, GRID))
            assert probs == pytest.approx(wanted.probs.tolist(), abs=1e-4)
            assert off_grid == pytest.approx(wanted.off_grid.item(), abs=1e-4)
    return lab.read(out.name)


POSITIONS = {"mistral_tokenizer": 999, "gpt2_tokenizer": 999, "tiny_tokenizer": 50}


@pytest.mark.parametrize("name", POSITIONS)
def test_scores_of_cots_without_suffix_and_of_given_ones(name, request, lab, monkeypatch):
    """Write random CoTs, which mostly tokenise to other ids; the last tokenizer's fill all positions."""
    monkeypatch.setattr(batch, "READ_TOKENS", 40)
    monkeypatch.setattr(writing, "READ_TOKENS", 40)
    model = lab.checkpoint(request.getfixturevalue(name), max_position_embeddings=POSITIONS[name])
    judge, data = load_judge(str(model), GRID, False), lab.write("test.jsonl", ROWS)
    own = judged(lab, judge, data, "--num-cots", 3, "--max-new-tokens", 30)
    assert [row["finished"] for row in own] == [[False] * 3] * 3
    again = judged(lab, judge, lab.write("own.jsonl", own), "--given", "cots")
    assert [row["cots"] for row in again] == [row["cots"] for row in own]
    assert [row["cots"] for row in judged(lab, judge, data, "--given", "cot")] == [[COT]] * 3
    assert [row["cots"] for row in judged(lab, judge, data, "--no-cot")] == [[""]] * 3
    assert len(judged(lab, judge, data, "--max-new-tokens", 1)) == 3


def test_in_bf16_no_logit_of_a_score_is_rounded(lab, monkeypatch):
    """Train, and judge in the three ways: what the loss and RAIL are given does not fit into bf16."""
    seen = []

    def spy(function):
        def looking(logits, *args, score_ids, **options):
            scores = logits[..., score_ids]
            seen.append(bool((scores != scores.bfloat16()).any()))
            return function(logits, *args, score_ids=score_ids, **options)

        return looking

    for module, name in ((stage1_train, "cot_raft_loss"), (writing, "rail")):
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    data = ["--data", lab.write("few.jsonl", lab.rows[:4]), "--bf16"]
    lab.run("stage1_train", *data, "--epochs", 1, "--out", lab.path / "p_s")
    for number, how in enumerate(([], ["--given", "cot"], ["--no-cot"])):
        lab.run("predict", "--model", TINY_SEED, *data, *how, "--out", lab.path / f"{number}.jsonl")
    assert len(seen) >= 4 and all(seen)


@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_scores_are_those_of_float64(bias):
    """Multiply bf16 weights and states to logits near 30, where bf16 has steps of .125; and backwards."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 500, bias=bias, dtype=torch.bfloat16)
    model = SimpleNamespace(get_output_embeddings=lambda: layer)
    hidden = (20 * torch.randn(50, 64)).bfloat16().requires_grad_()
    ids, exact = torch.tensor([7, 3, 400]), hidden.detach().double().requires_grad_()
    wanted = exact @ layer.weight[ids].double().T + (layer.bias[ids].double() if bias else 0)
    found = models.next_token_logits(model, hidden, ids)
    assert found.dtype == torch.float32 and found.shape == (50, 500) and wanted.abs().max() > 30
    torch.testing.assert_close(found[:, ids].double(), wanted, atol=1e-4, rtol=0)
    assert torch.equal(found[:, 10:400], models.head(model, hidden)[:, 10:400].float())
    found[:, ids].sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, atol=0, rtol=1e-2)  # the sum, rounded once


SPELLED = [("mistral_tokenizer", False), ("llama31_tokenizer", False)]
SPELLED += [("gpt2_tokenizer", False), ("gpt2_tokenizer", True)]


@pytest.mark.parametrize("name, spelled", SPELLED)
def test_a_cot_that_reaches_its_suffix_comes_with_its_scores(name, spelled, request, lab, monkeypatch):
    """Read it again where training would encode it otherwise, as where it is spelled letter by letter."""
    tokenizer, score, read = request.getfixturevalue(name), writing.score, []
    judge = load_judge(str(lab.checkpoint(tokenizer)), GRID, False)
    ids = encode_target(tokenizer, COT, "1", SUFFIX)[:-1]
    if spelled:
        ids = [tokenizer(letter).input_ids[0] for letter in COT] + judge.suffix_ids
    steps = iter([*ids, 7])  # whatever the random numbers, these are written; and one step for the scores
    monkeypatch.setattr(writing, "sample", lambda logits, *_: torch.full((len(logits),), next(steps)))
    monkeypatch.setattr("tract.judge.score", lambda judge, texts: read.extend(texts) or score(judge, texts))
    rows = judged(lab, judge, lab.write("test.jsonl", ROWS))
    assert [(row["cots"], row["finished"]) for row in rows] == [([COT], [True])] * 3
    assert len(read) == (3 if spelled else 0) and not list(steps)


MIXED = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWS = {"llama": {}, "mistral": {}, "gemma3_text": MIXED}  # none, one of 8 tokens, and some layers
WINDOWS["qwen2"] = {"use_sliding_window": True, "max_window_layers": 1}


@pytest.mark.parametrize("at_once", [16, 5, 1])
@pytest.mark.parametrize("kind", WINDOWS)
def test_every_token_is_what_a_plain_pass_would_sample(kind, at_once, gpt2_tokenizer, lab, monkeypatch):
    """Write two CoTs a prompt, while rows end and others take their place, beyond the sliding window."""
    monkeypatch.setattr(batch, "READ_TOKENS", 2 * at_once)  # some prompts are read together
    options = {"model_type": kind, "sliding_window": 8, **WINDOWS[kind]}
    options |= {"max_position_embeddings": 34, "eos_token_id": [*range(0, 290, 9)]}  # a token in nine ends
    judge = load_judge(str(lab.checkpoint(gpt2_tokenizer, **options)), GRID, False)
    prompts = [encode_prompt(gpt2_tokenizer, "Why? " * (1 + i % 4))[i % 3 :] for i in range(7)] + [[9]]
    names, args, texts, scores = list("abcdefghijklmnop"), how(max_new_tokens=25, num_cots=2), [], []
    for row, ids, found in writing.write(judge, prompts, names, args, at_once):
        text, start = prompts[row // 2] + ids, len(prompts[row // 2])
        (logits, wanted), uniform = plain(judge, text), writing.random_numbers(names[row], 26)
        for i, id in enumerate(ids):
            so_far, last = torch.tensor([text[: start + i]]), logits[start + i - 1]
            assert sample(last[None], so_far, uniform[i, None], args).tolist() == [id]
        texts.append(text)
        scores.append(pytest.approx(wanted.probs.tolist(), abs=1e-5))
        assert found.probs == scores[-1]
    assert len(texts) == 16 and len(set(map(len, texts))) > 3
    assert max(map(len, texts)) + len(judge.suffix_ids) + 2 == 34  # suffix, score and end have to fit
    assert [found.probs for found in writing.score(judge, texts)] == scores


def test_a_cot_of_broken_characters_fits_the_positions(gpt2_tokenizer, lab, monkeypatch):
    """Each first byte of a character decodes to U+FFFD, which is three tokens when it is read again."""
    model = lab.checkpoint(gpt2_tokenizer, model_type="gpt2", max_position_embeddings=60)
    broken = gpt2_tokenizer("🙂").input_ids[0]
    monkeypatch.setattr(writing, "sample", lambda logits, *_: torch.full((len(logits),), broken))
    data = ["--model", model, "--data", lab.write("few.jsonl", ROWS), "--out", lab.path / "judged.jsonl"]
    lab.run("predict", *data)
    said, (row, *_) = lab.capsys.readouterr().out, lab.read("judged.jsonl")
    assert row["finished"] == [False] and {*row["cots"][0]} == {"\ufffd"} and len(row["score_probs"][0]) == 5
    assert "most CoTs never came to 'So the overall score is'" in said and "mean off-grid mass 0." in said


def test_a_record_without_mass_on_the_grid_is_marked_and_counted(lab, monkeypatch):
    score = writing.score
    nothing = Rail(0.0, 1.0, [0.0] * 5)
    monkeypatch.setattr("tract.judge.score", lambda *given: [nothing, *score(*given)[1:]])
    judge = ["predict", "--model", TINY_SEED, "--data", lab.write("few.jsonl", lab.rows[:3]), "--no-cot"]
    lab.run(*judge, "--renormalise", "--out", lab.path / "judged.jsonl")
    said, rows = lab.capsys.readouterr().out, lab.read("judged.jsonl")
    assert sorted(row["prediction"] is None for row in rows) == [False, False, True]
    assert "1 records without any mass on the grid: nothing to renormalise" in said
    assert all(row["renormalised"] and row["grid"] == str(GRID) for row in rows)
    lab.run(*judge, "--out", lab.path / "plain.jsonl")
    assert (
        "as much of every score is missing; 3 predictions lie below 1. --renormalise"
        in lab.capsys.readouterr().out
    )


def test_prompts_that_ask_for_other_last_words_are_named(lab, capsys):
    rows = [lab.rows[0] | {"prompt": "Write feedback, then [RESULT] and a score ."}]
    data = ["--model", TINY_SEED, "--data", lab.write("few.jsonl", rows), "--max-new-tokens", 2]
    lab.run("predict", *data, "--out", lab.path / "a.jsonl")
    assert "prompts ask for [RESULT], CoTs are to end in 'So the overall score is'" in capsys.readouterr().out


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
        monkeypatch.setattr(writing, "NUCLEUS", likeliest)
        found.append(sample(*given, how()).tolist())
    assert found[0] == found[1] and len(set(found[0])) > 100


def test_out_of_memory_halves_the_batch(lab, monkeypatch):
    real, sizes = gen_cot.write_cots, []

    def small_device(judge, records, prompts, args, at_once):
        sizes.append((len(records), at_once))
        if at_once > 2:
            raise torch.OutOfMemoryError
        return real(judge, records, prompts, args, at_once)

    monkeypatch.setattr(gen_cot, "write_cots", small_device)
    data = ["--data", lab.write("train.jsonl", lab.rows[:25]), "--batch-size", 8, "--max-new-tokens", 8]
    lab.run("gen_cot", "--model", TINY_SEED, *data, "--out", lab.path / "c.jsonl")
    assert sizes == [(25, 8), (25, 4), (16, 2), (9, 2)]
    assert "out of memory: going on with 2 sequences at a time" in lab.capsys.readouterr().out
    for row, r in zip(lab.read("c.jsonl"), lab.rows, strict=False):  # the true score is kept
        assert {key: row[key] for key in r} == r and len(row["cots"]) == len(row["finished"]) == 1


def test_prompts_are_held_in_four_bytes_a_token(mistral_tokenizer):
    prompts = encode_prompts(mistral_tokenizer, ROWS)
    for row in ROWS:
        ids = encode_prompt(mistral_tokenizer, row["prompt"])
        held = memoryview(prompts[row["id"]])
        assert held.tolist() == ids and held.nbytes == 4 * len(ids)


def test_shares_joined_are_what_one_process_writes(lab):
    data = lab.write("train.jsonl", lab.rows[:25])
    how = ("gen_cot", "--model", TINY_SEED, "--data", data, "--max-new-tokens", 20, "--out")
    lab.run(*how, lab.path / "whole.jsonl")
    for i in (1, 2, 3):
        lab.run(*how, lab.path / f"{i}.jsonl", "--shard", f"{i}/3")
    shares = [(lab.path / f"{i}.jsonl").read_bytes() for i in (1, 2, 3)]
    assert b"".join(shares) == (lab.path / "whole.jsonl").read_bytes() and all(shares)
    code, said = lab.fail(*how, lab.path / "x.jsonl", "--shard", "1/26")
    assert code == 2 and "fewer records than shares" in said
    assert lab.fail(*how, lab.path / "x.jsonl", "--shard", "4/3")[0] == 2


def test_without_vllm_its_engine_says_how_to_get_it(lab):
    how = (
        "--model",
        TINY_SEED,
        "--data",
        lab.write("few.jsonl", lab.rows[:2]),
        "--out",
        lab.path / "x.jsonl",
    )
    code, said = lab.fail("predict", *how, "--engine", "vllm", "--engine-args", "tensor_parallel_size=2")
    assert code == 2 and said.count("\n") == 1 and "pip install vllm" in said
