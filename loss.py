"""The two formulas of TRACT (arXiv 2503.04381): the RAIL predictor and the CoT-RAFT loss; tensors in and out.

Below them: the advantages of stage 3, and other losses, to be compared with the paper's.
Letters: R supervised positions (whose next token carries loss), B sequences, V vocabulary, S scores.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rail(NamedTuple):
    expected: Tensor  # (...)     Σ_v p(str(v)) · v
    off_grid: Tensor  # (...)     1 − Σ_v p(str(v)), the mass on tokens that are no score
    probs: Tensor  # (..., S)  p(str(v)) for every v of the grid


def rail(logits: Tensor, *, score_ids: Tensor, score_values: Tensor) -> Rail:
    """Return the regression-aware prediction (RAIL): the expected score under the next-token distribution.

        ŷ = Σ_v p(str(v) | x, CoT) · v        the paper's CoT-RAIL; without the CoT, RAIL

    logits        (..., V)  at the position that predicts the score, any float type
    score_ids     (S,)      token ids of the score grid
    score_values  (S,)      what those tokens are worth, ascending

    The softmax runs over the whole vocabulary, in fp32 at least; it is not renormalised over the scores.

    Worked example: V = 4, the scores 1 and 5 are the tokens 2 and 3, and the logits are log [.1, .1, .2, .6].
    Then ŷ = .2 · 1 + .6 · 5 = 3.2, with an off-grid mass of .2.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(-1)[..., score_ids]  # (..., S)
    expected = (probs * score_values.to(probs.dtype)).sum(-1)  # not `@`, which autocast would do in bf16
    return Rail(expected, 1 - probs.sum(-1), probs)


class Loss(NamedTuple):
    total: Tensor  # ce_weight · ce + lam · penalty, with gradient
    ce: Tensor  # cross-entropy as `mean_ce` returns it, without ce_weight, detached
    penalty: Tensor  # mean penalty per sequence, by default the squared error, detached


