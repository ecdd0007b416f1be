"""Stage 3: the gradient against autograd of the expected reward over all CoTs; a run, cut off and whole."""

import json
import signal
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast as FastTokenizer

import stage3_train
from loss import advantages
from stage1_train import accumulate_gradients
from tract import rollout, writing
from tract.encode import Example, score_tokens
from tract.models import TINY_SEED, score_tensors
from tract.records import Grid
from tract.writing import Loaded

GRID = Grid.parse("1,5", "is")
PROMPT = Example("x", [4, 2, 4], 3, 3, 4.0)  # y* = 4
VOCABULARY = ["</s>", "is", "1", "5", "a", "?"]  # "is" is the suffix
ARGS = SimpleNamespace(bf16=False, batch_size=4, max_new_tokens=2, seed=0, grid=GRID, score_ce="none")
vars(ARGS).update(temperature=1.0, top_p=1.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def judge():
    """Make a model of six words, of which a CoT may have two."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = FastTokenizer(tokenizer_object=words, eos_token="</s>", unk_token="?")
    tokenizer.positions = 99
    model = random_model(tokenizer, hidden_size=16, intermediate_size=16, initializer_range=0.4)
    suffix_ids, score_ids = score_tokens(tokenizer, GRID)
    assert (suffix_ids, score_ids) == ([1], [2, 3])
    return Loaded(model, tokenizer, GRID, suffix_ids, [0], score_tensors(score_ids, GRID), is_vllm=False)


@pytest.fixture(scope="module")
def all_cots(judge):
    """Let the judge write every CoT that there is."""
    texts = list(product(range(6), repeat=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "random_numbers", lambda name, n: torch.tensor(texts[int(name[6:])] + (0,)))
        patch.setattr(writing, "sample", lambda logits, so_far, uniform, args: uniform)
        cots = rollout.write_own(ARGS, judge, [PROMPT], "1", len(texts))[0]
    return list({tuple(cot.sampled): cot for cot in cots}.values())


def expected_reward(judge, cots, flat: bool) -> tuple:
    """Return E[r] by plain forward passes, as a tensor that knows its gradient, and p and r of each CoT.

    flat: as if the reward did not depend on the model.
    """
    p, r = [], []
    for cot in cots:
        log_p = judge.model(torch.tensor([PROMPT.ids + cot.sampled])).logits[0].log_softmax(-1)
        p.append(sum(log_p[2 + i, token] for i, token in enumerate(cot.sampled)).exp())
        words = [i for i in cot.sampled if i > 1 and i != 5]  # the text: no suffix, no control token
        if 1 in cot.sampled:
            words = [i for i in cot.sampled[: cot.sampled.index(1)] if i > 1 and i != 5]
        scores = judge.model(torch.tensor([PROMPT.ids + words + [1]])).logits[0, -1].softmax(-1)
        r.append(-((scores[2] + 5 * scores[3] - 4) ** 2))
    p, r = torch.stack(p), torch.stack(r)
    return (p * (r.detach() if flat else r)).sum(), p.detach(), r.detach()


def gradient(judge, window: list[Example], **options) -> torch.Tensor:
    judge.model.zero_grad()
    accumulate_gradients(judge.model, window, judge.score_tensors | stage3_train.LOSS | options, ARGS)
    return torch.cat([w.grad.flatten() for w in judge.model.parameters()])


@pytest.fixture(scope="module")
def terms(judge, all_cots):
    """Return p, r, and of each CoT the gradients that its examples give to log p and to its reward."""
    assert sorted(len(stage3_train.examples_of(PROMPT, cot, 1.0)) for cot in all_cots) == [1] * 4 + [2] * 22
    assert sum(cot.finished for cot in all_cots) == 5
    once = {"n_sequences": 1}
    policy, score = [], []
    for cot in all_cots:
        policy.append(-gradient(judge, stage3_train.examples_of(PROMPT, cot, 1.0), lam=0, **once))
        score.append(-gradient(judge, stage3_train.examples_of(PROMPT, cot, 0.0), lam=1, **once))
    _, p, r = expected_reward(judge, all_cots, flat=False)
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    return p.double(), r.double(), torch.stack(policy).double(), torch.stack(score).double()


def mean_estimate(terms, kind: str | None, beta: float, rewards=None) -> torch.Tensor:
    """Return the mean of the estimator over all pairs of siblings. rewards: of both, whatever they wrote."""
    p, r, policy, score = terms
    total = 0
    for i, j in product(range(len(p)), repeat=2):
        pair = r[[i, j]] if rewards is None else rewards
        a = advantages(pair, kind) if kind else pair
        of_pair = a[0] * policy[i] + a[1] * policy[j] + beta * (score[i] + score[j])
        total = total + p[i] * p[j] * of_pair / 2
    return total


def exact(judge, cots, flat: bool = False) -> torch.Tensor:
    judge.model.zero_grad()
    expected_reward(judge, cots, flat)[0].backward()
    return torch.cat([w.grad.flatten() for w in judge.model.parameters()]).double()


def test_the_estimator_is_the_gradient_of_the_expected_reward(judge, all_cots, terms):
    """Both terms, and each alone; leave-one-out shifts nothing, division by the deviation does."""
    both, policy = exact(judge, all_cots), exact(judge, all_cots, flat=True)
    assert both.abs().max() > 0.1 and policy.abs().max() > 0.1 and (both - policy).abs().max() > 0.1
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(mean_estimate(terms, "leave-one-out", beta=1), both, **close)
    torch.testing.assert_close(mean_estimate(terms, "leave-one-out", beta=0), policy, **close)
    torch.testing.assert_close(mean_estimate(terms, None, beta=0), policy, **close)
    through_score = mean_estimate(terms, "leave-one-out", 1, rewards=torch.zeros(2).double())
    torch.testing.assert_close(through_score, both - policy, **close)
    by_group = mean_estimate(terms, "group", beta=0)
    scale = (by_group @ policy) / (policy @ policy)  # not even up to a factor
    assert (by_group - scale * policy).norm() > 0.1 * by_group.norm()


@pytest.mark.parametrize("kind", ["leave-one-out", "group"])
def test_random_rewards_teach_nothing(terms, kind):
    random = mean_estimate(terms, kind, beta=0, rewards=torch.tensor([0.9, 0.2]).double())
    assert random.abs().max() < 1e-5 and mean_estimate(terms, kind, beta=0).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["leave-one-out", "group"])
def test_a_window_is_the_mean_over_its_cots(kind, judge, all_cots, terms, monkeypatch):
    """Two prompts of three CoTs each; some reached the suffix, in one it was forced, one ended before."""
    by_ids = {tuple(cot.sampled): i for i, cot in enumerate(all_cots)}
    numbers = [by_ids[ids] for ids in [(4, 1), (4, 4), (1,), (0,), (2, 5), (3, 1)]]
    groups = [[all_cots[i] for i in numbers[:3]], [all_cots[i] for i in numbers[3:]]]
    monkeypatch.setattr(rollout, "write_own", lambda *_: groups)
    args = SimpleNamespace(num_cots=3, reward="squared", advantage=kind, grid=GRID)
    window, facts = stage3_train.write_window(args, judge, [PROMPT, PROMPT], 1)
    found = gradient(judge, window, lam=0.5, n_sequences=6)
    _, r, policy, score = terms
    weights = advantages(r[numbers].view(2, 3), kind).flatten()
    wanted = sum(w * policy[i] + 0.5 * score[i] for w, i in zip(weights, numbers, strict=True)) / 6
    torch.testing.assert_close(found.double(), -wanted, atol=1e-5, rtol=0)
    told = {"reward": r[numbers].mean().item(), "advantage": weights.abs().mean().item()}
    assert facts == pytest.approx(told | {"finished": 0.5, "forced": 3, "length": 10 / 6}, abs=1e-6)


def test_rewards(all_cots):
    args = SimpleNamespace(reward="exact", grid=GRID, seed=0)  # 5 is the nearest to 4
    for y, right in ((4.0, 1), (2.0, 0)):
        prompt = PROMPT._replace(score=y)
        wanted = [float(cot.scores.probs[right] > cot.scores.probs[1 - right]) for cot in all_cots]
        assert stage3_train.rewards_of(args, 1, prompt, all_cots).tolist() == wanted
    args.reward = "random"
    drawn = [stage3_train.rewards_of(args, step, PROMPT, all_cots) for step in (1, 1, 2)]
    assert drawn[0].equal(drawn[1]) and not drawn[0].equal(drawn[2]) and len(set(drawn[0].tolist())) == 26


def test_cots_hang_on_seed_step_and_record(judge, monkeypatch):
    """In any batch, and not on what was drawn before."""
    write = lambda step, *prompts: [  # noqa: E731
        [cot.sampled for cot in cots] for cots in rollout.write_own(ARGS, judge, prompts, step, 9)
    ]
    other = PROMPT._replace(id="y")
    both = write(1, PROMPT, other)
    assert write(1, PROMPT) == both[:1] and write(1, other) == both[1:] and both[0] != both[1]
    assert write(2, PROMPT) != both[:1]
    monkeypatch.setattr(ARGS, "seed", 1)
    assert write(1, PROMPT) != both[:1]


def test_worked_example_of_advantages():
    rewards = torch.tensor([[-1.0, -1, -4], [2, 2, 2]])
    assert advantages(rewards).tolist() == [[1.5, 1.5, -3], [0, 0, 0]]
    assert advantages(rewards, "group")[0].tolist() == pytest.approx([3**-0.5, 3**-0.5, -1], abs=1e-5)
    assert advantages(rewards, "group")[1].tolist() == [0, 0, 0]


RUN = "--steps 4 --prompts 2 --num-cots 2 --max-new-tokens 12 --lr 1e-3 --fp32 --seed 3".split()


@pytest.fixture
def command(lab, tiny_tokenizer, monkeypatch):
    """Make a p_tract of random weights; return the command that trains it, looking at it every other step."""
    lab.checkpoint(tiny_tokenizer).rename(lab.path / "p_tract")
    arguments = {"grid": "1,2,3,4,5", "suffix": "So the overall score is", "model": TINY_SEED, "stage": 2}
    (lab.path / "p_tract/run.json").write_text(json.dumps({"arguments": arguments}))
    monkeypatch.setattr(rollout, "EVERY", 2)
    files = [
        "--data",
        lab.write("train.jsonl", lab.rows[:8]),
        "--valid",
        lab.write("v.jsonl", lab.rows[8:12]),
    ]
    return ["stage3_train", "--model", lab.path / "p_tract", *files, *RUN]


@pytest.mark.parametrize("cut", ["stopped", "killed"])
def test_a_run_that_was_cut_off_ends_the_same(cut, command, lab, monkeypatch):
    """Stopped in the third step, or killed at the end, when the best weights were not saved yet."""
    where = (torch.nn.utils, "clip_grad_norm_", 3) if cut == "stopped" else (rollout, "keep_best", 5)
    module, name, call = where
    real, calls = getattr(module, name), []

    def cutting(*args):
        calls.append(1)
        if len(calls) == call and cut == "stopped":
            signal.raise_signal(signal.SIGTERM)
        if len(calls) == call and cut == "killed":
            raise SystemExit(137)
        return real(*args)

    lab.run(*command, "--out", lab.path / "whole")
    assert json.loads((lab.path / "whole/run.json").read_text())["kept"]["step"] == 4
    with monkeypatch.context() as patch:
        patch.setattr(module, name, cutting)
        lab.fail(*command, "--out", lab.path / "cut")
    lab.run(*command, "--out", lab.path / "cut")
    assert f"going on after step {3 if cut == 'stopped' else 4}" in lab.capsys.readouterr().out
    for file in ("log.jsonl", "model.safetensors"):
        assert (lab.path / "cut" / file).read_bytes() == (lab.path / "whole" / file).read_bytes()


def test_the_log(command, lab):
    """With β = 1 the penalty is minus the reward. No CoT of this model is finished: each is two examples."""
    lab.run(*command, "--out", lab.path / "out")
    log, run = lab.read("out/log.jsonl"), json.loads((lab.path / "out/run.json").read_text())
    names = "step taken lr loss ce penalty grad_norm reward finished forced length advantage".split()
    also = [{"valid_before"}, {"valid"}, set(), {"valid"}]
    assert [set(line) - set(names) for line in log] == also and set(names) <= set(log[0])
    assert run["kept"] == {"step": 4, "valid": log[3]["valid"]}
    assert run["valid_before"] == log[0]["valid_before"]
    assert "On 4 held-out records, own CoTs: RMSE" in (lab.path / "out/README.md").read_text("utf-8")
    assert log[3]["valid"]["rmse"] < log[0]["valid_before"]["rmse"]
    for line in log:
        assert line["penalty"] == pytest.approx(-line["reward"], abs=1e-5) and line["loss"] != line["penalty"]
        assert line["finished"] == 0 and line["forced"] == 4 and line["length"] <= 12 and line["lr"] == 1e-3


@pytest.mark.parametrize("best", [0, 2])
def test_the_best_weights_are_kept(best, command, lab, monkeypatch):
    """Let step `best` be the best: --out has p_tract's weights, or those of a run that ends there."""
    same = lab.path / "p_tract"
    if best:
        same = lab.path / "two"
        lab.run(*command[:5], *command[7:], "--steps", 2, "--out", same)  # without --valid
    errors = iter([0.5, 0.9, 0.7] if best == 0 else [0.9, 0.5, 0.7])
    found = {"n": 4, "rmse": 0.0, "r": 0.5, "finished": 1}
    monkeypatch.setattr(rollout, "evaluate", lambda *_: found | {"rmse": next(errors)})
    lab.run(*command, "--out", lab.path / "out")
    said = lab.capsys.readouterr().out
    assert "step 4: held out, on its own CoTs: RMSE 0.700, r 0.500, 100% finished" in said
    assert f"kept: the weights after step {best}, RMSE 0.500; before training " in said
    ours = load_file(lab.path / "out/model.safetensors")
    wanted = load_file(same / "model.safetensors")
    assert ours.keys() == wanted.keys() and all(ours[name].equal(wanted[name]) for name in ours)


def test_with_adapters_in_bf16_and_with_checkpointing(command, lab):
    """Checkpointing, which turns off the cache in training, changes nothing."""
    one = ["--steps", 1, "--lora", "--out"]
    lab.run(*command, *one, lab.path / "plain")
    lab.run(*command, *one, lab.path / "recomputed", "--gradient-checkpointing")
    command.remove("--fp32")
    at = command.index("--lr")
    del command[at : at + 2]
    lab.run(*command, *one, lab.path / "bf16", "--gradient-checkpointing", "--bf16")
    plain, recomputed, bf16 = [lab.read(f"{name}/log.jsonl")[0] for name in ("plain", "recomputed", "bf16")]
    for name in plain.keys() - {"valid", "valid_before"}:
        assert recomputed[name] == pytest.approx(plain[name], rel=1e-4)
    assert bf16["lr"] == 1e-5  # the default for adapters
    assert bf16["penalty"] != plain["penalty"] and bf16["penalty"] == pytest.approx(plain["penalty"], rel=0.1)


def test_what_makes_no_sense_is_refused_in_one_line(command, lab, monkeypatch):
    out = ["--out", lab.path / "out"]
    code, said = lab.fail("stage3_train", "--model", TINY_SEED, *command[3:], *out)
    assert code == 2 and "stage 3 starts from p_tract; give the --out of stage 2" in said
    assert "--temperature 0: all CoTs of a prompt" in lab.fail(*command, *out, "--temperature", 0)[1]
    assert "--num-cots: 1 is not between 2" in lab.fail(*command, *out, "--num-cots", 1)[1]
    assert "all are longer than 9 tokens" in lab.fail(*command, *out, "--max-length", 9)[1]
    code, said = lab.fail(*command, *out, "--lr", 1e38)
    assert code == 1 and "out.part: the last step spoilt the weights; remove it, and try a lower --lr" in said
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    code, said = lab.fail(*command, *out)
    assert (
        code == 2 and said.strip() == "stage 3 runs in one process: start it with python, not with torchrun"
    )


def test_a_collapse_is_said():
    log = [{"reward": -1.0 - 0.1 * (i % 2), "finished": 1.0} for i in range(10)]
    fallen = [{"reward": -1.3, "finished": 0.8}] * 10
    said = []
    for n in range(1, 21):
        rollout.say_collapse((log + log)[:n], said.append)
    assert not said
    for n in range(1, 21):
        rollout.say_collapse((log + fallen)[:n], said.append)
    assert len(said) == 2 and "step 20: COLLAPSE? finished fell from 1.000 to 0.800" in said[0]
    assert "reward fell from -1.050 to -1.300" in said[1]
