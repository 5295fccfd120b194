"""Fewer token vectors a document: clusters of its own tokens, each replaced by its mean (arXiv 2409.14683).

The first tokens may be protected. ``ward`` is the paper's; it gives the same vectors as sentence-transformers'
``HierarchicalTokenPooling``. ``k_means`` takes a third of the time and loses twice as much (docs/log.md).

T tokens of a document, K clusters, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from openembed.token_vectors import TokenVectors

ROUNDS = 2


def pool_tokens(
    documents: TokenVectors,
    factor: float,
    *,
    protected: int = 1,
    method: Literal["ward", "k_means"] = "ward",
    normalize: bool = True,
) -> TokenVectors:
    """Returns documents of about 1 in ``factor`` of their tokens, float32: the ``protected`` first ones, then the clusters.

    A document keeps at least one cluster of what is not protected. ``normalize``: every vector is brought to length 1. Raises
    ``ValueError`` for a factor below 1, a negative ``protected`` or an unknown method.
    """
    methods: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"ward": _ward, "k_means": _k_means}
    if factor < 1 or protected < 0 or method not in methods:
        raise ValueError(
            f"pooling needs a factor of 1 or more, protected of 0 or more and a method of {sorted(methods)}; "
            f"got {factor}, {protected} and {method!r}"
        )
    pooled = []
    for values_TD in documents:
        values_TD = np.asarray(values_TD, dtype=np.float32)
        rest_TD = values_TD[protected:]
        clusters = max(int(len(rest_TD) // factor), 1)
        if clusters < len(rest_TD):
            rest_TD = _means(rest_TD, methods[method](rest_TD, clusters))
        values_TD = np.concatenate([values_TD[:protected], rest_TD])
        if normalize:
            values_TD = values_TD / np.maximum(np.linalg.norm(values_TD, axis=1, keepdims=True), 1e-12)
        pooled.append(values_TD)
    return TokenVectors.from_list(pooled, documents.width)


def _means(values_TD: np.ndarray, labels_T: np.ndarray) -> np.ndarray:
    """Returns float32 (K, D): the mean of each label that occurs, in order of the labels."""
    members_KT = np.zeros((int(labels_T.max()) + 1, len(labels_T)), dtype=np.float32)
    members_KT[labels_T, np.arange(len(labels_T))] = 1
    counts_K = members_KT.sum(axis=1)
    members_KT = members_KT[counts_K > 0]
    return (members_KT @ values_TD) / counts_K[counts_K > 0, None]  # a product of matrices is the fastest of sums


def _ward(values_TD: np.ndarray, clusters: int) -> np.ndarray:
    """Returns labels (T,) by Ward linkage of the distances 1 - product."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    apart_TT = np.clip(1 - values_TD @ values_TD.T, 0, 2)
    return fcluster(linkage(squareform(apart_TT, checks=False), method="ward"), t=clusters, criterion="maxclust")


def _k_means(values_TD: np.ndarray, clusters: int) -> np.ndarray:
    """Returns labels (T,) after ``ROUNDS`` rounds of spherical k-means from evenly spaced tokens; a label may stay empty."""
    centroids_KD = values_TD[np.linspace(0, len(values_TD) - 1, clusters).round().astype(np.int64)]
    for round_number in range(ROUNDS):
        labels_T = (values_TD @ centroids_KD.T).argmax(axis=1)
        if round_number == ROUNDS - 1:
            break
        used = np.unique(labels_T)
        centroids_KD = centroids_KD.copy()
        centroids_KD[used] = _means(values_TD, labels_T)
        centroids_KD /= np.maximum(np.linalg.norm(centroids_KD, axis=1, keepdims=True), 1e-12)
    return labels_T
