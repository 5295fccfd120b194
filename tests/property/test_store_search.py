import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_paths import PATHS, forced

from openembed.index.codes import quantize
from openembed.index.dense import Vectors, search


def brute_force(queries_QD, values_ND, live_N, ids, k):
    rankings = []
    for query_D in queries_QD:
        rows = []
        for position, vector_D in enumerate(values_ND):
            if live_N[position]:
                score = float(np.float32(sum(float(a) * float(b) for a, b in zip(query_D, vector_D, strict=True))))
                rows.append((score, ids[position], position))
        rankings.append([(position, score) for score, _, position in sorted(rows, reverse=True)[:k]])
    return rankings


def cut(values_ND, live_N, bounds, coded=False):
    edges = [0, *sorted(bounds), len(values_ND)]
    segments = []
    for low, high in itertools.pairwise(edges):
        part = values_ND[low:high]
        segments.append(Vectors(part, live_N[low:high], quantize(part) if coded else None))
    return segments


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(0, 60),
    width=st.sampled_from([1, 3, 8]),
    k=st.integers(1, 80),
    levels=st.sampled_from([1, 2, 50]),
    dead=st.sampled_from([0.0, 0.3, 1.0]),
    block=st.sampled_from([16, 32, 1000]),
    path=st.sampled_from(PATHS),
    coded=st.booleans(),
    real=st.booleans(),
)
def test_dense_search_equals_brute_force(seed, count, width, k, levels, dead, block, path, coded, real):
    """Small whole numbers make many exact ties; real values test that no candidate is lost to rounding."""
    random = np.random.default_rng(seed)
    draw = (
        (lambda n: random.standard_normal((n, width))) if real else (lambda n: random.integers(-levels, levels + 1, (n, width)))
    )
    values_ND, queries_QD = draw(count).astype(np.float32), draw(5).astype(np.float32)
    live_N = random.random(count) >= dead
    ids = [str(number) for number in random.permutation(count)]
    bounds = random.integers(0, count + 1, 2).tolist()
    with forced(path, block):
        found = search(queries_QD, cut(values_ND, live_N, bounds, coded), k, ids.__getitem__)
    expected = brute_force(queries_QD, values_ND, live_N, ids, k)
    if real:
        assert [[p for p, _ in row] for row in found] == [[p for p, _ in row] for row in expected]
        np.testing.assert_allclose(
            [s for row in found for _, s in row], [s for row in expected for _, s in row], rtol=1e-6, atol=1e-6
        )
    else:
        assert found == expected


@pytest.mark.parametrize("path", PATHS)
def test_near_ties_are_settled_exactly_and_do_not_depend_on_batch_or_segments(path):
    """Vectors closer together than float32 products can tell apart: the order must still be that of exact products."""
    random = np.random.default_rng(7)
    base_D = random.standard_normal(384)
    values_ND = (base_D + 1e-6 * random.standard_normal((5000, 384))).astype(np.float32)
    queries_QD = random.standard_normal((9, 384)).astype(np.float32)
    ids = [f"{n:05d}" for n in range(5000)]
    live_N = np.ones(5000, dtype=bool)
    with forced(path):
        whole = search(queries_QD, cut(values_ND, live_N, []), 10, ids.__getitem__)
        parts = search(queries_QD, cut(values_ND, live_N, [17, 2500], coded=True), 10, ids.__getitem__)
        alone = [search(queries_QD[row : row + 1], cut(values_ND, live_N, [99]), 10, ids.__getitem__)[0] for row in range(9)]
    assert whole == parts == alone
    exact_QN = (queries_QD.astype(np.float64) @ values_ND.astype(np.float64).T).astype(np.float32)
    for ranking, exact_N in zip(whole, exact_QN, strict=True):
        expected = sorted(range(5000), key=lambda n: (exact_N[n], ids[n]), reverse=True)[:10]
        assert [position for position, _ in ranking] == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("power", [-40, -22, -10, 10, 18])
def test_very_small_and_very_large_vectors_are_ranked_exactly(path, power):
    random = np.random.default_rng(5)
    values_ND = (random.standard_normal((600, 24)) * 10.0**power).astype(np.float32)
    queries_QD = (random.standard_normal((3, 24)) * 10.0 ** min(power, 12)).astype(np.float32)
    ids = [f"{n:03d}" for n in range(600)]
    with forced(path, 64):
        found = search(queries_QD, cut(values_ND, np.ones(600, dtype=bool), [100], coded=True), 10, ids.__getitem__)
    exact_QN = (queries_QD.astype(np.float64) @ values_ND.astype(np.float64).T).astype(np.float32)
    for ranking, exact_N in zip(found, exact_QN, strict=True):
        expected = sorted(range(600), key=lambda n: (exact_N[n], ids[n]), reverse=True)[:10]
        assert [position for position, _ in ranking] == expected
