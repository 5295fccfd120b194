"""How sure a score is: bootstrap intervals and paired tests between two systems on the same items.

Shapes: ``N`` items (queries, pairs), ``R`` resamples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2_000
PERMUTATIONS = 20_000
CONFIDENCE = 0.95
BLOCK = 4_000_000


def generator(seed: int, *purpose: str) -> np.random.Generator:
    """Returns a generator that depends on ``seed`` and ``purpose`` alone."""
    digest = hashlib.sha256("\0".join(purpose).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, dtype=np.uint32).tolist()])


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval: ``low`` ≤ ``high`` at level ``confidence``."""

    low: float
    high: float
    confidence: float = CONFIDENCE


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two systems on the same items: their values, the difference ``a - b`` with its interval, and two-sided p-values.

    ``p_randomization`` is None where items carry no score of their own (STS, average precision over pairs).
    """

    metric: str
    items: int
    a: float
    b: float
    difference: float
    interval: Interval
    p_bootstrap: float
    p_randomization: float | None

    def as_dict(self) -> dict[str, object]:
        """Returns plain data for JSON."""
        return asdict(self)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, rng: np.random.Generator, *, resamples: int = RESAMPLES
) -> Interval:
    """Returns the percentile bootstrap interval of the mean of ``values``, items drawn with replacement.

    Raises ``ValueError`` when there are no values.
    """
    return _percentiles(_bootstrap_means(_array(values), rng, resamples))


def bootstrap_statistic(
    count: int, statistic: Callable[[np.ndarray], float], rng: np.random.Generator, *, resamples: int = 1_000
) -> Interval:
    """Returns the percentile interval of ``statistic(indices)`` over item indices drawn with replacement.

    Draws for which the statistic is undefined (nan: one class only, a constant) are left out.
    """
    return _percentiles(_bootstrap_values(count, statistic, rng, resamples))


def paired_mean_test(
    a: Mapping[str, float],
    b: Mapping[str, float],
    rng: np.random.Generator,
    *,
    metric: str = "score",
    permutations: int = PERMUTATIONS,
) -> PairedTest:
    """Returns Fisher's randomisation test and a paired bootstrap of the difference of means over the same queries.

    Randomisation: each query's two scores are swapped with probability 1/2; p = (1 + as extreme) / (1 + permutations),
    so it is never 0. Bootstrap: queries drawn with replacement, p from the differences shifted to a mean of 0. Raises
    ``ValueError`` naming queries that only one system has.
    """
    keys = _shared_keys(a, b)
    a_N, b_N = _array([a[key] for key in keys]), _array([b[key] for key in keys])
    difference_N = a_N - b_N
    observed = float(difference_N.mean())
    means_R = _bootstrap_means(difference_N, rng, permutations)
    return PairedTest(
        metric=metric,
        items=len(keys),
        a=float(a_N.mean()),
        b=float(b_N.mean()),
        difference=observed,
        interval=_percentiles(means_R),
        p_bootstrap=_p_value(means_R - observed, observed),
        p_randomization=randomization_p(difference_N, rng, permutations=permutations),
    )


def paired_statistic_test(
    count: int,
    statistic_a: Callable[[np.ndarray], float],
    statistic_b: Callable[[np.ndarray], float],
    rng: np.random.Generator,
    *,
    metric: str = "score",
    resamples: int = 2_000,
) -> PairedTest:
    """Returns the paired bootstrap test of two statistics (such as Spearman) computed on the same ``count`` items."""
    everything = np.arange(count)
    a, b = statistic_a(everything), statistic_b(everything)
    differences_R = _bootstrap_values(count, lambda index: statistic_a(index) - statistic_b(index), rng, resamples)
    observed = a - b
    return PairedTest(
        metric=metric,
        items=count,
        a=a,
        b=b,
        difference=observed,
        interval=_percentiles(differences_R),
        p_bootstrap=_p_value(differences_R - observed, observed),
        p_randomization=None,
    )


def randomization_p(difference_N: np.ndarray, rng: np.random.Generator, *, permutations: int = PERMUTATIONS) -> float:
    """Returns the two-sided p-value of Fisher's randomisation test for paired differences ``(N,)``."""
    count = len(difference_N)
    means = [
        (rng.integers(0, 2, size=(rows, count), dtype=np.int8) * 2.0 - 1.0) @ difference_N / count
        for rows in _blocks(permutations, count)
    ]
    return _p_value(np.concatenate(means), float(difference_N.mean()))


def _p_value(null_R: np.ndarray, observed: float) -> float:
    # a difference equal to the observed one but for rounding counts as extreme
    extreme = np.abs(null_R) >= abs(observed) * (1 - 1e-9) - 1e-15
    return float((1 + extreme.sum()) / (1 + len(null_R)))


def _bootstrap_means(values_N: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    count = len(values_N)
    draws = [values_N[rng.integers(0, count, size=(rows, count))].mean(axis=1) for rows in _blocks(resamples, count)]
    return np.concatenate(draws)


def _bootstrap_values(
    count: int, statistic: Callable[[np.ndarray], float], rng: np.random.Generator, resamples: int
) -> np.ndarray:
    if count < 1:
        raise ValueError("there are no items to resample")
    values_R = np.array([statistic(rng.integers(0, count, size=count)) for _ in range(resamples)])
    return values_R[np.isfinite(values_R)]


def _percentiles(values_R: np.ndarray) -> Interval:
    if not len(values_R):
        raise ValueError("the statistic is undefined in every resample; there are too few items")
    tail = (1 - CONFIDENCE) / 2 * 100
    low, high = np.percentile(values_R, [tail, 100 - tail])
    return Interval(float(low), float(high))


def _blocks(total: int, width: int) -> list[int]:
    rows = max(1, min(total, BLOCK // max(width, 1)))
    return [min(rows, total - start) for start in range(0, total, rows)]


def _array(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("there are no scores; give at least one item")
    return array


def _shared_keys(a: Mapping[str, float], b: Mapping[str, float]) -> list[str]:
    only_a, only_b = sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())
    if only_a or only_b:
        raise ValueError(
            f"the two runs score different items: {len(only_a)} only in the first ({_some(only_a)}), {len(only_b)} "
            f"only in the second ({_some(only_b)}); compare runs of the same task and split"
        )
    return sorted(a)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "") if keys else "none"
