"""Search and reranking over segments of token vectors.

``rerank`` is the first of the two: whatever finds candidates (BM25, dense, sparse), it gives them their exact MaxSim.
``search`` looks for itself: exactly, or by a method that passes documents over. Scores are always on the scale of MaxSim, a sum
over the query's tokens. Positions count through the segments, as in ``index.dense``, and ties go to the greater id.

Segments too small to have residuals are searched exactly beside those that have some; a method that no segment can serve is
refused. A segment that holds residuals alone is exact only for its vectors as reconstructed.

Where some segments of a search are scored by their residuals and others exactly, the two are on different scales: then the best
of the former are scored exactly too, whether or not the method asks for it, so that all scores given are on one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openembed.index import dense
from openembed.index.tokens.coding import Panel, check_vectors
from openembed.index.tokens.exact import best_documents, exact_scores
from openembed.index.tokens.files import TokenSegment
from openembed.index.tokens.methods import EXACT, Exact, Method, Muvera, Plaid, Warp, Xtr, check_served
from openembed.index.tokens.xtr import Retrieved, joined, retrieve, retrieve_coded, scores_of
from openembed.token_vectors import TokenVectors

Ranking = list[tuple[int, float]]
"""(position, score), best first."""
Found = tuple[np.ndarray, np.ndarray]
"""Positions and scores of some documents, in any order."""

RESCORED = 64
"""Documents found by residuals that are scored exactly beside segments searched exactly, where the method names no number."""


@dataclass(frozen=True)
class Tokens:
    """A segment, and which of its documents may be found."""

    segment: TokenSegment
    eligible_N: np.ndarray


def search(
    queries: TokenVectors, parts: Sequence[Tokens], k: int, id_of: Callable[[int], str], method: Method = EXACT
) -> list[Ranking]:
    """Returns for each query the k eligible documents of greatest score, best first.

    Documents without tokens are never found, and a query without tokens finds nothing. Raises ``ValueError`` for k below 1,
    queries of another width, values that are not finite, and a method that the segments cannot serve.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    _check(queries, parts)
    check_served(method, [part.segment for part in parts])
    full = np.flatnonzero(queries.lengths_N)
    chosen = TokenVectors.from_list([np.asarray(queries[int(n)], dtype=np.float32) for n in full], queries.width)
    if isinstance(method, Exact):
        found = _exact(chosen, parts, k)
    else:
        find = {Plaid: _plaid, Warp: _warp, Xtr: _xtr, Muvera: _muvera}[type(method)]
        found = [find(chosen.select([n]), parts, k, method) for n in range(len(chosen))]
    rankings: list[Ranking] = [[] for _ in range(len(queries))]
    for number, (positions, scores) in zip(full, found, strict=True):
        rankings[number] = dense.best_first(positions, scores, k, id_of)
    return rankings


def rerank(
    queries: TokenVectors,
    parts: Sequence[Tokens],
    candidates: Sequence[Sequence[int] | np.ndarray],
    id_of: Callable[[int], str],
) -> list[Ranking]:
    """Returns each query's candidates (positions) in order of their exact MaxSim, best first, eligible or not.

    A candidate without tokens comes last, with -inf; a query without tokens scores 0 with any other. Raises ``ValueError`` for
    another number of queries than of candidate lists, a position twice or that there is none of, and what ``search`` refuses.
    """
    _check(queries, parts)
    count = sum(len(part.segment) for part in parts)
    if len(candidates) != len(queries):
        raise ValueError(f"{len(queries)} queries, but candidates of {len(candidates)}")
    rankings = []
    for query_LD, positions in zip(queries, candidates, strict=True):
        positions = np.asarray(positions)
        if len(positions) and positions.dtype.kind not in "iu":
            raise ValueError(
                f"candidates are positions, integers from 0 to {count - 1}; got {positions.tolist()[0]!r} "
                "(Store.rerank takes ids of documents)"
            )
        positions = positions.astype(np.int64)
        if len(positions) and not (positions.min() >= 0 and positions.max() < count):
            raise ValueError(
                f"candidates from {positions.min()} to {positions.max()}; this index has positions 0 to {count - 1}"
            )
        if len(np.unique(positions)) < len(positions):
            raise ValueError("a candidate is given twice")
        query = TokenVectors.from_list([np.asarray(query_LD, dtype=np.float32)], queries.width)
        rankings.append(dense.best_first(positions, _scores(query, parts, positions), len(positions), id_of))
    return rankings


