"""How sure a mean over training seeds is, and whether two variants differ: seeds and test items both count as chance.

Shapes: ``S`` seeds, ``N`` items of a task (queries, texts, pairs), ``R`` resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from openembed.evaluation.result import TaskResult
from openembed.evaluation.statistics import CONFIDENCE, Interval, generator
from openembed.evaluation.sts import spearman

RESAMPLES = 400
Verdict = Literal["holds", "does not hold", "cannot be told"]


@dataclass(frozen=True)
class SeedScores:
    """A variant's score (S,) by seed, and the same (S, R) over items drawn with replacement.

    The draws are the same for every variant and seed, so that a difference of two variants is paired in items and seeds.
    """

    seeds: tuple[int, ...]
    values_S: np.ndarray
    resampled_SR: np.ndarray

    def __sub__(self, other: SeedScores) -> SeedScores:
        """Returns the differences over the seeds that both have; ``ValueError`` when there is none."""
        shared = tuple(seed for seed in self.seeds if seed in other.seeds)
        if not shared:
            raise ValueError(f"no seed in common: {self.seeds} and {other.seeds}")
        mine = [self.seeds.index(seed) for seed in shared]
        theirs = [other.seeds.index(seed) for seed in shared]
        values_S = self.values_S[mine] - other.values_S[theirs]
        return SeedScores(shared, values_S, self.resampled_SR[mine] - other.resampled_SR[theirs])

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return float(self.values_S.mean())

    def seed_interval(self) -> Interval | None:
        """Returns Student's interval of the mean over seeds: what other seeds would change, on the same test items.

        None for a single seed.
        """
        count = len(self.values_S)
        return None if count < 2 else _interval(self.mean, self.values_S.var(ddof=1) / count, count - 1)

    def interval(self) -> Interval | None:
        """Returns the interval of the mean over seeds and test items; None for a single seed.

        The variance is s²/S over seeds plus that of the seed-averaged score over resampled items (which counts their
        interaction twice: on the careful side); Student's quantile has the degrees of freedom of Welch and Satterthwaite,
        items taken as many. These grow with the items' share, so that a little of it would narrow the interval: it is
        never narrower than :meth:`seed_interval`.
        """
        over_seeds, count = self.seed_interval(), len(self.values_S)
        if over_seeds is None:
            return None
        by_seed = self.values_S.var(ddof=1) / count
        by_item = self.resampled_SR.mean(axis=0).var(ddof=1)
        total = by_seed + by_item
        freedom = (count - 1) * (total / by_seed) ** 2 if by_seed > 0 else np.inf
        both = _interval(self.mean, total, freedom)
        return max(over_seeds, both, key=lambda interval: interval.high - interval.low)


def _interval(mean: float, variance: float, freedom: float) -> Interval:
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * np.sqrt(variance))
    return Interval(mean - half, mean + half)


def mean_scores(parts: Sequence[SeedScores]) -> SeedScores:
    """Returns the mean of several tasks' or measures' scores, seed by seed; all must have the same seeds."""
    if len({part.seeds for part in parts}) != 1:
        raise ValueError(f"scores of different seeds cannot be averaged: {sorted({part.seeds for part in parts})}")
    values_S = np.mean([part.values_S for part in parts], axis=0)
    return SeedScores(parts[0].seeds, values_S, np.mean([part.resampled_SR for part in parts], axis=0))


def verdict(difference: Interval | None) -> Verdict:
    """Returns whether "the first is better" holds: above 0 with its whole interval, below 0 with it, or neither."""
    if difference is None:
        return "cannot be told"
    if difference.low > 0:
        return "holds"
    return "does not hold" if difference.high < 0 else "cannot be told"


def seed_scores(
    results: Mapping[int, tuple[TaskResult, Mapping[str, Any]]], resamples: int = RESAMPLES, *, metric: str | None = None
) -> SeedScores:
    """Returns one task's scores from seed → (result, items as ``items.json`` holds them); ``metric`` None: its main one.

    Raises ``ValueError`` when the metric has neither per-item scores nor paired values to resample.
    """
    values, resampled = [], []
    for result, items in results.values():
        values.append(result.value if metric is None else result.metrics[metric])
        resampled.append(_resampled(result, items, resamples, metric or result.metric))
    return SeedScores(tuple(results), np.array(values), np.stack(resampled))


def _resampled(result: TaskResult, items: Mapping[str, Any], resamples: int, metric: str) -> np.ndarray:
    rng = generator(0, "seeds", result.task)
    per_item = items["per_item"].get(metric)
    if per_item:
        scores_N = np.array([per_item[key] for key in sorted(per_item)], dtype=np.float64)
        return np.array([scores_N[rng.integers(0, len(scores_N), len(scores_N))].mean() for _ in range(resamples)])
    if metric == "cosine_spearman" and items["paired"]:
        cosine_N, gold_N = (np.asarray(items["paired"][name], dtype=np.float64) for name in ("cosine", "gold"))
        draws = (rng.integers(0, len(gold_N), len(gold_N)) for _ in range(resamples))
        return np.array([spearman(cosine_N[index], gold_N[index]) for index in draws])
    raise ValueError(f"{result.task}: {metric} has no per-item scores to resample; a sweep needs them")
