"""Exact search of sparse vectors: a weight for each of few terms of a vocabulary, never negative.

A document's score is the sum over the query's terms of query weight times document weight. It is summed in float64 in order
of the terms and rounded to float32, so it depends on no block, segment or thread. A document that shares no term is no hit.

    sparse.rows.npy                        where each document's terms begin
    sparse.terms.bin  sparse.weights.bin   terms of each document, ascending (uint16, or int32 of large vocabularies); weights
    sparse.starts.npy                      where each term's postings begin
    sparse.documents.bin  sparse.impacts.bin   documents of each term, ascending (int32); the same weights
    sparse.largest.npy                     the largest weight of each term, as stored
    sparse.peaks.rows.npy  sparse.peaks.u8     bounds of a term's weights in each GROUP documents, for frequent terms

Weights are float32, or as the model's ``precision`` says float16 (what it rounds to 0 is no posting) or uint8: then a weight is
1 to 255 times its term's unit (``sparse.units.npy``), the least power of two of which 255 reach the term's largest weight in
the segment. A product with a power of two loses nothing: scores are of the stored weights, and as exact as of any.

N documents, V terms, P postings, Q queries.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from openembed.index.damage import Once, check_kept, check_lists, check_numbered, check_starts, check_within
from openembed.index.dense import best_first
from openembed.index.manifest import ModelInfo, SegmentInfo
from openembed.index.native import postings_library, threads
from openembed.index.postings import Postings
from openembed.index.postings import Searches as Runs
from openembed.index.strings import load_array, map_file, named, save_array

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

LEAST, MOST = 1e-18, 1e18
"""Weights below count as 0, above are refused: so no product of two of them leaves float32."""
NARROW = 1 << 16
PRECISIONS = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "uint8": np.dtype("u1")}
GREATEST = {"float32": MOST, "float16": 65504.0, "uint8": 255 * 2.0**51}
FEW, ROW, APART = 10, 16, 8_192
"""Where no more than one in FEW documents is eligible, they are scored by their own rows if these cost less than the query's
lists. A term of a row costs as much as a posting, and a row as ROW, and one more for each APART documents of the segment:
the more there are, the further away it is."""
GROUP, PEAKED = 8, 8
"""Bounds are kept for so many documents at once, for terms that a GROUP * PEAKED-th of the documents have."""
BOUNDED = 4_096
"""Segments of fewer documents have no bounds: their lists are added up."""
COUNTED = 1 << 24
"""Terms counted at once when postings are written."""
AT_ONCE = 8
"""Queries from which on several threads search."""


def in_rows(vectors_NV: csr_matrix, whose: Callable[[int], str] = "row {}".format) -> csr_matrix:
    """Returns a sparse matrix of any form row by row.

    Raises ``ValueError`` naming a row whose entries do not follow those of the row before: scipy does not, and reads elsewhere.
    """
    if vectors_NV.format in ("csc", "bsr"):
        vectors_NV.check_format(full_check=True)
    rows_NV = vectors_NV.tocsr()
    ends, held = rows_NV.indptr, min(len(rows_NV.indices), len(rows_NV.data))
    wrong_N = ends[1:] < ends[:-1]
    if len(ends) != rows_NV.shape[0] + 1 or ends[0] != 0 or ends[-1] > held or wrong_N.any():
        row = int(np.argmax(wrong_N | (ends[1:] > held))) if len(wrong_N) else 0
        raise ValueError(f"{whose(row)}: its entries lie outside the sparse matrix, indptr is wrong; make the matrix anew")
    return rows_NV


def checked(vectors_NV: csr_matrix, width: int, whose: Callable[[int], str]) -> csr_matrix:
    """Returns sparse vectors in canonical form, float32: terms ascending, each once, zeros left out.

    ``whose`` names a row. Raises ``ValueError`` for another width, for terms that are not in it, and for weights negative, not
    finite or above ``MOST``.
    """
    from scipy import sparse

    if not sparse.issparse(vectors_NV) or vectors_NV.ndim != 2 or vectors_NV.shape[1] != width:
        shape = f" of shape {vectors_NV.shape}" if hasattr(vectors_NV, "shape") else ""
        given = f"{type(vectors_NV).__name__}{shape}"
        raise ValueError(f"got {given} for sparse vectors; this index needs a sparse matrix (count, {width})")
    given = sparse.csr_matrix(in_rows(vectors_NV, whose), dtype=np.float32, copy=True)
    if not len(given.indices) == len(given.data) == given.indptr[-1]:
        given.prune()
    given.sum_duplicates()
    terms = given.indices.view(f"u{given.indices.itemsize}")  # a negative one is greater than any other
    if len(terms) and terms.max() >= width:
        place = int(np.argmax(terms >= width))
        row = int(np.searchsorted(given.indptr, place, side="right")) - 1
        raise ValueError(f"{whose(row)}: its vector has the term {given.indices[place]}; allowed: 0 to {width - 1}")
    bad_P = ~((given.data >= 0) & (given.data <= MOST))
    if bad_P.any():
        row = int(np.searchsorted(given.indptr, np.flatnonzero(bad_P)[0], side="right")) - 1
        raise ValueError(f"{whose(row)}: its vector has the weight {given.data[bad_P][0]}; allowed: 0 to {MOST:g}")
    if len(given.data) and given.data.min() < LEAST:
        given.data[given.data < LEAST] = 0
        given.eliminate_zeros()
    return given


class SparseWriter:
    """Writes sparse vectors, a chunk at a time: rows as they come, postings at the end."""

    def __init__(self, directory: Path, model: ModelInfo) -> None:
        self._directory, self._width, self._precision = directory, model.width, model.precision
        self._ends = [np.zeros(1, dtype=np.int64)]
        self._paths = directory / "sparse.terms.bin", directory / "sparse.weights.bin"
        self._terms, self._weights = (path.open("wb") for path in self._paths)
        self._written = "float32" if model.precision == "uint8" else model.precision  # units are known at the end
        self._largest_V = np.zeros(model.width, dtype=np.float32)

    def add(self, ids: Sequence[str], vectors: csr_matrix) -> None:
        """Appends vectors (N, V); raises ``ValueError`` as ``checked`` does, and for weights that the precision cannot hold."""
        rows = checked(vectors, self._width, lambda row: f"document {ids[row]!r}")
        if rows.shape[0] != len(ids):
            raise ValueError(f"got {rows.shape[0]} vectors for {len(ids)} documents; nothing was added")
        if rows.data.max(initial=0) > GREATEST[self._precision]:
            most = f"{GREATEST[self._precision]:g}".replace("e+", "e")
            raise ValueError(f"a weight is above {most}, the most {self._precision} has; use float32; nothing was added")
        rows.data = rows.data.astype(PRECISIONS[self._written]).astype(np.float32)
        rows.eliminate_zeros()
        if self._precision == "uint8":
            np.maximum.at(self._largest_V, rows.indices, rows.data)
        with named(self._paths[0]):
            self._terms.write(rows.indices.astype(_term_type(self._width)).tobytes())
        with named(self._paths[1]):
            self._weights.write(rows.data.astype(PRECISIONS[self._written]).tobytes())
        self._ends.append(self._ends[-1][-1] + rows.indptr[1:].astype(np.int64))

    def close(self) -> dict[str, object]:
        """Writes where rows begin, and the postings."""
        for path, file in zip(self._paths, (self._terms, self._weights), strict=True):
            with named(path):
                file.close()
        rows = np.concatenate(self._ends)
        save_array(self._directory / "sparse.rows.npy", rows)
        terms = map_file(self._paths[0], _term_type(self._width), (int(rows[-1]),))
        if self._precision == "uint8":
            self._to_bytes(terms)
        weights = map_file(self._paths[1], PRECISIONS[self._precision], (int(rows[-1]),))
        _write_postings(self._directory, rows, terms, weights, self._width)
        return {}

    def _to_bytes(self, terms: np.ndarray) -> None:
        """Puts 1 to 255 times a unit in the place of the weights written."""
        mantissas_V, exponents_V = np.frexp(np.maximum(self._largest_V / np.float32(255), np.float32(LEAST)))
        units_V = np.ldexp(np.float32(1), exponents_V - (mantissas_V == 0.5))
        save_array(self._directory / "sparse.units.npy", units_V)
        path, given = self._paths[1], self._directory / "sparse.weights.f32"
        path.rename(given)
        weights = map_file(given, PRECISIONS["float32"], (len(terms),))
        with named(path), path.open("wb") as file:
            for start in range(0, len(terms), COUNTED):
                part = slice(start, start + COUNTED)
                file.write(np.maximum(np.rint(weights[part] / units_V[terms[part]]), 1).astype(np.uint8).tobytes())
        given.unlink()


def _write_postings(directory: Path, rows: np.ndarray, terms: np.ndarray, weights: np.ndarray, width: int) -> None:
    counts_V, starts = np.zeros(width, dtype=np.int64), np.zeros(width + 1, dtype=np.int64)
    for start in range(0, len(terms), COUNTED):
        counts_V += np.bincount(terms[start : start + COUNTED], minlength=width)
    np.cumsum(counts_V, out=starts[1:])
    documents, impacts = _inverted(rows, terms, weights, starts)
    largest_V = np.zeros(width, dtype=np.float32)
    used = np.flatnonzero(np.diff(starts))
    if len(used):
        largest_V[used] = np.maximum.reduceat(impacts, starts[used])
    save_array(directory / "sparse.starts.npy", starts)
    save_array(directory / "sparse.largest.npy", largest_V)
    for name, values in (("documents", documents), ("impacts", impacts)):
        path = directory / f"sparse.{name}.bin"
        with named(path), path.open("wb") as file:
            file.write(memoryview(values).cast("B") if len(values) else b"")
    _write_peaks(directory, len(rows) - 1, starts, largest_V, documents, impacts)


def _inverted(rows: np.ndarray, terms: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns documents and weights in order of terms, then of documents."""
    library = postings_library()
    if library is None:
        order = np.argsort(terms, kind="stable")
        return np.repeat(np.arange(len(rows) - 1, dtype=np.int32), np.diff(rows))[order], weights[order]
    documents, impacts, ends = np.empty(len(terms), dtype=np.int32), np.empty_like(weights), starts[:-1].copy()
    narrow, size = int(terms.dtype.itemsize == 2), weights.dtype.itemsize
    given = rows.ctypes.data, len(rows) - 1, terms.ctypes.data, weights.ctypes.data, narrow, size
    library.openembed_postings_invert(*given, ends.ctypes.data, documents.ctypes.data, impacts.ctypes.data)
    return documents, impacts


