"""Representations of texts kept on disk from run to run, whatever their kind; they survive interruption at any moment.

A folder a model, ``<fingerprint>-<width>``. Rows are appended to one file and, once they are on the disk, their keys to
``keys.bin``; a row without its key is overwritten by the next append. Appends of several processes take turns.

    dense          vectors.f32   4 D bytes a text            keys.bin   a key
    sparse         terms.rows    8 bytes a term: int32 number, float32 weight      a key and where its row ends (int64)
    tokens         tokens.rows   4 D bytes a vector           as for sparse

Shapes: ``N`` texts, ``D`` width, ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from openembed.encoded import Encoded
from openembed.token_vectors import TokenVectors

log = logging.getLogger(__name__)

KEY_BYTES, END_BYTES = 16, 8
Context = tuple[str, ...]
"""What a representation depends on beside model and text: side, prefix, options."""


class Cache(ABC):
    """What is stored of one model; use :func:`open_cache`."""

    rows_file: str
    key_bytes: int

    def __init__(self, folder: str | Path, fingerprint: str, width: int) -> None:
        self._folder = Path(folder) / f"{fingerprint[:24]}-{width}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._width = width
        self._keys, self._rows = self._folder / "keys.bin", self._folder / self.rows_file
        self._keys.touch()
        self._rows.touch()
        self._index: dict[bytes, Any] = {}
        self._read(self._keys.read_bytes(), self._rows.stat().st_size)
        log.info("%s holds %d texts", self._folder, len(self._index))

    def __len__(self) -> int:
        return len(self._index)

    def find(self, context: Context, texts: Sequence[str]) -> tuple[list[int], Encoded]:
        """Returns which of ``texts`` are stored, and their representations."""
        keys = [_key(context, text) for text in texts]
        found = [number for number, key in enumerate(keys) if key in self._index]
        return found, self._stored([self._index[keys[number]] for number in found])

    def add(self, context: Context, texts: Sequence[str], encoded: Encoded) -> None:
        """Stores the representations of ``texts``."""
        with self._rows.open("r+b") as rows, self._keys.open("r+b") as keys:
            _lock(keys)
            count = keys.seek(0, os.SEEK_END) // self.key_bytes
            parts, ends = self._packed(encoded)
            start = self._end(keys, count)
            rows.seek(start)
            rows.writelines(parts)
            rows.truncate()
            rows.flush()
            os.fsync(rows.fileno())
            keys.seek(count * self.key_bytes)
            names = [_key(context, text) for text in texts]
            keys.write(self._entries(names, start, ends, count))
            keys.flush()

    @abstractmethod
    def _read(self, keys: bytes, size: int) -> None:
        """Fills the index from the keys whose rows lie within the first ``size`` bytes."""

    @abstractmethod
    def _stored(self, places: Sequence[Any]) -> Encoded:
        """The representations at these places."""

    @abstractmethod
    def _packed(self, encoded: Encoded) -> tuple[list[bytes], np.ndarray]:
        """What is appended, and where each text's row ends in it."""

    @abstractmethod
    def _end(self, keys: Any, count: int) -> int:
        """Where the rows of the first ``count`` keys end."""

    @abstractmethod
    def _entries(self, names: list[bytes], start: int, ends: np.ndarray, count: int) -> bytes:
        """The bytes of new keys, which are taken into the index."""


