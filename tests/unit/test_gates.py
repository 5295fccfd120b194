"""Other gates for a trained model, and what they are for: an index of words alone, whose finds the model reranks."""

import json

import numpy as np
import pytest
from store_fakes import BagOfWords
from typer.testing import CliRunner
from vocabulary import SENTENCES, sparse_encoder

import openembed
from openembed.cli import app
from openembed.heads.splade import SideConfig
from openembed.heads.token_pooling import ClustersConfig
from openembed.index.store import Store, describe_model
from openembed.recipe.config import parse_recipe
from openembed.recipe.files import RecipeFile
from openembed.records import Document, Query
from openembed.steps import Bm25Config, RerankConfig, Search
from openembed.steps.rerank import rerank

VDR = {"activation": "elu1p", "bags": True, "query": {"top_k": 9, "keep_own": True}, "document": {"top_k": 9, "keep_own": True}}
BAG = SideConfig(gate="bag_of_words")
DOCUMENTS = [Document(f"d{n}", text) for n, text in enumerate(SENTENCES)]


@pytest.fixture
def encoder(tmp_path):
    return sparse_encoder(tmp_path, VDR).eval()


def same(one, other):
    return (one != other).nnz == 0


@pytest.mark.parametrize("side", [BAG, SideConfig(), SideConfig(gate="lexical"), SideConfig(top_k=3, prune_ratio=0.1)])
def test_a_changed_gate_is_that_of_a_model_built_with_it(encoder, tmp_path, side):
    built = sparse_encoder(tmp_path, VDR | {"document": side.model_dump()}).eval()
    changed = encoder.with_gates(document=side)
    assert same(changed.encode_documents(SENTENCES), built.encode_documents(SENTENCES))
    assert same(changed.encode_queries(SENTENCES), encoder.encode_queries(SENTENCES))
    assert (changed.fingerprint, changed.config) == (built.fingerprint, built.config)
    assert changed.fingerprint != encoder.fingerprint
    assert changed.with_gates(document=encoder.config.head.document).fingerprint == encoder.fingerprint


def test_the_weights_are_shared_and_the_bag_needs_none(encoder, monkeypatch):
    changed, before = encoder.with_gates(query=BAG), encoder.encode_documents(SENTENCES)
    assert {n: p.data_ptr() for n, p in changed.state_dict().items()} == {
        n: p.data_ptr() for n, p in encoder.state_dict().items()
    }
    encoder.head.bias_V.data += 1.0
    assert same(changed.encode_documents(SENTENCES), encoder.encode_documents(SENTENCES))
    assert not same(changed.encode_documents(SENTENCES), before)
    monkeypatch.setattr(encoder.backbone, "forward", None)
    assert set(changed.encode_queries(SENTENCES).data) == {1.0}
    with pytest.raises(TypeError):
        changed.encode_documents(SENTENCES)


def test_a_model_that_looks_queries_up_keeps_its_table(tmp_path):
    plain = sparse_encoder(tmp_path, query_head={"kind": "idf_lookup"}).eval()
    plain.query_head.set_table(np.arange(plain.width, dtype=np.float32))
    changed = plain.with_gates(document=SideConfig(top_k=2))
    assert changed.encode_documents(SENTENCES).getnnz(1).tolist() == [2, 2, 2, 2]
    assert same(changed.encode_queries(SENTENCES), plain.encode_queries(SENTENCES))
    with pytest.raises(ValueError, match="looks its queries up and runs no model for them; give document alone"):
        plain.with_gates(query=BAG)


def test_what_has_no_gates_and_settings_that_go_ill_together_are_refused(encoder):
    with pytest.raises(ValueError, match="gates: only weights over the vocabulary have them, this model gives dense vectors"):
        openembed.load("openembed-nano").with_gates(query=BAG)
    with pytest.raises(ValueError, match=r"gate 'lexical' keeps the text's own tokens alone; leave top_k and keep_own out"):
        encoder.with_gates(query=SideConfig(gate="lexical", top_k=3))
    with pytest.raises(ValueError, match="only vectors a token can be pooled, this model's are sparse"):
        encoder.with_pool(ClustersConfig())


