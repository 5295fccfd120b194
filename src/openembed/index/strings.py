"""Strings on disk, memory-mapped: fetched one by one by position, or found by binary search when sorted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np


class StringsWriter:
    """Appends strings to ``NAME.bin``; ``close`` adds ``NAME.starts.npy`` (int64, count + 1)."""

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / f"{name}.bin"
        self._file: IO[bytes] = self._path.open("wb")
        self._starts_path = directory / f"{name}.starts.npy"
        self._starts = [0]

    def append(self, text: str) -> None:
        """Writes one string (any characters but lone surrogates; NUL and newlines are plain characters here)."""
        with named(self._path):
            self._starts.append(self._starts[-1] + self._file.write(text.encode("utf-8")))

    def close(self) -> None:
        """Closes the files."""
        with named(self._path):
            self._file.close()
        save_array(self._starts_path, np.array(self._starts, dtype=np.int64))


def write_strings(directory: Path, name: str, texts: Iterable[str]) -> None:
    """Writes ``texts`` as the strings ``name`` of ``directory``."""
    writer = StringsWriter(directory, name)
    for text in texts:
        writer.append(text)
    writer.close()


class Strings:
    """The strings written by ``StringsWriter``; only those asked for are read.

    Raises ``ValueError`` when a file is missing or shorter than its table of starts says.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._starts = load_array(directory / f"{name}.starts.npy")
        self._bytes = memoryview(map_file(directory / f"{name}.bin", np.uint8, (int(self._starts[-1]),)))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, position: int) -> str:
        return self._raw(position).decode("utf-8")

    def _raw(self, position: int) -> bytes:
        return bytes(self._bytes[self._starts[position] : self._starts[position + 1]])

    def rank(self, text: str, side: Callable[..., int], low: int, high: int) -> int:
        """Returns where ``text`` would go (``bisect_left``, ``bisect_right``) in positions ``low`` to ``high``, sorted."""
        return side(range(len(self)), text.encode("utf-8"), low, high, key=self._raw)

    def find(self, text: str, order: np.ndarray | None = None) -> int | None:
        """Returns the position of ``text`` or None; ``order`` lists the positions sorted by string (None: they are)."""
        wanted = text.encode("utf-8")

        def key(rank: int) -> bytes:
            return self._raw(rank if order is None else int(order[rank]))

        rank = bisect_left(range(len(self)), wanted, key=key)
        if rank == len(self) or key(rank) != wanted:
            return None
        return rank if order is None else int(order[rank])


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a ``.npy`` file; an error, such as a full disk, names it (``numpy.save`` loses the system's reason)."""
    with named(path), path.open("wb") as file:
        write_array(file, array)


def write_array(file: IO[bytes], array: np.ndarray) -> None:
    """Writes an array in ``.npy`` form."""
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(memoryview(np.ascontiguousarray(array).reshape(-1)).cast("B") if array.size else b"")


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Puts ``path`` into an ``OSError`` that names no file, as those of writing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def load_array(path: Path) -> np.ndarray:
    """Returns the memory-mapped array of a ``.npy`` file; raises ``ValueError`` when it is missing or damaged."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; the index is damaged, build it anew") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged ({error}); build the index anew") from None


def map_file(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a raw file memory-mapped as an array; raises ``ValueError`` when its size is not what ``shape`` needs."""
    needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not path.exists():
        raise ValueError(f"{path}: missing; the index is damaged, build it anew")
    size = path.stat().st_size
    if size != needed:
        raise ValueError(f"{path}: holds {size:,} bytes where {needed:,} are needed; it is damaged, build the index anew")
    if needed == 0:
        return np.empty(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape).view(np.ndarray)
