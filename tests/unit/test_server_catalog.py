"""Names of what is served, options of the command, and the page's policy."""

import base64
import hashlib
import re

import pytest
from server_setup import make_index, served
from starlette.testclient import TestClient
from typer.testing import CliRunner

from openembed.cli import app as command
from openembed.cli.serve import _api_keys, _hosts
from openembed.server.pages import policy


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
