"""``/v1/embeddings`` and ``/embed``."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from openembed.server.body import answer, encoded_base64, encoded_rows, read, shortened
from openembed.server.engine import Answer, Engine, Prompt
from openembed.server.errors import CONFLICT, ApiError, refused
from openembed.server.routes import REFUSALS, catalog, described, settings
from openembed.server.schemas.embeddings import EmbeddingsAnswer, EmbeddingsRequest, EmbedRequest, SparseRequest
from openembed.server.schemas.fields import Prompted

router = APIRouter(tags=["embeddings"])


@router.post(
    "/v1/embeddings",
    responses={200: {"model": EmbeddingsAnswer}, **REFUSALS},
    openapi_extra=described(EmbeddingsRequest),
)
async def embeddings(request: Request) -> Response:
    """Vectors of texts, in OpenAI's shape."""
    body = await read(request, EmbeddingsRequest)
    engine = catalog(request).engine(body.model, "dense")
    made = await encode(request, engine, body.input, prompt_of(engine, body), normalize=body.normalize)
    values_ND = shortened(made.values, body.dimensions, normalize=body.normalize)
    base64 = body.encoding_format == "base64"
    vectors = encoded_base64(values_ND) if base64 else await encoded_rows(values_ND)
    data = [{"object": "embedding", "index": number, "embedding": vector} for number, vector in enumerate(vectors)]
    return answer({"object": "list", "data": data, "model": engine.name, "usage": usage(made)})


@router.post("/embed", responses={200: {"model": list[list[float]]}, **REFUSALS}, openapi_extra=described(EmbedRequest))
async def embed(request: Request) -> Response:
    """Vectors of texts as a list of lists, in the shape of text-embeddings-inference."""
    body = await read(request, EmbedRequest)
    engine = catalog(request).engine(body.model, "dense")
    made = await encode(request, engine, body.inputs, named_prompt(engine, body), normalize=body.normalize)
    return answer(await encoded_rows(shortened(made.values, body.dimensions, normalize=body.normalize)))


async def encode(
    request: Request,
    engine: Engine,
    given: str | list[str] | list[int] | list[list[int]],
    prompt: Prompt,
    *,
    normalize: bool = True,
) -> Answer:
    """Returns the representations of whatever clients may send as input."""
    texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    most = settings(request).limits.texts
    if len(texts) > most:
        raise ApiError(413, f"{len(texts)} texts in one request; at most {most}, send them in parts", code="too_many_texts")
    if isinstance(texts[0], str):
        return await engine.encode(texts, prompt, normalize=normalize)
    return await engine.encode_ids(texts, prompt, normalize=normalize)


def prompt_of(engine: Engine, body: Prompted) -> Prompt:
    """Returns how the texts of a request are read; raises ``ApiError`` 400 for an unknown task."""
    literal = prefix(engine, body.task, body.instruction, is_query=body.is_query)
    return Prompt(literal, truncate=body.truncate, query=body.is_query)


def named_prompt(engine: Engine, body: SparseRequest) -> Prompt:
    """Returns :func:`prompt_of` a request that may name the prompt as text-embeddings-inference does."""
    if body.prompt_name is not None and body.task is not None:
        raise refused("give prompt_name or task, not both", "prompt_name", CONFLICT)
    asked = body.model_copy(update={"task": body.prompt_name or body.task})
    if body.prompt_name is not None and body.input_type is None:
        asked = asked.model_copy(update={"input_type": "query"})  # a named prompt is put before whatever is sent
    return prompt_of(engine, asked)


def usage(made: Answer) -> dict[str, int]:
    """Returns the tokens encoded, as OpenAI counts them."""
    return {"prompt_tokens": made.tokens, "total_tokens": made.tokens}


def prefix(engine: Engine, task: str | None, instruction: str | None, *, is_query: bool) -> str:
    """Returns the literal prefix of a model's queries or documents; raises ``ApiError`` 400 for an unknown task."""
    prompt = engine.encoder.query_prompt if is_query else engine.encoder.document_prompt
    if task is not None and instruction is not None:
        raise refused("give task or instruction, not both", "task", CONFLICT)
    try:
        return prompt(task, instruction)
    except ValueError as error:
        raise refused(str(error), "task", "unknown_task") from None
