"""XTR retrieval (arXiv 2304.01982, section 3.2): the tokens nearest to each query token, and a score from these alone.

For each query token the ``tokens`` document tokens of greatest product are retrieved. A document's score is the sum over query
tokens of its greatest retrieved product; where none of its tokens was retrieved, of an imputed value. That is n times the
paper's f' for a query of n tokens, on the scale of MaxSim, to which it is equal when every token is retrieved. No vector of a
candidate is read.

L tokens of the query, T tokens of documents, K retrieved tokens, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass
from typing import Literal

import numpy as np

from openembed.index.tokens.codec import Residuals
from openembed.index.tokens.coding import Panel, padded
from openembed.index.tokens.exact import TokenMatrix
from openembed.index.tokens.native import address, check, structure, token_library

WIDER = 4
"""Coded tokens looked at for each one retrieved."""
Imputation = Literal["last", "zero", "none"]
HitsStructure = structure("Hits", "positions lower upper filled next floor", "k capacity")


@dataclass(frozen=True)
class Xtr:
    """How XTR searches. ``imputation``: ``last`` counts what was not retrieved as the last product retrieved for that query
    token (the greatest it can be), ``zero`` as 0, and ``none`` leaves it out and divides by the number of query tokens
    found instead of all (times all, to stay on the scale of MaxSim).

    ``rescored``: so many of the best are scored exactly after; 0: XTR's own scores are given.
    """

    tokens: int = 1000
    imputation: Imputation = "last"
    rescored: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.rescored < 0 or self.imputation not in ("last", "zero", "none"):
            raise ValueError(f"XTR needs 1 or more tokens, rescored of 0 or more and imputation last, zero or none; got {self}")


@dataclass(frozen=True)
class Retrieved:
    """The tokens found for each query token: by lane, then product descending, then position."""

    lanes: np.ndarray
    positions: np.ndarray
    products: np.ndarray


def retrieve(matrices: Sequence[TokenMatrix], eligible: Sequence[np.ndarray], panel: Panel, count: int) -> Retrieved:
    """Returns the ``count`` tokens of greatest product for each lane, exactly, among those of eligible documents.

    Positions count through the matrices; of equal products the earlier token is retrieved.
    """
    parts, start = [], 0
    for matrix, mask_N in zip(matrices, eligible, strict=True):
        lanes, tokens = _candidates(matrix, mask_N, panel, count)
        order = np.argsort(tokens, kind="stable")
        products = np.empty(len(tokens), dtype=np.float32)
        products[order] = matrix.products(panel, lanes[order], tokens[order])  # the file is read forwards
        parts.append(best_of(Retrieved(lanes, tokens + start, products), count))
        start += int(matrix.offsets_N1[-1])
    if not parts:
        return Retrieved(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    fields = ("lanes", "positions", "products")
    return best_of(Retrieved(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields)), count)


def retrieve_coded(residuals: Residuals, eligible_N: np.ndarray, query_LD: np.ndarray, count: int) -> Retrieved:
    """As ``retrieve``, from coded tokens: the best by their residuals of the ``WIDER * count`` in the nearest centroids.

    Products are those with tokens as coded, not brought to length 1. Positions are places in the order of the centroids.
    """
    query_LD, codec = np.asarray(query_LD, dtype=np.float32), residuals.codec
    products_LK, sizes_K = query_LD @ codec.centroids_KD.T, np.diff(residuals.starts_K1)
    parts = []
    for lane, query_D in enumerate(query_LD):
        order_K = np.argsort(-products_LK[lane], kind="stable")
        probed = order_K[: int((np.cumsum(sizes_K[order_K]) < WIDER * count).sum()) + 1]
        places, products = _coded_products(residuals, query_D, probed, products_LK[lane, probed], eligible_N)
        parts.append(best_of(Retrieved(np.full(len(places), lane), places, products), count))
    return Retrieved(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("lanes", "positions", "products")))


def _coded_products(
    residuals: Residuals, query_D: np.ndarray, probed_R: np.ndarray, near_R: np.ndarray, eligible_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (places, products) of the eligible tokens of some centroids."""
    codec, library = residuals.codec, token_library()
    runs_R2 = np.stack([residuals.starts_K1[probed_R], residuals.starts_K1[probed_R + 1]], axis=1)
    if library is None:
        places = np.concatenate([np.arange(low, high) for low, high in runs_R2])
        near = np.repeat(near_R, runs_R2[:, 1] - runs_R2[:, 0])
        kept = eligible_N[residuals.owners_T[places]]
        products = near[kept] + codec.residuals_of(residuals.packed_TB[places[kept]]) @ query_D
        return places[kept], products.astype(np.float32)
    room = int((runs_R2[:, 1] - runs_R2[:, 0]).sum())
    places, products = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.float32)
    wide_P, mask_N = padded(query_D, codec.padded), np.ascontiguousarray(eligible_N, dtype=np.uint8)
    given = address(wide_P), address(runs_R2), address(np.ascontiguousarray(near_R)), len(runs_R2), address(mask_N)
    found = library.openembed_residuals_dots(residuals.pointer, *given, address(places), address(products))
    return places[:found], products[:found]


