"""The search page in headless Chromium, against a stand-in server: searching, walking, comparing, refusing, escaping."""

import json
from urllib.parse import urlencode

import pytest
from page_server import ATTACK, DOCUMENTS, TWO, WORDS_ONLY, PageServer

QUERY = "why do glaciers move faster in summer"
ASKED = "?q=why+do+glaciers+move+faster+in+summer"
SIDE_BY_SIDE = f"{ASKED}&mode=dense&mode2=dense&index2=papers-minilm"
RESULTS = "document.querySelector('.hit') && !document.querySelector('[aria-busy]')"
FOCUS = "document.activeElement.id"


def opened(page, server, url="", until="document.querySelector('.welcome dt')"):
    page.goto(server.url + url)
    page.wait(until)
    return page


def texts(page, selector):
    return page.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(node => node.textContent)")


def text(page, selector):
    return page.value(f"document.querySelector({json.dumps(selector)}).innerText")


def choose(page, selector, number):
    """Chooses an option of a select, as a person does: the page hears of it by the event."""
    page.value(f"""(() => {{ const select = document.querySelector({json.dumps(selector)});
        select.selectedIndex = {number}; select.dispatchEvent(new Event("change")); }})()""")


def visible(page, selector):
    return page.value(f"[...document.querySelectorAll({json.dumps(selector)})].some(node => node.checkVisibility())")


# ---- searching


def test_typing_and_enter_show_results(page, server):
    opened(page, server)
    assert page.value(FOCUS) == "query"
    page.type(QUERY)
    page.press("Enter")
    page.wait(RESULTS)
    expected = server.search({"query": QUERY, "k": 10})["hits"]
    assert texts(page, ".hit .rank") == [str(hit["rank"]) for hit in expected]
    assert texts(page, ".hit .title") == [hit["title"] or hit["id"] for hit in expected]
    assert texts(page, ".hit .value") == [f"{hit['score']:.4f}" for hit in expected]
    assert text(page, ".summary") == f"{len(expected)} results in 12 ms encode 8.1 ms · search 3.2 ms"
    page.wait(f"document.querySelector('#said').textContent === '{len(expected)} results in 12 ms, Hybrid.'")
    assert page.value("document.title").startswith(QUERY)


def test_marks_stand_on_the_words_also_behind_emoji(page, server):
    opened(page, server, "?q=glacier&k=50", RESULTS)
    assert set(texts(page, ".hit mark")) == {"glacier", "Glacier"}
    emoji = f"[...document.querySelectorAll('.hit')].find(node => node.textContent.includes({json.dumps('emoji-🧊')}))"
    assert page.value(f"[...{emoji}.querySelectorAll('mark')].map(node => node.textContent)") == ["glacier", "glacier"]
    assert page.value(f"{emoji}.querySelector('.text').textContent") == DOCUMENTS[4]["text"]


def test_modes_k_and_index_are_asked_for_and_labelled(page, server):
    opened(page, server, ASKED, RESULTS)
    for mode, label in (("dense", "cosine"), ("bm25", "BM25 score"), ("hybrid", "rank fusion score")):
        page.click(f".modes input[value={mode}] + span")
        page.wait(f"document.querySelector('.measure').textContent === '{label}'")
        explain = {"explain": True} if mode == "bm25" else {}
        assert server.searches()[-1] == {"query": QUERY, "index": "papers-nano", "mode": mode, "k": 10, **explain}
    choose(page, "#k", 0)
    page.wait("document.querySelectorAll('.hit').length === 5")
    choose(page, ".index", 1)
    page.wait("document.querySelector('.about').textContent.includes('MiniLM')")
    page.wait(RESULTS)
    assert server.searches()[-1] == {"query": QUERY, "index": "papers-minilm", "mode": "hybrid", "k": 5}
    assert page.value("document.querySelector('.why').hidden"), "this index explains nothing"


def test_the_url_is_the_state_and_back_goes_back(page, server):
    opened(page, server, ASKED + '&mode=bm25&k=5&filter={"lang":"en"}', RESULTS)
    asked = {"query": QUERY, "index": "papers-nano", "mode": "bm25", "k": 5, "explain": True, "filter": {"lang": "en"}}
    assert server.searches() == [asked]
    page.click(".modes input[value=dense] + span")
    page.wait("location.search.includes('mode=dense')")
    page.click("#compare")
    page.wait("location.search.includes('index2=papers-minilm')")
    for mode in ("dense", "bm25"):
        page.value("history.back()")
        page.wait(f"location.search.includes('mode={mode}') && !document.body.classList.contains('comparing')")
        page.wait(f"document.querySelector('.modes input:checked').value === '{mode}' && {RESULTS}")
    assert page.value("document.querySelector('#query').value") == QUERY


