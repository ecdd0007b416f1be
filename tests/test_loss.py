"""RAIL, CoT-RAFT and its alternatives against hand-computed values and an independent float64 reference."""

import math
from functools import partial

import pytest
import torch

from loss import cot_raft_loss, penalty_of, rail, two_hot

TWO = {"score_ids": torch.tensor([2, 3]), "score_values": torch.tensor([1.0, 5.0])}
FIVE = {"score_ids": torch.tensor([7, 1, 4, 9, 2]), "score_values": torch.tensor([1.0, 2, 3, 4, 5])}
ROWS = [3, 1, 5, 2]  # supervised rows of the four sequences of a random batch
TRUE = torch.tensor([99, 99, 1.0, 3.67, 99, 99, 99, 99, 5.0, 99, 2.5], dtype=torch.float64)  # 99: no score
AT_SCORE = [math.log(p) for p in (0.1, 0.1, 0.2, 0.6)]


def test_worked_examples():
    """The true score of a row that is no score row does not matter, not even NaN."""
    coin = [0.0, *[math.log(1 / 3)] * 3]
    expected, off_grid, probs = rail(torch.tensor(AT_SCORE), **TWO)
    assert [expected.item(), off_grid.item(), *probs.tolist()] == pytest.approx([3.2, 0.2, 0.2, 0.6])
    batch = {"is_score": torch.tensor([False, True]), "true_scores": torch.tensor([math.nan, 5.0])}
    loss = partial(cot_raft_loss, torch.tensor([coin, AT_SCORE]), torch.tensor([0, 3]), **batch, **TWO)
    ce = (math.log(2) - math.log(0.6)) / 2
    assert [x.item() for x in loss()] == pytest.approx([3.842, ce, 3.24], abs=5e-4)
    assert loss(score_ce="none").ce.item() == pytest.approx(math.log(2))
    assert loss(ce_sum=True).ce.item() == pytest.approx(2 * ce)
    assert loss(score_weight=1).ce.item() == pytest.approx(math.log(2) / 2 - math.log(0.6))
    assert loss(ce_weight=0, lam=2).total.item() == pytest.approx(6.48)
    batch["true_scores"][1] = 4
    two = loss(**batch, score_ce="two-hot", ce_sum=True).ce.item()
    assert two == pytest.approx(math.log(2) - 0.25 * math.log(0.2) - 0.75 * math.log(0.6))


def test_worked_examples_of_two_hot_and_the_penalties():
    three, four = torch.tensor([1.0, 3, 5]), torch.tensor([4.0])
    assert two_hot(four, TWO["score_values"]).tolist() == [[0.25, 0.75]]
    assert two_hot(four, torch.tensor([1, 5])).tolist() == [[0.25, 0.75]]  # whole numbers are values, too
    assert two_hot(torch.tensor([4.0, 1, 3, 5]), three).tolist() == [[0, 0.5, 0.5], *torch.eye(3).tolist()]
    found = [penalty_of(kind, torch.tensor([AT_SCORE]), four, **TWO) for kind in ("squared", "rps", "ntl")]
    assert torch.cat(found).tolist() == pytest.approx([0.64, 0, 1.5], abs=1e-6)
    assert penalty_of("rps", torch.tensor([AT_SCORE]), four + 1, **TWO).item() == pytest.approx(4 * 0.25**2)


def random_batch(seed: int):
    """Draw logits for V = 13 and targets; score rows and true scores are always the same."""
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(11, 13, generator=random, dtype=torch.float64)
    targets = torch.randint(0, 13, (11,), generator=random)
    return logits.requires_grad_(), {"targets": targets, "is_score": TRUE < 99, "true_scores": TRUE}


def distance(kind: str, p: torch.Tensor, y: float) -> torch.Tensor:
    """Return a penalty of one score distribution, p of the scores 1 to 5, by another way than loss.py."""
    if kind == "squared":
        return (sum(p[v - 1] * v for v in range(1, 6)) - y) ** 2
    p = p / p.sum()
    if kind == "ntl":
        return sum(p[v - 1] * abs(v - y) for v in range(1, 6))
    # The continuous ranked probability score, an integral over thresholds, up to its least value
    total = 0.0
    for k in range(1, 5):
        below, at_or_above = min(max(y - k, 0), 1), min(max(k + 1 - y, 0), 1)  # lengths within [k, k + 1]
        cumulated = p[:k].sum()
        total += below * cumulated**2 + at_or_above * (1 - cumulated) ** 2 - below * at_or_above
    return total


CHOICES = [
    ("token", None, "squared"),
    ("none", None, "squared"),
    ("two-hot", None, "rps"),
    ("two-hot", 0.6, "ntl"),
    ("token", 2.5, "rps"),
]


