"""The search page of an index with vectors of every kind: each mode it has, and why a document was found."""

import json

import pytest
from page_server import ALL, TWO

ASKED = "?q=why+do+glaciers+move+faster"
QUERY = "why do glaciers move faster"
RESULTS = "document.querySelector('.hit') && !document.querySelector('[aria-busy]')"
MODES = "[...document.querySelectorAll('.modes label')].filter(node => node.checkVisibility()).map(node => node.innerText)"


def texts(page, selector):
    return page.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


def opened(page, server, url=ASKED, until=RESULTS):
    page.goto(server.url + url)
    page.wait(until)


def test_the_modes_offered_are_those_of_the_index(page, server):
    server.reset(ALL)
    opened(page, server)
    assert page.value(MODES) == ["Dense", "Sparse", "Tokens", "BM25", "Hybrid"]
    assert "openembed-nano + splade + colbert" in texts(page, ".about")[0]
    for mode, label in (("sparse", "sum of term scores"), ("tokens", "MaxSim"), ("hybrid", "rank fusion score")):
        page.click(f".modes input[value={mode}] + span")
        page.wait(f"document.querySelector('.measure').textContent === '{label}' && {RESULTS}")
        assert server.searches()[-1]["mode"] == mode
        assert texts(page, ".hit .value")


def test_modes_of_another_index_are_shown_and_disabled(page, server):
    server.reset([TWO[0], *ALL])
    opened(page, server)
    assert page.value(MODES) == ["Dense", "Sparse", "Tokens", "BM25", "Hybrid"]
    disabled = "[...document.querySelectorAll('.modes input:disabled')].map(radio => radio.value)"
    assert page.value(f"{disabled}.slice(0, 2)") == ["sparse", "tokens"]


def test_without_such_vectors_nothing_is_said_of_them(page, server):
    opened(page, server)
    assert page.value(MODES) == ["Dense", "BM25", "Hybrid"]


def test_an_empty_query_says_what_each_mode_does(page, server):
    server.reset(ALL)
    opened(page, server, "", "document.querySelector('.welcome dt')")
    assert texts(page, ".welcome dt") == ["Dense", "Sparse", "Tokens", "BM25", "Hybrid"]


@pytest.mark.parametrize("mode", ["sparse", "bm25"])
def test_why_shows_the_terms_that_came_with_the_hit(page, server, mode):
    server.reset(ALL)
    opened(page, server, f"{ASKED}&mode={mode}")
    assert server.searches()[-1] == {"query": QUERY, "index": "papers-all", "mode": mode, "k": 10, "explain": True}
    page.press("ArrowDown", "w")
    page.wait("document.querySelector('#hit-0-1 .top')")
    terms = server.search(server.searches()[-1])["hits"][0]["terms"]
    assert texts(page, "#hit-0-1 .top bdi") == [term["term"].removeprefix("##") for term in terms[:24]]
    assert texts(page, "#hit-0-1 .top .value") == [f"{term['share'] * 100:.1f} %" for term in terms[:24]]
    assert f"{len(terms) - 24} smaller ones not shown" in texts(page, "#hit-0-1 .panel p")[0]
    assert not [path for path, _ in server.asked if path == "/v1/contributions"]
    page.press("w")
    page.wait("document.querySelector('#hit-0-1 .panel').hidden")


def test_maxsim_has_no_why(page, server):
    server.reset(ALL)
    opened(page, server, f"{ASKED}&mode=tokens")
    assert page.value("[...document.querySelectorAll('.why')].every(node => node.hidden)")
    assert "explain" not in server.searches()[-1]


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_five_modes_fit(page, server, width):
    server.reset(ALL)
    page.viewport(width, 800, mobile=width < 760)
    opened(page, server, f"{ASKED}&mode=sparse")
    page.value("document.querySelectorAll('.why').forEach(node => node.click())")
    assert page.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    boxes = page.value("[...document.querySelectorAll('.modes label')].map(node => node.getBoundingClientRect().right)")
    assert max(boxes) <= width
