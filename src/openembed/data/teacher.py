"""Vectors that a teacher gave to texts, looked up by text.

A folder with ``vectors.npy`` (N, E), as bulk encoding writes it (in any precision), and ``keys.npy`` (N,): the key of
each row's text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from openembed.data.batch import text_key
from openembed.files import atomic_write
from openembed.vector_files import VECTORS, open_vectors

KEYS = "keys.npy"
SAMPLE = 50_000
"""Principal directions come from at most this many vectors, evenly spaced."""


def write_keys(folder: str | Path, texts: Iterable[str]) -> None:
    """Writes the key of every text, in the order of the folder's vectors."""
    with atomic_write(Path(folder) / KEYS, "wb") as file:
        np.save(file, np.fromiter(map(text_key, texts), dtype=np.int64))


class TeacherVectors:
    """The memory-mapped vectors of a folder."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ``ValueError`` when the folder lacks vectors or keys, or they do not belong together."""
        self.folder = Path(folder)
        missing = [name for name in (VECTORS, KEYS) if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(f"{self.folder}: no {' and no '.join(missing)}; an encode stage writes them")
        self._stored = open_vectors(self.folder)
        keys_N = np.load(self.folder / KEYS)
        if len(keys_N) != len(self._stored):
            raise ValueError(f"{self.folder}: {len(self._stored)} vectors but {len(keys_N)} keys; run the encode stage anew")
        self._order = np.argsort(keys_N, kind="stable")
        self._keys = keys_N[self._order]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the keys and of a thousand vectors, evenly spaced: the same wherever the folder lies."""
        found = hashlib.sha256(self._keys.tobytes())
        found.update(str(self._stored.values_NC.shape).encode())
        rows = np.linspace(0, max(0, len(self._stored) - 1), num=min(1000, len(self._stored)), dtype=np.int64)
        found.update(np.ascontiguousarray(self._stored[rows].values_NC).tobytes())
        return found.hexdigest()

    @property
    def width(self) -> int:
        """The teacher's width E."""
        return self._stored.width

    def lookup(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the vectors of ``texts``, float32 (len(texts), E); ``ValueError`` names the first one without any."""
        wanted = np.array([text_key(text) for text in texts], dtype=np.int64)
        place = np.searchsorted(self._keys, wanted).clip(max=max(0, len(self._keys) - 1))
        found = self._keys[place] == wanted if len(self._keys) else np.zeros(len(wanted), dtype=bool)
        if not found.all():
            text = texts[int(np.flatnonzero(~found)[0])]
            raise ValueError(
                f"{self.folder}: no teacher vector for {int((~found).sum())} of {len(texts)} texts, first {text!r:.80}; "
                "the encode stage must cover every text that is trained on"
            )
        return self._stored[self._order[place]].to_float32()

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
