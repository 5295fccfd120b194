import numpy as np
import pytest
from scipy.sparse import random as random_sparse

from openembed.encoded import count_of, joined, kind_of, none_of, require_kind, take
from openembed.index import exact
from openembed.index.tokens.xtr import Xtr
from openembed.token_vectors import TokenVectors


def sparse(count, seed, density=0.05, width=200):
    values = random_sparse(count, width, density, format="csr", dtype=np.float32, random_state=seed)
    values.data = np.round(values.data * 4) / 4  # so that scores tie, and some weights are 0
    return values


def tokens(count, seed, width=8):
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 7, count)
    lengths[:2] = [0, 3]
    return TokenVectors.from_list([np.round(draw.standard_normal((n, width)) * 2).astype(np.float32) for n in lengths], width)


def reference(queries, documents):
    """All scores by the definition, float64 to float32; nan: no hit."""
    scores = np.full((count_of(queries), count_of(documents)), np.nan)
    for q in range(len(scores)):
        for d in range(scores.shape[1]):
            if kind_of(documents) == "sparse":
                value = float(queries[[q]].astype(float).multiply(documents[[d]].astype(float)).sum())
                scores[q, d] = value if value > 0 else np.nan
            elif len(queries[q]) and len(documents[d]):
                scores[q, d] = (queries[q].astype(float) @ documents[d].astype(float).T).max(axis=1).sum()
    return scores.astype(np.float32)


CASES = {"sparse": (sparse(7, 1), sparse(90, 2)), "tokens": (tokens(7, 1), tokens(90, 2))}


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    monkeypatch.setattr(exact, "DOCUMENTS", 32)
    monkeypatch.setattr(exact, "QUERIES", 3)
    queries, documents = CASES[request.param]
    return queries, documents, reference(queries, documents)


@pytest.mark.parametrize("kind", ["sparse", "tokens", "dense"])
def test_a_mask_takes_the_texts_where_it_is_true(kind):
    documents = CASES[kind][1] if kind in CASES else np.arange(180.0).reshape(90, 2)
    mask = np.arange(90) % 7 == 3
    chosen, expected = take(documents, mask), take(documents, np.flatnonzero(mask).tolist())
    assert count_of(chosen) == 13
    for mine, other in zip(chosen, expected, strict=True):
        np.testing.assert_array_equal(*((x.toarray() if kind == "sparse" else x) for x in (mine, other)))
    with pytest.raises(ValueError, match=r"a mask of shape \(89,\) for 90 texts"):
        take(documents, mask[:-1])
    assert count_of(take(documents, [])) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_token_vectors_that_are_not_finite_are_named(value):
    good = tokens(4, 1)
    values_TD = good.values_TD.copy()
    values_TD[-1] = value
    bad = TokenVectors(values_TD, good.offsets_N1)
    last = np.flatnonzero(good.lengths_N)[-1]
    with pytest.raises(ValueError, match=f"^document {last}: a token vector holds NaN or infinity"):
        exact.prepared(bad)
    with pytest.raises(ValueError, match=f"^query {last}: a token vector holds NaN or infinity"):
        exact.prepared(good).search(bad, 1, str)


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_search_is_the_definition_in_any_blocks_with_ties_by_id(case, k):
    queries, documents, scores_QN = case
    ids = [f"d{(37 * n) % 90:02}" for n in range(90)]
    found = exact.prepared(documents).search(queries, k, ids.__getitem__)
    for hits, scores_N in zip(found, scores_QN, strict=True):
        rows = [(float(s), ids[n], n) for n, s in enumerate(scores_N) if not np.isnan(s)]
        assert hits == [(n, s) for s, _, n in sorted(rows, reverse=True)][:k]
    assert any(len({score for _, score in hits}) < len(hits) for hits in found) or k == 1, "the data hold ties"


def test_the_best_below_a_limit(case):
    queries, documents, scores_QN = case
    limit_Q = np.nanquantile(np.where(np.isnan(scores_QN).all(axis=1)[:, None], 1.0, scores_QN), 0.8, axis=1)
    limit_Q = limit_Q.astype(np.float32)
    found = exact.prepared(documents).top(queries, 4, limit_Q)
    for row, scores_N in enumerate(scores_QN):
        below = np.where(scores_N < limit_Q[row], scores_N, -np.inf)
        order = [n for n in np.argsort(-below, kind="stable")[:4] if below[n] > -np.inf]
        assert found.documents_QK[row][: len(order)].tolist() == order
        assert (found.documents_QK[row][len(order) :] == -1).all()
        assert (found.scores_QK[row][: len(order)] == scores_N[order]).all()
        assert found.above_Q[row] == (scores_N >= limit_Q[row]).sum()


