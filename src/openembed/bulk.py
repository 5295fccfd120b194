"""Encoding a file of any size to memory-mapped vectors; killed at any point it resumes and ends with the same bytes.

    OUT/vectors.npy   float32 (N, D), opens with ``numpy.load(..., mmap_mode="r")``; see :mod:`openembed.vectors` for others
    OUT/scales.npy    float32 (N,), with int8 vectors alone
    OUT/ids.jsonl     one id a line, as JSON strings, in the order of the vectors
    OUT/meta.json     how they were made; written last: where it is, the others are whole

While it runs: ``vectors.npy.partial`` and ``journal.jsonl``, whose first line says what is being encoded and whose
others say which rows are safely on disk. Texts are encoded in chunks at fixed row numbers, since the last bits of
a vector may depend on what is encoded beside it.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from openembed.config import Config, chosen, parse
from openembed.documents import corpus_file, read_documents
from openembed.files import atomic_write, fsync_directory, read_json, remove_temporary, write_json
from openembed.locks import exclusive
from openembed.progress import progress
from openembed.records import Document
from openembed.vectors import Precision, StoredVectors, VectorFormat, truncation_warning

VECTORS, SCALES, IDS, META, JOURNAL = "vectors.npy", "scales.npy", "ids.jsonl", "meta.json", "journal.jsonl"
PARTIAL = ".partial"

logger = logging.getLogger(__name__)


class EncodesTexts(Protocol):
    """What bulk encoding needs of an encoder."""

    fingerprint: str
    width: int

    def encode_queries(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """Returns float32 (N, width)."""
        ...

    def encode_documents(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """Returns float32 (N, width)."""
        ...


@runtime_checkable
class EncodesChunks(Protocol):
    """An encoder that is elsewhere and encodes many chunks at once (:class:`openembed.ray_encode.RayEncoder`)."""

    def encode_chunks(self, path: Path, numbers: Sequence[int], config: BulkConfig) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields (number, what ``encoded_chunk`` returns) for each of these chunks of the file ``path``, each once."""
        ...

    def wrap(self, wrapper: Callable[[Any], Any]) -> EncodesChunks:
        """Returns the encoder that ``wrapper`` makes of it, there."""
        ...


class BulkConfig(Config):
    """What to encode texts as. ``chunk`` is how many texts lie between two savings.

    ``task`` or ``instruction`` as in ``Encoder.encode_queries`` and ``encode_documents``: retrieval tasks ask nothing of
    documents, symmetric ones do. ``dimensions`` and ``precision``: see :class:`openembed.vectors.VectorFormat`.
    """

    kind: Literal["query", "document"] = "document"
    task: str | None = None
    instruction: str | None = None
    normalize: bool = True
    max_length: int | None = None
    chunk: int = 1024
    dimensions: int | None = None
    precision: Precision = "float32"

    @property
    def format(self) -> VectorFormat:
        """How the vectors are stored; raises ``ValueError`` for what no model has."""
        return parse(VectorFormat, {"dimensions": self.dimensions, "precision": self.precision}, "options")

    def prompt(self, encoder: Any) -> str:
        """Returns the literal text put before every text."""
        prompt = encoder.query_prompt if self.kind == "query" else encoder.document_prompt
        return prompt(task=self.task, instruction=self.instruction)

    def encode(self, encoder: EncodesTexts, documents: Sequence[Document]) -> np.ndarray:
        """Returns float32 (N, width): queries from their text, documents from title and text."""
        options = {"normalize": self.normalize, "max_length": self.max_length}
        options |= {"task": self.task, "instruction": self.instruction}
        if self.kind == "query":
            return encoder.encode_queries([document.text for document in documents], **options)
        return encoder.encode_documents([document.full_text for document in documents], **options)


@dataclass(frozen=True)
class Encoded:
    """The finished output of ``encode_file``; ``resumed`` rows were there from an earlier, interrupted run.

    ``width``: the dimensions kept of each vector; ``warning``: what its reader ought to know, or None.
    """

    directory: Path
    count: int
    width: int
    resumed: int
    warning: str | None = None

    def vectors(self) -> np.ndarray:
        """Returns the memory-mapped vectors as they are stored: (N, D), (N, D / 8) where they are binary."""
        return self.stored().values_NC

    def stored(self) -> StoredVectors:
        """Returns the memory-mapped vectors with what is needed to read them back."""
        return open_vectors(self.directory)

    def ids(self) -> list[str]:
        """Returns the ids, in the order of the vectors."""
        return [json.loads(line) for line in (self.directory / IDS).read_text(encoding="utf-8").splitlines()]


