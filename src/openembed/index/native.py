"""The compiled searches of codes and of inverted lists, called with ctypes.

Without a compiler, or with ``OPENEMBED_KERNELS=off``, there are none, and numpy searches as exactly.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os

from openembed.kernels.compile import compiled

logger = logging.getLogger(__name__)


@functools.cache
def scan_library() -> ctypes.CDLL | None:
    """Returns the compiled ``scan.c``; None where it cannot be had, which is logged."""
    library, reason = compiled("scan", "scan.c")
    if library is None:
        logger.info("dense search uses float32 products: %s", reason)
        return None
    library.openembed_scan.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.openembed_scan.restype = ctypes.c_int
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.openembed_sketch_scan.argtypes = [pointer, pointer, whole, pointer, pointer]
    library.openembed_sketch_scan.restype = whole
    library.openembed_sketch_scores.argtypes = [pointer, pointer, whole, whole, pointer]
    library.openembed_sketch_scores.restype = None
    sizes = [ctypes.c_int64] * 3
    library.openembed_quantize.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_double, *[ctypes.c_void_p] * 4]
    library.openembed_quantize.restype = ctypes.c_int
    pointers = [ctypes.c_void_p] * 2
    library.openembed_products.argtypes = [*pointers, ctypes.c_int64, *pointers, ctypes.c_int64, ctypes.c_void_p]
    library.openembed_products.restype = None
    return library


@functools.cache
def postings_library() -> ctypes.CDLL | None:
    """Returns the compiled ``postings.c``; None where it cannot be had, which is logged."""
    library, reason = compiled("postings", "postings.c")
    if library is None:
        logger.info("sparse and BM25 search use numpy: %s", reason)
        return None
    for function in (library.openembed_postings_search, library.openembed_bm25_search):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
        function.restype = ctypes.c_int
    library.openembed_postings_room.argtypes = [ctypes.c_int64] * 2
    library.openembed_postings_room.restype = ctypes.c_int64
    arrays, flags = [ctypes.c_void_p] * 2, [ctypes.c_int32] * 2
    library.openembed_postings_invert.argtypes = [ctypes.c_void_p, ctypes.c_int64, *arrays, *flags, *[ctypes.c_void_p] * 3]
    library.openembed_postings_invert.restype = None
    return library


def threads() -> int:
    """Returns how many threads to search with: ``OMP_NUM_THREADS``, but no more than the processors given to this process."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(given, int(wanted))) if wanted.isdigit() else given
