"""Rerankers: a query and documents in, scores out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

Scale = Literal["cosine", "lexical", "probability", "log_odds"]
"""What scores mean: a share of a score has a meaning on all but ``log_odds``, whose zero is no absence of likeness."""


class Reranker(Protocol):
    """Scores documents for one query, the higher the better. ``name`` says which model it is."""

    name: str
    scale: Scale

    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Returns float32 (N,), one score a document."""
        ...
