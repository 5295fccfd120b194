"""Which of a query's ranked candidates become its negatives: the policies of NV-Retriever (arXiv 2407.15831), pure functions.

    naive top-k        filter none
    shifted by N       filter none, skip N
    absolute           filter absolute t
    TopK-MarginPos     filter margin m
    TopK-PercPos       filter percent c

P candidates of one query, best first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from openembed.config import Config
from openembed.data.margin import MarginConfig
from openembed.rerankers import Scale


class PolicyConfig(Config):
    """What to take of a ranking: ``keep`` negatives from the ``pool`` best after ``skip``, those below the ceiling ``filter``.

    ``sample``: the ``top`` ones, or ``keep`` of the best ``sample_from`` survivors (none: of all) drawn ``uniform`` or by
    ``softmax`` of score / ``temperature``, without replacement. ``short``: what becomes of a query with fewer than ``keep``
    survivors: ``keep`` what there is; ``relax`` and go on below the pool, still under the ceiling; fill up with ``random``
    documents under the ceiling; ``drop`` the query.
    """

    keep: int = Field(default=20, ge=1)
    pool: int = Field(default=100, ge=1)
    skip: int = Field(default=0, ge=0)
    filter: MarginConfig = MarginConfig()
    sample: Literal["top", "uniform", "softmax"] = "top"
    sample_from: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.05, gt=0)
    short: Literal["keep", "relax", "random", "drop"] = "keep"

    @model_validator(mode="after")
    def _enough_to_draw_from(self) -> PolicyConfig:
        if self.sample != "top" and self.sample_from is not None and self.sample_from < self.keep:
            raise ValueError(
                f"cannot draw {self.keep} (keep) from {self.sample_from} (sample_from); lower keep or raise sample_from"
            )
        return self

    @property
    def label(self) -> str:
        """The policy in a few words, such as ``percent 0.95, skip 10, softmax``."""
        rule = "no ceiling" if self.filter.kind == "none" else f"{self.filter.kind} {self.filter.value:g}"
        parts = [rule, *([f"skip {self.skip}"] if self.skip else []), *([self.sample] if self.sample != "top" else [])]
        return ", ".join(parts)

    def check_scale(self, scale: Scale, teacher: str) -> None:
        """Raises ``ValueError`` for a percentage of log-odds: they have neither a zero nor a unit that it could be of."""
        if self.filter.kind == "percent" and scale == "log_odds":
            raise ValueError(
                f"filter percent has no meaning on the log-odds of {teacher}; use filter margin or absolute, or its sigmoid"
            )


@dataclass(frozen=True)
class Ranking:
    """A query's candidates, best first: documents int64 (P,), scores float32 (P,); and the scores of its positives.

    Known positives and their copies are not among the candidates. ``passed``: how many candidates were left out, by reason.
    """

    documents: np.ndarray
    scores: np.ndarray
    positives: np.ndarray
    positive_scores: np.ndarray
    passed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Picked:
    """The chosen documents with score and rank (from 1, among the candidates; 0: drawn at random), best first.

    ``refused``: places in the ranking at or above the ceiling; ``survivors``: how many of the pool were below it; ``filled``:
    how many of the chosen came from below the pool or at random.
    """

    documents: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray
    refused: np.ndarray
    survivors: int
    filled: int = 0

    def with_fill(self, documents: np.ndarray, scores: np.ndarray, ranks: np.ndarray) -> Picked:
        """Returns this with more documents below the chosen ones."""
        return Picked(
            np.concatenate([self.documents, documents]),
            np.concatenate([self.scores, scores]),
            np.concatenate([self.ranks, ranks]),
            self.refused,
            self.survivors,
            self.filled + len(documents),
        )


def ceiling(config: PolicyConfig, positive_scores: np.ndarray) -> float:
    """Returns the score at or above which a candidate is refused, set by the lowest-scored positive."""
    return float(config.filter.ceiling(np.float64(positive_scores.min())))


def pick(config: PolicyConfig, ranking: Ranking, generator: np.random.Generator | None = None) -> Picked:
    """Returns the negatives of one query; ``generator`` is needed to sample."""
    places = np.arange(len(ranking.documents))[config.skip : config.skip + config.pool]
    below = ranking.scores[places].astype(np.float64) < ceiling(config, ranking.positive_scores)
    survivors = places[below]
    chosen = survivors[_chosen(config, ranking.scores[survivors], generator)]
    return Picked(ranking.documents[chosen], ranking.scores[chosen], chosen + 1, places[~below], len(survivors))


def _chosen(config: PolicyConfig, scores: np.ndarray, generator: np.random.Generator | None) -> np.ndarray:
    """Places among the survivors, in order; softmax sampling without replacement is the top of score / t + Gumbel noise."""
    scores = scores[: config.sample_from if config.sample != "top" else None]
    if config.sample == "top" or len(scores) <= config.keep:
        return np.arange(min(len(scores), config.keep))
    assert generator is not None, "sampling takes a generator"
    weights = scores.astype(np.float64) / config.temperature if config.sample == "softmax" else np.zeros(len(scores))
    return np.sort(np.argsort(-(weights + generator.gumbel(size=len(scores))))[: config.keep])