def open_vectors(directory: str | Path) -> StoredVectors:
    """Returns the memory-mapped vectors of a finished output; ``ValueError`` names a file that is missing or damaged."""
    directory = Path(directory)
    values_NC = _mapped(directory / VECTORS)
    return StoredVectors(values_NC, _mapped(directory / SCALES) if values_NC.dtype == np.int8 else None)


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); encode it anew") from None


def encode_file(
    encoder: EncodesTexts | EncodesChunks,
    source: str | Path,
    out: str | Path,
    config: BulkConfig | None = None,
    *,
    restart: bool = False,
    show_progress: bool = False,
) -> Encoded:
    """Encodes every document of ``source`` (see ``read_documents``; ``-``: standard input) into the directory ``out``.

    The whole input is checked before anything is encoded. Run again after an interruption, it goes on after the last
    saved chunk; after completion, it returns at once. Standard input is kept in ``out`` while encoding; to resume, it
    must be piped in again. Raises ``ValueError`` for bad input (naming the line), too little disk space, another
    process at work in ``out``, and an ``out`` begun with another input, model or setting, unless ``restart``, which
    begins anew.
    """
    config, out = config or BulkConfig(), Path(out)
    if config.chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {config.chunk}")
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out), _as_file(source, out) as path:
        digest, ids = _survey(path)
        if not ids:
            raise ValueError(f"{source}: holds no texts")
        plan = _plan(encoder, config, digest, len(ids))
        arrays = stored_arrays(plan)
        warning = _warning(encoder, config)
        if restart:
            _remove(out, META, JOURNAL, IDS, *(name + end for name in (VECTORS, SCALES) for end in ("", PARTIAL)))
        if (out / META).exists():
            _check_same(plan, read_json(out / META), out)
            _check_whole(arrays, out)
            _remove(out, JOURNAL)
            return Encoded(out, len(ids), plan["width"], len(ids), warning)
        done = _resume(out, plan, arrays)
        resumed = done.count
        with (
            _seekable(path, out, isinstance(encoder, EncodesChunks)) as readable,
            _opened(arrays, out) as files,
            (out / JOURNAL).open("ab", buffering=0) as journal,
            progress("encode", len(ids), "texts", show=show_progress) as advance,
        ):
            advance(resumed)
            for number, values in _encoded(encoder, config, readable, done, len(ids)):
                for array, file, part in zip(arrays, files, values, strict=True):
                    file.seek(array.offset(number * config.chunk))
                    _append(file, part.tobytes(), array.partial(out))
                _append(journal, json.dumps(done.add(number, len(values[0]))).encode() + b"\n", out / JOURNAL)
                advance(len(values[0]))
        if done.count != len(ids):
            raise ValueError(f"{path}: changed while it was being encoded ({len(ids)} texts before, {done.count} now); restart")
        _finish(out, plan, arrays, ids)
    return Encoded(out, len(ids), plan["width"], resumed, warning)


@dataclass
class _Done:
    """The rows on disk: the first ``rows``, and beyond them the ``later`` chunks (number → rows), which came out of turn."""

    chunk: int
    rows: int = 0
    later: dict[int, int] = field(default_factory=dict)

    def __contains__(self, number: int) -> bool:
        return number * self.chunk < self.rows or number in self.later

    @property
    def count(self) -> int:
        return self.rows + sum(self.later.values())

    @property
    def end(self) -> int:
        """Rows from the beginning to the end of the last one."""
        return max([self.rows, *(number * self.chunk + count for number, count in self.later.items())])

    def add(self, number: int, count: int) -> dict[str, int]:
        """Takes in a chunk; returns its line of the journal."""
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
            self.rows = line["rows"]
            self.later = {number: count for number, count in self.later.items() if number * self.chunk >= self.rows}
        else:
            self.later[line["chunk"]] = line["count"]