def explain(query_LD: np.ndarray, parts: Sequence[Tokens], position: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each query token which token of the document it meets (int64) and their product (float32).

    The products sum to the score of ``rerank``. Raises ``ValueError`` for a position that there is none of, a document without
    tokens, and what ``search`` refuses.
    """
    query = TokenVectors.from_list([np.asarray(query_LD, dtype=np.float32)])
    _check(query, parts)
    starts = _starts(parts)
    if not 0 <= position < starts[-1]:
        raise ValueError(f"position {position}; this index has positions 0 to {starts[-1] - 1}")
    number = int(np.searchsorted(starts, position, side="right")) - 1
    document_TD = parts[number].segment.vectors(np.array([position - starts[number]]))[0]
    if not len(document_TD):
        raise ValueError(f"document {position} has no tokens")
    products_LT = query.values_TD.astype(np.float64) @ document_TD.astype(np.float64).T
    return products_LT.argmax(axis=1), products_LT.max(axis=1).astype(np.float32)


def _check(queries: TokenVectors, parts: Sequence[Tokens]) -> None:
    for width in {part.segment.info.width for part in parts}:
        check_vectors(queries, width, "query {}".format)


def _starts(parts: Sequence[Tokens]) -> np.ndarray:
    return np.cumsum([0, *(len(part.segment) for part in parts)])


def _joined(found: list[Found]) -> Found:
    positions, scores = zip(*found, strict=True) if found else ((), ())
    return np.concatenate([np.empty(0, np.int64), *positions]), np.concatenate([np.empty(0, np.float32), *scores])


def _scores(query: TokenVectors, parts: Sequence[Tokens], positions: np.ndarray) -> np.ndarray:
    """Returns float32: the exact scores of documents, of those with residuals alone as reconstructed."""
    scores, panel = np.empty(len(positions), dtype=np.float32), Panel(query)
    for part, start in zip(parts, _starts(parts), strict=False):
        inside = np.flatnonzero((positions >= start) & (positions < start + len(part.segment)))
        if not len(inside):
            continue
        matrix, documents = part.segment.matrix, positions[inside] - start
        if matrix is not None:
            scores[inside] = exact_scores([matrix], panel, documents)
        else:
            scores[inside] = part.segment.residuals.maxsim(query.values_TD, documents)
        scores[inside[np.diff(part.segment.offsets_N1)[documents] == 0]] = -np.inf  # of a query without tokens too
    return scores


def _exact(queries: TokenVectors, parts: Sequence[Tokens], k: int) -> list[Found]:
    """Returns for each query a superset of the k best of all parts."""
    starts = _starts(parts)
    whole = [number for number, part in enumerate(parts) if part.segment.matrix is not None]
    matrices, masks = [parts[n].segment.matrix for n in whole], [parts[n].eligible_N for n in whole]
    ends = np.cumsum([len(matrix) for matrix in matrices])
    shifts = np.array([starts[n] - (end - len(parts[n].segment)) for n, end in zip(whole, ends, strict=True)], dtype=np.int64)
    found = []
    for query, (places, scores) in zip(queries, best_documents(matrices, masks, queries, k), strict=True):
        lists = [(places + shifts[np.searchsorted(ends, places, side="right")] if len(whole) else places, scores)]
        for number, part in enumerate(parts):
            if part.segment.matrix is None:
                documents = np.flatnonzero(part.eligible_N & (np.diff(part.segment.offsets_N1) > 0))
                lists.append((documents + starts[number], part.segment.residuals.maxsim(query, documents)))
        found.append(_joined(lists))
    return found


def _by_parts(
    query: TokenVectors, parts: Sequence[Tokens], k: int, find: Callable[[Tokens], Found | None], rescored: int | None
) -> Found:
    """Returns what ``find`` gives of each part, its best ``rescored`` with exact scores (None: all; 0: none), and of parts for
    which it gives None the exact best. Where there are both, scores that ``find`` gives are not kept.
    """
    results = {number: find(part) for number, part in enumerate(parts) if part.eligible_N.any()}
    others = [number for number, result in results.items() if result is None]
    if rescored is not None and 0 < len(others) < len(results):
        rescored = max(rescored or RESCORED, k)
    found, starts = [_exact_of(query, parts, others, k)], _starts(parts)
    for number, result in results.items():
        if result is None:
            continue
        documents, scores = result
        if rescored is not None and 0 < rescored < len(documents):
            documents = documents[np.argpartition(-scores, rescored - 1)[:rescored]]
        if rescored != 0:
            documents = np.sort(documents)
            scores = _scores(query, [parts[number]], documents)
        found.append((documents + starts[number], scores))
    return _joined(found)


def _exact_of(query: TokenVectors, parts: Sequence[Tokens], numbers: Sequence[int], k: int) -> Found:
    """Returns a superset of the k best documents of the parts ``numbers``."""
    if not numbers:
        return _joined([])
    starts = _starts(parts)
    places, scores = _exact(query, [parts[number] for number in numbers], k)[0]
    ends = np.cumsum([len(parts[number].segment) for number in numbers])
    which = np.searchsorted(ends, places, side="right")
    shifts = np.array([starts[n] - (end - len(parts[n].segment)) for n, end in zip(numbers, ends, strict=True)])
    return places + shifts[which], scores


def _plaid(query: TokenVectors, parts: Sequence[Tokens], k: int, method: Plaid) -> Found:
    def find(part: Tokens) -> Found | None:
        residuals = part.segment.residuals
        if residuals is None or (method.probes is not None and _few(part)):
            return None
        chosen = method.candidates(residuals, query.values_TD, part.eligible_N, k)
        return chosen, np.empty(len(chosen), dtype=np.float32)

    return _by_parts(query, parts, k, find, None)


def _few(part: Tokens) -> bool:
    """True where so few documents are eligible that they need not have a token in the nearest centroids."""
    return np.count_nonzero(part.eligible_N) < dense.LEAST_ELIGIBLE * len(part.eligible_N)


def _warp(query: TokenVectors, parts: Sequence[Tokens], k: int, method: Warp) -> Found:
    def find(part: Tokens) -> Found | None:
        residuals = part.segment.residuals
        return None if residuals is None or _few(part) else method.scores(residuals, query.values_TD, part.eligible_N)

    return _by_parts(query, parts, k, find, method.rescored and max(method.rescored, k))


def _muvera(query: TokenVectors, parts: Sequence[Tokens], k: int, method: Muvera) -> Found:
    def find(part: Tokens) -> Found | None:
        segment = part.segment
        if segment.encodings is None:  # no tokens either, or it would have been refused
            return None
        full_N = part.eligible_N & (np.diff(segment.offsets_N1) > 0)
        documents = segment.encodings.candidates(query, full_N, max(method.candidates, k))
        return documents, np.empty(len(documents), dtype=np.float32)

    return _by_parts(query, parts, k, find, None)


def _xtr(query: TokenVectors, parts: Sequence[Tokens], k: int, method: Xtr) -> Found:
    """The tokens of all parts compete with each other; of parts with residuals and others, those of the former alone."""
    panel, starts, retrieved = Panel(query), _starts(parts), []
    eligible = [number for number, part in enumerate(parts) if part.eligible_N.any()]
    plain = [number for number in eligible if parts[number].segment.residuals is None]
    mixed = 0 < len(plain) < len(eligible)
    for number in eligible:
        part = parts[number]
        if part.segment.residuals is not None:
            found = retrieve_coded(part.segment.residuals, part.eligible_N, query.values_TD, method.tokens)
        elif mixed:
            continue
        else:
            found = retrieve(part.segment.matrix, part.eligible_N, panel, method.tokens)
        retrieved.append(Retrieved(found.lanes, found.documents + starts[number], found.products))
    positions, scores = scores_of(joined(retrieved, method.tokens), panel.lanes, int(starts[-1]), method.imputation)
    rescored = max(method.rescored or RESCORED, k) if mixed else method.rescored and max(method.rescored, k)
    if rescored and len(positions):
        positions = np.sort(positions[np.argsort(-scores, kind="stable")[:rescored]])
        scores = _scores(query, parts, positions)
    return _joined([(positions, scores), _exact_of(query, parts, plain, k)]) if mixed else (positions, scores)
