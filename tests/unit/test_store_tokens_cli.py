"""Token vectors on the command line and in steps: an index of a real encoder's, searched whole and as the second step."""

import json

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner
from vocabulary import SENTENCES, bert, word_pieces

import openembed
from openembed.cli import app
from openembed.config import parse
from openembed.encoder import EncoderConfig
from openembed.heads import TokenProjectionConfig
from openembed.index.store import Store
from openembed.index.tokens.methods import Muvera, Plaid, Warp, Xtr, parse_method
from openembed.records import Query
from openembed.similarity import similarity
from openembed.steps import Bm25Config, Search, TokensConfig
from openembed.tokenization import TokenizerConfig


@pytest.fixture
def model(tmp_path):
    backend = word_pieces()
    backend.save(str(tmp_path / "tokenizer.json"))
    fields = {
        "backbone": {"architecture": bert(backend), "attention": "model"},
        "head": {"kind": "token_projection", "width": 8},
        "tokenizer_path": str(tmp_path),
        "max_length": 64,
    }
    openembed.build(parse(EncoderConfig, fields, "test")).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def index(model, tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(text + "\n" for text in SENTENCES))
    report = run("index", tmp_path / "corpus.txt", "-o", tmp_path / "index", "--model", model, "--json")
    assert (report["count"], list(report["models"])) == (len(SENTENCES), ["tokens"])
    return tmp_path / "index"


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def maxsim(encoder, query):
    """MaxSim of a query with every sentence, by the plainest loop."""
    queries, documents = encoder.encode_queries([query]), encoder.encode_documents(SENTENCES)
    return {str(n): float((queries[0] @ document.T).max(axis=1).sum()) for n, document in enumerate(documents, 1)}


def test_an_index_of_token_vectors_is_searched_added_to_and_fused(index, model, tmp_path):
    expected = maxsim(openembed.load(model), "the red planet")
    hits = run("search", index, "the red planet", "--mode", "tokens", "--json")["hits"]
    assert {hit["id"]: hit["score"] for hit in hits} == pytest.approx(expected, abs=1e-4)
    assert [hit["id"] for hit in hits] == sorted(expected, key=expected.get, reverse=True)
    (tmp_path / "more.jsonl").write_text('{"_id": "x", "text": "the red planet"}\n')
    assert run("add", index, tmp_path / "more.jsonl", "--json")["added"] == 1
    assert run("search", index, "the red planet", "--mode", "tokens", "--json")["hits"][0]["id"] == "x"
    assert run("search", index, "the red planet", "--json")["mode"] == "hybrid"


def test_explain_says_which_tokens_meet(index, model, monkeypatch):
    monkeypatch.setattr("openembed.cli.search.TERMS", 2)
    found = run("search", index, "the red planet", "--explain", "--json")
    assert found["mode"] == "tokens"
    encoder = openembed.load(model)
    (query,) = encoder.encode_queries(["the red planet"])
    names = [encoder.tokenizer.backend.id_to_token(i) for i in encoder.tokenize(["the red planet"]).ids[0]]
    assert len(names) == len(query)
    for hit in found["hits"]:
        terms = hit["terms"]
        assert sum(term["score"] for term in terms) == pytest.approx(hit["score"], abs=1e-5)
        assert [term["score"] for term in terms] == sorted((term["score"] for term in terms), reverse=True)
        assert {term["position"]: term["term"] for term in terms} == dict(enumerate(names))
        theirs = [encoder.tokenizer.backend.id_to_token(i) for i in encoder.tokenize([hit["text"]]).ids[0]]
        assert all(term["met"] == theirs[term["met_position"]] for term in terms)
        placed = [term for term in terms if term["met_span"]]
        assert {term["met"] for term in terms} - {term["met"] for term in placed} <= {"[CLS]", "[SEP]"}
        assert all(hit["text"][slice(*term["met_span"])].lower() == term["met"].removeprefix("##") for term in placed)
    shown = CliRunner().invoke(app, ["search", str(index), "the red planet", "--explain", "-k", "1"]).stdout
    best = found["hits"][0]["terms"][0]
    assert f"{best['term']} → {best['met']} {best['score']:.2f}" in shown
    assert f"+ {len(names) - 2} more" in shown


def test_candidates_of_an_earlier_step_are_ordered_by_maxsim(index, model):
    encoder, store = openembed.load(model), Store(index)
    start = Search((Query("q", "the red planet"), Query("nothing", "zzz")))
    words = Bm25Config(k=2).build(store)(start)
    ordered = TokensConfig(candidates=10, k=2).build(store, encoder)(words).run
    expected = maxsim(encoder, "the red planet")
    assert ordered["q"] == pytest.approx({i: expected[i] for i in words.run["q"]}, abs=1e-4)
    assert list(ordered["q"].values()) == sorted(ordered["q"].values(), reverse=True)
    assert ordered["nothing"] == {}


METHODS = ("plaid:documents=3", "plaid", "warp:probes=2", "warp:probes=2,rescored=9", "xtr:tokens=6", "muvera:candidates=3")


