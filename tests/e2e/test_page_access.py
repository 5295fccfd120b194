"""The search page for eyes, fingers and assistive technology: contrast, names, sizes, phones, print, motion."""

import pytest
from page_server import ALL, TWO

PHONE = (360, 740)
STATES = {
    "welcome": ("", "document.querySelector('.welcome dt')"),
    "results": ("?q=glacier&k=50", "document.querySelector('.hit')"),
    "tokens": ("?q=glacier&k=50&mode=tokens", "document.querySelector('.hit')"),
    "compare": (
        "?q=glacier&k=50&mode=dense&mode2=bm25&index2=papers-minilm",
        "document.querySelector('.shift.up, .shift.alone')",
    ),
    "nothing": ("?q=zzz&mode=bm25", "document.querySelector('.notice h3')"),
    "error": ("?q=broken", "document.querySelector('.notice h3')"),
}

# Every visible text against what lies behind it, by WCAG's formula; a colour may be transparent.
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const over = (colors) => { canvas.clearRect(0, 0, 1, 1);
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest('.unseen, .skip, script, style, :disabled, option, .modes input:disabled + span')) continue;
    const behind = [];
    for (let up = node; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
    const back = over(behind), fore = over([...behind, getComputedStyle(node).color]);
    const [high, low] = [light(back), light(fore)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${node.className || node.tagName} ${ratio.toFixed(2)}: ${node.textContent.slice(0, 30)}`);
  }
  return found;
})()"""

UNNAMED = """[...document.querySelectorAll("button, input, select, textarea, [role=radiogroup], dialog, form")]
  .filter(node => !node.matches("[aria-label], [aria-labelledby]") && !node.labels?.length && !node.textContent.trim())
  .map(node => node.outerHTML.slice(0, 90))"""

IDS = "[...document.querySelectorAll('[id]')].map(node => node.id)"
REFERENCES = """["aria-controls", "aria-labelledby", "aria-describedby"].flatMap(name =>
  [...document.querySelectorAll(`[${name}]`)].flatMap(node => node.getAttribute(name).split(" ")))"""

STICKING_OUT = """(() => {
  const width = document.documentElement.clientWidth;
  const nodes = [...document.querySelectorAll("button, input, select, textarea, h3, .text, .tokens, .measure")];
  const shown = nodes.filter(node => node.checkVisibility() && !node.closest(".chips"));
  const out = shown.filter(node => node.getBoundingClientRect().right > width + 1);
  return [document.documentElement.scrollWidth - width, out.map(node => node.className || node.id)];
})()"""

SMALL = """[...document.querySelectorAll("button, select, input:not([type=radio]), .modes span")]
  .filter(node => node.checkVisibility() && node.getBoundingClientRect().height < (node.matches(".chip") ? 32 : 40))
  .map(node => node.className || node.id)"""
SMALL_PRINT = """[...document.querySelectorAll("input, select, textarea")]
  .filter(node => parseFloat(getComputedStyle(node).fontSize) < 16).map(node => node.id)"""


def open_everything(page):
    """Opens the filter, every full text and every explanation."""
    page.value("document.querySelectorAll('#options-open, .more:not([hidden]), .why:not([hidden])').forEach(n => n.click())")
    page.wait("[...document.querySelectorAll('.panel:not([hidden])')].every(panel => panel.querySelector('.top'))")


@pytest.fixture
def shown(page, server):
    """A function that opens a state of the page; the server's error in one of them is expected."""
    page.expected = ("status of 500",)

    def show(state, *, width=1280, height=900, mobile=False):
        server.errors = {"broken": (500, {"message": "the server failed; its log says why"}, {})}
        if state == "tokens":
            server.indexes = ALL
        page.viewport(width, height, mobile=mobile)
        url, until = STATES[state]
        page.goto(server.url + url)
        page.wait(until)
        return page

    return show


def test_the_document_is_one_file_with_a_strict_policy():
    from openembed.server.page import content_security_policy, html

    policy = dict(part.split(" ", 1) for part in content_security_policy().split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert all(policy[f"{kind}-src"].startswith("'sha256-") for kind in ("script", "style"))
    assert "unsafe" not in content_security_policy()
    for outside in (" src=", 'rel="stylesheet"', "@import", "url(", " style=", " onclick=", "innerHTML", "eval(", "{{"):
        assert outside not in html(), outside
    assert html().count("http") == html().count("http://www.w3.org/2000/svg"), "no address but a namespace"


@pytest.mark.parametrize("state", STATES)
def test_texts_are_readable_in_both_schemes(shown, state):
    page = shown(state)
    open_everything(page)
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
        assert page.value(CONTRAST) == []


@pytest.mark.parametrize("state", STATES)
def test_controls_have_names_and_ids_are_unique(shown, state):
    page = shown(state)
    open_everything(page)
    assert page.value(UNNAMED) == []
    ids = page.value(IDS)
    assert len(ids) == len(set(ids))
    assert set(page.value(REFERENCES)) <= set(ids)
    assert page.value("document.documentElement.lang === 'en' && document.querySelectorAll('h1').length === 1")


def test_assistive_technology_sees_results_as_a_list(shown):
    page = shown("results")
    page.send("Accessibility.enable")
    nodes = page.send("Accessibility.getFullAXTree")["nodes"]
    seen = {(node.get("role", {}).get("value"), node.get("name", {}).get("value")) for node in nodes if not node.get("ignored")}
    assert {("searchbox", "Query"), ("button", "Search"), ("radio", "Dense"), ("radio", "BM25"), ("combobox", "Index")} <= seen
    assert ("listitem", "Albedo") in seen
    assert ("button", "Copy id albedo-11") in seen
    assert any(role == "status" for role, _ in seen)


@pytest.mark.parametrize("state", STATES)
def test_nothing_sticks_out_sideways(shown, state):
    page = shown(state, width=320, height=740, mobile=True)
    open_everything(page)
    for width in (320, 360, 768, 1000):
        page.viewport(width, 740, mobile=True)
        assert page.value(STICKING_OUT) == [0, []]


def test_a_phone_has_large_targets_and_does_not_zoom(shown):
    page = shown("results", width=PHONE[0], height=PHONE[1], mobile=True)
    assert page.value(SMALL) == []
    assert page.value(SMALL_PRINT) == []
    assert page.value("!document.querySelector('meta[name=viewport]').content.includes('maximum-scale')")


def test_a_phone_compares_with_tabs_in_reach(shown):
    page = shown("compare", width=PHONE[0], height=PHONE[1], mobile=True)
    visible = "[...document.querySelectorAll('.pane')].map(pane => pane.offsetParent !== null)"
    assert page.value(visible) == [True, False]
    assert page.value("document.querySelector('#tabs').getBoundingClientRect().bottom") <= PHONE[1]
    page.value("document.querySelectorAll('#tabs input')[1].click()")
    assert page.value(visible) == [False, True]
    page.value("window.scrollTo(0, 2000)")
    page.wait("!document.querySelector('#to-query').hidden")
    page.click("#to-query")
    assert page.value("document.activeElement.id") == "query"


def test_reduced_motion_and_print(shown):
    page = shown("results")
    page.media(prefers_reduced_motion="reduce")
    page.value("document.querySelector('#progress').classList.add('busy')")
    assert page.value("getComputedStyle(document.querySelector('#progress'), '::after').animationName") == "none"
    page.media(type="print")
    assert not page.value("[...document.querySelectorAll('#tools, .why')].some(node => node.checkVisibility())")
    assert page.value("document.querySelector('.hit .text').checkVisibility()")


def test_an_index_name_is_in_the_page_once_there_is_one(shown, server):
    server.indexes = TWO[:1]
    page = shown("results")
    assert page.value("document.querySelector('.about').textContent") == "papers-nano · 5,183 documents · openembed-nano"
