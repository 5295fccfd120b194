from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.data.mixing import Mixture

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(sizes, st.integers(1, 9), st.integers(0, 5), st.sampled_from(["blended", "homogeneous"]))
@settings(max_examples=60, deadline=None)
def test_rows_are_a_pure_function_of_seed_and_step(sizes, batch, seed, mixing):
    def make():
        return Mixture(sizes, [1.0] * len(sizes), mixing=mixing, batch=batch, seed=seed)

    forward = make()
    once = [forward.rows(step) for step in range(12)]
    assert [make().rows(step) for step in reversed(range(12))] == once[::-1]
    assert all(0 <= index < sizes[source] for rows in once for source, index in rows)


@given(sizes, st.data(), st.integers(1, 7), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_of_a_source_has_every_example_once(sizes, data, batch, seed):
    weights = [data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.3])) for _ in sizes]
    for mixing in ("blended", "homogeneous"):
        mixture = Mixture(sizes, weights, mixing=mixing, batch=batch, seed=seed)
        steps = 3 * mixture.rows_per_round // batch + 1
        order = [row for step in range(steps) for row in mixture.rows(step)]
        for source, size in enumerate(sizes):
            drawn = [index for number, index in order if number == source]
            for start in range(0, len(drawn) - size + 1, size):
                assert sorted(drawn[start : start + size]) == list(range(size))


def test_sources_take_part_by_size_and_weight():
    mixture = Mixture([30, 10], [1.0, 2.0], batch=5, seed=1)
    counts = Counter(source for step in range(10) for source, _ in mixture.rows(step))
    assert counts == {0: 30, 1: 20}


def test_blended_batches_mix_and_homogeneous_ones_do_not():
    blended = Mixture([50, 50], [1.0, 1.0], batch=10, seed=1)
    assert sum(len({source for source, _ in blended.rows(step)}) == 2 for step in range(10)) >= 9
    homogeneous = Mixture([50, 50], [1.0, 1.0], mixing="homogeneous", batch=10, seed=1)
    assert all(len({source for source, _ in homogeneous.rows(step)}) == 1 for step in range(10))


def test_seed_changes_the_order():
    one, two = (Mixture([50], [1.0], batch=50, seed=seed).rows(0) for seed in (1, 2))
    assert one != two
    assert sorted(one) == sorted(two)
