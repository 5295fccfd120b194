"""The search page of an index with vectors of every kind: each mode it has, and why a document was found."""

import json

import pytest
from page_server import ALL, ATTACK, TWO

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


PAIRS = "[...document.querySelectorAll('#hit-0-1 .pair')].map(node => node.textContent)"


def opened_why(page, server):
    server.reset(ALL)
    opened(page, server, f"{ASKED}&mode=tokens")
    page.press("ArrowDown", "w")
    page.wait("document.querySelector('#hit-0-1 .top')")
    return server.search(server.searches()[-1])["hits"][0]


def test_why_shows_which_tokens_meet(page, server):
    hit = opened_why(page, server)
    assert server.searches()[-1] == {"query": QUERY, "index": "papers-all", "mode": "tokens", "k": 10, "explain": True}
    pairs = {}
    for row in hit["terms"]:
        pairs.setdefault((row["term"], row["met"], row["met_position"]), []).append(row)
    pairs = sorted(pairs.items(), key=lambda pair: -sum(row["share"] for row in pair[1]))
    told = [f"{term} → {met}" + (f" × {len(rows)}" if len(rows) > 1 else "") for (term, met, _), rows in pairs]
    assert page.value(PAIRS) == told
    assert ("[MASK]", 3) in [(name[0], len(rows)) for name, rows in pairs], "equal pairs stand in one line"
    numbers = [(sum(row["score"] for row in rows), sum(row["share"] for row in rows)) for _, rows in pairs]
    values = [text for score, share in numbers for text in (f"{score:.2f}", f"{share * 100:.1f} %")]
    assert texts(page, "#hit-0-1 .top .value") == values
    assert not [path for path, _ in server.asked if path == "/v1/contributions"]


def test_tokens_that_meet_are_marked_in_the_text(page, server):
    hit = opened_why(page, server)
    full = f"{hit['title']} {hit['text']}"
    spans = sorted({tuple(row["met_span"]) for row in hit["terms"] if row["met_span"]})
    assert texts(page, "#hit-0-1 .tokens") == [full]
    assert texts(page, "#hit-0-1 .token") == [full[low:high] for low, high in spans]
    first = [row for row in hit["terms"] if row["met_span"] and tuple(row["met_span"]) == spans[0]]
    page.value("document.querySelector('#hit-0-1 .token').focus()")
    tip = page.value("document.querySelector('#tip').textContent")
    share = sum(row["share"] for row in first)
    assert tip == f"{full[slice(*spans[0])]} ← {', '.join(dict.fromkeys(row['term'] for row in first))}: {share * 100:.1f} %"
    assert not page.value("document.querySelector('#hit-0-1 .unread')"), "the rest is read, though nothing meets it"


def test_tokens_without_places_or_vectors_are_told(page, server):
    """Pooled vectors have numbers for names and no places; an empty document has no vectors at all."""
    search = server.search
    row = {"term": "0", "met": "1", "score": 0.0, "share": 0.0, "position": 0, "met_position": 1, "met_span": None}

    def pooled(body):
        answer = search(body)
        return answer | {"hits": [hit | {"terms": [row] if hit["rank"] == 1 else []} for hit in answer["hits"]]}

    server.search = pooled
    server.indexes = ALL
    opened(page, server, f"{ASKED}&mode=tokens")
    page.press("ArrowDown", "w", "j", "w")
    assert page.value(PAIRS) == ["0 → 1"]
    assert not page.value("document.querySelector('.panel .tokens')")
    assert texts(page, "#hit-0-2 .panel") == ["No token of this document has a vector."]


def test_markup_in_tokens_that_meet_stays_text(page, server):
    server.reset(ALL)
    search = server.search

    def attacking(body):
        answer = search(body)
        rows = [{**row, "term": ATTACK, "met": ATTACK} for row in answer["hits"][0]["terms"]]
        return answer | {"hits": [hit | {"terms": rows} for hit in answer["hits"]]}

    server.search = attacking
    opened(page, server, "?q=glacier+markup&k=50&mode=tokens")
    page.value("document.querySelectorAll('.why').forEach(node => node.click())")
    page.value("new Promise(done => setTimeout(done, 200))")
    assert page.value("window.attacked === undefined && document.querySelectorAll('main img, main script').length === 0")
    assert f"{ATTACK} → {ATTACK}" in page.value(PAIRS)[0]
    assert any(ATTACK in shown for shown in texts(page, ".panel .tokens"))


@pytest.mark.parametrize("mode", ["sparse", "tokens"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_five_modes_fit(page, server, width, mode):
    server.reset(ALL)
    page.viewport(width, 800, mobile=width < 760)
    opened(page, server, f"{ASKED}&mode={mode}")
    page.value("document.querySelectorAll('.why').forEach(node => node.click())")
    assert page.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    boxes = page.value("[...document.querySelectorAll('.modes label')].map(node => node.getBoundingClientRect().right)")
    assert max(boxes) <= width
