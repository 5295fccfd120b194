"""Sparse vectors in the store: beside dense ones or alone, through every kind of change."""

import json
import re
import shutil

import numpy as np
import pytest
from crash import dies_at
from kind_fakes import WordTokens
from scipy import sparse as sp
from sparse_fakes import SparseWords
from store_fakes import BagOfWords

from openembed.index import sparse
from openembed.index.native import postings_library
from openembed.index.store import Store, describe_model
from openembed.records import Document
from openembed.token_vectors import TokenVectors

TEXTS = ["cats chase mice in the barn", "dogs chase cats around the yard", "models turn text into vectors", "a barn of hay", ""]
QUERIES = ["cats in a barn", "hay", "zebra", ""]


def documents(low=0, high=len(TEXTS)):
    return [Document(f"d{n}", TEXTS[n % len(TEXTS)], title=f"Title {n}", metadata={"n": n}) for n in range(low, high)]


@pytest.fixture(params=["alone", "beside dense"])
def encoders(request):
    return (SparseWords(),) if request.param == "alone" else (SparseWords(), BagOfWords())


@pytest.fixture
def store(tmp_path, encoders):
    made = Store.create(tmp_path / "index", model=[describe_model("model", encoder) for encoder in encoders])
    made.add(documents(), encoders)
    return made


def expected(live, encoder, queries, k=100):
    """Hits by a dense product of everything that is live."""
    scores_QN = encoder.encode(queries).toarray() @ encoder.encode([document.full_text for document in live]).toarray().T
    rows = [{d.id: float(s) for d, s in zip(live, row, strict=True) if s > 0} for row in scores_QN]
    return [dict(sorted(row.items(), key=lambda hit: (hit[1], hit[0]), reverse=True)[:k]) for row in rows]


def check(store, encoder, k=100, **options):
    live = list(store.documents())
    found = store.sparse(encoder.encode(QUERIES), k, **options)
    wanted = expected(live, encoder, QUERIES, k)
    assert [list(hits.items()) for hits in found] == [list(hits.items()) for hits in wanted]
    assert found[2] == found[3] == {}


def test_every_change_leaves_the_hits_of_a_dense_product(store, encoders):
    encoder = encoders[0]
    check(store, encoder)
    check(Store(store.directory), encoder)
    store.add([Document("x", "hay in a barn"), Document("d1", "no more dogs")], encoders, replace=True)
    check(store, encoder)
    store.delete(["d0"])
    check(store, encoder, k=1)
    encoded = encoder.encoded
    store.update([Document("d2", TEXTS[2], title="Title 2", metadata={"n": 9}), Document("d3", "cats hay")], encoders)
    assert encoder.encoded == encoded + 1
    check(store, encoder)
    store.compact()
    encoded = encoder.encoded
    check(store, encoder)
    assert [path.name for path in (store.directory / "segments").iterdir()] == ["000005"]
    wanted = expected([d for d in store.documents() if d.metadata.get("n", 0) >= 3], encoder, QUERIES)
    assert store.sparse(encoder.encode(QUERIES), filter={"n": {"gte": 3}}) == wanted
    assert Store(store.directory).sparse(encoder.encode(QUERIES), filter={"n": {"gte": 3}}) == wanted


def test_many_small_additions_are_merged(tmp_path):
    encoder = SparseWords()
    store = Store.create(tmp_path / "index", model=describe_model("words", encoder))
    for number in range(20):
        store.add([Document(f"d{number}", f"barn and more barn {number % 3}")], encoder)
    assert encoder.encoded == 20
    assert len(list((store.directory / "segments").iterdir())) <= 16
    check(store, encoder)


def test_dense_sparse_and_words_are_searched_in_one_store(tmp_path):
    words, bag = SparseWords(), BagOfWords()
    store = Store.create(tmp_path / "index", model=[describe_model("a", bag), describe_model("b", words)])
    store.add(documents(), [bag, words])
    assert next(iter(store.dense(bag.encode(["cats chase mice"]), 1)[0])) == "d0"
    assert next(iter(store.sparse(words.encode(["hay"]), 1)[0])) == "d3"
    assert next(iter(store.bm25(["yard"], 1)[0])) == "d1"
    assert (store.model.name, store.models["sparse"].name) == ("a", "b")
    store.add([Document("x", "hay")], words, vectors=bag.encode(["hay"]))
    store.add([Document("y", "hay")], vectors={"dense": bag.encode(["hay"]), "sparse": words.encode(["hay"])})
    check(store, words)
    with pytest.raises(ValueError, match="give the encoder"):
        store.add([Document("z", "hay")], words)
    with pytest.raises(ValueError, match=r"2 encoders, but of 1 kinds \(sparse\)"):
        store.add([Document("z", "hay")], [words, words])