def _encoded(encoder: Any, config: BulkConfig, path: Path, done: _Done, count: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yields the chunks that are not done: here in order, elsewhere as they come."""
    if isinstance(encoder, EncodesChunks):
        numbers = [number for number in range(-(-count // config.chunk)) if number not in done]
        yield from encoder.encode_chunks(path, numbers, config)
        return
    for number, chunk in enumerate(_chunks(path, config.chunk, done.rows), done.rows // config.chunk):
        if number not in done:
            yield number, encoded_chunk(encoder, config, chunk)


@contextmanager
def _seekable(path: Path, out: Path, wanted: bool) -> Iterator[Path]:
    """Yields ``path``, or where it is ``wanted`` and gzipped, a copy that can be read from the middle."""
    if path.suffix != ".gz" or not wanted:
        yield path
        return
    logger.warning("%s is unpacked into %s, which every node has to see", path, out)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unpacked.", suffix=".tmp") as folder:
        plain = Path(folder) / path.name.removesuffix(".gz")
        with gzip.open(path, "rb") as source, plain.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield plain


def encoded_chunk(encoder: EncodesTexts, config: BulkConfig, chunk: list[Document]) -> list[np.ndarray]:
    """Returns what is stored of ``chunk``, an array for each of ``stored_arrays``; ``ValueError`` names a vector not finite."""
    values_ND = config.encode(encoder, chunk)
    if values_ND.shape != (len(chunk), encoder.width):
        raise ValueError(f"the encoder gave {values_ND.shape} for {len(chunk)} texts; ({len(chunk)}, {encoder.width}) expected")
    bad = np.flatnonzero(~np.isfinite(values_ND).all(axis=1))
    if len(bad):
        raise ValueError(f"the vector of {chunk[bad[0]].id!r} holds NaN or infinity; encode with --dtype float32")
    stored = config.format.apply(values_ND, normalize=config.normalize)
    return [stored.values_NC] if stored.scales_N is None else [stored.values_NC, stored.scales_N]


@dataclass(frozen=True)
class StoredArray:
    """One ``.npy`` file of the output, written row by row: its name, dtype and shape."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def header(self) -> bytes:
        """The bytes before the first row."""
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return buffer.getvalue()

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return self.dtype.itemsize * math.prod(self.shape[1:])

    def offset(self, row: int) -> int:
        """Returns where a row begins; for the number of rows, the size of the whole file."""
        return len(self.header) + self.row_bytes * row

    def partial(self, out: Path) -> Path:
        """Returns where it lies until it is whole."""
        return out / (self.name + PARTIAL)


def stored_arrays(plan: dict[str, Any]) -> list[StoredArray]:
    """Returns the arrays that ``plan`` writes: vectors, and for int8 their scales."""
    dtype, columns = np.dtype(plan["dtype"]).newbyteorder("<"), plan["width"]
    columns = columns // 8 if dtype == np.uint8 else columns
    vectors = StoredArray(VECTORS, dtype, (plan["count"], columns))
    return [vectors, StoredArray(SCALES, np.dtype("<f4"), (plan["count"],))] if dtype == np.int8 else [vectors]


def _plan(encoder: Any, config: BulkConfig, digest: str, count: int) -> dict[str, Any]:
    """Returns everything the bytes of the output depend on."""
    return {
        "input_sha256": digest,
        "count": count,
        "width": config.format.width(encoder.width),
        "dtype": config.format.dtype.name,
        "model_fingerprint": encoder.fingerprint,
        "prompt": config.prompt(encoder),
        "computed_in": f"{encoder.computed_in} on {str(encoder.device).split(':')[0]}",
        **config.model_dump(exclude={"dimensions", "precision"}),
        **chosen(config.format),
    }


def _warning(encoder: Any, config: BulkConfig) -> str | None:
    trained = getattr(getattr(encoder, "config", None), "matryoshka", ())
    warning = truncation_warning(trained, config.dimensions, encoder.width)
    if warning:
        logger.warning(warning)
    return warning


@contextmanager
def _as_file(source: str | Path, out: Path) -> Iterator[Path]:
    """Yields the file to read; standard input is copied into ``out`` first, because it must be read twice."""
    remove_temporary(out)
    if str(source) != "-":
        yield corpus_file(source)
        return
    logger.warning("reading standard input; to resume after an interruption, pipe in the same text again")
    first = sys.stdin.buffer.readline()
    with tempfile.TemporaryDirectory(dir=out, prefix=".stdin.", suffix=".tmp") as folder:
        path = Path(folder) / ("input.jsonl" if first.startswith(b"{") else "input.txt")
        with path.open("wb") as file:
            file.write(first)
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path


def _survey(path: Path) -> tuple[str, list[str]]:
    """Returns the sha256 of the file and the ids in it, having checked every line."""
    ids = [document.id for document in read_documents(path)]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), ids


