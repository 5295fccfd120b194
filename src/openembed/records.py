"""What retrieval is about: queries, documents, training examples, judgements and rankings, as plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Qrels = dict[str, dict[str, int]]
"""Judgements: query id → document id → grade (0 or less is not relevant)."""

Run = dict[str, dict[str, float]]
"""A ranking: query id → document id → score. Ties are broken by document id, descending, as trec_eval does."""


@dataclass(frozen=True, slots=True)
class Query:
    """A query text with its id."""

    id: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Document:
    """A document with its id; ``full_text`` (title, a space, text) is what is encoded and indexed, as in BEIR."""

    id: str
    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def full_text(self) -> str:
        """Title and text joined by a space; the text alone when there is no title."""
        return f"{self.title} {self.text}".strip() if self.title else self.text


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: a query, at least one positive, and any number of hard negatives.

    ``positives`` and ``negatives`` are documents, so identity (``id``) and text travel together. ``negative_scores`` and
    ``positive_scores`` are a teacher's, where one scored them (same order as the documents). ``source`` names the data
    set, which decides instruction, in-batch permission and weight.
    """

    query: Query
    positives: tuple[Document, ...]
    negatives: tuple[Document, ...] = ()
    source: str = ""
    positive_scores: tuple[float, ...] = ()
    negative_scores: tuple[float, ...] = ()
