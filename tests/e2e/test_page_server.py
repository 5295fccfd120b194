"""The search page on the true server: a real model, real indexes, real filters, real contributions."""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from page_server import DOCUMENTS

import openembed
from openembed.encoder import Encoder
from openembed.heads import TokenProjectionConfig

pytest.importorskip("openembed.server.app", reason="the HTTP server's packages are absent: install openembed[serve]")

RESULTS = "document.querySelector('.hit') && !document.querySelector('[aria-busy]')"


def with_token_vectors(name):
    """A model with a random head that gives a vector a token in place of its own."""
    dense = openembed.load(name)
    config = dense.config.model_copy(update={"head": TokenProjectionConfig(width=48), "projections": (), "matryoshka": ()})
    torch.manual_seed(0)
    return Encoder(config, dense.tokenizer, dense.backbone, config.head.build(dense.backbone.width))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three indexes of the difficult documents: one with vectors, one with a vector a token, one of words alone."""
    folder = tmp_path_factory.mktemp("page")
    with_token_vectors("openembed-nano").save(folder / "colbert")
    lines = [json.dumps({**document, "_id": document["id"]}) for document in DOCUMENTS]
    (folder / "docs.jsonl").write_text("\n".join(lines))
    for name, options in (("meanings", []), ("tokens", ["--model", "colbert"]), ("words", ["--model", "bm25"])):
        command = [sys.executable, "-m", "openembed", "index", "docs.jsonl", "-o", name, *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    """The address of a server of these indexes that takes requests."""
    command = [sys.executable, "-m", "openembed", "serve", "meanings", "tokens", "words", "--port", "0"]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield _address(process, folder / "log")
        finally:
            process.terminate()
            process.wait(30)


def _address(process, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        found = re.search(r"http://[\d.]+:\d+", log.read_text())
        if found:
            try:
                urllib.request.urlopen(found[0] + "/health", timeout=5)
            except OSError:
                found = None
        if found:
            return found[0] + "/"
        time.sleep(0.1)
    raise TimeoutError(log.read_text())


@pytest.fixture
def tab(browser, url):
    """A tab on the server; the page may not log anything, nor ask another server."""
    tab = browser.page()
    tab.expected = ()
    yield tab
    complaints = [text for text in tab.complaints() if not any(words in text for words in tab.expected)]
    elsewhere = [asked for asked in tab.requests() if not asked.startswith((url, "data:", "about:"))]
    tab.close()
    assert not complaints
    assert not elsewhere


def test_the_server_delivers_the_page_under_its_policy(url):
    from openembed.server.page import content_security_policy, html

    with urllib.request.urlopen(url) as answer:
        assert answer.read().decode() == html()
        assert answer.headers["Content-Security-Policy"] == content_security_policy()


@pytest.mark.parametrize(("mode", "best"), [("dense", None), ("bm25", "glacier-07"), ("hybrid", "glacier-07")])
def test_search_in_each_mode(tab, url, mode, best):
    tab.goto(f"{url}?q=why+do+glaciers+move+faster+in+summer&mode={mode}")
    tab.wait(RESULTS, 30)
    assert tab.value("document.querySelector('.measure').textContent") in ("cosine", "BM25 score", "rank fusion score")
    assert tab.value("document.querySelectorAll('mark').length") > 0
    scores = tab.value("[...document.querySelectorAll('.value')].map(node => parseFloat(node.textContent))")
    assert scores == sorted(scores, reverse=True)
    assert best is None or tab.value("document.querySelector('.id').textContent") == best


def test_a_chip_filters_and_the_server_explains_a_wrong_filter(tab, url):
    tab.goto(f"{url}?q=glacier&mode=bm25")
    tab.wait(RESULTS, 30)
    tab.value("[...document.querySelectorAll('.chip')].find(chip => chip.textContent === 'place.country NO').click()")
    tab.wait("document.querySelectorAll('.hit').length === 1 && !document.querySelector('[aria-busy]')")
    assert tab.value("document.querySelector('.id').textContent") == "glacier-19"
    tab.expected = ("status of 400",)
    tab.goto(url + '?q=glacier&filter={"year":{"above":1}}')
    tab.wait("document.querySelector('#filter-error').textContent", 30)
    assert "above" in tab.value("document.querySelector('#filter-error').textContent")


def test_the_tokens_of_a_difficult_document(tab, url):
    tab.goto(f"{url}?q=field+notes+%F0%9F%A7%8A&mode=dense&k=20")
    tab.wait(RESULTS, 30)
    emoji = "[...document.querySelectorAll('.hit')].find(node => node.textContent.includes('emoji-'))"
    tab.value(f"{emoji}.querySelector('.why').click()")
    tab.wait(f"{emoji}.querySelector('.token')", 30)
    shown = tab.value(f"[...{emoji}.querySelectorAll('.heat')].map(node => node.querySelector('.tokens').textContent)")
    document = DOCUMENTS[4]
    for whole, seen in zip(("field notes 🧊", f"{document['title']} {document['text']}"), shown, strict=True):
        assert whole in seen, "special tokens aside the text is complete, each character once"
    assert not tab.value(f"{emoji}.querySelector('.unread')")


def explained(url, query, identifier):
    """What the server itself says made the score of a document."""
    body = json.dumps({"query": query, "index": "tokens", "mode": "tokens", "k": 20, "explain": True}).encode()
    request = urllib.request.Request(url + "v1/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return next(hit["terms"] for hit in json.load(answer)["hits"] if hit["id"] == identifier)


def test_the_tokens_that_meet_in_a_difficult_document(tab, url):
    """Real offsets fall on the words they name, behind emoji of several code points too, and the text stays complete."""
    document = DOCUMENTS[4]
    full = f"{document['title']} {document['text']}"
    terms = explained(url, "we drilled twelve metres", document["id"])
    words = [(row["met"].lstrip("▁Ġ"), full[slice(*row["met_span"])].strip()) for row in terms if row["met_span"]]
    named = [(name, word) for name, word in words if name.isascii() and name.isalpha()]
    assert named
    assert all(name.lower() == word.lower() for name, word in named)
    tab.goto(f"{url}?q=we+drilled+twelve+metres&mode=tokens&index=tokens&k=20")
    tab.wait(RESULTS, 30)
    emoji = "[...document.querySelectorAll('.hit')].find(node => node.textContent.includes('emoji-'))"
    tab.value(f"{emoji}.querySelector('.why').click()")
    tab.wait(f"{emoji}.querySelector('.pair')", 30)
    pairs = tab.value(f"[...{emoji}.querySelectorAll('.pair')].map(node => node.textContent)")
    assert len(pairs) == min(24, len({(row["term"], row["met_position"]) for row in terms}))
    assert tab.value(f"{emoji}.querySelector('.tokens').textContent") == full
    marked = tab.value(f"[...{emoji}.querySelectorAll('.token')].map(node => node.textContent)")
    assert {word for _, word in named} <= set(marked)


def test_two_indexes_side_by_side(tab, url):
    tab.goto(f"{url}?q=ice+and+water&mode=dense&index=meanings&mode2=bm25&index2=words")
    tab.wait("!document.querySelector('#comparison').hidden", 30)
    assert " in both" in tab.value("document.querySelector('#comparison').textContent")
    assert tab.value("document.querySelectorAll('#links path').length") == tab.value(
        "document.querySelectorAll('.pane:first-child .shift:not(.alone)').length"
    )
