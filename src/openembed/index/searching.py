"""Searching a store: by dense vectors, by sparse ones, by vectors of tokens, by words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from openembed.encoded import kind_of
from openembed.index import sparse
from openembed.index.dense import Vectors, best_first
from openembed.index.dense import search as search_vectors
from openembed.index.fields import DenseField
from openembed.index.filters import Filter, parse_filter
from openembed.index.lexical import Analyzer, Bm25
from openembed.index.manifest import Kind, ModelInfo
from openembed.index.segments import Segment
from openembed.index.sparse import SparseField, SparseVectors
from openembed.index.tokens import search as token_search
from openembed.index.tokens.field import TokenField
from openembed.index.tokens.methods import EXACT, Method, check_served
from openembed.token_vectors import TokenVectors

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Hits = dict[str, float]
"""Document id → score, best first."""
Condition = Mapping[str, Any] | Filter | None
"""What a search may find: as ``filters.parse_filter`` takes it; None: everything."""
EXACT_FROM = 16
QUERIES = {
    "dense": "dense vectors (an array)",
    "sparse": "sparse weights (a scipy sparse matrix)",
    "tokens": "token vectors (TokenVectors)",
}
"""What each search takes."""


class TermScore(NamedTuple):
    """What one term adds to a document's score: ``query`` times ``document`` weight. ``term``: its number in the model's
    vocabulary; None for a word of BM25."""

    term: int | None
    token: str
    query: float
    document: float
    score: float


class TokenScore(NamedTuple):
    """What one token vector of a query adds to a document's MaxSim: its product with the nearest one of the document's.

    ``query`` and ``document``: which of their token vectors these are, from 0. ``tokens``: how many the document has.
    """

    query: int
    document: int
    tokens: int
    score: float


class Searches:
    """The searches of a ``Store``, over the segments that it has open."""

    directory: Path
    _segments: list[Segment]
    _starts: list[int]
    _analyzer: Analyzer
    _bm25: Bm25 | None
    _sparse: dict[int, sparse.Search]
    _model_of: Callable[[Kind], ModelInfo]
    _find: Callable[[str], tuple[int, int] | None]

    def dense(self, queries_QD: np.ndarray, k: int = 10, *, filter: Condition = None, exact: bool | None = None) -> list[Hits]:
        """Returns for each query vector the k documents of greatest dot product, best first.

        With ``filter``, of the documents for which it holds. ``exact``: True looks at every document; False lets segments of
        ``fields.SKETCHED`` documents and more be searched approximately (about 99 of the 100 true ones are found); None does
        so for fewer than ``EXACT_FROM`` queries, since exact search of more at once is fast too. The scores are exact always.

        Raises ``ValueError`` when the store has no vectors, the width
        differs, or the filter is malformed.
        """
        model = self._model_of("dense")
        check_k(k)
        require_searched(queries_QD, "dense")
        queries_QD = np.asarray(queries_QD)
        if queries_QD.ndim != 2 or queries_QD.shape[1] != model.width:
            raise ValueError(f"queries of shape {queries_QD.shape}; this index needs (count, {model.width}) ({model.name})")
        if not np.isfinite(queries_QD).all():
            raise ValueError("a query vector holds NaN or infinity")
        masks = self._eligible(filter)
        fields: list[DenseField] = [segment.fields["dense"] for segment in self._segments]
        segments = [
            Vectors(field.vectors_ND, mask_N, field.codes, field.largest_norm, field.sketch)
            for field, mask_N in zip(fields, masks, strict=True)
        ]
        approximate = len(queries_QD) < EXACT_FROM if exact is None else not exact
        found = search_vectors(queries_QD, segments, k, self._id_at, approximate=approximate)
        return [self._named(ranking) for ranking in found]

    def sparse(self, queries_QV: csr_matrix, k: int = 10, *, filter: Condition = None) -> list[Hits]:
        """Returns for each sparse query vector the k documents of greatest score, best first; no term in common, no hit.

        Exact: scores are sums of query weight times document weight over the terms, in float64, rounded to float32. With
        ``filter``, of the documents for which it holds. Raises ``ValueError`` when the store has no sparse vectors, the
        vocabulary differs, a weight is negative or not finite, or the filter is malformed.
        """
        model = self._model_of("sparse")
        check_k(k)
        require_searched(queries_QV, "sparse")
        queries = sparse.checked(queries_QV, model.width, lambda row: f"query {row}")
        search = self._sparse.get(k) if filter is None else None
        if search is None:
            fields: list[SparseField] = [segment.fields["sparse"] for segment in self._segments]
            segments = [SparseVectors(field, mask_N) for field, mask_N in zip(fields, self._eligible(filter), strict=True)]
            search = sparse.Search(segments, k)
            if filter is None:
                self._sparse = {k: search}
        return [self._named(ranking) for ranking in search(queries, self._id_at)]

    @overload
    def explain(self, query: TokenVectors, identifiers: Sequence[str]) -> dict[str, list[TokenScore]]: ...

    @overload
    def explain(
        self, query: csr_matrix | str, identifiers: Sequence[str], token: Callable[[int], str] = str
    ) -> dict[str, list[TermScore]]: ...

    def explain(
        self, query: csr_matrix | TokenVectors | str, identifiers: Sequence[str], token: Callable[[int], str] = str
    ) -> dict[str, list[TermScore]] | dict[str, list[TokenScore]]:
        """Returns for each document what makes its score, what adds most first.

        A text explains the score of ``bm25``, a sparse vector (1, V) that of ``sparse``, by terms; token vectors of one query
        that of ``tokens``, by what each of them meets. The parts sum to it, up to rounding. ``token`` names a term of the
        vocabulary, as the model's tokenizer does. Raises ``ValueError`` for an id that is not there, and what the searches
        raise.
        """
        refuse_string(identifiers, "identifiers")
        places = [self._place(identifier) for identifier in identifiers]
        if isinstance(query, TokenVectors):
            found = self._met_tokens(query, places)
        else:
            found = self._shared_words(query, places) if isinstance(query, str) else self._shared_terms(query, places, token)
        parts = [sorted(shared, key=lambda part: -part.score) for shared in found]
        return dict(zip(identifiers, parts, strict=True))

    def _shared_terms(
        self, query_1V: csr_matrix, places: Sequence[tuple[int, int]], token: Callable[[int], str]
    ) -> Iterator[list[TermScore]]:
        model = self._model_of("sparse")
        require_searched(query_1V, "sparse")
        query = sparse.checked(query_1V, model.width, lambda row: f"query {row}")
        if query.shape[0] != 1:
            raise ValueError(f"got {query.shape[0]} query vectors; explain takes one")
        asked = dict(zip(query.indices.tolist(), query.data.tolist(), strict=True))
        for number, position in places:
            row = self._segments[number].fields["sparse"].rows(np.array([position]))
            shared = [(t, asked[t], w) for t, w in zip(row.indices.tolist(), row.data.tolist(), strict=True) if t in asked]
            yield [TermScore(term, token(term), ours, theirs, ours * theirs) for term, ours, theirs in shared]

    def _met_tokens(self, query: TokenVectors, places: Sequence[tuple[int, int]]) -> Iterator[list[TokenScore]]:
        parts = self._token_parts(None)
        if len(query) != 1:
            raise ValueError(f"got token vectors of {len(query)} queries; explain takes those of one")
        for number, position in places:
            count = int(np.diff(parts[number].segment.offsets_N1[position : position + 2])[0])
            if not count:
                yield []
                continue
            met, products = token_search.explain(query[0], [parts[number]], position)
            pairs = zip(met.tolist(), products.tolist(), strict=True)
            yield [TokenScore(ours, theirs, count, score) for ours, (theirs, score) in enumerate(pairs)]

    def _shared_words(self, query: str, places: Sequence[tuple[int, int]]) -> Iterator[list[TermScore]]:
        for shared in self._words().explain(self._analyzer.terms(query), places):
            yield [TermScore(None, term, ours, theirs, ours * theirs) for term, ours, theirs in shared]

    def tokens(
        self,
        queries: TokenVectors,
        k: int = 10,
        *,
        filter: Condition = None,
        method: Method = EXACT,
    ) -> list[Hits]:
        """Returns for each query's token vectors the k documents of greatest MaxSim, best first.

        Exact; by a ``method`` (``Plaid()``, ``Warp()``, ``Xtr()``, ``Muvera()``) approximately. With ``filter``, of the
        documents for which it holds. Raises ``ValueError`` when the store has no token vectors or not what the method searches,
        the width differs, a value is not finite, or the filter is malformed.
        """
        check_k(k)
        found = token_search.search(queries, self._token_parts(filter), k, self._id_at, method)
        return [self._named(ranking) for ranking in found]

    def check_method(self, method: Method) -> None:
        """Raises the ``ValueError`` that ``tokens`` raises for a method that the store cannot serve."""
        check_served(method, [part.segment for part in self._token_parts(None)])

    def rerank(self, queries: TokenVectors, candidates: Sequence[Sequence[str]]) -> list[Hits]:
        """Returns each query's candidates, whatever found them, in order of their exact MaxSim, best first.

        ``candidates``: ids of documents, for each query. One without token vectors comes last. Raises ``ValueError`` for an id
        that is not there, and what ``tokens`` raises.
        """
        parts, places = self._token_parts(None), []
        for identifiers in candidates:
            refuse_string(identifiers, "each query's candidates")
            places.append([self._position(identifier) for identifier in identifiers])
        return [self._named(ranking) for ranking in token_search.rerank(queries, parts, places, self._id_at)]

    def _token_parts(self, condition: Condition) -> list[token_search.Tokens]:
        """Returns the token vectors of each segment, and which documents may be found."""
        self._model_of("tokens")
        fields: list[TokenField] = [segment.fields["tokens"] for segment in self._segments]
        return [token_search.Tokens(f.segment, mask) for f, mask in zip(fields, self._eligible(condition), strict=True)]

    def _place(self, identifier: str) -> tuple[int, int]:
        place = self._find(identifier)
        if place is None:
            raise ValueError(f"{self.directory}: no document with id {identifier!r}")
        return place

    def _position(self, identifier: str) -> int:
        number, position = self._place(identifier)
        return self._starts[number] + position

    def bm25(self, texts: Sequence[str], k: int = 10, *, filter: Condition = None) -> list[Hits]:
        """Returns for each query text the k documents of greatest BM25 score, best first; no term in common, no hit.

        With ``filter``, of the documents for which it holds; scores do not depend on it.
        """
        check_k(k)
        refuse_string(texts, "texts")
        masks, words = self._eligible(filter), self._words()
        found = [words.search(self._analyzer.terms(text), k, masks) for text in texts]
        return [self._named(best_first(positions, scores, k, self._id_at)) for positions, scores in found]

    def _words(self) -> Bm25:
        if self._bm25 is None:
            self._bm25 = Bm25([s.postings for s in self._segments], [s.live_N for s in self._segments])
        return self._bm25

    def _eligible(self, condition: Condition) -> list[np.ndarray]:
        """Returns for each segment which documents may be found."""
        if condition is None:
            return [segment.live_N for segment in self._segments]
        parsed = parse_filter(condition) if isinstance(condition, Mapping) else condition
        return [segment.live_N & segment.matching(parsed) for segment in self._segments]

    def _id_at(self, position: int) -> str:
        number = bisect_right(self._starts, position) - 1
        return self._segments[number].ids[position - self._starts[number]]

    def _named(self, ranking: list[tuple[int, float]]) -> Hits:
        return {self._id_at(position): score for position, score in ranking}


def require_searched(queries: Any, kind: Kind) -> None:
    """Raises ``ValueError`` for queries of another kind than the one that is searched, saying which search takes them."""
    given = kind_of(queries)
    if given != kind:
        raise ValueError(f"got {QUERIES[given]}, which Store.{given} takes; Store.{kind} takes {QUERIES[kind]}")


def refuse_string(given: object, what: str) -> None:
    """Raises ``TypeError`` for a bare string, whose characters would be taken for a list of strings."""
    if isinstance(given, str):
        raise TypeError(f"{what} must be a list of strings; got one string. Write [{given[:40]!r}] for a single one.")


def check_k(k: int) -> None:
    """Raises ``ValueError`` for less than 1."""
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
