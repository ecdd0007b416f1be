"""The two formulas of TRACT (arXiv 2503.04381): the RAIL predictor and the CoT-RAFT loss; tensors in and out.

Letters: R supervised rows (positions whose next token carries loss), B sequences, V vocabulary, S scores.
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

        ŷ = Σ_v p(str(v) | x, CoT) · v        the paper's RAIL predictor; with a sampled CoT, its CR predictor

    logits        (..., V)  at the position that predicts the score, any float type
    score_ids     (S,)      token ids of the score grid
    score_values  (S,)      what those tokens are worth

    The softmax runs over the whole vocabulary and is not renormalised over the scores, in fp32 at least.

    Worked example: V = 4, the scores 1 and 5 are the tokens 2 and 3, and the logits are log [.1, .1, .2, .6].
    Then ŷ = .2 · 1 + .6 · 5 = 3.2, with an off-grid mass of .2.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(-1)[..., score_ids]  # (..., S)
    return Rail(probs @ score_values.to(probs.dtype), 1 - probs.sum(-1), probs)


class Loss(NamedTuple):
    total: Tensor  # ce_weight · ce + lam · squared_error, with gradient
    ce: Tensor  # cross-entropy, normalised, detached
    squared_error: Tensor  # mean squared error, normalised, detached


def cot_raft_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    is_score: Tensor,
    true_scores: Tensor,
    score_ids: Tensor,
    score_values: Tensor,
    lam: float = 1.0,
    ce_weight: float = 1.0,
    score_in_ce: bool = True,
    ce_sum: bool = False,
    n_tokens: int | None = None,
    n_sequences: int | None = None,
) -> Loss:
    """Return CoT-RAFT: squared error of the expected score, plus cross-entropy (CE) on the CoT and the score.

        λ · (Σ_v p(str(v) | x, CoT) · v − y*)²  −  log p([CoT, y*] | x)        the paper's CoT-RAFT objective

    logits        (R, V)  of the supervised rows alone; prompt and padding never come here
    targets       (R,)    the token each row has to predict
    is_score      (R,)    bool, True on the B rows that predict a score
    true_scores   (R,)    y*, real-valued, on those rows; what it holds on the others does not matter
    lam           λ, the weight of the squared error (score units squared); 0 leaves plain CE
    ce_weight     weight of the CE; 0 leaves pure RAFT
    score_in_ce   the score token counts in the CE, as in the formula; False masks it (the authors' code)
    ce_sum        sum the CE over a sequence (the formula) instead of taking the mean over tokens (the code)
    n_tokens      CE tokens of the whole optimiser step, n_sequences its sequences: with these as divisors the
                  micro-batches of a step add up to the same however it is split. Default: this batch's own.

    Worked example: one sequence, V = 4, scores 1 and 5 are the tokens 2 and 3, y* = 5. One CoT token has
    probability .5, the score row is log [.1, .1, .2, .6]. CE = (ln 2 − ln .6) / 2 = .602, squared error =
    (3.2 − 5)² = 3.24, and with λ = 1 the loss is 3.842.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    in_ce = torch.ones_like(is_score) if score_in_ce else ~is_score
    n_tokens = n_tokens if n_tokens is not None else int(in_ce.sum())
    n_sequences = n_sequences if n_sequences is not None else int(is_score.sum())

    nll = F.cross_entropy(logits, targets, reduction="none")  # (R,)
    ce = (nll * in_ce).sum() / max(n_sequences if ce_sum else n_tokens, 1)

    expected = rail(logits[is_score], score_ids=score_ids, score_values=score_values).expected  # (B,)
    squared_error = (expected - true_scores[is_score]).square().sum() / max(n_sequences, 1)

    return Loss(ce_weight * ce + lam * squared_error, ce.detach(), squared_error.detach())
