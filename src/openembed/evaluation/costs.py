"""What a system's quality costs: how much is stored of a document, and how long a query takes.

Plain data, kept with a task's result:

    kind                         dense, sparse, tokens or bm25
    query_entries, document_entries    mean number of dimensions, terms or token vectors of a query, a document
    document_bytes               mean bytes a document, ``bytes_formula`` of them; ids and index structures do not count
    flops                        sparse: products of weights that a query and a document of this task share on average,
                                 the sum over terms of (share of queries with it) x (share of documents with it)
    empty_queries, empty_documents     share without any term or token vector, which find nothing and are never found
    query_ms                     wall clock here of one query alone, encoded and searched for 10 documents: a median of up to 32
    encode_query_ms, encode_document_ms, search_query_ms    the same a text, all texts at once; none where all was cached

Shapes: ``N`` texts, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from openembed.encoded import Encoded, kind_of, width_of
from openembed.evaluation.vectors import Vectors
from openembed.token_vectors import TokenVectors
from openembed.vectors import VectorFormat

ENTRY_BYTES = 8
"""A sparse weight: an int32 term number and a float32."""
ALONE, ALONE_SECONDS, ALONE_K = 32, 2.0, 10
"""Queries that are timed one by one, the seconds after which no further one is, and the documents that each asks for."""


def costs_of(
    vectors: Vectors, queries: Encoded, documents: Encoded, search_seconds: float, query_ms: float | None = None
) -> dict[str, Any]:
    """Returns the costs of a search of ``documents`` for ``queries`` that took ``search_seconds``, one alone ``query_ms``."""
    size, formula = _entry_bytes(kind_of(documents), width_of(documents), vectors.stored)
    entries_Q, entries_N = entries(queries), entries(documents)
    found: dict[str, Any] = {
        "kind": kind_of(documents),
        "query_entries": _mean(entries_Q),
        "document_entries": _mean(entries_N),
        "document_bytes": _mean(entries_N) * size,
        "bytes_formula": formula,
        "empty_queries": _mean(entries_Q == 0),
        "empty_documents": _mean(entries_N == 0),
        "query_ms": query_ms,
        "encode_query_ms": _ms(vectors.encode_seconds("query")),
        "encode_document_ms": _ms(vectors.encode_seconds("document")),
        "search_query_ms": _ms(search_seconds / max(1, len(entries_Q))),
    }
    if isinstance(documents, csr_matrix):
        found["flops"] = flops(queries, documents)
    return found


def bm25_costs(postings_a_document: float, search_seconds: float, queries: int, query_ms: float | None) -> dict[str, Any]:
    """Returns the costs of a BM25 search; queries need no model, so none of encoding."""
    return {
        "kind": "bm25",
        "document_entries": postings_a_document,
        "document_bytes": postings_a_document * ENTRY_BYTES,
        "bytes_formula": "8 x terms (int32 number, float32 weight)",
        "query_ms": query_ms,
        "search_query_ms": _ms(search_seconds / max(1, queries)),
    }


def alone_ms(answer: Callable[[str], object], queries: Sequence[str]) -> float | None:
    """Returns the median milliseconds of ``answer`` for one query at a time; None without queries."""
    began, took = time.perf_counter(), []
    for query in queries[:ALONE]:
        start = time.perf_counter()
        answer(query)
        took.append(time.perf_counter() - start)
        if time.perf_counter() - began > ALONE_SECONDS:
            break
    return _ms(float(np.median(took))) if took else None


def entries(encoded: Encoded) -> np.ndarray:
    """Returns how many dimensions, terms or token vectors each text has, int64 (N,)."""
    if isinstance(encoded, TokenVectors):
        return encoded.lengths_N
    if isinstance(encoded, csr_matrix):
        return np.bincount(_rows_of_entries(encoded)[encoded.data != 0], minlength=encoded.shape[0])
    return np.full(len(encoded), encoded.shape[1])


def flops(queries_QV: csr_matrix, documents_NV: csr_matrix) -> float:
    """Returns how many terms a query and a document share on average, over all pairs of them (naver/splade's FLOPS)."""
    shares = [
        np.bincount(part.indices[part.data != 0], minlength=part.shape[1]) / max(1, part.shape[0])
        for part in (queries_QV, documents_NV)
    ]
    return float(shares[0] @ shares[1])


def _entry_bytes(kind: str, width: int, stored: VectorFormat) -> tuple[float, str]:
    if kind == "sparse":
        return ENTRY_BYTES, "8 x terms (int32 number, float32 weight)"
    if kind == "tokens":
        return 4 * width, f"4 x {width} x token vectors (float32)"
    size = stored.bytes_per_vector(width)
    return size / width, f"{size} ({width} dimensions, {stored.precision})"


def _rows_of_entries(values_NV: csr_matrix) -> np.ndarray:
    return np.repeat(np.arange(values_NV.shape[0]), np.diff(values_NV.indptr))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
