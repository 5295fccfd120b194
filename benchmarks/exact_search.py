"""Exact search of random sparse and token vectors: the engines against products of matrices, which give the same scores.

OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/exact_search.py
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from scipy.sparse import csr_matrix

from openembed.index import exact
from openembed.token_vectors import TokenVectors

VOCABULARY = 30_522


def sparse_texts(count: int, terms: int, random: np.random.Generator) -> csr_matrix:
    """Terms drawn by Zipf's law, weights by a gamma distribution."""
    shares_V = 1 / np.arange(1, VOCABULARY + 1) ** 0.8
    rows = [np.unique(random.choice(VOCABULARY, size=terms, p=shares_V / shares_V.sum())) for _ in range(count)]
    ends = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    weights = random.gamma(1, 0.5, size=ends[-1]).astype(np.float32)
    return csr_matrix((weights, np.concatenate(rows).astype(np.int32), ends), shape=(count, VOCABULARY))


def token_texts(count: int, tokens: int, width: int, random: np.random.Generator) -> TokenVectors:
    """Directions drawn evenly."""
    values_TD = random.standard_normal((count * tokens, width), dtype=np.float32)
    values_TD /= np.linalg.norm(values_TD, axis=1, keepdims=True)
    return TokenVectors(values_TD, np.arange(count + 1, dtype=np.int64) * tokens)


def measured(documents: csr_matrix | TokenVectors, queries: csr_matrix | TokenVectors, count: int) -> dict[str, float]:
    """Seconds to prepare the documents, and milliseconds a query."""
    start = time.perf_counter()
    prepared = exact.prepared(documents)
    found = {"prepare_s": time.perf_counter() - start}
    for k in (10, 1000):
        start = time.perf_counter()
        prepared.search(queries, k, str)
        found[f"search_{k}_ms"] = 1000 * (time.perf_counter() - start) / count
    start = time.perf_counter()
    prepared.top(queries, 10, np.full(count, np.inf))
    found["limited_10_ms"] = 1000 * (time.perf_counter() - start) / count
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    sparse = sparse_texts(options.documents, 150, random), sparse_texts(options.queries, 30, random)
    tokens = token_texts(options.documents // 4, 32, 64, random), token_texts(options.queries // 4, 16, 64, random)
    figures = {"sparse": measured(*sparse, options.queries), "tokens": measured(*tokens, options.queries // 4)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
