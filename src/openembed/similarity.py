"""Similarities: (queries, documents) → scores in fp32, whatever the input precision or autocast says.

Shapes: Q queries, N documents, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from openembed.representations import Dense, Representation, Sparse

SimilarityName = Literal["cosine", "dot"]
Similarity = Callable[[Representation, Representation], Tensor]
"""(queries, documents) → scores (Q, N)."""


def similarity(name: SimilarityName) -> Similarity:
    """Returns the similarity of that name for representations; it raises ``ValueError`` for a kind it does not compare."""

    def score(queries: Representation, documents: Representation) -> Tensor:
        match queries, documents:
            case (Dense(), Dense()):
                return {"cosine": cosine, "dot": dot}[name](queries.values_ND, documents.values_ND)
            case (Sparse(), Sparse()) if name == "dot":
                return dot(queries.values_NV, documents.values_NV)
        kind = type(queries).__name__.lower()
        raise ValueError(f"similarity {name!r} does not compare {kind} representations; dense: cosine or dot, sparse: dot")

    return score


def dot(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    """Returns the inner products (Q, N) in fp32."""
    with torch.autocast(queries_QD.device.type, enabled=False):
        return queries_QD.float() @ documents_ND.float().T


def cosine(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    """Returns the cosines (Q, N) in fp32; a zero vector scores 0 with everything."""
    normalize = torch.nn.functional.normalize
    return dot(normalize(queries_QD.float(), dim=-1), normalize(documents_ND.float(), dim=-1))