def test_an_index_is_coded_and_searched_by_every_method(model, tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(text + "\n" for text in SENTENCES))
    options = ("--bits", 4, "--coded-from", 1, "--encodings", "--json")
    run("index", tmp_path / "corpus.txt", "-o", tmp_path / "coded", "--model", model, *options)
    (tmp_path / "more.jsonl").write_text('{"_id": "x", "text": "the red planet"}\n')
    run("add", tmp_path / "coded", tmp_path / "more.jsonl", "--json")
    store, encoder = Store(tmp_path / "coded"), openembed.load(model)
    coding = store.models["tokens"].coding
    assert (coding.bits, coding.coded_from, coding.keep_vectors, coding.encodings is not None) == (4, 1, True, True)
    assert [s.fields["tokens"].segment.info.bits for s in store._state.segments] == [4, 4]
    queries = encoder.encode_queries(["the red planet"])
    for text in METHODS:
        method = parse_method(text)
        (wanted,) = store.tokens(queries, 4, method=method)
        found = run("search", store.directory, "the red planet", "--mode", "tokens", "--method", text, "-k", 4, "--json")
        assert {hit["id"]: hit["score"] for hit in found["hits"]} == pytest.approx(wanted, abs=1e-5)
        assert found["method"] == method.model_dump()
        own = isinstance(method, Warp | Xtr) and not method.rescored
        assert found["score"].startswith(f"{method.kind}'s estimate of MaxSim" if own else "MaxSim")
        step = parse(TokensConfig, {"k": 4, "method": method.model_dump()}, "step").build(store, encoder)
        assert step(Search((Query("q", "the red planet"),))).run["q"] == wanted
    fused = run("search", store.directory, "the red planet", "--method", "warp", "--json")
    assert (fused["mode"], fused["method"]["kind"]) == ("hybrid", "warp")


def test_an_index_without_codes_refuses_methods_until_it_is_compacted(index, model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("openembed.cli.search.load_model", lambda *_: pytest.fail("refused before a model is loaded"))
        for method, missing in (("warp", "residuals"), ("muvera", "encodings")):
            with pytest.raises(ValueError, match=f"method {method} searches {missing}, .*openembed compact DIR"):
                run("search", index, "planet", "--method", method, "--json")
        with pytest.raises(ValueError, match="method warp searches token vectors, and none are searched here"):
            run("search", index, "planet", "--mode", "bm25", "--method", "warp", "--json")
        with pytest.raises(ValueError, match="what is explained is MaxSim, and method xtr gives scores of its own"):
            run("search", index, "planet", "--mode", "tokens", "--method", "xtr", "--explain", "--json")
        with pytest.raises(ValueError, match="--method 'wrap' is not known"):
            run("search", index, "planet", "--method", "wrap", "--json")
    encoder, exact = openembed.load(model), run("search", index, "planet", "--mode", "tokens", "--json")["hits"]
    with pytest.raises(ValueError, match="searches residuals"):
        TokensConfig(method=Plaid()).build(Store(index), encoder)
    run("compact", index, "--bits", 2, "--coded-from", 1, "--json")
    assert run("search", index, "planet", "--mode", "tokens", "--method", "plaid", "--json")["hits"] == exact
    run("compact", index, "--encodings", "--json")
    coding = Store(index).models["tokens"].coding
    assert (coding.coded_from, coding.encodings is not None) == (1, True), "what is not asked for stays"
    assert run("search", index, "planet", "--mode", "tokens", "--method", "muvera", "--json")["hits"] == exact
    run("compact", index, "--bits", 4, "--no-vectors", "--no-encodings", "--json")
    assert Store(index)._state.segments[0].fields["tokens"].segment.matrix is None
    with pytest.raises(ValueError, match="of token vectors, and no --model gives any"):
        run("index", index.parent / "corpus.txt", "-o", index.parent / "words", "--model", "bm25", "--bits", 4, "--json")


def test_candidates_take_no_method():
    with pytest.raises(ValidationError, match="candidates are ordered by exact MaxSim"):
        TokensConfig(candidates=5, method=Muvera())
    assert "method" not in TokensConfig().model_dump(), "recipes from before methods keep their hashes"


def test_what_does_not_fit_is_refused(index):
    with pytest.raises(ValidationError, match="give it to the step before"):
        TokensConfig(candidates=5, filter={"lang": "en"})
    with pytest.raises(ValueError, match="needs the encoder"):
        TokensConfig().build(Store(index))
    with pytest.raises(ValueError, match="has no vectors for --mode dense; use tokens, bm25 or hybrid"):
        run("search", index, "planet", "--mode", "dense", "--json")
    assert similarity("maxsim")


def test_candidates_without_a_step_before_are_refused(index, model):
    step = TokensConfig(candidates=5).build(Store(index), openembed.load(model))
    with pytest.raises(ValueError, match="put a dense, sparse or bm25 step first"):
        step(Search((Query("q", "the red planet"),)))


def test_matrices_that_are_no_token_vectors_are_refused_with_advice(index):
    with pytest.raises(TypeError, match=r"TokenVectors\.from_list"):
        Store(index).tokens([[[0.0] * 8]])


def test_settings_that_cannot_both_hold_are_refused():
    with pytest.raises(ValidationError, match="another scale than the rest"):
        TokenProjectionConfig(normalize=False, pool={"kind": "clusters"})
    with pytest.raises(ValidationError, match="query_length 8"):
        TokenizerConfig(query_length=8, expansion={"length": 16})
