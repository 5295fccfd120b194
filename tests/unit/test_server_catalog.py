"""Names of what is served, options of the command, and the page's policy."""

import base64
import hashlib
import re

import pytest
from server_setup import make_index, make_kinds, post, served
from sparse_fakes import SparseWords
from starlette.testclient import TestClient
from store_fakes import BagOfWords
from typer.testing import CliRunner

from openembed.cli import app as command
from openembed.cli.serve import _api_keys, _hosts, _reach
from openembed.server.pages import policy
from openembed.server.settings import Settings


@pytest.fixture(scope="module")
def encoder(make_encoder):
    return make_encoder()


def test_names_are_folders_made_unique_or_given(encoder, tmp_path):
    for place in ("a/news", "b/news", "c/out/store"):
        make_index(tmp_path / place, encoder)
    targets = [str(tmp_path / "a/news"), str(tmp_path / "b/news"), str(tmp_path / "c/out/store"), f"mine={tmp_path / 'a/news'}"]
    with served([*targets, "org/Some-Model", "x/y/model"], encoder) as (_app, _gate, catalog):
        assert list(catalog.indexes) == ["news", "news-2", "out", "mine"]
        assert list(catalog.engines) == ["tiny", "Some-Model", "y"]
        assert [index.engines for index in catalog.indexes.values()] == [{"dense": catalog.engines["tiny"]}] * 4


def test_an_index_is_served_without_a_model_that_cannot_be_opened(encoder, tmp_path, caplog):
    make_kinds(tmp_path / "both", {"tiny": encoder, "moved": SparseWords()})
    make_kinds(tmp_path / "moved-first", {"moved": SparseWords(), "tiny": encoder})
    make_kinds(tmp_path / "none", {"moved": SparseWords(), "gone": BagOfWords()})

    class Models(dict):
        def __getitem__(self, name):
            if name != "tiny":
                raise FileNotFoundError(f"{name}: no such model folder")
            return encoder

    targets, settings = [str(tmp_path / name) for name in ("both", "moved-first", "none")], Settings(writable=True)
    with served(targets, Models(), settings) as (app, _gate, catalog):
        assert [list(index.engines) for index in catalog.indexes.values()] == [["dense"], ["dense"], []]
        assert "index both is served without its sparse weights" in caplog.text
        assert "(their model could not be opened): moved: no such model folder" in caplog.text
        client = TestClient(app)
        found = post(client, "/v1/search", query="cats", index="moved-first")
        assert (found["mode"], len(found["hits"])) == ("hybrid", 4)
        refused(client, "/v1/search", "sparse weights over its vocabulary, but their model could", query="cats", mode="sparse")
        refused(client, "/v1/documents", "sparse weights", documents=[{"text": "new"}])
        assert post(client, "/v1/search", query="cats", index="none")["mode"] == "bm25"
        refused(client, "/v1/search", "could not be opened", query="cats", index="none", mode="hybrid")


def refused(client, path, message, **body):
    """Expects a 409 that says so, and tells nothing of this machine."""
    response = client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (409, "model_missing"), response.text
    assert message in error["message"]
    assert "/" not in error["message"]


def test_an_index_whose_model_was_replaced_is_served_beside_others_without_its_vectors(make_encoder, encoder, tmp_path, caplog):
    """The server starts, says which index and what to do, and searches by words; a model no index can use is not served."""
    make_index(tmp_path / "old", encoder)
    other = make_encoder(seed=1)
    make_kinds(tmp_path / "new", {"other": other})
    targets = [str(tmp_path / name) for name in ("old", "new")]
    with served(targets, {"tiny": other, "other": other}, Settings(writable=True)) as (app, _gate, catalog):
        assert list(catalog.engines) == ["other"]
        assert "index old is served without its dense vectors (the model of that name is not the one" in caplog.text
        assert "use that model, or build the index anew with this one" in caplog.text
        client = TestClient(app)
        rows = {row["name"]: row for row in client.get("/v1/indexes").json()["data"]}
        why = "the model of that name is not the one that made them"
        assert (rows["old"]["modes"], rows["old"]["missing"], rows["old"]["model"]) == (["bm25"], {"dense": why}, None)
        assert (rows["new"]["modes"], rows["new"]["missing"]) == (["dense", "bm25", "hybrid"], {})
        found = post(client, "/v1/search", query="cats", index="old")
        assert (found["mode"], {hit["id"] for hit in found["hits"]}) == ("bm25", {"cat", "dog"})
        for mode in ("dense", "hybrid"):
            refused(client, "/v1/search", f"dense vectors, but {why}", query="cats", mode=mode, index="old")
        refused(client, "/v1/contributions", why, text="cats", index="old")
        refused(client, "/v1/documents", why, documents=[{"text": "new"}], index="old")
        assert client.post("/v1/search", json={"query": "cats", "mode": "tokens", "index": "old"}).status_code == 400
        assert post(client, "/v1/search", query="cats", index="new")["mode"] == "hybrid"
        assert client.get("/health").status_code == 200
        assert client.request("DELETE", "/v1/documents", json={"ids": ["dog"], "index": "old"}).json()["count"] == 3


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENEMBED_API_KEYS", " one, two,,")
    path = tmp_path / "keys"
    path.write_text("# ours\nthree\n\none\n")
    assert _api_keys(path) == ("one", "two", "three")
    path.write_text("# none\n")
    with pytest.raises(ValueError, match="holds no API key"):
        _api_keys(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        _api_keys(tmp_path / "absent")


def test_on_its_own_address_a_machine_answers_to_its_own_names():
    assert _hosts("127.0.0.1", []) == ("127.0.0.1", "localhost")
    assert _hosts("0.0.0.0", []) == ()
    assert _hosts("127.0.0.1", ["a.example"]) == ("127.0.0.1", "localhost", "a.example")
    assert _hosts("127.0.0.1", ["*"]) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "request_s"], "write KEY=VALUE"),
        (["--limit", "nonsense=1"], "nonsense"),
        (["--limit", "texts=none"], "texts"),
        (["--api-key-file", "/nonsense"], "no such file"),
    ],
)
def test_options_that_are_wrong_are_named(options, message):
    done = CliRunner().invoke(command, ["serve", "openembed-nano", *options])
    assert message in str(done.exception)


def test_without_the_extra_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("openembed.cli.serve.find_spec", lambda name: None if name == "fastapi" else object())
    done = CliRunner().invoke(command, ["serve", "openembed-nano"])
    assert "serving needs fastapi: pip install 'openembed[serve]'" in str(done.exception)


def test_the_policy_allows_a_pages_own_parts_alone():
    html = "<style>a{}</style><script>let a = '<b>';</script><SCRIPT type='module'>b()\n</SCRIPT>"
    found = policy(html)
    for kind, content in (("style", "a{}"), ("script", "let a = '<b>';"), ("script", "b()\n")):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert re.search(rf"{kind}-src [^;]*'sha256-{re.escape(digest)}'", found)
    assert found.startswith("default-src 'none'; connect-src 'self'")
    assert "script-src 'none'" in policy("<p>")


def test_a_model_alone_shows_the_api(encoder):
    with served(["tiny"], encoder) as (app, _gate, _catalog):
        answer = TestClient(app).get("/", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, "/docs")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_server_says_who_can_reach_it(address):
    assert _reach(address, Settings()) == ", reached from this machine alone"
    assert _reach("0.0.0.0", Settings()).startswith(", open to all who reach it: --api-key-file")
    assert _reach("fe80::1%eth0", Settings()).startswith(", open to all")
    assert _reach("0.0.0.0", Settings(api_keys=("a" * 32,))) == ""
