"""Threads share a store: a search is of the state at its beginning, and leaves nothing of it in the next."""

import threading

import numpy as np
import pytest
from scipy import sparse as sp

from openembed.index import searching, sparse
from openembed.index import store as store_module
from openembed.index.lexical import Bm25
from openembed.index.manifest import ModelInfo
from openembed.index.store import Store
from openembed.records import Document
from openembed.token_vectors import TokenVectors

WIDTH = 5
MODELS = [ModelInfo(name=kind, fingerprint="f", width=WIDTH, kind=kind) for kind in ("dense", "sparse", "tokens")]


def given(low, high):
    documents = [Document(f"d{n}", "common " * (n + 1)) for n in range(low, high)]
    dense = np.zeros((high - low, WIDTH), dtype=np.float32)
    dense[:, 0] = np.arange(low, high) + 1
    tokens = TokenVectors.from_list([dense[[n]] for n in range(high - low)], WIDTH)
    return documents, {"dense": dense, "sparse": sp.csr_matrix(dense), "tokens": tokens}


@pytest.fixture
def store(tmp_path):
    made = Store.create(tmp_path / "index", *given(0, 4), model=MODELS)
    documents, vectors = given(4, 8)
    made.add(documents, vectors=vectors)
    return made


QUERY = np.eye(1, WIDTH, dtype=np.float32)
SEARCHES = {
    "dense": lambda s: s.dense(QUERY, 3),
    "sparse": lambda s: s.sparse(sp.csr_matrix(QUERY), 3),
    "tokens": lambda s: s.tokens(TokenVectors.from_list([QUERY]), 3),
    "words": lambda s: s.bm25(["common"], 3),
    "rerank": lambda s: s.rerank(TokenVectors.from_list([QUERY]), [["d1", "d6"]]),
    "explain": lambda s: s.explain(sp.csr_matrix(QUERY), ["d1", "d6"]),
}
INSIDE = {
    "dense": (searching, "search_vectors"),
    "sparse": (sparse.Search, "__init__"),
    "tokens": (searching.token_search, "search"),
    "words": (Bm25, "search"),
    "rerank": (searching.token_search, "rerank"),
    "explain": (sparse, "checked"),
}


def change(store):
    """Leaves nothing where it was: documents gone, others first, segments merged."""
    store.delete(["d7", "d1", "d6"])
    documents, vectors = given(20, 24)
    store.add(documents, vectors=vectors)
    store.compact()


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_change_in_the_middle_of_a_search_is_seen_by_the_next_alone(store, monkeypatch, kind):
    search, (owner, name) = SEARCHES[kind], INSIDE[kind]
    before, real, left = search(Store(store.directory)), getattr(owner, name), [1]

    def slow(*arguments, **options):
        found = real(*arguments, **options)
        if left and threading.current_thread() is searcher:
            left.clear()
            changer = threading.Thread(target=change, args=[store])
            changer.start()
            changer.join()
        return found

    found = []
    searcher = threading.Thread(target=lambda: found.append(search(store)))
    monkeypatch.setattr(owner, name, slow)
    searcher.start()
    searcher.join()
    assert not left
    assert found == [before]
    monkeypatch.undo()
    if kind in ("rerank", "explain"):
        with pytest.raises(ValueError, match="no document with id"):
            search(store)
    else:
        after = search(Store(store.directory))
        assert search(store) == search(store) == after
        assert next(iter(after[0])) == "d23"


def test_a_slow_opening_puts_no_older_state_in_the_place_of_a_newer(store, monkeypatch):
    reader, entered, go = threading.Thread(target=lambda: store._open()), threading.Event(), threading.Event()
    real = store_module.read_manifest

    def slow(directory):
        manifest = real(directory)
        if threading.current_thread() is reader:
            entered.set()
            assert go.wait(20)
        return manifest

    monkeypatch.setattr(store_module, "read_manifest", slow)
    reader.start()
    assert entered.wait(20)
    writer = threading.Thread(target=lambda: store.delete(["d0"]))
    writer.start()
    writer.join(0.3)
    go.set()
    reader.join()
    writer.join()
    assert "d0" not in Store(store.directory)
    assert "d0" not in store


def test_threads_find_a_state_that_there_was(store):
    """One thread adds the best document anew and deletes it, others search: they find it or the next best, and no mixture."""
    allowed = {kind: [search(store)] for kind, search in SEARCHES.items() if kind not in ("rerank", "explain")}
    documents, vectors = given(30, 31)
    store.add(documents, vectors=vectors)
    for kind, answers in allowed.items():
        answers.append(SEARCHES[kind](store))
    wrong, done = [], threading.Event()

    def look():
        while not done.is_set():
            for kind, answers in allowed.items():
                found = SEARCHES[kind](store)
                if found not in answers:
                    wrong.append((kind, found))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        store.delete(["d30"])
        store.add(documents, vectors=vectors)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:2]
    for kind, answers in allowed.items():
        assert SEARCHES[kind](store) == answers[1]


def test_what_was_committed_stays_where_it_cannot_be_opened(store, monkeypatch):
    real, calls = Store._open, []

    def failing(self):
        calls.append(1)
        if len(calls) == 2:  # after the commit
            raise OSError(24, "Too many open files")
        return real(self)

    monkeypatch.setattr(Store, "_open", failing)
    documents, vectors = given(8, 9)
    with pytest.raises(OSError, match="Too many open files"):
        store.add(documents, vectors=vectors)
    monkeypatch.undo()
    assert "d8" in Store(store.directory)
    assert store.refresh()
    assert "d8" in store
