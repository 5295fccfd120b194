"""Exact search of token vectors equals three loops: ties, empty documents, negative products, deletes and filters."""

import itertools
import shutil

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from token_paths import PATHS, brute_force, drawn, fast_maxsim, forced, maxsim, paths, segment

from openembed.index.tokens.files import TokenSettings
from openembed.index.tokens.muvera import EncodingSettings, Muvera
from openembed.index.tokens.plaid import Plaid
from openembed.index.tokens.search import Tokens, rerank, search
from openembed.index.tokens.warp import Warp
from openembed.index.tokens.xtr import Xtr

CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "count": st.integers(0, 40),
    "width": st.sampled_from([1, 3, 8, 20]),
    "longest": st.sampled_from([1, 4, 30]),
    "path": st.sampled_from(PATHS),
}


def cut(documents, random, options=None):
    """Returns the documents as up to three segments, and which positions each holds."""
    edges = [0, *sorted(random.integers(0, len(documents) + 1, 2).tolist()), len(documents)]
    runs = [range(low, high) for low, high in itertools.pairwise(edges)]
    return [(segment(documents.select(run), options), run) for run in runs]


def remove(cuts):
    for part, _ in cuts:
        shutil.rmtree(part.directory)


@settings(max_examples=120, deadline=None)
@given(
    **CASES,
    k=st.integers(1, 50),
    levels=st.sampled_from([1, 2, 30]),
    dead=st.sampled_from([0.0, 0.3, 1.0]),
    precision=st.sampled_from(["float16", "float32"]),
)
def test_search_and_rerank_equal_three_loops(seed, count, width, longest, path, k, levels, dead, precision):
    """Small whole numbers make many exact ties, which go to the greater id."""
    random = np.random.default_rng(seed)
    documents, queries = drawn(random, count, width, longest, levels), drawn(random, 4, width, 35, levels)
    eligible_N = random.random(count) >= dead
    ids = [str(number) for number in random.permutation(count)]
    with forced(path):
        cuts = cut(documents, random, TokenSettings(precision=precision))
        parts = [Tokens(part, eligible_N[run.start : run.stop]) for part, run in cuts]
        assert search(queries, parts, k, ids.__getitem__) == brute_force(queries, documents, eligible_N, ids, k)
        chosen = random.permutation(count)[: random.integers(0, count + 1)]
        for query_LD, ranking in zip(queries, rerank(queries, parts, [chosen] * 4, ids.__getitem__), strict=True):
            rows = sorted(((maxsim(query_LD, documents[int(n)]), ids[n], n) for n in chosen), reverse=True)
            assert ranking == [(n, score) for score, _, n in rows]
    remove(cuts)


@settings(max_examples=60, deadline=None)
@given(**CASES, k=st.integers(1, 12), spread=st.sampled_from([1.0, 1e-6]), scale=st.sampled_from([1.0, 1e-12, 3e4]))
def test_real_values_lose_nothing_to_rounding(seed, count, width, longest, path, k, spread, scale):
    """Vectors close together, very small or large: the order must be that of exact products."""
    random = np.random.default_rng(seed)
    documents, queries = drawn(random, count, width, longest), drawn(random, 3, width, 20, shortest=1)
    base_D = random.standard_normal(width).astype(np.float32)
    values_TD = ((base_D + np.float32(spread) * documents.values_TD) * np.float32(scale)).astype(np.float32)
    documents = type(documents)(values_TD, documents.offsets_N1)
    with forced(path):
        cuts = cut(documents, random, TokenSettings(precision="float32"))
        parts = [Tokens(part, np.ones(len(run), dtype=bool)) for part, run in cuts]
        found = search(queries, parts, k, str)
    for query_LD, ranking in zip(queries, found, strict=True):
        scores = np.array([fast_maxsim(query_LD, document) for document in documents], dtype=np.float32)
        best = np.sort(scores[scores > -np.inf])[::-1][:k]
        np.testing.assert_allclose([score for _, score in ranking], best, rtol=1e-6)
        np.testing.assert_allclose([scores[n] for n, _ in ranking], best, rtol=1e-6)
    remove(cuts)


