"""Vectors as one byte a component, with a bound on what that loses, and the scan of them for candidates.

N documents, P documents padded to whole groups of 16, G groups, S steps of four components, Q queries, D width.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from openembed.index.native import scan_library, threads

LANES = 16
WIDE = 6
THREADED = 1024
"""Groups that are worth a thread."""
ROUNDING = 1e-4
"""Relative room for float32 rounding in a norm or a residual; 2e-6 of the norms is room for it in a score."""


@dataclass(frozen=True)
class Codes:
    """Documents as the scan reads them: bytes (G, S, 16, 4), each a component + 128, and float32 bounds (3, P).

    ``bounds_3P``: scale, norm, and length of what rounding lost.
    """

    codes_GS: np.ndarray
    bounds_3P: np.ndarray

    def __len__(self) -> int:
        return len(self.codes_GS)


def groups_of(count: int) -> int:
    """Returns how many groups hold ``count`` documents."""
    return -(-count // LANES)


def steps_of(width: int) -> int:
    """Returns how many steps of four components hold ``width``."""
    return -(-width // 4)


def quantize(values_ND: np.ndarray) -> Codes:
    """Returns the codes of float32 vectors (N, D), each with its own scale: the greatest component becomes 127."""
    values_ND = np.ascontiguousarray(values_ND, dtype=np.float32)
    count, width = values_ND.shape
    groups, steps = groups_of(count), steps_of(width)
    bounds_3P = np.zeros((3, groups * LANES), dtype=np.float32)
    library = scan_library()
    if library is not None:
        codes_GS = np.empty((groups, steps, LANES, 4), dtype=np.uint8)
        outputs = (codes_GS.ctypes.data, *(row.ctypes.data for row in bounds_3P))
        if library.openembed_quantize(values_ND.ctypes.data, count, width, steps, ROUNDING, *outputs):
            raise MemoryError("no memory for coding vectors")
        return Codes(codes_GS, bounds_3P)
    codes_ND, bounds_3P[:, :count] = _rounded(values_ND)
    padded_PD = np.full((groups * LANES, steps * 4), 128, dtype=np.uint8)
    padded_PD[:count, :width] = (codes_ND.astype(np.int16) + 128).astype(np.uint8)
    codes_GS = padded_PD.reshape(groups, LANES, steps, 4).transpose(0, 2, 1, 3)
    return Codes(np.ascontiguousarray(codes_GS), bounds_3P)


def _rounded(values_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns int8 (N, D) and float32 (3, N): scale, norm and length of what rounding lost, the last two rounded up."""
    scale_N = np.abs(values_ND).max(axis=1, initial=0.0) / np.float32(127)
    scale_N[scale_N < np.finfo(np.float32).tiny] = 1.0
    whole_ND = np.rint(values_ND / scale_N[:, None])
    wide_ND = values_ND.astype(np.float64)  # in float32 the squares of very small or large components would be 0 or infinite
    norm_N, error_N = (np.linalg.norm(part, axis=1) for part in (wide_ND, wide_ND - whole_ND * scale_N[:, None].astype(float)))
    bounds_3N = np.stack([scale_N, norm_N * (1 + ROUNDING), error_N * (1 + ROUNDING)])
    return whole_ND.astype(np.int8), bounds_3N.astype(np.float32)


class _Documents(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "norm", "error", "eligible", "ranges")),
        *((name, ctypes.c_int64) for name in ("range_count", "steps", "first")),
    )


class _Sketch(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int64 if name in ("steps", "range_count", "count") else ctypes.c_void_p)
        for name in ("codes", "steps", "ranges", "range_count", "order", "eligible", "count")
    )


class _Queries(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "offset", "scale", "inner", "outer", "limit")),
        *((name, ctypes.c_int64) for name in ("count", "width", "k", "capacity")),
        *((name, ctypes.c_void_p) for name in ("positions", "lower", "upper", "filled", "next", "floor", "above", "overflow")),
    )


