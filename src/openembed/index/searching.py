"""Searching a store: by dense vectors, by sparse ones, by vectors of tokens, by words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from openembed.encoded import kind_of
from openembed.index import sparse
from openembed.index.dense import Vectors, best_first
from openembed.index.dense import search as search_vectors
from openembed.index.fields import DenseField
from openembed.index.manifest import Kind
from openembed.index.state import Condition, State
from openembed.index.tokens import search as token_search
from openembed.index.tokens.field import TokenField
from openembed.index.tokens.methods import EXACT, Method, check_served
from openembed.token_vectors import TokenVectors

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Hits = dict[str, float]
"""Document id → score, best first."""
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
    """The searches of a ``Store``, each over the state that it has when the search begins. Threads may share it."""

    _state: State

    def dense(self, queries_QD: np.ndarray, k: int = 10, *, filter: Condition = None, exact: bool | None = None) -> list[Hits]:
        """Returns for each query vector the k documents of greatest dot product, best first.

        With ``filter``, of the documents for which it holds. ``exact``: True looks at every document; False lets segments of
        ``fields.SKETCHED`` documents and more be searched approximately (about 99 of the 100 true ones are found); None does
        so for fewer than ``EXACT_FROM`` queries, since exact search of more at once is fast too. The scores are exact always.

        Raises ``ValueError`` when the store has no vectors, the width
        differs, or the filter is malformed.
        """
        state = self._state
        model = state.model_of("dense")
        check_k(k)
        require_searched(queries_QD, "dense")
        queries_QD = np.asarray(queries_QD)
        if queries_QD.ndim != 2 or queries_QD.shape[1] != model.width:
            raise ValueError(f"queries of shape {queries_QD.shape}; this index needs (count, {model.width}) ({model.name})")
        if not np.isfinite(queries_QD).all():
            raise ValueError("a query vector holds NaN or infinity")
        masks = state.eligible(filter)
        fields: list[DenseField] = [segment.fields["dense"] for segment in state.segments]
        segments = [
            Vectors(field.vectors_ND, mask_N, field.codes, field.largest_norm, field.sketch)
            for field, mask_N in zip(fields, masks, strict=True)
        ]
        approximate = len(queries_QD) < EXACT_FROM if exact is None else not exact
        found = search_vectors(queries_QD, segments, k, state.id_at, approximate=approximate)
        return [state.named(ranking) for ranking in found]

    def sparse(self, queries_QV: csr_matrix, k: int = 10, *, filter: Condition = None) -> list[Hits]:
        """Returns for each sparse query vector the k documents of greatest score, best first; no term in common, no hit.

        Exact: scores are sums of query weight times document weight over the terms, in float64, rounded to float32. With
        ``filter``, of the documents for which it holds. Raises ``ValueError`` when the store has no sparse vectors, the
        vocabulary differs, a weight is negative or not finite, or the filter is malformed.
        """
        state = self._state
        model = state.model_of("sparse")
        check_k(k)
        require_searched(queries_QV, "sparse")
        queries = sparse.checked(queries_QV, model.width, lambda row: f"query {row}")
        search = state.terms if filter is None else state.terms_among(filter)
        return [state.named(ranking) for ranking in search(queries, k, state.id_at)]

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
        state = self._state
        places = [state.place(identifier) for identifier in identifiers]
        if isinstance(query, TokenVectors):
            found = _met_tokens(state, query, places)
        elif isinstance(query, str):
            found = _shared_words(state, query, places)
        else:
            found = _shared_terms(state, query, places, token)
        parts = [sorted(shared, key=lambda part: -part.score) for shared in found]
        return dict(zip(identifiers, parts, strict=True))

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
        state = self._state
        found = token_search.search(queries, _token_parts(state, filter), k, state.id_at, method)
        return [state.named(ranking) for ranking in found]

    def check_method(self, method: Method) -> None:
        """Raises the ``ValueError`` that ``tokens`` raises for a method that the store cannot serve."""
        check_served(method, [part.segment for part in _token_parts(self._state, None)])

    def rerank(self, queries: TokenVectors, candidates: Sequence[Sequence[str]]) -> list[Hits]:
        """Returns each query's candidates, whatever found them, in order of their exact MaxSim, best first.

        ``candidates``: ids of documents, for each query. One without token vectors comes last. Raises ``ValueError`` for an id
        that is not there, and what ``tokens`` raises.
        """
        state, places = self._state, []
        parts = _token_parts(state, None)
        for identifiers in candidates:
            refuse_string(identifiers, "each query's candidates")
            places.append([state.position(identifier) for identifier in identifiers])
        return [state.named(ranking) for ranking in token_search.rerank(queries, parts, places, state.id_at)]

    def bm25(self, texts: Sequence[str], k: int = 10, *, filter: Condition = None) -> list[Hits]:
        """Returns for each query text the k documents of greatest BM25 score, best first; no term in common, no hit.

        With ``filter``, of the documents for which it holds; scores do not depend on it.
        """
        check_k(k)
        refuse_string(texts, "texts")
        state = self._state
        masks, words = state.eligible(filter), state.words
        found = [words.search(state.analyzer.terms(text), k, masks) for text in texts]
        return [state.named(best_first(positions, scores, k, state.id_at)) for positions, scores in found]


def _shared_terms(
    state: State, query_1V: csr_matrix, places: Sequence[tuple[int, int]], token: Callable[[int], str]
) -> Iterator[list[TermScore]]:
    model = state.model_of("sparse")
    require_searched(query_1V, "sparse")
    query = sparse.checked(query_1V, model.width, lambda row: f"query {row}")
    if query.shape[0] != 1:
        raise ValueError(f"got {query.shape[0]} query vectors; explain takes one")
    asked = dict(zip(query.indices.tolist(), query.data.tolist(), strict=True))
    for number, position in places:
        row = state.segments[number].fields["sparse"].rows(np.array([position]))
        shared = [(t, asked[t], w) for t, w in zip(row.indices.tolist(), row.data.tolist(), strict=True) if t in asked]
        yield [TermScore(term, token(term), ours, theirs, ours * theirs) for term, ours, theirs in shared]


def _met_tokens(state: State, query: TokenVectors, places: Sequence[tuple[int, int]]) -> Iterator[list[TokenScore]]:
    parts = _token_parts(state, None)
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


def _shared_words(state: State, query: str, places: Sequence[tuple[int, int]]) -> Iterator[list[TermScore]]:
    for shared in state.words.explain(state.analyzer.terms(query), places):
        yield [TermScore(None, term, ours, theirs, ours * theirs) for term, ours, theirs in shared]


def _token_parts(state: State, condition: Condition) -> list[token_search.Tokens]:
    """Returns the token vectors of each segment, and which documents may be found."""
    state.model_of("tokens")
    fields: list[TokenField] = [segment.fields["tokens"] for segment in state.segments]
    return [token_search.Tokens(f.segment, mask) for f, mask in zip(fields, state.eligible(condition), strict=True)]


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
