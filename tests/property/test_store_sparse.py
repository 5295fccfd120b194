"""Sparse search equals a product with everything, whatever lies where and whichever way is taken."""

from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse as sp

from openembed.index import lexical, sparse
from openembed.index.lexical import Bm25, PostingsWriter, analyzer
from openembed.index.manifest import ModelInfo, SegmentInfo
from openembed.index.native import postings_library
from openembed.index.sparse import Search, SparseField, SparseVectors, SparseWriter, row_scores

PATHS = ["numpy lists", "numpy rows", *(["lists", "bounds", "rows", "threads"] if postings_library() else [])]


@contextmanager
def forced(path):
    """Sends small inputs through one of the ways of searching."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "FEW", 1 if path.endswith("rows") else np.inf)
        patch.setattr(sparse, "ROW", -(10**6))  # rows cost less than any list
        if path in ("bounds", "threads"):
            patch.setattr(sparse, "BOUNDED", 1)
        if path == "threads":
            patch.setattr(sparse, "AT_ONCE", 1)
            patch.setattr(sparse, "threads", lambda: 3)
        if path.startswith("numpy"):
            patch.setattr(sparse, "postings_library", lambda: None)
        yield


def field_of(folder, vectors, precision="float32"):
    folder.mkdir()
    model = ModelInfo(name="m", fingerprint="f", width=vectors.shape[1], kind="sparse", precision=precision)
    writer = SparseWriter(folder, model)
    for start in range(0, vectors.shape[0], 7919):
        part = vectors[start : start + 7919]
        writer.add([str(n) for n in range(part.shape[0])], part)
    return SparseField(folder, SegmentInfo(name="s", count=vectors.shape[0], **writer.close()), model)


def by_product(queries, vectors, eligible_N, k, id_of):
    """The same by one float64 product; weights are such that it is exact."""
    scores_QN = (queries.astype(np.float64) @ vectors.astype(np.float64).T).toarray().astype(np.float32)
    rows = [[(n, float(row[n])) for n in np.flatnonzero((row > 0) & eligible_N).tolist()] for row in scores_QN]
    return [sorted(row, key=lambda hit: (hit[1], id_of(hit[0])), reverse=True)[:k] for row in rows]


@st.composite
def matrices(draw, width):
    rows = draw(st.integers(0, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.sampled_from([1, 2, 30]))  # few levels: many equal scores
    values = rng.integers(1, levels + 1, (rows, width)) * (rng.random((rows, width)) < draw(st.sampled_from([0.02, 0.3, 1.0])))
    return sp.csr_matrix(values.astype(np.float32) / 8)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_search_equals_a_product(tmp_path_factory, path, data):
    width, k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 50))
    parts = [data.draw(matrices(width)) for _ in range(data.draw(st.integers(1, 4)))]
    queries = data.draw(matrices(width))
    vectors = sp.vstack(parts, format="csr")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    eligible_N = rng.random(vectors.shape[0]) < data.draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    names = [f"{n:02d}"[::-1] for n in range(max(1, vectors.shape[0]))]
    precision = data.draw(st.sampled_from(["float32", "float16", "uint8"]))  # all of them hold eighths up to 30
    folder = tmp_path_factory.mktemp("fields")
    with forced(path):
        starts = np.cumsum([0, *(part.shape[0] for part in parts)])
        segments = [
            SparseVectors(field_of(folder / str(number), part, precision), eligible_N[low:high])
            for number, (part, (low, high)) in enumerate(zip(parts, pairwise(starts), strict=True))
        ]
        checked = sparse.checked(queries, width, str)
        found = Search(segments, k)(checked, names.__getitem__)
        assert found == by_product(queries, vectors, eligible_N, k, names.__getitem__)
        again = Search(segments, k)(checked[::-1], names.__getitem__)
        assert again == found[::-1]


@pytest.fixture(scope="module")
def skewed():
    """60,000 documents whose terms are as unequal as words are, with weights of any float32."""
    rng = np.random.default_rng(11)
    count, width, each = 60_000, 3000, 30
    terms = np.minimum((width ** rng.random((count, each))).astype(np.int64) - 1, width - 1)
    weights = rng.gamma(2.0, 0.5, (count, each)).astype(np.float32)
    vectors = sp.csr_matrix((weights.ravel(), (np.repeat(np.arange(count), each), terms.ravel())), shape=(count, width))
    vectors.sum_duplicates()
    asked = [np.minimum((width ** rng.random(size)).astype(np.int64) - 1, width - 1) for size in (1, 4, 8, 40, 80) * 4]
    queries = sp.vstack(
        [sp.csr_matrix((rng.random(len(t), dtype=np.float32), (np.zeros_like(t), t)), shape=(1, width)) for t in asked],
        format="csr",
    )
    return vectors, sparse.checked(queries, width, str)


@pytest.mark.skipif(postings_library() is None, reason="no compiler")
@pytest.mark.parametrize("precision", ["float32", "float16", "uint8"])
@pytest.mark.parametrize("cuts", [(0, 60_000), (0, 21_000, 23_000, 60_000)], ids=["one segment", "three"])
def test_large_segments_are_searched_as_by_numpy(tmp_path, skewed, precision, cuts):
    """Bit for bit, by bounds, by lists and by rows, under filters, for few and for many hits."""
    vectors, queries = skewed
    fields = [field_of(tmp_path / str(low), vectors[low:high], precision) for low, high in pairwise(cuts)]
    rng = np.random.default_rng(12)
    ways = set()
    for share in (1.0, 0.5, 0.03, 0.002):
        eligible_N = rng.random(vectors.shape[0]) < share
        segments = [SparseVectors(f, eligible_N[low:high]) for f, (low, high) in zip(fields, pairwise(cuts), strict=True)]
        parts = [sparse._Part.of(segment) for segment in segments]
        with forced("numpy lists"):
            by_lists = sparse._Numpy([sparse._Part.of(segment) for segment in segments])
        for k in (1, 10, 400):
            compiled = sparse._Compiled(postings_library(), parts, k)
            found = Search(segments, k)(queries, str)
            for row, hits in enumerate(found):
                part = slice(queries.indptr[row], queries.indptr[row + 1])
                terms, weights = queries.indices[part], queries.data[part]
                assert hits == sparse.best_first(*by_lists(terms, weights), k, str)
                compiled(terms, weights)
                postings = sum(len(f.postings(term)[0]) for f in fields for term in terms.tolist())
                rows = compiled.searches.rescored == np.count_nonzero(eligible_N)
                ways.add("rows" if rows else "bounds" if compiled.searches.touched < postings else "lists")
    assert ways == {"rows", "bounds", "lists"}


@pytest.mark.skipif(postings_library() is None, reason="no compiler")
def test_rows_are_read_where_they_cost_less_than_lists(tmp_path, skewed):
    """A small index goes by its lists, and under a filter that leaves much; only what is little of a large one goes by rows."""
    vectors, queries = skewed
    small, large = field_of(tmp_path / "small", vectors[:500]), field_of(tmp_path / "large", vectors)
    terms, weights = queries.indices[: queries.indptr[1]], queries.data[: queries.indptr[1]]

    def counted(field, every):
        part = sparse._Part.of(SparseVectors(field, np.arange(field.count) % every == 0))
        compiled = sparse._Compiled(postings_library(), [part], 10)
        plain = sparse._Numpy([part])
        plain(terms, weights)
        compiled(terms, weights)
        return compiled.searches.touched > 0, compiled.searches.rescored == part.eligible, len(plain._rows)

    assert counted(small, 1) == (True, False, 0)
    assert counted(large, 2)[1:] == (False, 0)
    assert counted(large, 1000) == (False, True, 1)


def test_more_ties_than_there_is_room_for(tmp_path):
    count = 30_000
    vectors = sp.csr_matrix(np.ones((count, 1), dtype=np.float32))
    field = field_of(tmp_path / "f", vectors)
    found = Search([SparseVectors(field, np.ones(count, dtype=bool))], 3)(vectors[:1], str)
    assert found == [[(9999, 1.0), (9998, 1.0), (9997, 1.0)]]


@pytest.mark.parametrize("path", PATHS)
def test_the_least_and_the_greatest_weights_in_bytes(tmp_path, path):
    values = np.array([[255 * 2.0**51, 1e-18], [1e-18, 3e-18], [1e-19, 0]], dtype=np.float32)
    with forced(path):
        field = field_of(tmp_path / "f", sp.csr_matrix(values), "uint8")
        assert field.units_V.tolist() == [2.0**51, 2.0**-59]
        queries = sparse.checked(sp.csr_matrix(np.array([[1e18, 0], [0, 1e-18], [1e-18, 1e18]], dtype=np.float32)), 2, str)
        found = Search([SparseVectors(field, np.ones(3, dtype=bool))], 4)(queries, str)
    assert found == by_product(queries, field.rows(np.arange(3)), np.ones(3, dtype=bool), 4, str)
    with pytest.raises(ValueError, match="the most uint8 has; use float32"):
        field_of(tmp_path / "g", sp.csr_matrix(np.array([[6e17]], dtype=np.float32)), "uint8")


@pytest.mark.parametrize("path", PATHS)
def test_the_least_and_the_greatest_weights(tmp_path, path):
    values = np.array([[1e18, 1e18], [1e-18, 0], [1e-19, 1e-25], [1, 0]], dtype=np.float32)
    with forced(path):
        field = field_of(tmp_path / "f", sp.csr_matrix(values))
        segments = [SparseVectors(field, np.ones(4, dtype=bool))]
        queries = sparse.checked(sp.csr_matrix(values), 2, str)
        found = [[position for position, _ in hits] for hits in Search(segments, 4)(queries, str)]
    assert found == [[0, 3, 1], [0, 3, 1], [], [0, 3, 1]]
    assert not row_scores(field.rows(np.array([2])), queries.indices, queries.data).any()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_compiled_bm25_equals_numpy(tmp_path_factory, data):
    """Scores to the last bit, with deletions, filters, several segments, and terms asked for twice."""
    text = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "rare"]), max_size=20).map(" ".join)
    analyze, postings, live = analyzer("none"), [], []
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(1, 3))):
        texts, folder = data.draw(st.lists(text, min_size=1, max_size=20)), tmp_path_factory.mktemp("segment")
        writer = PostingsWriter()
        writer.add(texts, analyze)
        writer.write(folder)
        postings.append(lexical.Postings(folder))
        live.append(rng.random(len(texts)) < 0.8)
    eligible = [live_N & (rng.random(len(live_N)) < 0.7) for live_N in live]
    terms, k = analyze.terms(data.draw(text)), data.draw(st.integers(1, 30))
    ours = sparse.best_first(*Bm25(postings, live).search(terms, k, eligible), k, str)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lexical, "postings_library", lambda: None)
        assert ours == sparse.best_first(*Bm25(postings, live).search(terms, k, eligible), k, str)


@pytest.mark.skipif(postings_library() is None, reason="no compiler")
@pytest.mark.parametrize("first", [20, 2_000])
def test_a_large_segment_after_a_small_one_whose_bounds_are_loose_loses_nothing(first, tmp_path):
    rng = np.random.default_rng(1)
    width, sizes, parts = 300, (first, 45_000), []
    for number, size in enumerate(sizes):
        vectors = sp.random(size, width, density=0.2, format="csr", random_state=number, dtype=np.float32)
        parts.append(SparseVectors(field_of(tmp_path / str(number), vectors), np.ones(size, dtype=bool)))
    for k in (2, 7, 50):
        compiled = Search(parts, k)
        with forced("numpy lists"):
            plain = Search(parts, k)
        for _ in range(4):
            query = sp.csr_matrix((rng.random(width) * (rng.random(width) < 0.2)).astype(np.float32)[None])
            assert compiled(query, lambda n: f"{n:09}") == plain(query, lambda n: f"{n:09}")