def test_a_words_only_index_offers_words_only(page, server):
    server.reset(WORDS_ONLY)
    opened(page, server, "?q=glacier&mode=dense", RESULTS)
    shown = "[...document.querySelectorAll('.modes label')].filter(node => node.checkVisibility()).map(node => node.innerText)"
    assert page.value(shown) == ["BM25"]
    assert server.searches()[-1]["mode"] == "bm25"
    assert not visible(page, ".index, #compare")


def test_nothing_found_offers_a_way_on(page, server):
    opened(page, server, "?q=zzz&mode=bm25", "document.querySelector('.notice h3')")
    assert text(page, ".notice h3") == "Nothing found"
    server.asked.clear()
    page.click(".notice button")
    page.wait("document.querySelector('.modes input:checked').value === 'dense'")
    page.wait("!document.querySelector('[aria-busy]')")
    assert server.searches()[-1]["mode"] == "dense"


def test_an_older_answer_never_replaces_a_newer(page, server):
    server.delays = {"slow glacier": 1.0}
    opened(page, server)
    page.type("slow glacier")
    page.press("Enter")
    page.wait("document.querySelector('.ghost')")
    page.value("document.querySelector('#query').select()")
    page.type("volcano")
    page.press("Enter")
    page.wait(RESULTS)
    first = texts(page, ".hit .title")
    page.value("new Promise(done => setTimeout(done, 1300))")
    assert texts(page, ".hit .title") == first
    assert "Volcanoes under ice" in first[0]
    assert len(server.searches()) == 2


def test_old_results_stay_while_new_ones_are_awaited(page, server):
    server.delays = {"slow glacier": 0.8}
    opened(page, server, ASKED, RESULTS)
    before = page.value("document.querySelector('.hits').getBoundingClientRect().top")
    page.value("document.querySelector('#query').select()")
    page.type("slow glacier")
    page.press("Enter")
    page.wait("document.querySelector('.pane.waiting')")
    assert texts(page, ".hit .title")
    assert not page.value("document.querySelector('.ghost')")
    page.wait("!document.querySelector('.waiting')")
    assert page.value("document.querySelector('.hits').getBoundingClientRect().top") == before


# ---- the keyboard


def test_the_keyboard_alone(page, server):
    opened(page, server, ASKED, RESULTS)
    page.press("ArrowDown")
    assert page.value(FOCUS) == "hit-0-1"
    page.press("j", "ArrowDown", "k")
    assert page.value(FOCUS) == "hit-0-2"
    button = "#hit-0-2 .more" if page.value("!document.querySelector('#hit-0-2 .more').hidden") else None
    assert button, "the second result should be cut"
    page.press("Enter")
    assert page.value(f"document.querySelector('{button}').getAttribute('aria-expanded')") == "true"
    page.press("Escape")
    assert page.value(f"document.querySelector('{button}').getAttribute('aria-expanded')") == "false"
    page.press("k", "k")
    assert page.value(FOCUS) == "query"
    page.press("Tab", "Tab")
    page.press("ArrowLeft")
    page.wait("location.search.includes('mode=bm25')")
    page.press("/")
    assert page.value(FOCUS) == "query"
    page.press("/", "?", "j")
    assert page.value("document.querySelector('#query').value") == "/?j", "in the query keys are letters"


def test_help_opens_and_single_keys_can_be_switched_off(page, server):
    opened(page, server, ASKED, RESULTS)
    page.press("ArrowDown", "?")
    assert page.value("document.querySelector('#help').open")
    page.click("#single-keys")
    page.press("Escape")
    assert not page.value("document.querySelector('#help').open")
    page.press("j", "/", "?")
    assert page.value("document.activeElement.id !== 'query' && !document.querySelector('#help').open")
    page.goto(server.url + ASKED)
    page.wait(RESULTS)
    page.press("ArrowDown", "j")
    assert page.value(FOCUS) == "hit-0-1"


