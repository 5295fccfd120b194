"""Token vectors in a store: search, reranking, deletes, filters, merging and reopening, beside dense vectors."""

import numpy as np
import pytest
from token_paths import clustered, fast_maxsim

from openembed.index.store import ModelInfo, Store
from openembed.index.tokens.files import TokenCoding
from openembed.index.tokens.plaid import Plaid
from openembed.index.tokens.warp import Warp
from openembed.records import Document
from openembed.token_vectors import TokenVectors

WIDTH, COUNT = 24, 120
MODEL = ModelInfo(name="given", fingerprint="given", width=WIDTH, kind="tokens")


@pytest.fixture(scope="module")
def vectors():
    return clustered(np.random.default_rng(0), COUNT, WIDTH)


@pytest.fixture(scope="module")
def queries():
    return clustered(np.random.default_rng(0), 6, WIDTH)


def model(**coding):
    return MODEL.model_copy(update={"coding": TokenCoding(**coding)})


def documents(rows):
    return [Document(f"d{n:03d}", f"text {n}", metadata={"n": n}) for n in rows]


def expected(queries, vectors, rows, k):
    found = []
    for query in queries:
        scores = {f"d{n:03d}": fast_maxsim(query, vectors[n]) for n in rows}
        found.append(dict(sorted(scores.items(), key=lambda row: -row[1])[:k]))
    return found


def same(found, wanted):
    assert [list(hits) for hits in found] == [list(hits) for hits in wanted]
    for hits, others in zip(found, wanted, strict=True):
        np.testing.assert_allclose(list(hits.values()), list(others.values()), rtol=1e-6)


def test_add_delete_filter_replace_compact_and_reopen(vectors, queries, tmp_path):
    store = Store.create(tmp_path, documents(range(50)), vectors.select(range(50)), model=MODEL)
    store.add(documents(range(50, COUNT)), vectors=vectors.select(range(50, COUNT)))
    same(store.tokens(queries, 7), expected(queries, vectors, range(COUNT), 7))
    store.delete([f"d{n:03d}" for n in range(0, COUNT, 3)])
    left = [n for n in range(COUNT) if n % 3]
    same(store.tokens(queries, 7), expected(queries, vectors, left, 7))
    condition = {"n": {"gte": 40, "lt": 70}}
    same(store.tokens(queries, 9, filter=condition), expected(queries, vectors, [n for n in left if 40 <= n < 70], 9))
    swapped = TokenVectors.from_list([vectors[2], vectors[1]])
    store.add(documents([1, 2]), vectors=swapped, replace=True)
    now = vectors.select([0, 2, 1, *range(3, COUNT)])
    same(store.tokens(queries, 7), expected(queries, now, left, 7))
    store.compact()
    for opened in (store, Store(tmp_path)):
        assert len(opened._state.segments) == 1
        same(opened.tokens(queries, 7), expected(queries, now, left, 7))


def test_what_words_and_vectors_find_is_reranked(vectors, queries, tmp_path):
    dense = ModelInfo(name="dense", fingerprint="dense", width=3)
    values_ND = np.random.default_rng(1).standard_normal((COUNT, 3)).astype(np.float32)
    both = {"dense": values_ND, "tokens": vectors}
    store = Store.create(tmp_path, documents(range(COUNT)), both, model=[dense, MODEL])
    first = store.dense(values_ND[: len(queries)], 20)
    found = store.rerank(queries, [list(hits) for hits in first])
    for query, hits, candidates in zip(queries, found, first, strict=True):
        same([hits], expected([query], vectors, sorted(int(i[1:]) for i in candidates), 20))
    assert store.rerank(queries, [[]] * len(queries)) == [{}] * len(queries)
    with pytest.raises(ValueError, match="no document with id 'x'"):
        store.rerank(queries, [["x"]] * len(queries))
    with pytest.raises(TypeError, match="list of strings"):
        store.rerank(queries, ["d001"] * len(queries))


def test_explain_says_which_tokens_meet(vectors, queries, tmp_path):
    empty = TokenVectors.from_list([np.empty((0, WIDTH), np.float32)])
    store = Store.create(tmp_path, documents(range(50)), vectors.select(range(50)), model=MODEL)
    store.add(documents(range(50, COUNT)), vectors=vectors.select(range(50, COUNT)))
    store.add(documents([COUNT]), vectors=empty)
    hits = store.tokens(queries[:1], COUNT)[0]
    found = store.explain(queries[:1], [*hits, f"d{COUNT:03d}"])
    assert found.pop(f"d{COUNT:03d}") == []
    for identifier, parts in found.items():
        document = vectors[int(identifier[1:])]
        assert sum(part.score for part in parts) == pytest.approx(hits[identifier], rel=1e-6)
        assert [part.score for part in parts] == sorted((part.score for part in parts), reverse=True)
        products = queries[0] @ document.T
        assert {part.query: part.document for part in parts} == dict(enumerate(products.argmax(axis=1).tolist()))
        assert {part.tokens for part in parts} == {len(document)}
    with pytest.raises(ValueError, match="token vectors of 6 queries; explain takes those of one"):
        store.explain(queries, ["d001"])
    with pytest.raises(ValueError, match="no document with id 'x'"):
        store.explain(queries[:1], ["x"])
    with pytest.raises(ValueError, match="built without a model"):
        Store.create(tmp_path / "words", documents([0])).explain(queries[:1], ["d000"])


def test_large_segments_are_coded_when_they_are_written_and_merged(vectors, queries, tmp_path):
    store = Store.create(tmp_path, documents(range(100)), vectors.select(range(100)), model=model(coded_from=600, clusters=32))
    store.add(documents(range(100, COUNT)), vectors=vectors.select(range(100, COUNT)))
    coded = [segment.fields["tokens"].segment.residuals is not None for segment in store._state.segments]
    assert coded == [True, False]
    exact = store.tokens(queries, 5)
    assert store.tokens(queries, 5, method=Plaid(documents=COUNT)) == exact
    store.compact()
    assert store.tokens(queries, 5, method=Warp(probes=32, rescored=COUNT)) == exact


def test_a_store_without_token_vectors_and_wrong_vectors_are_refused(vectors, queries, tmp_path):
    words = Store.create(tmp_path / "words", documents(range(3)))
    with pytest.raises(ValueError, match="built without a model"):
        words.tokens(queries)
    store = Store.create(tmp_path / "tokens", model=MODEL)
    assert store.tokens(queries) == [{}] * len(queries)
    with pytest.raises(ValueError, match="width 3; this index needs width 24"):
        store.add(documents([0]), vectors=TokenVectors.from_list([np.ones((2, 3), np.float32)]))
    with pytest.raises(ValueError, match="document 'd000': a token vector holds NaN"):
        store.add(documents([0]), vectors=TokenVectors.from_list([np.full((2, WIDTH), np.nan, np.float32)]))
    store.add(documents([0, 1]), vectors=TokenVectors.from_list([np.empty((0, WIDTH), np.float32), vectors[1]]))
    assert list(store.tokens(queries)[0]) == ["d001"]
    (tmp_path / "tokens/segments" / store._state.manifest.segments[0].name / "tokens.codes.u8").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokens\.codes\.u8"):
        Store(tmp_path / "tokens")
