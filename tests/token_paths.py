"""Token search with and without compiled kernels and threads, small segments of every kind, and MaxSim as three loops."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from openembed.index.tokens import clusters, codec, coding, exact, muvera, warp, xtr
from openembed.index.tokens.files import TokenSegment, TokenSettings, TokenWriter
from openembed.index.tokens.native import token_library
from openembed.token_vectors import TokenVectors

PATHS = ["numpy", *(["kernels", "threads"] if token_library() else [])]
COUNT, WIDTH = 400, 24
paths = pytest.mark.parametrize("path", PATHS)


@contextmanager
def forced(path):
    with pytest.MonkeyPatch.context() as patch:
        if path == "numpy":
            for module in (clusters, codec, coding, exact, muvera, warp, xtr):
                patch.setattr(module, "token_library", lambda: None)
        if path == "threads":
            patch.setattr(exact, "THREADED", 8)
            patch.setattr(exact, "RESCORED", 8)
            patch.setattr(clusters, "BLOCK", 50)
            for module in (exact, clusters):
                patch.setattr(module, "threads", lambda: 3)
        yield


def drawn(random, count, width, longest, levels=None, shortest=0):
    """Token vectors of texts of ``shortest`` to ``longest`` tokens: whole numbers where ``levels`` says, else of length 1."""
    lengths = random.integers(shortest, longest + 1, count)
    shape = int(lengths.sum()), width
    if levels:
        values = random.integers(-levels, levels + 1, shape).astype(np.float32)
    else:
        values = random.standard_normal(shape).astype(np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
    return TokenVectors(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def clustered(random, count, width=24, longest=20, topics=12):
    """Token vectors of length 1 around a few directions."""
    centres = random.standard_normal((topics, width))
    lengths = random.integers(1, longest + 1, count)
    values = centres[random.integers(0, topics, lengths.sum())] + 0.6 * random.standard_normal((lengths.sum(), width))
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)
    return TokenVectors(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def segment(documents, settings=None, folder=None, chunk=7):
    """Returns documents written in chunks and opened; the folder lives as long as the process where none is given."""
    folder = Path(folder or tempfile.mkdtemp(prefix="tokens-"))
    writer = TokenWriter(folder, documents.width, settings or TokenSettings())
    for start in range(0, len(documents), chunk):
        writer.add(documents.select(range(start, min(start + chunk, len(documents)))))
    writer.close()
    return TokenSegment(folder, len(documents))


def maxsim(query_LD, document_TD):
    """Three loops in Python's floats; -inf for a document without tokens."""
    if not len(document_TD):
        return -np.inf
    total = 0.0
    for query_D in query_LD:
        total += max(sum(float(a) * float(b) for a, b in zip(query_D, token_D, strict=True)) for token_D in document_TD)
    return float(np.float32(total))


def fast_maxsim(query_LD, document_TD):
    """The same by numpy, in float64."""
    if not len(document_TD):
        return -np.inf
    return float((np.asarray(query_LD, np.float64) @ np.asarray(document_TD, np.float64).T).max(axis=1).sum())


def brute_force(queries, documents, eligible_N, ids, k):
    rankings = []
    for query_LD in queries:
        rows = [(maxsim(query_LD, document), ids[n], n) for n, document in enumerate(documents) if eligible_N[n]]
        best = sorted((row for row in rows if row[0] > -np.inf), reverse=True)[:k]
        rankings.append([(position, score) for score, _, position in best] if len(query_LD) else [])
    return rankings
