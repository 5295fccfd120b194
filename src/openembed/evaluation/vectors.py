"""Vectors of texts for evaluation: each distinct text is encoded once, and kept on disk where a folder is given.

Shapes: ``N`` texts, ``D`` width.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openembed.evaluation.prompts import Prompts
from openembed.progress import progress
from openembed.vectors import VectorFormat

log = logging.getLogger(__name__)

KEY_BYTES = 16
CHUNK = 2_048


class TextEncoder(Protocol):
    """What evaluation asks of an encoder (:class:`openembed.encoder.Encoder` has it all)."""

    config: Any
    width: int

    @property
    def fingerprint(self) -> str:
        """Identifies configuration and weights."""
        ...

    def encode(self, texts: Sequence[str], *, instruction: str = "", **options: Any) -> np.ndarray:
        """Returns vectors ``(N, D)`` of texts after a literal prefix."""
        ...

    def encode_queries(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """Returns query vectors ``(N, D)``."""
        ...

    def encode_documents(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """Returns document vectors ``(N, D)``."""
        ...

    def query_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of queries."""
        ...

    def document_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of documents."""
        ...


class Vectors:
    """Gives the vectors of a task's texts under its prompts.

    ``options`` go to the encoder (``max_length``, ``normalize``, ``token_budget``). With a ``cache`` nothing is encoded
    twice. ``show_progress`` draws a bar. ``stored``: what documents and symmetric texts are kept in and read back from;
    queries are cut to its dimensions and stay float32.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        prompts: Prompts,
        cache: VectorCache | None = None,
        options: dict[str, Any] | None = None,
        *,
        show_progress: bool = False,
        stored: VectorFormat | None = None,
    ) -> None:
        self._stored = stored or VectorFormat()
        self._encoder, self._prompts, self._cache = encoder, prompts, cache
        self._options, self._progress = dict(options or {}), show_progress

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """Returns query vectors ``(N, D)``."""
        arguments = self._prompts.query_arguments
        whole_ND = self._get("query", self._prompts.query, texts, self._encoder.encode_queries, arguments)
        return self._read_back(whole_ND, VectorFormat(dimensions=self._stored.dimensions))

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        """Returns document vectors ``(N, D)``."""
        arguments = self._prompts.document_arguments
        whole_ND = self._get("document", self._prompts.document, texts, self._encoder.encode_documents, arguments)
        return self._read_back(whole_ND, self._stored)

    def symmetric(self, texts: Sequence[str]) -> np.ndarray:
        """Returns vectors ``(N, D)`` of texts that are neither query nor document."""
        prefix = self._prompts.symmetric
        whole_ND = self._get("text", prefix, texts, self._encoder.encode, {"instruction": prefix})
        return self._read_back(whole_ND, self._stored)

    def _read_back(self, vectors_ND: np.ndarray, stored: VectorFormat) -> np.ndarray:
        if stored.plain:
            return vectors_ND
        return stored.apply(vectors_ND, normalize=self._options.get("normalize", True)).to_float32()

    def _get(
        self,
        side: str,
        prefix: str,
        texts: Sequence[str],
        encode: Callable[..., np.ndarray],
        arguments: dict[str, str],
    ) -> np.ndarray:
        distinct = list(dict.fromkeys(texts))
        place = {text: row for row, text in enumerate(distinct)}
        context = (
            side,
            prefix,
            str({k: v for k, v in sorted(self._options.items()) if k in ("max_length", "normalize")}),
        )
        cached = [None] * len(distinct) if self._cache is None else self._cache.find(context, distinct)
        missing = [row for row, vector in enumerate(cached) if vector is None]
        # longest first, so that chunks hold texts of like length and a lack of memory shows at once
        missing.sort(key=lambda row: -len(distinct[row]))
        vectors_ND = np.empty((len(distinct), self._encoder.width), dtype=np.float32)
        for row, vector in enumerate(cached):
            if vector is not None:
                vectors_ND[row] = vector
        with progress(f"encode {side}", len(missing), "texts", show=self._progress and bool(missing)) as advance:
            for start in range(0, len(missing), CHUNK):
                rows = missing[start : start + CHUNK]
                chunk = [distinct[row] for row in rows]
                vectors_ND[rows] = encode(chunk, **arguments, **self._options)
                if self._cache is not None:
                    self._cache.add(context, chunk, vectors_ND[rows])
                advance(len(rows))
        return vectors_ND[[place[text] for text in texts]]


class VectorCache:
    """Vectors on disk by (encoder fingerprint, side, prefix, options, text); survives interruption at any moment.

    Rows are appended to ``vectors.f32`` and, once they are on the disk, their keys to ``keys.bin``; a row without its
    key is overwritten by the next append. Appends of several processes take turns.
    """

    def __init__(self, folder: str | Path, fingerprint: str, width: int) -> None:
        self._folder = Path(folder) / f"{fingerprint[:24]}-{width}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._width = width
        self._keys, self._rows = self._folder / "keys.bin", self._folder / "vectors.f32"
        self._keys.touch()
        self._rows.touch()
        self._index: dict[bytes, int] = {}
        self._read_keys()
        log.info("%s holds %d vectors", self._folder, len(self._index))

    def __len__(self) -> int:
        return len(self._index)

    def find(self, context: tuple[str, ...], texts: Sequence[str]) -> list[np.ndarray | None]:
        """Returns the stored vector of each text, or None."""
        rows = [self._index.get(_key(context, text)) for text in texts]
        if all(row is None for row in rows):
            return [None] * len(texts)
        stored = np.memmap(self._rows, dtype="<f4", mode="r", shape=(max(self._index.values()) + 1, self._width))
        return [None if row is None else stored[row] for row in rows]

    def add(self, context: tuple[str, ...], texts: Sequence[str], vectors_ND: np.ndarray) -> None:
        """Stores the vectors of ``texts``."""
        with self._rows.open("r+b") as rows, self._keys.open("r+b") as keys:
            _lock(keys)
            first = keys.seek(0, os.SEEK_END) // KEY_BYTES
            rows.seek(first * self._width * 4)
            rows.write(np.ascontiguousarray(vectors_ND, dtype="<f4").tobytes())
            rows.truncate()
            rows.flush()
            os.fsync(rows.fileno())
            keys.seek(first * KEY_BYTES)
            keys.write(b"".join(_key(context, text) for text in texts))
            keys.flush()
        self._index.update((_key(context, text), first + i) for i, text in enumerate(texts))

    def _read_keys(self) -> None:
        complete = self._rows.stat().st_size // (self._width * 4)
        data = self._keys.read_bytes()
        for row in range(min(len(data) // KEY_BYTES, complete)):
            self._index[data[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = row


def _key(context: tuple[str, ...], text: str) -> bytes:
    return hashlib.blake2b("\0".join((*context, text)).encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system: one process at a time
        return
    fcntl.flock(file, fcntl.LOCK_EX)
