import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from store_fakes import BagOfWords

from openembed.cli.search import _table
from openembed.index.highlight import matches, snippet
from openembed.index.lexical import Analyzer, analyzer
from openembed.index.store import Store, describe_model
from openembed.records import Document, Query
from openembed.server import searching
from openembed.steps import Search, StepConfig
from openembed.steps.fuse import reciprocal_rank
from openembed.steps.modes import explained, kinds_of, modes_of, ranked
from openembed.steps.retrieve import encoded_queries

DOCUMENTS = [Document(f"d{n}", text) for n, text in enumerate(["red cats", "blue cats", "red dogs", "green birds"])]


@pytest.fixture
def store(tmp_path):
    return Store.create(
        tmp_path / "index", DOCUMENTS, BagOfWords().encode([d.text for d in DOCUMENTS]),
        model=describe_model("bag", BagOfWords()),
    )  # fmt: skip


def run(config, store, encoder=None):
    step = TypeAdapter(StepConfig).validate_python(config).build(store, encoder)
    return step(Search((Query("q1", "red cats"), Query("q2", "birds")))).run


def test_dense_and_bm25_retrieve_and_fuse_combines_them(store):
    dense = run({"kind": "dense", "k": 3}, store, BagOfWords())
    bm25 = run({"kind": "bm25", "k": 3}, store)
    assert [next(iter(r[q])) for r in (dense, bm25) for q in ("q1", "q2")] == ["d0", "d3", "d0", "d3"]
    parts = [{"kind": "dense", "k": 3}, {"kind": "bm25", "k": 3}]
    fused = run({"kind": "fuse", "parts": parts, "weights": [2, 1], "k": 2}, store, BagOfWords())
    whole = reciprocal_rank([dense, bm25], weights=[2, 1])
    assert fused == {query: dict(list(hits.items())[:2]) for query, hits in whole.items()}
    assert run({"kind": "fuse", "parts": parts[1:], "method": "min_max"}, store)["q2"] == {"d3": 1.0}


def test_the_dense_step_puts_the_instruction_before_the_query(store):
    asked = run({"kind": "dense", "instruction": "blue", "k": 4}, store, BagOfWords())
    assert asked["q1"] == store.dense(BagOfWords().encode(["Instruct: blue\nQuery: red cats"]), 4)[0]
    assert asked != run({"kind": "dense", "k": 4}, store, BagOfWords())


def test_the_dense_step_refuses_another_model(store):
    with pytest.raises(ValueError, match="made by bag"):
        run({"kind": "dense"}, store, BagOfWords(name="other"))
    with pytest.raises(ValueError, match="needs the encoder"):
        run({"kind": "dense"}, store)


def test_matches_meet_by_stem_and_the_snippet_holds_most_terms():
    text = "Filler words here. " * 40 + "Retrieving many vectors quickly. " + "More filler follows. " * 40 + "vector"
    spans = matches(text, set(analyzer("en").terms("retrieval of vectors")), analyzer("en"))
    assert [text[low:high] for low, high, _ in spans] == ["Retrieving", "vectors", "vector"]
    start, end = snippet(text, spans, 60)
    assert "Retrieving many vectors" in text[start:end]
    assert end - start <= 60
    assert text[start - 1] == " "


@given(text=st.text("ab ż\0", max_size=80), query=st.text("ab ż", max_size=8), width=st.integers(1, 30))
def test_a_snippet_is_a_part_of_the_text_with_a_match_when_one_fits(text, query, width):
    spans = matches(text, set(analyzer("none").terms(query)), analyzer("none"))
    start, end = snippet(text, spans, width)
    assert 0 <= start <= end <= len(text)
    assert end - start <= width
    if any(high - low <= width for low, high, _ in spans):
        assert any(start <= low and high <= end for low, high, _ in spans)