def _resume(out: Path, plan: dict[str, Any], arrays: list[StoredArray]) -> _Done:
    """Returns which rows are safely on disk, leaving partial files and a journal that say so and no more."""
    journal, whole = out / JOURNAL, [out / array.name for array in arrays]
    row_bytes = sum(array.row_bytes for array in arrays)
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
        return _Done(plan["chunk"])
    begun, done, length = _read_journal(journal)
    _check_same(plan, begun, out)
    for array, path in zip(arrays, whole, strict=True):
        partial = array.partial(out)
        if not partial.exists() and path.exists():
            os.replace(path, partial)  # killed between renaming the arrays and writing meta.json
        if not partial.exists() or partial.stat().st_size < array.offset(done.end):
            raise ValueError(f"{partial}: shorter than its journal says ({done.count:,} rows); pass --restart to encode anew")
    _check_space(out, row_bytes * (plan["count"] - done.count))
    os.truncate(journal, length)
    for array in arrays:
        os.truncate(array.partial(out), array.offset(done.end))
    return done


@contextmanager
def _opened(arrays: list[StoredArray], out: Path) -> Iterator[list[Any]]:
    with ExitStack() as stack:
        yield [stack.enter_context(array.partial(out).open("r+b", buffering=0)) for array in arrays]


def _read_journal(path: Path) -> tuple[dict[str, Any], _Done, int]:
    """Returns the plan, what is saved, and the length of the journal up to its last whole line."""
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        plan, *values = [json.loads(line) for line in lines]
        done = _Done(plan["chunk"])
        for value in values:
            done.read(value)
        return plan, done, sum(map(len, lines))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged; pass --restart to encode anew") from None


def _check_same(plan: dict[str, Any], begun: dict[str, Any], out: Path) -> None:
    changed = [key for key in plan if begun.get(key) != plan[key]]
    if changed:
        now = ", ".join(f"{key} is {plan[key]!r}, was {begun.get(key)!r}" for key in changed)
        raise ValueError(f"{out}: begun with something else ({now}); pass --restart to encode anew, or another output")


def _check_whole(arrays: list[StoredArray], out: Path) -> None:
    sizes = {out / array.name: array.offset(array.shape[0]) for array in arrays}
    cut = [path.name for path, size in sizes.items() if not path.exists() or path.stat().st_size != size]
    if cut or not (out / IDS).exists():
        raise ValueError(f"{out}: {', '.join(cut) or IDS} is missing or cut short; pass --restart to encode anew")


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out}: {needed / 1e9:,.2f} GB of vectors to write, {free / 1e9:,.2f} GB free; make room first")


def _chunks(path: Path, size: int, skip: int) -> Iterator[list[Document]]:
    documents = islice(read_documents(path), skip, None)
    while chunk := list(islice(documents, size)):
        yield chunk


def _append(file: Any, data: bytes, path: Path) -> None:
    """Writes all of ``data`` and waits until it is on the disk; an error names ``path``."""
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror, str(path)) from error


def _finish(out: Path, plan: dict[str, Any], arrays: list[StoredArray], ids: list[str]) -> None:
    with atomic_write(out / IDS) as file:
        for identifier in ids:
            file.write(json.dumps(identifier) + "\n")
    for array in arrays:
        os.replace(array.partial(out), out / array.name)
    fsync_directory(out)
    write_json(out / META, plan)
    _remove(out, JOURNAL)


def _remove(out: Path, *names: str) -> None:
    for name in names:
        (out / name).unlink(missing_ok=True)