FOCUSED = """(() => {
  const node = document.activeElement;
  const style = getComputedStyle(node.matches("input[type=radio]") ? node.nextElementSibling : node);
  return [node.id || node.className || node.tagName, style.outlineStyle !== "none" || style.boxShadow !== "none"];
})()"""


def test_every_control_is_reached_by_tab_with_a_visible_focus(page, server):
    opened(page, server, ASKED + "&k=5", RESULTS)
    page.value("document.activeElement.blur()")
    seen = []
    for _ in range(60):
        page.press("Tab")
        seen.append(page.value(FOCUSED))
    controls = {"help-open", "query", "options-open", "compare", "k", "index"}
    parts = {"hit-0-1", "chip", "more quiet", "why quiet", "id quiet"}
    assert controls | parts <= {name for name, _ in seen}
    assert not [name for name, outlined in seen if not outlined and name != "BODY"]


# ---- filters


def test_chips_filter_and_are_removed(page, server):
    opened(page, server, ASKED, RESULTS)
    page.value("[...document.querySelectorAll('.hit button.chip')].find(chip => chip.textContent === 'tag ice').click()")
    page.wait("document.querySelector('#conditions button')")
    page.value("[...document.querySelectorAll('.hit button.chip')].find(chip => chip.textContent === 'lang en').click()")
    page.wait("document.querySelectorAll('#conditions button').length === 2")
    page.wait(RESULTS)
    assert server.searches()[-1]["filter"] == {"and": [{"tag": "ice"}, {"lang": "en"}]}
    assert texts(page, "#conditions button") == ["tag = ice ×", "lang = en ×"]
    assert page.value("document.querySelector('.hit .chip[aria-pressed=true]').textContent") in ("tag ice", "lang en")
    assert page.value("document.querySelector('#conditions').contains(document.activeElement)")
    page.click("#conditions button")
    page.wait("document.querySelectorAll('#conditions button').length === 1")
    page.wait(RESULTS)
    assert server.searches()[-1]["filter"] == {"lang": "en"}
    page.click("#conditions button")
    page.wait("document.querySelector('#conditions').hidden")
    page.wait(RESULTS)
    assert "filter" not in server.searches()[-1]


def test_parts_of_an_object_are_chips_of_their_own(page, server):
    opened(page, server, ASKED, RESULTS)
    chips = texts(page, ".hit button.chip")
    assert {"place.country NO", "place.coordinates 78.9", "place.coordinates 18"} <= set(chips)
    page.value("[...document.querySelectorAll('.chip')].find(chip => chip.textContent === 'place.country NO').click()")
    page.wait("document.querySelector('#conditions button')")
    page.wait("!document.querySelector('[aria-busy]')")
    assert server.searches()[-1]["filter"] == {"place.country": "NO"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"url": {"exists": False}}, "url is missing"),
        ({"year": {"gte": 1990, "lt": 2000}}, "year ≥ 1990 and year < 2000"),
        ({"tag": {"in": ["a", "b"]}}, "tag in a, b"),
        ({"and": 5}, "5"),
        ({"or": [{"a": 1}, 7]}, "a = 1 or 7"),
    ],
)
def test_conditions_are_put_into_words(page, server, given, words):
    opened(page, server, "?" + urlencode({"filter": json.dumps(given)}))
    assert text(page, "#conditions button") == f"{words} ×"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{'lang': 'en'}", "This is not JSON"),
        ("[1]", 'A filter is an object such as {"lang": "en"}; this is [1].'),
        ("{", "This is not JSON"),
    ],
)
def test_a_wrong_filter_is_explained_and_not_sent(page, server, given, said):
    opened(page, server, ASKED, RESULTS)
    server.asked.clear()
    page.click("#options-open")
    page.click("#filter")
    page.type(given)
    page.click("#options button.primary")
    assert said in text(page, "#filter-error")
    assert page.value("document.querySelector('#filter').getAttribute('aria-invalid')") == "true"
    assert page.value(FOCUS) == "filter"
    assert not server.asked


def test_a_broken_filter_in_the_address_is_not_dropped_in_silence(page, server):
    opened(page, server, ASKED + "&filter={broken", RESULTS)
    assert text(page, "#filter-error").startswith("The filter of this address is left out. This is not JSON")
    assert "filter" not in server.searches()[-1]


