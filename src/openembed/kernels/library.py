"""The kernels' shared library: compiled with the machine's own C compiler at first use, kept in the user's cache.

The file's name holds a hash of sources, compiler, flags and processor, so that a new version or another machine compiles
its own. Without a fitting processor or compiler there is no library, and everything runs on torch's kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SWITCH = "OPENEMBED_KERNELS"
"""Set to ``off``, this variable of the environment leaves the library out."""

NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp")


@cache
def library() -> ctypes.CDLL | None:
    """Returns the loaded library, or None where there can be none (:func:`missing` says why)."""
    return None if missing() else _open()[0]


@cache
def missing() -> str:
    """Returns why there is no library; empty where there is one."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH}=off"
    absent = sorted(NEEDED - processor_features())
    if absent:
        return f"this processor lacks {', '.join(absent)}"
    return _open()[1]


def processor_features() -> set[str]:
    """Returns the feature flags of an x86 processor under Linux; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


@cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None, "there is no C compiler (cc); install gcc for faster encoding"
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    try:
        path = _cache() / f"kernels-{_key(compiler, sources)}.so"
        if not path.exists():
            _compile(compiler, [s for s in sources if s.suffix == ".c"], path)
        return ctypes.CDLL(str(path)), ""
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return None, f"{compiler} could not make the kernels ({detail.strip().splitlines()[0] if detail.strip() else error})"


def _cache() -> Path:
    """A folder only this user writes to: what lies there is run."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "openembed"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid == os.getuid() and os.access(folder, os.W_OK) and not folder.stat().st_mode & 0o022:
            return folder
    except OSError:
        pass
    return Path(_private_folder())


@cache
def _private_folder() -> str:
    return tempfile.mkdtemp(prefix="openembed-kernels-")


def _key(compiler: str, sources: list[Path]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((version, FLAGS, platform.machine(), sorted(processor_features()))).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: list[Path], path: Path) -> None:
    """Compiles beside ``path`` and renames, so that several processes may do it at once."""
    logger.info("compiling kernels once, into %s", path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, "-o", str(made), *map(str, sources)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        os.replace(made, path)
