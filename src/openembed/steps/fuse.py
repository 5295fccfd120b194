"""Several rankings of the same queries made into one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from openembed.config import Config
from openembed.records import Run
from openembed.steps.retrieve import RetrieveConfig
from openembed.steps.search import Search, Step

if TYPE_CHECKING:
    from openembed.index.encoding import Encoders
    from openembed.index.store import Store


DEPTH = 100
"""Documents that each ranking gives to a fusion, at least."""


def fused_depth(k: int) -> int:
    """Returns how many documents of each ranking are fused for the k best."""
    return max(k, DEPTH)


class FuseConfig(Config):
    """Runs ``parts`` on the same queries and fuses their rankings, keeping ``k`` documents a query."""

    kind: Literal["fuse"] = "fuse"
    parts: tuple[RetrieveConfig, ...] = Field(min_length=1)
    method: Literal["reciprocal_rank", "min_max"] = "reciprocal_rank"
    constant: float = Field(60.0, gt=0)
    weights: tuple[float, ...] | None = None
    k: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _one_weight_a_part(self) -> FuseConfig:
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ValueError(f"{len(self.weights)} weights for {len(self.parts)} parts; give one for each")
        return self

    def build(self, store: Store, encoder: Encoders = None) -> Step:
        """Returns the step."""
        steps = [part.build(store, encoder) for part in self.parts]

        def step(search: Search) -> Search:
            runs = [part(search).run for part in steps]
            if self.method == "reciprocal_rank":
                fused = reciprocal_rank(runs, constant=self.constant, weights=self.weights)
            else:
                fused = min_max(runs, weights=self.weights)
            return replace(search, run={query: dict(list(hits.items())[: self.k]) for query, hits in fused.items()})

        return step


def reciprocal_rank(runs: Sequence[Run], *, constant: float = 60.0, weights: Sequence[float] | None = None) -> Run:
    """Returns Σ weight / (constant + rank) for each document, rank from 1 (Cormack et al. 2009: constant 60).

    A document absent from a ranking gets nothing from it. The order of the runs does not matter, to the last bit.
    """
    return _fused(runs, weights, lambda hits: {d: 1.0 / (constant + n) for n, d in enumerate(ranked(hits), 1)})


def min_max(runs: Sequence[Run], *, weights: Sequence[float] | None = None) -> Run:
    """Returns Σ weight · (score − least) / (greatest − least) for each document; a ranking of equal scores gives 1.

    A document absent from a ranking gets 0 from it, as its last one does.
    """
    return _fused(runs, weights, _scaled)


def ranked(hits: dict[str, float]) -> dict[str, float]:
    """Returns ``hits`` best first: score descending, then document id descending."""
    return dict(sorted(hits.items(), key=lambda hit: (hit[1], hit[0]), reverse=True))


def _scaled(hits: dict[str, float]) -> dict[str, float]:
    least, greatest = min(hits.values(), default=0.0), max(hits.values(), default=0.0)
    width = greatest - least
    return {document: (score - least) / width if width > 0 else 1.0 for document, score in hits.items()}


def _fused(
    runs: Sequence[Run], weights: Sequence[float] | None, values_of: Callable[[dict[str, float]], dict[str, float]]
) -> Run:
    weights = [1.0] * len(runs) if weights is None else weights
    if len(weights) != len(runs):
        raise ValueError(f"{len(weights)} weights for {len(runs)} runs; give one for each")
    terms: dict[str, dict[str, list[float]]] = {}
    for run, weight in zip(runs, weights, strict=True):
        for query, hits in run.items():
            of_query = terms.setdefault(query, {})
            for document, value in values_of(hits).items():
                of_query.setdefault(document, []).append(weight * value)
    return {query: ranked({d: math.fsum(parts) for d, parts in documents.items()}) for query, documents in terms.items()}
