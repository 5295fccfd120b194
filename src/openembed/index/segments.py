"""One immutable run of documents on disk: their records, ids, metadata by value, vectors and inverted lists.

A segment is a folder written whole before the manifest names it, and never changed after.

    documents.bin, ids.bin       JSON records and ids; ids.order.npy lists positions in order of the ids
    metadata.*                   see ``columns``
    terms.*, postings.*, lengths see ``lexical``

and of a store's models (see ``fields``):

    vectors.f32                  dense: float32 (N, D)
    codes.u8, codes.bounds.f32   the vectors as bytes and what that loses (see ``codes``)
    sketch.*                     of a segment of ``fields.SKETCHED`` documents or more (see ``sketch``)
    sparse.*                     see ``sparse``
    tokens.*, residuals.*        see ``tokens.files``
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openembed.files import fsync_directory
from openembed.index.columns import ColumnsWriter, SegmentColumns
from openembed.index.fields import FIELDS, Field, FieldWriter, Vectors
from openembed.index.filters import Filter, holds
from openembed.index.lexical import Analyzer, Postings, PostingsWriter
from openembed.index.manifest import Kind, ModelInfo, SegmentInfo
from openembed.index.strings import Strings, StringsWriter, load_array, save_array
from openembed.records import Document

ROWS = 1024

logger = logging.getLogger(__name__)


class SegmentWriter:
    """Writes documents and their vectors, a chunk at a time, into a fresh folder."""

    def __init__(self, directory: Path, models: Sequence[ModelInfo]) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.ids: list[str] = []
        self.postings = PostingsWriter()
        self._documents = StringsWriter(directory, "documents")
        self._ids = StringsWriter(directory, "ids")
        self._columns = ColumnsWriter()
        self._fields: dict[Kind, FieldWriter] = {m.kind: FIELDS[m.kind].writer(directory, m) for m in models}
        self._said: dict[str, object] = {"columns": True}

    def add(self, documents: Sequence[Document], vectors: Mapping[Kind, Vectors], analyze: Analyzer | None) -> None:
        """Appends documents with their vectors of each kind; without ``analyze`` the caller adds the term counts.

        Raises ``ValueError`` as the writers of ``fields`` do.
        """
        for kind, field in self._fields.items():
            field.add([document.id for document in documents], vectors[kind])
        for document in documents:
            self.ids.append(document.id)
            self._columns.add(document.metadata)
            self._ids.append(document.id)
            self._documents.append(_to_json(document))
        if analyze is not None:
            self.postings.add([document.full_text for document in documents], analyze)

    def close(self) -> None:
        """Writes what is left and makes every file durable."""
        for field in self._fields.values():
            self._said |= field.close()
        self._documents.close()
        self._ids.close()
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        save_array(self.directory / "ids.order.npy", np.array(order, dtype=np.int64))
        self._columns.write(self.directory)
        self.postings.write(self.directory)
        for path in self.directory.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(self.directory)

    def info(self, name: str) -> SegmentInfo:
        """Returns what the manifest says of this segment."""
        return SegmentInfo(name=name, count=len(self.ids), **self._said)


class Segment:
    """A segment opened for reading: memory-mapped, nothing loaded.

    ``live_N`` marks the documents not deleted. Raises ``ValueError`` when a file is missing, truncated or damaged.
    """

    def __init__(self, directory: Path, info: SegmentInfo, models: Sequence[ModelInfo]) -> None:
        self.directory = directory
        self.count = count = info.count
        self.ids = Strings(directory, "ids")
        self.postings = Postings(directory)
        self.fields: dict[Kind, Field] = {model.kind: FIELDS[model.kind](directory, info, model) for model in models}
        self.columns = SegmentColumns(directory) if info.columns else None
        self.live_N = np.ones(count, dtype=bool)
        self._order = load_array(directory / "ids.order.npy")
        self._documents = Strings(directory, "documents")
        counts = {"ids": len(self.ids), "documents": len(self._documents), "order": len(self._order)}
        counts |= {"lengths": len(self.postings.lengths_N), "metadata": self.columns.count if self.columns else count}
        for name, found in counts.items():
            if found != count:
                raise ValueError(f"{directory}: {found} {name} for {count} documents; it is damaged, build the index anew")

    def find(self, identifier: str) -> int | None:
        """Returns the position of the live document ``identifier``, or None."""
        position = self.ids.find(identifier, self._order)
        return position if position is not None and self.live_N[position] else None

    def document(self, position: int) -> Document:
        """Returns one document, read from disk."""
        return Document(**json.loads(self._documents[position]))

    def matching(self, condition: Filter) -> np.ndarray:
        """Returns bool (N): the documents for which the condition holds, deleted ones among them."""
        if self.columns is not None:
            return condition.matching(self.columns)
        logger.warning("%s: made by an older version, every document is read to filter; compact the index", self.directory)
        return np.array([holds(condition, self.document(position)) for position in range(self.count)], dtype=bool)

    def live_documents(self) -> Iterator[Document]:
        """Yields the live documents in order."""
        for position in np.flatnonzero(self.live_N):
            yield self.document(int(position))

    def live_rows(self, kind: Kind) -> Iterator[tuple[Document, Any]]:
        """Yields the live documents with their vectors of a kind, in order."""
        live = np.flatnonzero(self.live_N)
        for start in range(0, len(live), ROWS):
            positions = live[start : start + ROWS]
            vectors = FIELDS[kind].each(self.fields[kind].rows(positions))
            yield from zip(map(self.document, positions.tolist()), vectors, strict=True)


def _to_json(document: Document) -> str:
    fields = {"id": document.id, "title": document.title, "text": document.text, "metadata": document.metadata}
    return json.dumps(fields, ensure_ascii=False)
