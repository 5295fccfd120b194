"""What would lead compiled code out of its arrays is refused: terms outside a vocabulary, files changed at their size."""

import re

import numpy as np
import pytest
from scipy import sparse as sp

from openembed.index import damage, exact, lexical, sparse
from openembed.index.manifest import ModelInfo
from openembed.index.store import Store
from openembed.records import Document

WIDTH = 97
MODEL = ModelInfo(name="m", fingerprint="f", width=WIDTH, kind="sparse")


def documents(low, high):
    return [Document(f"d{n:03}", f"common word{n % 7}") for n in range(low, high)]


def vectors(count, seed=0):
    return sp.random(count, WIDTH, 0.2, "csr", dtype=np.float32, random_state=seed)


@pytest.fixture
def store(tmp_path):
    return Store.create(tmp_path / "index", documents(0, 300), vectors(300), model=MODEL)


def with_term(term):
    """Two rows of a term each, of which the second is built into the matrix: scipy does not look at it."""
    return sp.csr_matrix((np.ones(2, np.float32), np.array([3, term]), np.array([0, 1, 2])), shape=(2, WIDTH))


@pytest.mark.parametrize("term", [WIDTH, WIDTH + 5, 1 << 16, 1 << 30, -1, -(1 << 30)])
def test_terms_outside_the_vocabulary_are_refused(store, term):
    told = rf"its vector has the term {term}; allowed: 0 to 96"
    with pytest.raises(ValueError, match=f"query 1: {told}"):
        store.sparse(with_term(term))
    with pytest.raises(ValueError, match=f"query 0: {told}"):
        store.explain(sp.csr_matrix((np.ones(1, np.float32), [term], [0, 1]), shape=(1, WIDTH)), ["d000"])
    with pytest.raises(ValueError, match=f"document 'y': {told}"):
        store.add([Document("x", ""), Document("y", "")], vectors=with_term(term))
    with pytest.raises(ValueError, match=told):
        exact.prepared(with_term(term))
    with pytest.raises(ValueError, match=f"query 1: {told}"):
        exact.prepared(vectors(5)).search(with_term(term), 1, str)
    assert len(store) == len(Store(store.directory)) == 300


def test_terms_are_refused_in_wide_indices_too(store):
    query = with_term(3)
    query.indices = np.array([3, 1 << 40])
    with pytest.raises(ValueError, match=f"query 1: its vector has the term {1 << 40}"):
        store.sparse(query)


@pytest.mark.parametrize("ends", [[0, 5, 2], [0, 2, 1], [0, 1, 9], [1, 1, 2], [-1, 1, 2], [0, 1], [0, 1, 2, 2]])
def test_rows_that_lie_elsewhere_are_refused(store, ends):
    bad = with_term(5)
    bad.indptr = np.array(ends, dtype=np.int32)
    for refused in (
        lambda: store.sparse(bad),
        lambda: store.add([Document("x", ""), Document("y", "")], vectors=bad),
        lambda: store.add([Document("x", ""), Document("y", "")], vectors={"sparse": bad}),
        lambda: exact.prepared(bad),
    ):
        with pytest.raises(ValueError, match=r"\d: its entries lie outside the sparse matrix"):
            refused()


def test_a_matrix_by_columns_is_checked_before_it_is_turned(store):
    columns = sp.csc_matrix((np.ones(1, np.float32), np.array([1 << 20]), np.r_[0, np.ones(WIDTH, int)]), shape=(2, WIDTH))
    with pytest.raises(ValueError, match="indices must be < 2"):
        store.sparse(columns)
    with pytest.raises(ValueError, match="indices must be < 2"):
        store.add([Document("x", ""), Document("y", "")], vectors=columns)


def test_entries_beyond_the_last_row_are_none(store):
    spare = with_term(5)
    spare.indptr = np.array([0, 1, 1], dtype=np.int32)
    spare.has_canonical_format = True
    store.add([Document("x", ""), Document("y", "")], vectors=spare)
    store.add([Document("z", "")], vectors=with_term(7)[1])
    wanted = [(3, ["x"]), (5, []), (7, ["z"])]
    for term, names in wanted:
        query = sp.csr_matrix(([1.0], ([0], [term])), shape=(1, WIDTH))
        assert [name for name in store.sparse(query, 500)[0] if name in "xyz"] == names


def changed(path, change):
    """Changes the numbers of a file; its size stays."""
    if path.suffix == ".npy":
        array = np.load(path)
        size = path.stat().st_size
        np.save(path, change(array))
        assert path.stat().st_size == size
    else:
        change(np.fromfile(path, dtype="<u2" if "terms" in path.name else "<i4")).tofile(path)


def put(place, value):
    def change(array):
        array[place if place >= 0 else len(array) + place] = value
        return array

    return change


def swapped(array):
    """Two neighbours of the first list change places."""
    array[[0, 1]] = array[[1, 0]]
    return array


