"""Similarities: (queries, documents) → scores in fp32, whatever the input precision or autocast says.

Shapes: Q queries, N documents, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from openembed.late_interaction import maxsim, xtr
from openembed.representations import Dense, Representation, Sparse, Tokens

SimilarityName = Literal["cosine", "dot", "maxsim", "mean_maxsim", "xtr", "xtr_pylate"]
Similarity = Callable[[Representation, Representation], Tensor]
"""(queries, documents) → scores (Q, N)."""


def similarity(name: SimilarityName, k: int = 256) -> Similarity:
    """Returns the similarity of that name for representations; it raises ``ValueError`` for a kind it does not compare.

    ``k``: document tokens that a query token retrieves, of ``xtr`` alone.
    """

    def score(queries: Representation, documents: Representation) -> Tensor:
        match queries, documents:
            case (Dense(), Dense()) if name in ("cosine", "dot"):
                return {"cosine": cosine, "dot": dot}[name](queries.values_ND, documents.values_ND)
            case (Sparse(), Sparse()) if name == "dot":
                return dot(queries.values_NV, documents.values_NV)
            case (Tokens(), Tokens()) if name in ("xtr", "xtr_pylate"):
                return xtr(queries, documents, k, variant="paper" if name == "xtr" else "pylate")
            case (Tokens(), Tokens()) if name in ("maxsim", "mean_maxsim"):
                return maxsim(queries, documents, mean=name == "mean_maxsim")
        kind = type(queries).__name__.lower()
        raise ValueError(
            f"similarity {name!r} does not compare {kind} representations; dense: cosine or dot, sparse: dot, "
            "tokens: maxsim, mean_maxsim, xtr or xtr_pylate"
        )

    return score


def dot(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    """Returns the inner products (Q, N) in fp32."""
    with torch.autocast(queries_QD.device.type, enabled=False):
        return queries_QD.float() @ documents_ND.float().T


def cosine(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    """Returns the cosines (Q, N) in fp32; a zero vector scores 0 with everything."""
    normalize = torch.nn.functional.normalize
    return dot(normalize(queries_QD.float(), dim=-1), normalize(documents_ND.float(), dim=-1))
