"""Similarities: (queries, documents) → scores in fp32, whatever the input precision or autocast says.

Shapes: Q queries, N documents, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dot(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    """Returns the inner products (Q, N) in fp32."""
    with torch.autocast(queries_QD.device.type, enabled=False):
        return queries_QD.float() @ documents_ND.float().T


def cosine(queries_QD: Tensor, documents_ND: Tensor) -> Tensor:
    """Returns the cosines (Q, N) in fp32; a zero vector scores 0 with everything."""
    normalize = torch.nn.functional.normalize
    return dot(normalize(queries_QD.float(), dim=-1), normalize(documents_ND.float(), dim=-1))
