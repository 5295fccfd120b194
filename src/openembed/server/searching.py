"""One search: ranking an index for a query, and showing where the query's words are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from openembed.index.highlight import matches, snippet
from openembed.index.store import Store
from openembed.records import Document
from openembed.steps.fuse import fused_depth, reciprocal_rank

QUERY = "query"


@dataclass(frozen=True)
class Found:
    """Hits as the API gives them, and the seconds it took."""

    hits: list[dict[str, Any]]
    seconds: float


def search(
    store: Store, query: str, vector_D: np.ndarray | None, mode: str, k: int, wanted: dict[str, Any] | None = None
) -> Found:
    """Returns the k best documents, with highlights; ``vector_D`` is the query's, where the mode needs one.

    ``wanted``: a filter on metadata. Raises ``ValueError`` for one that cannot be understood.
    """
    start = time.perf_counter()
    options: dict[str, Any] = {} if wanted is None else {"filter": wanted}
    runs = []
    depth = fused_depth(k) if mode == "hybrid" else k
    if mode in ("dense", "hybrid"):
        runs.append({QUERY: store.dense(np.asarray(vector_D)[None], depth, **options)[0]})
    if mode in ("bm25", "hybrid"):
        runs.append({QUERY: store.bm25([query], depth, **options)[0]})
    ranking = runs[0][QUERY] if len(runs) == 1 else reciprocal_rank(runs).get(QUERY, {})
    best = list(ranking.items())[:k]
    hits = [_hit(store, query, rank, score, store.document(identifier)) for rank, (identifier, score) in enumerate(best, 1)]
    return Found(hits, time.perf_counter() - start)


def _hit(store: Store, query: str, rank: int, score: float, document: Document) -> dict[str, Any]:
    in_title = matches(document.title, query, store.analyzer)
    in_text = matches(document.text, query, store.analyzer)
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
