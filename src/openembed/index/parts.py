"""Documents encoded part by part into a folder, for vectors that are not rows of one matrix; killed, it goes on where it was.

OUT/plan.json          what is encoded, by what
OUT/000000.npz ...     the vectors of PART documents each, written whole or not at all
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from openembed.documents import corpus_file, read_documents
from openembed.files import atomic_write, read_json, write_json
from openembed.index.encoding import encoded
from openembed.index.fields import FIELDS, Vectors
from openembed.index.manifest import EncodesDocuments, ModelInfo
from openembed.locks import exclusive
from openembed.progress import progress

PART = 1024


class Parts:
    """The vectors of ``count`` documents in the files of a folder, read when they are asked for."""

    def __init__(self, folder: Path, model: ModelInfo, count: int) -> None:
        self._folder, self._field, self._count = folder, FIELDS[model.kind], count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: slice) -> Vectors:
        low, high, _ = rows.indices(self._count)
        numbers = range(low // PART, max(low // PART + 1, -(-high // PART)))
        parts = [self._field.of_arrays(_read(_path(self._folder, number))) for number in numbers]
        joined = parts[0] if len(parts) == 1 else self._field.join(parts)
        start = numbers[0] * PART
        return self._field.take(joined, slice(low - start, high - start))


def encode_parts(
    encoder: EncodesDocuments, model: ModelInfo, source: str | Path, folder: Path, *, restart: bool = False
) -> tuple[Parts, dict[str, Any]]:
    """Encodes the documents of ``source`` into ``folder``; returns the vectors, and counts for a report.

    What an interrupted run has left is kept, where it was of the same documents and model; ``restart`` begins anew. Raises
    ``ValueError`` where it was of others.
    """
    path = corpus_file(Path(source))
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder):
        count = sum(1 for _ in read_documents(source))
        plan = {"input_sha256": _digest(path), "count": count, "part": PART, "model": model.model_dump(exclude={"name"})}
        if restart:
            for stale in folder.glob("*.npz"):
                stale.unlink()
        elif (folder / "plan.json").exists() and read_json(folder / "plan.json") != plan:
            raise ValueError(f"{folder}: begun with other documents or another model; pass --restart to encode anew")
        write_json(folder / "plan.json", plan)
        resumed = 0
        with progress("encode", count, "documents") as advance:
            for number, documents in enumerate(_chunks(source)):
                if _path(folder, number).exists():
                    resumed += len(documents)
                else:
                    arrays = FIELDS[model.kind].to_arrays(encoded(model, encoder, documents))
                    with atomic_write(_path(folder, number), "wb") as file:
                        np.savez(file, **arrays)
                advance(len(documents))
    return Parts(folder, model, count), {"count": count, "width": model.width, "resumed": resumed}


def remove_parts(folder: Path) -> None:
    """Removes what ``encode_parts`` has left."""
    shutil.rmtree(folder, ignore_errors=True)


def _chunks(source: str | Path) -> Iterator[list[Any]]:
    stream = read_documents(source)
    while chunk := list(islice(stream, PART)):
        yield chunk


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.npz"


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read ({error}); pass --restart to encode anew") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
