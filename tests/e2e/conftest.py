"""What the tests of the search page share: a headless Chromium, a server, a tab."""

import warnings

import pytest
from page_browser import Browser, find_chromium
from page_server import PageServer


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; without one on the machine the tests of the page are skipped, and say so."""
    path = find_chromium()
    if path is None:
        words = "no Chromium on this machine: the search page is NOT TESTED; install chromium or set OPENEMBED_CHROMIUM"
        warnings.warn(words, stacklevel=1)  # a warning is printed where a skip is one letter
        pytest.skip(words)
    started = Browser(path)
    yield started
    started.close()


@pytest.fixture(scope="session")
def running():
    """The page and a stand-in for its server, on a free port."""
    started = PageServer()
    yield started
    started.close()


@pytest.fixture
def server(running):
    """The stand-in, as new."""
    running.reset()
    return running


@pytest.fixture
def page(browser, server):
    """A fresh tab; afterwards nothing may have been logged, and nothing asked of another server."""
    tab = browser.page()
    tab.expected = ()
    yield tab
    complaints = [text for text in tab.complaints() if not any(words in text for words in tab.expected)]
    elsewhere = [url for url in tab.requests() if not url.startswith((server.url, "data:", "about:"))]
    tab.close()
    assert not complaints
    assert not elsewhere
