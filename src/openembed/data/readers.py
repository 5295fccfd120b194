"""BEIR folders and TREC files to records and back. Whatever is wrong in a file is named by file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from openembed.documents import read_documents
from openembed.files import atomic_write, read_lines
from openembed.records import Document, Qrels, Query, Run

BEIR_HEADER = ("query-id", "corpus-id", "score")


def jsonl_path(folder: str | Path, stem: str) -> Path:
    """Returns ``stem.jsonl`` or ``stem.jsonl.gz`` of a folder; ``FileNotFoundError`` when neither is there."""
    for suffix in (".jsonl", ".jsonl.gz"):
        path = Path(folder) / f"{stem}{suffix}"
        if path.exists():
            return path
    raise FileNotFoundError(f"{folder}: holds neither {stem}.jsonl nor {stem}.jsonl.gz")


def read_corpus(folder: str | Path) -> list[Document]:
    """Returns the documents of a BEIR folder in file order; each has an id of its own. Raises what ``read_documents`` does."""
    return list(read_documents(jsonl_path(folder, "corpus"), numbered=False))


def read_queries(folder: str | Path) -> list[Query]:
    """Returns the queries of a BEIR folder in file order; each has an id of its own. Lines are read as a corpus's are."""
    rows = read_documents(jsonl_path(folder, "queries"), numbered=False)
    return [Query(row.id, row.text, row.metadata) for row in rows]


def read_beir_qrels(path: str | Path) -> Qrels:
    """Returns the judgements of a BEIR ``qrels/<split>.tsv``: a header, then query id, document id, whole grade."""
    qrels: Qrels = {}
    for line, fields in _lines(path):
        if line == 1:
            if len(fields) != 3 or _is_integer(fields[2]):
                raise ValueError(f"{path}:1: expected the header {' '.join(BEIR_HEADER)}, got {fields}; add the header line")
            continue
        if len(fields) != 3:
            raise ValueError(f"{path}:{line}: expected 3 columns (query id, document id, grade), got {len(fields)}")
        _judge(qrels, fields[0], fields[1], fields[2], f"{path}:{line}")
    return qrels


def beir_splits(folder: str | Path) -> list[str]:
    """Returns the names of the splits a BEIR folder has judgements for, sorted."""
    return sorted(path.stem for path in (Path(folder) / "qrels").glob("*.tsv"))


def read_beir(folder: str | Path, split: str = "test") -> tuple[list[Document], list[Query], Qrels]:
    """Returns corpus, all queries and the judgements of ``split``.

    Raises ``ValueError`` for duplicate ids, malformed lines, grades that are no whole numbers, and judgements that name
    an unknown query or document; ``FileNotFoundError`` listing the splits when ``split`` is not there.
    """
    path = Path(folder) / "qrels" / f"{split}.tsv"
    if not path.exists():
        known = ", ".join(beir_splits(folder)) or "none"
        raise FileNotFoundError(f"{path}: no such split; this folder has {known}; name one with split (--split)")
    corpus, queries, qrels = read_corpus(folder), read_queries(folder), read_beir_qrels(path)
    query_ids, document_ids = {query.id for query in queries}, {document.id for document in corpus}
    for query_id, judged in qrels.items():
        if query_id not in query_ids:
            raise ValueError(f"{path}: query {query_id!r} is judged but not in queries.jsonl; add it or drop its lines")
        for document_id in judged:
            if document_id not in document_ids:
                raise ValueError(
                    f"{path}: document {document_id!r} is judged for query {query_id!r} but not in corpus.jsonl; "
                    "add it or drop the line"
                )
    return corpus, queries, qrels


