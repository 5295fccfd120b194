"""Reading and writing files so that nothing half-written is taken for whole and a bad line is named."""

from __future__ import annotations

import ctypes
import errno
import gzip
import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Yields a file that replaces ``path`` only when the block ends well; on any error ``path`` stays as it was.

    The bytes are flushed to the disk before the rename, so a crash leaves either the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    encoding = None if "b" in mode else "utf-8"
    try:
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


def remove_temporary(directory: Path) -> None:
    """Removes what a killed process left unfinished in ``directory``; only while no one else writes there."""
    for path in directory.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def append_synced(file: Any, data: bytes, path: Path) -> None:
    """Writes all of ``data`` to an unbuffered ``file`` and waits until it is on the disk; an error names ``path``."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror, str(path)) from error


def whole_lines(path: Path) -> list[bytes]:
    """Returns the lines of a file with their ends; a last one without its end was torn by a crash and is left out."""
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def fsync_directory(path: Path) -> None:
    """Makes renames inside ``path`` durable, where the system allows opening a directory."""
    with suppress(OSError, AttributeError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def exchange(first: str | Path, second: str | Path) -> bool:
    """Swaps two existing paths in one atomic step; returns False, having done nothing, where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), swap) == 0


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented UTF-8 JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """Returns the parsed file; raises ``ValueError`` naming file and position when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Restore the file or write it anew.") from None


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yields ``(line number, line without its end)`` of a (gzipped) UTF-8 file; a leading byte-order mark is dropped.

    Raises ``ValueError`` naming file and line for broken UTF-8 or a damaged gzip stream. Lines are decoded one by one:
    a text reader decodes blocks and would name a line before the broken one.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    number = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: cannot be read ({error}); the file is damaged") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(line number, object)`` for each non-empty line of a (gzipped) JSON-lines file.

    Raises ``ValueError`` naming file and line for malformed JSON, a line that is no object, or broken UTF-8 or gzip.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_object(path, number, line)


def parse_value(path: str | Path, number: int, line: str) -> Any:
    """Returns the JSON value of one line; raises ``ValueError`` naming file and line when it is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: malformed JSON ({error.msg} at column {error.colno})") from None


def parse_object(path: str | Path, number: int, line: str) -> dict[str, Any]:
    """Returns the JSON object of one line; raises ``ValueError`` naming file and line when it is none."""
    value = parse_value(path, number, line)
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object a line, got {type(value).__name__}")
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
