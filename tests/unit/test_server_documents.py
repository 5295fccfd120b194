"""Documents over HTTP: added as the library adds them, found at once, durable when acknowledged."""

import numpy as np
import pytest
from server_setup import make_index, served
from starlette.testclient import TestClient

from openembed.index.store import Store
from openembed.locks import exclusive
from openembed.records import Document
from openembed.server.settings import Settings

NEW = {"id": "new/1", "title": "Birds", "text": "A bird sings. 🐦", "metadata": {"year": 2024, "tags": ["a", {"b": None}]}}


@pytest.fixture(scope="module")
def encoder(make_encoder):
    return make_encoder(prompts={"document": "passage: "})


@pytest.fixture
def folder(encoder, tmp_path):
    make_index(tmp_path / "animals", encoder, normalize=False)
    return tmp_path / "animals"


@pytest.fixture
def client(encoder, folder):
    with served([str(folder)], encoder, Settings(writable=True)) as (app, _gate, _catalog):
        yield TestClient(app)


def test_what_is_added_is_on_the_disk_and_found(client, folder, encoder):
    answer = client.post("/v1/documents", json={"documents": [NEW, {"text": "No id"}]}).json()
    assert (answer["added"], answer["count"], answer["ids"][0]) == (2, 6, "new/1")
    store = Store(folder)
    assert store.document("new/1") == Document("new/1", NEW["text"], NEW["title"])
    assert store.document("new/1").metadata == NEW["metadata"]
    assert store.document(answer["ids"][1]).text == "No id"
    vector = encoder.encode_documents(["Birds A bird sings. 🐦"], normalize=False)
    assert np.allclose(store.dense(encoder.encode(["x"]), 6)[0]["new/1"], (encoder.encode(["x"]) @ vector[0])[0], atol=1e-3)
    assert client.post("/v1/search", json={"query": "sings", "mode": "bm25"}).json()["hits"][0]["id"] == "new/1"
    assert client.get("/v1/documents/new/1").json() == NEW


def test_an_id_that_is_there_needs_upsert(client, folder):
    again = {"documents": [{**NEW, "id": "cat"}]}
    refused = client.post("/v1/documents", json=again)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "document_exists")
    assert client.post("/v1/documents", json={**again, "upsert": True}).json()["count"] == 4
    assert Store(folder).document("cat").text == NEW["text"]
    twice = client.post("/v1/documents", json={"documents": [NEW, NEW]})
    assert twice.status_code == 400
    assert len(Store(folder)) == 4


def test_deleting_is_all_or_nothing(client, folder):
    absent = client.request("DELETE", "/v1/documents", json={"ids": ["cat", "nonsense"]})
    assert (absent.status_code, absent.json()["error"]["code"]) == (404, "document_not_found")
    assert len(Store(folder)) == 4
    assert client.request("DELETE", "/v1/documents", json={"ids": ["cat", "cat"]}).json() == {"deleted": 1, "count": 3}
    assert client.get("/v1/documents/cat").status_code == 404
    assert "cat" not in Store(folder)


def test_another_writer_is_a_conflict_without_paths(client, folder):
    with exclusive(folder):
        refused = client.post("/v1/documents", json={"documents": [NEW]})
    assert refused.status_code == 409
    assert str(folder) not in refused.text
    assert client.post("/v1/documents", json={"documents": [NEW]}).status_code == 200


def test_changes_of_other_processes_are_seen(client, folder, encoder, monkeypatch):
    monkeypatch.setattr("openembed.server.catalog.LOOK_AGAIN_S", -1.0)
    Store(folder).add([Document("late", "A latecomer.")], encoder)
    assert client.get("/v1/documents/late").json()["text"] == "A latecomer."
    assert client.get("/v1/indexes").json()["data"][0]["count"] == 5


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ({"id": "", "text": "a"}, "id"),
        ({"text": 1}, "text"),
        ({"id": "x"}, "text"),
        ({"text": "a", "nonsense": 1}, "nonsense"),
        (
            {
                "text": "a",
                "metadata": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": [[[[[[1]]]]]]}}}}}}}}}}},
            },
            "deep",
        ),
    ],
)
def test_documents_that_are_wrong(client, folder, document, word):
    refused = client.post("/v1/documents", json={"documents": [document]})
    assert refused.status_code == 400
    assert word in refused.json()["error"]["message"]
    assert len(Store(folder)) == 4


def test_nothing_changes_without_writable(encoder, folder):
    with served([str(folder)], encoder) as (app, _gate, _catalog):
        client = TestClient(app)
        assert client.post("/v1/documents", json={"documents": [NEW]}).status_code == 403
        assert client.request("DELETE", "/v1/documents", json={"ids": ["cat"]}).status_code == 403
        assert client.get("/v1/documents/cat").status_code == 200


def test_a_model_that_is_not_the_indexs_adds_nothing_to_it(folder, make_encoder):
    before = [(identifier, row.tolist()) for identifier, row in Store(folder).rows()]
    with served([str(folder)], make_encoder(seed=1), Settings(writable=True)) as (app, _gate, _catalog):
        for upsert, identifier in ((False, "new"), (True, "cat")):
            body = {"documents": [{"id": identifier, "text": "other"}], "upsert": upsert}
            refused = TestClient(app).post("/v1/documents", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_missing")
    assert [(identifier, row.tolist()) for identifier, row in Store(folder).rows()] == before


def test_words_alone_need_no_model(tmp_path, encoder):
    Store.create(tmp_path / "words", [Document("a", "one")])
    with served([str(tmp_path / "words")], encoder, Settings(writable=True)) as (app, _gate, _catalog):
        client = TestClient(app)
        assert client.post("/v1/documents", json={"documents": [NEW]}).json()["count"] == 2
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 404
