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
from itertools import pairwise
from typing import Literal

import numpy as np

from openembed.config import Config, Count, CountFromZero, kind_required
from openembed.index.tokens.codec import Residuals
from openembed.index.tokens.coding import Panel, padded
from openembed.index.tokens.exact import TokenMatrix
from openembed.index.tokens.native import address, check, structure, token_library
from openembed.index.tokens.warp import Tally, nearest_holding

WIDER = 4
"""Coded tokens looked at for each one retrieved."""
Imputation = Literal["last", "zero", "none"]
HitsStructure = structure("Hits", "positions lower upper filled next floor", "k capacity")


class Xtr(Config, json_schema_extra=kind_required):
    """How XTR searches. ``imputation``: ``last`` counts what was not retrieved as the last product retrieved for that query
    token (the greatest it can be), ``zero`` as 0, and ``none`` leaves it out and divides by the number of query tokens
    found instead of all (times all, to stay on the scale of MaxSim).

    Segments that have residuals are searched by them. ``rescored``: so many of the best are scored exactly after; 0: XTR's own
    scores are given. Beside segments that have residuals those without are searched exactly, and the best of all are scored so.
    """

    kind: Literal["xtr"] = "xtr"
    tokens: Count = 1000
    imputation: Imputation = "last"
    rescored: CountFromZero = 0


@dataclass(frozen=True)
class Retrieved:
    """The tokens found for each query token, by lane: the document that each is of, and its product."""

    lanes: np.ndarray
    documents: np.ndarray
    products: np.ndarray

    def best(self, count: int) -> Retrieved:
        """Returns the ``count`` of greatest product of each lane; of equal ones those that come first."""
        kept = np.ones(len(self.lanes), dtype=bool)
        bounds = np.r_[0, np.flatnonzero(np.diff(self.lanes)) + 1, len(self.lanes)]
        for low, high in pairwise(bounds):
            if high - low <= count:
                continue
            products = self.products[low:high]
            last = np.partition(products, high - low - count)[high - low - count]
            kept[low:high] = products > last
            equal = np.flatnonzero(products == last)[: count - int(kept[low:high].sum())]
            kept[low + equal] = True
        return Retrieved(self.lanes[kept], self.documents[kept], self.products[kept])


def joined(parts: Sequence[Retrieved], count: int) -> Retrieved:
    """Returns the ``count`` best tokens of each lane among those of all parts."""
    if len(parts) == 1:
        return parts[0]
    lanes = np.concatenate([np.empty(0, np.int64), *(part.lanes for part in parts)])
    order = np.argsort(lanes, kind="stable")
    documents = np.concatenate([np.empty(0, np.int64), *(part.documents for part in parts)])
    products = np.concatenate([np.empty(0, np.float32), *(part.products for part in parts)])
    return Retrieved(lanes[order], documents[order], products[order]).best(count)


def retrieve(matrix: TokenMatrix, eligible_N: np.ndarray, panel: Panel, count: int) -> Retrieved:
    """Returns the ``count`` tokens of greatest product for each lane, exactly, among those of eligible documents.

    Of equal products the earlier token is retrieved.
    """
    lanes, tokens = _candidates(matrix, eligible_N, panel, count)
    products = matrix.products(panel, lanes, tokens)
    documents = np.searchsorted(matrix.offsets_N1, tokens, side="right") - 1
    return Retrieved(lanes, documents, products).best(count)


def retrieve_coded(residuals: Residuals, eligible_N: np.ndarray, query_LD: np.ndarray, count: int) -> Retrieved:
    """As ``retrieve``, from coded tokens: the best by their residuals of about ``WIDER * count`` in the nearest centroids.

    Products are those with tokens as coded, not brought to length 1.
    """
    query_LD, share = np.asarray(query_LD, dtype=np.float32), max(float(eligible_N.mean()), 1e-6) if len(eligible_N) else 1.0
    reach = int(min(WIDER * count / share, residuals.starts_K1[-1]))
    products_LK = query_LD @ residuals.codec.centroids_KD.T
    order_LK, held_LK = nearest_holding(products_LK, np.diff(residuals.starts_K1), reach)
    parts = []
    for lane, query_D in enumerate(query_LD):
        probed = order_LK[lane, : int((held_LK[lane] < reach).sum()) + 1]
        owners, products = _coded_products(residuals, query_D, probed, products_LK[lane, probed], eligible_N)
        parts.append(Retrieved(np.full(len(owners), lane), owners, products).best(count))
    return Retrieved(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("lanes", "documents", "products")))


