"""Files that grow by blocks: killed at any point, a run goes on after the last whole block and ends with the same bytes.

While it runs: ``NAME.partial`` and ``journal.jsonl``, whose first line is the plan and whose others say how many items and
how many bytes of each file are safely on disk, with what the block reports. When it ends: the files under their names, then
``meta.json`` with the plan. Where that is, the files are whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openembed.files import append_synced, atomic_write, fsync_directory, read_json, remove_temporary, whole_lines, write_json

JOURNAL, META = "journal.jsonl", "meta.json"


class Journal:
    """Appends blocks to the files ``names`` of ``folder``; ``plan`` is everything their bytes depend on.

    ``done``: items already there. Raises ``ValueError`` when ``folder`` was begun with another plan or its files are shorter
    than the journal says; ``restart`` begins anew.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], names: tuple[str, ...], *, restart: bool = False) -> None:
        self.folder, self._plan, self._names = folder, json.loads(json.dumps(plan)), names
        self.done, self._sizes = 0, dict.fromkeys(names, 0)
        self._reports = 0
        remove_temporary(folder)
        if restart:
            for name in (META, JOURNAL, *names, *(f"{name}.partial" for name in names)):
                (folder / name).unlink(missing_ok=True)
        self.finished = (folder / META).exists()
        if self.finished:
            self._check(read_json(folder / META))
            (folder / JOURNAL).unlink(missing_ok=True)
        elif (folder / JOURNAL).exists():
            self._resume()
        else:
            for name in names:
                (folder / f"{name}.partial").write_bytes(b"")
            with atomic_write(folder / JOURNAL) as file:
                file.write(json.dumps(self._plan) + "\n")

    def append(self, items: int, blocks: Mapping[str, bytes], report: Any) -> None:
        """Adds ``items`` items: a block of bytes to each file, then the line that counts them, with ``report``."""
        for name in self._names:
            path = self.folder / f"{name}.partial"
            with path.open("r+b", buffering=0) as file:
                file.seek(self._sizes[name])
                append_synced(file, blocks[name], path)
            self._sizes[name] += len(blocks[name])
        self.done += items
        path = self.folder / JOURNAL
        with path.open("ab", buffering=0) as file:
            line = json.dumps({"done": self.done, "sizes": self._sizes, "report": report})
            append_synced(file, line.encode() + b"\n", path)

    def reports(self) -> Iterator[Any]:
        """Yields the report of every block so far."""
        with (self.folder / JOURNAL).open(encoding="utf-8") as file:
            next(file)
            for line in file:
                yield json.loads(line)["report"]

    def finish(self) -> None:
        """Puts the files under their names, and the plan beside them last."""
        for name in self._names:
            if (self.folder / f"{name}.partial").exists():
                os.replace(self.folder / f"{name}.partial", self.folder / name)
        fsync_directory(self.folder)
        write_json(self.folder / META, self._plan)
        (self.folder / JOURNAL).unlink()

    def _resume(self) -> None:
        path = self.folder / JOURNAL
        lines = whole_lines(path)
        try:
            self._check(json.loads(lines[0]))
            if len(lines) > 1:
                last = json.loads(lines[-1])
                self.done, self._sizes = last["done"], {name: last["sizes"][name] for name in self._names}
        except (KeyError, IndexError, json.JSONDecodeError):
            raise ValueError(f"{path}: damaged; begin anew (--restart)") from None
        os.truncate(path, sum(map(len, lines)))
        for name in self._names:
            partial, whole = self.folder / f"{name}.partial", self.folder / name
            if not partial.exists() and whole.exists():
                os.replace(whole, partial)  # killed while finishing
            if not partial.exists() or partial.stat().st_size < self._sizes[name]:
                raise ValueError(f"{partial}: shorter than its journal says; begin anew (--restart)")
            os.truncate(partial, self._sizes[name])

    def _check(self, begun: Mapping[str, Any]) -> None:
        changed = [key for key in self._plan if begun.get(key) != self._plan[key]]
        if changed:
            now = ", ".join(f"{key} is {self._plan[key]!r:.120}, was {begun.get(key)!r:.120}" for key in changed)
            raise ValueError(
                f"{self.folder}: begun with something else ({now}); begin anew (--restart), or choose another folder"
            )
