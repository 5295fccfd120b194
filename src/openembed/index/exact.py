"""Exact search over representations in memory or memory-mapped, whatever their kind: evaluation and mining search by it.

Dense: the greatest inner product (:mod:`openembed.index.dense`). Sparse: the sum over shared terms of weight times weight; a
document that shares none is no hit. Tokens: MaxSim, the sum over the query's tokens of the greatest inner product with one of
the document's; a document without tokens is no hit. Scores are summed in float64 and rounded to float32, so that they do not
depend on what is searched beside them, and equal documents tie.

Q queries, N documents, B documents of a block, L tokens of queries, T tokens of documents, D width, V vocabulary, K found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.sparse import csr_matrix

from openembed.encoded import CALLED, Encoded, count_of, kind_of, take
from openembed.index import dense
from openembed.index.dense import Found, best_first, dot_products
from openembed.token_vectors import TokenVectors

DOCUMENTS = 16_384
"""Documents of a block whose sparse vectors are multiplied at once."""
QUERIES = 256
TOKENS = 8_192
"""Token vectors of documents multiplied at once, with ``LANES`` of queries: 32 MB of products."""
LANES = 512

Scored = tuple[int, np.ndarray, np.ndarray]
"""A query, positions of documents ascending, and their scores, float32."""


def search(queries: Encoded, documents: Encoded, k: int, id_of: Callable[[int], str]) -> list[list[tuple[int, float]]]:
    """Returns for each query the k documents of greatest score, best first, as (position, score).

    Ties, also at the cut, are broken by document id, descending, as trec_eval does. Raises ``ValueError`` for queries and
    documents of different kinds or widths.
    """
    _check(queries, documents)
    if kind_of(documents) == "dense":
        values_ND = np.ascontiguousarray(documents, dtype=np.float32)
        return dense.search(queries, [dense.Vectors(values_ND, np.ones(len(values_ND), dtype=bool))], k, id_of)
    best = _best(queries, documents, k, None)
    return [best_first(positions, scores, k, id_of) for positions, scores in best.rows]


def top_documents(queries: Encoded, documents: Encoded, k: int, below_Q: np.ndarray | None = None) -> Found:
    """Returns the k documents of greatest score for each query; with ``below_Q``, of those below the query's limit.

    Of equal scores the earlier document is better. Errors as ``search``.
    """
    _check(queries, documents)
    if kind_of(documents) == "dense":
        return dense.top_documents(queries, documents, k, below_Q)
    k, count = min(k, count_of(documents)), count_of(queries)
    found = Found(np.full((count, k), -1, dtype=np.int64), np.full((count, k), -np.inf, np.float32), np.zeros(count, np.int64))
    if k:
        best = _best(queries, documents, k, None if below_Q is None else np.asarray(below_Q, dtype=np.float32))
        found.above_Q[:] = best.above_Q
        for row, (positions, scores) in enumerate(best.rows):
            order = np.argsort(-scores, kind="stable")[:k]
            found.documents_QK[row, : len(order)], found.scores_QK[row, : len(order)] = positions[order], scores[order]
    return found


def scores_of(query: Encoded, documents: Encoded, positions_C: np.ndarray) -> np.ndarray:
    """Returns float32 (C,): the scores of the documents at these positions for the only text of ``query``.

    Documents that are no hit score 0, without tokens -inf.
    """
    _check(query, documents)
    if kind_of(documents) == "dense":
        return dot_products(query[0], documents, positions_C)
    chosen = take(documents, positions_C)
    scores_C = np.full(len(positions_C), 0.0 if kind_of(documents) == "sparse" else -np.inf, dtype=np.float32)
    for _, positions, scores in _scored(query, chosen):
        scores_C[positions] = scores
    return scores_C


def _check(queries: Encoded, documents: Encoded) -> None:
    kinds = kind_of(queries), kind_of(documents)
    if kinds[0] != kinds[1]:
        raise ValueError(f"queries are {CALLED[kinds[0]]}, documents {CALLED[kinds[1]]}; encode both with one model")
    widths = [part.width if isinstance(part, TokenVectors) else part.shape[1] for part in (queries, documents)]
    if widths[0] != widths[1]:
        raise ValueError(f"queries have width {widths[0]}, documents {widths[1]}; encode both with one model")


class _Best:
    """What may still be among the k best of each query; of those at or above a query's limit only the number is kept."""

    def __init__(self, count: int, k: int, limit_Q: np.ndarray | None) -> None:
        self.rows = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))] * count
        self.above_Q = np.zeros(count, dtype=np.int64)
        self._k, self._limit_Q, self._floor_Q = k, limit_Q, np.full(count, -np.inf, dtype=np.float32)

    def add(self, row: int, positions: np.ndarray, scores: np.ndarray) -> None:
        kept = scores >= self._floor_Q[row]
        if self._limit_Q is not None:
            passed = scores >= self._limit_Q[row]
            self.above_Q[row] += passed.sum()
            kept &= ~passed
        positions = np.concatenate([self.rows[row][0], positions[kept]])
        scores = np.concatenate([self.rows[row][1], scores[kept]])
        if len(scores) > self._k:
            self._floor_Q[row] = np.partition(scores, -self._k)[-self._k]
            kept = scores >= self._floor_Q[row]
            positions, scores = positions[kept], scores[kept]
        self.rows[row] = positions, scores


