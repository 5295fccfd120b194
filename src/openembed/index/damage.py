"""Whether the files of a segment are what its search takes them for: compiled code follows their numbers without a check.

What is small is checked when a segment is opened. Lists are read whole for it, so they are checked when a search needs them
first, once in a process however often the segment is opened.

N documents, P postings.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

AT_ONCE = 1 << 18
"""Numbers checked at once: as many as stay in a cache."""
_sound: set[tuple[object, ...]] = set()


class Once:
    """A check of the file ``path``, which is made once in a process; the file is told by its place, its size and its time."""

    def __init__(self, path: Path) -> None:
        try:
            self.path, state = path, path.stat()
        except FileNotFoundError:
            raise ValueError(f"{path}: missing; the index is damaged, build it anew") from None
        self._file = str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns

    def __call__(self, check: Callable[[], None]) -> None:
        """Calls ``check`` unless it has found no fault before."""
        if self._file not in _sound:
            check()
            _sound.add(self._file)


def check_kept(path: Path, array: np.ndarray, dtype: str, count: int) -> None:
    """Raises ``ValueError`` naming the file of an array that is not one row of ``count`` numbers of this type."""
    if array.dtype != np.dtype(dtype) or array.shape != (count,):
        found = f"{array.dtype} {array.shape}"
        raise _damaged(path, f"{found} where {np.dtype(dtype)} {(count,)} is needed")


def check_starts(path: Path, starts: np.ndarray, count: int, last: int | None = None) -> int:
    """Returns the last of ``count`` + 1 places where lists begin; raises ``ValueError`` naming the file unless they are int64,
    begin with 0, end with ``last`` and never fall."""
    check_kept(path, starts, "<i8", count + 1)
    if starts[0] != 0 or (last is not None and starts[-1] != last) or _falls(starts):
        raise _damaged(path, f"it does not rise from 0{'' if last is None else f' to {last:,}'}")
    return int(starts[-1])


def check_numbered(path: Path, rows: np.ndarray) -> int:
    """Returns how many of these are not negative; raises ``ValueError`` naming the file unless those are 0, 1 and so on."""
    used = rows[rows >= 0]
    if (used != np.arange(len(used))).any():
        raise _damaged(path, "its numbers are not 0, 1 and so on")
    return len(used)


def check_within(path: Path, values: np.ndarray, low: int, high: int) -> None:
    """Raises ``ValueError`` naming the file of values of which one is below ``low`` or is not below ``high``."""
    for start in range(0, len(values), AT_ONCE):
        part = values[start : start + AT_ONCE]
        if part.min() < low or part.max() >= high:
            raise _damaged(path, f"a number is not from {low} to {high - 1:,}")


def check_lists(path: Path, documents: np.ndarray, starts: np.ndarray, count: int) -> None:
    """Raises ``ValueError`` naming the file unless each list has documents of ``count``, ascending, each once."""
    check_within(path, documents, 0, count)
    for start in range(0, len(documents) - 1, AT_ONCE):
        part = documents[start : start + AT_ONCE + 1]
        places = np.flatnonzero(part[1:] <= part[:-1]) + (start + 1)
        if (starts[np.searchsorted(starts, places)] != places).any():
            raise _damaged(path, "a list's documents do not ascend")


def _falls(values: np.ndarray) -> bool:
    parts = (values[start : start + AT_ONCE + 1] for start in range(0, len(values), AT_ONCE))
    return any(bool((part[1:] < part[:-1]).any()) for part in parts)


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path}: damaged ({why}); build the index anew")
