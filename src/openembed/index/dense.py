"""Exact dense search: every dot product over memory-mapped vectors, a block at a time.

A float32 matrix product proposes candidates; their scores are then computed once more, row by row in float64, and
rounded to float32. So a score does not depend on the block, the segment, the batch of queries or the number of threads,
equal vectors tie exactly, and ties are broken by document id (descending, as trec_eval does).

Q queries, B rows of a block, N documents, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

BLOCK = 16_384
QUERIES = 256
Hits = dict[str, float]
"""Document id → score, best first."""


@dataclass(frozen=True)
class Vectors:
    """A run of document vectors: float32 (N, D), which of them are live, and the largest norm among them."""

    values_ND: np.ndarray
    live_N: np.ndarray
    largest_norm: float


def search(
    queries_QD: np.ndarray, segments: Sequence[Vectors], k: int, id_of: Callable[[int], str]
) -> list[list[tuple[int, float]]]:
    """Returns for each query the k live documents of greatest dot product, best first, as (position, score).

    Positions count through the segments. Fewer than k live documents give a shorter list. Memory is bounded by
    ``QUERIES × BLOCK`` scores plus the candidates, whatever the number of documents.
    """
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    found: list[list[tuple[int, float]]] = []
    for start in range(0, len(queries_QD), QUERIES):
        chunk_QD = queries_QD[start : start + QUERIES]
        for query_D, positions_C in zip(chunk_QD, _candidates(chunk_QD, segments, k), strict=True):
            positions_C = np.sort(positions_C)
            found.append(best_first(positions_C, _exact_scores(query_D, segments, positions_C), k, id_of))
    return found


def best_first(positions_C: np.ndarray, scores_C: np.ndarray, k: int, id_of: Callable[[int], str]) -> list[tuple[int, float]]:
    """Returns the k best (position, score): score descending, then document id descending."""
    if len(scores_C) > k:
        kept_C = scores_C >= np.partition(scores_C, -k)[-k]
        positions_C, scores_C = positions_C[kept_C], scores_C[kept_C]
    rows = zip(scores_C.tolist(), positions_C.tolist(), strict=True)
    ranked = sorted(((score, id_of(position), position) for score, position in rows), reverse=True)
    return [(position, score) for score, _, position in ranked[:k]]


def _candidates(queries_QD: np.ndarray, segments: Sequence[Vectors], k: int) -> list[np.ndarray]:
    """Returns for each query the positions of a superset of its exact top k.

    The float32 score of a product of width D is off by at most D·eps·|q|·|d|, so whatever scores within twice that of
    the k-th best so far stays a candidate.
    """
    norms_Q = np.linalg.norm(queries_QD, axis=1)
    largest = max((segment.largest_norm for segment in segments), default=0.0)
    slack_Q = 2.0 * queries_QD.shape[1] * np.finfo(np.float32).eps * norms_Q * largest
    lowest = np.finfo(np.float32).min
    floor_Q = np.full(len(queries_QD), lowest, dtype=np.float32)
    positions: list[np.ndarray] = [np.empty(0, dtype=np.int64) for _ in queries_QD]
    scores: list[np.ndarray] = [np.empty(0, dtype=np.float32) for _ in queries_QD]
    for first, block_BD, live_B in _blocks(segments, max(4 * k, 1024)):
        scores_QB = queries_QD @ block_BD.T
        if not live_B.all():
            scores_QB[:, ~live_B] = -np.inf
        rows, columns = np.nonzero(scores_QB >= floor_Q[:, None])
        bounds = np.searchsorted(rows, np.arange(len(queries_QD) + 1))
        for row in np.flatnonzero(np.diff(bounds)):
            new = columns[bounds[row] : bounds[row + 1]]
            positions[row] = np.concatenate([positions[row], new + first])
            scores[row] = np.concatenate([scores[row], scores_QB[row, new]])
            if len(scores[row]) > k:
                floor_Q[row] = max(np.partition(scores[row], -k)[-k] - slack_Q[row], lowest)
                kept = scores[row] >= floor_Q[row]
                positions[row], scores[row] = positions[row][kept], scores[row][kept]
    return positions


def _blocks(segments: Sequence[Vectors], first_rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (position of the first row, vectors, live); a small first block sets the floor the others must pass."""
    base, rows = 0, min(first_rows, BLOCK)
    for segment in segments:
        start = 0
        while start < len(segment.values_ND):
            stop = start + rows
            yield base + start, segment.values_ND[start:stop], segment.live_N[start:stop]
            start, rows = stop, BLOCK
        base += len(segment.values_ND)


def _exact_scores(query_D: np.ndarray, segments: Sequence[Vectors], positions_C: np.ndarray) -> np.ndarray:
    """Returns float32 dot products summed in float64, one row at a time; ``positions_C`` ascending."""
    parts, base = [], 0
    query_D = query_D.astype(np.float64)
    for segment in segments:
        end = base + len(segment.values_ND)
        low, high = np.searchsorted(positions_C, [base, end])
        for start in range(low, high, 4096):
            rows_CD = segment.values_ND[positions_C[start : min(start + 4096, high)] - base]
            parts.append((rows_CD * query_D).sum(axis=1))
        base = end
    return np.concatenate(parts).astype(np.float32) if parts else np.empty(0, dtype=np.float32)
