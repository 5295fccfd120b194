"""Texts in, vectors out: ``/v1/embeddings``, ``/embed``, ``/embed_sparse``, ``/v1/multi-vector`` and ``/pooling``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from openembed.config import Count
from openembed.server.schemas.fields import Input, Prompted, Usage


class EmbeddingsRequest(Prompted):
    """``POST /v1/embeddings``: OpenAI's keys and ours. ``dimensions``: the first so many, made length 1 again."""

    input: Input
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    normalize: bool = True
    user: str | None = None


class SparseRequest(Prompted):
    """``POST /embed_sparse``: the keys of text-embeddings-inference and ours."""

    inputs: Input
    model: str | None = None
    prompt_name: str | None = None
    truncation_direction: Literal["Right", "right"] = "Right"


class EmbedRequest(SparseRequest):
    """``POST /embed``: the keys of text-embeddings-inference and ours."""

    normalize: bool = True
    dimensions: Count | None = None


class MultiVectorRequest(Prompted):
    """``POST /v1/multi-vector``: Jina's keys and ours. ``dimensions``: those of the model, if given."""

    input: Input
    model: str | None = None
    embedding_type: Literal["float"] = "float"
    dimensions: Count | None = None


class PoolingRequest(Prompted):
    """``POST /pooling``: vLLM's keys and ours; ``task`` is vLLM's word for what is asked, so ours are instructions here."""

    input: Input
    model: str | None = None
    task: Literal["token_embed"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class Embedding(BaseModel):
    """A vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsAnswer(BaseModel):
    """OpenAI's answer."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class TermWeight(BaseModel):
    """A term of the model's vocabulary, by its number, and its weight."""

    index: int
    value: float


class MultiVector(BaseModel):
    """A vector for each token kept of a text."""

    object: Literal["embeddings"]
    index: int
    embeddings: list[list[float]]


class MultiVectorAnswer(BaseModel):
    """Jina's answer."""

    object: Literal["list"]
    data: list[MultiVector]
    model: str
    usage: Usage


class Pooled(BaseModel):
    """The vectors of a text: numbers, or base64 of little-endian float32, one vector after the other."""

    object: Literal["pooling"]
    index: int
    data: list[list[float]] | str


class PoolingAnswer(BaseModel):
    """vLLM's answer."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Pooled]
    usage: Usage