def best_of(found: Retrieved, count: int) -> Retrieved:
    """Returns the ``count`` best of each lane, in order."""
    order = np.lexsort((found.positions, -found.products, found.lanes))
    lanes = found.lanes[order]
    order = order[np.arange(len(lanes)) - np.searchsorted(lanes, lanes) < count]
    return Retrieved(found.lanes[order], found.positions[order], found.products[order])


def scores_of(found: Retrieved, documents: np.ndarray, lanes: int, imputation: Imputation) -> tuple[np.ndarray, np.ndarray]:
    """Returns (documents, float32 scores) of every document with a token retrieved; ``documents``: that of each token."""
    if not len(documents):
        return documents, np.empty(0, dtype=np.float32)
    order = np.lexsort((documents, found.lanes))
    by_lane, by_document, products = found.lanes[order], documents[order], found.products[order].astype(np.float64)
    starts = np.flatnonzero(np.r_[True, (np.diff(by_lane) != 0) | (np.diff(by_document) != 0)])
    best, by_lane = np.maximum.reduceat(products, starts), by_lane[starts]
    imputed_L = np.zeros(lanes)
    if imputation == "last":
        last = np.flatnonzero(np.r_[np.diff(found.lanes) != 0, True])
        imputed_L[found.lanes[last]] = found.products[last]
    unique, which = np.unique(by_document[starts], return_inverse=True)
    totals = imputed_L.sum() + np.bincount(which, best - imputed_L[by_lane])
    if imputation == "none":
        totals *= lanes / np.bincount(which)
    return unique, totals.astype(np.float32)


def _candidates(matrix: TokenMatrix, mask_N: np.ndarray, panel: Panel, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (lanes, tokens): a superset of the best tokens of each lane."""
    lengths_N = np.diff(matrix.offsets_N1)
    documents = np.flatnonzero(mask_N & (lengths_N > 0)).astype(np.int64)
    total = int(lengths_N[documents].sum())
    if token_library() is None or total <= count:
        return _by_products(matrix, documents, panel, count)
    capacity = 4 * count + 1024
    while True:
        found = _scan(matrix, documents, panel, count, capacity)
        if found is not None:
            return found
        capacity *= 2


def _scan(
    matrix: TokenMatrix, documents: np.ndarray, panel: Panel, count: int, capacity: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """As ``_candidates``, by the compiled scan; None where a lane has more candidates than there is room for."""
    positions = np.empty((panel.lanes, capacity), dtype=np.int64)
    lower, upper = (np.empty((panel.lanes, capacity), dtype=np.float32) for _ in range(2))
    filled, due = np.zeros(panel.lanes, dtype=np.int64), np.full(panel.lanes, min(2 * count + 64, capacity), dtype=np.int64)
    floor = np.full(panel.lanes, np.finfo(np.float32).min, dtype=np.float32)
    arrays = positions, lower, upper, filled, due, floor
    hits = HitsStructure(*map(address, arrays), count, capacity)
    arguments = matrix.pointer, panel.pointer, address(documents), len(documents), byref(hits)
    result = token_library().openembed_tokens_retrieve(*arguments)
    if result == 2:
        return None
    check(result)
    return np.repeat(np.arange(panel.lanes), filled), positions[np.arange(capacity) < filled[:, None]]


def _by_products(matrix: TokenMatrix, documents: np.ndarray, panel: Panel, count: int) -> tuple[np.ndarray, np.ndarray]:
    """As ``_candidates``, by float32 products, which are off by less than the width times their rounding."""
    parts = [np.arange(matrix.offsets_N1[d], matrix.offsets_N1[d + 1]) for d in documents]
    tokens = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    if len(tokens) <= count:
        return np.repeat(np.arange(panel.lanes), len(tokens)), np.tile(tokens, panel.lanes)
    norm = float(matrix.bounds_N2[documents, 1].max())
    lanes, chosen = [], []
    for lane, query_D in enumerate(panel.values_LD):
        products = np.concatenate(
            [matrix.values_TD[tokens[at : at + 65_536]].astype(np.float32) @ query_D for at in range(0, len(tokens), 65_536)]
        )
        slack = (2.4e-7 * len(query_D) + 1e-6) * norm * panel.norm_L[lane] + 1e-29
        reached = tokens[products >= np.partition(products, -count)[-count] - slack]
        lanes.append(np.full(len(reached), lane))
        chosen.append(reached)
    return np.concatenate(lanes), np.concatenate(chosen)
