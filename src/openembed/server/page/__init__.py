"""The search page: one HTML document without any outside asset, and the policy under which a browser may run it."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
SCRIPTS = ("dom", "text", "filter", "api", "state", "tokens", "met", "hit", "pane", "compare", "keys", "app")
"""The page's scripts in the order in which they become one module."""


@cache
def html() -> str:
    """Returns the page, its style sheet and scripts inside it."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    return page.replace("{{ style }}", _style()).replace("{{ script }}", _script())


@cache
def content_security_policy() -> str:
    """Returns the header's value: this page's own style and script by hash, requests to its own server, nothing else.

    Trusted Types are required and none are allowed, so that a browser that knows them refuses text as HTML anywhere.
    """
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source(_script())}",
            f"style-src {_source(_style())}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


@cache
def _style() -> str:
    return (FOLDER / "page.css").read_text(encoding="utf-8")


@cache
def _script() -> str:
    return "\n".join((FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)


def _source(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