def _best(queries: Encoded, documents: Encoded, k: int, limit_Q: np.ndarray | None) -> _Best:
    best = _Best(count_of(queries), k, limit_Q)
    for row, positions, scores in _scored(queries, documents):
        best.add(row, positions, scores)
    return best


def _scored(queries: Encoded, documents: Encoded) -> Iterator[Scored]:
    """Yields the score of every document that is a hit, a block of documents after the other."""
    if isinstance(documents, TokenVectors):
        return _by_tokens(queries, documents)
    return _by_terms(_canonical(queries), documents)


def _by_terms(queries_QV: csr_matrix, documents_NV: csr_matrix) -> Iterator[Scored]:
    for first in range(0, documents_NV.shape[0], DOCUMENTS):
        block_VB = _canonical(documents_NV[first : first + DOCUMENTS]).T.tocsr()
        for start in range(0, queries_QV.shape[0], QUERIES):
            products_QB = queries_QV[start : start + QUERIES] @ block_VB
            products_QB.sort_indices()
            for row in range(products_QB.shape[0]):
                part = slice(products_QB.indptr[row], products_QB.indptr[row + 1])
                scores = products_QB.data[part].astype(np.float32)
                hits = scores > 0
                yield start + row, products_QB.indices[part][hits].astype(np.int64) + first, scores[hits]


def _canonical(values_NV: csr_matrix) -> csr_matrix:
    """In float64, each term once and in order, so that sums do not depend on how a matrix was made."""
    values_NV = values_NV.astype(np.float64)
    values_NV.sum_duplicates()
    return values_NV


def _by_tokens(queries: TokenVectors, documents: TokenVectors) -> Iterator[Scored]:
    lengths_N = documents.lengths_N
    filled = np.flatnonzero(lengths_N)
    asked = np.flatnonzero(queries.lengths_N)
    for block in _parts(lengths_N[filled], TOKENS):
        positions = filled[block]
        low, high = documents.offsets_N1[positions[0]], documents.offsets_N1[positions[-1] + 1]
        block_TD = np.asarray(documents.values_TD[low:high], dtype=np.float64)
        starts_B = documents.offsets_N1[positions] - low
        for part in _parts(queries.lengths_N[asked], LANES):
            rows = asked[part]
            lanes = queries.select(rows)
            best_LB = np.maximum.reduceat(lanes.values_TD.astype(np.float64) @ block_TD.T, starts_B, axis=1)
            scores_QB = np.add.reduceat(best_LB, lanes.offsets_N1[:-1], axis=0).astype(np.float32)
            yield from ((int(row), positions, scores_B) for row, scores_B in zip(rows, scores_QB, strict=True))


def _parts(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Yields runs that hold about ``limit`` together, a larger one alone."""
    bounds = np.flatnonzero(np.diff(np.cumsum(sizes) // limit)) + 1
    ends = [*bounds.tolist(), len(sizes)] if len(sizes) else []
    yield from (slice(start, end) for start, end in zip([0, *ends], ends, strict=False))
