"""Searches of inverted lists by ``kernels/postings.c``, called with ctypes: structures as there, and room for what is found."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

LISTS = "starts", "documents", "weights", "largest", "units"
POINTERS = *LISTS, "rows", "terms", "row_weights", "peak_rows", "peaks", "eligible", "chosen"


class Postings(ctypes.Structure):
    """A segment's sparse vectors."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in ("count", "first", "chosen_count", "chosen_cost")),
        ("bytes", ctypes.c_int32),
        ("narrow", ctypes.c_int32),
    ]


class WordList(ctypes.Structure):
    """The documents of a term, for BM25."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("documents", "counts", "ones")] + [
        ("size", ctypes.c_int64),
        ("idf", ctypes.c_double),
    ]


class Words(ctypes.Structure):
    """A segment's lists of the terms of a query, for BM25."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("lists", "lengths", "penalties", "eligible")] + [
        (name, ctypes.c_int64) for name in ("list_count", "count", "first", "tabled")
    ]


class _Query(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("terms", "weights", "dense", "room")),
        *((name, ctypes.c_int64) for name in ("count", "k", "capacity", "filled")),
        *((name, ctypes.c_void_p) for name in ("positions", "scores", "best")),
        *((name, ctypes.c_int64) for name in ("bests", "touched", "rescored")),
        ("floor", ctypes.c_float),
    ]


class Searches(threading.local):
    """Runs searches of ``k`` documents; every thread has its own room, made once.

    ``width``: terms that documents may have; ``most``: documents of the largest segment. ``touched`` and ``rescored`` count
    the postings and documents that the last search looked at.
    """

    def __init__(self, library: ctypes.CDLL, k: int, most: int, width: int = 0) -> None:
        self._library, self._k, self._most = library, k, most
        self._dense_V, self._best_K = np.zeros(width, dtype=np.float32), np.empty(k, dtype=np.float32)
        self._room = np.empty(0, dtype=np.uint8)
        self._capacity = 4 * k + 1024
        self.touched = self.rescored = 0

    def run(
        self, call: Callable[[Any], int], terms: np.ndarray | None = None, weights: np.ndarray | None = None, lists: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns (positions, scores) of the k best and whatever ties with the last; repeated with more room where needed.

        ``call`` takes the query's structure. A query is its ``terms`` (int32) and ``weights`` (float32), or ``lists`` lists.
        """
        count = lists if terms is None else len(terms)
        needed = int(self._library.openembed_postings_room(self._most, count))
        if len(self._room) < needed:
            self._room = np.empty(needed, dtype=np.uint8)
        given = [None if array is None else array.ctypes.data for array in (terms, weights)]
        given += [self._dense_V.ctypes.data, self._room.ctypes.data]
        while True:
            positions, scores = np.empty(self._capacity, dtype=np.int64), np.empty(self._capacity, dtype=np.float32)
            found = [array.ctypes.data for array in (positions, scores, self._best_K)]
            query = _Query(*given, count, self._k, self._capacity, 0, *found, 0, 0, 0, 0.0)
            if not call(ctypes.byref(query)):
                break
            self._capacity *= 8
        self.touched, self.rescored = query.touched, query.rescored
        kept = scores[: query.filled] >= query.floor
        return positions[: query.filled][kept], scores[: query.filled][kept]
