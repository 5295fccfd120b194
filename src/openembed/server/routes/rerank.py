"""``/v1/rerank`` and ``/rerank``: documents ordered for a query, by the reranker or as the embedding model compares them."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from scipy.sparse import issparse
from starlette.responses import Response

from openembed.encoded import Encoded
from openembed.index.exact import prepared
from openembed.server.body import answer, checked, read, values
from openembed.server.engine import Prompt
from openembed.server.errors import ApiError
from openembed.server.routes import REFUSALS, catalog, described, settings
from openembed.server.routes.embeddings import prefix
from openembed.server.schemas.rerank import RerankAnswer, RerankRequest, TeiRank, TeiRerankRequest
from openembed.token_vectors import TokenVectors

router = APIRouter(tags=["rerank"])


@router.post("/v1/rerank", responses={200: {"model": RerankAnswer}, **REFUSALS}, openapi_extra=described(RerankRequest))
@router.post("/v2/rerank", responses={200: {"model": RerankAnswer}, **REFUSALS}, openapi_extra=described(RerankRequest))
async def rerank(request: Request) -> Response:
    """Documents best first, in Cohere's and Jina's shape."""
    return await _ranked(request, await read(request, RerankRequest))


@router.post(
    "/rerank",
    responses={200: {"model": RerankAnswer | list[TeiRank]}, **REFUSALS},
    openapi_extra=described(RerankRequest, TeiRerankRequest),
)
async def rerank_either(request: Request) -> Response:
    """With ``documents`` as ``/v1/rerank``; with ``texts`` in the shape of text-embeddings-inference."""
    given = await values(request)
    if "texts" not in given:
        return await _ranked(request, checked(given, RerankRequest))
    body = checked(given, TeiRerankRequest)
    asked = RerankRequest(query=body.query, documents=body.texts)
    _, scores_N, _ = await _scores(request, asked)
    return answer(
        [
            {"index": place, "score": score, **({"text": body.texts[place]} if body.return_text else {})}
            for place, score in _best(scores_N)
        ]
    )


async def _ranked(request: Request, body: RerankRequest) -> Response:
    name, scores_N, tokens = await _scores(request, body)
    results: list[dict[str, Any]] = []
    for place, score in _best(scores_N)[: body.top_n]:
        document = {"document": {"text": body.documents[place]}} if body.return_documents else {}
        results.append({"index": place, "relevance_score": score, **document})
    usage = {} if tokens is None else {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    return answer({"id": str(uuid.uuid4()), "model": name, "results": results, **usage, "meta": meta})


async def _scores(request: Request, body: RerankRequest) -> tuple[str, np.ndarray, int | None]:
    """The model's name, a score a document, and the tokens where they were counted."""
    limits, served = settings(request).limits, catalog(request)
    if len(body.documents) > limits.rerank_documents:
        raise ApiError(
            413, f"{len(body.documents)} documents in one request; at most {limits.rerank_documents}", code="too_many_documents"
        )
    reranker = served.reranker
    if reranker is not None and body.model in (None, reranker.name):
        return reranker.name, await reranker.score(body.query, body.documents, limits.rerank_waiting), None
    engine = served.engine(body.model)
    as_query = Prompt(prefix(engine, body.task, body.instruction, is_query=True), query=True)
    as_document = Prompt(prefix(engine, None, None, is_query=False))
    query = await engine.encode([body.query], as_query)
    documents = await engine.encode(body.documents, as_document)
    return engine.name, await _similarities(query.values, documents.values), query.tokens + documents.tokens


async def _similarities(query: Encoded, documents: Encoded) -> np.ndarray:
    """A score a document, (N,): the product of the vectors; where there is one a token, MaxSim."""
    if isinstance(documents, TokenVectors):
        every = np.arange(len(documents))
        return await asyncio.to_thread(lambda: prepared(documents).scores(query, every))
    return (documents @ query.T).toarray()[:, 0] if issparse(documents) else documents @ query[0]


def _best(scores_N: np.ndarray) -> list[tuple[int, float]]:
    """(place, score) best first, equal scores in the order of the request."""
    return [(int(place), float(scores_N[place])) for place in np.argsort(-scores_N, kind="stable")]
