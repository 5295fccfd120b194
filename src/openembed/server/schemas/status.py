"""What is served and how the server is: ``/v1/models`` and ``/health``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Model(BaseModel):
    """A model, with what clients may want to know of it.

    ``kind``: what it gives, ``dense``, ``sparse``, ``tokens`` or, a reranker, ``reranker``; ``path``: where texts go to it.
    ``dimensions``: of a vector, or terms of the vocabulary.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["dense", "sparse", "tokens", "reranker"]
    path: str
    dimensions: int | None = None
    max_length: int | None = None
    tasks: list[str] | None = None


class ModelsAnswer(BaseModel):
    """The models served."""

    object: Literal["list"]
    data: list[Model]


class HealthAnswer(BaseModel):
    """``ok``, ``draining`` or ``failing``."""

    status: Literal["ok", "draining", "failing"]
    models: list[str]
    indexes: list[str]