def test_the_servers_word_on_a_filter_stands_by_the_filter(page, server):
    page.expected = ("status of 400",)
    server.errors = {"glacier": (400, {"message": "filter: year has no operator 'above'", "param": "filter"}, {})}
    opened(page, server, '?q=glacier&filter={"year":{"above":1}}', "document.querySelector('.notice h3')")
    assert text(page, "#filter-error") == "filter: year has no operator 'above'"
    assert text(page, "#conditions button") == "year above 1 ×"


def test_filter_and_instruction_are_sent(page, server):
    opened(page, server, ASKED, RESULTS)
    page.click("#options-open")
    page.click("#filter")
    page.type('{"or": [{"year": {"gte": 2000}}, {"not": {"lang": "en"}}]}')
    page.click("#instruction")
    page.type("Find field notes")
    server.errors = {QUERY: (503, {"message": "draining"}, {"Retry-After": "1"})}
    page.expected = ("status of 503",)
    page.press("Enter")
    page.wait("document.querySelector('.notice h3')")
    assert server.searches()[-1]["filter"] == {"or": [{"year": {"gte": 2000}}, {"not": {"lang": "en"}}]}
    assert server.searches()[-1]["instruction"] == "Find field notes"
    assert text(page, "#conditions button") == "year ≥ 2000 or not (lang = en) ×"


# ---- comparing


def test_two_models_side_by_side(page, server):
    opened(page, server, ASKED + "&mode=dense", RESULTS)
    page.click("#compare")
    page.wait("document.querySelectorAll('.pane')[1].querySelector('.hit') && !document.querySelector('#comparison').hidden")
    page.wait(RESULTS)
    runs = [server.search({"query": QUERY, "k": 10, "mode": "dense", "index": entry["name"]})["hits"] for entry in TWO]
    ranks = [{hit["id"]: hit["rank"] for hit in run} for run in runs]
    both = ranks[0].keys() & ranks[1].keys()
    depth = max(map(len, runs))
    assert text(page, "#comparison").startswith(f"{len(both)} of {depth} in both overlap@{depth} {len(both) / depth:.2f}")
    assert page.value("document.querySelectorAll('#links path').length") == len(both)
    for number, run in enumerate(runs):
        for hit in run:
            shown = text(page, f"#hit-{number}-{hit['rank']} .shift")
            if hit["id"] not in both:
                assert shown == f"only in {'AB'[number]}"
                continue
            first, second = ranks[0][hit["id"]], ranks[1][hit["id"]]
            sign = "▲" if second < first else "▼" if second > first else "="
            assert shown == f"{sign} A {first} → B {second}"
    assert any(a != b for a, b in ((ranks[0][i], ranks[1][i]) for i in both)), "the stand-in should disagree with itself"
    page.wait("/^A: .* results in .*B: .*in both\\.$/.test(document.querySelector('#said').textContent)")


def test_walking_between_the_columns(page, server):
    opened(page, server, SIDE_BY_SIDE, "document.querySelectorAll('.shift.up, .shift.down').length")
    page.press("ArrowDown", "l")
    twin = page.value("document.querySelector('#hit-0-1').dataset.twin")
    assert page.value(FOCUS) == twin
    assert page.value("document.querySelector('.lit').id") == "hit-0-1"
    page.press("h")
    assert page.value(FOCUS) == "hit-0-1"
    page.click("#compare")
    page.wait("!document.body.classList.contains('comparing')")
    assert not page.value("[...document.querySelectorAll('.shift')].some(node => node.offsetParent)")


def test_with_one_index_modes_are_compared(page, server):
    server.reset(TWO[:1])
    opened(page, server, ASKED, RESULTS)
    page.click("#compare")
    page.wait("document.querySelectorAll('.pane')[1].querySelector('.hit')")
    assert {body["mode"] for body in server.searches()[-2:]} == {"hybrid", "dense"}


def test_one_id_with_another_text_is_another_document(page, server):
    def search(body):
        answer = PageServer.search(server, body)
        for hit in answer["hits"]:
            if hit["id"] == "glacier-07" and body["index"] == "papers-minilm":
                hit["text"] = hit["text"].upper()
        return answer

    server.search = search
    opened(page, server, SIDE_BY_SIDE, "document.querySelector('.shift.alone')")
    alone = "[...document.querySelectorAll('.hit')].filter(hit => hit.querySelector('.shift.alone'))"
    assert "glacier-07" in page.value(f"{alone}.map(hit => hit.querySelector('.id').textContent)")


