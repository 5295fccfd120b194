"""Centroids of token vectors: k-means on a sample, and the nearest centroid of every token.

Products are those of one byte a component where there is a compiled kernel, four times as fast as float32 ones; a token that
lies between two centroids may be given to the second nearest, which costs nothing that can be measured.

T tokens, K centroids, D width.
"""

from __future__ import annotations

from ctypes import byref

import numpy as np

from openembed.index.codes import in_parallel
from openembed.index.native import threads
from openembed.index.tokens.coding import CodedRows, PanelStructure, code_rows, in_lanes
from openembed.index.tokens.exact import TokensStructure
from openembed.index.tokens.native import address, check, token_library

ROUNDS = 6
SAMPLE = 40
"""Tokens of the sample for each centroid."""
BLOCK = 4_096


def sampled(tokens: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Returns ``count`` distinct positions of ``tokens`` (all, where there are no more), ascending."""
    return np.arange(tokens) if tokens <= count else np.sort(random.choice(tokens, count, replace=False))


def k_means(sample_TD: np.ndarray, clusters: int, random: np.random.Generator, *, unit: bool) -> np.ndarray:
    """Returns float32 centroids (K, D) after ``ROUNDS`` rounds; ``unit``: of length 1 (spherical k-means).

    A centroid that is nearest to no token begins anew at a random one. Raises ``ValueError`` for fewer tokens than clusters.
    """
    if clusters > len(sample_TD):
        raise ValueError(f"{clusters} clusters of {len(sample_TD)} tokens; at most one for each token")
    sample_TD = np.ascontiguousarray(sample_TD, dtype=np.float32)
    centroids_KD = sample_TD[random.choice(len(sample_TD), clusters, replace=False)]
    for _ in range(ROUNDS):
        nearest_T = nearest(sample_TD, centroids_KD)
        order_T, counts_K = np.argsort(nearest_T, kind="stable"), np.bincount(nearest_T, minlength=clusters)
        full_K = counts_K > 0
        starts = (np.cumsum(counts_K) - counts_K)[full_K]
        centroids_KD = sample_TD[random.choice(len(sample_TD), clusters)]
        centroids_KD[full_K] = np.add.reduceat(sample_TD[order_T], starts, axis=0) / counts_K[full_K, None]
        if unit:
            centroids_KD /= np.maximum(np.linalg.norm(centroids_KD, axis=1, keepdims=True), 1e-12)
    return centroids_KD


def nearest(values_TD: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """Returns int32 (T,): the centroid at the least distance of each token, nearly (see above)."""
    bias_K = -0.5 * np.square(centroids_KD).sum(axis=1)
    out_T = np.zeros(len(values_TD), dtype=np.int32)
    coded = None if token_library() is None else code_rows(centroids_KD)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(values_TD), BLOCK)]
    parts = 1 if coded is None else max(1, min(threads(), len(blocks)))

    def run(number: int) -> int:
        for block in blocks[number::parts]:
            block_TD = np.ascontiguousarray(values_TD[block], dtype=np.float32)
            if coded is None:
                out_T[block] = (block_TD @ centroids_KD.T + bias_K).argmax(axis=1)
            else:
                out_T[block] = _nearest_by_codes(block_TD, coded, bias_K)
        return 0

    in_parallel(run, parts)
    return out_T


def _nearest_by_codes(block_TD: np.ndarray, coded: CodedRows, bias_K: np.ndarray) -> np.ndarray:
    centroids = TokensStructure(address(coded.codes_TS), address(coded.scale_T), stride=coded.codes_TS.shape[1])
    panel, starts, scales = in_lanes(code_rows(block_TD))
    found = np.zeros(len(scales), dtype=np.int32)
    lanes = PanelStructure(*map(address, (panel, starts, scales)), lanes=len(block_TD), tiles=len(panel))
    check(token_library().openembed_tokens_assign(byref(centroids), address(bias_K), len(bias_K), byref(lanes), address(found)))
    return found[: len(block_TD)]
