"""Exact search over representations in memory or memory-mapped, whatever their kind: evaluation and mining search by it.

Dense: the greatest inner product (:mod:`openembed.index.dense`). Sparse: the sum over shared terms of weight times weight; a
document that shares none is no hit (:mod:`openembed.index.sparse`). Tokens: MaxSim, the sum over the query's tokens of the
greatest inner product with one of the document's, or another method; a document without tokens is no hit
(:mod:`openembed.index.tokens`). Scores are summed in float64 and rounded to float32, so that they do not depend on what is
searched beside them, and equal documents tie.

Q queries, N documents, B documents of a block, T tokens of documents, D width, V vocabulary, C candidates, K found.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from openembed.encoded import CALLED, Encoded, count_of, kind_of, take, width_of
from openembed.index import dense, sparse
from openembed.index.dense import Found, best_first, dot_products
from openembed.index.manifest import ModelInfo, SegmentInfo
from openembed.index.tokens.coding import Panel, check_vectors
from openembed.index.tokens.exact import TokenMatrix, best_documents, exact_scores
from openembed.index.tokens.files import TokenSegment, TokenSettings, TokenWriter
from openembed.index.tokens.methods import EXACT, Exact, Method, coding_for
from openembed.index.tokens.search import Tokens
from openembed.index.tokens.search import search as search_tokens
from openembed.index.tokens.xtr import retrieve
from openembed.index.tokens.xtr import scores_of as xtr_scores
from openembed.token_vectors import TokenVectors

DOCUMENTS = 16_384
"""Documents of a block whose sparse vectors are multiplied at once, with ``QUERIES``."""
QUERIES = 256

Ranking = list[tuple[int, float]]
"""(position, score), best first."""


class Documents(ABC):
    """Documents prepared to be searched; :func:`prepared` makes them. All raise ``ValueError`` for queries of another kind or
    width."""

    def __init__(self, documents: Encoded) -> None:
        self._documents, self._count = documents, count_of(documents)

    def search(self, queries: Encoded, k: int, id_of: Callable[[int], str]) -> list[Ranking]:
        """Returns for each query the k documents of greatest score, best first.

        Ties, also at the cut, are broken by document id, descending, as trec_eval does.
        """
        return self._search(self._checked(queries), k, id_of)

    def top(self, queries: Encoded, k: int, below_Q: np.ndarray | None = None) -> Found:
        """Returns the k documents of greatest score for each query; with ``below_Q``, of those below the query's limit.

        Of equal scores the earlier document is better.
        """
        limit_Q = None if below_Q is None else np.asarray(below_Q, dtype=np.float32)
        return self._top(self._checked(queries), min(k, self._count), limit_Q)

    def scores(self, query: Encoded, positions_C: np.ndarray) -> np.ndarray:
        """Returns float32 (C,): the scores of the documents at these positions, in any order, for the one text of ``query``.

        A document that is no hit scores 0 where terms are matched, and -inf where tokens are.
        """
        return self._scores(self._checked(query), positions_C)

    def _checked(self, queries: Encoded) -> Encoded:
        kinds = kind_of(queries), kind_of(self._documents)
        if kinds[0] != kinds[1]:
            raise ValueError(f"queries are {CALLED[kinds[0]]}, documents {CALLED[kinds[1]]}; encode both with one model")
        widths = width_of(queries), width_of(self._documents)
        if widths[0] != widths[1]:
            raise ValueError(f"queries have width {widths[0]}, documents {widths[1]}; encode both with one model")
        return queries

    @abstractmethod
    def _search(self, queries: Encoded, k: int, id_of: Callable[[int], str]) -> list[Ranking]: ...

    @abstractmethod
    def _top(self, queries: Encoded, k: int, limit_Q: np.ndarray | None) -> Found: ...

    @abstractmethod
    def _scores(self, query: Encoded, positions_C: np.ndarray) -> np.ndarray: ...


def prepared(documents: Encoded, method: Method = EXACT) -> Documents:
    """Returns documents that can be searched. ``method``: how token vectors are; those that need it are coded for it.

    Raises ``ValueError`` for a method where there are no token vectors, and for weights that are negative or not finite.
    """
    kind = kind_of(documents)
    if kind == "tokens":
        return _Tokens(documents, method) if coding_for(method) is None else _Coded(documents, method)
    if not isinstance(method, Exact):
        raise ValueError(f"method {method.kind} searches token vectors; these are {CALLED[kind]}; leave it out")
    return _Sparse(documents) if kind == "sparse" else _Dense(documents)


class _Dense(Documents):
    def _search(self, queries: np.ndarray, k: int, id_of: Callable[[int], str]) -> list[Ranking]:
        values_ND = np.ascontiguousarray(self._documents, dtype=np.float32)
        return dense.search(queries, [dense.Vectors(values_ND, np.ones(self._count, dtype=bool))], k, id_of)

    def _top(self, queries: np.ndarray, k: int, limit_Q: np.ndarray | None) -> Found:
        return dense.top_documents(queries, self._documents, k, limit_Q)

    def _scores(self, query: np.ndarray, positions_C: np.ndarray) -> np.ndarray:
        return dot_products(query[0], self._documents, positions_C)


class _Sparse(Documents):
    """Searched by inverted lists in a temporary folder, and where there are limits by products of matrices: the same sums."""

    def __init__(self, documents: csr_matrix) -> None:
        super().__init__(sparse.in_rows(documents))
        self._folder = tempfile.TemporaryDirectory(prefix="openembed-lists-")
        folder = Path(self._folder.name)
        model = ModelInfo(name="", fingerprint="", width=documents.shape[1], kind="sparse")
        writer, names = sparse.SparseWriter(folder, model), [str(number) for number in range(self._count)]
        for first in range(0, self._count, DOCUMENTS):
            part = slice(first, first + DOCUMENTS)
            writer.add(names[part], self._documents[part])
        field = sparse.SparseField(folder, SegmentInfo(name="", count=self._count, **writer.close()), model)
        self._lists = sparse.SparseVectors(field, np.ones(self._count, dtype=bool))
        self._find = sparse.Searches([self._lists])

    def _checked(self, queries: Encoded) -> csr_matrix:
        return sparse.checked(super()._checked(queries), width_of(self._documents), lambda row: f"query {row}")

    def _search(self, queries: csr_matrix, k: int, id_of: Callable[[int], str]) -> list[Ranking]:
        return self._find(queries, k, id_of)

    def _top(self, queries: csr_matrix, k: int, limit_Q: np.ndarray | None) -> Found:
        best = _Best(queries.shape[0], k, limit_Q)
        for first in range(0, self._count, DOCUMENTS):
            block_VB = _wide(self._documents[first : first + DOCUMENTS]).T.tocsr()
            for start in range(0, queries.shape[0], QUERIES):
                products_QB = _wide(queries[start : start + QUERIES]) @ block_VB
                products_QB.sort_indices()
                for row in range(products_QB.shape[0]):
                    part = slice(products_QB.indptr[row], products_QB.indptr[row + 1])
                    scores = products_QB.data[part].astype(np.float32)
                    hits = scores > 0
                    best.add(start + row, products_QB.indices[part][hits].astype(np.int64) + first, scores[hits])
        return best.found()

    def _scores(self, query: csr_matrix, positions_C: np.ndarray) -> np.ndarray:
        return sparse.row_scores(self._lists.field.rows(positions_C), query.indices, query.data)


def _wide(values_NV: csr_matrix) -> csr_matrix:
    """In float64, each term once and in order, so that sums do not depend on how a matrix was made."""
    values_NV = values_NV.astype(np.float64)
    values_NV.sum_duplicates()
    return values_NV


class _Tokens(Documents):
    def __init__(self, documents: TokenVectors, method: Method) -> None:
        super().__init__(documents)
        check_vectors(documents, documents.width, "document {}".format)
        self._matrix, self._method = TokenMatrix.of(documents), method
        self._filled = np.flatnonzero(documents.lengths_N)

    def _checked(self, queries: Encoded) -> TokenVectors:
        check_vectors(super()._checked(queries), width_of(self._documents), "query {}".format)
        return queries

    def _search(self, queries: TokenVectors, k: int, id_of: Callable[[int], str]) -> list[Ranking]:
        return [best_first(positions, scores, k, id_of) for positions, scores in self._candidates(queries, k)]

    def _candidates(self, queries: TokenVectors, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for each query (positions, scores) of a superset of the k best; nothing for one without tokens."""
        every, asked = np.ones(self._count, dtype=bool), np.flatnonzero(queries.lengths_N)
        found = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))] * len(queries)
        if isinstance(self._method, Exact):
            answers = best_documents([self._matrix], [every], queries.select(asked), k)
        else:
            answers = [self._retrieved(query, every) for query in _each(queries.select(asked))]
        for row, answer in zip(asked, answers, strict=True):
            found[row] = answer
        return found

    def _retrieved(self, query: TokenVectors, every: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        panel = Panel(query)
        found = retrieve(self._matrix, every, panel, self._method.tokens)
        return xtr_scores(found, panel.lanes, self._count, self._method.imputation)

    def _top(self, queries: TokenVectors, k: int, limit_Q: np.ndarray | None) -> Found:
        best = _Best(len(queries), k, limit_Q)
        if limit_Q is None or not isinstance(self._method, Exact):
            for row, found in enumerate(self._candidates(queries, k)):
                best.add(row, *found)
            return best.found()
        for row, query in enumerate(_each(queries)):
            if not len(query.values_TD):
                continue
            scores, slack = (part[0] for part in self._matrix.bounded(Panel(query), self._filled))
            above_N, below_N = scores - slack >= limit_Q[row], scores + slack < limit_Q[row]
            lower = np.where(below_N, scores - slack, -np.inf)
            floor = np.partition(lower, -k)[-k] if len(lower) > k else -np.inf
            chosen = self._filled[~above_N & (scores + slack >= floor)]
            best.above_Q[row] += above_N.sum()
            best.add(row, chosen, exact_scores([self._matrix], Panel(query), chosen))
        return best.found()

    def _scores(self, query: TokenVectors, positions_C: np.ndarray) -> np.ndarray:
        if not len(query.values_TD):
            return np.full(len(positions_C), -np.inf, dtype=np.float32)
        return exact_scores([self._matrix], Panel(query), np.asarray(positions_C, dtype=np.int64))


class _Coded(_Tokens):
    """Searched as a store's segment in a temporary folder, coded for the method however few its tokens."""

    def __init__(self, documents: TokenVectors, method: Method) -> None:
        super().__init__(documents, method)
        self._folder = tempfile.TemporaryDirectory(prefix="openembed-tokens-")
        settings = TokenSettings(precision="float32", **dict(coding_for(method)))
        writer = TokenWriter(self._folder.name, documents.width, settings)
        writer.add(documents)
        writer.close()
        self._part = Tokens(TokenSegment(self._folder.name), np.ones(self._count, dtype=bool))

    def _search(self, queries: TokenVectors, k: int, id_of: Callable[[int], str]) -> list[Ranking]:
        return search_tokens(queries, [self._part], k, id_of, self._method)

    def _candidates(self, queries: TokenVectors, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        rankings = self._search(queries, max(k, 1), lambda position: f"{self._count - position:012}")
        pairs = [zip(*ranking, strict=True) if ranking else ((), ()) for ranking in rankings]
        return [(np.array(places, dtype=np.int64), np.array(scores, dtype=np.float32)) for places, scores in pairs]


def _each(queries: TokenVectors) -> list[TokenVectors]:
    return [take(queries, [row]) for row in range(len(queries))]


class _Best:
    """What may still be among the k best of each query; of those at or above a query's limit only the number is kept."""

    def __init__(self, count: int, k: int, limit_Q: np.ndarray | None) -> None:
        self.above_Q = np.zeros(count, dtype=np.int64)
        self._rows = [(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))] * count
        self._k, self._limit_Q, self._floor_Q = k, limit_Q, np.full(count, -np.inf, dtype=np.float32)

    def add(self, row: int, positions: np.ndarray, scores: np.ndarray) -> None:
        kept = scores >= self._floor_Q[row]
        if self._limit_Q is not None:
            passed = scores >= self._limit_Q[row]
            self.above_Q[row] += passed.sum()
            kept &= ~passed
        positions = np.concatenate([self._rows[row][0], positions[kept]])
        scores = np.concatenate([self._rows[row][1], scores[kept]])
        if 0 < self._k < len(scores):
            self._floor_Q[row] = np.partition(scores, -self._k)[-self._k]
            kept = scores >= self._floor_Q[row]
            positions, scores = positions[kept], scores[kept]
        self._rows[row] = positions, scores

    def found(self) -> Found:
        """Returns the k best, equal ones in the order of their positions."""
        shape = len(self._rows), self._k
        found = Found(np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32), self.above_Q)
        for row, (positions, scores) in enumerate(self._rows):
            order = np.lexsort((positions, -scores))[: self._k]
            found.documents_QK[row, : len(order)], found.scores_QK[row, : len(order)] = positions[order], scores[order]
        return found