AT_OPENING = {
    "sparse.rows.npy": [
        put(5, 1 << 40),
        put(5, -1),
        put(0, 1),
        put(-1, 3),
        lambda a: a.view(np.float64),
        lambda a: a.view("u8"),
    ],
    "sparse.starts.npy": [put(5, 1 << 40), put(5, -1), put(0, 1), put(-1, 3), lambda a: a.view(np.float64)],
    "sparse.largest.npy": [lambda a: a.view(np.int32)],
    "sparse.peaks.rows.npy": [put(0, 1), put(3, 1 << 30), lambda a: a.view(np.float32)],
    "postings.starts.npy": [put(3, 1 << 40), put(3, -1), put(0, 1), put(-1, 3), lambda a: a.view(np.float64)],
    "postings.documents.npy": [lambda a: a.view(np.float32)],
    "postings.counts.npy": [lambda a: a.view(np.uint32)],
    "lengths.npy": [lambda a: a.view(np.float32)],
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name, changes in AT_OPENING.items() for change in changes])
def test_what_leads_to_lists_is_checked_at_opening(store, monkeypatch, name, change):
    if "peaks" in name:
        monkeypatch.setattr(sparse, "BOUNDED", 1)
        store.delete(["d000"])
        store.compact()
    (path,) = (store.directory / "segments").rglob(name)
    changed(path, change)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: (damaged|holds)"):
        Store(store.directory)


IN_LISTS = [
    ("sparse.documents.bin", put(700, 300)),
    ("sparse.documents.bin", put(700, np.iinfo(np.int32).max)),
    ("sparse.documents.bin", put(700, -1)),
    ("sparse.documents.bin", swapped),
    ("sparse.terms.bin", put(700, WIDTH)),
    ("sparse.terms.bin", put(700, 65535)),
    ("postings.documents.npy", put(200, 300)),
    ("postings.documents.npy", put(200, -1)),
    ("postings.documents.npy", swapped),
    ("postings.counts.npy", put(200, 0)),
    ("postings.counts.npy", put(200, -1)),
    ("lengths.npy", put(200, -1)),
    ("lengths.npy", put(200, 1 << 30)),
]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("name", "change"), IN_LISTS)
def test_lists_are_checked_before_they_are_searched_first(store, monkeypatch, name, change, compiled):
    if not compiled:
        monkeypatch.setattr(sparse, "postings_library", lambda: None)
        monkeypatch.setattr(lexical, "postings_library", lambda: None)
    (path,) = (store.directory / "segments").rglob(name)
    whole = path.read_bytes()
    changed(path, change)
    harmed = Store(store.directory)
    search = (lambda s: s.sparse(vectors(20, 1), 5)) if name.startswith("sparse") else (lambda s: s.bm25(["common word3"], 5))
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: damaged"):
            search(harmed)
    if not name.startswith("sparse.documents"):
        harmed.delete(["d000"])
        with pytest.raises(ValueError, match=rf"{re.escape(path.name)}: damaged"):
            harmed.compact()
        assert len(Store(store.directory)) == 299
    path.write_bytes(whole)
    assert search(Store(store.directory))


def test_lists_are_read_whole_once_however_often_a_segment_is_opened(store, monkeypatch):
    read = []
    for module in (sparse, lexical):
        monkeypatch.setattr(module, "check_lists", lambda *given: (read.append(given[0]), damage.check_lists(*given))[1])

    def search(opened):
        for k in (1, 2, 3):
            assert opened.sparse(vectors(3, 1), k)
            assert opened.sparse(vectors(3, 1), k, filter={"a": 1}) == [{}] * 3
            assert opened.bm25(["common"], k)

    search(store)
    assert sorted(path.name for path in read) == ["postings.documents.npy", "sparse.documents.bin"]
    search(Store(store.directory))
    store.delete(["d001"])
    search(store)
    assert len(read) == 2
    store.add(documents(300, 305), vectors=vectors(5, 2))
    search(store)
    assert len(read) == 4


def test_lists_longer_than_what_is_checked_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(damage, "AT_ONCE", 4)
    starts, lists = np.array([0, 0, 5, 5, 6, 13, 13]), np.array([0, 1, 2, 5, 9, 3, 0, 1, 4, 5, 6, 7, 9], dtype=np.int32)
    damage.check_starts(tmp_path, starts, 6, 13)
    damage.check_lists(tmp_path, lists, starts, 10)
    damage.check_lists(tmp_path, lists[:0], np.zeros(3, np.int64), 10)
    for place in range(1, 13):
        if place in starts:
            continue
        for value in (lists[place - 1], -1, 10):
            wrong = lists.copy()
            wrong[place] = value
            with pytest.raises(ValueError, match="damaged"):
                damage.check_lists(tmp_path, wrong, starts, 10)
    for place in range(1, 6):
        wrong = starts.copy()
        wrong[place] = 14
        with pytest.raises(ValueError, match="does not rise"):
            damage.check_starts(tmp_path, wrong, 6, 13)