def test_what_cannot_be_is_refused(store, encoders, tmp_path):
    encoder = encoders[0]
    bad = sp.csr_matrix(([1.0, -2.0], ([0, 1], [3, 4])), shape=(2, encoder.width))
    others = {} if "dense" not in store.models else {"dense": np.ones((2, 32), dtype=np.float32)}
    new = [Document("x", "a"), Document("y", "b")]
    for value in (-2.0, np.nan, np.inf, 1e19):
        bad.data[1] = value
        with pytest.raises(ValueError, match=r"document 'y': its vector has the weight .*; allowed: 0 to 1e\+18"):
            store.add(new, vectors=others | {"sparse": bad})
    with pytest.raises(ValueError, match=r"shape \(2, 3\).*needs a sparse matrix \(count, 97\)"):
        store.add(new, vectors=others | {"sparse": sp.csr_matrix((2, 3))})
    for count in (1, 3):
        with pytest.raises(ValueError, match="vectors for 2 documents"):
            store.add(new, vectors=others | {"sparse": sp.csr_matrix((count, encoder.width))})
    with pytest.raises(ValueError, match=r"made by model \(fingerprint"):
        store.add(new, [SparseWords(name="other"), *encoders[1:]])
    with pytest.raises(ValueError, match="query 0: its vector has the weight"):
        store.sparse(sp.csr_matrix(([-1.0], ([0], [3])), shape=(1, encoder.width)))
    with pytest.raises(
        ValueError, match=r"got dense vectors \(an array\), which Store.dense takes; Store.sparse takes sparse weights"
    ):
        store.sparse(np.ones((1, encoder.width)))
    tokens = TokenVectors.from_list([np.ones((2, 3), np.float32)])
    with pytest.raises(ValueError, match=r"got token vectors \(TokenVectors\), which Store.tokens takes; Store.sparse"):
        store.sparse(tokens)
    with pytest.raises(ValueError, match="has no token vectors, only sparse"):
        store.explain(tokens, [])
    with pytest.raises(
        ValueError, match=r"got TokenVectors for sparse vectors; this index needs a sparse matrix \(count, 97\)"
    ):
        store.add(new, vectors=others | {"sparse": tokens})
    with pytest.raises(ValueError, match="k must be 1 or more"):
        store.sparse(encoder.encode(["a"]), 0)
    with pytest.raises(ValueError, match="two models of one kind"):
        Store.create(tmp_path / "two", model=[describe_model("a", encoder), describe_model("b", encoder)])
    dense = Store.create(tmp_path / "dense", model=describe_model("bag", BagOfWords()))
    with pytest.raises(ValueError, match="has no sparse vectors, only dense ones"):
        dense.sparse(encoder.encode(["a"]))
    for query, given in ((encoder.encode(["a"]), "sparse"), (tokens, "tokens")):
        with pytest.raises(ValueError, match=f"which Store.{given} takes; Store.dense takes dense vectors"):
            dense.dense(query)
    assert len(store) == len(TEXTS)
    with pytest.raises(ValueError, match="give the encoder"):
        Store.create(tmp_path / "no vectors", documents(), model=describe_model("a", encoder))
    assert store.update([]) == 0


def test_explain_gives_the_terms_that_make_the_score(store, encoders):
    encoder = encoders[0]
    query = encoder.encode(["cats in the barn"])
    hits = store.sparse(query, 3)[0]
    names = {encoder.term(word): word for word in ("cats", "in", "the", "barn")}
    explained = store.explain(query, list(hits), names.__getitem__)
    for identifier, score in hits.items():
        parts = explained[identifier]
        assert sum(part.score for part in parts) == score
        assert [part.score for part in parts] == sorted((part.query * part.document for part in parts), reverse=True)
    assert {part.token for part in explained["d0"]} == {"cats", "in", "the", "barn"}
    assert store.explain(query, ["d4"], str)["d4"] == []
    with pytest.raises(ValueError, match="no document with id 'no'"):
        store.explain(query, ["no"])
    with pytest.raises(ValueError, match="got 2 query vectors"):
        store.explain(encoder.encode(["a", "b"]), ["d0"])