class VectorCache(Cache):
    """Dense vectors."""

    rows_file, key_bytes = "vectors.f32", KEY_BYTES

    def _read(self, keys: bytes, size: int) -> None:
        for row in range(min(len(keys) // KEY_BYTES, size // (self._width * 4))):
            self._index[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = row

    def _stored(self, places: Sequence[Any]) -> np.ndarray:
        if not places:
            return np.empty((0, self._width), dtype=np.float32)
        stored = np.memmap(self._rows, dtype="<f4", mode="r", shape=(max(places) + 1, self._width))
        return np.asarray(stored[list(places)])

    def _packed(self, encoded: Encoded) -> tuple[list[bytes], np.ndarray]:
        return [np.ascontiguousarray(encoded, dtype="<f4").tobytes()], np.arange(1, len(encoded) + 1) * self._width * 4

    def _end(self, keys: Any, count: int) -> int:
        return count * self._width * 4

    def _entries(self, names: list[bytes], start: int, ends: np.ndarray, count: int) -> bytes:
        self._index.update((name, count + number) for number, name in enumerate(names))
        return b"".join(names)


class _RaggedCache(Cache):
    """Rows of different lengths; the index holds (first byte, end)."""

    key_bytes = KEY_BYTES + END_BYTES

    def _read(self, keys: bytes, size: int) -> None:
        start = 0
        for place in range(0, len(keys) - self.key_bytes + 1, self.key_bytes):
            end = int.from_bytes(keys[place + KEY_BYTES : place + self.key_bytes], "little")
            if not start <= end <= size:
                break
            self._index[keys[place : place + KEY_BYTES]] = (start, end)
            start = end

    def _bytes(self, places: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """The rows at these places end to end, and how many bytes each has."""
        sizes = np.array([end - start for start, end in places], dtype=np.int64)
        if not sizes.sum():
            return np.empty(0, dtype=np.uint8), sizes
        stored = np.memmap(self._rows, dtype=np.uint8, mode="r")
        return np.concatenate([stored[start:end] for start, end in places]), sizes

    def _end(self, keys: Any, count: int) -> int:
        if count == 0:
            return 0
        keys.seek(count * self.key_bytes - END_BYTES)
        return int.from_bytes(keys.read(END_BYTES), "little")

    def _entries(self, names: list[bytes], start: int, ends: np.ndarray, count: int) -> bytes:
        bounds = [start, *(start + int(end) for end in ends)]
        self._index.update(zip(names, pairwise(bounds), strict=True))
        return b"".join(name + end.to_bytes(END_BYTES, "little") for name, end in zip(names, bounds[1:], strict=True))


class SparseCache(_RaggedCache):
    """Weights over a vocabulary."""

    rows_file = "terms.rows"
    entry = np.dtype([("term", "<i4"), ("weight", "<f4")])

    def _stored(self, places: Sequence[Any]) -> csr_matrix:
        data, sizes = self._bytes(places)
        entries = data.view(self.entry)
        ends = np.concatenate([[0], np.cumsum(sizes // self.entry.itemsize)])
        return csr_matrix((entries["weight"].copy(), entries["term"].copy(), ends), shape=(len(sizes), self._width))

    def _packed(self, encoded: Encoded) -> tuple[list[bytes], np.ndarray]:
        entries = np.empty(encoded.nnz, dtype=self.entry)
        entries["term"], entries["weight"] = encoded.indices, encoded.data
        return [entries.tobytes()], encoded.indptr[1:].astype(np.int64) * self.entry.itemsize


class TokenCache(_RaggedCache):
    """Token vectors."""

    rows_file = "tokens.rows"

    def _stored(self, places: Sequence[Any]) -> TokenVectors:
        data, sizes = self._bytes(places)
        ends = np.concatenate([[0], np.cumsum(sizes // (4 * self._width))]).astype(np.int64)
        return TokenVectors(data.view("<f4").reshape(-1, self._width), ends)

    def _packed(self, encoded: Encoded) -> tuple[list[bytes], np.ndarray]:
        values_TD = np.ascontiguousarray(encoded.values_TD, dtype="<f4")
        return [values_TD.tobytes()], encoded.offsets_N1[1:] * 4 * self._width


def open_cache(folder: str | Path, encoder: Any) -> Cache:
    """Returns what the folder keeps of this encoder; it may be empty."""
    kinds = {"dense": VectorCache, "sparse": SparseCache, "tokens": TokenCache}
    return kinds[getattr(encoder, "kind", "dense")](folder, encoder.fingerprint, encoder.width)


def _key(context: Context, text: str) -> bytes:
    return hashlib.blake2b("\0".join((*context, text)).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system: one process at a time
        return
    fcntl.flock(file, fcntl.LOCK_EX)