class Counting:
    """The encoder, with the texts of documents that it has encoded."""

    def __init__(self, encoder):
        self.kind, self.width, self.fingerprint = encoder.kind, encoder.width, encoder.fingerprint
        self.document_prompt, self.encode_queries = encoder.document_prompt, encoder.encode_queries
        self._encoder, self.texts = encoder, []

    def encode_documents(self, texts, **options):
        self.texts += texts
        return self._encoder.encode_documents(texts, **options)


def test_reranking_orders_by_the_models_scores_each_document_encoded_once(encoder, tmp_path):
    words = encoder.with_gates(document=BAG)
    store = Store.create(tmp_path / "index", DOCUMENTS, words.encode_documents(SENTENCES), model=describe_model("words", words))
    store.check_encoder(words)
    with pytest.raises(ValueError, match="use that model, or build the index anew"):
        store.check_encoder(encoder)
    counting, queries = Counting(encoder), ["red planet", "grapes"]
    ordered = rerank(store, counting, queries, [["d0", "d2", "d3"], ["d2", "d1"]])
    assert sorted(counting.texts) == sorted(SENTENCES)
    expected_QN = (encoder.encode_queries(queries) @ encoder.encode_documents(SENTENCES).T).toarray()
    for hits, scores_N, names in zip(ordered, expected_QN, ({"d0", "d2", "d3"}, {"d1", "d2"}), strict=True):
        assert list(hits) == sorted(names, key=lambda name: -scores_N[int(name[1:])])
        assert hits == pytest.approx({name: scores_N[int(name[1:])] for name in names}, rel=1e-5)
    assert rerank(store, encoder, queries, [[], []]) == [{}, {}]
    assert rerank(store, encoder, queries, [["d1"], []])[1] == {}
    with pytest.raises(ValueError, match="no document with id 'x'"):
        rerank(store, encoder, ["a"], [["x"]])
    with pytest.raises(ValueError, match="2 queries, but candidates of 1"):
        rerank(store, encoder, queries, [["d1"]])
    with pytest.raises(TypeError, match="must be a list of strings"):
        rerank(store, encoder, queries, ["d1", "d2"])


def test_the_step_takes_a_model_or_one_encoder_and_what_was_found_before(encoder, tmp_path):
    store = Store.create(tmp_path / "index", DOCUMENTS)
    encoder.save(tmp_path / "model")
    start = Search((Query("q", "red planet sun"), Query("nothing", "zzz")))
    words = Bm25Config().build(store)(start)
    found = list(words.run["q"])
    expected = rerank(store, encoder, ["red planet sun"], [found[:2]])[0]
    for step in (
        RerankConfig(candidates=2).build(store, encoder),
        RerankConfig(model=str(tmp_path / "model"), candidates=2).build(store),
    ):
        assert step(words).run == {"q": pytest.approx(expected), "nothing": {}}
        assert list(step(words).run["q"]) == list(expected)
    assert (
        list(RerankConfig(k=1).build(store, encoder)(words).run["q"])
        == list(rerank(store, encoder, ["red planet sun"], [found])[0])[:1]
    )
    dense = RerankConfig().build(store, BagOfWords())(words).run["q"]
    assert set(dense) == set(found)
    with pytest.raises(ValueError, match="put a dense, sparse or bm25 step first"):
        RerankConfig().build(store, encoder)(start)
    with pytest.raises(ValueError, match="needs one encoder, 0 are given; name its model"):
        RerankConfig().build(store)
    with pytest.raises(ValueError, match="needs one encoder, 2 are given; name its model"):
        RerankConfig().build(store, [encoder, BagOfWords()])


