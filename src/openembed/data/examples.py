"""Training examples as JSON lines, read leniently and written in one form.

A line has ``query``, ``positive`` or ``positives``, and optionally ``negative`` or ``negatives``. A query is a text or
``{"id", "text"}``; a document is a text or ``{"id", "title", "text", "score"}``, where ``score`` is a teacher's and ``id``
may also be called ``_id`` or ``docid``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openembed.files import atomic_write
from openembed.records import Document, Example, Query


def parse_example(row: Mapping[str, Any], source: str, where: str) -> Example:
    """Returns the example of one row; raises ``ValueError`` naming ``where`` and the field that does not fit."""
    if row.get("query") is None:
        raise ValueError(f"{where}: no 'query'; fields here: {', '.join(sorted(row)) or 'none'} (rename with columns)")
    query = _entry(row["query"], f"{where}: query")
    positives, positive_scores = _documents(row, "positive", where)
    negatives, negative_scores = _documents(row, "negative", where)
    if not positives:
        raise ValueError(f"{where}: no 'positive' or 'positives' document")
    return Example(
        Query(_query_id(row, query), query["text"]),
        positives,
        negatives,
        source,
        positive_scores,
        negative_scores,
    )


def write_examples(path: str | Path, examples: Iterable[Example], notes: Iterable[Mapping[str, Any]] = ()) -> None:
    """Writes examples to ``path`` atomically; ``notes`` (one an example, or none at all) are added to the rows."""
    with atomic_write(path) as file:
        remaining = iter(notes)
        for example in examples:
            file.write(example_line(example, next(remaining, {})))


def example_line(example: Example, note: Mapping[str, Any]) -> str:
    """Returns the JSON line of one example, with the entries of ``note`` added."""
    row = {
        "query": {"id": example.query.id, "text": example.query.text},
        "positives": _rows(example.positives, example.positive_scores),
        "negatives": _rows(example.negatives, example.negative_scores),
        **note,
    }
    return _line(row)


def _line(row: Mapping[str, Any]) -> str:
    """The row as one JSON line; escaped where it holds a lone surrogate, which UTF-8 cannot carry."""
    line = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(row) + "\n"
    return line


def _rows(documents: Sequence[Document], scores: Sequence[float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, document in enumerate(documents):
        row: dict[str, Any] = {"id": document.id, "text": document.text}
        if document.title:
            row["title"] = document.title
        if scores:
            row["score"] = scores[number]
        rows.append(row)
    return rows


def _documents(row: Mapping[str, Any], field: str, where: str) -> tuple[tuple[Document, ...], tuple[float, ...]]:
    values = next((row[name] for name in (f"{field}s", field) if row.get(name) is not None), [])
    entries = [_entry(value, f"{where}: {field}") for value in (values if isinstance(values, list) else [values])]
    scores = [entry["score"] for entry in entries if entry.get("score") is not None]
    if scores and len(scores) != len(entries):
        raise ValueError(f"{where}: {field}: {len(scores)} of {len(entries)} documents have a score; give all or none")
    documents = tuple(Document(_identifier(e), e["text"], e.get("title") or "") for e in entries)
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{where}: {field}: 'score' must be a finite number, got {score!r:.80}")
    return documents, tuple(float(score) for score in scores)


def _query_id(row: Mapping[str, Any], query: Mapping[str, Any]) -> str:
    return str(next((value for value in (row.get("query_id"), query.get("id")) if value is not None), ""))


def _identifier(entry: Mapping[str, Any]) -> str:
    """The id under the names that are in use: ours, BEIR's, and that of MIRACL and Mr.TyDi."""
    return str(next((entry[name] for name in ("id", "_id", "docid") if entry.get(name) is not None), ""))


def _entry(value: Any, where: str) -> Mapping[str, Any]:
    entry = {"text": value} if isinstance(value, str) else value
    if not isinstance(entry, Mapping) or not isinstance(entry.get("text"), str):
        raise ValueError(f"{where}: expected a text or an object with 'text', got {value!r:.80}")
    return entry
