"""Sparse vectors as files that other engines read: OpenSearch's bulk requests, Anserini's JSON vectors and topics.

    opensearch   two lines a document: {"index": {"_index", "_id"}} and {"title", "text", "metadata", FIELD: {token: weight}},
                 for a field of type ``rank_features``, which keeps nine significant bits of a weight
    anserini     {"id", "contents", "vector": {token: weight · 100, rounded}} a document, for ``JsonVectorCollection`` and
                 ``-impact``; a query is its tokens, each repeated as often as its rounded weight says

Tokens are the strings of the model's tokenizer. Weights that round to 0 are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openembed.files import atomic_write
from openembed.index.sparse import SparseField, SparseRow
from openembed.index.store import Store
from openembed.records import Document, Query

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FIELD = "sparse"
QUANTUM = 100
REFUSED = set(' ,\\/*?"<>|#:')
"""Characters that no index of OpenSearch has in its name."""
ID_BYTES = 512
Names = Callable[[int], str]


def opensearch_lines(rows: Iterable[tuple[Document, SparseRow]], names: Names, index: str) -> Iterator[str]:
    """Yields the two lines of each document of a bulk request into ``index``; ``ValueError`` names an id that is too long."""
    for document, row in rows:
        if len(document.id.encode()) > ID_BYTES:
            raise ValueError(f"document {document.id[:40]!r}...: OpenSearch takes ids of at most {ID_BYTES} bytes; shorten it")
        weights = {names(term): weight for term, weight in zip(row.terms.tolist(), _short(row), strict=True)}
        body = {"title": document.title, "text": document.text, "metadata": document.metadata, FIELD: weights}
        yield _json({"index": {"_index": index, "_id": document.id}})
        yield _json(body)


def anserini_lines(rows: Iterable[tuple[Document, SparseRow]], names: Names) -> Iterator[str]:
    """Yields a line a document."""
    for document, row in rows:
        yield _json({"id": document.id, "contents": document.full_text, "vector": dict(_quantized(row, names))})


def anserini_topics(queries: Iterable[Query], vectors_QV: csr_matrix, names: Names) -> Iterator[str]:
    """Yields a line a query: id, tab, tokens as often as their weights say; raises ``ValueError`` for an id that has a tab."""
    for query, row in zip(queries, SparseField.each(vectors_QV), strict=True):
        if "\t" in query.id or "\n" in query.id:
            raise ValueError(f"query id {query.id!r} has a tab or a line break; topics files cannot hold it")
        tokens = [token for token, weight in _quantized(row, names) for _ in range(weight)]
        yield f"{query.id}\t{' '.join(tokens)}"


def write_sparse(
    store: Store, kind: str, path: Path, names: Names, advance: Callable[[int], None] = lambda _n: None
) -> dict[str, int]:
    """Writes the live documents of ``store`` for ``kind`` (opensearch, anserini), whole or not at all; returns how many.

    OpenSearch's index is called as the file is. Raises ``ValueError`` for a store without sparse vectors, another kind, and
    names and ids that OpenSearch refuses.
    """
    count = 0

    def counted() -> Iterator[tuple[Document, Any]]:
        nonlocal count
        for row in store.rows("sparse"):
            count += 1
            advance(1)
            yield row

    makers = {
        "opensearch": lambda: opensearch_lines(counted(), names, _index_name(path)),
        "anserini": lambda: anserini_lines(counted(), names),
    }
    if kind not in makers:
        raise ValueError(f"{kind!r} is not known; allowed: {', '.join(makers)}")
    lines = makers[kind]()
    with atomic_write(path) as file:
        for line in lines:
            file.write(line + "\n")
    return {"written": count, "unchanged": 0, "removed": 0}


def _index_name(path: Path) -> str:
    """The part of the file's name before its first dot; ``ValueError`` where OpenSearch takes no index of that name."""
    name = path.name.partition(".")[0]
    reasons = {
        "is empty": not name,
        "is not in lower case": name != name.lower(),
        "begins with _, - or +": name.startswith(("_", "-", "+")),
        f"has one of {''.join(sorted(REFUSED))!r}": not REFUSED.isdisjoint(name) or any(c.isspace() for c in name),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise ValueError(
            f"{path.name}: the index is called as the file is up to its first dot, {name!r}, which OpenSearch refuses: it "
            f"{' and '.join(found)}; give the file another name"
        )
    return name


def _short(row: SparseRow) -> list[float]:
    """Returns the weights as the shortest decimals that read back as the same float32."""
    return [float(str(weight)) for weight in row.weights]


def _quantized(row: SparseRow, names: Names) -> Iterator[tuple[str, int]]:
    for term, weight in zip(row.terms.tolist(), row.weights.tolist(), strict=True):
        whole = round(weight * QUANTUM)
        if whole:
            yield names(term), whole


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
