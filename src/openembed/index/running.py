"""Exact top k of many queries over documents that never are in memory at once.

Documents come in blocks from a memory-mapped file; each query keeps its best k so far, and a block's scores are compared with
the k-th of them, so that few are ever handled one by one.

Q queries, B documents of a block, N documents, C candidates held, D width.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 4_096


@dataclass(frozen=True)
class Found:
    """The best documents of each query: int64 (Q, k), float32 (Q, k), best first; -1 and -inf where there are fewer.

    ``above_Q``: how many documents were passed over because they are not below the query's limit.
    """

    documents_QK: np.ndarray
    scores_QK: np.ndarray
    above_Q: np.ndarray


class RunningTop:
    """The k best of the blocks added so far, for each query; of equal scores the earlier document is better.

    Holds ``Q · (2k + B)`` scores and positions.
    """

    def __init__(self, queries: int, k: int, block: int = BLOCK) -> None:
        self._k = k
        self._scores_QC = np.full((queries, 2 * k + block), -np.inf, dtype=np.float32)
        self._documents_QC = np.full((queries, 2 * k + block), -1, dtype=np.int64)
        self._filled_Q = np.zeros(queries, dtype=np.int64)
        self._floor_Q = np.full(queries, -np.inf, dtype=np.float32)
        self._hits = np.empty(queries * block, dtype=bool)  # made once: fresh pages cost as much as comparing

    def add(self, scores_QB: np.ndarray, first: int) -> None:
        """Takes in the scores of documents ``first``, ``first + 1``, ...; a score of -inf is no candidate."""
        hits_QB = np.greater(scores_QB, self._floor_Q[:, None], out=self._hits[: scores_QB.size].reshape(scores_QB.shape))
        rows, columns = np.divmod(np.flatnonzero(hits_QB), scores_QB.shape[1])
        counts_Q = np.bincount(rows, minlength=len(self._filled_Q))
        starts_Q = np.cumsum(counts_Q) - counts_Q
        places = np.arange(len(rows)) + (self._filled_Q - starts_Q)[rows]
        self._scores_QC[rows, places] = scores_QB[rows, columns]
        self._documents_QC[rows, places] = columns + first
        self._filled_Q += counts_Q
        if self._filled_Q.max(initial=0) > 2 * self._k:
            self._compact()

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (documents, scores), each (Q, k), best first."""
        self._compact()
        scores_QK, documents_QK = self._scores_QC[:, : self._k], self._documents_QC[:, : self._k]
        order_QK = np.argsort(-scores_QK, axis=1, kind="stable")  # held in order of documents, so ties keep it
        return np.take_along_axis(documents_QK, order_QK, 1), np.take_along_axis(scores_QK, order_QK, 1)

    def _compact(self) -> None:
        """Keeps the k best of each row, in order of documents."""
        width, k = max(int(self._filled_Q.max(initial=0)), self._k), self._k
        scores_QC, documents_QC = self._scores_QC[:, :width], self._documents_QC[:, :width]
        kth_Q1 = np.partition(scores_QC, width - k, axis=1)[:, width - k, None]
        above_QC, ties_QC = scores_QC > kth_Q1, scores_QC == kth_Q1
        missing_Q1 = k - above_QC.sum(axis=1, keepdims=True)
        kept_QC = above_QC | (ties_QC & (np.cumsum(ties_QC, axis=1) <= missing_Q1))
        best_QK, where_QK = scores_QC[kept_QC].reshape(-1, k), documents_QC[kept_QC].reshape(-1, k)
        self._scores_QC[:, :width], self._documents_QC[:, :width] = -np.inf, -1
        self._scores_QC[:, :k], self._documents_QC[:, :k] = best_QK, where_QK
        self._filled_Q = np.minimum(self._filled_Q, k)
        self._floor_Q = kth_Q1[:, 0]


def top_documents(
    queries_QD: np.ndarray, documents_ND: np.ndarray, k: int, below_Q: np.ndarray | None = None, *, block: int = BLOCK
) -> Found:
    """Returns the k documents of greatest dot product for each query; with ``below_Q``, of those below the query's limit.

    ``documents_ND`` may be a memory-mapped file of any size: it is read a block at a time into one buffer. Memory: scores of
    one block and the running top, ``Q · (2 · block + 2k)`` floats and as many positions. Scores are float32 products summed
    in float64 a row at a time, so they do not depend on blocks, and equal vectors tie exactly; which documents are at the
    very end of the k may depend on the float32 product.
    """
    k = min(k, len(documents_ND))
    if k == 0:
        empty = np.empty((len(queries_QD), 0))
        return Found(empty.astype(np.int64), empty.astype(np.float32), np.zeros(len(queries_QD), dtype=np.int64))
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    running, above_Q = RunningTop(len(queries_QD), k, block), np.zeros(len(queries_QD), dtype=np.int64)
    buffer = np.empty(len(queries_QD) * block, dtype=np.float32)
    for first, block_BD in _blocks(documents_ND, min(block, max(2 * k, 256)), block):
        shape = (len(queries_QD), len(block_BD))
        scores_QB = np.matmul(queries_QD, block_BD.T, out=buffer[: shape[0] * shape[1]].reshape(shape))
        if below_Q is not None:
            passed_QB = scores_QB >= below_Q[:, None]
            above_Q += passed_QB.sum(axis=1)
            scores_QB[passed_QB] = -np.inf
        running.add(scores_QB, first)
    documents_QK, scores_QK = running.result()
    for query_D, documents_K, scores_K in zip(queries_QD, documents_QK, scores_QK, strict=True):
        found = documents_K >= 0
        scores_K[found] = dot_products(query_D, documents_ND, documents_K[found])
    release(documents_ND)
    order_QK = np.lexsort((documents_QK, -scores_QK), axis=1)
    return Found(np.take_along_axis(documents_QK, order_QK, 1), np.take_along_axis(scores_QK, order_QK, 1), above_Q)


def dot_products(query_D: np.ndarray, documents_ND: np.ndarray, documents_C: np.ndarray) -> np.ndarray:
    """Returns float32 (C,): products with the documents of these positions, summed in float64."""
    order_C = np.argsort(documents_C)
    scores_C = np.empty(len(documents_C), dtype=np.float32)
    scores_C[order_C] = (documents_ND[documents_C[order_C]] * query_D.astype(np.float64)).sum(axis=1)
    return scores_C


def first_places(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Returns the positions of the k greatest scores, best first, equal ones in order; only about k are sorted."""
    candidates = np.arange(len(scores_N))
    if k < len(scores_N):
        candidates = np.flatnonzero(scores_N >= np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k])
    return candidates[np.argsort(-scores_N[candidates], kind="stable")][:k]


def release(array: np.ndarray) -> None:
    """Lets the system take back the pages of a memory-mapped array that were read."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _blocks(documents_ND: np.ndarray, rows: int, block: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (position of the first row, vectors): a small block first, which sets the floor for the others."""
    start = 0
    while start < len(documents_ND):
        stop = min(start + rows, len(documents_ND))
        yield start, _read(documents_ND, start, stop)
        start, rows = stop, block


def _read(documents_ND: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows as a plain array: read from the file, so that pages of the map do not pile up in this process."""
    if not isinstance(documents_ND, np.memmap) or documents_ND.dtype != np.dtype("<f4"):
        return np.ascontiguousarray(documents_ND[start:stop], dtype=np.float32)
    width = documents_ND.shape[1]
    offset = documents_ND.offset + 4 * width * start
    rows = np.fromfile(documents_ND.filename, dtype="<f4", count=(stop - start) * width, offset=offset)
    return rows.reshape(stop - start, width)
