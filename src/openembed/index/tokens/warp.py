"""WARP (arXiv 2501.17788): only tokens in the centroids nearest to a query token are scored, straight from their codes.

For each query token the tokens of its ``probes`` nearest centroids are scored as product with the centroid plus product with the
residual, without a reconstruction. A document none of whose tokens is among them counts as the product of the centroid at which
the nearest centroids together hold ``reach`` tokens, an estimate of what was missed. The score is their sum over query tokens,
on the scale of MaxSim. Reconstructed tokens are not brought to length 1, as in the paper.

L tokens of the query, K centroids, R probes, N documents, D width, P padded width.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass

import numpy as np

from openembed.index.tokens.codec import Residuals
from openembed.index.tokens.native import address, structure, token_library

ProbesStructure = structure("Probes", "values runs near missing", "tokens probes")
TallyStructure = structure("Tally", "eligible total best stamp found touched", "")


@dataclass(frozen=True)
class Warp:
    """How WARP searches. ``reach``: None for ``1000 * floor(sqrt(8 tokens) / 1000)``, at least 1000, as WARP's code has it.

    ``rescored``: so many of the best are scored exactly after; 0: WARP's own scores are given.
    """

    probes: int = 32
    reach: int | None = None
    rescored: int = 0

    def __post_init__(self) -> None:
        if self.probes < 1 or (self.reach is not None and self.reach < 0) or self.rescored < 0:
            raise ValueError(f"WARP needs 1 or more probes, and reach and rescored of 0 or more; got {self}")

    def scores(self, residuals: Residuals, query_LD: np.ndarray, eligible_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (positions, scores) of every eligible document found."""
        query_LD = np.asarray(query_LD, dtype=np.float32)
        products_LK = query_LD @ residuals.codec.centroids_KD.T
        probes = min(self.probes, products_LK.shape[1])
        order_LK = best_columns(products_LK, probes)
        missing_L = self._missing(residuals, products_LK)
        near_LR = np.ascontiguousarray(np.take_along_axis(products_LK, order_LK, axis=1))
        runs_LR = np.stack([residuals.starts_K1[order_LK], residuals.starts_K1[order_LK + 1]], axis=-1)
        tally = _compiled if token_library() is not None else _plain
        positions, above = tally(residuals, query_LD, (runs_LR, near_LR, missing_L), eligible_N)
        return positions, above + np.float32(missing_L.sum(dtype=np.float64))

    def _missing(self, residuals: Residuals, products_LK: np.ndarray) -> np.ndarray:
        """Returns float32 (L,): the product of the centroid with which the nearest ones hold ``reach`` tokens."""
        tokens = int(residuals.starts_K1[-1])
        reach = max(1000, int((8 * tokens) ** 0.5 / 1000) * 1000) if self.reach is None else self.reach
        sizes_K, clusters = np.diff(residuals.starts_K1), products_LK.shape[1]
        bound = min(clusters, max(128, int(2 * reach / max(1.0, sizes_K.mean()))))
        while True:
            order_LK = best_columns(products_LK, bound)
            held_LK = np.cumsum(sizes_K[order_LK], axis=1)
            if bound == clusters or (held_LK[:, -1] >= reach).all():
                break
            bound = min(clusters, 2 * bound)
        place_L = np.minimum((held_LK < reach).sum(axis=1), bound - 1)
        rows_L = np.arange(len(products_LK))
        return products_LK[rows_L, order_LK[rows_L, place_L]]


def best_columns(products_LK: np.ndarray, count: int) -> np.ndarray:
    """Returns int64 (L, count): the columns of the greatest values of each row, greatest first."""
    if count < products_LK.shape[1]:
        order_LK = np.argpartition(-products_LK, count - 1, axis=1)[:, :count]
    else:
        order_LK = np.broadcast_to(np.arange(products_LK.shape[1]), products_LK.shape)
    inner_LK = np.argsort(-np.take_along_axis(products_LK, order_LK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(order_LK, inner_LK, axis=1)


Probed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Places from and to of each probed centroid (L, R, 2), its product (L, R), and what is missing (L)."""


def _compiled(residuals: Residuals, query_LD: np.ndarray, probed: Probed, eligible_N: np.ndarray) -> Probed:
    count, codec, (runs_LR, near_LR, missing_L) = len(residuals), residuals.codec, probed
    wide_LP = np.zeros((len(query_LD), codec.padded), dtype=np.float32)
    wide_LP[:, : codec.width] = query_LD
    probes = ProbesStructure(*map(address, (wide_LP, runs_LR, near_LR, missing_L)), *near_LR.shape)
    total_N, best_N = np.zeros(count, dtype=np.float32), np.empty(count, dtype=np.float32)
    lists = np.zeros((3, count), dtype=np.int32)
    mask_N = np.ascontiguousarray(eligible_N, dtype=np.uint8)
    tally = TallyStructure(*map(address, (mask_N, total_N, best_N, *lists)))
    found = token_library().openembed_residuals_runs(residuals.pointer, byref(probes), byref(tally))
    positions = np.sort(lists[2, :found]).astype(np.int64)
    return positions, total_N[positions]


def _plain(residuals: Residuals, query_LD: np.ndarray, probed: Probed, eligible_N: np.ndarray) -> Probed:
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
