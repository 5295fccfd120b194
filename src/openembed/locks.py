"""One writer at a time for a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Holds ``directory/.lock`` while the block runs; raises ``ValueError`` at once when another writer holds it.

    The lock belongs to the open file, so the system releases it when its holder dies, by whatever signal.
    """
    import fcntl

    path = directory / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ValueError(
                f"{directory}: another writer is at work (process {holder}); wait until it ends and run again"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)
