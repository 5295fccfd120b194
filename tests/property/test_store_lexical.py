import threading

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.index.lexical import K1, STEMMERS, WORD, B, analyzer
from openembed.index.store import Store
from openembed.records import Document

WORDS = ["retrieval", "retrieved", "the", "vectors", "vector", "żółw", "żółwia", "straße", "x", "2024", "naïve", "of"]


def from_scratch(texts, queries, analyze):
    """Scores (queries, documents) of bm25s built on ``texts``, through its own tokeniser and index."""
    options = {"stopwords": analyze.stopwords, "stemmer": analyze.stemmer, "show_progress": False}
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index(bm25s.tokenize(texts, **options), show_progress=False)
    rows = []
    for query in queries:
        tokens = bm25s.tokenize([query], return_ids=False, **options)[0]
        rows.append(index.get_scores(tokens) if tokens else np.zeros(len(texts), dtype=np.float32))
    return rows


@settings(max_examples=40, deadline=None)
@given(data=st.data(), language=st.sampled_from(["en", "pl", "de", "none"]))
def test_scores_equal_bm25s_built_on_the_live_documents(tmp_path_factory, data, language):
    """Bit for bit, after any mixture of additions, deletions and a compaction."""
    text = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
    store = Store.create(tmp_path_factory.mktemp("store") / "index", language=language)
    live = {}
    for step in range(data.draw(st.integers(1, 4))):
        new = [Document(f"{step}-{n}", t) for n, t in enumerate(data.draw(st.lists(text, min_size=1, max_size=8)))]
        store.add(new)
        live |= {document.id: document.text for document in new}
        gone = data.draw(st.lists(st.sampled_from(sorted(live)), max_size=len(live) - 1, unique=True))
        store.delete(gone)
        live = {identifier: kept for identifier, kept in live.items() if identifier not in gone}
    if data.draw(st.booleans()):
        store.compact()
    if not any(live[i] and analyzer(language).terms(live[i]) for i in live):
        return  # bm25s cannot index a corpus without a single token
    queries = data.draw(st.lists(text, min_size=1, max_size=3))
    check(store, live, queries)


def check(store, live, queries):
    expected = from_scratch(list(live.values()), queries, store.analyzer)
    for hits, scores_N in zip(store.bm25(queries, 100), expected, strict=True):
        assert hits == {i: float(score) for i, score in zip(live, scores_N, strict=True) if score > 0}
        assert list(hits) == sorted(hits, key=lambda i: (hits[i], i), reverse=True)


def test_deletions_change_the_statistics_at_once(tmp_path):
    live = {f"d{n}": " ".join(WORDS[n % 5 : n % 7 + 5]) for n in range(30)}
    store = Store.create(tmp_path / "index", [Document(i, text) for i, text in live.items()])
    check(store, live, ["retrieval of vectors", "vector żółw vector"])
    gone = [f"d{n}" for n in range(0, 30, 3)]
    store.delete(gone)
    check(store, {i: t for i, t in live.items() if i not in gone}, ["retrieval of vectors", "vector żółw vector"])


def test_polish_words_meet_through_their_stem():
    analyze = analyzer("pl")
    assert analyze.terms("książka") == analyze.terms("książki")
    assert analyze.spans("Dwie książki")[1] == (5, 12, analyze.terms("książka")[0])


@pytest.mark.parametrize("language", sorted(STEMMERS))
def test_every_language_tokenises(language):
    assert analyzer(language).terms("Zürich 2024") == [*analyzer(language).stemmer.stemWords(["zürich", "2024"])]


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language 'xx' is not known; allowed: none, ar, cs"):
        analyzer("xx")


@pytest.mark.parametrize("language", ["none", *STEMMERS])
def test_terms_are_those_of_bm25s(language):
    texts = [
        "The cats and the dogs of Łódź: naïve cafés!",
        "",
        "und die Hunde, el perro y la casa",
        "a I x 42 3d",
        "i̇ß ΑΣ ёж книги и",
    ]
    analyze = analyzer(language)
    options = {"token_pattern": WORD.pattern, "stopwords": analyze.stopwords, "stemmer": analyze.stemmer}
    expected = bm25s.tokenize(texts, return_ids=False, show_progress=False, **options)
    assert [analyze.terms(text) for text in texts] == expected


def test_a_lock_that_a_killed_fork_kept_holds_up_no_search():
    from tqdm.auto import tqdm

    with tqdm.get_lock():
        thread = threading.Thread(target=lambda: analyzer("en").terms("cats"), daemon=True)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
