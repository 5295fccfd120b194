"""One search: ranking an index for a query, and showing where the query's words are."""

from __future__ import annotations

import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from openembed.encoded import Encoded
from openembed.index.highlight import matches, snippet
from openembed.index.store import Store
from openembed.index.tokens.methods import EXACT, Method
from openembed.records import Document
from openembed.representations import Kind
from openembed.steps.modes import Naming, explained, ranked


@dataclass(frozen=True)
class Found:
    """Hits as the API gives them, and the seconds it took."""

    hits: list[dict[str, Any]]
    seconds: float


def search(
    store: Store,
    query: str,
    vectors: Mapping[Kind, Encoded],
    mode: str,
    k: int,
    wanted: dict[str, Any] | None = None,
    naming: Naming | None = None,
    method: Method = EXACT,
) -> Found:
    """Returns the k best documents, with highlights; ``vectors`` are the query's, of each kind that the mode asks.

    ``wanted``: a filter on metadata. With ``naming`` hits say which terms or tokens made their scores. ``method``: how
    token vectors are searched. Raises ``ValueError`` for a filter that cannot be understood.
    """
    start = time.perf_counter()
    best = ranked(store, mode, query, vectors, k, filter=wanted, method=method)
    terms = {} if naming is None else explained(store, mode, query, vectors, list(best), naming)
    words = set(store.analyzer.terms(query))
    hits = [
        _hit(store, words, rank, score, store.document(identifier)) | ({"terms": terms[identifier]} if terms else {})
        for rank, (identifier, score) in enumerate(best.items(), 1)
    ]
    return Found(hits, time.perf_counter() - start)


def _hit(store: Store, words: Set[str], rank: int, score: float, document: Document) -> dict[str, Any]:
    in_title = matches(document.title, words, store.analyzer)
    in_text = matches(document.text, words, store.analyzer)
    return {
        "rank": rank,
        "id": document.id,
        "score": float(score),
        "title": document.title,
        "text": document.text,
        "metadata": document.metadata,
        "highlights": {"title": [span[:2] for span in in_title], "text": [span[:2] for span in in_text]},
        "snippet": snippet(document.text, in_text),
    }
