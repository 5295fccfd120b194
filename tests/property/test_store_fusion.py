import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from openembed.config import parse
from openembed.steps import FuseConfig
from openembed.steps.fuse import min_max, ranked, reciprocal_rank

HITS = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(-5, 5).map(float), max_size=8)
RUNS = st.lists(st.fixed_dictionaries({"q1": HITS}, optional={"q2": HITS}), min_size=1, max_size=4)
METHODS = st.sampled_from([reciprocal_rank, min_max])


@given(runs=RUNS, method=METHODS, data=st.data())
def test_the_order_of_the_runs_does_not_matter(runs, method, data):
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=len(runs), max_size=len(runs)))
    order = data.draw(st.permutations(range(len(runs))))
    fused = method(runs, weights=weights)
    again = method([runs[i] for i in order], weights=[weights[i] for i in order])
    assert fused == again
    assert {q: list(hits) for q, hits in fused.items()} == {q: list(hits) for q, hits in again.items()}


@given(hits=HITS, method=METHODS)
def test_one_run_keeps_its_ranking(hits, method):
    fused = method([{"q": hits}])["q"]
    assert list(fused) == list(ranked(hits))
    assert all(0.0 <= value <= 1.0 for value in fused.values())


@given(runs=RUNS)
def test_reciprocal_rank_equals_its_definition(runs):
    fused = reciprocal_rank(runs)
    for query in {query for run in runs for query in run}:
        for document in {d for run in runs for d in run.get(query, {})}:
            expected = 0.0
            for run in runs:
                ranking = sorted(run.get(query, {}).items(), key=lambda hit: (hit[1], hit[0]), reverse=True)
                expected += sum(1 / (60 + rank) for rank, (d, _) in enumerate(ranking, 1) if d == document)
            assert math.isclose(fused[query][document], expected, rel_tol=1e-12)


@given(runs=RUNS, scale=st.sampled_from([0.5, 2.0, 4.0]), shift=st.sampled_from([-8.0, 0.0, 16.0]))
def test_min_max_does_not_depend_on_scale_or_shift(runs, scale, shift):
    moved = [{q: {d: scale * s + shift for d, s in hits.items()} for q, hits in run.items()} for run in runs]
    assert min_max(moved) == min_max(runs)


@given(hits=HITS, other=HITS)
def test_a_weight_of_zero_silences_a_run(hits, other):
    assume(hits)
    fused = reciprocal_rank([{"q": hits}, {"q": other}], weights=[1.0, 0.0])["q"]
    assert {d: s for d, s in fused.items() if s > 0} == reciprocal_rank([{"q": hits}])["q"]


def test_wrong_weights_are_refused():
    with pytest.raises(ValueError, match="1 weights for 2 runs"):
        min_max([{}, {}], weights=[1.0])
    with pytest.raises(ValueError, match="2 weights for 1 parts"):
        parse(FuseConfig, {"parts": [{"kind": "bm25"}], "weights": [1, 2]}, "recipe.toml")
    with pytest.raises(ValueError, match=r"recipe\.toml: parts\.0: Input tag 'nope'"):
        parse(FuseConfig, {"parts": [{"kind": "nope"}]}, "recipe.toml")