@pytest.mark.parametrize("damage", ["a byte short", "half", "empty", "missing"])
def test_every_damaged_file_is_named_on_opening(store, damage, monkeypatch, encoders):
    monkeypatch.setattr(sparse, "BOUNDED", 1)
    store.add([Document("x", "cats")], encoders)
    store.compact()
    paths = list((store.directory / "segments").rglob("sparse.*"))
    assert len(paths) == 9
    for path in paths:
        whole = path.read_bytes()
        assert whole
        path.unlink()
        if damage != "missing":
            path.write_bytes(whole[: {"a byte short": len(whole) - 1, "half": len(whole) // 2, "empty": 0}[damage]])
        with pytest.raises(ValueError, match=rf"{re.escape(path.name)}.*(damaged|not valid)"):
            Store(store.directory)
        path.write_bytes(whole)
    check(Store(store.directory), encoders[0])


def test_killed_at_every_step_to_the_disk_it_is_as_before_or_as_after(store, encoders, tmp_path):
    store.delete(["d2"])
    changes = {
        "add": lambda s: s.add([Document("d1", "llamas"), Document("new", "hay")], encoders, replace=True),
        "update": lambda s: s.update([Document("d3", "cats")], encoders),
        "compact": Store.compact,
    }
    for name, change in changes.items():
        shutil.copytree(store.directory, tmp_path / name)
        change(Store(tmp_path / name))
        query = encoders[0].encode(["hay cats"])
        states = [Store(path).sparse(query) for path in (store.directory, tmp_path / name)]
        seen, step = [], 0
        while True:
            copy = tmp_path / f"{name}{step}"
            shutil.copytree(store.directory, copy)
            if not dies_at(step, lambda change=change, copy=copy: change(Store(copy))):
                break
            found = Store(copy)
            seen.append(found.sparse(query))
            assert seen[-1] in states
            check(found, encoders[0])
            step += 1
        assert step > 4, name
        assert all(state in seen for state in states), name


def test_a_manifest_of_the_second_format_opens_unchanged(tmp_path):
    bag = BagOfWords()
    store = Store.create(tmp_path / "index", model=describe_model("bag", bag))
    store.add(documents(), bag)
    manifest = store.directory / "manifest.json"
    values = json.loads(manifest.read_text())
    (model,) = values.pop("models")
    del model["kind"], model["precision"]
    manifest.write_text(json.dumps(values | {"format": 2, "model": model}))
    old = Store(store.directory)
    assert old.model == store.model
    assert old.dense(bag.encode(["cats"]), 3) == store.dense(bag.encode(["cats"]), 3)
    old.delete(["d0"])
    assert json.loads(manifest.read_text())["format"] == 3
    manifest.write_text(json.dumps(values | {"format": 2, "model": None, "segments": []}))
    assert Store(store.directory).models == {}


def test_half_precision_keeps_eleven_bits(tmp_path):
    encoder = SparseWords()
    rng = np.random.default_rng(5)
    vectors = sp.random(50, encoder.width, 0.2, format="csr", dtype=np.float32, random_state=rng)
    vectors.data[:3] = [1e-9, 60_000, 2.0**-24]
    rounded = vectors.copy()
    rounded.data = rounded.data.astype(np.float16).astype(np.float32)
    model = describe_model("words", encoder, precision="float16")
    store = Store.create(tmp_path / "half", [Document(str(n), "x") for n in range(50)], vectors, model=model)
    queries = sp.random(5, encoder.width, 0.2, format="csr", dtype=np.float32, random_state=rng)
    wanted = (queries.astype(np.float64) @ rounded.astype(np.float64).T).toarray()
    for hits, row in zip(store.sparse(queries, 50), wanted, strict=True):
        assert set(hits) == {str(n) for n in np.flatnonzero(row)}
        np.testing.assert_allclose([hits[i] for i in hits], [row[int(i)] for i in hits], rtol=1e-7)
    vectors.data[0] = 70_000
    with pytest.raises(ValueError, match="above 65504, the most float16 has"):
        store.add([Document(f"y{n}", "x") for n in range(50)], vectors=vectors)
    assert store.sparse(queries, 50) == (store.compact(), store.sparse(queries, 50))[1]


def test_a_byte_a_weight_keeps_255_steps_of_each_term(tmp_path):
    encoder, rng = SparseWords(), np.random.default_rng(5)
    vectors = sp.random(60, encoder.width, 0.3, format="csr", dtype=np.float32, random_state=rng)
    vectors.data *= (2.0 ** rng.integers(-6, 12, encoder.width))[vectors.indices]  # terms of very different weights
    vectors.data[0] *= 1e-4
    given = [Document(str(n), "x") for n in range(60)]
    store, sizes = None, {}
    for precision in ("float32", "float16", "uint8"):
        model = describe_model("words", encoder, precision=precision)
        store = Store.create(tmp_path / precision, given[:40], vectors[:40], model=model)
        sizes[precision] = sum(path.stat().st_size for path in store.directory.rglob("sparse.*.bin"))
    postings = vectors[:40].nnz
    assert [sizes[precision] / postings for precision in ("float32", "float16", "uint8")] == [14, 10, 8]

    def held():
        rows = [(d.id, row) for d, row in store.rows("sparse")]
        shape = 1, encoder.width
        parts = [sp.csr_matrix((r.weights, r.terms, [0, len(r.terms)]), shape=shape) for _, r in rows]
        return [identifier for identifier, _ in rows], sp.vstack(parts, format="csr")

    def check():
        ids, stored = held()
        queries = sp.random(5, encoder.width, 0.2, format="csr", dtype=np.float32, random_state=rng)
        scores_QN = (queries.astype(np.float64) @ stored.astype(np.float64).T).toarray().astype(np.float32)
        for opened in (store, Store(store.directory)):
            for hits, row in zip(opened.sparse(queries, 100), scores_QN, strict=True):
                assert hits == {ids[n]: row[n] for n in np.flatnonzero(row)}
        best = next(iter(store.sparse(queries[:1], 1)[0]))
        parts = store.explain(queries[:1], [best])[best]
        own = stored[ids.index(best)]
        assert parts
        assert all(part.document == own[0, part.term] for part in parts)
        return ids, stored

    largest_V = vectors.max(axis=0).toarray().ravel()
    ids, stored = check()
    assert stored.nnz == postings, "no weight becomes 0"
    assert (abs(stored - vectors[:40]).toarray() <= largest_V / 127).all()
    assert abs(stored - vectors[:40]).sum() < 0.004 * vectors[:40].sum()
    store.add(given[40:], vectors={"sparse": vectors[40:]})
    store.delete(["3", "50"])
    ids, stored = check()
    store.update([Document("4", "x", metadata={"n": 1})])
    ids, again = check()
    order = [ids.index(str(n)) for n in range(60) if n not in (3, 50)]
    assert abs(again[order] - stored).nnz == 0
    store.compact()
    ids, merged = check()
    assert (abs(merged[[ids.index(i) for i in sorted(ids, key=int)]] - again[order]).toarray() <= largest_V / 127).all()
    store.delete([ids[0]])
    store.compact()
    assert abs(check()[1] - merged[1:]).nnz == 0, "what need not be rounded again is not"
    with pytest.raises(ValueError, match="token vectors are kept in float32 or float16"):
        describe_model("m", WordTokens(), precision="uint8")
    with pytest.raises(ValueError, match=r"precision.*got 'int8'"):
        describe_model("m", encoder, precision="int8")


@pytest.mark.skipif(postings_library() is None, reason="no compiler")
def test_several_threads_find_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(6)
    vectors = sp.random(5000, 97, 0.1, format="csr", dtype=np.float32, random_state=rng)
    store = Store.create(
        tmp_path / "i", [Document(str(n), "") for n in range(5000)], vectors, model=describe_model("w", SparseWords())
    )
    queries = sp.random(40, 97, 0.1, format="csr", dtype=np.float32, random_state=rng)
    one = store.sparse(queries, 7)
    monkeypatch.setattr(sparse, "threads", lambda: 3)
    assert store.sparse(queries, 7) == one


def test_an_empty_store_and_one_whose_documents_are_gone_find_nothing(tmp_path):
    words = SparseWords()
    store = Store.create(tmp_path / "index", model=describe_model("words", words))
    assert store.sparse(words.encode(["cats"])) == [{}]
    store.add(documents(), words)
    assert store.sparse(words.encode(["cats"]), filter={"n": 99}) == [{}]
    store.delete([f"d{n}" for n in range(len(TEXTS))])
    assert store.sparse(words.encode(["cats", ""])) == [{}, {}]
    store.compact()
    assert store.sparse(words.encode(["cats"])) == [{}]
    assert store.sparse(words.encode([])) == []
