"""Exact dense search, for the store, for evaluation and for mining: every document is looked at, none is lost.

A first pass proposes a superset of each query's top k: the compiled scan of int8 codes with a bound on what they lose (see
``kernels/scan.c``), or float32 products with a bound on their rounding. The candidates' scores are then summed in float64
and rounded to float32. So a score does not depend on the block, the segment, the batch of queries or the number of threads,
and equal vectors tie exactly.

Q queries, B rows of a block, N documents, P documents in the order of their codes, C candidates of all queries, D width,
K found.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from openembed.index.codes import LANES, CodedQueries, Codes, Scanner, capacity, eligible_groups, groups_of, quantize
from openembed.index.native import scan_library
from openembed.index.sketch import Sketch

BLOCK = 16_384
LARGEST = 1e30
"""Products that may be larger are left to float32 products: the bounds of codes must not overflow."""
QUERIES = 252
ROOM = 4_000_000
"""Candidates held at once, over all queries."""
DIRECT = 1_024
"""This few eligible documents are scored exactly, without a first pass."""
LEAST_ELIGIBLE = 0.1
"""With a smaller share of eligible documents a segment is searched exactly even where it might be approximately."""
WORTH_CODING = 256
"""With so many queries at once, coding vectors that have no codes on disk takes less time than it saves."""


@dataclass(frozen=True)
class Vectors:
    """A run of document vectors: float32 (N, D), which of them may be found, and what else of them is on disk."""

    values_ND: np.ndarray
    eligible_N: np.ndarray
    codes: Codes | None = None
    largest_norm: float | None = None
    sketch: Sketch | None = None

    @cached_property
    def norm(self) -> float:
        """The largest norm of the vectors."""
        if self.largest_norm is not None:
            return self.largest_norm
        blocks = (_read(self.values_ND, start, start + BLOCK) for start in range(0, len(self.values_ND), BLOCK))
        return max((float(np.linalg.norm(block_BD, axis=1).max()) for block_BD in blocks), default=0.0)


@dataclass(frozen=True)
class Found:
    """The best documents of each query: int64 (Q, K), float32 (Q, K), best first; -1 and -inf where there are fewer.

    ``above_Q``: how many documents were passed over because they are not below the query's limit.
    """

    documents_QK: np.ndarray
    scores_QK: np.ndarray
    above_Q: np.ndarray


@dataclass(frozen=True)
class _Scored:
    """Candidates with exact scores, ordered by query, then score descending, then position."""

    rows_C: np.ndarray
    positions_C: np.ndarray
    scores_C: np.ndarray


def search(
    queries_QD: np.ndarray,
    segments: Sequence[Vectors],
    k: int,
    id_of: Callable[[int], str],
    *,
    approximate: bool = False,
) -> list[list[tuple[int, float]]]:
    """Returns for each query the k eligible documents of greatest dot product, best first, as (position, score).

    ``approximate``: segments that have a sketch are searched by it, and a document may be missed; scores are exact still.
    Positions count through the segments; ties are broken by document id (descending, as trec_eval does). Fewer than k
    eligible documents give a shorter list.
    """
    found: list[list[tuple[int, float]]] = []
    for chunk_QD in _chunks(queries_QD, k):
        scored, _ = _scored(chunk_QD, segments, k, None, approximate)
        bounds = np.searchsorted(scored.rows_C, np.arange(len(chunk_QD) + 1))
        for low, high in pairwise(bounds):
            found.append(_best_first(scored.positions_C[low:high], scored.scores_C[low:high], k, id_of))
    return found


def top_documents(queries_QD: np.ndarray, documents_ND: np.ndarray, k: int, below_Q: np.ndarray | None = None) -> Found:
    """Returns the k documents of greatest dot product for each query; with ``below_Q``, of those below the query's limit.

    Exact; of equal scores the earlier document is better. ``documents_ND`` may be a memory-mapped file of any size: it is
    read a block at a time.
    """
    k = min(k, len(documents_ND))
    documents_QK = np.full((len(queries_QD), k), -1, dtype=np.int64)
    scores_QK = np.full((len(queries_QD), k), -np.inf, dtype=np.float32)
    above_Q = np.zeros(len(queries_QD), dtype=np.int64)
    if k == 0:
        return Found(documents_QK, scores_QK, above_Q)
    segment, start = Vectors(documents_ND, np.ones(len(documents_ND), dtype=bool)), 0
    for chunk_QD in _chunks(queries_QD, k, len(queries_QD)):
        rows = slice(start, start + len(chunk_QD))
        limit_Q = None if below_Q is None else np.asarray(below_Q[rows], dtype=np.float32)
        scored, above_Q[rows] = _scored(chunk_QD, [segment], k, limit_Q, approximate=False)
        if limit_Q is not None:
            passed_C = scored.scores_C >= limit_Q[scored.rows_C]
            above_Q[rows] += np.bincount(scored.rows_C[passed_C], minlength=len(chunk_QD))
            scored = _Scored(scored.rows_C[~passed_C], scored.positions_C[~passed_C], scored.scores_C[~passed_C])
        places_C = np.arange(len(scored.rows_C)) - np.searchsorted(scored.rows_C, scored.rows_C)
        kept_C = places_C < k
        places = start + scored.rows_C[kept_C], places_C[kept_C]
        documents_QK[places], scores_QK[places] = scored.positions_C[kept_C], scored.scores_C[kept_C]
        start += len(chunk_QD)
    _release(documents_ND)
    return Found(documents_QK, scores_QK, above_Q)


def dot_products(query_D: np.ndarray, documents_ND: np.ndarray, documents_C: np.ndarray) -> np.ndarray:
    """Returns float32 (C,): products with the documents of these positions, summed in float64."""
    order_C = np.argsort(documents_C)
    scores_C = np.empty(len(documents_C), dtype=np.float32)
    rows_C = np.zeros(len(documents_C), dtype=np.int64)
    scores_C[order_C] = _products(np.asarray(query_D, dtype=np.float32)[None], documents_ND, rows_C, documents_C[order_C])
    return scores_C


def best_first(positions_C: np.ndarray, scores_C: np.ndarray, k: int, id_of: Callable[[int], str]) -> list[tuple[int, float]]:
    """Returns the k best (position, score): score descending, then document id descending."""
    if len(scores_C) > k:
        kept_C = scores_C >= np.partition(scores_C, -k)[-k]
        positions_C, scores_C = positions_C[kept_C], scores_C[kept_C]
    order_C = np.argsort(-scores_C, kind="stable")
    return _best_first(positions_C[order_C], scores_C[order_C], k, id_of)


def first_places(scores_N: np.ndarray, k: int) -> np.ndarray:
    """Returns the positions of the k greatest scores, best first, equal ones in order; only about k are sorted."""
    candidates = np.arange(len(scores_N))
    if k < len(scores_N):
        candidates = np.flatnonzero(scores_N >= np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k])
    return candidates[np.argsort(-scores_N[candidates], kind="stable")][:k]


def _best_first(positions_C: np.ndarray, scores_C: np.ndarray, k: int, id_of: Callable[[int], str]) -> list[tuple[int, float]]:
    """Returns the k first of candidates already in order of score; equal ones in order of their ids."""
    reach = k if len(scores_C) <= k else int(np.searchsorted(-scores_C, -scores_C[k - 1], side="right"))
    rows = list(zip(positions_C[:reach].tolist(), scores_C[:reach].tolist(), strict=True))
    if len(set(scores_C[:reach].tolist())) < len(rows):
        rows.sort(key=lambda row: (row[1], id_of(row[0])), reverse=True)
    return rows[:k]


def _chunks(queries_QD: np.ndarray, k: int, most: int = QUERIES) -> Iterator[np.ndarray]:
    """Yields the queries in parts whose candidates fit in memory."""
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    step = max(1, min(most, ROOM // capacity(k)))
    for start in range(0, len(queries_QD), step):
        yield queries_QD[start : start + step]


def _scored(
    queries_QD: np.ndarray, segments: Sequence[Vectors], k: int, limit_Q: np.ndarray | None, approximate: bool
) -> tuple[_Scored, np.ndarray]:
    """Returns every candidate with its exact score, and how many documents surely are not below each limit."""
    find = _by_sketches if approximate and scan_library() is not None else _candidates
    rows_C, positions_C, above_Q = find(queries_QD, segments, k, limit_Q)
    scores_C = np.empty(len(rows_C), dtype=np.float32)
    order_C = np.argsort(positions_C, kind="stable")  # the file is read forwards
    rows_C, positions_C = rows_C[order_C], positions_C[order_C]
    base = 0
    for segment in segments:
        low, high = np.searchsorted(positions_C, [base, base + len(segment.values_ND)])
        part = slice(low, high)
        scores_C[part] = _products(queries_QD, segment.values_ND, rows_C[part], positions_C[part] - base)
        base += len(segment.values_ND)
    order_C = np.lexsort((positions_C, -scores_C, rows_C))
    return _Scored(rows_C[order_C], positions_C[order_C], scores_C[order_C]), above_Q


def _products(queries_QD: np.ndarray, values_ND: np.ndarray, rows_C: np.ndarray, positions_C: np.ndarray) -> np.ndarray:
    """Returns float32 dot products of pairs, summed in float64; ``positions_C`` best ascending."""
    scores_C = np.empty(len(rows_C), dtype=np.float32)
    library = scan_library()
    if library is not None and values_ND.dtype == np.float32 and values_ND.flags.c_contiguous:
        queries_QD, rows_C, positions_C = map(np.ascontiguousarray, (queries_QD, rows_C, positions_C))
        arrays = (queries_QD.ctypes.data, values_ND.ctypes.data, values_ND.shape[1], rows_C.ctypes.data)
        library.openembed_products(*arrays, positions_C.ctypes.data, len(rows_C), scores_C.ctypes.data)
        return scores_C
    for start in range(0, len(rows_C), 4096):
        part = slice(start, start + 4096)
        scores_C[part] = (values_ND[positions_C[part]].astype(np.float64) * queries_QD[rows_C[part]]).sum(axis=1)
    return scores_C


def _candidates(
    queries_QD: np.ndarray, segments: Sequence[Vectors], k: int, limit_Q: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (rows, positions) of a superset of each query's top k, and ``above_Q``."""
    count = sum(int(np.count_nonzero(segment.eligible_N)) for segment in segments)
    if count <= max(k, DIRECT):
        positions_N = np.flatnonzero(np.concatenate([s.eligible_N for s in segments])) if segments else np.empty(0, np.int64)
        rows_C = np.repeat(np.arange(len(queries_QD)), len(positions_N))
        return rows_C, np.tile(positions_N, len(queries_QD)), np.zeros(len(queries_QD), dtype=np.int64)
    coded = all(segment.codes is not None for segment in segments) or len(queries_QD) >= WORTH_CODING
    if not coded or scan_library() is None or capacity(k) > count:
        return _by_products(queries_QD, segments, k, limit_Q)
    return _by_codes(queries_QD, segments, k, limit_Q)