def _coded_products(
    residuals: Residuals, query_D: np.ndarray, probed_R: np.ndarray, near_R: np.ndarray, eligible_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (documents, products) of the eligible tokens of some centroids."""
    codec, library = residuals.codec, token_library()
    runs_R2 = np.stack([residuals.starts_K1[probed_R], residuals.starts_K1[probed_R + 1]], axis=1)
    if library is None:
        places = np.concatenate([np.arange(low, high) for low, high in runs_R2])
        near = np.repeat(near_R, runs_R2[:, 1] - runs_R2[:, 0])
        kept = eligible_N[residuals.owners_T[places]]
        products = near[kept] + codec.residuals_of(residuals.packed_TB[places[kept]]) @ query_D
        return residuals.owners_T[places[kept]].astype(np.int64), products.astype(np.float32)
    room = int((runs_R2[:, 1] - runs_R2[:, 0]).sum())
    places, products = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.float32)
    arrays = padded(query_D, codec.padded), runs_R2, np.ascontiguousarray(near_R)
    mask_N = np.ascontiguousarray(eligible_N, dtype=bool).view(np.uint8)
    given = (*map(address, arrays), len(runs_R2), address(mask_N), address(places), address(products))
    found = library.openembed_residuals_dots(residuals.pointer, *given)
    return residuals.owners_T[places[:found]].astype(np.int64), products[:found]


def scores_of(found: Retrieved, lanes: int, count: int, imputation: Imputation) -> tuple[np.ndarray, np.ndarray]:
    """Returns (positions, float32 scores) of every document with a token retrieved, of ``count`` documents in all."""
    starts = np.searchsorted(found.lanes, np.arange(lanes + 1))
    imputed_L = np.zeros(lanes, dtype=np.float32)
    if imputation == "last":
        for lane in np.flatnonzero(np.diff(starts)):
            imputed_L[lane] = found.products[starts[lane] : starts[lane + 1]].min()
    library = token_library()
    if library is None or imputation == "none":
        return _tallied(found, imputed_L, imputation)
    tally, documents = Tally(count), np.ascontiguousarray(found.documents, dtype=np.int64)
    products = np.ascontiguousarray(found.products, dtype=np.float32)
    arguments = address(documents), address(products), address(starts), lanes, address(imputed_L), tally.pointer
    positions, above = tally.found(library.openembed_products_tally(*arguments))
    return positions, above + np.float32(imputed_L.sum(dtype=np.float64))


def _tallied(found: Retrieved, imputed_L: np.ndarray, imputation: Imputation) -> tuple[np.ndarray, np.ndarray]:
    if not len(found.lanes):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    order = np.lexsort((found.documents, found.lanes))
    lanes, documents = found.lanes[order], found.documents[order]
    first = np.flatnonzero(np.r_[True, (np.diff(lanes) != 0) | (np.diff(documents) != 0)])
    best = np.maximum.reduceat(found.products[order].astype(np.float64), first)
    unique, which = np.unique(documents[first], return_inverse=True)
    totals = imputed_L.sum(dtype=np.float64) + np.bincount(which, best - imputed_L[lanes[first]])
    if imputation == "none":
        totals *= len(imputed_L) / np.bincount(which)
    return unique, totals.astype(np.float32)


def _candidates(matrix: TokenMatrix, mask_N: np.ndarray, panel: Panel, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (lanes, tokens): a superset of the best tokens of each lane."""
    lengths_N = np.diff(matrix.offsets_N1)
    documents = np.flatnonzero(mask_N & (lengths_N > 0)).astype(np.int64)
    total = int(lengths_N[documents].sum())
    if token_library() is None or total <= count:
        return _by_products(matrix, documents, panel, count)
    enough = total + total // 4 + 64  # where a lane fills seven eighths of its room, the scan asks for more
    capacity = min(16 * count + 4096, enough)
    while (found := _scan(matrix, documents, panel, count, capacity)) is None:
        capacity = min(2 * capacity, enough)
    return found


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
