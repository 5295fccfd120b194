"""Reading documents from a BEIR folder, a JSON-lines file or a text file, with every bad line named."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from openembed.files import parse_object, read_lines
from openembed.records import Document

ID_KEYS = ("_id", "id")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def corpus_file(path: str | Path) -> Path:
    """Returns the file that holds the documents: ``corpus.jsonl(.gz)`` inside a BEIR folder, or ``path`` itself."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path}: holds no corpus.jsonl or corpus.jsonl.gz; give a BEIR folder or a file")


def read_documents(path: str | Path, *, numbered: bool = True) -> Iterator[Document]:
    """Yields the documents of a BEIR folder, a ``.jsonl(.gz)`` file, or a text file of one text a line.

    A JSON line has ``text``, and may have ``_id`` or ``id`` (without: its line number) and ``title``; other keys become
    metadata. A line of a text file is one document, with its number as id. Blank lines are skipped in both. Where other
    files name the documents, ``numbered`` is False: a JSON line without an id is then refused.
    Raises ``ValueError`` naming file and line for malformed JSON, a missing or wrong field, text that is not Unicode (a
    lone surrogate, broken UTF-8) and an id seen before. NUL and empty texts are allowed.
    """
    path = corpus_file(path)
    seen: dict[str, int] = {}
    for number, document in parse_documents(path, read_lines(path), numbered=numbered):
        if document.id in seen:
            raise ValueError(
                f"{path}:{number}: duplicate id {document.id!r}, first on line {seen[document.id]}; make ids unique"
            )
        seen[document.id] = number
        yield document


def check_texts(path: str | Path) -> None:
    """Raises what :func:`read_documents` would on the way through, and ``ValueError`` where there are none: before a model is
    loaded for nothing."""
    if not sum(1 for _ in read_documents(path)):
        raise ValueError(f"{path}: holds no texts")


def holds_json(path: Path) -> bool:
    """Returns whether a file holds JSON lines, by its name; else each line is a text."""
    return path.name.removesuffix(".gz").endswith(JSON_SUFFIXES)


def parse_documents(path: Path, lines: Iterable[tuple[int, str]], *, numbered: bool = True) -> Iterator[tuple[int, Document]]:
    """Yields (line number, document) of numbered lines of ``path``; raises what :func:`read_documents` does but for ids."""
    for number, line in lines:
        if not line.strip():
            continue
        if not holds_json(path):
            yield number, Document(id=str(number), text=line)
        else:
            row = parse_object(path, number, line)
            if not numbered and not any(key in row for key in ID_KEYS):
                raise ValueError(f"{path}:{number}: needs an '_id' (the keys are {', '.join(sorted(row)) or 'none'})")
            yield number, _document(row, number, f"{path}:{number}")


def check_document(document: Document, where: str) -> Document:
    """Returns ``document``; raises ``ValueError`` when its id is empty or a text is no string or not Unicode."""
    for field in ("id", "title", "text"):
        value = getattr(document, field)
        if not isinstance(value, str):
            raise ValueError(f"{where}: {field} must be a string, got {type(value).__name__}")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise ValueError(
                f"{where}: {field} holds a lone surrogate ({code} at character {error.start}), which is no valid "
                "Unicode; remove or replace it"
            ) from None
    if not document.id:
        raise ValueError(f"{where}: the id is empty; give every document an id")
    return document


def _document(row: dict[str, Any], number: int, where: str) -> Document:
    if "text" not in row:
        raise ValueError(f"{where}: no 'text' (the keys are {', '.join(sorted(row)) or 'none'})")
    identifier = next((row[key] for key in ID_KEYS if key in row), str(number))
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    metadata = {key: value for key, value in row.items() if key not in {*ID_KEYS, "title", "text", "metadata"}}
    if row.get("metadata"):
        metadata |= row["metadata"] if isinstance(row["metadata"], dict) else {"metadata": row["metadata"]}
    title = row.get("title")
    document = Document(id=identifier, text=row["text"], title="" if title is None else title, metadata=metadata)
    return check_document(document, where)
