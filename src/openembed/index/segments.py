"""One immutable run of documents on disk: their records, ids, vectors and inverted lists.

A segment is a folder written whole before the manifest names it, and never changed after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from openembed.files import fsync_directory
from openembed.index.lexical import Analyzer, Postings, PostingsWriter
from openembed.index.strings import Strings, StringsWriter, load_array, map_file
from openembed.records import Document


class SegmentWriter:
    """Writes documents and their vectors, a chunk at a time, into a fresh folder."""

    def __init__(self, directory: Path, width: int) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.largest_norm = 0.0
        self.ids: list[str] = []
        self.postings = PostingsWriter()
        self._width = width
        self._documents = StringsWriter(directory, "documents")
        self._ids = StringsWriter(directory, "ids")
        self._vectors = (directory / "vectors.f32").open("wb")

    def add(self, documents: Sequence[Document], vectors_ND: np.ndarray, analyze: Analyzer | None) -> None:
        """Appends documents with their vectors (N, width); without ``analyze`` the caller adds the term counts.

        Raises ``ValueError`` for another shape and for a vector that holds NaN or infinity.
        """
        vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        if vectors_ND.shape != (len(documents), self._width):
            raise ValueError(
                f"got vectors of shape {vectors_ND.shape} for {len(documents)} documents; "
                f"this index needs ({len(documents)}, {self._width})"
            )
        bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
        if len(bad):
            raise ValueError(f"document {documents[bad[0]].id!r}: its vector holds NaN or infinity; nothing was added")
        if self._width and len(documents):
            self.largest_norm = max(self.largest_norm, float(np.linalg.norm(vectors_ND, axis=1).max()))
        self._vectors.write(vectors_ND)
        for document in documents:
            self.ids.append(document.id)
            self._ids.append(document.id)
            self._documents.append(_to_json(document))
        if analyze is not None:
            self.postings.add([document.full_text for document in documents], analyze)

    def close(self) -> None:
        """Writes what is left and makes every file durable."""
        self._vectors.close()
        self._documents.close()
        self._ids.close()
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        np.save(self.directory / "ids.order.npy", np.array(order, dtype=np.int64))
        self.postings.write(self.directory)
        for path in self.directory.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(self.directory)


class Segment:
    """A segment opened for reading: memory-mapped, nothing loaded.

    ``live_N`` marks the documents not deleted. Raises ``ValueError`` when a file is missing, truncated or damaged.
    """

    def __init__(self, directory: Path, count: int, width: int, largest_norm: float) -> None:
        self.count = count
        self.largest_norm = largest_norm
        self.ids = Strings(directory, "ids")
        self.postings = Postings(directory)
        self.vectors_ND = map_file(directory / "vectors.f32", np.float32, (count, width))
        self.live_N = np.ones(count, dtype=bool)
        self._order = load_array(directory / "ids.order.npy")
        self._documents = Strings(directory, "documents")
        for name, found in (("ids", len(self.ids)), ("documents", len(self._documents)), ("order", len(self._order))):
            if found != count:
                raise ValueError(f"{directory}: {found} {name} for {count} documents; it is damaged, build the index anew")

    def find(self, identifier: str) -> int | None:
        """Returns the position of the live document ``identifier``, or None."""
        position = self.ids.find(identifier, self._order)
        return position if position is not None and self.live_N[position] else None

    def document(self, position: int) -> Document:
        """Returns one document, read from disk."""
        return Document(**json.loads(self._documents[position]))

    def live_documents(self) -> Iterator[Document]:
        """Yields the live documents in order."""
        for position in np.flatnonzero(self.live_N):
            yield self.document(int(position))


def _to_json(document: Document) -> str:
    fields = {"id": document.id, "title": document.title, "text": document.text, "metadata": document.metadata}
    return json.dumps(fields, ensure_ascii=False)
