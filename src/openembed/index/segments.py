"""One immutable run of documents on disk: their records, ids, metadata by value, vectors, codes and inverted lists.

A segment is a folder written whole before the manifest names it, and never changed after.

    documents.bin, ids.bin       JSON records and ids; ids.order.npy lists positions in order of the ids
    metadata.*                   see ``columns``
    vectors.f32                  float32 (N, D)
    codes.u8, codes.bounds.f32   the vectors as bytes and what that loses (see ``codes``)
    sketch.*                     of a segment of SKETCHED documents or more (see ``sketch``)
    terms.*, postings.*, lengths see ``lexical``
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from openembed.files import fsync_directory
from openembed.index.codes import LANES, Codes, groups_of, quantize, steps_of
from openembed.index.columns import ColumnsWriter, SegmentColumns
from openembed.index.filters import Filter, holds
from openembed.index.lexical import Analyzer, Postings, PostingsWriter
from openembed.index.manifest import SegmentInfo
from openembed.index.sketch import Sketch, map_sketch, write_sketch
from openembed.index.strings import Strings, StringsWriter, load_array, map_file, named, save_array
from openembed.progress import progress
from openembed.records import Document

CODED_AT_ONCE = 16_384
SKETCHED = 200_000
"""A segment of so many documents is prepared for approximate search; below it, exact search takes a few milliseconds."""

logger = logging.getLogger(__name__)


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
        self._columns = ColumnsWriter()
        self._vectors_path = directory / "vectors.f32"
        self._vectors = self._vectors_path.open("wb")

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
        with named(self._vectors_path):
            self._vectors.write(vectors_ND)
        for document in documents:
            self.ids.append(document.id)
            self._columns.add(document.metadata)
            self._ids.append(document.id)
            self._documents.append(_to_json(document))
        if analyze is not None:
            self.postings.add([document.full_text for document in documents], analyze)

    def close(self) -> None:
        """Writes what is left and makes every file durable."""
        with named(self._vectors_path):
            self._vectors.close()
        self._documents.close()
        self._ids.close()
        order = sorted(range(len(self.ids)), key=self.ids.__getitem__)
        save_array(self.directory / "ids.order.npy", np.array(order, dtype=np.int64))
        self._columns.write(self.directory)
        self.postings.write(self.directory)
        if self._width:
            vectors_ND = map_file(self._vectors_path, np.float32, (len(self.ids), self._width))
            write_codes(self.directory, vectors_ND)
            if len(self.ids) >= SKETCHED:
                with progress("cluster", len(self.ids), "documents") as advance:
                    write_sketch(self.directory, vectors_ND, advance)
        for path in self.directory.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(self.directory)

    def info(self, name: str) -> SegmentInfo:
        """Returns what the manifest says of this segment."""
        parts = {"coded": self._width > 0, "columns": True, "sketch": self._width > 0 and len(self.ids) >= SKETCHED}
        return SegmentInfo(name=name, count=len(self.ids), largest_norm=self.largest_norm, **parts)


class Segment:
    """A segment opened for reading: memory-mapped, nothing loaded.

    ``live_N`` marks the documents not deleted. Raises ``ValueError`` when a file is missing, truncated or damaged.
    """

    def __init__(self, directory: Path, info: SegmentInfo, width: int) -> None:
        self.directory = directory
        self.count = count = info.count
        self.largest_norm = info.largest_norm
        self.ids = Strings(directory, "ids")
        self.postings = Postings(directory)
        self.vectors_ND = map_file(directory / "vectors.f32", np.float32, (count, width))
        self.codes = map_codes(directory, count, width) if info.coded else None
        self.sketch: Sketch | None = map_sketch(directory, count, width) if info.sketch else None
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

    def live_rows(self) -> Iterator[tuple[Document, np.ndarray]]:
        """Yields the live documents with their vectors, float32 (width,), in order."""
        for position in np.flatnonzero(self.live_N):
            yield self.document(int(position)), np.array(self.vectors_ND[position])


def write_codes(directory: Path, vectors_ND: np.ndarray) -> None:
    """Writes the codes of a segment's vectors, a block at a time."""
    path, bounds = directory / "codes.u8", []
    with named(path), path.open("wb") as file:
        for start in range(0, len(vectors_ND), CODED_AT_ONCE):
            codes = quantize(vectors_ND[start : start + CODED_AT_ONCE])
            file.write(memoryview(codes.codes_GS).cast("B"))
            bounds.append(codes.bounds_3P)
    path = directory / "codes.bounds.f32"
    with named(path), path.open("wb") as file:
        file.write(np.concatenate(bounds, axis=1).tobytes() if bounds else b"")


def map_codes(directory: Path, count: int, width: int) -> Codes:
    """Returns the memory-mapped codes; raises ``ValueError`` when a file is missing or its size is wrong."""
    groups = groups_of(count)
    codes_GS = map_file(directory / "codes.u8", np.uint8, (groups, steps_of(width), LANES, 4))
    return Codes(codes_GS, map_file(directory / "codes.bounds.f32", np.float32, (3, groups * LANES)))


def _to_json(document: Document) -> str:
    fields = {"id": document.id, "title": document.title, "text": document.text, "metadata": document.metadata}
    return json.dumps(fields, ensure_ascii=False)
