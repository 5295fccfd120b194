"""The API's paths, one module a group."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from openembed.config import Config
from openembed.server.catalog import Catalog
from openembed.server.schemas.fields import ErrorAnswer
from openembed.server.settings import Settings

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The request is wrong; param says where."},
    401: {"model": ErrorAnswer, "description": "An API key is needed."},
    404: {"model": ErrorAnswer, "description": "No such model, index or document."},
    413: {"model": ErrorAnswer, "description": "The request is too large."},
    415: {"model": ErrorAnswer, "description": "The body is not JSON."},
    429: {"model": ErrorAnswer, "description": "Too much waits; Retry-After says when to come back."},
    503: {"model": ErrorAnswer, "description": "The server is stopping."},
    504: {"model": ErrorAnswer, "description": "The answer took too long; the work was given up."},
}


def described(kind: type[Config], *others: type[Config]) -> dict[str, Any]:
    """Returns what the API's description says of a body: one of the kinds, by reference to the schemas that the app adds."""
    references = [{"$ref": f"#/components/schemas/{one.__name__}"} for one in (kind, *others)]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def catalog(request: Request) -> Catalog:
    """Returns what the app serves."""
    return request.app.state.catalog


def settings(request: Request) -> Settings:
    """Returns how the app runs."""
    return request.app.state.settings
