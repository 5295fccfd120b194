"""The outcome of one task, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from openembed.evaluation.statistics import Interval
from openembed.records import Run


@dataclass(frozen=True)
class Outcome:
    """What a protocol measured: the main score, everything else, and what is needed to test it against another system.

    ``per_item``: metric → item id → value, for metrics that are a mean over items (queries, classified texts); the main
    score is among them then. ``paired``: parallel arrays (``gold``, ``predicted`` …) for scores that are no mean (STS,
    pair classification), so that resampling can recompute them. ``run``: the rankings, where there are any. ``costs``: bytes
    and milliseconds, where documents were searched (:mod:`openembed.evaluation.costs`).
    """

    metric: str
    value: float
    interval: Interval | None
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    per_item: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    paired: Mapping[str, list[float]] = field(default_factory=dict)
    run: Run | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskResult:
    """One finished task of one system: who, what, how much, how sure, how long. Scores are 0 to 1."""

    task: str
    kind: str
    split: str
    system: str
    metric: str
    value: float
    interval: Interval | None
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    seconds: float
    prompts: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    costs: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON; :meth:`from_dict` reads it back."""
        interval = None if self.interval is None else [self.interval.low, self.interval.high]
        return {**vars(self), "interval": interval}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskResult:
        """Returns the result that :meth:`as_dict` wrote."""
        return cls(**{**values, "interval": values["interval"] and Interval(*values["interval"])})
