"""What is asked of indexes and what they answer: ``/v1/search``, ``/v1/indexes`` and ``/v1/contributions``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from openembed.config import Count
from openembed.index.tokens.methods import EXACT, Method
from openembed.server.schemas.fields import Free, InputType, Request, Text


class SearchRequest(Request):
    """``POST /v1/search``. ``index`` and ``mode`` of None: the first index, and the best it can. ``explain``: with what
    makes each score (modes ``sparse``, ``tokens`` and ``bm25``; where none is given, the first of these that there is)."""

    query: Text
    index: str | None = None
    mode: Literal["dense", "sparse", "tokens", "bm25", "hybrid"] | None = None
    k: Count = 10
    explain: bool = False
    method: Method = EXACT
    filter: Free | None = None
    task: str | None = None
    instruction: str | None = None


class ContributionsRequest(Request):
    """``POST /v1/contributions``."""

    text: Text
    index: str | None = None
    model: str | None = None
    input_type: InputType | None = None
    task: str | None = None
    instruction: str | None = None


class Milliseconds(BaseModel):
    """Where the time went."""

    encode: float
    search: float
    total: float


class Highlights(BaseModel):
    """(start, end) of the query's words, in Unicode code points."""

    title: list[tuple[int, int]]
    text: list[tuple[int, int]]


class TermShare(BaseModel):
    """A term of a score: what it adds (its weights in query and document multiplied), and which share of the score that is."""

    term: str
    score: float
    share: float
    query: float
    document: float


class TokenMatch(BaseModel):
    """A token of the query, the document's that it ``met``, their product, and where both are among the token vectors.

    ``met_span``: (start, end) of the one met in the document's title, a space and its text, in code points; null where it is
    not of them (special tokens) or not known (pooled vectors)."""

    term: str
    met: str
    score: float
    share: float
    position: int
    met_position: int
    met_span: tuple[int, int] | None


class Hit(BaseModel):
    """A document found. ``snippet``: (start, end) of the part of its text that shows most of the query, in code points.
    ``terms``: with ``explain``, those that made the score, or tokens that met, greatest first."""

    rank: int
    id: str
    score: float
    title: str
    text: str
    metadata: dict[str, Any]
    highlights: Highlights
    snippet: tuple[int, int]
    terms: list[TermShare] | list[TokenMatch] | None = None


class SearchAnswer(BaseModel):
    """Documents, best first. ``model``: the one that read the query (``hybrid``: the index's first), None for words alone."""

    query: str
    index: str
    mode: str
    model: str | None
    took_ms: Milliseconds
    hits: list[Hit]


class Index(BaseModel):
    """An index and what can be asked of it. ``model``: the first of its ``models``, which are by kind of vectors. ``missing``:
    why vectors that it holds cannot be searched here, by kind."""

    name: str
    count: int
    model: str | None
    models: dict[str, str]
    modes: list[str]
    missing: dict[str, str]
    language: str
    contributions: bool


class IndexesAnswer(BaseModel):
    """The indexes served."""

    data: list[Index]


class TokenShare(BaseModel):
    """A token, its characters (code points; start = end where it has none) and its share of the vector."""

    text: str
    start: int
    end: int
    weight: float
    pooled: bool


class ContributionsAnswer(BaseModel):
    """Shares that sum to 1, and in words what they are."""

    tokens: list[TokenShare]
    explained: str
