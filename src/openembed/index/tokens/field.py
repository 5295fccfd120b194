"""Token vectors as one of the kinds of vectors a store's segments hold: writing, opening, giving back, taking apart.

This is what a store asks of a kind of vectors, and no more; how they are searched is in ``search``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openembed.index.tokens.files import TokenCoding, TokenSegment, TokenSettings, TokenWriter
from openembed.progress import progress
from openembed.token_vectors import TokenVectors

logger = logging.getLogger(__name__)


class TokenModel(Protocol):
    """What is asked of a store's model: how wide its token vectors are, and how they are kept and coded."""

    width: int
    precision: Any
    coding: TokenCoding


class TokenFieldWriter:
    """Writes the token vectors of a fresh segment."""

    def __init__(self, directory: Path, model: TokenModel) -> None:
        self._writer = TokenWriter(directory, model.width, TokenSettings(precision=model.precision, **dict(model.coding)))
        self._coding, self._tokens = model.coding, 0

    def add(self, ids: Sequence[str], vectors: TokenVectors) -> None:
        """Appends the token vectors of these documents; raises ``ValueError`` naming one whose vectors cannot be kept."""
        if isinstance(vectors, TokenVectors) and len(vectors) != len(ids):
            raise ValueError(f"got token vectors of {len(vectors)} documents for {len(ids)}; nothing was added")
        self._writer.add(vectors, lambda row: f"document {ids[row]!r}")
        self._tokens += len(vectors.values_TD)

    def close(self) -> dict[str, Any]:
        """Writes what is left, and of a large segment its coded tokens; the segment says the rest of itself."""
        usual, coding = TokenCoding(), self._coding
        coded = bool(coding.bits) and self._tokens >= coding.coded_from
        if not coded and (coding.bits, coding.keep_vectors) not in ((0, True), (usual.bits, usual.keep_vectors)):
            logger.warning(
                "%s tokens are fewer than coded_from (%s): this segment keeps its vectors and is not coded; "
                "coded_from=1 (--coded-from 1) codes every one",
                f"{self._tokens:,}",
                f"{coding.coded_from:,}",
            )
        with progress("cluster", self._tokens, "tokens", show=coded) as advance:
            self._writer.close(advance)
        return {}


class TokenField:
    """The token vectors of a segment. Raises ``ValueError`` for files that are missing, damaged or of another width."""

    writer = TokenFieldWriter

    def __init__(self, directory: Path, info: Any, model: TokenModel) -> None:
        self.segment = TokenSegment(directory, info.count)
        if self.segment.info.width != model.width:
            path = directory / "tokens.json"
            raise ValueError(f"{path}: width {self.segment.info.width} where the model has {model.width}; build the index anew")

    def empty(self) -> np.ndarray:
        """Returns which documents have no token vector, bool (N)."""
        return self.segment.offsets_N1[1:] == self.segment.offsets_N1[:-1]

    def rows(self, positions_P: np.ndarray) -> TokenVectors:
        """Returns the token vectors of these documents."""
        return self.segment.vectors(np.asarray(positions_P, dtype=np.int64))

    @staticmethod
    def take(vectors: TokenVectors, rows: np.ndarray | slice) -> TokenVectors:
        """Returns the token vectors of some texts."""
        return vectors[rows] if isinstance(rows, slice) else vectors.select(rows)

    @staticmethod
    def join(parts: Sequence[TokenVectors]) -> TokenVectors:
        """Returns the token vectors of all texts, one after the other."""
        starts = np.cumsum([0, *(len(part.values_TD) for part in parts)])
        offsets = [part.offsets_N1[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
        values_TD = np.concatenate([part.values_TD for part in parts])
        return TokenVectors(values_TD, np.concatenate([*offsets, starts[-1:]]).astype(np.int64))

    @staticmethod
    def each(vectors: TokenVectors) -> Iterator[np.ndarray]:
        """Yields float32 (tokens, D) of each text."""
        return iter(vectors)
