from itertools import product

import numpy as np
import pytest

from openembed.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_statistic,
    generator,
    paired_mean_test,
    paired_statistic_test,
    randomization_p,
)


def test_generators_depend_on_seed_and_purpose():
    assert generator(1, "a").random() == generator(1, "a").random()
    assert len({generator(1, "a").random(), generator(2, "a").random(), generator(1, "b").random()}) == 3


def test_interval_agrees_with_the_normal_approximation():
    values = np.random.default_rng(0).normal(0.5, 0.2, size=400)
    interval = bootstrap_interval(values, generator(0))
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.003)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.003)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = bootstrap_interval(rng.random(80), generator(trial), resamples=400)
        covered += interval.low <= 0.5 <= interval.high
    assert 178 <= covered <= 198


def test_constant_scores_have_an_interval_of_no_width():
    interval = bootstrap_interval([0.3] * 10, generator(0))
    assert interval.low == pytest.approx(0.3)
    assert interval.high == pytest.approx(0.3)


def test_randomisation_matches_the_exhaustive_test():
    difference = np.array([0.3, -0.1, 0.25, 0.4, 0.0, 0.2, -0.05, 0.1])
    signs = np.array(list(product((-1, 1), repeat=len(difference))))
    exact = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-12)
    assert randomization_p(difference, generator(0), permutations=50_000) == pytest.approx(exact, abs=0.01)


def test_paired_test_finds_a_true_difference_and_no_false_one():
    rng = np.random.default_rng(2)
    base = rng.random(150)
    a = {f"q{i}": float(v) for i, v in enumerate(base)}
    better = {f"q{i}": float(v + 0.05 + 0.05 * rng.normal()) for i, v in enumerate(base)}
    found = paired_mean_test(better, a, generator(0), permutations=2_000)
    assert found.p_randomization < 0.01
    assert found.p_bootstrap < 0.01
    assert found.interval.low < found.difference < found.interval.high
    assert found.difference == pytest.approx(found.a - found.b)
    same = paired_mean_test(a, a, generator(0), permutations=500)
    assert (same.difference, same.p_randomization, same.p_bootstrap) == (0, 1, 1)


def test_p_values_are_about_uniform_when_there_is_no_difference():
    rng = np.random.default_rng(3)
    ps = []
    for trial in range(150):
        a, b = ({str(i): float(v) for i, v in enumerate(rng.random(40))} for _ in range(2))
        ps.append(paired_mean_test(a, b, generator(trial), permutations=300).p_randomization)
    assert 0.01 <= np.mean(np.array(ps) < 0.05) <= 0.11
    assert np.mean(ps) == pytest.approx(0.5, abs=0.08)


def test_order_of_queries_does_not_matter():
    a, b = {"x": 0.1, "y": 0.9, "z": 0.4}, {"x": 0.2, "y": 0.5, "z": 0.3}
    turned = paired_mean_test(dict(reversed(a.items())), b, generator(0), permutations=200)
    assert turned == paired_mean_test(a, b, generator(0), permutations=200)


def test_different_query_sets_are_refused():
    with pytest.raises(ValueError, match=r"1 only in the first \(x\), 2 only in the second \(z, zz\)"):
        paired_mean_test({"x": 1.0, "y": 1.0}, {"y": 1.0, "z": 0.0, "zz": 0.0}, generator(0))


def test_no_items_is_an_error():
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_interval([], generator(0))


def test_statistics_that_are_no_mean():
    rng = np.random.default_rng(4)
    gold = rng.normal(size=300)
    close, far = gold + 0.3 * rng.normal(size=300), gold + 2 * rng.normal(size=300)

    def correlation(values):
        return lambda index: float(np.corrcoef(values[index], gold[index])[0, 1])

    interval = bootstrap_statistic(300, correlation(close), generator(0), resamples=300)
    assert interval.low < correlation(close)(np.arange(300)) < interval.high
    found = paired_statistic_test(300, correlation(close), correlation(far), generator(0), resamples=300)
    assert found.p_bootstrap < 0.01
    assert found.p_randomization is None
