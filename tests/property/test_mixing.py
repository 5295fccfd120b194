from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.data.mixing import MixtureConfig

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=4)
KINDS = ("blended", "homogeneous")


def config(count, mixing="blended", weights=None, caps=None):
    sources = [
        {"name": f"s{n}", "path": "x", "weight": weights[n] if weights else 1.0, "cap": caps[n] if caps else None}
        for n in range(count)
    ]
    return MixtureConfig.model_validate({"sources": sources, "mixing": mixing})


def build(sizes, mixing="blended", *, weights=None, caps=None, batch=4, seed=1, steps=12, accumulation=1):
    mixture = config(len(sizes), mixing, weights, caps)
    return mixture.build(sizes, steps=steps, batch=batch, accumulation=accumulation, seed=seed)


@st.composite
def schedules(draw):
    shares = sorted(set(draw(st.lists(st.integers(1, 11), max_size=3))))
    ends = [share / 12 for share in shares]
    phases = [{"kind": draw(st.sampled_from(KINDS)), "until": end} for end in ends]
    return [*phases, {"kind": draw(st.sampled_from(KINDS))}]


@given(sizes, st.integers(1, 9), st.integers(0, 5), schedules(), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_the_order_is_the_same_at_any_worker_count(sizes, batch, seed, mixing, workers):
    forward = build(sizes, mixing, batch=batch, seed=seed)
    once = [forward.rows(step) for step in range(12)]
    backward = build(sizes, mixing, batch=batch, seed=seed)
    assert [backward.rows(step) for step in reversed(range(12))] == once[::-1]
    by_worker = [build(sizes, mixing, batch=batch, seed=seed) for _ in range(workers)]
    assert [by_worker[step % workers].rows(step) for step in range(12)] == once
    assert all(0 <= index < sizes[source] for rows in once for source, index in rows)


@given(sizes, st.data(), st.integers(1, 7), st.integers(0, 5), schedules())
@settings(max_examples=80, deadline=None)
def test_each_epoch_of_a_source_has_every_example_once_across_phases(sizes, data, batch, seed, mixing):
    weights = [data.draw(st.sampled_from([0.5, 1.0, 2.0, 3.3])) for _ in sizes]
    caps = [data.draw(st.sampled_from([None, 1, 5])) for _ in sizes]
    steps = 3 * sum(sizes) // batch + 12
    mixture = build(sizes, mixing, weights=weights, caps=caps, batch=batch, seed=seed, steps=steps)
    order = [row for step in range(steps) for row in mixture.rows(step)]
    for source, size in enumerate(sizes):
        drawn = [index for number, index in order if number == source]
        for start in range(0, len(drawn) - size + 1, size):
            assert sorted(drawn[start : start + size]) == list(range(size))


@given(sizes, st.integers(1, 6), st.integers(1, 3), st.integers(4, 30), st.sampled_from([0.1, 0.25, 0.5, 0.9]))
@settings(max_examples=60, deadline=None)
def test_a_schedule_begins_as_its_first_phase_and_turns_at_the_boundary(sizes, batch, accumulation, steps, until):
    turn = round(until * steps) * accumulation
    mixing = [{"kind": "homogeneous", "until": until}, {"kind": "blended"}]
    options = {"batch": batch, "accumulation": accumulation, "steps": steps}
    scheduled, alone = build(sizes, mixing, **options), build(sizes, "homogeneous", **options)
    assert scheduled.ends == [turn]
    assert [scheduled.rows(number) for number in range(turn)] == [alone.rows(number) for number in range(turn)]
    other = [*mixing[:1], {"kind": "homogeneous"}]
    assert [build(sizes, other, **options).rows(number) for number in range(turn)] == [
        scheduled.rows(number) for number in range(turn)
    ]


def test_batches_are_of_one_source_before_the_boundary_and_mixed_after_it():
    mixture = build([200, 200], [{"kind": "homogeneous", "until": 0.29}, {"kind": "blended"}], batch=16, steps=100)
    kinds = [len({source for source, _ in mixture.rows(step)}) for step in range(100)]
    assert kinds[:29] == [1] * 29
    assert kinds[29:] == [2] * 71


def test_sources_take_part_by_size_and_weight_up_to_their_cap():
    mixture = build([30, 10], weights=[1.0, 2.0], batch=5)
    counts = Counter(source for step in range(10) for source, _ in mixture.rows(step))
    assert counts == {0: 30, 1: 20}
    mixture = build([30, 10, 8], weights=[1.0, 2.0, 1.0], caps=[12, None, 100], batch=5)
    counts = Counter(source for step in range(8) for source, _ in mixture.rows(step))
    assert counts == {0: 12, 1: 20, 2: 8}


def test_an_epoch_is_the_capped_and_weighted_rows():
    assert config(3, weights=[1.0, 2.0, 1.0], caps=[12, None, 100]).rows_per_epoch([30, 10, 8]) == 40


def test_blended_batches_mix_and_homogeneous_ones_do_not():
    blended = build([50, 50], batch=10)
    assert sum(len({source for source, _ in blended.rows(step)}) == 2 for step in range(10)) >= 9
    homogeneous = build([50, 50], "homogeneous", batch=10)
    assert all(len({source for source, _ in homogeneous.rows(step)}) == 1 for step in range(10))


def test_seed_changes_the_order():
    one, two = (build([50], batch=50, seed=seed).rows(0) for seed in (1, 2))
    assert one != two
    assert sorted(one) == sorted(two)


@pytest.mark.parametrize("untils", [[], [0.5], [0.5, 0.5, 1.0], [0.7, 0.3, 1.0], [1.0, 1.0]])
def test_a_schedule_must_rise_to_the_whole(untils):
    with pytest.raises(ValueError, match="must rise and end at 1"):
        config(1, [{"kind": "blended", "until": until} for until in untils])
