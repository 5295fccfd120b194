"""Search in two passes: bits propose, finer numbers decide.

The first pass compares signs (Hamming distance, 1/32 of float32's bytes) and takes ``oversampling`` times as many documents as
are asked for; the second orders those by the inner product of the float query with whatever is stored: int8, float16, float32,
or the signs themselves.

Q queries, N documents, C candidates, K found, D dimensions, W words of 64 bits.
"""

from __future__ import annotations

import numpy as np

from openembed.vectors import BLOCK, StoredVectors, scores

BITS = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


class BinarySearch:
    """Stored documents and their signs; ``documents`` may be memory-mapped, of which only candidates are read.

    ``bits``: their binary form where it is already there; without, it is made of ``documents``.
    """

    def __init__(self, documents: StoredVectors, bits: StoredVectors | None = None) -> None:
        self.documents = documents
        self._words_NW = _words((bits or _signs(documents)).values_NC)
        if len(self._words_NW) != len(documents):
            raise ValueError(f"{len(documents)} documents but {len(self._words_NW)} rows of bits; give those of the same texts")

    def search(self, queries_QD: np.ndarray, k: int, *, oversampling: int = 4) -> tuple[np.ndarray, np.ndarray]:
        """Returns (positions int64, scores float32), each (Q, min(k, N)): of ``k * oversampling`` candidates the best.

        ``oversampling`` 0: no second pass; the scores are those of the signs, 1 - 2 · distance / D. Of equal scores the
        earlier document is better. Raises ``ValueError`` for queries of another width.
        """
        queries_QD = np.asarray(queries_QD, dtype=np.float32)
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.documents.width:
            raise ValueError(f"queries of shape {queries_QD.shape}; (count, {self.documents.width}) expected")
        if k < 1 or oversampling < 0:
            raise ValueError(f"k must be 1 or more and oversampling 0 or more, got {k} and {oversampling}")
        kept = min(k, len(self.documents))
        positions_QK = np.empty((len(queries_QD), kept), dtype=np.int64)
        scores_QK = np.empty((len(queries_QD), kept), dtype=np.float32)
        for row, query_D in enumerate(queries_QD):
            positions_QK[row], scores_QK[row] = self._one(query_D, kept, oversampling)
        return positions_QK, scores_QK

    def _one(self, query_D: np.ndarray, k: int, oversampling: int) -> tuple[np.ndarray, np.ndarray]:
        distances_N = self._distances(np.packbits(query_D > 0))
        candidates_C = np.argsort(distances_N, kind="stable")[: k * max(oversampling, 1)]  # 16 bits: sorted in one pass
        if oversampling:
            candidates_C = np.sort(candidates_C)  # in the order of the file, and equal scores in the order of documents
            scores_C = scores(query_D[None], self.documents[candidates_C])[0]
        else:
            scores_C = 1 - 2 * distances_N[candidates_C].astype(np.float32) / np.float32(self.documents.width)
        best_K = np.argsort(-scores_C, kind="stable")[:k]
        return candidates_C[best_K], scores_C[best_K]

    def _distances(self, query_C: np.ndarray) -> np.ndarray:
        """Returns the Hamming distance to every document, uint16 (N,)."""
        query_W = _words(query_C[None])[0]
        distances_N = np.empty(len(self._words_NW), dtype=np.uint16)
        for start in range(0, len(distances_N), BLOCK):
            differing_NW = self._words_NW[start : start + BLOCK] ^ query_W
            distances_N[start : start + BLOCK] = _count(differing_NW)
        return distances_N


def recall(found_QK: np.ndarray, exact_QK: np.ndarray) -> float:
    """Returns which share of the exact positions was found, over all queries; 1.0 where nothing was to be found."""
    hits = [len(np.intersect1d(found, exact)) for found, exact in zip(found_QK, exact_QK, strict=True)]
    return sum(hits) / exact_QK.size if exact_QK.size else 1.0


def _signs(documents: StoredVectors) -> StoredVectors:
    if documents.precision == "binary":
        return documents
    parts = [documents[start : start + BLOCK].binary().values_NC for start in range(0, len(documents), BLOCK)]
    return StoredVectors(np.concatenate(parts) if parts else np.empty((0, documents.width // 8), dtype=np.uint8))


def _words(bits_NC: np.ndarray) -> np.ndarray:
    """The bits as few long words: zeros are appended, in which no two rows differ."""
    rest = -bits_NC.shape[1] % 8
    return np.ascontiguousarray(np.pad(bits_NC, ((0, 0), (0, rest)))).view(np.uint64)


def _count(words_NW: np.ndarray) -> np.ndarray:
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words_NW).sum(axis=1, dtype=np.uint16)
    return BITS[words_NW.view(np.uint8)].sum(axis=1, dtype=np.uint16)  # numpy before 2.0
