"""Losses: pure functions of tensors, computed in fp32, finite for every mask.

Shapes: Q queries, N documents.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def info_nce_rows(scores_QN: Tensor, positives_QN: Tensor, allowed_QN: Tensor, temperature: float) -> Tensor:
    """Returns the InfoNCE loss of each query (Q,), in fp32.

    With s = score / temperature, P the positives and A the allowed negatives of a query::

        loss = mean over p in P of  -log( exp(s_p) / (exp(s_p) + sum over n in A of exp(s_n)) )
             = mean over p in P of  softplus( logsumexp over n in A of s_n  -  s_p )

    So each positive has its own term and never stands in another positive's denominator. ``allowed_QN`` marks the
    negatives; a document that is both positive and allowed counts as positive only. A query without a positive or
    without an allowed negative has loss 0 and gradient 0. Both masks are boolean (Q, N).
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    scaled_QN = scores_QN.float() / temperature
    negatives_QN = allowed_QN & ~positives_QN
    # Without negatives the log-sum-exp is -inf; softplus and both backward passes take that to exactly 0.
    against_Q1 = scaled_QN.masked_fill(~negatives_QN, -torch.inf).logsumexp(1, keepdim=True)
    terms_QN = softplus(against_Q1 - scaled_QN).masked_fill(~positives_QN, 0.0)
    return terms_QN.sum(1) / positives_QN.sum(1).clamp(min=1)


def weighted_mean(values_Q: Tensor, weights_Q: Tensor | None = None) -> Tensor:
    """Returns the mean of ``values_Q`` under ``weights_Q`` (all 1 by default); 0 when the weights sum to 0."""
    if weights_Q is None:
        weights_Q = torch.ones_like(values_Q)
    total = weights_Q.sum()
    return (values_Q * weights_Q).sum() / torch.where(total > 0, total, torch.ones_like(total))


def info_nce(
    scores_QN: Tensor,
    positives_QN: Tensor,
    allowed_QN: Tensor,
    temperature: float,
    weights_Q: Tensor | None = None,
) -> Tensor:
    """Returns the weighted mean over queries of :func:`info_nce_rows`, a scalar.

    Queries without positive or negative count in the mean with loss 0, so the scale does not depend on the masks.
    """
    return weighted_mean(info_nce_rows(scores_QN, positives_QN, allowed_QN, temperature), weights_Q)


def cosine_distance_rows(values_ND: Tensor, targets_ND: Tensor) -> Tensor:
    """Returns ``1 - cos(value, target)`` of each row (N,), in fp32: 0 for equal directions, 2 for opposite ones."""
    return 1 - torch.nn.functional.cosine_similarity(values_ND.float(), targets_ND.float(), dim=-1)


def squared_error_rows(values_ND: Tensor, targets_ND: Tensor) -> Tensor:
    """Returns the mean squared difference of each row (N,), in fp32."""
    return (values_ND.float() - targets_ND.float()).square().mean(-1)


def kl_divergence_rows(scores_QN: Tensor, teacher_QN: Tensor, candidates_QN: Tensor, temperature: float) -> Tensor:
    """Returns KL(teacher || student) of each query over its candidates (Q,), in fp32.

    Both score matrices are divided by ``temperature`` and turned into distributions by a softmax over the columns that
    ``candidates_QN`` (bool) marks. A query with fewer than two candidates has nothing to tell apart: loss 0, gradient 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    comparable_Q1 = candidates_QN.sum(1, keepdim=True) > 1
    outside_QN = ~(candidates_QN & comparable_Q1)
    floor = torch.finfo(torch.float32).min
    student_QN = (scores_QN.float() / temperature).masked_fill(outside_QN, floor).log_softmax(1)
    target_QN = (teacher_QN.float() / temperature).masked_fill(outside_QN, floor).log_softmax(1)
    terms_QN = target_QN.exp() * (target_QN - student_QN)
    return terms_QN.masked_fill(outside_QN, 0.0).sum(1)


def margin_mse_rows(scores_QN: Tensor, teacher_QN: Tensor, positives_QN: Tensor, candidates_QN: Tensor) -> Tensor:
    """Returns the mean of ``((s_p - s_c) - (t_p - t_c))²`` over each query's positives p and other candidates c (Q,), in fp32.

    Margin-MSE (Hofstätter et al., 2020). Both masks are boolean (Q, N); positives count where they are candidates. A query
    without a positive or without another candidate has loss 0 and gradient 0.
    """
    positives_QN = positives_QN & candidates_QN
    others_QN = candidates_QN & ~positives_QN
    positives_Q, others_Q = positives_QN.sum(1), others_QN.sum(1)
    error_QN = (scores_QN.float() - teacher_QN.float()).masked_fill(~candidates_QN, 0.0)
    # margins do not see a shift of all scores; without it the sums below are small and their difference exact
    centre_Q1 = error_QN.sum(1, keepdim=True) / candidates_QN.sum(1, keepdim=True).clamp(min=1)
    error_QN = error_QN - centre_Q1.detach()
    of_positives_QN, of_others_QN = error_QN.masked_fill(~positives_QN, 0.0), error_QN.masked_fill(~others_QN, 0.0)
    squares_Q = others_Q * of_positives_QN.square().sum(1) + positives_Q * of_others_QN.square().sum(1)
    sums_Q = squares_Q - 2 * of_positives_QN.sum(1) * of_others_QN.sum(1)
    return sums_Q / (positives_Q * others_Q).clamp(min=1)


def min_max_rows(scores_QN: Tensor, candidates_QN: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Returns each query's scores as shares of the way from its lowest to its highest candidate's, 0 for the rest, in fp32."""
    scores_QN = scores_QN.float()
    low_Q1 = scores_QN.masked_fill(~candidates_QN, torch.inf).amin(1, keepdim=True)
    high_Q1 = scores_QN.masked_fill(~candidates_QN, -torch.inf).amax(1, keepdim=True)
    return ((scores_QN - low_Q1) / (high_Q1 - low_Q1 + epsilon)).masked_fill(~candidates_QN, 0.0)
