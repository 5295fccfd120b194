"""Every path of the API gives what the library gives, in the shapes that clients read."""

import base64

import numpy as np
import pytest
from server_setup import DOCUMENTS, make_index, post, served
from starlette.testclient import TestClient

from openembed.contributions import contributions
from openembed.index.store import Store
from openembed.records import Query
from openembed.server.settings import Limits, Settings
from openembed.steps import Bm25Config, DenseConfig, FuseConfig, Search

TEXTS = ["a cat", "the quick brown fox jumps over the lazy dog", "", "naïve café 🙂 中文", "word " * 300]
PROMPTS = {"query": "query: ", "document": "passage: ", "tasks": {"facts": {"query": "find the facts"}}}


@pytest.fixture(scope="module")
def encoder(make_encoder):
    return make_encoder(prompts=PROMPTS)


@pytest.fixture(scope="module")
def setup(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "animals"
    make_index(folder, encoder)
    Store.create(folder.parent / "words", DOCUMENTS)
    limits = Limits(texts=64, rerank_documents=32, request_tokens=20_000)
    targets = ["tiny", str(folder), f"bm25={folder.parent / 'words'}"]
    with served(targets, encoder, Settings(limits=limits), aliases=["text-embedding-3-small"]) as (app, _gate, catalog):
        yield TestClient(app), catalog


@pytest.fixture(scope="module")
def client(setup):
    return setup[0]


def vectors(answer):
    return np.array([row["embedding"] for row in answer["data"]], dtype=np.float32)


def close(left, right):
    return np.allclose(left, right, atol=2e-6)


def test_embeddings_are_those_of_the_library(client, encoder):
    answer = post(client, "/v1/embeddings", input=TEXTS, model="tiny")
    assert close(vectors(answer), encoder.encode_documents(TEXTS))
    rows = encoder.tokenize(TEXTS, "passage: ")
    assert answer["usage"] == {"prompt_tokens": rows.lengths.sum(), "total_tokens": rows.lengths.sum()}
    assert [row["index"] for row in answer["data"]] == list(range(len(TEXTS)))
    assert (answer["object"], answer["data"][0]["object"], answer["model"]) == ("list", "embedding", "tiny")


def test_one_string_is_one_text(client, encoder):
    assert close(vectors(post(client, "/v1/embeddings", input=TEXTS[1])), encoder.encode_documents(TEXTS[1:2]))


def test_base64_holds_the_same_numbers(client):
    plain = vectors(post(client, "/v1/embeddings", input=TEXTS))
    coded = post(client, "/v1/embeddings", input=TEXTS, encoding_format="base64")
    found = [np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in coded["data"]]
    assert np.array_equal(np.array(found), plain)


@pytest.mark.parametrize("word", ["query", "search_query"])
def test_queries_have_the_query_prompt(client, encoder, word):
    assert close(vectors(post(client, "/v1/embeddings", input=TEXTS, input_type=word)), encoder.encode_queries(TEXTS))


def test_tasks_and_instructions_are_the_models(client, encoder):
    for asked in ({"task": "facts"}, {"instruction": "find the facts"}):
        answer = post(client, "/v1/embeddings", input=TEXTS[:2], input_type="query", **asked)
        assert close(vectors(answer), encoder.encode_queries(TEXTS[:2], **asked))


def test_dimensions_cut_and_normalize(client, encoder):
    cut = encoder.encode_documents(TEXTS)[:, :7]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    assert close(vectors(post(client, "/v1/embeddings", input=TEXTS, dimensions=7)), expected)
    raw = encoder.encode_documents(TEXTS, normalize=False)
    assert np.allclose(vectors(post(client, "/v1/embeddings", input=TEXTS, normalize=False)), raw, atol=1e-4)


def test_token_ids_give_the_vector_of_their_text(client, encoder):
    rows = encoder.tokenizer(TEXTS[:2], "")
    whole = [row.tolist() for row in rows.ids]
    bare = [row[1:-1] for row in whole]  # without <s> and </s>, which the model adds itself
    answers = [post(client, "/v1/embeddings", input=ids, input_type="query", instruction="") for ids in (whole, bare)]
    expected = encoder.encode(TEXTS[:2])
    assert all(close(vectors(answer), expected) for answer in answers)
    assert close(vectors(post(client, "/v1/embeddings", input=whole[0], instruction="")), expected[:1])
    prompted = post(client, "/v1/embeddings", input=bare, input_type="query", task="facts")  # the template ends in a line break
    assert close(vectors(prompted), encoder.encode_queries(TEXTS[:2], task="facts"))


def test_a_long_text_is_cut_or_refused(client, encoder):
    row = post(client, "/v1/embeddings", input=TEXTS[-1])
    assert row["usage"]["prompt_tokens"] == encoder.max_length
    response = client.post("/v1/embeddings", json={"input": ["a", TEXTS[-1]], "truncate": False})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "text 1 has more than 192 tokens" in response.json()["error"]["message"]
    assert close(vectors(post(client, "/v1/embeddings", input=["a"], truncate=False)), encoder.encode_documents(["a"]))
    response = client.post("/v1/embeddings", json={"input": [[5] * 500], "truncate": False})
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_whole_numbers_may_have_a_point(client):
    plain = post(client, "/v1/embeddings", input=[[5, 6], [7]], dimensions=4)
    content = b'{"input": [[5.0, 6], [7.0]], "dimensions": 4.0}'
    dotted = client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"}).json()
    assert dotted == plain


def test_tei_embed(client, encoder):
    assert close(post(client, "/embed", inputs=TEXTS), encoder.encode_documents(TEXTS))
    assert close(post(client, "/embed", inputs="a cat"), encoder.encode_documents(["a cat"]))
    assert close(post(client, "/embed", inputs=TEXTS[:2], prompt_name="facts"), encoder.encode_queries(TEXTS[:2], task="facts"))


def cosine(encoder, query, texts, **options):
    return encoder.encode_documents(texts) @ encoder.encode_queries([query], **options)[0]


def test_rerank_by_similarity_in_coheres_shape(client, encoder):
    texts = [document.text for document in DOCUMENTS]
    expected = cosine(encoder, "cats", texts)
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        answer = post(client, path, query="cats", documents=texts, top_n=3, return_documents=True)
        order = [row["index"] for row in answer["results"]]
        assert order == np.argsort(-expected, kind="stable")[:3].tolist()
        assert close([row["relevance_score"] for row in answer["results"]], expected[order])
        assert [row["document"]["text"] for row in answer["results"]] == [texts[i] for i in order]
    objects = post(client, "/v1/rerank", query="cats", documents=[{"text": text} for text in texts])
    assert len(objects["results"]) == 4
    assert "document" not in objects["results"][0]


def test_rerank_in_teis_shape(client, encoder):
    texts = ["texts", "cats", "birds"]
    answer = post(client, "/rerank", query="cats", texts=texts, return_text=True)
    assert [row["text"] for row in answer] == [texts[row["index"]] for row in answer]
    assert close([row["score"] for row in answer], sorted(cosine(encoder, "cats", texts), reverse=True))
    assert post(client, "/rerank", query="cats", documents=["texts"])["results"][0]["index"] == 0


class Lengths:
    """A reranker that likes long documents."""

    name, scale = "lengths", "log_odds"

    def score(self, query, documents):
        return np.array([len(query) + len(text) for text in documents], dtype=np.float32)


def test_rerank_with_a_reranker(encoder):
    texts = ["aa", "a", "aaa"] * 20
    with served(["tiny"], encoder, reranker=Lengths()) as (app, _gate, _catalog):
        client = TestClient(app)
        answer = post(client, "/v1/rerank", query="q", documents=texts, top_n=21)
        assert [row["relevance_score"] for row in answer["results"]] == [4.0] * 20 + [3.0]
        assert answer["model"] == "lengths"
        assert post(client, "/v1/rerank", query="q", documents=texts, model="tiny")["model"] == "tiny"
        assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["tiny", "lengths"]


def test_rerank_requests_that_wait_are_bounded(encoder):
    with served(["tiny"], encoder, Settings(limits=Limits(rerank_waiting=1)), reranker=Lengths()) as (app, _gate, catalog):
        client, body = TestClient(app), {"query": "q", "documents": ["a"]}
        catalog.reranker._waiting = 1
        refused = client.post("/v1/rerank", json=body)
        assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
        catalog.reranker._waiting = 0
        assert client.post("/v1/rerank", json=body).status_code == 200
        assert catalog.reranker._waiting == 0


def test_indexes(client):
    rows = {row["name"]: row for row in client.get("/v1/indexes").json()["data"]}
    expected = {"count": 4, "language": "en", "missing": {}}
    models = {"model": "tiny", "models": {"dense": "tiny"}}
    dense = {"name": "animals", "modes": ["dense", "bm25", "hybrid"], "contributions": True, **models}
    plain = {"name": "bm25", "model": None, "models": {}, "modes": ["bm25"], "contributions": False}
    assert rows == {"animals": {**dense, **expected}, "bm25": {**plain, **expected}}


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_search_is_the_librarys(setup, encoder, mode):
    client, catalog = setup
    parts = ({"kind": "dense", "k": 100}, {"kind": "bm25", "k": 100})
    config = {"dense": DenseConfig(k=3), "bm25": Bm25Config(k=3), "hybrid": FuseConfig(k=3, parts=parts)}[mode]
    store = catalog.index("animals").store
    expected = config.build(store, encoder)(Search((Query("q", "a cat and birds"),))).run["q"]
    answer = post(client, "/v1/search", query="a cat and birds", index="animals", mode=mode, k=3)
    assert [hit["id"] for hit in answer["hits"]] == list(expected)
    assert np.allclose([hit["score"] for hit in answer["hits"]], list(expected.values()), atol=1e-5)
    assert (answer["mode"], answer["index"], answer["model"]) == (mode, "animals", None if mode == "bm25" else "tiny")
    assert set(answer["took_ms"]) == {"encode", "search", "total"}


def test_hits_say_where_the_words_are(client):
    answer = post(client, "/v1/search", query="cats watching a bird")
    assert answer["mode"] == "hybrid"
    hit = next(hit for hit in answer["hits"] if hit["id"] == "cat")
    assert [hit["text"][a:b] for a, b in hit["highlights"]["text"]] == ["cat", "watched", "birds"]
    assert [hit["title"][a:b] for a, b in hit["highlights"]["title"]] == ["Cats"]
    assert hit["text"][slice(*hit["snippet"])] == hit["text"]
    assert hit["metadata"] == {"year": 2020}
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_filters_keep_what_they_say(client, mode):
    answer = post(client, "/v1/search", query="cats and birds", mode=mode, filter={"year": {"gte": 2021}})
    assert [hit["id"] for hit in answer["hits"]] == ["dog"]
    refused = client.post("/v1/search", json={"query": "a", "mode": mode, "filter": {"year": {"nonsense": 1}}})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_filter")


def test_an_index_without_vectors_searches_words(client):
    answer = post(client, "/v1/search", query="cats", index="bm25")
    assert (answer["mode"], answer["model"]) == ("bm25", None)
    refused = client.post("/v1/search", json={"query": "cats", "index": "bm25", "mode": "dense"})
    assert refused.status_code == 400
    assert "allowed: bm25" in refused.json()["error"]["message"]


def test_contributions(client, encoder):
    text = "naïve cats 🙂 sat"
    answer = post(client, "/v1/contributions", text=text, index="animals", input_type="query")
    expected = contributions(encoder, text, "query: ")
    assert np.allclose([token["weight"] for token in answer["tokens"]], [token.weight for token in expected], atol=1e-9)
    assert abs(sum(token["weight"] for token in answer["tokens"]) - 1) < 1e-9
    assert all(token["text"] == text[token["start"] : token["end"]] for token in answer["tokens"] if token["end"])
    assert "sum to 1" in answer["explained"]
    assert client.post("/v1/contributions", json={"text": "a", "index": "bm25"}).status_code == 404


def test_models(client, encoder):
    rows = client.get("/v1/models").json()["data"]
    assert [row["id"] for row in rows] == ["tiny", "text-embedding-3-small"]
    assert (rows[0]["dimensions"], rows[0]["max_length"], rows[0]["tasks"]) == (encoder.width, 192, ["facts"])
    assert client.get("/v1/models/tiny").json() == rows[0]
    assert post(client, "/v1/embeddings", input="a", model="text-embedding-3-small")["model"] == "tiny"


def test_health_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok", "models": ["tiny"], "indexes": ["animals", "bm25"]}
    post(client, "/v1/embeddings", input=TEXTS)
    text = client.get("/metrics").text
    for name in (
        "requests_total",
        "request_seconds_bucket",
        "tokens_total",
        "batch_fill_bucket",
        "queue_tokens",
        "resident_bytes",
    ):
        assert f"openembed_{name}" in text
    assert 'route="/v1/embeddings",status="200"' in text


def test_the_description_is_complete_and_readable(client):
    schema = client.get("/openapi.json").json()
    text = str(schema)
    assert all(name in schema["components"]["schemas"] for name in ("EmbeddingsRequest", "SearchAnswer", "ErrorAnswer"))
    references = {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= set(schema["components"]["schemas"])
    page = client.get("/docs")
    assert "/v1/embeddings" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]


REFUSED = [
    ("/v1/embeddings", {"input": "a", "model": "../../etc/passwd"}, 404, "model"),
    ("/v1/embeddings", {"input": "a", "nonsense": 1}, 400, "nonsense"),
    ("/v1/embeddings", {"input": []}, 400, "input"),
    ("/v1/embeddings", {"input": None}, 400, "input"),
    ("/v1/embeddings", {"input": [1, "a"]}, 400, "input"),
    ("/v1/embeddings", {"input": [True]}, 400, "input"),
    ("/v1/embeddings", {"input": [[]]}, 400, "input"),
    ("/v1/embeddings", {"input": [384]}, 400, "input"),
    ("/v1/embeddings", {"input": [-1]}, 400, "input"),
    ("/v1/embeddings", {"input": [10**17]}, 400, "input"),
    ("/v1/embeddings", {}, 400, "input"),
    ("/v1/embeddings", {"input": "a", "dimensions": 33}, 400, "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": 0}, 400, "dimensions"),
    ("/v1/embeddings", {"input": "a", "dimensions": "8"}, 400, "dimensions"),
    ("/v1/embeddings", {"input": "a", "encoding_format": "hex"}, 400, "encoding_format"),
    ("/v1/embeddings", {"input": "a", "task": "nonsense"}, 400, "task"),
    ("/v1/embeddings", {"input": "a", "task": "facts", "instruction": "b"}, 400, "task"),
    ("/v1/embeddings", {"input": "a", "instruction": "word " * 300}, 400, "instruction"),
    ("/v1/embeddings", {"input": ["a"] * 65}, 413, None),
    ("/v1/embeddings", {"input": [[5] * 20_001]}, 413, None),
    ("/v1/rerank", {"query": "a", "documents": []}, 400, "documents"),
    ("/v1/rerank", {"query": "a", "documents": [{"text": 1}]}, 400, "documents"),
    ("/v1/rerank", {"query": "a", "documents": ["b"] * 33}, 413, None),
    ("/v1/rerank", {"query": "", "documents": ["b"]}, 400, "query"),
    ("/rerank", {"query": "a", "texts": ["b"], "raw_scores": True}, 400, "raw_scores"),
    ("/v1/search", {"query": "a", "index": "nonsense"}, 404, "index"),
    ("/v1/search", {"query": "a", "k": 0}, 400, "k"),
    ("/v1/search", {"query": "a", "k": 1001}, 413, "k"),
    ("/v1/search", {"query": "a" * 32_769}, 413, "query"),
    ("/v1/search", {"query": "a", "mode": "psychic"}, 400, "mode"),
    ("/v1/contributions", {"text": ""}, 400, "text"),
    ("/v1/documents", {"documents": [{"text": "a"}]}, 403, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(client, path, body, status, param):
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b'{"input": "a"', "application/json", 400),
        (b'["input"]', "application/json", 400),
        (b'{"input": NaN}', "application/json", 400),
        (b'{"input": "\\ud800"}', "application/json", 400),
        (b'{"input": "\xff"}', "application/json", 400),
        (b'{"input": ' + b"[" * 3000 + b"]" * 3000 + b"}", "application/json", 400),
        (b"{" + b",".join(b'"%d": 1' % i for i in range(1000)) + b"}", "application/json", 400),
        (b'{"input": "a"}', "text/plain", 415),
        (b'{"input": "a"}', "application/x-www-form-urlencoded", 415),
    ],
)
def test_what_is_no_json_is_refused(client, content, kind, status):
    response = client.post("/v1/embeddings", content=content, headers={"content-type": kind})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_unknown_paths_and_methods(client):
    assert client.get("/nonsense").status_code == 404
    assert client.get("/v1/embeddings").status_code == 405
    assert client.get("/nonsense").json()["error"]["type"] == "not_found_error"


@pytest.mark.parametrize("path", ["/", "/health", "/docs", "/v1/models", "/metrics", "/nonsense", "/v1/embeddings"])
def test_head_is_answered_as_get_without_a_body(client, path):
    head, got = client.head(path), client.get(path)
    assert head.status_code == got.status_code
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
