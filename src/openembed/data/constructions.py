"""How rows of texts and labels, or of scored pairs, become training examples.

``label_text`` is NV-Embed v1's rule for classification and clustering (arXiv 2405.17428v1, section 4.2): the label's text
is the document. ``class_examples`` is v2's (v3 of the paper, section 4): another text of the class is. ``scored_pairs`` is
the rule of both for semantic similarity.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openembed.records import Document, Example, Query

logger = logging.getLogger(__name__)

POOLED_POSITIVES = 8
POOLED_NEGATIVES = 32
"""Class and label constructions give each example this many random documents; every batch draws anew from them."""

Row = tuple[str, Mapping[str, Any]]
"""(where, row): where names file and line for errors; columns are already renamed to fields."""


@dataclass(frozen=True)
class Labelled:
    """A text and its labels as texts, the main one first; most sets have one label a text."""

    text: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ScoredPair:
    """Two sentences and how similar people found them."""

    first: str
    second: str
    score: float


def read_labelled(
    rows: Iterable[Row], source: str, label_texts: Mapping[str, str], separator: str | None
) -> tuple[list[Labelled], bool]:
    """Returns the labelled texts, and whether any label is more than a number, so that it can stand for its meaning.

    A row has ``text`` and one of: ``categories`` (a list, or a string that ``separator`` divides), ``label_text``,
    ``label``. ``label_texts`` gives the text of each label value (``label``, or else the others). Rows without a text
    are left out. Raises ``ValueError`` for a missing field and a label that ``label_texts`` lacks.
    """
    labelled, blank, worded = [], 0, False
    for where, row in rows:
        text = text_field(row, "text", where)
        values = [_whole(value) for value in _label_values(row, separator, where, prefer_value=bool(label_texts))]
        if label_texts:
            unknown = [value for value in values if str(value) not in label_texts]
            if unknown:
                raise ValueError(f"{where}: label {unknown[0]!r} has no text in label_texts; known: {', '.join(label_texts)}")
            values = [label_texts[str(value)] for value in values]
        worded |= not all(str(value).removeprefix("-").isdecimal() for value in values)
        if text.strip():
            labelled.append(Labelled(text, tuple(dict.fromkeys(map(str, values)))))
        else:
            blank += 1
    if blank:
        logger.info("source %r: %d rows without a text left out", source, blank)
    return labelled, worded


def _whole(value: Any) -> Any:
    """1 for 1.0: a column of numbers with a gap is read as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _label_values(row: Mapping[str, Any], separator: str | None, where: str, *, prefer_value: bool) -> list[Any]:
    if row.get("categories") is not None:
        value = row["categories"]
        values = value.split(separator) if isinstance(value, str) and separator else value
        values = list(values) if isinstance(values, list | tuple) else [values]
        values = [item.strip() if isinstance(item, str) else item for item in values]
        if not any(str(item) for item in values):
            raise ValueError(f"{where}: 'categories' is empty")
        return [item for item in values if str(item)]
    order = ("label", "label_text") if prefer_value else ("label_text", "label")
    for field in order:
        if row.get(field) is not None:
            return [row[field]]
    raise ValueError(f"{where}: no 'label', 'label_text' or 'categories' (fields: {', '.join(sorted(row))})")


