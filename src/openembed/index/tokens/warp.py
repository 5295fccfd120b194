"""WARP (arXiv 2501.17788): only tokens in the centroids nearest to a query token are scored, straight from their codes.

For each query token the tokens of its ``probes`` nearest centroids are scored as product with the centroid plus product with
the residual, without a reconstruction. A document none of whose tokens is among them counts as the product of the centroid at
which the nearest centroids together hold ``reach`` tokens, an estimate of what was missed. The score is their sum over query
tokens, on the scale of MaxSim. Reconstructed tokens are not brought to length 1, as in the paper.

L tokens of the query, K centroids, R probes, N documents, D width, P padded width.
"""

from __future__ import annotations

from ctypes import byref
from typing import Literal

import numpy as np

from openembed.config import Config, Count, CountFromZero, kind_required
from openembed.index.tokens.codec import Residuals
from openembed.index.tokens.native import address, structure, token_library

ProbesStructure = structure("Probes", "values runs near missing", "tokens probes")
TallyStructure = structure("Tally", "eligible total best stamp found touched", "")

SHARE, BEYOND = 0.02, 2
"""Of all tokens: how many the nearest centroids hold up to the one whose product stands for what is missing; and how many
times as many as are probed it is at least."""


class Warp(Config, json_schema_extra=kind_required):
    """How WARP searches. ``reach``: None for ``SHARE`` of the tokens, and for more than the probed centroids hold: what is
    missing lies beyond these. WARP's own code takes a few thousand, often fewer than it probes, which puts documents that
    were found below those that were not (docs/log.md).

    ``rescored``: so many of the best are scored exactly after; 0: WARP's own scores are given, unless other segments are
    searched exactly, for they have no residuals: then the best are scored exactly all the same.
    """

    kind: Literal["warp"] = "warp"
    probes: Count = 32
    reach: CountFromZero | None = None
    rescored: CountFromZero = 0

    def scores(self, residuals: Residuals, query_LD: np.ndarray, eligible_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (positions, scores) of every eligible document found."""
        query_LD = np.asarray(query_LD, dtype=np.float32)
        products_LK = query_LD @ residuals.codec.centroids_KD.T
        tokens, sizes_K = int(residuals.starts_K1[-1]), np.diff(residuals.starts_K1)
        reach = int(SHARE * tokens) if self.reach is None else self.reach
        order_LK, held_LK = nearest_holding(products_LK, sizes_K, reach, BEYOND * self.probes)
        last_L = np.maximum((held_LK < reach).sum(axis=1), BEYOND * self.probes - 1 if self.reach is None else 0)
        last_L = np.minimum(last_L, order_LK.shape[1] - 1)
        missing_L = np.take_along_axis(products_LK, np.take_along_axis(order_LK, last_L[:, None], axis=1), axis=1)[:, 0]
        order_LR = order_LK[:, : self.probes]
        near_LR = np.ascontiguousarray(np.take_along_axis(products_LK, order_LR, axis=1))
        runs_LR = np.stack([residuals.starts_K1[order_LR], residuals.starts_K1[order_LR + 1]], axis=-1)
        tally = _compiled if token_library() is not None else _plain
        positions, above = tally(residuals, query_LD, (runs_LR, near_LR, np.ascontiguousarray(missing_L)), eligible_N)
        return positions, above + np.float32(missing_L.sum(dtype=np.float64))


def nearest_holding(products_LK: np.ndarray, sizes_K: np.ndarray, reach: int, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each query token the nearest centroids, best first, and how many tokens they hold up to each.

    So many centroids that they hold ``reach`` tokens for every query token, and at least ``least``, as far as there are.
    """
    clusters = products_LK.shape[1]
    bound = min(clusters, max(128, least, int(4 * reach / max(1.0, float(sizes_K.mean())))))
    while True:
        order_LK = _best_columns(products_LK, bound)
        held_LK = np.cumsum(sizes_K[order_LK], axis=1)
        if bound == clusters or (held_LK[:, -1] >= reach).all():
            return order_LK, held_LK
        bound = min(clusters, 2 * bound)


def _best_columns(products_LK: np.ndarray, count: int) -> np.ndarray:
    """Returns int64 (L, count): the columns of the greatest values of each row, greatest first."""
    clusters = products_LK.shape[1]
    if count < clusters:
        order_LK = np.argpartition(products_LK, clusters - count, axis=1)[:, clusters - count :]
    else:
        order_LK = np.broadcast_to(np.arange(clusters), products_LK.shape)
    inner_LK = np.argsort(-np.take_along_axis(products_LK, order_LK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(order_LK, inner_LK, axis=1)


Probed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places from and to of each probed centroid (L, R, 2), its product (L, R), and what is missing (L)."""


class Tally:
    """Room in which the kernels sum up what was found of each of ``count`` documents."""

    def __init__(self, count: int, mask_N: np.ndarray | None = None) -> None:
        self._mask_N, self._total_N, self._best_N = mask_N, np.zeros(count, np.float32), np.empty(count, np.float32)
        self._lists = np.zeros((3, count), dtype=np.int32)
        self._structure = TallyStructure(*map(address, (mask_N, self._total_N, self._best_N, *self._lists)))

    @property
    def pointer(self) -> object:
        """What a call is given."""
        return byref(self._structure)

    def found(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (positions, sums) of the ``count`` documents that a call found, ascending."""
        positions = np.sort(self._lists[2, :count]).astype(np.int64)
        return positions, self._total_N[positions]


Found = tuple[np.ndarray, np.ndarray]
"""Positions, and the sum over query tokens of what is found above what would be missing."""


def _compiled(residuals: Residuals, query_LD: np.ndarray, probed: Probed, eligible_N: np.ndarray) -> Found:
    count, codec, (runs_LR, near_LR, missing_L) = len(residuals), residuals.codec, probed
    wide_LP = np.zeros((len(query_LD), codec.padded), dtype=np.float32)
    wide_LP[:, : codec.width] = query_LD
    probes = ProbesStructure(*map(address, (wide_LP, runs_LR, near_LR, missing_L)), *near_LR.shape)
    tally = Tally(count, np.ascontiguousarray(eligible_N, dtype=bool).view(np.uint8))
    return tally.found(token_library().openembed_residuals_runs(residuals.pointer, byref(probes), tally.pointer))


def _plain(residuals: Residuals, query_LD: np.ndarray, probed: Probed, eligible_N: np.ndarray) -> Found:
    total_N, touched_N = np.zeros(len(residuals), dtype=np.float32), np.zeros(len(residuals), dtype=bool)
    for query_D, runs_R, near_R, missing in zip(query_LD, *probed, strict=True):
        places = np.concatenate([np.arange(low, high) for low, high in runs_R])
        products = np.repeat(near_R, runs_R[:, 1] - runs_R[:, 0]) + (
            residuals.codec.residuals_of(residuals.packed_TB[places]) @ query_D
        )
        owners = residuals.owners_T[places]
        kept = eligible_N[owners]
        best_N = np.full(len(residuals), -np.inf, dtype=np.float32)
        np.maximum.at(best_N, owners[kept], products[kept])
        found_N = best_N > -np.inf
        total_N[found_N] += best_N[found_N] - missing
        touched_N |= found_N
    positions = np.flatnonzero(touched_N)
    return positions, total_N[positions]