class CodedQueries:
    """Queries as the scan reads them."""

    def __init__(self, queries_QD: np.ndarray, limit_Q: np.ndarray | None = None) -> None:
        count, width = queries_QD.shape
        codes_QD, (scale_Q, norm_Q, error_Q) = _rounded(queries_QD)
        tile, steps = WIDE if count >= WIDE // 2 else 1, steps_of(width)
        padded_QD = np.zeros((-(-count // tile) * tile, steps * 4), dtype=np.int8)
        padded_QD[:count, :width] = codes_QD
        tiles = padded_QD.view(np.int32).reshape(-1, tile, steps).transpose(0, 2, 1)
        self.count, self.tile = count, tile
        self.codes = np.ascontiguousarray(tiles)
        self.offset_Q = 128 * codes_QD.sum(axis=1, dtype=np.int32)
        self.scale_Q = np.ascontiguousarray(scale_Q)
        self.inner_Q = norm_Q + error_Q
        self.outer_Q = error_Q + np.float32(2e-6) * norm_Q
        self.limit_Q = np.full(count, np.inf, np.float32) if limit_Q is None else np.ascontiguousarray(limit_Q, np.float32)


class Room:
    """One thread's candidates so far."""

    def __init__(self, count: int, k: int, capacity: int) -> None:
        self.positions = np.empty((count, capacity), dtype=np.int32)
        self.lower, self.upper = (np.empty((count, capacity), dtype=np.float32) for _ in range(2))
        self.filled, self.above = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self.next = np.full(count, min(2 * k + 64, capacity - LANES), dtype=np.int64)
        self.floor = np.full(count, np.finfo(np.float32).min, dtype=np.float32)
        self.overflow = np.zeros(count, dtype=np.uint8)


class Scanner:
    """The candidates of some queries among all the codes added: a superset of each query's exact top k.

    With limits, of its top k below the limit. The work is divided over threads, each with its own candidates. Needs the
    compiled kernel (``scan_library``).
    """

    def __init__(self, queries: CodedQueries, k: int) -> None:
        self._queries, self._k, self._capacity = queries, k, capacity(k)
        self._rooms = [Room(queries.count, k, self._capacity)]
        self._library = scan_library()

    def add(self, codes: Codes, eligible_G: np.ndarray, first: int, ranges: np.ndarray | None = None) -> None:
        """Takes in the eligible documents of some groups; ``first`` is the position of the first document of group 0.

        ``eligible_G``: uint16, one bit a document. ``ranges``: int64 (R, 2), groups from and to; None: all.
        """
        parts = _divided(np.array([[0, len(codes)]]) if ranges is None else ranges)
        while len(self._rooms) < len(parts):
            self._rooms.append(Room(self._queries.count, self._k, self._capacity))

        def run(number: int) -> int:
            documents = documents_argument(codes, eligible_G, parts[number], first)
            queries = queries_argument(self._queries, self._k, self._rooms[number])
            return self._library.openembed_scan(documents.pointer, queries.pointer)

        if any(in_parallel(run, len(parts))):
            raise MemoryError("no memory for the candidates of a search")

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns (rows, positions) of all candidates by row, and of each query whether it had more than there is room for,
        so that it must be searched otherwise, and how many documents are surely at or above its limit.
        """
        rows, positions = [], []
        for room in self._rooms:
            held_QC = np.arange(self._capacity) < room.filled[:, None]
            rows.append(np.repeat(np.arange(self._queries.count), room.filled))
            positions.append(room.positions[held_QC].astype(np.int64))
        overflow_Q = np.any([room.overflow for room in self._rooms], axis=0)
        return np.concatenate(rows), np.concatenate(positions), overflow_Q, sum(room.above for room in self._rooms)


@dataclass(frozen=True)
class Argument:
    """A structure for the kernel, with the arrays it points into, which must live as long."""

    structure: ctypes.Structure
    arrays: tuple[np.ndarray, ...]

    @property
    def pointer(self) -> object:
        """What a call is given."""
        return ctypes.byref(self.structure)


def documents_argument(codes: Codes, eligible_G: np.ndarray, ranges: np.ndarray, first: int) -> Argument:
    """Returns what the kernel reads of documents."""
    ranges = np.ascontiguousarray(ranges, dtype=np.int64)
    arrays = (codes.codes_GS, *codes.bounds_3P, eligible_G, ranges)
    return Argument(_Documents(*map(_address, arrays), len(ranges), codes.codes_GS.shape[1], first), arrays)


def sketch_argument(codes_GS: np.ndarray, ranges: np.ndarray, order_P: np.ndarray, mask_N: np.ndarray, some: bool) -> Argument:
    """Returns what the kernel reads of a sketch; ``some``: whether the mask leaves out any, so that it must be read."""
    arrays = (codes_GS, np.ascontiguousarray(ranges, dtype=np.int64), order_P, np.ascontiguousarray(mask_N, dtype=bool))
    codes, ranges_at, order, mask = map(_address, arrays)
    structure = _Sketch(codes, codes_GS.shape[1], ranges_at, len(ranges), order, mask if some else None, len(mask_N))
    return Argument(structure, arrays)


def queries_argument(queries: CodedQueries, k: int, room: Room) -> Argument:
    """Returns what the kernel reads of queries, and where it puts their candidates."""
    given = (queries.codes, queries.offset_Q, queries.scale_Q, queries.inner_Q, queries.outer_Q, queries.limit_Q)
    taken = (room.positions, room.lower, room.upper, room.filled, room.next, room.floor, room.above, room.overflow)
    sizes = (queries.count, queries.tile, k, room.positions.shape[1])
    return Argument(_Queries(*map(_address, given), *sizes, *map(_address, taken)), (*given, *taken))


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def capacity(k: int) -> int:
    """Returns how many candidates a query may have on the way to its top k."""
    return 4 * k + 2048


def eligible_groups(mask_N: np.ndarray) -> np.ndarray:
    """Returns a mask of documents in the order of the codes as uint16 (G), one bit a document."""
    padded_P = np.zeros(groups_of(len(mask_N)) * LANES, dtype=bool)
    padded_P[: len(mask_N)] = mask_N
    return np.packbits(padded_P, bitorder="little").view(np.uint16)


def in_parallel(run: Callable[[int], int], parts: int) -> list[int]:
    """Returns ``run(0)``, ``run(1)``, ..., each in a thread of its own where there are several."""
    return [run(0)] if parts == 1 else list(_pool(parts, os.getpid()).map(run, range(parts)))


@functools.cache
def _pool(size: int, _process: int) -> ThreadPoolExecutor:
    """Returns the threads of a process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(size, thread_name_prefix="openembed-scan")


def _divided(ranges: np.ndarray) -> list[np.ndarray]:
    """Returns the ranges cut into one part a thread of about as many groups each; one part when there is little to do."""
    ranges = np.ascontiguousarray(ranges, dtype=np.int64).reshape(-1, 2)
    ends = np.cumsum(ranges[:, 1] - ranges[:, 0])
    total = int(ends[-1]) if len(ends) else 0
    parts = min(threads(), max(1, total // THREADED))
    if parts == 1:
        return [ranges]
    cut = []
    for number in range(parts):
        low, high = number * total // parts, (number + 1) * total // parts
        first, last = np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high, side="left")
        part = ranges[first : last + 1].copy()
        part[-1, 1] -= ends[last] - high
        part[0, 0] += low - (ends[first] - (ranges[first, 1] - ranges[first, 0]))
        cut.append(part)
    return cut
