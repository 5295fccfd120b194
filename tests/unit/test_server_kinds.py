"""Sparse and token models behind HTTP: each answers what the library gives, in its own shape; an index has all its modes."""

import base64
import threading

import numpy as np
import pytest
from server_setup import make_kinds, post, served
from starlette.testclient import TestClient
from tiny_training import sentence, tiny_encoder, tiny_sparse_encoder
from token_models import token_encoder

from openembed.encoded import kind_of
from openembed.heads.idf_lookup import build_idf
from openembed.index.encoding import term_names
from openembed.index.exact import prepared
from openembed.index.store import Store
from openembed.index.tokens.methods import Xtr
from openembed.records import Document
from openembed.server.batcher import Batcher
from openembed.server.catalog import ROUTES
from openembed.server.metrics import Metrics
from openembed.server.settings import Limits, Settings
from openembed.steps.modes import MODES, ranked
from openembed.steps.retrieve import encoded_queries

TEXTS = [sentence(1, 2, 3), sentence(4), "w59", sentence(*range(5, 45)), sentence(3, 3, 3, 1)]
DOCUMENTS = [Document(f"d{n}", sentence(*range(3 * n, 3 * n + 5)), "", {"even": n % 2 == 0}) for n in range(9)]
QUERY = sentence(4, 5, 6, 7)
COLBERT = {
    "tokenizer": {"pool_instruction": "include", "query_length": 8, "document_length": 20, "expansion": {"length": 8}},
    "head": {"kind": "token_projection", "width": 16, "skip": "punctuation"},
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A model of each kind, and of those that answer texts in shapes of their own one whose sides differ."""
    folder = tmp_path_factory.mktemp("models")
    free = tiny_sparse_encoder(folder / "free", query_head={"kind": "idf_lookup"})
    free.query_head.set_table(build_idf(free.tokenizer, [document.text for document in DOCUMENTS]))
    return {
        "words": tiny_sparse_encoder(folder / "words", query={"top_k": 4}),
        "vectors": tiny_encoder(folder / "vectors"),
        "free": free,
        "pieces": token_encoder(folder / "pieces"),
        "colbert": token_encoder(folder / "colbert", **COLBERT),
    }


@pytest.fixture(scope="module")
def setup(encoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes") / "all"
    make_kinds(folder, {name: encoders[name] for name in ("vectors", "free", "colbert")}, DOCUMENTS)
    limits = Limits(texts=64, request_tokens=2000)
    with served([*encoders, str(folder)], encoders, Settings(limits=limits, writable=True)) as (app, _gate, catalog):
        yield TestClient(app), catalog


@pytest.fixture(scope="module")
def client(setup):
    return setup[0]


def expected(encoder, texts, side):
    return (encoder.encode_queries if side == "query" else encoder.encode_documents)(texts)


def close(found, wanted):
    found, wanted = (x.toarray() if kind_of(x) == "sparse" else getattr(x, "values_TD", x) for x in (found, wanted))
    return found.shape == wanted.shape and np.allclose(found, wanted, atol=2e-5)


# ---- models


def matrix(answer, width):
    """A TEI answer as rows over the vocabulary."""
    rows = np.zeros((len(answer), width), dtype=np.float32)
    for row, terms in enumerate(answer):
        places = [term["index"] for term in terms]
        assert places == sorted(set(places))
        assert all(set(term) == {"index", "value"} and term["value"] > 0 for term in terms)
        rows[row, places] = [term["value"] for term in terms]
    return rows


@pytest.mark.parametrize("name", ["words", "free"])
@pytest.mark.parametrize("side", ["query", "document"])
def test_embed_sparse_gives_the_terms_of_the_library(client, encoders, name, side):
    encoder = encoders[name]
    wanted = expected(encoder, TEXTS, side).toarray()
    found = matrix(post(client, "/embed_sparse", inputs=TEXTS, model=name, input_type=side), encoder.width)
    assert close(found, wanted)
    assert (wanted > 0).any()
    one = post(client, "/embed_sparse", inputs=TEXTS[0], model=name, input_type=side)
    assert close(matrix(one, encoder.width), wanted[:1])
    empty = post(client, "/embed_sparse", inputs=["", "w1"], model=name, input_type=side)
    assert close(matrix(empty, encoder.width), expected(encoder, ["", "w1"], side).toarray())
    ids = [encoder.tokenizer(TEXTS[:2]).ids[row].tolist() for row in range(2)]
    by_ids = post(client, "/embed_sparse", inputs=ids, model=name, input_type=side)
    assert close(matrix(by_ids, encoder.width), wanted[:2])


def test_without_a_name_the_first_model_of_the_kind_answers(client, encoders):
    found = matrix(post(client, "/embed_sparse", inputs=TEXTS), encoders["words"].width)
    assert close(found, encoders["words"].encode_documents(TEXTS).toarray())
    assert post(client, "/v1/embeddings", input="w1")["model"] == "vectors"
    assert post(client, "/pooling", input="w1")["model"] == "pieces"
    assert close(np.array(post(client, "/embed", inputs=TEXTS)), encoders["vectors"].encode_documents(TEXTS))


@pytest.mark.parametrize("name", ["pieces", "colbert"])
@pytest.mark.parametrize("side", ["query", "document"])
def test_multi_vector_and_pooling_give_the_vectors_of_the_library(client, encoders, name, side):
    wanted = expected(encoders[name], TEXTS, side)
    asked = {"input": TEXTS, "model": name, "input_type": side}
    answer = post(client, "/v1/multi-vector", **asked, embedding_type="float", dimensions=16)
    assert (answer["model"], [row["index"] for row in answer["data"]]) == (name, list(range(len(TEXTS))))
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] > len(TEXTS)
    pooled = post(client, "/pooling", **asked, task="token_embed")
    assert (pooled["object"], pooled["data"][0]["object"], pooled["model"]) == ("list", "pooling", name)
    coded = post(client, "/pooling", **asked, encoding_format="base64")
    for number, rows in enumerate(wanted):
        assert close(np.array(answer["data"][number]["embeddings"]), rows)
        assert answer["data"][number]["embeddings"] == pooled["data"][number]["data"]
        flat = np.frombuffer(base64.b64decode(coded["data"][number]["data"]), dtype="<f4")
        assert np.array_equal(flat.reshape(-1, 16), np.array(pooled["data"][number]["data"], dtype=np.float32))


def test_token_ids_of_queries_are_expanded_as_their_texts_are(client, encoders):
    ids = [row.tolist() for row in encoders["colbert"].tokenizer(TEXTS[:2]).ids]
    answer = post(client, "/v1/multi-vector", input=ids, model="colbert", input_type="query")
    for found, wanted in zip(answer["data"], encoders["colbert"].encode_queries(TEXTS[:2]), strict=True):
        assert close(np.array(found["embeddings"]), wanted)


def test_queries_without_a_model_never_wait_for_one(setup, encoders, monkeypatch):
    client, catalog = setup
    monkeypatch.setattr(catalog.engines["free"].batcher, "submit", None)
    assert post(client, "/embed_sparse", inputs=TEXTS, model="free", input_type="query")[0]
    asked = {"model": "free", "input_type": "query", "truncate": False}
    prompted = matrix(post(client, "/embed_sparse", inputs=TEXTS[:2], instruction="w7 w8", **asked), encoders["free"].width)
    assert close(prompted, encoders["free"].encode_queries(TEXTS[:2], instruction="w7 w8").toarray())
    long = client.post("/embed_sparse", json={"inputs": TEXTS, **asked}).json()["error"]
    assert (long["code"], long["message"][:35]) == ("context_length_exceeded", "text 3 has more than 32 tokens and ")
    texts = [sentence(*range(50))] * 63
    many = client.post("/embed_sparse", json={"inputs": texts, "model": "free", "input_type": "query"})
    assert (many.status_code, many.json()["error"]["code"]) == (413, "too_many_tokens")


@pytest.mark.parametrize("name", ["words", "free", "pieces", "colbert", "vectors"])
def test_a_micro_batch_may_hold_queries_and_documents(encoders, name):
    encoder, found, arrived = encoders[name], {}, threading.Event()

    def keep(side):
        return lambda made: (found.__setitem__(side, made), len(found) == 2 and arrived.set())

    batcher = Batcher(encoder, name, 4096, Metrics(), workers=2)
    for side in ("query", "document"):
        queries = np.full(len(TEXTS), side == "query") if encoder.sided else None
        batcher.submit(encoder.tokenize(TEXTS, queries=queries), normalize=True, done=keep(side))
    batcher.start()
    assert arrived.wait(20)
    batcher.close()
    for side, made in found.items():
        assert close(made, expected(encoder, TEXTS, side)), side


@pytest.mark.parametrize("name", ["words", "colbert", "vectors"])
def test_what_cannot_be_kept_fails_its_request_and_no_other(encoders, name, monkeypatch):
    encoder, found, arrived = encoders[name], {}, threading.Event()

    def no_room(*_rows):
        raise MemoryError("no room")

    def keep(which):
        return lambda made: (found.__setitem__(which, made), len(found) == 2 and arrived.set())

    batcher = Batcher(encoder, name, 4096, Metrics())
    failing, fine = (batcher.submit(encoder.tokenize(TEXTS), normalize=True, done=keep(w)) for w in ("failing", "fine"))
    monkeypatch.setattr(failing.made, "put", no_room)
    batcher.start()
    assert arrived.wait(20)
    assert batcher.healthy
    batcher.close()
    assert isinstance(found["failing"], MemoryError)
    assert close(found["fine"], expected(encoder, TEXTS, "document"))
    assert fine.left == 0


def test_more_numbers_than_an_answer_may_have_are_refused_before_they_are_queued(encoders, monkeypatch):
    encoder = encoders["pieces"]
    texts, width = [sentence(*range(9))] * 3, encoder.width
    most = len(encoder.encode_documents(texts).values_TD) * width
    with served(["pieces", "words"], encoders, Settings(limits=Limits(answer_values=most))) as (app, _gate, catalog):
        client = TestClient(app)
        assert len(post(client, "/v1/multi-vector", input=texts)["data"]) == 3
        monkeypatch.setattr(catalog.engines["pieces"].batcher, "submit", None)
        for path in ("/v1/multi-vector", "/pooling"):
            answer = client.post(path, json={"input": [*texts, "w1"]})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (413, "answer_too_large")
            assert error["message"].endswith(f"more than the {most} numbers of one request; send it in parts")
        assert len(post(client, "/embed_sparse", inputs=texts * 20)) == 60


@pytest.mark.parametrize("name", ["words", "colbert"])
def test_two_threads_share_a_request_of_many_micro_batches(encoders, name):
    encoder, found, arrived = encoders[name], [], threading.Event()
    texts = [sentence(*range(n, n + 1 + n % 7)) for n in range(60)]
    batcher = Batcher(encoder, name, 32, Metrics(), workers=2)
    batcher.start()
    batcher.submit(encoder.tokenize(texts), normalize=True, done=lambda made: (found.append(made), arrived.set()))
    assert arrived.wait(20)
    batcher.close()
    assert close(found[0], encoder.encode_documents(texts))


@pytest.mark.parametrize(
    ("path", "body", "model", "route"),
    [
        ("/v1/embeddings", {"input": "a"}, "words", "/embed_sparse"),
        ("/v1/embeddings", {"input": "a"}, "colbert", "/v1/multi-vector"),
        ("/embed", {"inputs": "a"}, "pieces", "/v1/multi-vector"),
        ("/embed_sparse", {"inputs": "a"}, "vectors", "/v1/embeddings"),
        ("/v1/multi-vector", {"input": "a"}, "free", "/embed_sparse"),
        ("/pooling", {"input": "a"}, "vectors", "/v1/embeddings"),
        ("/v1/contributions", {"text": "a"}, "words", "/embed_sparse"),
    ],
)
def test_a_model_of_another_kind_names_the_path_to_use(client, path, body, model, route):
    error = client.post(path, json={**body, "model": model}).json()["error"]
    assert (error["code"], error["param"]) == ("other_kind", "model")
    assert error["message"].endswith(f"its own path is {route}")


REFUSED = [
    ("/embed_sparse", {"inputs": "a", "normalize": True}, 400, "normalize"),
    ("/embed_sparse", {"inputs": [[5000]]}, 400, "input"),
    ("/embed_sparse", {"inputs": ["a"] * 65}, 413, None),
    ("/embed_sparse", {"inputs": "a", "model": "nonsense"}, 404, "model"),
    ("/v1/multi-vector", {"input": "a", "dimensions": 8}, 400, "dimensions"),
    ("/v1/multi-vector", {"input": "a", "embedding_type": "binary"}, 400, "embedding_type"),
    ("/v1/multi-vector", {"input": [sentence(*range(40))] * 60}, 413, None),
    ("/v1/multi-vector", {"input": sentence(*range(60)), "model": "colbert", "truncate": False}, 400, "input"),
    ("/pooling", {"input": "a", "task": "classify"}, 400, "task"),
    ("/v1/search", {"query": "a", "mode": "hybrid", "explain": True}, 400, "explain"),
    ("/v1/search", {"query": "a", "mode": "dense", "explain": True}, 400, "explain"),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(client, path, body, status, param):
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def test_where_only_another_kind_is_served_the_path_to_use_is_named(encoders):
    with served(["pieces"], encoders) as (app, _gate, _catalog):
        error = TestClient(app).post("/v1/embeddings", json={"input": "a"}).json()["error"]
        assert error["message"].endswith("/v1/multi-vector")
        assert TestClient(app).post("/pooling", json={"input": "a"}).status_code == 200


def test_models_say_their_kind(client, encoders):
    for row in client.get("/v1/models").json()["data"]:
        encoder = encoders[row["id"]]
        assert (row["kind"], row["path"], row["dimensions"]) == (encoder.kind, ROUTES[encoder.kind], encoder.width)


@pytest.mark.parametrize("name", ["words", "free", "pieces", "colbert"])
def test_rerank_scores_as_the_model_compares(client, encoders, name):
    encoder, texts = encoders[name], [document.text for document in DOCUMENTS]
    wanted = prepared(encoder.encode_documents(texts)).scores(encoder.encode_queries([QUERY]), np.arange(len(texts)))
    answer = post(client, "/v1/rerank", query=QUERY, documents=texts, model=name)
    found = {row["index"]: row["relevance_score"] for row in answer["results"]}
    assert np.allclose([found[n] for n in range(len(texts))], wanted, atol=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_full_queue_refuses_other_kinds_too(encoders, monkeypatch):
    limits = Limits(request_tokens=200, queue_tokens=200)
    with served(["pieces"], encoders, Settings(limits=limits)) as (app, _gate, catalog):
        monkeypatch.setattr(type(catalog.engines["pieces"].batcher), "tokens", 190)
        refused = TestClient(app).post("/v1/multi-vector", json={"input": TEXTS})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert "retry-after" in refused.headers


# ---- dense models whose sides differ


@pytest.fixture(scope="module")
def cut(make_encoder):
    return make_encoder(tokenizer={"eos_token": "</s>", "document_length": 12, "query_length": 6})


def test_token_ids_are_cut_where_their_text_is(cut):
    text = "the quick brown fox jumps over the lazy dog and sleeps in the sun"
    with served(["cut"], cut) as (app, _gate, _catalog):
        client = TestClient(app)
        ids = cut.tokenizer.backend.encode(text, add_special_tokens=False).ids
        assert len(ids) > 12
        for side, tokens in (("query", 6), ("document", 12)):
            wanted = expected(cut, [text], side)
            for given in (text, ids):
                answer = post(client, "/v1/embeddings", input=given, input_type=side)
                assert close(np.array([answer["data"][0]["embedding"]]), wanted)
                assert answer["usage"]["total_tokens"] == tokens
                refused = client.post("/v1/embeddings", json={"input": given, "input_type": side, "truncate": False})
                assert refused.json()["error"]["message"].startswith(f"text 0 has more than {tokens} tokens")
            fits = cut.tokenizer.backend.encode("the fox", add_special_tokens=False).ids
            assert post(client, "/v1/embeddings", input=fits[: tokens - 2], input_type=side, truncate=False)


# ---- indexes


def query_vectors(store, encoders, mode):
    by_kind = {encoders[name].kind: encoders[name] for name in ("vectors", "free", "colbert")}
    kinds = by_kind if mode == "hybrid" else {mode} & by_kind.keys()
    return {kind: encoded_queries(store, by_kind[kind], [QUERY]) for kind in kinds}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [None, {"even": True}])
def test_each_mode_finds_what_the_store_finds(setup, encoders, mode, wanted):
    client, catalog = setup
    store = Store(catalog.index("all")._directory)
    vectors = query_vectors(store, encoders, mode)
    if mode == "hybrid":
        hits = ranked(store, mode, QUERY, vectors, 4, filter=wanted)
        assert len(vectors) == 3
    else:
        search = getattr(store, mode)
        hits = search(vectors[mode] if vectors else [QUERY], 4, filter=wanted)[0]
    answer = post(client, "/v1/search", query=QUERY, mode=mode, k=4, filter=wanted)
    assert [hit["id"] for hit in answer["hits"]] == list(hits)
    assert np.allclose([hit["score"] for hit in answer["hits"]], list(hits.values()), atol=1e-5)
    models = {"dense": "vectors", "sparse": "free", "tokens": "colbert", "bm25": None, "hybrid": "vectors"}
    assert (answer["mode"], answer["model"]) == (mode, models[mode])
    assert hits
    assert "terms" not in answer["hits"][0]


def test_a_method_searches_token_vectors_as_the_store_does(encoders, tmp_path):
    make_kinds(tmp_path / "words", {"colbert": encoders["colbert"]}, DOCUMENTS)
    with served([str(tmp_path / "words")], encoders, Settings(limits=Limits(retrieved_tokens=50))) as (app, _gate, _catalog):
        client, store = TestClient(app), Store(tmp_path / "words")
        queries = query_vectors(store, encoders, "tokens")["tokens"]
        for method in (Xtr(tokens=9, imputation="zero"), Xtr(tokens=50, rescored=3)):
            (wanted,) = store.tokens(queries, 4, method=method)
            answer = post(client, "/v1/search", query=QUERY, mode="tokens", k=4, method=method.model_dump())
            assert {hit["id"]: hit["score"] for hit in answer["hits"]} == pytest.approx(wanted, abs=1e-5)
        for method, more, said in (
            (
                {"kind": "warp"},
                {"mode": "tokens"},
                "method: method warp searches residuals, and no segment of this index has",
            ),
            ({"kind": "xtr", "tokens": 9}, {"mode": "bm25"}, "method: method xtr searches token vectors, and none are"),
            ({"kind": "xtr", "tokens": 51}, {"mode": "tokens"}, "method.xtr.tokens: 51 is more than the 50"),
            ({"kind": "xtr", "tokens": "9"}, {"mode": "tokens"}, "method.xtr.tokens: Input should be a valid integer"),
            ({"kind": "xtr", "tokens": 9}, {"mode": "tokens", "explain": True}, "explain: what is explained is MaxSim"),
            ({"kind": "best"}, {}, "method: Input tag 'best' found using 'kind' does not match"),
        ):
            answer = client.post("/v1/search", json={"query": QUERY, "method": method, **more})
            assert answer.status_code in (400, 413)
            assert answer.json()["error"]["message"].startswith(said)
            assert str(tmp_path) not in answer.text


def test_an_index_says_its_modes_and_models(client):
    (row,) = client.get("/v1/indexes").json()["data"]
    assert row["modes"] == list(MODES)
    assert row["models"] == {"dense": "vectors", "sparse": "free", "tokens": "colbert"}
    assert row["contributions"] is True
    assert post(client, "/v1/search", query=QUERY)["mode"] == "hybrid"


def test_a_mode_that_the_index_lacks_is_refused(encoders, tmp_path):
    make_kinds(tmp_path / "sparse", {"words": encoders["words"]}, DOCUMENTS)
    with served([str(tmp_path / "sparse")], encoders) as (app, _gate, _catalog):
        client = TestClient(app)
        assert client.get("/v1/indexes").json()["data"][0]["modes"] == ["sparse", "bm25", "hybrid"]
        for mode in ("dense", "tokens"):
            error = client.post("/v1/search", json={"query": "a", "mode": mode}).json()["error"]
            assert (error["code"], "allowed: sparse, bm25, hybrid" in error["message"]) == ("mode_not_available", True)
        assert client.post("/v1/contributions", json={"text": "a", "index": "sparse"}).status_code == 404
        assert post(client, "/v1/search", query=QUERY)["mode"] == "hybrid"


@pytest.mark.parametrize("mode", ["sparse", "bm25"])
def test_explain_gives_the_terms_that_make_each_score(setup, encoders, mode):
    client, catalog = setup
    store = catalog.index("all").store
    hits = post(client, "/v1/search", query=QUERY, mode=mode, k=5, explain=True)["hits"]
    assert hits
    asked = encoders["free"].encode_queries([QUERY]) if mode == "sparse" else QUERY
    wanted = store.explain(asked, [hit["id"] for hit in hits], term_names(encoders["free"]))
    for hit in hits:
        assert [term["term"] for term in hit["terms"]] == [part.token for part in wanted[hit["id"]]]
        assert sum(term["score"] for term in hit["terms"]) == pytest.approx(hit["score"], abs=1e-4)
        assert sum(term["share"] for term in hit["terms"]) == pytest.approx(1)
        assert all(term["score"] == pytest.approx(term["query"] * term["document"]) for term in hit["terms"])
        assert {term["term"] for term in hit["terms"]} <= set(QUERY.split())


def test_explain_says_which_tokens_meet(setup, encoders):
    store = setup[1].index("all").store
    hits = post(setup[0], "/v1/search", query=QUERY, mode="tokens", k=5, explain=True)["hits"]
    (query,) = encoders["colbert"].encode_queries([QUERY])
    for hit in hits:
        (document,) = encoders["colbert"].encode_documents([store.document(hit["id"]).full_text])
        assert sorted(row["position"] for row in hit["terms"]) == list(range(len(query)))
        assert sum(row["score"] for row in hit["terms"]) == pytest.approx(hit["score"], abs=1e-4)
        assert sum(row["share"] for row in hit["terms"]) == pytest.approx(1)
        names = ["[CLS]", *store.document(hit["id"]).full_text.split(), "[SEP]"]
        for row in hit["terms"]:
            assert row["met"] == names[row["met_position"]]
            special = row["met"].startswith("[")
            assert (row["met_span"] is None) == special
            assert special or store.document(hit["id"]).full_text[slice(*row["met_span"])] == row["met"]
            assert row["score"] == pytest.approx(float(query[row["position"]] @ document[row["met_position"]]), abs=1e-3)
        named = sorted(hit["terms"], key=lambda row: row["position"])
        assert [row["term"] for row in named] == ["[CLS]", *QUERY.split(), "[SEP]", *["[MASK]"] * (len(query) - 6)]


def test_explain_without_a_mode_is_of_the_best_that_can_be_explained(setup, encoders, tmp_path):
    found = post(setup[0], "/v1/search", query=QUERY, explain=True)
    assert (found["mode"], all(hit["terms"] for hit in found["hits"])) == ("sparse", True)
    make_kinds(tmp_path / "dense", {"vectors": encoders["vectors"]}, DOCUMENTS)
    with served([str(tmp_path / "dense")], encoders) as (app, _gate, _catalog):
        found = post(TestClient(app), "/v1/search", query=QUERY, explain=True)
        assert (found["mode"], all(hit["terms"] for hit in found["hits"])) == ("bm25", True)


def test_what_is_added_is_encoded_for_every_kind(encoders, tmp_path):
    names = ("vectors", "words", "colbert")
    make_kinds(tmp_path / "all", {name: encoders[name] for name in names}, DOCUMENTS)
    new = [{"id": f"n{n}", "text": text, "title": "w9"} for n, text in enumerate(TEXTS)]
    with served([str(tmp_path / "all")], encoders, Settings(writable=True)) as (app, _gate, _catalog):
        assert post(TestClient(app), "/v1/documents", documents=new)["count"] == len(DOCUMENTS) + len(TEXTS)
        replaced = post(TestClient(app), "/v1/documents", documents=[{"id": "d0", "text": TEXTS[0]}], upsert=True)
        assert replaced["count"] == len(DOCUMENTS) + len(TEXTS)
    store = Store(tmp_path / "all")
    documents = list(store.documents())
    for name in names:
        encoder = encoders[name]
        query, wanted = encoder.encode_queries([QUERY]), encoder.encode_documents([d.full_text for d in documents])
        found = getattr(store, encoder.kind)(query, 99)[0]
        by_hand = prepared(wanted).scores(query, np.arange(len(documents)))
        assert [found.get(document.id, 0.0) for document in documents] == pytest.approx(by_hand.tolist(), abs=1e-4), name
