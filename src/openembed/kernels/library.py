"""The library of the encoding kernels, where the processor has what they are written for."""

from __future__ import annotations

import ctypes

from openembed.kernels.compile import compiled, processor_features

SOURCES = ("linear.c", "attention.c", "vocabulary.c", "scratch.c")
NEEDED = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"})


def library() -> ctypes.CDLL | None:
    """Returns the library, or None where there can be none (:func:`missing` says why); then torch's kernels serve."""
    return None if missing() else compiled("encode", *SOURCES)[0]


def missing() -> str:
    """Returns why there is no library; empty where there is one."""
    absent = sorted(NEEDED - processor_features())
    _, reason = compiled("encode", *SOURCES) if not absent else (None, "")
    return f"this processor lacks {', '.join(absent)}" if absent else reason
