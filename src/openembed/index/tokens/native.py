"""The compiled kernels of token vectors, called with ctypes; without a compiler numpy does the same.

``OPENEMBED_KERNELS=off`` leaves them out.
"""

from __future__ import annotations

import ctypes
import functools
import logging

import numpy as np

from openembed.kernels.compile import compiled

COUNTING = ("residuals_runs", "residuals_dots", "products_tally")

logger = logging.getLogger(__name__)


@functools.cache
def token_library() -> ctypes.CDLL | None:
    """Returns the compiled ``tokens.c`` and ``residuals.c``; None where they cannot be had, which is logged."""
    library, reason = compiled("tokens", "tokens.c", "residuals.c")
    if library is None:
        logger.info("token vectors are searched with numpy: %s", reason)
        return None
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    takes = {
        "tokens_scan": (pointer, pointer, pointer, integer, pointer),
        "tokens_exact": (pointer, pointer, pointer, integer, pointer),
        "tokens_retrieve": (pointer, pointer, pointer, integer, pointer),
        "tokens_products": (pointer, pointer, pointer, pointer, integer, pointer),
        "tokens_code": (pointer, integer, integer, integer, pointer, pointer, pointer, pointer),
        "tokens_assign": (pointer, pointer, integer, pointer, pointer),
        "residuals_pack": (pointer, pointer, integer, pointer, pointer, pointer),
        "residuals_values": (pointer, pointer, integer, pointer),
        "residuals_maxsim": (pointer, pointer, integer, pointer, integer, pointer),
        "residuals_near": (pointer, pointer, integer, pointer, integer, pointer),
        "residuals_dots": (pointer, pointer, pointer, pointer, integer, pointer, pointer, pointer),
        "residuals_runs": (pointer, pointer, pointer),
        "products_tally": (pointer, pointer, pointer, integer, pointer, pointer),
        "fixed_encodings": (pointer, pointer, integer, pointer, pointer),
    }
    for name, types in takes.items():
        function = getattr(library, f"openembed_{name}")
        function.argtypes = types
        function.restype = integer if name in COUNTING else ctypes.c_int
    return library


def address(array: np.ndarray | None) -> int | None:
    """Returns where an array's values are; it must be contiguous."""
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


def structure(name: str, pointers: str, integers: str) -> type[ctypes.Structure]:
    """Returns a ctypes structure of pointers and then int64 fields, named in strings."""
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in integers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def check(result: int) -> None:
    """Raises ``MemoryError`` for a kernel that found no memory."""
    if result:
        raise MemoryError("no memory for a search's working space")
