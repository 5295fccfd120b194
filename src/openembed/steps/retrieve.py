"""Steps that rank a store's documents for each query."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from openembed.config import Config
from openembed.steps.search import Search, Step

if TYPE_CHECKING:
    from openembed.encoder import Encoder
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

    def build(self, store: Store, encoder: Encoder | None = None) -> Step:
        """Returns the step; raises ``ValueError`` without an encoder or with another than the store's."""
        if encoder is None:
            raise ValueError("the dense step needs the encoder that made the store's vectors")
        store.check_encoder(encoder)

        def step(search: Search) -> Search:
            queries_QD = encoder.encode_queries(
                [query.text for query in search.queries],
                task=self.task,
                instruction=self.instruction,
                normalize=store.model.normalize,
                max_length=store.model.max_length,
            )
            return _with_hits(search, store.dense(queries_QD, self.k, filter=self.filter, exact=self.exact))

        return step


class Bm25Config(Config):
    """The k documents of greatest BM25 score for each query; needs no encoder."""

    kind: Literal["bm25"] = "bm25"
    k: int = Field(100, ge=1)
    filter: dict[str, Any] | None = None

    def build(self, store: Store, encoder: Encoder | None = None) -> Step:
        """Returns the step."""

        def step(search: Search) -> Search:
            return _with_hits(search, store.bm25([query.text for query in search.queries], self.k, filter=self.filter))

        return step


RetrieveConfig = Annotated[DenseConfig | Bm25Config, Field(discriminator="kind")]


def _with_hits(search: Search, hits: list[dict[str, float]]) -> Search:
    run = {query.id: found for query, found in zip(search.queries, hits, strict=True)}
    return replace(search, run=run)
