"""The output folder of bulk encoding while it is written: which rows are safely on disk, and how it becomes whole.

Beside the files of :mod:`openembed.vector_files`, whose names end in ``.partial`` until the end, lies ``journal.jsonl``. Its
first line says what is being encoded, the others which rows are safely on disk. Where texts have different numbers of entries,
a chunk that comes before its turn has no place yet: it waits in ``.waiting-NUMBER.npz``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from openembed.files import append_synced, atomic_write, fsync_directory, whole_lines, write_json
from openembed.vector_files import ARRAYS, IDS, META, PARTIAL, StoredArray, stored_arrays

JOURNAL = "journal.jsonl"
WAITING = re.compile(r"\.waiting-[0-9]+\.npz")


@dataclass
class Done:
    """The rows on disk: the first ``rows``, and beyond them the ``later`` chunks (number → rows), which came out of turn.

    ``entries``: terms or token vectors of the first ``rows``, where texts have different numbers of them.
    """

    chunk: int
    rows: int = 0
    entries: int = 0
    later: dict[int, int] = field(default_factory=dict)

    def __contains__(self, number: int) -> bool:
        return number * self.chunk < self.rows or number in self.later

    @property
    def count(self) -> int:
        """Rows on disk."""
        return self.rows + sum(self.later.values())

    @property
    def end(self) -> int:
        """Rows from the beginning to the end of the last one."""
        return max([self.rows, *(number * self.chunk + count for number, count in self.later.items())])

    def end_of(self, array: StoredArray) -> int:
        """Returns where in the file of ``array`` ends what is on disk."""
        return array.offset({"entries": self.entries, "ends": self.rows, "texts": self.end}[array.rows])

    def add(self, number: int, count: int, entries: int | None = None) -> dict[str, int]:
        """Takes in a chunk, the next in turn where it has ``entries``; returns its line of the journal."""
        if entries is not None:
            self.rows, self.entries = self.rows + count, self.entries + entries
            self.later.pop(number, None)
            return {"rows": self.rows, "entries": self.entries}
        if number * self.chunk != self.rows:
            self.later[number] = count
            return {"chunk": number, "count": count}
        self.rows += count
        while self.rows in (starts := {later * self.chunk: later for later in self.later}):
            self.rows += self.later.pop(starts[self.rows])
        return {"rows": self.rows}

    def read(self, line: dict[str, int]) -> None:
        """Takes in a line of the journal."""
        if "rows" in line:
            self.rows, self.entries = line["rows"], line.get("entries", self.entries)
            self.later = {number: count for number, count in self.later.items() if number * self.chunk >= self.rows}
        else:
            self.later[line["chunk"]] = line["count"]


def resume(out: Path, plan: dict[str, Any], arrays: list[StoredArray]) -> Done:
    """Returns which rows are safely on disk, leaving partial files and a journal that say so and no more."""
    journal, whole = out / JOURNAL, [out / array.name for array in arrays]
    row_bytes = sum(array.row_bytes for array in arrays if array.rows != "entries")
    if not journal.exists():
        _check_space(out, plan["count"] * row_bytes)
        for path in whole:
            if path.exists():
                raise ValueError(f"{path}: not made by a finished run; pass --restart to replace it, or another output")
        for array in arrays:
            with array.partial(out).open("wb") as file:
                file.write(array.header)
                os.fsync(file.fileno())
        with atomic_write(journal) as file:
            file.write(json.dumps(plan) + "\n")
        return Done(plan["chunk"])
    begun, done, length = _read_journal(journal)
    check_same(plan, begun, out)
    for array, path in zip(arrays, whole, strict=True):
        partial = array.partial(out)
        if not partial.exists() and path.exists():
            os.replace(path, partial)  # killed between renaming the arrays and writing meta.json
        if not partial.exists() or partial.stat().st_size < done.end_of(array):
            raise ValueError(f"{partial}: shorter than its journal says ({done.count:,} rows); pass --restart to encode anew")
    _check_space(out, row_bytes * (plan["count"] - done.count))
    os.truncate(journal, length)
    for array in arrays:
        os.truncate(array.partial(out), done.end_of(array))
    return done


class ChunkWriter:
    """Puts chunks on the disk, in any order and each once: the arrays first, then the journal's line that they are there."""

    def __init__(self, out: Path, arrays: list[StoredArray], done: Done, stack: ExitStack) -> None:
        self._out, self._arrays, self._done = out, arrays, done
        self._in_turn = _in_turn(arrays)
        self._files = [stack.enter_context(array.partial(out).open("r+b", buffering=0)) for array in arrays]
        self._journal = stack.enter_context((out / JOURNAL).open("ab", buffering=0))
        self._put_waiting()

    def add(self, number: int, values: list[np.ndarray]) -> None:
        """Writes what is stored of a chunk, an array each."""
        if self._in_turn and number * self._done.chunk != self._done.rows:
            with atomic_write(_waiting(self._out, number), "wb") as file:
                np.savez(file, *values)
            self._note(self._done.add(number, len(values[0])))
            return
        self._put(number, values)
        self._put_waiting()

    def _put(self, number: int, values: list[np.ndarray]) -> None:
        done = self._done
        for array, file, part in zip(self._arrays, self._files, values, strict=True):
            file.seek(array.offset(done.entries if array.rows == "entries" else number * done.chunk))
            whole = part + done.entries if array.rows == "ends" else part
            append_synced(file, whole.tobytes(), array.partial(self._out))
        self._note(done.add(number, len(values[0]), len(values[-1]) if self._in_turn else None))

    def _put_waiting(self) -> None:
        """Puts the chunks in their place whose turn it is."""
        while self._in_turn and (number := self._done.rows // self._done.chunk) in self._done.later:
            path = _waiting(self._out, number)
            try:
                with np.load(path, allow_pickle=False) as stored:
                    values = list(stored.values())
            except (OSError, ValueError, EOFError, BadZipFile) as error:
                raise ValueError(f"{path}: cannot be read ({error}); pass --restart to encode anew") from None
            self._put(number, values)
            path.unlink()

    def _note(self, line: dict[str, int]) -> None:
        append_synced(self._journal, json.dumps(line).encode() + b"\n", self._out / JOURNAL)


@contextmanager
def writing(out: Path, arrays: list[StoredArray], done: Done) -> Iterator[ChunkWriter]:
    """Yields the writer of an output of which ``done`` is on disk."""
    with ExitStack() as stack:
        yield ChunkWriter(out, arrays, done, stack)


def _in_turn(arrays: list[StoredArray]) -> bool:
    """True where a chunk's place is known once those before it are written."""
    return arrays[-1].rows == "entries"


def _waiting(out: Path, number: int) -> Path:
    return out / f".waiting-{number}.npz"


def _read_journal(path: Path) -> tuple[dict[str, Any], Done, int]:
    """Returns the plan, what is saved, and the length of the journal up to its last whole line."""
    lines = whole_lines(path)
    try:
        plan, *values = [json.loads(line) for line in lines]
        done = Done(plan["chunk"])
        for value in values:
            done.read(value)
        return plan, done, sum(map(len, lines))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged; pass --restart to encode anew") from None


def check_same(plan: dict[str, Any], begun: dict[str, Any], out: Path) -> None:
    """Raises ``ValueError`` saying what differs when the output was ``begun`` under another plan."""
    changed = [key for key in plan if begun.get(key) != plan[key]]
    if changed:
        now = ", ".join(f"{key} is {plan[key]!r}, was {begun.get(key)!r}" for key in changed)
        raise ValueError(f"{out}: begun with something else ({now}); pass --restart to encode anew, or another output")


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out}: {needed / 1e9:,.2f} GB of vectors to write, {free / 1e9:,.2f} GB free; make room first")