def test_a_hybrid_search_is_the_fusion_of_deep_rankings(store, monkeypatch):
    query, encoder = "red cats", BagOfWords()
    parts = ({"kind": "dense", "k": 100}, {"kind": "bm25", "k": 100})
    expected = run({"kind": "fuse", "k": 3, "parts": parts}, store, encoder)["q1"]
    vectors = {"dense": encoded_queries(store, encoder, [query])}
    assert ranked(store, "hybrid", query, vectors, 3) == expected
    monkeypatch.setattr("openembed.steps.fuse.DEPTH", 7)
    asked = []
    for name in ("dense", "bm25"):
        real = getattr(store, name)
        monkeypatch.setattr(store, name, lambda queries, k, real=real, **_o: (asked.append(k), real(queries, k))[1])
    for k in (3, 9):
        ranked(store, "hybrid", query, vectors, k)
    assert asked == [7, 7, 9, 9]
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        ranked(store, "hybrid", query, vectors, 0)


def test_modes_are_those_of_the_vectors_held():
    assert modes_of([]) == ["bm25"]
    assert modes_of(["tokens", "dense"]) == ["dense", "tokens", "bm25", "hybrid"]
    assert (kinds_of("hybrid", ["tokens", "dense"]), kinds_of("bm25", ["dense"])) == (["dense", "tokens"], [])
    assert kinds_of("sparse", ["dense"]) == ["sparse"]  # whoever searches says that there are none
    with pytest.raises(ValueError, match="allowed: dense, sparse, tokens, bm25, hybrid"):
        kinds_of("psychic", ["dense"])


def test_explaining_a_mode_that_is_no_sum_over_terms_is_refused(store):
    with pytest.raises(
        ValueError, match="mode 'dense' is no sum over terms or tokens; allowed with explain: sparse, tokens, bm25"
    ):
        explained(store, "dense", "red", {}, ["d0"])


def test_words_explain_their_scores(store):
    store.add([Document("long", "cats cats red " + "filler " * 9)], BagOfWords())
    for query in ("red cats", "cats red cats unknown", "zebra"):
        hits = store.bm25([query], 9)[0]
        found = store.explain(query, list(hits))
        for identifier, score in hits.items():
            assert sum(part.score for part in found[identifier]) == pytest.approx(score, rel=1e-6)
            assert all(part.score == part.query * part.document > 0 for part in found[identifier])
            assert [part.score for part in found[identifier]] == sorted((p.score for p in found[identifier]), reverse=True)
    assert [part.token for part in store.explain("red cats", ["d2"])["d2"]] == ["red"]
    assert store.explain("red cats", ["d3"]) == {"d3": []}
    shares = explained(store, "bm25", "red cats", {}, ["long"])["long"]
    assert {row["term"] for row in shares} == {"red", "cat"}
    assert sum(row["share"] for row in shares) == pytest.approx(1)
    with pytest.raises(ValueError, match="no document with id 'no'"):
        store.explain("red", ["no"])


def shown_by_the_server(store, query, k):
    return len(searching.search(store, query, {}, "bm25", k).hits)


def shown_by_the_command(store, query, k):
    hits = ranked(store, "bm25", query, {}, k)
    return _table([(i, score, store.document(i)) for i, score in hits.items()], query, store, {}).row_count


def test_a_long_query_is_counted_once_however_many_words_it_has(store):
    class Terms(list):
        def count(self, _term):
            raise AssertionError("goes through all words for each of them")

    words = store._state.words
    (found,) = words.explain(Terms(["red", "cat", "red", "unknown"]), [store._state.place("d0")])
    (plain,) = words.explain(["red", "cat"], [store._state.place("d0")])
    assert found == [("red", 2 * plain[0][1], plain[0][2]), plain[1]]
    assert words.explain(Terms(["red"]), []) == []


@pytest.mark.parametrize("show", [shown_by_the_server, shown_by_the_command])
def test_a_query_is_analysed_once_however_many_hits_are_shown(store, monkeypatch, show):
    real, analysed = Analyzer.terms, []
    monkeypatch.setattr(Analyzer, "terms", lambda self, text: (analysed.append(text), real(self, text))[1])
    show(store, "red cats", 1)
    one = len(analysed)
    assert show(store, "red cats", 3) == 3
    assert len(analysed) == 2 * one
