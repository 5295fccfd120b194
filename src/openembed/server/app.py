"""The ASGI application: the API behind its gate."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from openembed import __version__
from openembed.server import pages
from openembed.server.catalog import Catalog
from openembed.server.errors import ApiError, internal, of_status, refused
from openembed.server.gate import Gate
from openembed.server.metrics import Metrics
from openembed.server.routes import documents, embeddings, rerank, search, sparse, status, tokens
from openembed.server.schemas.documents import AddRequest, DeleteRequest
from openembed.server.schemas.embeddings import (
    EmbeddingsRequest,
    EmbedRequest,
    MultiVectorRequest,
    PoolingRequest,
    SparseRequest,
)
from openembed.server.schemas.rerank import RerankRequest, TeiRerankRequest
from openembed.server.schemas.search import ContributionsRequest, SearchRequest
from openembed.server.settings import Settings

BODIES = (
    EmbeddingsRequest,
    EmbedRequest,
    SparseRequest,
    MultiVectorRequest,
    PoolingRequest,
    RerankRequest,
    TeiRerankRequest,
    SearchRequest,
    AddRequest,
    DeleteRequest,
    ContributionsRequest,
)
REFERENCES = "#/components/schemas/{model}"


def create_app(catalog: Catalog, settings: Settings | None = None, metrics: Metrics | None = None) -> tuple[Any, Gate]:
    """Returns the ASGI application that serves ``catalog``, and its gate, which knows what is under way and can stop it."""
    settings, metrics = settings or Settings(), metrics or Metrics()
    app = FastAPI(
        title="openembed",
        version=__version__,
        description="Embeddings, reranking and search.",
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            ApiError: _refusal,
            HTTPException: _refusal,
            RequestValidationError: _refusal,
            Exception: _failure,
        },
    )
    app.router.redirect_slashes = False
    app.state.catalog, app.state.settings, app.state.metrics = catalog, settings, metrics
    for module in (embeddings, sparse, tokens, rerank, search, documents, status, pages):
        app.include_router(module.router)
    _describe(app)
    gate = Gate(app, settings, metrics)
    app.state.gate = gate
    if not settings.origins:
        return gate, gate
    methods = ["GET", "POST", "DELETE"]
    return CORSMiddleware(gate, allow_origins=list(settings.origins), allow_methods=methods, allow_headers=["*"]), gate


async def _refusal(_request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        error = refused(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", str(first["loc"][-1]))
    if isinstance(error, HTTPException):
        error = of_status(error.status_code, error.detail)
    return _response(error)  # type: ignore[arg-type]


async def _failure(_request: Request, _error: Exception) -> Response:
    return _response(internal())  # the framework raises the error again, and the gate logs it


def _response(error: ApiError) -> Response:
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(error.body(), error.status, headers)


def _describe(app: FastAPI) -> None:
    """Adds the bodies' schemas to the API's description, which the routes name and the framework does not know."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = made()
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for kind in BODIES:
                own = kind.model_json_schema(ref_template=REFERENCES)
                schemas.update(own.pop("$defs", {}))
                schemas[kind.__name__] = own
        return app.openapi_schema  # type: ignore[return-value]

    app.openapi = openapi  # type: ignore[method-assign]
