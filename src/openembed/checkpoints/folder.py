"""A folder that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openembed.files import exchange, fsync_directory


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that takes its place when the block ends well.

    A crash leaves what was at ``path`` before, or the new folder, never a mixture. What may be replaced is the caller's to say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        _flush(temporary)
        _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    fsync_directory(folder)


def _swap(new: Path, path: Path) -> None:
    """Puts ``new`` at ``path``; an older folder there is exchanged in one step where the system can do that.

    Elsewhere it is moved out of the way first, and a crash between the two renames leaves it as ``.NAME.*.old``.
    """
    old = new.with_suffix(".old")
    if path.exists() and not exchange(new, path):
        os.rename(path, old)
        try:
            os.rename(new, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    elif new.exists() and not path.exists():
        os.rename(new, path)
    fsync_directory(path.parent)
