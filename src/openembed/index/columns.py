"""The metadata of a segment by value: which documents have it, on disk, memory-mapped.

All distinct (field, value) pairs are numbered field by field: false, true, numbers in order, strings in order of their
bytes. The documents of each lie together, so a value, and a range of them, is one run of positions to read.

    metadata.fields.json      field → [first pair, numbers, strings]: its pairs begin with false and true
    metadata.numbers.npy      the numbers of all fields, each field's sorted
    metadata.strings.bin      the strings of all fields, each field's sorted
    metadata.starts.npy       where each pair's documents start
    metadata.documents.npy    positions of documents

N documents, V pairs.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openembed.files import read_json
from openembed.index.filters import Value, flat_values, kind
from openembed.index.strings import Strings, StringsWriter, load_array, named, save_array

FIELDS = "metadata.fields.json"
LOW = {"gt": bisect_right, "gte": bisect_left}
HIGH = {"lt": bisect_left, "lte": bisect_right}


class _Place(NamedTuple):
    """Where a field's pairs, numbers and strings start, and how many numbers and strings it has."""

    pair: int
    number: int
    numbers: int
    string: int
    strings: int


class ColumnsWriter:
    """Collects the metadata of documents and writes it by value."""

    def __init__(self) -> None:
        self._fields: dict[str, dict[tuple[str, Value], list[int]]] = {}
        self._count = 0

    def add(self, metadata: Mapping[str, Any]) -> None:
        """Takes in the metadata of the next document."""
        for field, values in flat_values(metadata).items():
            pairs = self._fields.setdefault(field, {})
            for value in values:
                pairs.setdefault((kind(value), value), []).append(self._count)
        self._count += 1

    def write(self, directory: Path) -> None:
        """Writes the files."""
        places: dict[str, _Place] = {}
        numbers: list[float] = []
        lists: list[list[int]] = []
        strings = StringsWriter(directory, "metadata.strings")
        total = 0
        for field in sorted(self._fields):
            pairs = self._fields[field]
            own = sorted(value for sort, value in pairs if sort == "number")
            texts = sorted((value for sort, value in pairs if sort == "string"), key=lambda text: text.encode())
            places[field] = _Place(len(lists), len(numbers), len(own), total, len(texts))
            keys = [("boolean", False), ("boolean", True), *(("number", n) for n in own), *(("string", t) for t in texts)]
            lists.extend(pairs.get(key, []) for key in keys)
            numbers.extend(own)
            for text in texts:
                strings.append(text)
            total += len(texts)
        strings.close()
        save_array(directory / "metadata.numbers.npy", np.array(numbers, dtype=np.float64))
        starts_V = np.concatenate([[0], np.cumsum([len(found) for found in lists], dtype=np.int64)]).astype(np.int64)
        documents = np.fromiter((n for found in lists for n in found), dtype=np.int32, count=int(starts_V[-1]))
        save_array(directory / "metadata.starts.npy", starts_V)
        save_array(directory / "metadata.documents.npy", documents)
        with named(directory / FIELDS), (directory / FIELDS).open("w", encoding="utf-8") as file:
            json.dump({"count": self._count, "fields": places}, file, ensure_ascii=False)


class SegmentColumns:
    """The metadata of one segment, opened for filtering. Raises ``ValueError`` when a file is missing or damaged."""

    def __init__(self, directory: Path) -> None:
        path = directory / FIELDS
        if not path.exists():
            raise ValueError(f"{path}: missing; the index is damaged, build it anew")
        described = read_json(path)
        self.count = int(described["count"])
        self._fields = {field: _Place(*place) for field, place in described["fields"].items()}
        self._numbers = load_array(directory / "metadata.numbers.npy")
        self._strings = Strings(directory, "metadata.strings")
        self._starts_V = load_array(directory / "metadata.starts.npy")
        self._documents = load_array(directory / "metadata.documents.npy")
        if len(self._documents) != self._starts_V[-1]:
            raise ValueError(f"{directory / 'metadata.documents.npy'}: damaged, build the index anew")

    def equal(self, field: str, value: Value) -> np.ndarray:
        """Returns the positions of documents whose ``field`` is or holds ``value``."""
        return self._run(self._place(field, value, bisect_left), self._place(field, value, bisect_right))

    def between(self, field: str, bounds: Mapping[str, Value]) -> np.ndarray:
        """Returns the positions of documents with a value of ``field`` within ``bounds``; none where their types differ."""
        if len({kind(bound) for bound in bounds.values()}) != 1:
            return self._documents[:0]
        low = [self._place(field, bounds[name], side) for name, side in LOW.items() if name in bounds]
        high = [self._place(field, bounds[name], side) for name, side in HIGH.items() if name in bounds]
        edges = self._edges(field, kind(next(iter(bounds.values()))))
        return self._run(max([edges[0], *low]), min([edges[1], *high]))

    def existing(self, field: str) -> np.ndarray:
        """Returns the positions of documents that have ``field``."""
        place = self._fields.get(field)
        if place is None:
            return self._documents[:0]
        return self._run(place.pair, place.pair + 2 + place.numbers + place.strings)

    def _edges(self, field: str, sort: str | None) -> tuple[int, int]:
        """Returns the first pair of a type in a field, and the one after its last."""
        place = self._fields.get(field)
        if place is None:
            return 0, 0
        first = place.pair + 2
        if sort == "number":
            return first, first + place.numbers
        return first + place.numbers, first + place.numbers + place.strings

    def _place(self, field: str, value: Value, side: Any) -> int:
        """Returns the pair at which ``value`` would be put into its field, by ``bisect_left`` or ``bisect_right``."""
        place = self._fields.get(field)
        if place is None:
            return 0
        if isinstance(value, bool):
            return place.pair + value + (side is bisect_right)
        if isinstance(value, str):
            rank = self._strings.rank(value, side, place.string, place.string + place.strings)
            return place.pair + 2 + place.numbers + rank - place.string
        return place.pair + 2 + side(self._numbers[place.number : place.number + place.numbers], value)

    def _run(self, low: int, high: int) -> np.ndarray:
        return self._documents[self._starts_V[low] : self._starts_V[high]] if low < high else self._documents[:0]
