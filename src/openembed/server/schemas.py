"""Requests and answers, in the shapes that clients of OpenAI, Cohere, Jina and text-embeddings-inference send and read.

Requests are strict: a number is no string, and a key that is not known is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from openembed.config import Config

DEEPEST = 16
"""Levels of lists and objects that free-form values (metadata, filters) may have."""

InputType = Literal["query", "document", "passage", "search_query", "search_document"]
"""What texts are to the model; ``passage`` and ``search_*`` are other vendors' words for the same two."""

TEXT = {"type": "string"}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
INPUT_SCHEMA = {
    "anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}, IDS, {"type": "array", "items": IDS, "minItems": 1}]
}


def _whole(value: Any) -> Any:
    """``5.0`` as 5: to JSON they are one number."""
    return int(value) if type(value) is float and value.is_integer() else value


def _input(value: Any) -> Any:
    """A string, strings, token ids or lists of them; checked by hand, since one error a wrong item would fill memory."""
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise ValueError("must be a string, a list of strings, token ids or a list of token ids, and not empty")
    if type(value[0]) in (int, float):
        value = [_whole(item) for item in value] if float in set(map(type, value)) else value
    kind = type(value[0])
    if kind is list:
        value = [[_whole(item) for item in row] if type(row) is list and float in set(map(type, row)) else row for row in value]
        if not all(type(row) is list and row and all(type(i) is int for i in row) for row in value):
            raise ValueError("each text must be a list of token ids (integers), and not empty")
    elif kind not in (str, int) or not all(type(item) is kind for item in value):
        raise ValueError("must hold strings only, or token ids (integers) only")
    return value


def _shallow(value: Any) -> Any:
    """``value``, unless it is nested deeper than ``DEEPEST``."""
    level, layer = 0, [value]
    while layer:
        level += 1
        if level > DEEPEST + 1:
            raise ValueError(f"is nested deeper than {DEEPEST} levels")
        inner = [item for item in layer if isinstance(item, (dict, list))]
        layer = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
    return value


Input = Annotated[Any, BeforeValidator(_input), WithJsonSchema(INPUT_SCHEMA)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Free = Annotated[dict[str, Any], AfterValidator(_shallow)]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_whole)]


class Request(Config):
    """The base of all requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Prompted(Request):
    """How texts are to be read. ``input_type``: what they are (document unless said). ``task``: one of the model's own
    table; ``instruction``: a description of the task in words. ``truncate``: cut a text that is too long (else 400)."""

    input_type: InputType | None = None
    task: str | None = None
    instruction: str | None = None
    truncate: bool = True

    @property
    def is_query(self) -> bool:
        """True when the texts are queries."""
        return self.input_type in ("query", "search_query")


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


class DocumentText(Request):
    """A document to rerank as an object."""

    text: str


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


class SearchRequest(Request):
    """``POST /v1/search``. ``index`` and ``mode`` of None: the first index, and the best it can. ``explain``: with the terms
    that make each score (modes ``sparse`` and ``bm25``, and the better of these where none is given)."""

    query: Text
    index: str | None = None
    mode: Literal["dense", "sparse", "tokens", "bm25", "hybrid"] | None = None
    k: Count = 10
    explain: bool = False
    filter: Free | None = None
    task: str | None = None
    instruction: str | None = None


class NewDocument(Request):
    """A document to add. Without an id it gets one."""

    id: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    text: str
    title: str = ""
    metadata: Free = Field(default_factory=dict)


class AddRequest(Request):
    """``POST /v1/documents``. ``upsert``: replace documents whose id is there already; else that is an error (409)."""

    documents: Annotated[list[NewDocument], Field(min_length=1, fail_fast=True)]
    index: str | None = None
    upsert: bool = False


class DeleteRequest(Request):
    """``DELETE /v1/documents``: all of them or, when one is not there, none (404)."""

    ids: Annotated[list[str], Field(min_length=1, fail_fast=True)]
    index: str | None = None


class ContributionsRequest(Request):
    """``POST /v1/contributions``."""

    text: Text
    index: str | None = None
    model: str | None = None
    input_type: InputType | None = None
    task: str | None = None
    instruction: str | None = None


# ---- answers, for the API's description


class Problem(BaseModel):
    """What is wrong. ``param``: the key; ``code``: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: Problem


class Usage(BaseModel):
    """Tokens encoded, special tokens included."""

    prompt_tokens: int
    total_tokens: int


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
    """A token of the query, the document's that it ``met``, their product, and where both are among the token vectors."""

    term: str
    met: str
    score: float
    share: float
    position: int
    met_position: int


class Hit(BaseModel):
    """A document found. ``snippet``: (start, end) of the part of its text that shows most of the query, in code points.
    ``terms``: with ``explain``, those that made the score, greatest first."""

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


class StoredDocument(BaseModel):
    """A document of an index."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]


class AddAnswer(BaseModel):
    """What was added, durably, and how many documents there are now."""

    added: int
    ids: list[str]
    count: int


class DeleteAnswer(BaseModel):
    """What was deleted, durably, and how many documents are left."""

    deleted: int
    count: int


class HealthAnswer(BaseModel):
    """``ok``, ``draining`` or ``failing``."""

    status: Literal["ok", "draining", "failing"]
    models: list[str]
    indexes: list[str]