@pytest.mark.parametrize("ce_sum", [False, True])
@pytest.mark.parametrize(("score_ce", "weight", "penalty"), CHOICES)
def test_equals_an_independent_reference_in_value_and_gradient(score_ce, weight, penalty, ce_sum):
    """The reference is the formula sequence by sequence, with explicit exponentials, in float64."""
    ours, batch = random_batch(0)
    theirs = ours.detach().clone().requires_grad_()
    options = {"lam": 0.7, "ce_weight": 1.3, "score_ce": score_ce, "penalty": penalty, "ce_sum": ce_sum}
    options["score_weight"] = weight
    loss = cot_raft_loss(ours, **batch, **FIVE, **options).total
    loss.backward()
    of_cots, of_scores, apart, row = 0.0, 0.0, 0.0, 0
    for n in ROWS:
        p = theirs[row : row + n].exp() / theirs[row : row + n].exp().sum(1, keepdim=True)
        y, grid = TRUE[row + n - 1].item(), p[n - 1, FIVE["score_ids"]]
        for t in range(n - 1):
            of_cots -= p[t, batch["targets"][row + t]].log()
        if score_ce == "token":
            of_scores -= p[n - 1, batch["targets"][row + n - 1]].log()
        if score_ce == "two-hot":
            for v in range(1, 6):
                of_scores -= max(0, 1 - abs(v - y)) * grid[v - 1].log()
        apart, row = apart + distance(penalty, grid, y), row + n
    divisor = 4 if ce_sum else sum(ROWS) - 4 * (score_ce == "none")
    ce = of_cots / divisor + (of_scores / divisor if weight is None else weight * of_scores / 4)
    reference = 1.3 * ce + 0.7 * apart / 4
    reference.backward()
    torch.testing.assert_close((loss, ours.grad), (reference, theirs.grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"score_ce": "two-hot", "penalty": "rps"}, {"score_weight": 2.0}])
@pytest.mark.parametrize("cuts", [[4], [2, 3, 7], [*range(1, 11)]])
def test_micro_batches_add_up_to_the_whole_step(cuts, options):
    """Batches may end within a sequence and hold no score at all."""
    whole, batch = random_batch(2)
    total = cot_raft_loss(whole, **batch, **FIVE, **options).total
    total.backward()
    parts, value = whole.detach().clone().requires_grad_(), 0.0
    for start, end in zip([0, *cuts], [*cuts, 11], strict=True):
        some = {name: label[start:end] for name, label in batch.items()} | options
        value += cot_raft_loss(parts[start:end], **some, **FIVE, n_tokens=11, n_sequences=4).total
    value.backward()
    torch.testing.assert_close((value, parts.grad), (total, whole.grad), atol=1e-12, rtol=0)


def test_only_the_squared_error_sees_mass_off_the_grid():
    """Nearly all mass off the grid: the others still see which score is likelier, and stay finite."""
    logits = torch.tensor([[200.0, 0.0, math.log(1 / 4), math.log(3 / 4)]])
    found = [penalty_of(kind, logits, torch.tensor([4.0]), **TWO) for kind in ("squared", "rps", "ntl")]
    assert torch.cat(found).tolist() == pytest.approx([16, 0, 1.5], abs=1e-6)


@pytest.mark.parametrize("values", [[1, 2, 3, 4, 5], [0, 25, 50, 75, 100], [1, 5]])
def test_under_autocast_nothing_is_rounded_to_bf16(values):
    """Compare expected scores, penalties and the gradient of a logit with float64, in shares of the grid."""
    logits = 5 * torch.randn(200, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, ids = torch.tensor(values, dtype=torch.float64), torch.arange(1, len(values) + 1)
    width = values[-1] - values[0]
    true = values[0] + width * torch.linspace(0, 1, 200, dtype=torch.float64)
    found = []
    for exact in (True, False):
        x, grid = logits.clone().requires_grad_(), {"score_ids": ids, "score_values": values}
        if not exact:
            x, grid["score_values"] = logits.float().requires_grad_(), values.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            kinds = [penalty_of(kind, x, true.to(x.dtype), **grid) for kind in ("squared", "rps", "ntl")]
            penalties = torch.stack([kinds[0] / width, *kinds[1:]]) / width
            penalties.sum().backward()
            found.append((rail(x, **grid).expected.detach() / width, penalties.detach(), x.grad))
    for exact, ours in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, atol=2e-6, rtol=1e-4)


def test_gradcheck_and_that_bf16_is_computed_in_fp32():
    logits, batch = random_batch(1)
    for options in ({}, {"score_ce": "two-hot", "penalty": "rps"}):
        assert torch.autograd.gradcheck(
            lambda x, o=options: cot_raft_loss(x, **batch, **FIVE, **o).total, logits
        )
    half = logits.detach().bfloat16()
    ours, exact = (cot_raft_loss(x, **batch, **FIVE, score_ce="two-hot") for x in (half, half.float()))
    assert ours == exact and ours.total.dtype == torch.float32
