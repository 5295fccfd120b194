"""What a sweep compares: variants of one recipe, how they are grouped, and the claims they put to the test."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, model_validator

from openembed.config import Config, Name
from openembed.evaluation.metrics import RETRIEVAL_METRICS

OVERALL = "overall"
"""The metric that is the mean of a sweep's ``measure`` means."""


class Variant(Config):
    """The recipe with ``settings`` (``path.to.key=value``) applied; its stage ``model`` is scored (or ``untrained``, ``bm25``,
    the package's own model).

    ``stages`` puts mine and train stages in another order than the recipe's. Only what ``model`` needs is run.
    """

    title: str = Field(min_length=1)
    model: str
    settings: tuple[str, ...] = ()
    stages: tuple[Name, ...] = ()


class Group(Config):
    """Variants that are shown together; a variant may stand in several groups."""

    title: str
    note: str = ""
    variants: tuple[Name, ...] = Field(min_length=1)


class Claim(Config):
    """``text`` says that variant ``better`` scores above variant ``worse`` in ``metric``; ``paper``: its own figures."""

    text: str
    better: Name
    worse: Name
    metric: str = OVERALL
    paper: str = ""


class SweepConfig(Config):
    """Variants, each run with every seed and scored by the tasks of the stage ``evaluate``.

    ``measure``: name → tasks whose mean it is. ``also``: further metrics, such as ``recall_at_100``, as means of tasks.
    Metrics of claims are tasks, measures, ``overall``, the mean of the measures, or one of ``also``.
    """

    seeds: tuple[int, ...] = Field(min_length=1)
    evaluate: Name = "evaluate"
    measure: dict[Name, tuple[str, ...]] = Field(min_length=1)
    also: tuple[str, ...] = ()
    variant: dict[Name, Variant] = Field(min_length=1)
    group: tuple[Group, ...] = Field(min_length=1)
    claim: tuple[Claim, ...] = ()

    @model_validator(mode="after")
    def _metrics_are_known(self) -> SweepConfig:
        if unknown := [name for name in self.also if name not in RETRIEVAL_METRICS]:
            raise ValueError(f"also: no metric {', '.join(unknown)} is kept; choose from {', '.join(RETRIEVAL_METRICS)}")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> SweepConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {self.seeds}")
        problems = [f"{where}: no variant {name!r}" for where, name in self._references() if name not in self.variant]
        metrics = {OVERALL, *self.also, *self.measure, *(task for tasks in self.measure.values() for task in tasks)}
        problems += [f"claim {c.text!r}: no metric {c.metric!r}" for c in self.claim if c.metric not in metrics]
        if problems:
            raise ValueError(
                f"{'; '.join(problems)}. Variants: {', '.join(self.variant)}; metrics: {', '.join(sorted(metrics))}"
            )
        return self

    def _references(self) -> Iterator[tuple[str, str]]:
        for group in self.group:
            yield from ((f"group {group.title!r}", name) for name in group.variants)
        for claim in self.claim:
            yield from ((f"claim {claim.text!r}", name) for name in (claim.better, claim.worse))
