"""RAIL and CoT-RAFT against hand-computed values and an independent float64 reference."""

import math
from functools import partial

import pytest
import torch

from loss import cot_raft_loss, rail

TWO = {"score_ids": torch.tensor([2, 3]), "score_values": torch.tensor([1.0, 5.0])}
FIVE = {"score_ids": torch.tensor([7, 1, 4, 9, 2]), "score_values": torch.tensor([1.0, 2, 3, 4, 5])}
ROWS = [3, 1, 5, 2]  # supervised rows of the four sequences of a random batch
TRUE = torch.tensor([99, 99, 1.0, 3.67, 99, 99, 99, 99, 5.0, 99, 2.5], dtype=torch.float64)  # 99: no score


def test_worked_examples():
    """The true score of a row that is no score row does not matter, not even NaN."""
    coin, row = [0.0, *[math.log(1 / 3)] * 3], [math.log(p) for p in (0.1, 0.1, 0.2, 0.6)]
    expected, off_grid, probs = rail(torch.tensor(row), **TWO)
    assert [expected.item(), off_grid.item(), *probs.tolist()] == pytest.approx([3.2, 0.2, 0.2, 0.6])
    batch = {"is_score": torch.tensor([False, True]), "true_scores": torch.tensor([math.nan, 5.0])}
    loss = partial(cot_raft_loss, torch.tensor([coin, row]), torch.tensor([0, 3]), **batch, **TWO)
    ce = (math.log(2) - math.log(0.6)) / 2
    assert [x.item() for x in loss()] == pytest.approx([3.842, ce, 3.24], abs=5e-4)
    assert loss(score_in_ce=False).ce.item() == pytest.approx(math.log(2))
    assert loss(ce_sum=True).ce.item() == pytest.approx(2 * ce)
    assert loss(ce_weight=0, lam=2).total.item() == pytest.approx(6.48)


def random_batch(seed: int):
    """Draw logits for V = 13 and targets; score rows and true scores are always the same."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(11, 13, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 13, (11,), generator=random)
    return logits.requires_grad_(), {"targets": targets, "is_score": TRUE < 99, "true_scores": TRUE}


@pytest.mark.parametrize("ce_sum", [False, True])
@pytest.mark.parametrize("score_in_ce", [False, True])
def test_equals_an_independent_reference_in_value_and_gradient(score_in_ce, ce_sum):
    """The reference is the formula sequence by sequence, with explicit exponentials, in float64."""
    ours, batch = random_batch(0)
    theirs = ours.detach().clone().requires_grad_()
    options = {"lam": 0.7, "ce_weight": 1.3, "score_in_ce": score_in_ce, "ce_sum": ce_sum}
    loss = cot_raft_loss(ours, **batch, **FIVE, **options).total
    loss.backward()
    log_likelihood, squared, n_tokens, row = 0.0, 0.0, 0, 0
    for n in ROWS:
        p = theirs[row : row + n].exp() / theirs[row : row + n].exp().sum(1, keepdim=True)
        for t in range(n if score_in_ce else n - 1):
            log_likelihood, n_tokens = log_likelihood + p[t, batch["targets"][row + t]].log(), n_tokens + 1
        expected = sum(p[n - 1, token] * value for token, value in ((7, 1), (1, 2), (4, 3), (9, 4), (2, 5)))
        squared, row = squared + (expected - TRUE[row + n - 1]) ** 2, row + n
    reference = 1.3 * -log_likelihood / (4 if ce_sum else n_tokens) + 0.7 * squared / 4
    reference.backward()
    torch.testing.assert_close((loss, ours.grad), (reference, theirs.grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("cuts", [[4], [2, 3, 7], [*range(1, 11)]])
def test_micro_batches_add_up_to_the_whole_step(cuts):
    """Batches may end within a sequence and hold no score at all."""
    whole, batch = random_batch(2)
    total = cot_raft_loss(whole, **batch, **FIVE).total
    total.backward()
    parts, value = whole.detach().clone().requires_grad_(), 0.0
    for start, end in zip([0, *cuts], [*cuts, 11], strict=True):
        some = {name: label[start:end] for name, label in batch.items()}
        value += cot_raft_loss(parts[start:end], **some, **FIVE, n_tokens=11, n_sequences=4).total
    value.backward()
    torch.testing.assert_close((value, parts.grad), (total, whole.grad), atol=1e-12, rtol=0)


def test_gradcheck_and_that_bf16_is_computed_in_fp32():
    logits, batch = random_batch(1)
    assert torch.autograd.gradcheck(lambda x: cot_raft_loss(x, **batch, **FIVE).total, (logits,))
    half = logits.detach().bfloat16()
    ours, exact = (cot_raft_loss(x, **batch, **FIVE).ce for x in (half, half.float()))
    assert ours == exact and ours.dtype == torch.float32
