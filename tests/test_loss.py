"""RAIL and CoT-RAFT against hand-computed values and an independent float64 reference."""

import math

import pytest
import torch
import torch.nn.functional as F

from loss import cot_raft_loss, rail

IDS, VALUES = torch.tensor([2, 3]), torch.tensor([1.0, 5.0])
SCORE_ROW = [math.log(p) for p in (0.1, 0.1, 0.2, 0.6)]


def test_worked_example_of_rail():
    expected, off_grid, probs = rail(torch.tensor(SCORE_ROW), score_ids=IDS, score_values=VALUES)
    assert expected.item() == pytest.approx(3.2)
    assert off_grid.item() == pytest.approx(0.2)
    assert probs.tolist() == pytest.approx([0.2, 0.6])
    renormalised = rail(torch.tensor(SCORE_ROW), score_ids=IDS, score_values=VALUES, renormalise=True)
    assert renormalised.expected.item() == pytest.approx(4.0)


def test_worked_example_of_cot_raft():
    logits = torch.tensor([[0.0, math.log(1 / 3), math.log(1 / 3), math.log(1 / 3)], SCORE_ROW])  # p(token 0) = .5
    batch = dict(is_score=torch.tensor([False, True]), true_scores=torch.tensor([5.0]), score_ids=IDS, score_values=VALUES)
    loss = cot_raft_loss(logits, torch.tensor([0, 3]), **batch)
    assert loss.ce.item() == pytest.approx((math.log(2) - math.log(0.6)) / 2)
    assert loss.squared_error.item() == pytest.approx(3.24)
    assert loss.total.item() == pytest.approx(3.842, abs=5e-4)
    assert cot_raft_loss(logits, torch.tensor([0, 3]), **batch, score_in_ce=False).ce.item() == pytest.approx(math.log(2))
    assert cot_raft_loss(logits, torch.tensor([0, 3]), **batch, ce_sum=True).ce.item() == pytest.approx(2 * loss.ce.item())
    assert cot_raft_loss(logits, torch.tensor([0, 3]), **batch, ce_weight=0, lam=2).total.item() == pytest.approx(6.48)


def random_batch(seed: int = 0):
    """Four sequences of 3, 1, 5 and 2 supervised rows, V = 11, five scores, real-valued targets."""
    random = torch.Generator().manual_seed(seed)
    rows = [3, 1, 5, 2]
    logits = 3 * torch.randn(sum(rows), 11, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 11, (sum(rows),), generator=random)
    is_score = torch.zeros(sum(rows), dtype=torch.bool)
    is_score[torch.tensor(rows).cumsum(0) - 1] = True
    return rows, logits, targets, is_score, torch.tensor([1.0, 3.67, 5.0, 2.5], dtype=torch.float64)


GRID = dict(score_ids=torch.tensor([7, 1, 4, 9, 2]), score_values=torch.tensor([1.0, 2, 3, 4, 5]))


@pytest.mark.parametrize("ce_sum", [False, True])
@pytest.mark.parametrize("score_in_ce", [False, True])
def test_equals_an_independent_reference_in_value_and_gradient(score_in_ce, ce_sum):
    """The reference is the formula sequence by sequence, with explicit exponentials, in float64."""
    rows, logits, targets, is_score, true = random_batch()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    options = dict(lam=0.7, ce_weight=1.3, score_in_ce=score_in_ce, ce_sum=ce_sum)
    cot_raft_loss(ours, targets, is_score=is_score, true_scores=true, **GRID, **options).total.backward()

    log_likelihood, squared, n_tokens, start = 0.0, 0.0, 0, 0
    for b, n in enumerate(rows):
        p = theirs[start : start + n].exp() / theirs[start : start + n].exp().sum(1, keepdim=True)
        for t in range(n if score_in_ce else n - 1):
            log_likelihood = log_likelihood + p[t, targets[start + t]].log()
            n_tokens += 1
        squared = squared + (sum(p[n - 1, i] * v for i, v in zip([7, 1, 4, 9, 2], range(1, 6), strict=True)) - true[b]) ** 2
        start += n
    reference = 1.3 * -log_likelihood / (4 if ce_sum else n_tokens) + 0.7 * squared / 4
    reference.backward()

    value = cot_raft_loss(logits, targets, is_score=is_score, true_scores=true, **GRID, **options).total
    assert value.item() == pytest.approx(reference.item(), abs=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-12, rtol=0)


def test_gradcheck():
    _, logits, targets, is_score, true = random_batch(1)

    def total(x):
        return cot_raft_loss(x, targets, is_score=is_score, true_scores=true, **GRID).total

    assert torch.autograd.gradcheck(total, (logits.requires_grad_(),))


@pytest.mark.parametrize("split", [[2, 2], [1, 3], [1, 1, 1, 1]])
def test_micro_batches_add_up_to_the_whole_step(split):
    rows, logits, targets, is_score, true = random_batch(2)
    whole = logits.clone().requires_grad_()
    total = cot_raft_loss(whole, targets, is_score=is_score, true_scores=true, **GRID).total
    total.backward()
    parts, value, row, seq = logits.clone().requires_grad_(), 0.0, 0, 0
    for n in split:
        here = slice(row, row + sum(rows[seq : seq + n]))
        part = cot_raft_loss(
            parts[here],
            targets[here],
            is_score=is_score[here],
            true_scores=true[seq : seq + n],
            **GRID,
            n_tokens=11,
            n_sequences=4,
        ).total
        part.backward()
        value, row, seq = value + part.item(), here.stop, seq + n
    assert value == pytest.approx(total.item(), abs=1e-12)
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-12, rtol=0)


def test_lambda_zero_is_plain_cross_entropy_and_bf16_is_computed_in_fp32():
    _, logits, targets, is_score, true = random_batch(3)
    plain = cot_raft_loss(logits, targets, is_score=is_score, true_scores=true, **GRID, lam=0.0).total
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets))
    half = cot_raft_loss(logits.bfloat16(), targets, is_score=is_score, true_scores=true.float(), **GRID)
    assert half.total.dtype == torch.float32