# ---- contributions


def why(page, server, extra=""):
    opened(page, server, f"{ASKED}&mode=dense{extra}", RESULTS)
    page.press("ArrowDown", "w")
    page.wait("document.querySelector('#hit-0-1 .token')")


def test_why_shows_each_token_of_query_and_document(page, server):
    why(page, server)
    hit = server.search({"query": QUERY, "k": 1, "mode": "dense"})["hits"][0]
    asked = [body for path, body in server.asked if path == "/v1/contributions"]
    full = f"{hit['title']} {hit['text']}"
    assert sorted(asked, key=lambda body: body["input_type"]) == [
        {"text": full, "index": "papers-nano", "input_type": "document"},
        {"text": QUERY, "index": "papers-nano", "input_type": "query"},
    ]
    shown = texts(page, "#hit-0-1 .heat:nth-of-type(2) .token")
    tokens = server.contributions(asked[0] if asked[0]["input_type"] == "document" else asked[1])["tokens"]
    assert shown == [token["text"] for token in tokens]
    assert text(page, "#hit-0-1 .heat:nth-of-type(2) .tokens") == full
    kinds = page.value("[...document.querySelectorAll('#hit-0-1 .heat:nth-of-type(2) .token')].map(node => node.classList[1])")
    assert kinds == ["less" if token["weight"] < 0 else "more" for token in tokens]
    assert texts(page, "#hit-0-1 .heat:first-of-type .apart") == ["Query:"]
    strongest = max(tokens, key=lambda token: abs(token["weight"]))
    assert text(page, "#hit-0-1 .heat:nth-of-type(2) .top bdi") == strongest["text"]
    assert text(page, "#hit-0-1 .heat:nth-of-type(2) .top .value") == f"{strongest['weight'] * 100:.1f} %".replace("-", "−")


def test_tokens_are_walked_and_told_by_keyboard(page, server):
    why(page, server)
    page.value("document.querySelector('#hit-0-1 .token').focus()")
    assert "read, not pooled" in text(page, "#tip")
    page.press("ArrowRight")
    assert text(page, "#tip").startswith("why: ")
    assert page.value("document.activeElement.getAttribute('aria-describedby')") == "tip"
    page.press("Escape")
    assert page.value("document.querySelector('#tip').hidden")
    page.press("Escape")
    assert page.value(FOCUS) == "hit-0-1"
    assert page.value("document.querySelector('#hit-0-1 .panel').hidden")


def test_query_contributions_are_asked_once(page, server):
    why(page, server)
    page.press("j", "w")
    page.wait("document.querySelector('#hit-0-2 .token')")
    kinds = [body["input_type"] for path, body in server.asked if path == "/v1/contributions"]
    assert sorted(kinds) == ["document", "document", "query"]


def test_bytes_of_one_character_are_one_token(page, server):
    server.contributions = lambda _: {
        "tokens": [
            {"text": "🧊", "start": 0, "end": 1, "weight": 0.25, "pooled": True},
            {"text": "🧊", "start": 0, "end": 1, "weight": 0.25, "pooled": True},
            {"text": "</s>", "start": 0, "end": 0, "weight": 0.5, "pooled": True},
        ],
        "explained": "",
    }
    why(page, server)
    assert texts(page, "#hit-0-1 .heat:first-of-type .token") == ["w", "</s>"]
    assert texts(page, "#hit-0-1 .heat:first-of-type .value") == ["50.0 %", "50.0 %"]
    assert text(page, "#hit-0-1 .heat:first-of-type .unread").strip()


# ---- what a server must not be able to do, and errors


def test_markup_from_documents_stays_text(page, server):
    opened(page, server, "?q=glacier+markup&k=50&mode=dense", RESULTS)
    for button in ("more", "why"):
        page.value(f"document.querySelectorAll('.hit .{button}:not([hidden])').forEach(node => node.click())")
    page.wait("document.querySelectorAll('.panel .tokens').length > 10")
    page.value("new Promise(done => setTimeout(done, 200))")
    assert page.value("window.attacked === undefined && document.querySelectorAll('main img, main script').length === 0")
    assert any(ATTACK in title for title in texts(page, ".hit .title"))
    assert any(ATTACK in shown for shown in texts(page, ".hit .text"))
    assert any(ATTACK in shown for shown in texts(page, ".hit .chip"))
    assert any(ATTACK in shown for shown in texts(page, ".hit .id"))


