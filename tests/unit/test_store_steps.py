import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from store_fakes import BagOfWords

from openembed.index.highlight import matches, snippet
from openembed.index.lexical import analyzer
from openembed.index.store import Store, describe_model
from openembed.records import Document, Query
from openembed.steps import Search, StepConfig
from openembed.steps.fuse import reciprocal_rank

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
    spans = matches(text, "retrieval of vectors", analyzer("en"))
    assert [text[low:high] for low, high, _ in spans] == ["Retrieving", "vectors", "vector"]
    start, end = snippet(text, spans, 60)
    assert "Retrieving many vectors" in text[start:end]
    assert end - start <= 60
    assert text[start - 1] == " "


@given(text=st.text("ab ż\0", max_size=80), query=st.text("ab ż", max_size=8), width=st.integers(1, 30))
def test_a_snippet_is_a_part_of_the_text_with_a_match_when_one_fits(text, query, width):
    spans = matches(text, query, analyzer("none"))
    start, end = snippet(text, spans, width)
    assert 0 <= start <= end <= len(text)
    assert end - start <= width
    if any(high - low <= width for low, high, _ in spans):
        assert any(start <= low and high <= end for low, high, _ in spans)


def test_command_and_server_fuse_to_one_depth(store, monkeypatch):
    from openembed.cli.search import _step_config
    from openembed.server.searching import search

    monkeypatch.setattr("openembed.steps.fuse.DEPTH", 7)
    assert {part.k for part in _step_config("hybrid", 3, None, None).parts} == {7}
    assert {part.k for part in _step_config("hybrid", 9, None, None).parts} == {9}
    asked = []
    for name in ("dense", "bm25"):
        real = getattr(store, name)
        monkeypatch.setattr(store, name, lambda queries, k, real=real: (asked.append(k), real(queries, k))[1])
    search(store, "cats", np.ones(store.model.width, dtype=np.float32), "hybrid", 3)
    assert asked == [7, 7]