def stratified(labels: Sequence[str], count: int, random: np.random.Generator) -> list[int]:
    """Returns ``count`` places of ``labels``, sorted, each label's share of them as near as can be to its share of all.

    Seats go by largest remainder; while there are at least as many as labels, every label has one.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    names = sorted(places)
    exact = np.array([len(places[name]) for name in names]) * (count / len(labels))
    seats = np.floor(exact).astype(int)
    if count >= len(names):
        seats = np.maximum(seats, 1)
    while seats.sum() < count:
        seats[np.argmax(exact - seats)] += 1
    while seats.sum() > count:  # single seats for rare labels come from those most over their share
        seats[np.argmax(np.where(seats > 1, seats - exact, -np.inf))] -= 1
    chosen: list[int] = []
    for name, seat in zip(names, seats.tolist(), strict=True):
        chosen += random.permutation(places[name])[:seat].tolist()
    return sorted(chosen)


def label_examples(rows: Sequence[Labelled], chosen: Iterable[int], source: str, random: np.random.Generator) -> list[Example]:
    """Query = text, positives = the texts of its labels (a batch draws one), negatives = labels that are not its own.

    NV-Embed v1: the positive is the category or a random one of several. A binary set gives one negative.
    """
    every = sorted({label for row in rows for label in row.labels})
    documents = {label: Document(f"label:{label}", label) for label in every}
    examples = []
    for number in chosen:
        row = rows[number]
        others = [label for label in every if label not in row.labels]
        negatives = tuple(documents[others[index]] for index in _choose(len(others), POOLED_NEGATIVES, random))
        examples.append(Example(Query("", row.text), tuple(documents[label] for label in row.labels), negatives, source))
    return examples


def with_classmate(rows: Sequence[Labelled]) -> list[int]:
    """Returns the places of the rows that have another row of their (main) class: those that can be queries."""
    size: dict[str, int] = defaultdict(int)
    for row in rows:
        size[row.labels[0]] += 1
    return [place for place, row in enumerate(rows) if size[row.labels[0]] > 1]


def class_examples(rows: Sequence[Labelled], chosen: Iterable[int], source: str, random: np.random.Generator) -> list[Example]:
    """Positives = other texts of the main class, negatives = texts that share no label with the query.

    The class is the documents' id, so that no text of the query's class is ever its negative. The query's own text, where the
    set has it twice, is neither; a row whose class has no other text gives no example.
    """
    documents = [Document(f"class:{row.labels[0]}", row.text) for row in rows]
    members: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        members[row.labels[0]].append(place)
    every, wanted, examples = [place for mates in members.values() for place in mates], set(chosen), []
    for mates in members.values():
        for own, place in enumerate(mates):
            if place in wanted:
                drawn = _choose(len(mates) - 1, POOLED_POSITIVES, random)
                text = rows[place].text
                mine = [documents[mates[other + (other >= own)]] for other in drawn]
                outside = [documents[other] for other in _sample_outside(rows, every, set(rows[place].labels), random)]
                positives, negatives = (tuple(d for d in found if d.text != text) for found in (mine, outside))
                if positives:
                    examples.append(Example(Query("", text), positives, negatives, source))
    return examples


def _choose(available: int, count: int, random: np.random.Generator) -> list[int]:
    if available <= count:
        return list(range(available))
    return random.choice(available, size=count, replace=False).tolist()


def _sample_outside(
    rows: Sequence[Labelled], places: Sequence[int], labels: set[str], random: np.random.Generator
) -> list[int]:
    """Up to ``POOLED_NEGATIVES`` rows without any of ``labels``, from twice as many draws of ``places``.

    A dominant class may leave fewer.
    """
    drawn = dict.fromkeys(random.integers(len(places), size=2 * POOLED_NEGATIVES).tolist())
    outside = [places[index] for index in drawn if labels.isdisjoint(rows[places[index]].labels)]
    return outside[:POOLED_NEGATIVES]


def read_scored(rows: Iterable[Row]) -> list[ScoredPair]:
    """Returns the pairs of rows with ``sentence1``, ``sentence2`` and a finite number ``score``."""
    pairs = []
    for where, row in rows:
        score = row.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{where}: 'score' must be a number, got {score!r:.80}")
        pairs.append(ScoredPair(text_field(row, "sentence1", where), text_field(row, "sentence2", where), float(score)))
    return pairs


def scored_examples(pairs: Iterable[ScoredPair], minimum: float, source: str) -> list[Example]:
    """Each pair scored ``minimum`` or more, once in either direction (NV-Embed v1: 4 of 5); not a text with itself."""
    return [
        Example(Query("", query), (Document("", document),), source=source)
        for pair in pairs
        if pair.score >= minimum and pair.first != pair.second
        for query, document in ((pair.first, pair.second), (pair.second, pair.first))
    ]


def text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    """Returns the text of a field; raises ``ValueError`` naming the fields that are there."""
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a text, got {value!r:.80} (fields: {', '.join(sorted(row))})")
    return value
