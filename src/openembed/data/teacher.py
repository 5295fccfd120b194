"""Vectors that a teacher gave to texts, looked up by text.

A folder as bulk encoding writes it, of dense vectors (N, E) in any precision or of sparse weights (N, V), and ``keys.npy``
(N,): the key of each row's text. Shapes: Q queries, N documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix

from openembed.data.batch import text_key
from openembed.files import atomic_write
from openembed.vector_files import VECTORS, open_encoded, open_vectors, representation

KEYS = "keys.npy"
SAMPLE = 50_000
"""Principal directions come from at most this many vectors, evenly spaced."""


def write_keys(folder: str | Path, texts: Iterable[str]) -> None:
    """Writes the key of every text, in the order of the folder's vectors."""
    with atomic_write(Path(folder) / KEYS, "wb") as file:
        np.save(file, np.fromiter(map(text_key, texts), dtype=np.int64))


class _Keyed:
    """Rows found by their texts."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        if not (folder / KEYS).is_file():
            raise ValueError(f"{folder}: no {KEYS}; an encode stage writes it")
        keys_N = np.load(folder / KEYS)
        if len(keys_N) != count:
            raise ValueError(f"{folder}: {count} vectors but {len(keys_N)} keys; run the encode stage anew")
        self._order = np.argsort(keys_N, kind="stable")
        self._keys = keys_N[self._order]

    def places(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the row of each text, int64; ``ValueError`` names the first one without any."""
        wanted = np.array([text_key(text) for text in texts], dtype=np.int64)
        place = np.searchsorted(self._keys, wanted).clip(max=max(0, len(self._keys) - 1))
        found = self._keys[place] == wanted if len(self._keys) else np.zeros(len(wanted), dtype=bool)
        if not found.all():
            text = texts[int(np.flatnonzero(~found)[0])]
            raise ValueError(
                f"{self.folder}: no teacher vector for {int((~found).sum())} of {len(texts)} texts, first {text!r:.80}; "
                "the encode stage must cover every text that is trained on"
            )
        return self._order[place]

    def digest(self, sample: Callable[[np.ndarray], Iterable[np.ndarray]], shape: tuple[int, ...]) -> str:
        """Returns the SHA-256 of the keys and of a thousand rows, evenly spaced."""
        found = hashlib.sha256(self._keys.tobytes())
        found.update(str(shape).encode())
        rows = np.linspace(0, max(0, len(self._keys) - 1), num=min(1000, len(self._keys)), dtype=np.int64)
        for part in sample(rows):
            found.update(np.ascontiguousarray(part).tobytes())
        return found.hexdigest()


class TeacherVectors:
    """The memory-mapped dense vectors of a folder."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ``ValueError`` when the folder lacks vectors or keys, or they do not belong together."""
        self.folder = Path(folder)
        missing = [name for name in (VECTORS, KEYS) if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(f"{self.folder}: no {' and no '.join(missing)}; an encode stage writes them")
        self._stored = open_vectors(self.folder)
        self._rows = _Keyed(self.folder, len(self._stored))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the keys and of a thousand vectors, evenly spaced: the same wherever the folder lies."""
        return self._rows.digest(lambda rows: [self._stored[rows].values_NC], self._stored.values_NC.shape)

    @property
    def width(self) -> int:
        """The teacher's width E."""
        return self._stored.width

    def lookup(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the vectors of ``texts``, float32 (len(texts), E); ``ValueError`` names the first one without any."""
        return self._stored[self._rows.places(texts)].to_float32()

    def principal_directions(self, width: int) -> np.ndarray:
        """Returns the ``width`` directions (E, width) that keep most of the vectors' inner products, orthonormal.

        They are the leading eigenvectors of the uncentred second moment, each with its largest entry positive, so the
        same vectors always give the same directions. Raises ``ValueError`` when there are fewer than ``width``.
        """
        if not 0 < width <= self.width:
            raise ValueError(f"{self.folder}: teacher vectors of width {self.width} cannot be projected to {width}")
        step = max(1, len(self._stored) // SAMPLE)
        sample_NE = self._stored[::step].to_float32().astype(np.float64)
        _, directions_EE = np.linalg.eigh(sample_NE.T @ sample_NE)
        leading = directions_EE[:, ::-1][:, :width]
        signs = np.sign(leading[np.abs(leading).argmax(0), np.arange(width)])
        return (leading * signs).astype(np.float32)


class TeacherWeights:
    """The memory-mapped sparse weights of a folder."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ``ValueError`` when the folder's files are missing or do not belong together."""
        self.folder = Path(folder)
        self._stored = open_encoded(self.folder)
        self._rows = _Keyed(self.folder, self._stored.shape[0])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the keys and of a thousand rows, evenly spaced."""

        def sample(rows: np.ndarray) -> list[np.ndarray]:
            found = self._stored[rows]
            return [found.data, found.indices.astype(np.int64), found.indptr.astype(np.int64)]

        return self._rows.digest(sample, self._stored.shape)

    def lookup(self, texts: Sequence[str]) -> csr_matrix:
        """Returns the weights of ``texts``, float32 (len(texts), V); ``ValueError`` names the first one without any."""
        return self._stored[self._rows.places(texts)]


def open_teacher(folder: str | Path) -> TeacherVectors | TeacherWeights:
    """Returns what a folder holds, dense or sparse; ``ValueError`` when it holds neither."""
    return TeacherWeights(folder) if representation(folder) == "sparse" else TeacherVectors(folder)


def teacher_fingerprint(folder: str | Path) -> str:
    """Returns the fingerprint of a folder's vectors."""
    return open_teacher(folder).fingerprint


class TeacherScores:
    """A teacher's scores of queries and documents: cosines or inner products of dense vectors, inner products of sparse."""

    def __init__(self, vectors: str | Path, queries: str | Path | None, similarity: Literal["cosine", "dot"]) -> None:
        """``queries``: the folder of the queries' vectors, where it is another. Raises ``ValueError`` for unlike folders."""
        self._documents = open_teacher(vectors)
        self._queries = self._documents if queries is None else open_teacher(queries)
        if type(self._queries) is not type(self._documents):
            raise ValueError(f"{queries} and {vectors} hold vectors of different kinds; encode both with one model")
        self._similarity = similarity

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> np.ndarray:
        """Returns float32 (Q, N); ``ValueError`` names the first text without vectors."""
        left, right = self._queries.lookup(queries), self._documents.lookup(documents)
        if isinstance(left, np.ndarray):
            return left @ right.T if self._similarity == "dot" else _directions(left) @ _directions(right).T
        return (left @ right.T).toarray().astype(np.float32)


def _directions(vectors_ND: np.ndarray) -> np.ndarray:
    return vectors_ND / np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