def test_the_best_without_a_limit(case):
    queries, documents, scores_QN = case
    found = exact.prepared(documents).top(queries, 90)
    for row, scores_N in enumerate(scores_QN):
        order = [n for n in np.argsort(-np.nan_to_num(scores_N, nan=-np.inf), kind="stable") if not np.isnan(scores_N[n])]
        assert found.documents_QK[row][: len(order)].tolist() == order
        assert (found.documents_QK[row][len(order) :] == -1).all()
    assert not found.above_Q.any()


def test_xtr_with_every_token_retrieved_is_maxsim_and_with_few_is_not():
    queries, documents = CASES["tokens"]
    whole = exact.prepared(documents).search(queries, 90, str)
    for imputation in ("last", "zero"):
        found = exact.prepared(documents, Xtr(tokens=10_000, imputation=imputation)).search(queries, 90, str)
        assert [[n for n, _ in hits] for hits in found] == [[n for n, _ in hits] for hits in whole]
    few = exact.prepared(documents, Xtr(tokens=3, imputation="zero")).search(queries, 90, str)
    assert all(len(hits) <= 3 * len(query) for hits, query in zip(few, queries, strict=True))
    with pytest.raises(ValueError, match="method xtr searches token vectors; these are dense vectors; leave it out"):
        exact.prepared(np.zeros((2, 3)), Xtr())


def test_scores_of_some_documents(case):
    queries, documents, scores_QN = case
    positions = np.array([80, 3, 3, 0, 41])
    for row in range(7):
        got = exact.prepared(documents).scores(take(queries, [row]), positions)
        wanted = scores_QN[row][positions]
        np.testing.assert_array_equal(got, np.nan_to_num(wanted, nan=0.0 if kind_of(documents) == "sparse" else -np.inf))


def test_a_score_does_not_depend_on_how_a_matrix_was_made():
    documents = sparse(50, 3, density=0.4)
    shuffled = documents.copy()
    for row in range(50):
        part = slice(shuffled.indptr[row], shuffled.indptr[row + 1])
        order = np.random.default_rng(row).permutation(part.stop - part.start)
        shuffled.indices[part], shuffled.data[part] = shuffled.indices[part][order], shuffled.data[part][order]
    shuffled.has_sorted_indices = False
    queries = sparse(4, 4, density=0.4)
    assert exact.prepared(documents).search(queries, 50, str) == exact.prepared(shuffled).search(queries, 50, str)


def test_dense_goes_to_the_dense_search():
    draw = np.random.default_rng(0)
    queries, documents = draw.standard_normal((3, 8), dtype=np.float32), draw.standard_normal((40, 8), dtype=np.float32)
    (first, *_) = exact.prepared(documents).search(queries, 3, str)
    assert [n for n, _ in first] == np.argsort(-(documents @ queries[0]))[:3].tolist()
    np.testing.assert_allclose(
        exact.prepared(documents).scores(queries[:1], np.array([5])), documents[5] @ queries[0], rtol=1e-6
    )


def test_queries_and_documents_of_two_models_are_refused():
    with pytest.raises(ValueError, match="queries are sparse weights over its vocabulary, documents a vector a token"):
        exact.prepared(tokens(2, 0)).search(sparse(1, 0), 1, str)
    with pytest.raises(ValueError, match="queries have width 200, documents 300"):
        exact.prepared(sparse(2, 0, width=300)).search(sparse(1, 0), 1, str)
    with pytest.raises(ValueError, match="queries have width 8, documents 9"):
        exact.prepared(tokens(2, 0, width=9)).search(tokens(2, 0), 1, str)


@pytest.mark.parametrize("kind", ["dense", "sparse", "tokens"])
def test_texts_are_taken_and_joined(kind):
    whole = {"dense": np.arange(40.0).reshape(10, 4), **{name: case[1] for name, case in CASES.items()}}[kind]
    parts = joined([take(whole, np.array([4, 0, 4])), take(whole, []), take(whole, [9])])
    assert count_of(parts) == 4
    for place, row in enumerate([4, 0, 4, 9]):
        if kind == "tokens":
            np.testing.assert_array_equal(parts[place], whole[row])
        else:
            assert abs(parts[[place]] - whole[[row]]).sum() == 0
    assert count_of(none_of(kind, 5)) == 0
    assert kind_of(none_of(kind, 5)) == kind_of(whole) == kind


def test_one_kind_is_asked_for_in_words():
    class Model:
        kind = "tokens"

    require_kind(object(), ["dense"], "x", "y")
    with pytest.raises(ValueError, match=r"^serve takes dense vectors, this model gives a vector a token; use another$"):
        require_kind(Model(), ["dense"], "serve", "use another")
