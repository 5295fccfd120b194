"""The search page for eyes, fingers and assistive technology: contrast, names, sizes, phones, print, motion."""

import pytest
from page_server import TWO

PHONE = (360, 740)
STATES = {
    "welcome": ("", "document.querySelector('.welcome dt')"),
    "results": ("?q=glacier&k=50", "document.querySelector('.hit')"),
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
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest('.unseen, .skip, script, style, :disabled, option')) continue;
    if (node.matches('.modes input:disabled + span')) continue;
    const behind = [];
    for (let up = node; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
    const back = over(behind), fore = over([...behind, getComputedStyle(node).color]);
    const [high, low] = [light(back), light(fore)].sort((a, b) => b - a);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) found.push(`${node.className || node.tagName}: ${ratio.toFixed(2)} ${walker.currentNode.data.slice(0, 30)}`);
  }
  return found;
})()"""

UNNAMED = """[...document.querySelectorAll('button, input, select, textarea, [role=radiogroup], dialog, form')]
  .filter(node => !(node.getAttribute('aria-label') || node.labels?.length || node.textContent.trim() || node.getAttribute('aria-labelledby')))
  .map(node => node.outerHTML.slice(0, 90))"""


@pytest.fixture
def shown(page, server):
    """A function that opens a state of the page; the server's error in one of them is expected."""
    page.expected = ("status of 500",)

    def show(state, *, width=1280, height=900, mobile=False, scheme="light"):
        server.errors = {"broken": (500, {"message": "the server failed; its log says why"}, {})}
        page.viewport(width, height, mobile=mobile)
        page.media(prefers_color_scheme=scheme)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_texts_are_readable(shown, state, scheme):
    page = shown(state, scheme=scheme)
    page.value("document.querySelectorAll('.why:not([hidden])').forEach(node => node.click())")
    page.value("document.querySelector('#options-open').click()")
    page.wait("!document.querySelector('.why[aria-expanded=true]') || document.querySelector('.token')")
    page.value("new Promise(done => setTimeout(done, 300))")
    assert page.value(CONTRAST) == []


@pytest.mark.parametrize("state", STATES)
def test_controls_have_names_and_ids_are_unique(shown, state):
    page = shown(state)
    page.value("document.querySelector('.why:not([hidden])')?.click()")
    assert page.value(UNNAMED) == []
    assert (
        page.value("(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('[id]')].map(node => node.id))") == 0
    )
    assert page.value("document.documentElement.lang === 'en' && document.querySelectorAll('h1').length === 1")
    assert page.value(
        "[...document.querySelectorAll('[aria-controls], [aria-labelledby]')].every(n => document.getElementById(n.getAttribute('aria-controls') ?? n.getAttribute('aria-labelledby')))"
    )


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
@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_sticks_out_sideways(shown, state, width):
    page = shown(state, width=width, height=740, mobile=True)
    page.value("document.querySelectorAll('.more:not([hidden]), .why:not([hidden])').forEach(node => node.click())")
    page.value("document.querySelector('#options-open').click()")
    page.value("new Promise(done => setTimeout(done, 300))")
    assert page.value("document.documentElement.scrollWidth") == width
    outside = f"[...document.querySelectorAll('button, input, select, h3, .text, .chip, .tokens')].filter(n => n.offsetParent && n.getBoundingClientRect().right > {width} + 1).map(n => n.className || n.id)"
    assert page.value(outside) == []


def test_a_phone_has_large_targets_and_does_not_zoom(shown):
    page = shown("results", width=PHONE[0], height=PHONE[1], mobile=True)
    small = """[...document.querySelectorAll('button, select, input:not([type=radio]), .modes span')].filter(n => n.offsetParent)
      .filter(n => n.getBoundingClientRect().height < (n.matches('.chip') ? 32 : 40)).map(n => n.className || n.id)"""
    assert page.value(small) == []
    assert page.value(
        "[...document.querySelectorAll('input, select, textarea')].every(n => parseFloat(getComputedStyle(n).fontSize) >= 16)"
    )
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
    assert not page.value(
        "document.querySelector('#tools').checkVisibility() || document.querySelector('.why').checkVisibility()"
    )
    assert page.value("document.querySelector('.hit .text').checkVisibility()")


def test_an_index_name_is_in_the_page_once_there_is_one(shown, server):
    server.indexes = TWO[:1]
    page = shown("results")
    assert page.value("document.querySelector('.about').textContent") == "papers-nano · 5,183 documents · openembed-nano"
