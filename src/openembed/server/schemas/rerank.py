"""A query and documents in, scores out: ``/v1/rerank`` and ``/rerank``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, WithJsonSchema

from openembed.config import Count
from openembed.server.schemas.fields import TEXT, Request, Text, Texts, Usage


def _plain(value: Any) -> Any:
    """Documents as strings: objects with a ``text`` are taken for it."""
    if type(value) is not list:
        return value
    texts = [item["text"] if type(item) is dict and set(item) == {"text"} else item for item in value]
    if not all(type(text) is str for text in texts):
        raise ValueError("must be strings, or objects with a text and nothing else")
    return texts


RERANK_DOCUMENTS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            TEXT,
            {"type": "object", "properties": {"text": TEXT}, "required": ["text"], "additionalProperties": False},
        ]
    },
}


class RerankRequest(Request):
    """``POST /v1/rerank``: Cohere's and Jina's keys. ``task`` and ``instruction`` are the embedding model's."""

    query: Text
    documents: Annotated[Texts, BeforeValidator(_plain), WithJsonSchema(RERANK_DOCUMENTS)]
    model: str | None = None
    top_n: Count | None = None
    return_documents: bool = False
    task: str | None = None
    instruction: str | None = None


class TeiRerankRequest(Request):
    """``POST /rerank`` as text-embeddings-inference takes it."""

    query: Text
    texts: Texts
    raw_scores: Literal[False] = False
    return_text: bool = False
    truncate: bool = True


class RerankResult(BaseModel):
    """One document: its place in the request and its score."""

    index: int
    relevance_score: float
    document: dict[str, str] | None = None


class RerankAnswer(BaseModel):
    """Cohere's and Jina's answer, best first."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage | None = None
    meta: dict[str, Any]


class TeiRank(BaseModel):
    """One text of text-embeddings-inference's answer."""

    index: int
    score: float
    text: str | None = None
