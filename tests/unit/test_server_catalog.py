"""Names of what is served, options of the command, and the page's policy."""

import base64
import hashlib
import re

import pytest
from server_setup import make_index, make_kinds, served
from sparse_fakes import SparseWords
from starlette.testclient import TestClient
from store_fakes import BagOfWords
from typer.testing import CliRunner

from openembed.cli import app as command
from openembed.cli.serve import _api_keys, _hosts
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
    make_kinds(tmp_path / "one", {"moved": SparseWords()})
    make_kinds(tmp_path / "none", {"moved": SparseWords(), "gone": BagOfWords()})

    class Models(dict):
        def __getitem__(self, name):
            if name != "tiny":
                raise FileNotFoundError(f"{name}: no such model folder")
            return encoder

    targets, settings = [str(tmp_path / name) for name in ("both", "moved-first")], Settings(writable=True)
    with served(targets, Models(), settings) as (app, _gate, catalog):
        assert [list(index.engines) for index in catalog.indexes.values()] == [["dense"], ["dense"]]
        assert (
            "index both: its model moved cannot be opened (moved: no such model folder); served without sparse" in caplog.text
        )
        client = TestClient(app)
        found = client.post("/v1/search", json={"query": "cats", "index": "moved-first"}).json()
        assert (found["mode"], len(found["hits"])) == ("hybrid", 4)
        assert (
            client.post("/v1/search", json={"query": "cats", "mode": "sparse"}).json()["error"]["code"] == "mode_not_available"
        )
        refused = client.post("/v1/documents", json={"documents": [{"text": "new"}]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_missing")
        assert "sparse weights" in refused.json()["error"]["message"]
    for name in ("one", "none"):
        with pytest.raises(FileNotFoundError, match="no such model folder"), served([str(tmp_path / name)], Models()):
            pass


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
