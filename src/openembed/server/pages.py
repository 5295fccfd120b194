"""What people read in a browser: the search page and the API's description, each one file under a strict policy."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from openembed.server import page as search_page

router = APIRouter(include_in_schema=False)

INLINE = re.compile(r"<(script|style)(?:\s[^>]*)?>(.*?)</\1\s*>", re.S | re.I)


@router.get("/")
async def page(request: Request) -> Response:
    """The search page; where it is switched off, or nothing to search, the API's description."""
    if not (request.app.state.settings.page and request.app.state.catalog.indexes):
        return RedirectResponse("/docs")
    return _html(search_page.html(), search_page.content_security_policy())


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The API's description for people."""
    html = _described(request.app)
    return _html(html, _policy(html))


def policy(html: str) -> str:
    """Returns the Content-Security-Policy of a page: its own inline scripts and styles by hash, this server, nothing else."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in INLINE.findall(html):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    parts = ["default-src 'none'", "connect-src 'self'", "img-src 'self' data:", "base-uri 'none'", "form-action 'none'"]
    parts += [f"{kind}-src {' '.join(found) or chr(39) + 'none' + chr(39)}" for kind, found in hashes.items()]
    return "; ".join([*parts, "frame-ancestors 'none'"])


def _html(html: str, allowed: str) -> Response:
    headers = {"content-security-policy": allowed, "cache-control": "no-cache"}
    return Response(html, media_type="text/html; charset=utf-8", headers=headers)


_policy = cache(policy)


@cache
def _file(name: str) -> str | None:
    path = resources.files("openembed.server").joinpath(name)
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _described(app: Any) -> str:
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(_file("docs.html") or "")
    schema = app.openapi()
    return template.render(info=schema["info"], paths=schema["paths"], schemas=schema["components"]["schemas"])
