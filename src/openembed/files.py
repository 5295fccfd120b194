"""Reading and writing files so that nothing half-written is taken for whole and a bad line is named."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
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


def fsync_directory(path: Path) -> None:
    """Makes renames inside ``path`` durable, where the system allows opening a directory."""
    with suppress(OSError, AttributeError):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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


def open_text(path: str | Path) -> IO[str]:
    """Opens a text file for reading as UTF-8, unpacking ``.gz``."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields ``(line number, object)`` for each non-empty line of a (gzipped) JSON-lines file.

    Raises ``ValueError`` naming file and line for malformed JSON, a line that is no object, or broken UTF-8 or gzip.
    """
    number = 0
    with open_text(path) as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse_object(path, number, line)
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{path}:{number + 1}: cannot be read ({error}); the file is damaged or not UTF-8"
            ) from None


def _parse_object(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number}: malformed JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}:{number}: expected a JSON object a line, got {type(value).__name__}")
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
