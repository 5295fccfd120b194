"""PLAID (arXiv 2205.09707): documents are first scored as if their tokens were their centroids, the best then by their
residuals.

A token's product with a centroid is computed once a query and kept as one byte, so this first pass takes a byte look-up a token
and query. It looks at every document, or at those with a token in one of the ``probes`` nearest centroids of a query token.

L tokens of the query, K centroids, N documents, D width.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from openembed.config import Config, Count, kind_required
from openembed.index.tokens.codec import Residuals


class Plaid(Config, json_schema_extra=kind_required):
    """How PLAID searches. ``documents`` go on to be scored exactly: on their vectors where the segment has them, otherwise as
    reconstructed. ``probes``: nearest centroids of each query token; None: no document is passed over unseen. ``threshold``
    (the paper's t_cs): tokens of a centroid whose greatest product with the query's tokens is below it count for nothing in the
    first pass, and a document with no others comes last there; None: every token counts.
    """

    kind: Literal["plaid"] = "plaid"
    documents: Count = 256
    probes: Count | None = None
    threshold: float | None = Field(None, strict=True, allow_inf_nan=False)

    def candidates(self, residuals: Residuals, query_LD: np.ndarray, eligible_N: np.ndarray, k: int = 1) -> np.ndarray:
        """Returns the positions of the ``documents`` (k at least) eligible documents of the greatest score by centroids."""
        products_LK = np.asarray(query_LD, dtype=np.float32) @ residuals.codec.centroids_KD.T
        chosen = np.flatnonzero(self._probed(residuals, products_LK, eligible_N) & (np.diff(residuals.offsets_N1) > 0))
        count = max(self.documents, k)
        if len(chosen) <= count:
            return chosen
        table_KL = as_bytes(products_LK)
        if self.threshold is not None:
            table_KL[products_LK.max(axis=0, initial=-np.inf) < self.threshold] = 0  # the least byte: it is nobody's greatest
        scores = residuals.near(table_KL, chosen)
        return chosen[np.argpartition(-scores, count - 1)[:count]]

    def _probed(self, residuals: Residuals, products_LK: np.ndarray, eligible_N: np.ndarray) -> np.ndarray:
        """Returns bool (N): the eligible documents with a token in a probed centroid."""
        clusters = products_LK.shape[1]
        if self.probes is None or self.probes >= clusters:
            return eligible_N
        probed_K = np.unique(np.argpartition(-products_LK, self.probes, axis=1)[:, : self.probes])
        mask_N = np.zeros(len(eligible_N), dtype=bool)
        for low, high in zip(residuals.starts_K1[probed_K], residuals.starts_K1[probed_K + 1], strict=True):
            mask_N[residuals.owners_T[low:high]] = True
        return mask_N & eligible_N


def as_bytes(products_LK: np.ndarray) -> np.ndarray:
    """Returns uint8 (K, lanes): products on one scale for all, with lanes of zeros up to 16, 32 or a multiple of 64."""
    count, clusters = products_LK.shape
    lanes = next((lanes for lanes in (16, 32) if count <= lanes), -(-count // 64) * 64)
    low, high = float(products_LK.min(initial=0)), float(products_LK.max(initial=0))
    table_KL = np.zeros((clusters, lanes), dtype=np.uint8)
    scaled_LK = (products_LK - np.float32(low)) * np.float32(255 / max(high - low, 1e-30))
    table_KL[:, :count] = (scaled_LK + np.float32(0.5)).astype(np.uint8).T
    return table_KL
