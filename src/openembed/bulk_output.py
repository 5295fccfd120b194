"""The output folder of bulk encoding while it is written: which rows are safely on disk, and how it becomes whole.

Beside the files of :mod:`openembed.vector_files`, whose names end in ``.partial`` until the end, lies ``journal.jsonl``. Its
first line says what is being encoded, the others which rows are safely on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openembed.files import append_synced, atomic_write, fsync_directory, whole_lines, write_json
from openembed.vector_files import ARRAYS, IDS, META, PARTIAL, StoredArray, stored_arrays

JOURNAL = "journal.jsonl"


@dataclass
class Done:
    """The rows on disk: the first ``rows``, and beyond them the ``later`` chunks (number → rows), which came out of turn.

    ``entries``: terms or token vectors of those rows, where texts have different numbers of them; they come in turn.
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
        return array.offset(self.entries if array.rows == "entries" else self.end)

    def add(self, number: int, count: int, entries: int = 0) -> dict[str, int]:
        """Takes in a chunk; returns its line of the journal."""
        if entries:
            self.rows, self.entries = self.rows + count, self.entries + entries
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


@contextmanager
def opened(arrays: list[StoredArray], out: Path) -> Iterator[list[Any]]:
    """Yields the partial files of the arrays, open for writing anywhere in them."""
    with ExitStack() as stack:
        yield [stack.enter_context(array.partial(out).open("r+b", buffering=0)) for array in arrays]


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
    for array in stored_arrays(plan):
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
