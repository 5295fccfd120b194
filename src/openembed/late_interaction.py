"""Late interaction: scores of texts that have a vector a token, in memory that does not grow with the pairs of tokens.

MaxSim (ColBERT, arXiv 2004.12832), which CRISP calls Chamfer similarity: one function under two names. XTR (arXiv 2304.01982)
scores from the tokens a query token would have retrieved. The gradient flows through the chosen maxima alone, so what is
kept for it is one place a (query token, document), not the products of all tokens.

Shapes: ``Q`` queries, ``N`` documents, ``T`` query tokens of all queries, ``S`` document tokens of all documents, ``L`` tokens
of a document, ``B`` documents compared at a time, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from openembed.representations import Tokens

NO_TOKENS = -1e4
"""The score of a document without tokens: below all others, and finite, so that losses are."""

PRODUCTS = 1 << 22
"""Products of tokens held at a time."""

Variant = Literal["paper", "pylate"]


def maxsim(queries: Tokens, documents: Tokens, *, mean: bool = False) -> Tensor:
    """Returns ``Σ_i max_j q_i·d_j`` (Q, N) in fp32; ``mean`` divides by the number of query tokens.

    A query without tokens scores 0, a document without tokens :data:`NO_TOKENS`.
    """
    best_TN, _ = _Best.apply(queries.values_TD, documents.values_TD, documents.lengths_N, 0)
    sums_QN = _by_query(best_TN, queries)
    if mean:
        sums_QN = sums_QN / queries.lengths_N.clamp(min=1)[:, None]
    return _without_tokens(sums_QN, documents)


def xtr(queries: Tokens, documents: Tokens, k: int, *, variant: Variant = "paper") -> Tensor:
    """Returns XTR's training scores (Q, N) in fp32 (section 3.2, equations 4 and 5).

    A query token retrieves the ``k`` document tokens of the whole batch that are most like it (all where there are fewer;
    those equal to the last one too). A document's score is the sum over query tokens of the best similarity among its
    retrieved tokens, divided by ``Z``, the number of query tokens that retrieved any of its tokens, at least 1. It depends
    on all documents given: it is no similarity of a pair.

    ``variant`` = ``pylate`` computes what PyLate 1.6 does: what is not retrieved, padding included, counts as a similarity of
    0, which beats negative ones, and ``Z`` counts the positive terms, at least 0.001, which multiplies a document whose terms
    are all negative by a thousand.
    """
    if k < 1:
        raise ValueError(f"XTR's k must be at least 1, got {k}")
    if not len(documents):
        return torch.zeros(len(queries), 0, device=queries.device)
    best_TN, threshold_T = _Best.apply(queries.values_TD, documents.values_TD, documents.lengths_N, k)
    retrieved_TN = (best_TN >= threshold_T[:, None]) & (documents.lengths_N > 0)
    if variant == "pylate":
        whole_TN = _wholly_retrieved(queries, documents, threshold_T)
        retrieved_TN = retrieved_TN & ((best_TN > 0) | whole_TN)
    kept_TN = best_TN.masked_fill(~retrieved_TN, 0.0)
    counted_TN = kept_TN > 0 if variant == "pylate" else retrieved_TN
    counts_QN = _by_query(counted_TN.float(), queries)
    divisors_QN = counts_QN.clamp(min=1e-3 if variant == "pylate" else 1.0)
    return _without_tokens(_by_query(kept_TN, queries) / divisors_QN, documents)


@torch.no_grad()
def _wholly_retrieved(queries: Tokens, documents: Tokens, threshold_T: Tensor) -> Tensor:
    """Whether a query token retrieved all tokens of a document that is as long as the longest (T, N)."""
    least_TN = -_Best.apply(-queries.values_TD, documents.values_TD, documents.lengths_N, 0)[0]
    return (least_TN >= threshold_T[:, None]) & (documents.lengths_N == documents.lengths_N.max())


def _by_query(values_TN: Tensor, queries: Tokens) -> Tensor:
    """Sums over each query's tokens, (Q, N)."""
    query_T = torch.repeat_interleave(torch.arange(len(queries), device=queries.device), queries.lengths_N)
    return values_TN.new_zeros(len(queries), values_TN.shape[1]).index_add(0, query_T, values_TN)


