"""What a sparse model makes of a text: the terms of its vocabulary that weigh most."""

from __future__ import annotations

from dataclasses import dataclass

from openembed.encoder import Encoder


@dataclass(frozen=True)
class Term:
    """An entry of the vocabulary, its weight, its share of all weight of the text, and whether the text itself has it."""

    token: str
    weight: float
    share: float
    own: bool


@dataclass(frozen=True)
class Terms:
    """The heaviest terms of a text, heaviest first, and how many weights above 0 it has."""

    top: tuple[Term, ...]
    count: int


def top_terms(encoder: Encoder, text: str, k: int = 20, *, query: bool = False, instruction: str | None = None) -> Terms:
    """Returns the ``k`` heaviest terms of ``text``, encoded as a document or as a query; equal weights by token id.

    Raises ``ValueError`` for a model that gives no weights over a vocabulary.
    """
    if encoder.kind != "sparse":
        raise ValueError(f"terms are weights over a vocabulary, and this model's representations are {encoder.kind}")
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    encode = encoder.encode_queries if query else encoder.encode_documents
    found = encode([text], instruction=instruction)
    order = sorted(range(found.nnz), key=lambda place: (-found.data[place], found.indices[place]))[:k]
    prompt = (encoder.query_prompt if query else encoder.document_prompt)(instruction=instruction)
    rows = encoder.tokenize([text], prompt)
    own = set(rows.ids[0][rows.pool_starts[0] :].tolist())
    if (fold_V := getattr(encoder.head, "fold_V", None)) is not None:
        own = {int(fold_V[token]) for token in own}
    total = float(found.data.sum())
    name = encoder.tokenizer.backend.id_to_token
    top = [(int(found.indices[place]), float(found.data[place])) for place in order]
    return Terms(tuple(Term(name(i) or str(i), weight, weight / total, i in own) for i, weight in top), found.nnz)
