"""The rows of tasks that are no retrieval, read from their split files; a bad row is named by file and line."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

from openembed.data.readers import jsonl_path
from openembed.evaluation.retrieval import RerankingItem
from openembed.files import read_jsonl


def read_pairs(folder: Path, split: str, column: str) -> tuple[list[str], list[str], list[float]]:
    """Returns first sentences, second sentences and the numbers of ``column`` (``score`` or ``label``)."""
    first, second, numbers = [], [], []
    for where, row in _rows(folder, split):
        first.append(_text(row, "sentence1", where))
        second.append(_text(row, "sentence2", where))
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{where}: {column!r} must be a number, got {value!r}")
        if column == "label" and value not in (0, 1):
            raise ValueError(f"{where}: 'label' must be 0 or 1, got {value!r}")
        numbers.append(value)
    return first, second, numbers


def read_labelled(folder: Path, split: str) -> tuple[list[str], list[Hashable]]:
    """Returns texts and their labels (whole numbers or strings)."""
    texts: list[str] = []
    labels: list[Hashable] = []
    for where, row in _rows(folder, split):
        texts.append(_text(row, "text", where))
        if not isinstance(row.get("label"), int | str):
            raise ValueError(f"{where}: 'label' must be a whole number or a string, got {row.get('label')!r}")
        labels.append(row["label"])
    return texts, labels


def read_sets(folder: Path, split: str) -> list[tuple[list[str], list[Hashable]]]:
    """Returns clustering sets: a row of ``sentences`` and ``labels`` each, or the whole split of texts and labels."""
    sets = []
    for where, row in _rows(folder, split):
        if "sentences" not in row:
            return [read_labelled(folder, split)]
        sentences, labels = row["sentences"], row.get("labels")
        if not isinstance(sentences, list) or not isinstance(labels, list) or len(sentences) != len(labels):
            raise ValueError(f"{where}: 'sentences' and 'labels' must be lists of one length")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise ValueError(f"{where}: 'sentences' must be texts")
        if not all(isinstance(label, int | str) for label in labels):
            raise ValueError(f"{where}: 'labels' must be whole numbers or strings")
        sets.append((sentences, labels))
    return sets


def read_reranking(folder: Path, split: str) -> list[RerankingItem]:
    """Returns queries with positive and negative candidates; rows without an id get their number."""
    items: list[RerankingItem] = []
    first: dict[str, str] = {}
    for number, (where, row) in enumerate(_rows(folder, split)):
        positive, negative = ([row[key]] if isinstance(row.get(key), str) else row.get(key) for key in ("positive", "negative"))
        if not isinstance(positive, list) or not isinstance(negative, list):
            raise ValueError(f"{where}: 'positive' and 'negative' must be lists of texts")
        if not all(isinstance(text, str) for text in (*positive, *negative)):
            raise ValueError(f"{where}: 'positive' and 'negative' must be lists of texts")
        identity = str(row.get("id", number))
        if identity in first:
            raise ValueError(f"{where}: id {identity!r} is already at {first[identity]}; make ids unique")
        first[identity] = where
        items.append(RerankingItem(identity, _text(row, "query", where), tuple(positive), tuple(negative)))
    return items


def _rows(folder: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = jsonl_path(folder, split)
    empty = True
    for line, row in read_jsonl(path):
        empty = False
        yield f"{path}:{line}", row
    if empty:
        raise ValueError(f"{path}: holds no rows")


def _text(row: dict[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} must be a text, got {type(value).__name__}")
    return value