def finish(out: Path, plan: dict[str, Any], ids: list[str]) -> None:
    """Writes the ids, puts the arrays under their names, and last of all says how they were made.

    Where ``plan`` counts entries, their arrays are told how many they hold.
    """
    with atomic_write(out / IDS) as file:
        for identifier in ids:
            file.write(json.dumps(identifier) + "\n")
    arrays = stored_arrays(plan)
    if _in_turn(arrays):
        _remove_waiting(out)
    for array in arrays:
        if array.rows == "entries":
            with array.partial(out).open("r+b", buffering=0) as file:
                append_synced(file, array.header, array.partial(out))
        os.replace(array.partial(out), out / array.name)
    fsync_directory(out)
    write_json(out / META, plan)
    (out / JOURNAL).unlink(missing_ok=True)


def begin_anew(out: Path) -> None:
    """Removes what an earlier run has left or made."""
    arrays = [name + end for name in ARRAYS for end in ("", PARTIAL)]
    for name in (META, JOURNAL, IDS, *arrays):
        (out / name).unlink(missing_ok=True)
    _remove_waiting(out)


def _remove_waiting(out: Path) -> None:
    """Removes the chunks that an earlier run has left waiting, and nothing else of the folder's."""
    for path in out.iterdir():
        if WAITING.fullmatch(path.name):
            path.unlink()
