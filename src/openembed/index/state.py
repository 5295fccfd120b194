"""What a store has open: its manifest, the segments that it names, and the searches made for them.

It is never changed but for searches that are made when they are needed first; a change of the store puts another in its place.
Whatever reads a store takes its state once and reads that, so that threads which share a store may search while one changes it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from openembed.index import sparse
from openembed.index.filters import Filter, parse_filter
from openembed.index.lexical import Bm25, analyzer
from openembed.index.manifest import Kind, Manifest, ModelInfo
from openembed.index.segments import Segment

Condition = Mapping[str, Any] | Filter | None
"""What a search may find: as ``filters.parse_filter`` takes it; None: everything."""


class State:
    """One state of the store in ``directory``. Places are (segment, position in it); positions count through the segments."""

    def __init__(self, directory: Path, manifest: Manifest, segments: Sequence[Segment]) -> None:
        self.directory, self.manifest, self.segments = directory, manifest, tuple(segments)
        self.starts = [0, *accumulate(segment.count for segment in segments)]
        self.analyzer = analyzer(manifest.language)
        self.models: dict[Kind, ModelInfo] = {model.kind: model for model in manifest.models}

    @cached_property
    def words(self) -> Bm25:
        """BM25 of the live documents."""
        return Bm25([segment.postings for segment in self.segments], [segment.live_N for segment in self.segments])

    @cached_property
    def terms(self) -> sparse.Searches:
        """Searches of the live documents by sparse vectors."""
        return self.terms_among(None)

    def terms_among(self, condition: Condition) -> sparse.Searches:
        """Returns searches by sparse vectors of the documents for which the condition holds."""
        fields: list[sparse.SparseField] = [segment.fields["sparse"] for segment in self.segments]
        masks = self.eligible(condition)
        return sparse.Searches([sparse.SparseVectors(field, mask) for field, mask in zip(fields, masks, strict=True)])

    def eligible(self, condition: Condition) -> list[np.ndarray]:
        """Returns for each segment which documents may be found, bool (N)."""
        if condition is None:
            return [segment.live_N for segment in self.segments]
        parsed = parse_filter(condition) if isinstance(condition, Mapping) else condition
        return [segment.live_N & segment.matching(parsed) for segment in self.segments]

    def model_of(self, kind: Kind) -> ModelInfo:
        """Returns the model of the vectors of a kind; raises ``ValueError`` saying what the store has instead."""
        if kind in self.models:
            return self.models[kind]
        if not self.models:
            raise ValueError(f"{self.directory}: was built without a model, so it serves BM25 only; index with a model")
        held, lacking = " and ".join(each.removesuffix("s") for each in self.models), kind.removesuffix("s")
        raise ValueError(
            f"{self.directory}: has no {lacking} vectors, only {held} ones; index with a model that gives {lacking} ones"
        )

    def find(self, identifier: str) -> tuple[int, int] | None:
        """Returns the place of the live document of this id, or None."""
        for number, segment in enumerate(self.segments):
            position = segment.find(identifier)
            if position is not None:
                return number, position
        return None

    def place(self, identifier: str) -> tuple[int, int]:
        """Returns the place of the live document of this id; raises ``ValueError`` where there is none."""
        place = self.find(identifier)
        if place is None:
            raise ValueError(f"{self.directory}: no document with id {identifier!r}")
        return place

    def position(self, identifier: str) -> int:
        """As ``place``, counted through the segments."""
        number, position = self.place(identifier)
        return self.starts[number] + position

    def id_at(self, position: int) -> str:
        """Returns the id of the document at a position that counts through the segments."""
        number = bisect_right(self.starts, position) - 1
        return self.segments[number].ids[position - self.starts[number]]

    def named(self, ranking: Sequence[tuple[int, float]]) -> dict[str, float]:
        """Returns a ranking of positions by ids, in its order."""
        return {self.id_at(position): score for position, score in ranking}