def test_markup_from_errors_urls_and_index_names_stays_text(page, server):
    page.expected = ("status of 400",)
    server.indexes = [{**TWO[0], "name": ATTACK, "models": {"dense": ATTACK}}, TWO[1]]
    server.errors = {ATTACK: (400, {"message": ATTACK}, {})}
    given = urlencode({"q": ATTACK, "filter": json.dumps({ATTACK: ATTACK})})
    opened(page, server, f"?{given}", "document.querySelector('.notice h3')")
    assert text(page, ".notice p") == ATTACK
    assert page.value("window.attacked === undefined && document.querySelectorAll('main img, main script').length === 0")


MARKUP = "document.body.insertAdjacentHTML('beforeend', '<b>x</b>');"
STYLED = """(() => { const node = document.createElement("div"); node.id = "styled";
  node.setAttribute("style", "position: fixed"); document.body.append(node); })()"""


def test_the_policy_refuses_what_is_not_the_pages_own(page, server):
    page.expected = ("Content Security Policy", "violates", "Trusted", "TrustedHTML", "inline")
    opened(page, server)
    assert page.value(f"{{ try {{ {MARKUP} false }} catch {{ true }} }}"), "text became HTML"
    page.value(STYLED)
    assert page.value("getComputedStyle(document.querySelector('#styled')).position") == "static"
    assert page.value("fetch('http://127.0.0.2:9/').then(() => false, () => true)")


def test_a_key_is_asked_for_and_kept_for_the_tab(page, server):
    page.expected = ("status of 401",)
    server.key = "secret-1"
    opened(page, server, ASKED, "!document.querySelector('#key').hidden")
    assert page.value(FOCUS) == "key-value"
    page.type("wrong")
    page.press("Enter")
    page.wait("document.querySelector('#key-reason').textContent && !document.querySelector('#key').hidden")
    page.type("clé")
    page.press("Enter")
    page.wait("document.querySelector('#key-reason').textContent.startsWith('A key has letters')")
    page.value("document.querySelector('#key-value').value = ''")
    page.type("secret-1")
    page.press("Enter")
    page.wait(RESULTS)
    assert page.value("document.querySelector('#key').hidden")
    assert "secret-1" not in page.value("location.href + JSON.stringify(localStorage)")
    page.goto(server.url + ASKED)
    page.wait(RESULTS)


def test_too_many_requests_count_down(page, server):
    page.expected = ("status of 429",)
    server.errors = {"glacier": (429, {"message": "too many requests are under way"}, {"Retry-After": "2"})}
    opened(page, server, "?q=glacier", "document.querySelector('.notice h3')")
    assert text(page, ".notice h3") == "Too many requests"
    assert page.value("document.querySelector('.notice button').disabled")
    server.errors = {}
    page.wait("!document.querySelector('.notice button').disabled")
    page.click(".notice button")
    page.wait(RESULTS)


@pytest.mark.parametrize(
    ("status", "title"),
    [(500, "The server failed"), (503, "The server is not taking requests"), (413, "This search was not accepted")],
)
def test_errors_say_what_happened(page, server, status, title):
    page.expected = (f"status of {status}",)
    server.errors = {"glacier": (status, {"message": "what the server says"}, {})}
    opened(page, server, "?q=glacier", "document.querySelector('.notice h3')")
    assert text(page, ".notice h3") == title
    assert text(page, ".notice p") == "what the server says"
    page.wait(f"document.querySelector('#said').textContent === '{title}.'")


def test_no_server_at_all(page, server):
    page.expected = ("ERR_CONNECTION_REFUSED", "Failed to fetch")
    gone = PageServer()
    page.goto(gone.url)
    page.wait("document.querySelector('.welcome dt')")
    gone.close()
    page.type("glacier")
    page.press("Enter")
    page.wait("document.querySelector('.notice h3')")
    assert text(page, ".notice h3") == "The server does not answer"
    page.send("Page.navigate", {"url": "about:blank"})
    page.requests = lambda: []


def test_no_index(page, server):
    server.indexes = []
    opened(page, server, "", "document.querySelector('#notice h2')")
    assert text(page, "#notice h2") == "There is nothing to search yet"
