"""The compiled scan of int8 codes: built once with the system's C compiler, kept in the user's cache, called with ctypes.

Without a compiler, or with ``OPENEMBED_KERNELS=off``, there is none and the search uses float32 products alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "kernels" / "scan.c"
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")

logger = logging.getLogger(__name__)


@functools.cache
def scan_library() -> ctypes.CDLL | None:
    """Returns the compiled ``scan.c``; None where it cannot be had, which is logged."""
    if os.environ.get("OPENEMBED_KERNELS") == "off":
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        logger.info("no C compiler: dense search uses float32 products")
        return None
    try:
        library = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("the search kernel could not be built, float32 products are used: %s", error)
        return None
    library.openembed_scan.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.openembed_scan.restype = ctypes.c_int
    library.openembed_sketch_scan.argtypes = [ctypes.c_void_p] * 3
    library.openembed_sketch_scan.restype = ctypes.c_int
    sizes = [ctypes.c_int64] * 3
    library.openembed_quantize.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_double, *[ctypes.c_void_p] * 4]
    library.openembed_quantize.restype = ctypes.c_int
    pointers = [ctypes.c_void_p] * 2
    library.openembed_products.argtypes = [*pointers, ctypes.c_int64, *pointers, ctypes.c_int64, ctypes.c_void_p]
    library.openembed_products.restype = None
    return library


def threads() -> int:
    """Returns how many threads to search with: ``OMP_NUM_THREADS``, but no more than the processors given to this process."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(given, int(wanted))) if wanted.isdigit() else given


def _compiled(compiler: str) -> Path:
    """Returns the shared library for this source, these flags and this processor, building it where it is not there."""
    told = "\n".join([SOURCE.read_text(), compiler, *FLAGS, platform.platform(), _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openembed" / "kernels"
    path = folder / f"scan-{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            built = Path(place) / "scan.so"
            command = [compiler, *FLAGS, "-o", str(built), str(SOURCE), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode != 0:
                raise OSError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
            os.replace(built, path)
    return path


def _processor() -> str:
    """Returns what the processor can do: a cache may be shared by machines, and the library is made for one kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
