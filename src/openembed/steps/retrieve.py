"""Steps that rank a store's documents for each query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from openembed.config import Config
from openembed.encoded import Encoded
from openembed.index.encoding import Encoders, encoders_by_kind, kind_of
from openembed.index.manifest import Kind
from openembed.index.tokens.methods import EXACT, Exact, Method
from openembed.steps.search import Search, Step

if TYPE_CHECKING:
    from openembed.index.store import Store


class DenseConfig(Config):
    """The k documents nearest to each query's vector; ``task`` or ``instruction`` chooses the query's prompt.

    ``filter``: a condition on metadata, see ``openembed.index.filters``. ``exact``: as in ``Store.dense``.
    """

    kind: Literal["dense"] = "dense"
    k: int = Field(100, ge=1)
    task: str | None = None
    instruction: str | None = None
    filter: dict[str, Any] | None = None
    exact: bool | None = None

    def build(self, store: Store, encoder: Encoders = None) -> Step:
        """Returns the step; raises ``ValueError`` without an encoder or with another than the store's."""
        dense = _encoder_of("dense", store, encoder)

        def step(search: Search) -> Search:
            queries_QD = _encoded(dense, self, store, search)
            return _with_hits(search, store.dense(queries_QD, self.k, filter=self.filter, exact=self.exact))

        return step


class SparseConfig(Config):
    """The k documents of greatest product with each query's sparse vector; exact.

    ``task`` or ``instruction`` chooses the query's prompt, ``filter``: a condition on metadata.
    """

    kind: Literal["sparse"] = "sparse"
    k: int = Field(100, ge=1)
    task: str | None = None
    instruction: str | None = None
    filter: dict[str, Any] | None = None

    def build(self, store: Store, encoder: Encoders = None) -> Step:
        """Returns the step; raises ``ValueError`` without an encoder or with another than the store's."""
        sparse = _encoder_of("sparse", store, encoder)

        def step(search: Search) -> Search:
            queries_QV = _encoded(sparse, self, store, search)
            return _with_hits(search, store.sparse(queries_QV, self.k, filter=self.filter))

        return step


class Bm25Config(Config):
    """The k documents of greatest BM25 score for each query; needs no encoder."""

    kind: Literal["bm25"] = "bm25"
    k: int = Field(100, ge=1)
    filter: dict[str, Any] | None = None

    def build(self, store: Store, encoder: Encoders = None) -> Step:
        """Returns the step."""

        def step(search: Search) -> Search:
            return _with_hits(search, store.bm25([query.text for query in search.queries], self.k, filter=self.filter))

        return step


class TokensConfig(Config):
    """The k documents of greatest MaxSim with each query's token vectors: exactly, or by another ``method``.

    With ``candidates``, exact MaxSim orders only what the step before has found for a query, at most so many documents.
    """

    kind: Literal["tokens"] = "tokens"
    k: int = Field(100, ge=1)
    candidates: int | None = Field(None, ge=1)
    method: Method = Field(EXACT, exclude_if=lambda method: method == EXACT)
    task: str | None = None
    instruction: str | None = None
    filter: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_condition(self) -> TokensConfig:
        if self.candidates is not None and self.filter is not None:
            raise ValueError("filter chooses documents of the whole index; with candidates, give it to the step before")
        if self.candidates is not None and not isinstance(self.method, Exact):
            raise ValueError(f"method {self.method.kind} searches the whole index; candidates are ordered by exact MaxSim")
        return self

    def build(self, store: Store, encoder: Encoders = None) -> Step:
        """Returns the step; raises ``ValueError`` without the store's encoder and for a method it cannot serve."""
        tokens = _encoder_of("tokens", store, encoder)
        store.check_method(self.method)

        def step(search: Search) -> Search:
            queries = _encoded(tokens, self, store, search)
            if self.candidates is None:
                return _with_hits(search, store.tokens(queries, self.k, filter=self.filter, method=self.method))
            ordered = store.rerank(queries, found_before(search, self.candidates))
            return _with_hits(search, [dict(islice(hits.items(), self.k)) for hits in ordered])

        return step


RetrieveConfig = Annotated[DenseConfig | SparseConfig | TokensConfig | Bm25Config, Field(discriminator="kind")]


def found_before(search: Search, count: int) -> list[list[str]]:
    """Returns the first ``count`` documents that the step before has found for each query; ``ValueError`` where none was."""
    if any(query.id not in search.run for query in search.queries):
        raise ValueError(
            "candidates are what a step before has found, and there is none; put a dense, sparse or bm25 step first"
        )
    return [list(search.run[query.id])[:count] for query in search.queries]


def _encoder_of(kind: Kind, store: Store, given: Encoders) -> Any:
    """Returns the encoder of a kind, checked to be the store's."""
    encoder = encoders_by_kind(given).get(kind)
    if encoder is None:
        raise ValueError(f"the {kind} step needs the encoder that made the store's {kind} vectors")
    store.check_encoder(encoder)
    return encoder


def encoded_queries(
    store: Store, encoder: Any, texts: Sequence[str], task: str | None = None, instruction: str | None = None
) -> Encoded:
    """Returns queries as the store's model of the encoder's kind has them."""
    model = store.models[kind_of(encoder)]
    options: dict[str, Any] = {"normalize": model.normalize} if model.kind == "dense" else {}
    return encoder.encode_queries(texts, task=task, instruction=instruction, max_length=model.max_length, **options)


def _encoded(encoder: Any, config: DenseConfig | SparseConfig | TokensConfig, store: Store, search: Search) -> Encoded:
    return encoded_queries(store, encoder, [query.text for query in search.queries], config.task, config.instruction)


def _with_hits(search: Search, hits: list[dict[str, float]]) -> Search:
    run = {query.id: found for query, found in zip(search.queries, hits, strict=True)}
    return replace(search, run=run)