def _by_sketches(
    queries_QD: np.ndarray, segments: Sequence[Vectors], k: int, limit_Q: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns likely candidates of segments that have a sketch, and exact ones of the others.

    A filter that leaves few documents is searched exactly: they need not lie in the nearest clusters.
    """
    starts = np.cumsum([0, *(len(segment.values_ND) for segment in segments)])
    rows, positions, others = [], [], []
    for number, segment in enumerate(segments):
        sketch = segment.sketch
        if sketch is None or sketch.eligible(segment.eligible_N) < LEAST_ELIGIBLE * len(segment.eligible_N):
            others.append(number)
            continue
        for row, query_D in enumerate(queries_QD):
            found = sketch.candidates(query_D, segment.eligible_N, k)
            rows.append(np.full(len(found), row))
            positions.append(found + starts[number])
    if rows and not others:
        return np.concatenate(rows), np.concatenate(positions), np.zeros(len(queries_QD), dtype=np.int64)
    rows_C, places_C, above_Q = _candidates(queries_QD, [segments[number] for number in others], k, limit_Q)
    ends = np.cumsum([len(segments[number].values_ND) for number in others])
    which = np.searchsorted(ends, places_C, side="right")
    shifts = np.array(
        [starts[number] - (end - len(segments[number].values_ND)) for number, end in zip(others, ends, strict=True)]
    )
    return np.concatenate([rows_C, *rows]), np.concatenate([places_C + shifts[which], *positions]), above_Q


def _by_codes(
    queries_QD: np.ndarray, segments: Sequence[Vectors], k: int, limit_Q: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``_candidates``, by the compiled scan; queries with too many candidates are searched by products."""
    if max((segment.norm for segment in segments), default=0.0) * np.linalg.norm(queries_QD, axis=1).max() > LARGEST:
        return _by_products(queries_QD, segments, k, limit_Q)
    scanner, base, sizes = Scanner(CodedQueries(queries_QD, limit_Q), k), 0, []
    for segment in segments:
        if segment.codes is not None:
            scanner.add(segment.codes, eligible_groups(segment.eligible_N), base)
        else:
            for first, block_BD, eligible_B in _blocks(segment, BLOCK):
                scanner.add(quantize(block_BD), eligible_groups(eligible_B), base + first)
        sizes.append(groups_of(len(segment.values_ND)) * LANES)
        base += sizes[-1]
    rows_C, places_C, overflow_Q, above_Q = scanner.result()
    padding = np.cumsum([0, *(size - len(s.values_ND) for size, s in zip(sizes, segments, strict=True))])
    positions_C = places_C - padding[np.searchsorted(np.cumsum(sizes), places_C, side="right")]
    if overflow_Q.any():
        kept_C, again = ~overflow_Q[rows_C].astype(bool), np.flatnonzero(overflow_Q)
        limit_A = None if limit_Q is None else limit_Q[again]
        rows_A, positions_A, above_Q[again] = _by_products(queries_QD[again], segments, k, limit_A)
        rows_C, positions_C = (
            np.concatenate([rows_C[kept_C], again[rows_A]]),
            np.concatenate([positions_C[kept_C], positions_A]),
        )
    return rows_C, positions_C, above_Q


def _by_products(
    queries_QD: np.ndarray, segments: Sequence[Vectors], k: int, limit_Q: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As ``_candidates``, by float32 products.

    A float32 product of width D is off by at most D·eps·|q|·|d|, so whatever scores within twice that of the k-th best so far
    stays a candidate. Memory is bounded by ``Q × BLOCK`` scores plus the candidates.
    """
    lowest, limit_Q = np.finfo(np.float32).min, np.full(len(queries_QD), np.inf) if limit_Q is None else limit_Q
    rounding_Q = queries_QD.shape[1] * np.finfo(np.float32).eps * np.linalg.norm(queries_QD, axis=1)
    slack_Q = 2 * rounding_Q * max((segment.norm for segment in segments), default=0.0)
    slack_Q += 2 * queries_QD.shape[1] * np.finfo(np.float32).tiny  # below it floats round to more than a share
    state = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)) for _ in queries_QD]
    floor_Q = np.full(len(queries_QD), lowest, dtype=np.float32)
    above_Q, base = np.zeros(len(queries_QD), dtype=np.int64), 0
    for segment in segments:
        for first, block_BD, eligible_B in _blocks(segment, max(4 * k, 1024)):
            scores_QB = queries_QD @ block_BD.T
            if not eligible_B.all():
                scores_QB[:, ~eligible_B] = -np.inf
            sure_QB = scores_QB >= (limit_Q + slack_Q)[:, None]
            above_Q += sure_QB.sum(axis=1)
            scores_QB[sure_QB] = -np.inf
            _keep(state, scores_QB, base + first, k, floor_Q, slack_Q, limit_Q)
        base += len(segment.values_ND)
    rows_C = np.repeat(np.arange(len(state)), [len(positions) for positions, _ in state])
    return rows_C, np.concatenate([positions for positions, _ in state]), above_Q


def _keep(
    state: list[tuple[np.ndarray, np.ndarray]],
    scores_QB: np.ndarray,
    first: int,
    k: int,
    floor_Q: np.ndarray,
    slack_Q: np.ndarray,
    limit_Q: np.ndarray,
) -> None:
    """Adds a block's scores that reach the floor to each query's candidates, and raises the floor."""
    rows, columns = np.nonzero(scores_QB >= floor_Q[:, None])
    bounds = np.searchsorted(rows, np.arange(len(state) + 1))
    for row in np.flatnonzero(np.diff(bounds)):
        new = columns[bounds[row] : bounds[row + 1]]
        positions = np.concatenate([state[row][0], new + first])
        scores = np.concatenate([state[row][1], scores_QB[row, new]])
        below = scores[scores < limit_Q[row] - slack_Q[row]]  # the others may be passed over: they set no floor
        if len(below) > k:
            floor_Q[row] = max(np.partition(below, -k)[-k] - slack_Q[row], np.finfo(np.float32).min)
            kept = scores >= floor_Q[row]
            positions, scores = positions[kept], scores[kept]
        state[row] = positions, scores


def _blocks(segment: Vectors, first_rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (position of the first row, vectors, eligible); a small first block sets the floor the others must pass."""
    start, rows = 0, -(-min(first_rows, BLOCK) // LANES) * LANES
    while start < len(segment.values_ND):
        stop = start + rows
        yield start, _read(segment.values_ND, start, stop), segment.eligible_N[start:stop]
        start, rows = stop, BLOCK


def _read(values_ND: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows as a plain array: read from the file, so that pages of the map do not pile up in this process."""
    stop = min(stop, len(values_ND))
    if not isinstance(values_ND, np.memmap) or values_ND.dtype != np.dtype("<f4"):
        return np.ascontiguousarray(values_ND[start:stop], dtype=np.float32)
    width = values_ND.shape[1]
    offset = values_ND.offset + 4 * width * start
    rows = np.fromfile(values_ND.filename, dtype="<f4", count=(stop - start) * width, offset=offset)
    return rows.reshape(stop - start, width)


def _release(array: np.ndarray) -> None:
    """Lets the system take back the pages of a memory-mapped array that were read."""
    mapped = getattr(array, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)