def _write_peaks(
    directory: Path, count: int, starts: np.ndarray, largest_V: np.ndarray, documents: np.ndarray, impacts: np.ndarray
) -> None:
    """Writes for the terms of many documents the largest weight in each GROUP documents, in 1/255 of the term's, rounded up."""
    groups, row_V = -(-count // GROUP), np.full(len(largest_V), -1, dtype=np.int32)
    frequent = np.flatnonzero(np.diff(starts) >= max(1, groups // PEAKED)) if count >= BOUNDED else np.empty(0, np.int64)
    row_V[frequent] = np.arange(len(frequent))
    save_array(directory / "sparse.peaks.rows.npy", row_V)
    path = directory / "sparse.peaks.u8"
    with named(path), path.open("wb") as file:
        for term in frequent:
            part, peaks_G = slice(starts[term], starts[term + 1]), np.zeros(groups, dtype=np.uint8)
            own = documents[part] // GROUP
            firsts = np.flatnonzero(np.diff(own, prepend=-1))
            greatest = np.maximum.reduceat(impacts[part], firsts).astype(np.float64)
            peaks_G[own[firsts]] = np.minimum(np.ceil(greatest / largest_V[term] * 255), 255)
            file.write(peaks_G.tobytes())


def _term_type(width: int) -> np.dtype:
    return np.dtype("<u2") if width <= NARROW else np.dtype("<i4")


def _of_terms(path: Path, dtype: str, width: int) -> np.ndarray:
    array = load_array(path)
    check_kept(path, array, dtype, width)
    return array


class SparseRow(NamedTuple):
    """A document's terms, ascending, and their weights."""

    terms: np.ndarray
    weights: np.ndarray

    def tobytes(self) -> bytes:
        """Returns both, as bytes that are equal where the vectors are."""
        return self.terms.astype("<i4").tobytes() + self.weights.astype("<f4").tobytes()


class SparseField:
    """The sparse vectors of a segment, memory-mapped. Raises ``ValueError`` when a file is missing or damaged."""

    writer = SparseWriter

    def __init__(self, directory: Path, info: SegmentInfo, model: ModelInfo) -> None:
        count, width = info.count, model.width
        self.count, self.width = count, width
        rows, starts = directory / "sparse.rows.npy", directory / "sparse.starts.npy"
        self.rows_N1, self.starts_V1 = load_array(rows), load_array(starts)
        shape, values = (check_starts(rows, self.rows_N1, count),), PRECISIONS[model.precision]
        check_starts(starts, self.starts_V1, width, shape[0])
        scaled = model.precision == "uint8"
        self.largest_V = _of_terms(directory / "sparse.largest.npy", "<f4", width)
        self.units_V = _of_terms(directory / "sparse.units.npy", "<f4", width) if scaled else np.ones(width, dtype=np.float32)
        self.terms = map_file(directory / "sparse.terms.bin", _term_type(width), shape)
        self.weights = map_file(directory / "sparse.weights.bin", values, shape)
        self.documents = map_file(directory / "sparse.documents.bin", np.dtype("<i4"), shape)
        self.impacts = map_file(directory / "sparse.impacts.bin", values, shape)
        self.peak_rows_V = _of_terms(directory / "sparse.peaks.rows.npy", "<i4", width)
        peaked = check_numbered(directory / "sparse.peaks.rows.npy", self.peak_rows_V)
        self.peaks = map_file(directory / "sparse.peaks.u8", np.dtype("u1"), (peaked, -(-count // GROUP)))
        self._lists = Once(directory / "sparse.terms.bin"), Once(directory / "sparse.documents.bin")

    def check(self) -> None:
        """Raises ``ValueError`` naming a file of lists that is damaged; each is read for it once in a process."""
        terms, documents = self._lists
        terms(lambda: check_within(terms.path, self.terms, 0, self.width))
        documents(lambda: check_lists(documents.path, self.documents, self.starts_V1, self.count))

    def empty(self) -> np.ndarray:
        """Returns which documents have no term, bool (N)."""
        return self.rows_N1[1:] == self.rows_N1[:-1]

    def rows(self, positions_P: np.ndarray) -> csr_matrix:
        """Returns the vectors of these documents, float32 (len, V)."""
        from scipy import sparse

        sizes = self.rows_N1[positions_P + 1] - self.rows_N1[positions_P]
        ends = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        places = np.arange(ends[-1]) + np.repeat(self.rows_N1[positions_P] - ends[:-1], sizes)
        terms = self.terms[places].astype(np.int32)
        check_within(self._lists[0].path, terms, 0, self.width)
        parts = self.weights[places].astype(np.float32) * self.units_V[terms], terms, ends
        return sparse.csr_matrix(parts, shape=(len(positions_P), self.width))

    @staticmethod
    def take(vectors: csr_matrix, rows: np.ndarray | slice) -> csr_matrix:
        """Returns rows of a sparse matrix."""
        return vectors[rows]

    @staticmethod
    def join(parts: Sequence[csr_matrix]) -> csr_matrix:
        """Returns sparse matrices one below the other."""
        from scipy import sparse

        return sparse.vstack(parts, format="csr")

    @staticmethod
    def each(vectors: csr_matrix) -> Iterator[SparseRow]:
        """Yields the terms and weights of each document."""
        for low, high in pairwise(vectors.indptr.tolist()):
            yield SparseRow(vectors.indices[low:high], vectors.data[low:high])

    def postings(self, term: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (documents, weights) of a term."""
        part = slice(int(self.starts_V1[term]), int(self.starts_V1[term + 1]))
        return self.documents[part], self.impacts[part].astype(np.float32) * self.units_V[term]

    @cached_property
    def native(self) -> Postings:
        """The lists as the compiled search takes them, but for what is eligible."""
        lists = self.starts_V1, self.documents, self.impacts, self.largest_V, self.units_V
        rows = self.rows_N1, self.terms, self.weights
        peaks = self.peaks.ctypes.data if len(self.peaks) else None
        pointers = [array.ctypes.data for array in (*lists, *rows, self.peak_rows_V)]
        size, narrow = self.weights.dtype.itemsize, int(self.terms.dtype.itemsize == 2)
        return Postings(*pointers, peaks, None, None, self.count, 0, 0, 0, size, narrow)


@dataclass(frozen=True)
class SparseVectors:
    """The sparse vectors of a segment and which of its documents may be found."""

    field: SparseField
    eligible_N: np.ndarray


class Search:
    """Exact search for the ``k`` best eligible documents of these segments; made once, it serves any number of queries.

    Raises ``ValueError`` naming a damaged file.
    """

    def __init__(self, segments: Sequence[SparseVectors], k: int) -> None:
        self._k = k
        for segment in segments:
            segment.field.check()
        library = postings_library()
        parts = [_Part.of(segment) for segment in segments]
        eligible = sum(part.eligible for part in parts)
        self._find: _Numpy | _Compiled
        if library is None or not eligible:
            self._find = _Numpy(parts)
        else:
            self._find = _Compiled(library, parts, min(k, eligible))

    def __call__(self, queries_QV: csr_matrix, id_of: Callable[[int], str]) -> list[list[tuple[int, float]]]:
        """Returns for each query (in canonical form) its best documents as (position, score), best first.

        Positions count through the segments; ties are broken by document id, descending.
        """

        def found(row: int) -> list[tuple[int, float]]:
            part = slice(queries_QV.indptr[row], queries_QV.indptr[row + 1])
            return best_first(*self._find(queries_QV.indices[part], queries_QV.data[part]), self._k, id_of)

        count = queries_QV.shape[0]
        if isinstance(self._find, _Compiled) and count >= AT_ONCE and threads() > 1:
            with ThreadPoolExecutor(threads()) as pool:
                return list(pool.map(found, range(count)))
        return [found(row) for row in range(count)]


class Searches:
    """Searches of the same segments for any ``k``; the last one made is kept. Threads may share it."""

    def __init__(self, segments: Sequence[SparseVectors]) -> None:
        self._segments = segments
        self._made: tuple[int, Search] | None = None

    def __call__(self, queries_QV: csr_matrix, k: int, id_of: Callable[[int], str]) -> list[list[tuple[int, float]]]:
        """Returns what ``Search`` does."""
        made = self._made
        if made is None or made[0] != k:
            made = self._made = k, Search(self._segments, k)
        return made[1](queries_QV, id_of)


@dataclass(frozen=True)
class _Part:
    """A segment, how many of its documents may be found, and which, where they are so few that their rows may cost less."""

    segment: SparseVectors
    eligible: int
    chosen: np.ndarray | None
    cost: int
    """Of the chosen rows, in postings."""

    @classmethod
    def of(cls, segment: SparseVectors) -> _Part:
        field, eligible = segment.field, int(np.count_nonzero(segment.eligible_N))
        if not 0 < eligible * FEW <= field.count:
            return cls(segment, eligible, None, 0)
        chosen = np.flatnonzero(segment.eligible_N)
        terms = int((field.rows_N1[chosen + 1] - field.rows_N1[chosen]).sum())
        return cls(segment, eligible, chosen, terms + eligible * (ROW + field.count // APART))


class _Numpy:
    """Adds up whole lists, or few documents' rows, without a compiler: the same float64 sums, in order of the terms."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts
        self._rows: dict[int, csr_matrix] = {}

    def __call__(self, terms: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions, scores, start = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.float32)], 0
        for number, part in enumerate(self._parts):
            field = part.segment.field
            lists = int((field.starts_V1[terms + 1] - field.starts_V1[terms]).sum())
            by_rows = part.chosen is not None and part.cost < lists + field.count * 3 // 2  # as the compiled search has it
            found, of_found = self._by_rows(number, terms, weights) if by_rows else _by_lists(part.segment, terms, weights)
            positions.append(found + start)
            scores.append(of_found)
            start += field.count
        return np.concatenate(positions), np.concatenate(scores)

    def _by_rows(self, number: int, terms: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = self._parts[number]
        if number not in self._rows:
            self._rows[number] = part.segment.field.rows(part.chosen)
        scores = row_scores(self._rows[number], terms, weights)
        return part.chosen[scores > 0], scores[scores > 0]


def _by_lists(segment: SparseVectors, terms: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sums_N = np.zeros(segment.field.count)
    for term, weight in zip(terms.tolist(), weights, strict=True):
        documents, impacts = segment.field.postings(term)
        sums_N[documents] += impacts.astype(np.float64) * np.float64(weight)
    of_segment = sums_N.astype(np.float32)
    found = np.flatnonzero((of_segment > 0) & segment.eligible_N)
    return found, of_segment[found]


class _Compiled:
    """Finds the k best with ``kernels/postings.c``."""

    def __init__(self, library: ctypes.CDLL, parts: Sequence[_Part], k: int) -> None:
        self._library, self._count = library, len(parts)
        self._parts = parts  # what the library is given points into their files and arrays
        self._eligible = [np.ascontiguousarray(part.segment.eligible_N).view(np.uint8) for part in parts]
        self._segments = (Postings * self._count)(*(part.segment.field.native for part in parts))
        first, fields = 0, [part.segment.field for part in parts]
        for given, eligible_N, part in zip(self._segments, self._eligible, parts, strict=True):
            given.eligible, given.first = eligible_N.ctypes.data, first
            if part.chosen is not None:
                given.chosen, given.chosen_count, given.chosen_cost = part.chosen.ctypes.data, part.eligible, part.cost
            first += given.count
        self.searches = Runs(library, k, max(field.count for field in fields), fields[0].width)

    def __call__(self, terms: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        terms = np.ascontiguousarray(terms, dtype=np.int32)
        return self.searches.run(
            lambda query: self._library.openembed_postings_search(self._segments, self._count, query), terms, weights
        )


def row_scores(rows_NV: csr_matrix, terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns float32 (N,): scores of vectors given as rows, summed in float64 in order of the terms."""
    dense_V = np.zeros(rows_NV.shape[1])
    dense_V[terms] = weights
    return (rows_NV @ dense_V).astype(np.float32)
