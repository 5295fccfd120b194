"""A step that orders what another has found by a model that did not index it: documents are encoded when they are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from openembed.config import Config
from openembed.encoded import take
from openembed.index import exact
from openembed.index.encoding import Encoders, encoders_by_kind
from openembed.index.searching import Hits, refuse_string
from openembed.steps.fuse import DEPTH, ranked
from openembed.steps.retrieve import found_before
from openembed.steps.search import Search, Step

if TYPE_CHECKING:
    from openembed.index.store import Store


class RerankConfig(Config):
    """The ``candidates`` first documents of the step before, in order of an encoder's scores; ``k`` of them are kept.

    The index need not have been made with it, nor with vectors of its kind: words alone or a smaller model find, this one
    orders. ``model``: its folder or hub id; None: the encoder given. ``task`` or ``instruction`` chooses its query prompt.
    """

    kind: Literal["rerank"] = "rerank"
    model: str | None = None
    candidates: int = Field(DEPTH, ge=1)
    k: int = Field(DEPTH, ge=1)
    task: str | None = None
    instruction: str | None = None

    def build(self, store: Store, encoder: Encoders = None) -> Step:
        """Returns the step, ``model`` loaded; raises ``ValueError`` where there is neither a model nor one encoder."""
        given = list(encoders_by_kind(encoder).values())
        if self.model is not None:
            from openembed.checkpoints import load

            given = [load(self.model)]
        if len(given) != 1:
            raise ValueError(f"the rerank step needs one encoder, {len(given)} are given; name its model")
        (orders,) = given

        def step(search: Search) -> Search:
            found = found_before(search, self.candidates)
            texts = [query.text for query in search.queries]
            ordered = rerank(store, orders, texts, found, task=self.task, instruction=self.instruction)
            hits = zip(search.queries, ordered, strict=True)
            return replace(search, run={query.id: dict(islice(best.items(), self.k)) for query, best in hits})

        return step


def rerank(
    store: Store,
    encoder: Any,
    queries: Sequence[str],
    candidates: Sequence[Sequence[str]],
    *,
    task: str | None = None,
    instruction: str | None = None,
) -> list[Hits]:
    """Returns each query's candidates (ids of ``store``) in order of ``encoder``'s scores, best first.

    Scores are those of its kind: inner products of vectors and of sparse weights, MaxSim of token vectors. Each document is
    encoded once, however many queries it is a candidate of. Without a shared term it scores 0, without token vectors -inf.
    Raises ``ValueError`` for an id that is not there, or another number of queries than of lists.
    """
    refuse_string(queries, "queries")
    if len(queries) != len(candidates):
        raise ValueError(f"{len(queries)} queries, but candidates of {len(candidates)}")
    for identifiers in candidates:
        refuse_string(identifiers, "each query's candidates")
    places = {name: place for place, name in enumerate(dict.fromkeys(name for names in candidates for name in names))}
    if not places:
        return [{} for _ in queries]
    documents = exact.prepared(encoder.encode_documents([store.document(name).full_text for name in places]))
    asked, found = encoder.encode_queries(queries, task=task, instruction=instruction), []
    for row, names in enumerate(candidates):
        positions = np.array([places[name] for name in names], dtype=np.int64)
        scores = documents.scores(take(asked, [row]), positions).tolist() if len(names) else []
        found.append(ranked(dict(zip(names, scores, strict=True))))
    return found
