"""Encoding a file of any size to memory-mapped arrays, of vectors, sparse weights or token vectors, whatever the model gives;
killed at any point it resumes and ends with the same bytes.

The output is what :mod:`openembed.vector_files` says; :mod:`openembed.bulk_output` keeps account while it is written. Texts are
encoded in chunks at fixed row numbers, since the last bits of a vector may depend on what is encoded beside it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from scipy.sparse import csr_matrix

from openembed.bulk_output import JOURNAL, Done, begin_anew, check_same, finish, resume, writing
from openembed.config import Config, chosen, parse
from openembed.documents import corpus_file, read_documents
from openembed.encoded import CALLED, count_of, kind_of, width_of
from openembed.encoded import Encoded as Representations
from openembed.files import read_json, remove_temporary
from openembed.locks import exclusive
from openembed.progress import progress
from openembed.records import Document
from openembed.token_vectors import TokenVectors
from openembed.vector_files import ENDS, IDS, META, check_whole, open_encoded, open_vectors, stored_arrays
from openembed.vectors import Precision, StoredVectors, VectorFormat, truncation_warning

logger = logging.getLogger(__name__)


class EncodesTexts(Protocol):
    """What bulk encoding needs of an encoder; without a ``kind`` it is dense."""

    fingerprint: str
    width: int

    def encode_queries(self, texts: Sequence[str], **options: Any) -> Representations:
        """Returns the representations of queries, float32 (N, width) where they are dense."""
        ...

    def encode_documents(self, texts: Sequence[str], **options: Any) -> Representations:
        """Returns those of documents."""
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
    documents, symmetric ones do. ``dimensions`` and ``precision``: see :class:`openembed.vectors.VectorFormat`; token vectors
    may be ``float16``, sparse weights are float32.
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

    def check_kind(self, kind: str) -> None:
        """Raises ``ValueError`` for settings that representations of this kind do not have."""
        allowed = {"dense": (*get_args(Precision),), "sparse": ("float32",), "tokens": ("float32", "float16")}[kind]
        wrong = [] if self.precision in allowed else [f"precision {self.precision}"]
        wrong += [f"dimensions {self.dimensions}"] if self.dimensions is not None and kind != "dense" else []
        if wrong:
            raise ValueError(
                f"{' and '.join(wrong)}: this model gives {CALLED[kind]}, which are stored whole, in {' or '.join(allowed)}; "
                f"leave {'it' if len(wrong) == 1 else 'them'} out"
            )

    def encode(self, encoder: EncodesTexts, documents: Sequence[Document]) -> Representations:
        """Returns what the encoder gives, unrounded: queries from their text, documents from title and text."""
        options = {"normalize": self.normalize, "max_length": self.max_length}
        options |= {"task": self.task, "instruction": self.instruction}
        if self.kind == "query":
            return encoder.encode_queries([document.text for document in documents], **options)
        return encoder.encode_documents([document.full_text for document in documents], **options)


@dataclass(frozen=True)
class Encoded:
    """The finished output of ``encode_file``; ``resumed`` rows were there from an earlier, interrupted run.

    ``width``: the dimensions kept of each vector, or the terms of a vocabulary; ``warning``: what its reader ought to know, or
    None. ``entries``: terms or token vectors of all texts together, where ``kind`` is not ``dense``.
    """

    directory: Path
    count: int
    width: int
    resumed: int
    warning: str | None = None
    kind: str = "dense"
    entries: int = 0

    def vectors(self) -> np.ndarray:
        """Returns the memory-mapped vectors as they are stored: (N, D), (N, D / 8) where they are binary."""
        return self.stored().values_NC

    def stored(self) -> StoredVectors:
        """Returns the memory-mapped dense vectors with what is needed to read them back."""
        return open_vectors(self.directory)

    def representations(self) -> StoredVectors | csr_matrix | TokenVectors:
        """Returns what was encoded, memory-mapped, of whatever kind."""
        return open_encoded(self.directory)

    def ids(self) -> list[str]:
        """Returns the ids, in the order of the vectors."""
        return [json.loads(line) for line in (self.directory / IDS).read_text(encoding="utf-8").splitlines()]


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
    process at work in ``out``, settings that the model's kind does not have, and an ``out`` begun with another input, model
    or setting, unless ``restart``, which begins anew.
    """
    config, out = config or BulkConfig(), Path(out)
    if config.chunk < 1:
        raise ValueError(f"chunk must be 1 or more, got {config.chunk}")
    given = (
        None if str(source) == "-" else _plan(encoder, config, corpus_file(source), source)
    )  # before anything is left in out
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out), _as_file(source, out) as path:
        plan, ids = given or _plan(encoder, config, path, source)
        arrays = stored_arrays(plan)
        warning = _warning(encoder, config)
        if restart:
            begin_anew(out)
        if (out / META).exists():
            made = read_json(out / META)
            check_same(plan, made, out)
            check_whole(stored_arrays(made), out)
            (out / JOURNAL).unlink(missing_ok=True)
            return _finished(out, made, len(ids), warning)
        done = resume(out, plan, arrays)
        resumed = done.count
        with (
            _seekable(path, out, isinstance(encoder, EncodesChunks)) as readable,
            writing(out, arrays, done) as writer,
            progress("encode", len(ids) - resumed, "texts", show=show_progress) as advance,
        ):
            for number, values in _encoded(encoder, config, readable, done, len(ids)):
                writer.add(number, values)
                advance(len(values[0]))
        if done.count != len(ids):
            raise ValueError(f"{path}: changed while it was being encoded ({len(ids)} texts before, {done.count} now); restart")
        plan |= {"entries": done.entries} if "representation" in plan else {}
        finish(out, plan, ids)
    return _finished(out, plan, resumed, warning)


