"""``/embed_sparse``: what a sparse model makes of texts."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from openembed.server.body import answer, encoded_terms, read
from openembed.server.routes import REFUSALS, catalog, described
from openembed.server.routes.embeddings import encode, named_prompt
from openembed.server.schemas.embeddings import SparseRequest, TermWeight

router = APIRouter(tags=["embeddings"])


@router.post(
    "/embed_sparse", responses={200: {"model": list[list[TermWeight]]}, **REFUSALS}, openapi_extra=described(SparseRequest)
)
async def embed_sparse(request: Request) -> Response:
    """The terms of texts with their weights, by their numbers, in the shape of text-embeddings-inference."""
    body = await read(request, SparseRequest)
    engine = catalog(request).engine(body.model, "sparse")
    made = await encode(request, engine, body.inputs, named_prompt(engine, body))
    return answer(await encoded_terms(made.values))
