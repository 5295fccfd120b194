"""``/v1/multi-vector`` and ``/pooling``: a vector for each token, of models that give these."""

from __future__ import annotations

import time
import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from openembed.server.body import answer, encoded_base64, encoded_matrices, read
from openembed.server.errors import refused
from openembed.server.routes import REFUSALS, catalog, described
from openembed.server.routes.embeddings import encode, prompt_of, usage
from openembed.server.schemas.embeddings import MultiVectorAnswer, MultiVectorRequest, PoolingAnswer, PoolingRequest

router = APIRouter(tags=["embeddings"])


@router.post(
    "/v1/multi-vector",
    responses={200: {"model": MultiVectorAnswer}, **REFUSALS},
    openapi_extra=described(MultiVectorRequest),
)
async def multi_vector(request: Request) -> Response:
    """A vector for each token of texts, in Jina's shape."""
    body = await read(request, MultiVectorRequest)
    engine = catalog(request).engine(body.model, "tokens")
    if body.dimensions not in (None, engine.encoder.width):
        message = f"vectors of tokens cannot be cut; this model's have {engine.encoder.width} dimensions"
        raise refused(message, "dimensions", "too_many_dimensions")
    made = await encode(request, engine, body.input, prompt_of(engine, body))
    matrices = await encoded_matrices(made.values)
    data = [{"object": "embeddings", "index": number, "embeddings": matrix} for number, matrix in enumerate(matrices)]
    return answer({"object": "list", "data": data, "model": engine.name, "usage": usage(made)})


@router.post("/pooling", responses={200: {"model": PoolingAnswer}, **REFUSALS}, openapi_extra=described(PoolingRequest))
async def pooling(request: Request) -> Response:
    """A vector for each token of texts, in vLLM's shape; ``base64`` holds a text's vectors one after the other."""
    body = await read(request, PoolingRequest)
    engine = catalog(request).engine(body.model, "tokens")
    made = await encode(request, engine, body.input, prompt_of(engine, body.model_copy(update={"task": None})))
    base64 = body.encoding_format == "base64"
    matrices = encoded_base64(made.values) if base64 else await encoded_matrices(made.values)
    data = [{"object": "pooling", "index": number, "data": matrix} for number, matrix in enumerate(matrices)]
    about = {"id": f"pool-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": engine.name}
    return answer({**about, "data": data, "usage": usage(made)})
