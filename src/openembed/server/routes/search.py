"""``/v1/search``, ``/v1/indexes`` and ``/v1/contributions``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from openembed.contributions import contributions
from openembed.encoded import Encoded
from openembed.index.filters import parse_filter
from openembed.index.tokens.methods import Xtr
from openembed.representations import Kind
from openembed.server.body import answer, read
from openembed.server.catalog import ServedIndex
from openembed.server.engine import Prompt
from openembed.server.errors import CONFLICT, ApiError, refused
from openembed.server.routes import REFUSALS, catalog, described, settings
from openembed.server.routes.embeddings import prefix
from openembed.server.schemas.fields import ErrorAnswer
from openembed.server.schemas.search import (
    ContributionsAnswer,
    ContributionsRequest,
    IndexesAnswer,
    SearchAnswer,
    SearchRequest,
)
from openembed.server.searching import search as search_store
from openembed.server.settings import Limits
from openembed.steps.modes import Naming, check_explained, check_method, default_mode, kinds_of

router = APIRouter(tags=["search"])

SEARCHES = {
    **REFUSALS,
    409: {"model": ErrorAnswer, "description": "The index holds such vectors, but not their model: the message says why."},
}
EXPLAINED = {
    "cls": "The vector is the state of the first token alone, so that token has all of it.",
    "last_token": "The vector is the state of the last token alone, so that token has all of it.",
    "max": "Each dimension of the vector is the largest among the tokens; a token's weight is the part of the vector's squared "
    "length in the dimensions it gives.",
    "concat": "The vector is several poolings side by side; a token's weight is its part of the vector's squared length.",
}
AVERAGED = (
    "The vector is an average of token states; a token's weight is the part of the vector that its state makes, in the "
    "direction of the vector. Weights sum to 1; a negative one points away. Special tokens count where they are pooled."
)


@router.get("/v1/indexes", responses={200: {"model": IndexesAnswer}, 401: REFUSALS[401]})
async def indexes(request: Request) -> Response:
    """The indexes served, with what can be asked of each."""
    return answer(
        {
            "data": [
                {
                    "name": index.name,
                    "count": len(index.store),
                    "model": index.model,
                    "models": {kind: engine.name for kind, engine in index.engines.items()},
                    "modes": index.modes,
                    "missing": index.missing,
                    "language": index.store.analyzer.language,
                    "contributions": "dense" in index.engines,
                }
                for index in catalog(request).indexes.values()
            ]
        }
    )


@router.post("/v1/search", responses={200: {"model": SearchAnswer}, **SEARCHES}, openapi_extra=described(SearchRequest))
async def search(request: Request) -> Response:
    """Documents of an index, best first, with the places of the query's words (offsets count Unicode code points)."""
    start = time.perf_counter()
    body = await read(request, SearchRequest)
    index = catalog(request).index(body.index)
    mode = _mode(body, index)
    _check_size(body, settings(request).limits)
    _check_method(body, index, mode)
    _check_filter(body.filter)
    encoding = time.perf_counter()
    vectors = await _vectors(index, mode, body)
    encoded = time.perf_counter() - encoding
    naming = _naming(index, mode, body) if body.explain else None
    found = await index.search(
        lambda store: search_store(store, body.query, vectors, mode, body.k, body.filter, naming, body.method)
    )
    took = {"encode": encoded, "search": found.seconds, "total": time.perf_counter() - start}
    return answer(
        {
            "query": body.query,
            "index": index.name,
            "mode": mode,
            "model": index.engines[mode].name if mode in index.engines else index.model if mode == "hybrid" else None,
            "took_ms": {part: round(seconds * 1000, 3) for part, seconds in took.items()},
            "hits": found.hits,
        }
    )


@router.post(
    "/v1/contributions",
    responses={200: {"model": ContributionsAnswer}, **SEARCHES},
    openapi_extra=described(ContributionsRequest),
)
async def token_contributions(request: Request) -> Response:
    """Each token's share of its text's vector."""
    body = await read(request, ContributionsRequest)
    served = catalog(request)
    if body.index is not None and body.model is not None:
        raise refused("give index or model, not both", "index", CONFLICT)
    by_index = body.index is not None or (body.model is None and not served.engines)
    engine = served.index(body.index).engines.get("dense") if by_index else served.engine(body.model, "dense")
    if engine is None:
        served.index(body.index).require(["dense"])
        raise ApiError(404, "this index has no dense model, so there are no vectors to explain", param="index")
    is_query = body.input_type in ("query", "search_query")
    literal = prefix(engine, body.task, body.instruction, is_query=is_query)
    text = engine.cut(body.text)
    tokens = await engine.call(lambda: contributions(engine.encoder, text, literal))
    kind = engine.encoder.config.head.kind
    return answer({"tokens": [asdict(token) for token in tokens], "explained": EXPLAINED.get(kind, AVERAGED)})


def _mode(body: SearchRequest, index: ServedIndex) -> str:
    modes = index.modes
    mode = body.mode or default_mode(modes, explain=body.explain)
    if mode not in modes:
        index.require(kinds_of(mode, index.missing))
        message = f"mode: this index has no vectors for {mode!r}; allowed: {', '.join(modes)}"
        raise refused(message, "mode", "mode_not_available")
    if body.explain:
        try:
            check_explained(mode, body.method)
        except ValueError as error:
            raise refused(f"explain: {error}", "explain", "not_explained") from None
    return mode


def _naming(index: ServedIndex, mode: str, body: SearchRequest) -> Naming:
    if mode not in index.engines:
        return Naming()
    engine = index.engines[mode]
    return Naming(engine.encoder, prefix(engine, body.task, body.instruction, is_query=True))


async def _vectors(index: ServedIndex, mode: str, body: SearchRequest) -> dict[Kind, Encoded]:
    """The query's vectors of each kind that the mode asks, made as those of the index were."""
    found = {}
    for kind in kinds_of(mode, index.engines):
        engine, model = index.engines[kind], index.store.models[kind]
        literal = prefix(engine, body.task, body.instruction, is_query=True)
        as_query = Prompt(literal, model.max_length, query=True)
        found[kind] = (await engine.encode([body.query], as_query, normalize=model.normalize)).values
    return found


def _check_size(body: SearchRequest, limits: Limits) -> None:
    if body.k > limits.hits:
        raise ApiError(413, f"k: {body.k} is more than the {limits.hits} hits one search may have", param="k")
    if len(body.query) > limits.query_characters:
        message = f"query: {len(body.query)} characters, more than the {limits.query_characters} a search may have; shorten it"
        raise ApiError(413, message, param="query", code="query_too_long")
    if isinstance(body.method, Xtr) and body.method.tokens > limits.retrieved_tokens:
        message = f"method.xtr.tokens: {body.method.tokens} is more than the {limits.retrieved_tokens} one search may retrieve"
        raise ApiError(413, message, param="method")


def _check_method(body: SearchRequest, index: ServedIndex, mode: str) -> None:
    try:
        check_method(index.store, kinds_of(mode, index.engines), body.method)
    except ValueError as error:
        raise refused(f"method: {error}", "method", "method_not_available") from None


def _check_filter(given: dict[str, Any] | None) -> None:
    if given is None:
        return
    try:
        parse_filter(given)
    except ValueError as error:
        raise refused(f"filter: {error}", "filter", "invalid_filter") from None