@settings(max_examples=40, deadline=None)
@given(**CASES, k=st.integers(1, 12), bits=st.sampled_from([2, 4]), keep=st.booleans(), dead=st.sampled_from([0.0, 0.5]))
def test_methods_that_pass_nothing_over_are_exact(seed, count, width, longest, path, k, bits, keep, dead):
    """With as many candidates as documents and every token retrieved, approximate ways give what exact search gives."""
    random = np.random.default_rng(seed)
    documents, queries = drawn(random, count, width, longest), drawn(random, 3, width, 20)
    eligible_N = random.random(count) >= dead
    options = TokenSettings(bits=bits, coded_from=20, keep_vectors=keep, encodings=EncodingSettings(repetitions=2, planes=2))
    with forced(path):
        cuts = cut(documents, random, options)
        parts = [Tokens(part, eligible_N[run.start : run.stop]) for part, run in cuts]
        exact = search(queries, parts, k, str)
        for method in (Plaid(documents=100), Muvera(candidates=100), Xtr(tokens=10_000, rescored=100)):
            if isinstance(method, Plaid) and all(part.segment.residuals is None for part in parts):
                continue  # all too small for it: refused, where they have tokens
            found = search(queries, parts, k, str, method)
            assert [[n for n, _ in row] for row in found] == [[n for n, _ in row] for row in exact], method
            flat = [score for row in found for _, score in row]
            np.testing.assert_allclose(flat, [score for row in exact for _, score in row], rtol=1e-6, atol=1e-6)
        assert all(eligible_N[n] and len(documents[n]) for row in exact for n, _ in row)
    remove(cuts)


@settings(max_examples=40, deadline=None)
@given(**CASES, k=st.integers(1, 12), bits=st.sampled_from([2, 4]), dead=st.sampled_from([0.0, 0.5]))
def test_a_coded_segment_beside_one_that_is_not_ranks_as_one_segment_rescored(seed, count, width, longest, path, k, bits, dead):
    """And whatever a method passes over, the scores it gives are exact: on one scale."""
    random = np.random.default_rng(seed)
    documents, queries = drawn(random, count, width, longest), drawn(random, 3, width, 20)
    eligible_N = random.random(count) >= dead
    options, edge = TokenSettings(bits=bits, coded_from=1), int(random.integers(0, count + 1))
    mixed = eligible_N[:edge].any() and eligible_N[edge:].any()
    with forced(path):
        halves = [segment(documents.select(range(edge)), options), segment(documents.select(range(edge, count)))]
        parts = [Tokens(part, mask) for part, mask in zip(halves, np.split(eligible_N, [edge]), strict=True)]
        mixed = mixed and halves[0].residuals is not None  # documents without tokens are not coded
        whole = [Tokens(segment(documents, options), eligible_N)]
        for method in (Warp(probes=10_000), Xtr(tokens=10_000), Xtr(tokens=10_000, imputation="zero")):
            if isinstance(method, Warp) and halves[0].residuals is None and halves[1].info.tokens:
                continue  # nothing is coded: refused
            expected = search(queries, whole, k, str, method.model_copy(update={"rescored": 100}))
            if mixed:
                assert search(queries, parts, k, str, method) == expected, method
            assert search(queries, parts, k, str, method.model_copy(update={"rescored": 100})) == expected, method
        for method in (Warp(probes=1), Xtr(tokens=2), Xtr(tokens=2, rescored=1)):
            if mixed:
                found = search(queries, parts, k, str, method)
                assert found == rerank(queries, parts, [[n for n, _ in row] for row in found], str), method
    for part in (*halves, whole[0].segment):
        shutil.rmtree(part.directory)


@paths
def test_a_score_does_not_depend_on_how_it_was_found(path):
    random = np.random.default_rng(5)
    documents, queries = drawn(random, 300, 16, 40), drawn(random, 20, 16, 40, shortest=1)
    with forced(path):
        whole = [Tokens(segment(documents), np.ones(300, dtype=bool))]
        halves = [Tokens(segment(documents.select(run)), np.ones(150, dtype=bool)) for run in (range(150), range(150, 300))]
        found = search(queries, whole, 10, str)
        assert found == search(queries, halves, 10, str)
        assert found == [search(queries.select([n]), halves, 10, str)[0] for n in range(20)]
        again = rerank(queries, halves, [[n for n, _ in row] for row in found], str)
        assert again == found
