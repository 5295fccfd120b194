"""Encoding documents with the models of a store: one encoder, or one of each kind.

An encoder says by its ``kind`` what it gives; one that says nothing gives dense vectors. Vectors say it by what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import issparse

from openembed.index.fields import FIELDS, Vectors
from openembed.index.manifest import EncodesDocuments, Kind, ModelInfo
from openembed.index.sparse import in_rows
from openembed.records import Document
from openembed.token_vectors import TokenVectors

AT_ONCE = 1024


class VectorToken(NamedTuple):
    """The token of a token vector: its name, and its characters (start, end) of the text; None where it is not of the text."""

    name: str
    span: tuple[int, int] | None


Encoders = EncodesDocuments | Iterable[EncodesDocuments] | None
"""One encoder, or one of each kind that a store has."""


def kind_of(encoder: Any) -> Kind:
    """Returns which vectors an encoder gives."""
    return getattr(encoder, "kind", "dense")


def encoders_by_kind(given: Encoders) -> dict[Kind, EncodesDocuments]:
    """Returns encoders by what they give; raises ``ValueError`` for two of one kind."""
    encoders = [] if given is None else [given] if hasattr(given, "encode_documents") else list(given)
    found = {kind_of(encoder): encoder for encoder in encoders}
    if len(found) < len(encoders):
        raise ValueError(f"{len(encoders)} encoders, but of {len(found)} kinds ({', '.join(found)}); give one of each kind")
    return found


def vectors_by_kind(given: Vectors | Mapping[Kind, Vectors] | None) -> dict[Kind, Vectors]:
    """Returns vectors by kind: a matrix is dense, a sparse matrix sparse; others come in a mapping that says it."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {kind: in_rows(vectors) if issparse(vectors) else vectors for kind, vectors in given.items()}
    if isinstance(given, TokenVectors):
        return {"tokens": given}
    return {"dense": given} if isinstance(given, np.ndarray) else {"sparse": in_rows(given) if issparse(given) else given}


def term_names(encoder: Any) -> Callable[[int], str]:
    """Returns how a term of a sparse encoder is called: by its tokenizer's token, and by its number where there is none."""
    backend = getattr(getattr(encoder, "tokenizer", None), "backend", None)
    return str if backend is None else lambda term: backend.id_to_token(term) or str(term)


def vector_tokens(
    encoder: Any, texts: Sequence[str], prompt: str, max_length: int | None, *, queries: bool
) -> list[list[VectorToken] | None]:
    """Returns for each text under a literal ``prompt`` the tokens that its token vectors are of, called as by ``term_names``.

    None for a text whose vectors are pooled, and for all where the encoder does not say it.
    """
    places_of = getattr(getattr(encoder, "head", None), "places_of", None)
    if places_of is None:
        return [None] * len(texts)
    name, limit = term_names(encoder), encoder.row_limit(max_length)
    rows = encoder.tokenize(texts, prompt, max_length, queries=np.full(len(texts), queries) if encoder.sided else None)
    found: list[list[VectorToken] | None] = []
    for text, ids, places in zip(texts, rows.ids, places_of(rows), strict=True):
        if places is None:
            found.append(None)
            continue
        spans = dict(enumerate(encoder.tokenizer.offsets(text, prompt, limit, query=queries)))
        found.append([VectorToken(name(int(ids[place])), spans.get(place)) for place in places.tolist()])
    return found


def count_of(vectors: Vectors) -> int:
    """Returns of how many documents these are."""
    return vectors.shape[0] if hasattr(vectors, "shape") else len(vectors)


def encoded(model: ModelInfo, encoder: EncodesDocuments, documents: Sequence[Document]) -> Vectors:
    """Returns the vectors of documents as this store has them, a part at a time."""
    options: dict[str, Any] = {"instruction": model.document_instruction, "max_length": model.max_length}
    if model.kind == "dense":
        options["normalize"] = model.normalize
    texts = [document.full_text for document in documents]
    parts = [encoder.encode_documents(texts[start : start + AT_ONCE], **options) for start in range(0, len(texts), AT_ONCE)]
    return parts[0] if len(parts) == 1 else FIELDS[model.kind].join(parts)