def _without_tokens(scores_QN: Tensor, documents: Tokens) -> Tensor:
    return scores_QN.masked_fill(documents.lengths_N == 0, NO_TOKENS)


class _Best(torch.autograd.Function):
    """The largest product of each query token with a token of each document (T, N); 0 for a document without tokens.

    With ``k``: also each query token's k-th largest product over all documents (T), which has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, query_TD: Tensor, document_SD: Tensor, lengths_N: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Compares a few documents at a time, the longest first."""
        with torch.autocast(query_TD.device.type, enabled=False):
            query_TD, document_SD = query_TD.float(), document_SD.float()
            best_TN = query_TD.new_zeros(len(query_TD), len(lengths_N))
            place_TN = torch.zeros(best_TN.shape, dtype=torch.long, device=best_TN.device)
            largest_TK = query_TD.new_empty(len(query_TD), 0)
            for numbers_B, place_BL, mask_BL in _groups(lengths_N, max(PRODUCTS // max(len(query_TD), 1), 1)):
                products_TBL = (query_TD @ document_SD[place_BL.flatten()].T).view(-1, *place_BL.shape)
                products_TBL = products_TBL.masked_fill_(~mask_BL, -torch.inf)
                best_TB, token_TB = products_TBL.max(-1)
                best_TN[:, numbers_B] = best_TB
                place_TN[:, numbers_B] = place_BL[:, 0] + token_TB
                if k:
                    largest_TK = _largest(torch.cat([largest_TK, products_TBL.flatten(1)], dim=1), k)
        ctx.save_for_backward(query_TD, document_SD, place_TN, lengths_N > 0)
        least_T = largest_TK.amin(1) if largest_TK.shape[1] else query_TD.new_full((len(query_TD),), -torch.inf)
        ctx.mark_non_differentiable(least_T)
        return best_TN, least_T

    @staticmethod
    def backward(ctx: Any, grad_TN: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradient of the chosen products alone: a sparse (S, T) matrix times the vectors of either side."""
        query_TD, document_SD, place_TN, filled_N = ctx.saved_tensors
        with torch.autocast(grad_TN.device.type, enabled=False):
            grad_TN = grad_TN.float() * filled_N
            token_X, document_X = grad_TN.nonzero(as_tuple=True)  # XTR's is zero for what was not retrieved
            entries = torch.stack([place_TN[token_X, document_X], token_X])
            chosen_ST = torch.sparse_coo_tensor(
                entries, grad_TN[token_X, document_X], (len(document_SD), len(query_TD)), check_invariants=False
            )
            return chosen_ST.t() @ document_SD, chosen_ST @ query_TD, None, None


def _groups(lengths_N: Tensor, tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Documents that have tokens, the longest first, in groups of at most ``tokens`` with padding (or one longer document).

    Yields their numbers (B), where each token lies (B, L; padding points at the first) and which places are tokens (B, L).
    """
    lengths, device = lengths_N.cpu().numpy(), lengths_N.device
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    while len(order):
        longest = int(lengths[order[0]])
        numbers, order = np.split(order, [max(tokens // longest, 1)])
        mask_BL = np.arange(longest) < lengths[numbers, None]
        place_BL = np.where(mask_BL, starts[numbers, None] + np.arange(longest), starts[numbers, None])
        yield tuple(torch.from_numpy(array).to(device) for array in (numbers, place_BL, mask_BL))  # type: ignore[misc]


def _largest(values_TX: Tensor, k: int) -> Tensor:
    """The finite ``k`` largest values of each row in any order; all rows have equally many finite ones."""
    finite = int((values_TX[0] > -torch.inf).sum()) if len(values_TX) else 0
    k = min(k, finite)
    if values_TX.device.type != "cpu":
        return values_TX.topk(k, dim=1, sorted=False).values
    if not k:
        return values_TX[:, :0]
    split = values_TX.shape[1] - k
    return torch.from_numpy(np.partition(values_TX.numpy(), split, axis=1)[:, split:])  # faster than topk
