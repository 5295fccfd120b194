"""``/v1/models``, ``/health`` and ``/metrics``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from openembed.server.body import answer
from openembed.server.catalog import ROUTES
from openembed.server.engine import Engine
from openembed.server.errors import ApiError
from openembed.server.routes import REFUSALS, catalog
from openembed.server.schemas.status import HealthAnswer, Model, ModelsAnswer

router = APIRouter(tags=["status"])


@router.get("/v1/models", responses={200: {"model": ModelsAnswer}, 401: REFUSALS[401]})
async def models(request: Request) -> Response:
    """The models served, in OpenAI's shape; they say what they give, and where, their width, longest text and tasks."""
    served = catalog(request)
    rows = [_row(name, engine, served.made) for name, engine in served.engines.items()]
    rows += [_row(name, served.engines[of], served.made) for name, of in served.aliases.items()]
    if served.reranker is not None:
        rows.append(_reranker(served.reranker.name, served.made))
    return answer({"object": "list", "data": rows})


@router.get("/v1/models/{name:path}", responses={200: {"model": Model}, 401: REFUSALS[401], 404: REFUSALS[404]})
async def model(request: Request, name: str) -> Response:
    """One model."""
    served = catalog(request)
    if served.reranker is not None and name == served.reranker.name:
        return answer(_reranker(name, served.made))
    if not name:
        raise ApiError(404, "name a model", code="model_not_found")
    return answer(_row(name, served.engine(name), served.made))


@router.get(
    "/health",
    responses={200: {"model": HealthAnswer}, 503: {"model": HealthAnswer, "description": "Stopping, or a model fails."}},
)
async def health(request: Request) -> Response:
    """Whether the server takes requests. It listens only once its models are ready."""
    served = catalog(request)
    draining = request.app.state.gate.draining
    status = "draining" if draining else "ok" if served.healthy else "failing"
    found = {"status": status, "models": list(served.engines), "indexes": list(served.indexes)}
    return answer(found, 200 if status == "ok" else 503)


@router.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: REFUSALS[401]})
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _row(name: str, engine: Engine, made: int) -> dict[str, Any]:
    encoder = engine.encoder
    prompts = encoder.config.prompts
    tasks = sorted({*prompts.tasks, *prompts.named})
    about = {"dimensions": encoder.width, "max_length": encoder.max_length, "tasks": tasks}
    return {**_plain(name, made, engine.kind, ROUTES[engine.kind]), **about}


def _reranker(name: str, made: int) -> dict[str, Any]:
    return _plain(name, made, "reranker", "/v1/rerank")


def _plain(name: str, made: int, kind: str, path: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": made, "owned_by": "openembed", "kind": kind, "path": path}
