"""The kinds of vectors that a segment may hold, each behind the same few calls: writing, opening, giving rows back.

A store has at most one model of each kind. What a kind keeps on the disk, and how it is searched, is its own affair; the
writer and the reader of segments, merging and updating know only what is here. Another kind is another class in ``FIELDS``.

N documents, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from openembed.index.codes import LANES, Codes, groups_of, quantize, steps_of
from openembed.index.manifest import Kind, ModelInfo, SegmentInfo
from openembed.index.sketch import VERSION, Sketch, map_sketch, write_sketch
from openembed.index.sparse import SparseField
from openembed.index.strings import map_file, named
from openembed.index.tokens.field import TokenField
from openembed.progress import progress

CODED_AT_ONCE = 16_384
SKETCHED = 200_000
"""A segment of so many documents is prepared for approximate search; below it, exact search takes a few milliseconds."""

Vectors = Any
"""Of N documents: ``np.ndarray`` (N, D) of dense ones, ``csr_matrix`` (N, V) of sparse ones, ``TokenVectors`` of a vector a
token."""


class FieldWriter(Protocol):
    """Writes the vectors of one kind of a fresh segment."""

    def __init__(self, directory: Path, model: ModelInfo) -> None: ...

    def add(self, ids: Sequence[str], vectors: Vectors) -> None:
        """Appends the vectors of these documents; raises ``ValueError`` naming a document whose vector cannot be kept."""

    def close(self) -> dict[str, Any]:
        """Writes what is left; returns what the manifest is to say of it, settings of ``SegmentInfo``."""
        ...


class Field(Protocol):
    """The vectors of one kind of a segment, memory-mapped; raises ``ValueError`` for a missing or damaged file."""

    writer: ClassVar[type]

    def __init__(self, directory: Path, info: SegmentInfo, model: ModelInfo) -> None: ...

    def empty(self) -> np.ndarray:
        """Returns which documents have nothing that a search could find them by, bool (N)."""
        ...

    def rows(self, positions_P: np.ndarray) -> Vectors:
        """Returns the vectors of these documents, as they can be added again."""
        ...

    @staticmethod
    def take(vectors: Vectors, rows: np.ndarray | slice) -> Vectors:
        """Returns some of ``vectors``."""
        ...

    @staticmethod
    def join(parts: Sequence[Vectors]) -> Vectors:
        """Returns vectors one after the other."""
        ...

    @staticmethod
    def each(vectors: Vectors) -> Iterator[Any]:
        """Yields the vector of each document."""
        ...


class DenseWriter:
    """Writes float32 vectors, their codes, and of a large segment their sketch."""

    def __init__(self, directory: Path, model: ModelInfo) -> None:
        self._directory, self._width = directory, model.width
        self._path = directory / "vectors.f32"
        self._file = self._path.open("wb")
        self._count, self._largest_norm = 0, 0.0

    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Appends vectors (N, D); raises ``ValueError`` for another shape and for one that holds NaN or infinity."""
        vectors_ND = np.ascontiguousarray(vectors, dtype=np.float32)
        if vectors_ND.shape != (len(ids), self._width):
            raise ValueError(
                f"got vectors of shape {vectors_ND.shape} for {len(ids)} documents; "
                f"this index needs ({len(ids)}, {self._width})"
            )
        bad = np.flatnonzero(~np.isfinite(vectors_ND).all(axis=1))
        if len(bad):
            raise ValueError(f"document {ids[bad[0]]!r}: its vector holds NaN or infinity; nothing was added")
        if len(ids):
            self._largest_norm = max(self._largest_norm, float(np.linalg.norm(vectors_ND, axis=1).max()))
        with named(self._path):
            self._file.write(vectors_ND)
        self._count += len(ids)

    def close(self) -> dict[str, Any]:
        """Writes codes and sketch."""
        with named(self._path):
            self._file.close()
        vectors_ND = map_file(self._path, np.float32, (self._count, self._width))
        write_codes(self._directory, vectors_ND)
        sketched = self._count >= SKETCHED
        if sketched:
            with progress("cluster", self._count, "documents") as advance:
                write_sketch(self._directory, vectors_ND, advance)
        return {"coded": True, "sketch": VERSION if sketched else 0, "largest_norm": self._largest_norm}


class DenseField:
    """The float32 vectors of a segment, with their codes and sketch where there are."""

    writer = DenseWriter

    def __init__(self, directory: Path, info: SegmentInfo, model: ModelInfo) -> None:
        shape = info.count, model.width
        self.largest_norm = info.largest_norm
        self.vectors_ND = map_file(directory / "vectors.f32", np.float32, shape)
        self.codes = map_codes(directory, *shape) if info.coded else None
        self.sketch: Sketch | None = map_sketch(directory, *shape) if info.sketch == VERSION else None

    def empty(self) -> np.ndarray:
        """Returns False of each document: every one has a place in the space."""
        return np.zeros(len(self.vectors_ND), dtype=bool)

    def rows(self, positions_P: np.ndarray) -> np.ndarray:
        """Returns float32 (P, D)."""
        return self.vectors_ND[positions_P]

    @staticmethod
    def take(vectors: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        """Returns rows of a matrix."""
        return vectors[rows]

    @staticmethod
    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        """Returns matrices one below the other."""
        return np.concatenate(parts)

    @staticmethod
    def each(vectors: np.ndarray) -> Iterator[np.ndarray]:
        """Yields float32 (D,)."""
        return iter(np.array(vectors))


FIELDS: Mapping[Kind, type[Field]] = {"dense": DenseField, "sparse": SparseField, "tokens": TokenField}


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
