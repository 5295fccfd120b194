"""C sources of this package as shared libraries: compiled with the machine's own compiler at first use, kept in the cache.

A file's name holds a hash of sources, compiler, flags and processor, so that a new version or another machine compiles its
own. Nothing is required: whoever asks gets a library, or the reason why there is none. A file ends in the digest of what comes
before, for one cut short (a full disk, a machine that lost power) may load and end the process at its first call.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SWITCH = "OPENEMBED_KERNELS"
"""Set to ``off``, this variable of the environment leaves all compiled code out."""

DIGEST = hashlib.sha256().digest_size
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden", "-fopenmp")


@cache
def compiled(name: str, *sources: str) -> tuple[ctypes.CDLL | None, str]:
    """Returns the library made of ``sources`` (files of this folder), or None and why it cannot be had."""
    if os.environ.get(SWITCH) == "off":
        return None, f"{SWITCH}=off"
    named = shlex.split(os.environ.get("CC", ""))
    compiler = named or [found for found in map(shutil.which, ("cc", "gcc", "clang")) if found][:1]
    if not compiler:
        return None, "there is no C compiler (cc); install gcc"
    folder = Path(__file__).parent
    try:
        path = _cache() / f"{name}-{_key(compiler, sorted(folder.glob('*.h')) + [folder / s for s in sources])}.so"
        return _loaded(path) or _made(compiler, [folder / source for source in sources], path), ""
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip()
        return None, f"{' '.join(compiler)} could not make {name} ({detail.splitlines()[0] if detail else error})"


def _loaded(path: Path) -> ctypes.CDLL | None:
    """The library of the cache; None where there is none, and, with a warning, where it is damaged."""
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        if hashlib.sha256(data[:-DIGEST]).digest() != data[-DIGEST:]:
            raise OSError("it is cut short or changed")
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s cannot be loaded (%s); it is compiled anew", path, error)
        return None


def _made(compiler: list[str], sources: list[Path], path: Path) -> ctypes.CDLL:
    """The library, compiled now."""
    _compile(compiler, sources, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("%s cannot be loaded (%s); slower code without it serves", path, error)
        raise


@cache
def processor_features() -> frozenset[str]:
    """Returns the feature flags of a processor under Linux; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    named = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, ()))


def _cache() -> Path:
    """A folder only this user writes to: what lies there is run."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openembed"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if state.st_uid == os.getuid() and os.access(folder, os.W_OK) and not state.st_mode & 0o022:
            return folder
    except (OSError, RuntimeError, AttributeError):  # no home, or no such thing as a user's id
        pass
    return Path(_private_folder())


@cache
def _private_folder() -> str:
    return tempfile.mkdtemp(prefix="openembed-kernels-")


def _key(compiler: list[str], files: list[Path]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    machine = platform.machine(), sorted(processor_features())
    digest = hashlib.sha256(repr((version, FLAGS, machine, DIGEST)).encode())
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], sources: list[Path], path: Path) -> None:
    """Compiles beside ``path`` and renames, so that several processes may do it at once."""
    logger.info("compiling %s once, into %s", path.name, path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler, *FLAGS, "-o", str(made), *map(str, sources), "-lm"]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        digest = hashlib.sha256(made.read_bytes()).digest()
        with made.open("ab") as file:
            file.write(digest)
        os.replace(made, path)