def _finished(out: Path, plan: dict[str, Any], resumed: int, warning: str | None) -> Encoded:
    kind, entries = plan.get("representation", "dense"), plan.get("entries", 0)
    return Encoded(out, plan["count"], plan["width"], resumed, warning, kind, entries)


def _encoded(encoder: Any, config: BulkConfig, path: Path, done: Done, count: int) -> Iterator[tuple[int, list[np.ndarray]]]:
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
    encoded = config.encode(encoder, chunk)
    kind, shape = kind_of(encoded), (count_of(encoded), width_of(encoded))
    if shape != (len(chunk), encoder.width) or kind != getattr(encoder, "kind", "dense"):
        raise ValueError(
            f"the encoder gave {CALLED[kind]} {shape} for {len(chunk)} texts; {(len(chunk), encoder.width)} expected"
        )
    if kind == "sparse":
        encoded.sum_duplicates()
        ends, parts = encoded.indptr[1:].astype(ENDS), [encoded.indices.astype("<i4"), encoded.data.astype("<f4")]
    elif kind == "tokens":
        ends, parts = encoded.offsets_N1[1:].astype(ENDS), [encoded.values_TD]
    else:
        ends, parts = None, [encoded]
    bad = np.argwhere(~np.isfinite(parts[-1]))
    if len(bad):
        row = bad[0, 0] if ends is None else np.searchsorted(ends, bad[0, 0], side="right")
        raise ValueError(f"the vector of {chunk[row].id!r} holds NaN or infinity; encode with --dtype float32")
    if kind == "sparse":
        return [ends, *parts]
    stored = config.format.apply(parts[0], normalize=config.normalize)
    arrays = [stored.values_NC] if stored.scales_N is None else [stored.values_NC, stored.scales_N]
    return arrays if ends is None else [ends, *arrays]


def _plan(encoder: Any, config: BulkConfig, path: Path, source: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Returns everything the bytes of the output depend on, and the ids in the file ``path``, having checked every line."""
    kind = getattr(encoder, "kind", "dense")
    config.check_kind(kind)
    ids = [document.id for document in read_documents(path)]
    if not ids:
        raise ValueError(f"{source}: holds no texts")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    other = {} if kind == "dense" else {"representation": kind}
    plan = other | {
        "input_sha256": digest,
        "count": len(ids),
        "width": config.format.width(encoder.width),
        "dtype": config.format.dtype.name,
        "model_fingerprint": encoder.fingerprint,
        "prompt": config.prompt(encoder),
        "computed_in": f"{encoder.computed_in} on {str(encoder.device).split(':')[0]}",
        **config.model_dump(exclude={"dimensions", "precision", *(["normalize"] if other else [])}),
        **chosen(config.format),
    }
    return plan, ids


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


def _chunks(path: Path, size: int, skip: int) -> Iterator[list[Document]]:
    documents = islice(read_documents(path), skip, None)
    while chunk := list(islice(documents, size)):
        yield chunk
