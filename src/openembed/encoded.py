"""What encoding gives back: an array of vectors, a sparse matrix, or token vectors; filled a micro-batch at a time.

Whoever takes one kind alone says so with :func:`require_kind`.

Shapes: ``N`` texts, ``B`` texts of a micro-batch, ``R`` rows of their representations, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from scipy.sparse import csr_matrix, issparse, vstack

from openembed.token_vectors import TokenVectors, positions
from openembed.vectors import VectorFormat

Encoded = np.ndarray | csr_matrix | TokenVectors
"""Dense ``(N, C)``, sparse float32 ``(N, V)`` or token vectors of N texts."""

CALLED = {"dense": "dense vectors", "sparse": "sparse weights over its vocabulary", "tokens": "a vector a token"}
"""What each kind of model gives, in words."""


def kind_of(encoded: Encoded) -> Literal["dense", "sparse", "tokens"]:
    """Returns what these representations are."""
    return "tokens" if isinstance(encoded, TokenVectors) else "sparse" if issparse(encoded) else "dense"


def count_of(encoded: Encoded) -> int:
    """Returns N."""
    return len(encoded) if isinstance(encoded, TokenVectors) else encoded.shape[0]


def width_of(encoded: Encoded) -> int:
    """Returns the number of dimensions or terms."""
    return encoded.width if isinstance(encoded, TokenVectors) else encoded.shape[1]


def none_of(kind: str, width: int) -> Encoded:
    """Returns the representations of no text."""
    if kind == "tokens":
        return TokenVectors(np.empty((0, width), dtype=np.float32), np.zeros(1, dtype=np.int64))
    return csr_matrix((0, width), dtype=np.float32) if kind == "sparse" else np.empty((0, width), dtype=np.float32)


def take(encoded: Encoded, texts: Sequence[int] | np.ndarray) -> Encoded:
    """Returns the representations of the texts at these positions, in that order, or of those where a mask is true.

    Raises ``ValueError`` for a mask of another length.
    """
    texts = positions(texts, count_of(encoded))
    return encoded.select(texts) if isinstance(encoded, TokenVectors) else encoded[texts]


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Returns the texts of all parts (one or more, of one kind and width), one part after the other."""
    if isinstance(parts[0], TokenVectors):
        return TokenVectors.from_list([matrix for part in parts for matrix in part], parts[0].width)
    return vstack(parts, format="csr") if issparse(parts[0]) else np.concatenate(parts)


def require_kind(model: Any, allowed: Sequence[str], what: str, instead: str) -> None:
    """Raises ``ValueError`` where ``model`` (an encoder; without a ``kind`` it is dense) gives what ``what`` cannot take.

    ``instead`` says what to do.
    """
    kind = getattr(model, "kind", "dense")
    if kind not in allowed:
        raise ValueError(f"{what} takes {' or '.join(CALLED[a] for a in allowed)}, this model gives {CALLED[kind]}; {instead}")


class Gathered(Protocol):
    """Takes representations in any order of texts and gives them back in the order of their numbers."""

    def put(self, texts_B: np.ndarray, values_RD: np.ndarray) -> None:
        """Takes the rows of these texts, text after text."""

    def result(self) -> Encoded:
        """Returns all texts' representations."""


def gathered(kind: str, counts_N: np.ndarray, width: int) -> Gathered:
    """Returns what takes representations of a kind as they are; ``counts_N``: how many rows each text has."""
    if kind == "tokens":
        return GatheredTokens(counts_N, width)
    return GatheredSparse(width) if kind == "sparse" else GatheredDense(len(counts_N), width)


class GatheredDense:
    """Vectors in an output format (None: float32, as they are), an array ``(N, C)``."""

    def __init__(self, count: int, width: int, out: VectorFormat | None = None, *, normalize: bool = False) -> None:
        self._out, self._normalize = out, normalize
        columns, dtype = (width, np.float32) if out is None else (out.columns(width), out.dtype)
        self._values_NC = np.empty((count, columns), dtype=dtype)

    def put(self, texts_B: np.ndarray, values_RD: np.ndarray) -> None:
        """Takes one row a text."""
        if self._out is not None:
            values_RD = self._out.apply(values_RD, normalize=self._normalize).values_NC
        self._values_NC[texts_B] = values_RD

    def result(self) -> np.ndarray:
        """Returns ``(N, C)``."""
        return self._values_NC


class GatheredSparse:
    """Weights over the vocabulary, ``(N, V)`` float32 with sorted columns and without stored zeros."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._parts: list[tuple[np.ndarray, csr_matrix]] = []

    def put(self, texts_B: np.ndarray, values_RD: np.ndarray) -> None:
        """Takes one row a text; several threads may at once."""
        self._parts.append((texts_B, csr_matrix(values_RD, dtype=np.float32)))

    def result(self) -> csr_matrix:
        """Returns ``(N, V)``."""
        if not self._parts:
            return csr_matrix((0, self._width), dtype=np.float32)
        texts, parts = zip(*self._parts, strict=True)
        return vstack(parts, format="csr")[np.argsort(np.concatenate(texts))]


class GatheredTokens:
    """Token vectors, of texts whose numbers of vectors are known beforehand."""

    def __init__(self, counts_N: np.ndarray, width: int) -> None:
        self._offsets_N1 = np.concatenate([[0], np.cumsum(counts_N)]).astype(np.int64)
        self._values_TD = np.empty((int(self._offsets_N1[-1]), width), dtype=np.float32)

    def put(self, texts_B: np.ndarray, values_RD: np.ndarray) -> None:
        """Takes the rows of these texts, text after text."""
        first = 0
        for text in texts_B:
            low, high = self._offsets_N1[text], self._offsets_N1[text + 1]
            self._values_TD[low:high] = values_RD[first : first + high - low]
            first += high - low

    def result(self) -> TokenVectors:
        """Returns the token vectors of all texts."""
        return TokenVectors(self._values_TD, self._offsets_N1)