def cot_raft_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    is_score: Tensor,
    true_scores: Tensor,
    score_ids: Tensor,
    score_values: Tensor,
    lam: float = 1.0,
    penalty: str = "squared",
    ce_weight: float = 1.0,
    score_ce: str = "token",
    score_weight: float | None = None,
    ce_sum: bool = False,
    n_tokens: int | None = None,
    n_sequences: int | None = None,
    weights: Tensor | None = None,
) -> Loss:
    """Return CoT-RAFT: squared error of the expected score, plus cross-entropy (CE) on the CoT and the score.

        λ · (Σ_v p(str(v) | x, CoT) · v − y*)²  −  log p([CoT, y*] | x)        the paper's CoT-RAFT objective

    As in the authors' code, the CE is a mean over tokens, the end of sequence among them; ce_sum=True sums
    it, as the formula does. By default the score has CE, too, as in the formula, unlike in that code.

    logits        (R, V)  at the supervised positions alone: they predict CoT, suffix, score and end
    targets       (R,)    the token to be predicted at each position
    is_score      (R,)    bool, True at the B positions that predict a score
    true_scores   (R,)    y*, real-valued, at these positions; what it holds at the others does not matter
    lam           λ, the weight of the penalty; 0 leaves plain CE
    penalty       squared (score units squared), rps or ntl (score units): see `penalty_of`
    ce_weight     weight of the CE; 0 leaves only the penalty
    score_ce      the target of the CE at the score's position (token and two-hot punish off-grid mass):
                  token    the token in `targets`, that of the grid point nearest to y*, as in the formula
                  two-hot  y* split between two tokens: −Σ_v t(v) log p(str(v)) with t = `two_hot`
                  none     no CE at this position, as in the authors' code
    score_weight, ce_sum, n_tokens, n_sequences
                  the weight of the score's CE, and what CE and penalty are divided by: see `mean_ce`
    weights       (R,)  of the CE at each position: in stage 3 the advantage of its CoT; None: all 1

    Worked example: one sequence, V = 4, scores 1 and 5 are the tokens 2 and 3, y* = 5. One CoT token has
    probability .5, the logits of the score are log [.1, .1, .2, .6]. CE = (ln 2 − ln .6) / 2 = .602, squared
    error = (3.2 − 5)² = 3.24, and with λ = 1 the loss is 3.842. With score_weight 1, CE = ln 2 / 2 − ln .6 =
    .857.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits_at_score = logits[is_score]  # (B, V)
    y = true_scores[is_score].to(logits.dtype)  # (B,)
    nll = F.cross_entropy(logits, targets, reduction="none")  # (R,)
    if score_ce == "two-hot":
        log_probs = logits_at_score.log_softmax(-1)[:, score_ids]  # (B, S)
        nll[is_score] = -(two_hot(y, score_values) * log_probs).sum(-1)
    if weights is not None:
        nll = weights * nll
    if n_sequences is None:
        n_sequences = max(len(y), 1)
    with_scores = score_ce != "none"
    ce = mean_ce(nll, is_score, with_scores, score_weight, ce_sum, n_tokens, n_sequences)
    penalties = penalty_of(penalty, logits_at_score, y, score_ids, score_values)  # (B,)
    mean_penalty = penalties.sum() / n_sequences
    return Loss(ce_weight * ce + lam * mean_penalty, ce.detach(), mean_penalty.detach())


def mean_ce(
    nll: Tensor,
    is_score: Tensor,
    with_scores: bool,
    score_weight: float | None,
    ce_sum: bool,
    n_tokens: int | None,
    n_sequences: int,
) -> Tensor:
    """Return the CE of a batch: its sum, divided by counts of the whole optimiser step.

    nll           (R,)  negative log-likelihoods
    with_scores   False: the score's position has no CE, then score_weight has to be None
    score_weight  None: the score is one token among those of its CoT
                  w: its CE has a divisor of its own, CE = Σ_others / n_tokens + w · Σ_scores / n_sequences,
                  where n_tokens counts the scores, too. With ce_sum both divisors are n_sequences
    ce_sum        False: a mean over tokens, as in the authors' code
                  True: summed over each sequence, as in the formula, then a mean over sequences
    n_tokens, n_sequences
                  tokens with CE and sequences of the whole optimiser step. Sums are divided by these, so that
                  the losses of its batches add up to that of the step. n_tokens None: this batch's
    """
    counted = nll if with_scores else nll[~is_score]
    if n_tokens is None:
        n_tokens = len(counted)
    divisor = n_sequences if ce_sum else max(n_tokens, 1)  # a batch may hold no CE token, its CE is then 0
    if score_weight is None:
        return counted.sum() / divisor
    return nll[~is_score].sum() / divisor + score_weight * (nll[is_score].sum() / n_sequences)


def advantages(rewards: Tensor, kind: str = "leave-one-out") -> Tensor:
    """Return by how much each of K CoTs of a prompt did better than its siblings: (..., K) → (..., K).

    K CoTs c of the model's own, weighted by A, estimate the gradient of the expected reward r(c). The model
    also scores after c, so r(c) depends on its weights, too: hence the term ∇ r (arXiv 2603.17145):

        ∇ E[r(c)] = E[r ∇ log p(c | x) + ∇ r]  ≈  1/K Σ_i (A_i ∇ log p(c_i | x) + ∇ r(c_i))

    With r = −(ŷ − y*)² the right side is −∇ cot_raft_loss(weights=A, lam=1, ce_sum=True, score_ce="none").

    leave-one-out  A_i = r_i − mean of the others. As they do not depend on c_i, the estimate is unbiased
    group          A_i = (r_i − mean of all) / their standard deviation, clipped to ±1, as in REAL: biased

    Worked example: rewards −1, −1, −4 become 1.5, 1.5, −3; by group .577, .577, −1 (−1.155, clipped).
    """
    if kind == "group":
        centred = rewards - rewards.mean(-1, keepdim=True)
        return (centred / (rewards.std(-1, keepdim=True) + 1e-6)).clamp(-1, 1)  # equal rewards: 0
    baselines = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)  # means of the siblings
    return rewards - baselines


def penalty_of(
    kind: str, logits: Tensor, true_scores: Tensor, score_ids: Tensor, score_values: Tensor
) -> Tensor:
    """Return what λ weighs, (B,): how far each score distribution is from its true score y (B,).

    Where alike records differ in y, as raters disagree, each penalty is least at another p:

    squared  (Σ_v p(v) · v − y)², RAFT's. Least where the expected score is the mean of y. Mass off the grid
             counts as a score of 0.
    rps      Σ_k (v[k+1] − v[k]) · (P[k] − T[k])², the ranked probability score (Epstein 1969); P and T are
             the cumulated p and two_hot(y). It is proper: least where p is the distribution of y.
    ntl      Σ_v p(v) · |v − y|, the number-token loss (arXiv 2411.02083). Least at a median of y.

    For rps and ntl, p is renormalised over the scores: off-grid mass costs nothing here, only in the CE.

    Worked example: logits (B, V) as in `rail`, so p is .2 and .6 on the scores 1 and 5, and y = 4. squared is
    (3.2 − 4)² = .64, rps 4 · (.25 − .25)² = 0, ntl .25 · 3 + .75 · 1 = 1.5.
    """
    if kind == "squared":
        expected = rail(logits, score_ids=score_ids, score_values=score_values).expected
        return (expected - true_scores).square()
    probs = logits[:, score_ids].softmax(-1)  # (B, S)
    if kind == "ntl":
        distances = (score_values - true_scores[:, None]).abs()  # (B, S)
        return (probs * distances).sum(-1)
    # What is left is rps. p − two_hot(y), cumulated, is P − T, (B, S); its last column is 0
    difference = (probs - two_hot(true_scores, score_values)).cumsum(-1)
    return (difference[:, :-1].square() * score_values.diff()).sum(-1)


def two_hot(true_scores: Tensor, score_values: Tensor) -> Tensor:
    """Split each true score y (inside the grid) over its two neighbours, keeping the mean y: (B,) → (B, S).

    Worked example: on the grid 1, 5 a true score of 4 becomes (.25, .75); on the grid 1, 3, 5, (0, .5, .5).
    """
    score_values = score_values.to(true_scores.dtype)
    # The right neighbour is the first grid point ≥ y; its index is at least 1, for it needs a left one
    right = torch.searchsorted(score_values, true_scores).clamp(1, len(score_values) - 1)  # (B,)
    left = right - 1
    gap = score_values[right] - score_values[left]
    right_share = (true_scores - score_values[left]) / gap
    shares = right_share.new_zeros(len(true_scores), len(score_values))
    shares.scatter_(1, left[:, None], 1 - right_share[:, None])
    shares.scatter_(1, right[:, None], right_share[:, None])
    return shares