def write_beir(folder: str | Path, corpus: Iterable[Document], queries: Iterable[Query], qrels: dict[str, Qrels]) -> None:
    """Writes a BEIR folder: ``corpus.jsonl``, ``queries.jsonl`` and a ``qrels/<split>.tsv`` for each split."""
    folder = Path(folder)
    _write_jsonl(folder / "corpus.jsonl", ({"_id": d.id, "title": d.title, "text": d.text, **d.metadata} for d in corpus))
    _write_jsonl(folder / "queries.jsonl", ({"_id": q.id, "text": q.text, **q.metadata} for q in queries))
    for split, judgements in qrels.items():
        with atomic_write(folder / "qrels" / f"{split}.tsv") as file:
            file.write("\t".join(BEIR_HEADER) + "\n")
            for query_id, judged in judgements.items():
                for document_id, grade in judged.items():
                    file.write("\t".join((_field(query_id, "\t\n\r"), _field(document_id, "\t\n\r"), str(grade))) + "\n")


def read_trec_qrels(path: str | Path) -> Qrels:
    """Returns the judgements of a TREC qrels file (query id, 0, document id, grade), or of a BEIR one with header."""
    if tuple(next(_lines(path, separator=None), (0, []))[1]) == BEIR_HEADER:
        return read_beir_qrels(path)
    qrels: Qrels = {}
    for line, fields in _lines(path, separator=None):
        if len(fields) != 4:
            raise ValueError(f"{path}:{line}: expected 4 columns (query id, 0, document id, grade), got {len(fields)}")
        _judge(qrels, fields[0], fields[2], fields[3], f"{path}:{line}")
    return qrels


def write_trec_qrels(path: str | Path, qrels: Qrels) -> None:
    """Writes judgements as TREC qrels, atomically."""
    with atomic_write(path) as file:
        for query_id, judged in qrels.items():
            for document_id, grade in judged.items():
                file.write(f"{_field(query_id)} 0 {_field(document_id)} {grade}\n")


def read_run(path: str | Path) -> Run:
    """Returns a six-column TREC run (query id, Q0, document id, rank, score, tag), ordered by score, not by rank."""
    run: Run = {}
    for line, fields in _lines(path, separator=None):
        where = f"{path}:{line}"
        if len(fields) != 6:
            raise ValueError(f"{where}: expected 6 columns (query id, Q0, document id, rank, score, tag), got {len(fields)}")
        query_id, _, document_id, _, score, _ = fields
        try:
            value = float(score)
        except ValueError:
            raise ValueError(f"{where}: the score must be a number, got {score!r}") from None
        if not math.isfinite(value):
            raise ValueError(f"{where}: the score must be finite, got {score!r}")
        ranking = run.setdefault(query_id, {})
        if document_id in ranking:
            raise ValueError(f"{where}: document {document_id!r} is listed twice for query {query_id!r}; keep one line")
        ranking[document_id] = value
    return run


def write_run(path: str | Path, run: Run, tag: str = "openembed") -> None:
    """Writes a TREC run, best first, ties by document id descending; scores survive a round trip exactly."""
    with atomic_write(path) as file:
        for query_id, ranking in run.items():
            for rank, (document_id, score) in enumerate(ranked(ranking), 1):
                file.write(f"{_field(query_id)} Q0 {_field(document_id)} {rank} {float(score)!r} {_field(tag)}\n")


def ranked(ranking: dict[str, float]) -> list[tuple[str, float]]:
    """Returns (document id, score) best first; equal scores by document id descending, as trec_eval orders them."""
    return sorted(ranking.items(), key=lambda item: (item[1], item[0]), reverse=True)


def _lines(path: str | Path, separator: str | None = "\t") -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(path):
        if line.strip():
            yield number, line.split(separator)


def _judge(qrels: Qrels, query_id: str, document_id: str, grade: str, where: str) -> None:
    if not _is_integer(grade):
        raise ValueError(f"{where}: the grade must be a whole number, got {grade!r}; round it or drop the line")
    judged = qrels.setdefault(query_id, {})
    if judged.setdefault(document_id, int(grade)) != int(grade):
        raise ValueError(f"{where}: document {document_id!r} has two grades for query {query_id!r}; keep one")


def _is_integer(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _field(value: str, forbidden: str | None = None) -> str:
    bad = any(c in value for c in forbidden) if forbidden else value.split() != [value]
    if bad:
        raise ValueError(f"id {value!r} holds white space, which separates the columns of this format; rename it")
    return value


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