@pytest.fixture
def run():
    def call(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call


@pytest.fixture
def files(encoder, tmp_path):
    encoder.save(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("".join(text + "\n" for text in SENTENCES))
    return tmp_path


def test_an_index_of_words_is_searched_by_the_model_and_reranked_by_it(run, encoder, files):
    run("convert", files / "model", files / "words", "--document-gate", "bag_of_words", "--json")
    run("index", files / "corpus.txt", "-o", files / "index", "--model", files / "words", "--json")
    ((_, bag),) = [row for row in Store(files / "index").rows("sparse") if row[0].id == "4"]
    assert set(bag.weights) == {1.0}
    query = ("red planet", "--mode", "sparse", "-k", "2", "--json")
    plain = run("search", files / "index", *query)["hits"]
    documents_NV = encoder.with_gates(document=BAG).encode_documents(SENTENCES)
    first_N = (encoder.encode_queries(["red planet"]) @ documents_NV.T).toarray()[0]
    assert [hit["score"] for hit in plain] == pytest.approx(sorted(first_N, reverse=True)[:2], rel=1e-4)
    reranked = run("search", files / "index", *query, "--rerank", files / "model", "--candidates", "4")
    whole_N = (encoder.encode_queries(["red planet"]) @ encoder.encode_documents(SENTENCES).T).toarray()[0]
    best = np.argsort(-whole_N)[:2]
    assert [hit["id"] for hit in reranked["hits"]] == [str(n + 1) for n in best]
    assert [hit["score"] for hit in reranked["hits"]] == pytest.approx(whole_N[best], rel=1e-4)
    assert reranked["score"].startswith("sum of query weight times document weight")
    words = run("search", files / "index", "planet", "--mode", "bm25", "--rerank", files / "model", "--json")["hits"]
    assert {hit["id"] for hit in words} == {"1", "3"}


def test_a_query_of_words_runs_no_model(run, encoder, files):
    run(
        "convert",
        files / "model",
        files / "asked",
        "--query-gate",
        "bag_of_words",
        "--document-gate",
        "top_k=5,keep_own=true",
        "--json",
    )
    head = openembed.load(files / "asked").config.head
    assert (head.query, head.document) == (BAG, SideConfig(top_k=5, keep_own=True))
    found = run("terms", files / "asked", "red planet", "--query", "--json")
    assert {term["token"]: term["weight"] for term in found["top"]} == {"red": 1.0, "planet": 1.0}


def test_options_that_cannot_be_meant_are_refused(run, files):
    with pytest.raises(ValueError, match=r"--query-gate.*gate.*'parametric', 'lexical' or 'bag_of_words'.*got 'bag'"):
        run("convert", files / "model", files / "other", "--query-gate", "bag")
    with pytest.raises(ValueError, match=r'--document-gate .* write a gate, or settings such as "top_k=64,keep_own=true"'):
        run("convert", files / "model", files / "other", "--document-gate", "top_k=five")
    with pytest.raises(ValueError, match="is the model itself, which would be replaced; give another folder"):
        run("convert", files / "model", files / "model", "--query-gate", "bag_of_words")
    run("index", files / "corpus.txt", "-o", files / "index", "--model", files / "model", "--json")
    with pytest.raises(ValueError, match="--candidates 5 are fewer than the 10 documents asked for"):
        run("search", files / "index", "sun", "--rerank", files / "model", "--candidates", "5")
    with pytest.raises(ValueError, match="leave --rerank out"):
        run("search", files / "index", "sun", "--rerank", files / "model", "--explain")


def recipe(model):
    stages = {
        "index": {"do": "index", "corpus": "corpus.txt"},
        "ask": {
            "do": "search",
            "index": "index",
            "queries": ["sun"],
            "steps": [{"kind": "bm25"}, {"kind": "rerank", "model": model}],
        },
        "later": {"do": "index", "corpus": "corpus.txt"},
    }
    return {"title": "Ask", "stage": stages}


def test_a_recipe_reranks_by_a_model_of_its_own(encoder, files):
    from openembed.recipe.run import run_recipe

    asked = parse_recipe(RecipeFile("ask", files / "ask.toml", False, recipe(str(files / "model"))))
    run_recipe(asked, files / "out", base=files)
    (answer,) = json.loads((files / "out" / "ask" / "searches.json").read_text())
    found = [hit["id"] for hit in answer["hits"]]
    store = Store(files / "out" / "index" / "store")
    assert found == list(rerank(store, encoder, ["sun"], [["1", "2"]])[0])
    with pytest.raises(ValueError, match=r"stage\.ask\.steps\.1\.model: no earlier train stage of this name \(got 'later'\)"):
        parse_recipe(RecipeFile("ask", files / "ask.toml", False, recipe("later")))
