"""Token vectors of texts as arrays: what multi-vector encoders give and indexes take.

Shapes: ``N`` texts, ``T`` tokens of all texts together, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


def positions(texts: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Returns int64 positions of ``count`` texts: those given, or where a mask, one value a text, is true.

    Raises ``ValueError`` for a mask of another length.
    """
    texts = np.asarray(texts)
    if texts.dtype != bool:
        return texts.astype(np.int64)
    if texts.shape != (count,):
        raise ValueError(f"a mask of shape {texts.shape} for {count} texts; give one value a text, or positions")
    return np.flatnonzero(texts)


@dataclass(frozen=True)
class TokenVectors:
    """A matrix a text: ``values_TD`` of all texts end to end, text ``i`` in rows ``offsets_N1[i]`` to ``offsets_N1[i + 1]``.

    Raises ``ValueError`` when the offsets do not fit the values.
    """

    values_TD: np.ndarray
    offsets_N1: np.ndarray

    def __post_init__(self) -> None:
        offsets = self.offsets_N1
        if self.values_TD.ndim != 2:
            raise ValueError(f"token vectors are a matrix (tokens, width); got shape {self.values_TD.shape}")
        if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(self.values_TD):
            raise ValueError(f"offsets must run from 0 to the {len(self.values_TD)} token vectors given")
        if (np.diff(offsets) < 0).any():
            raise ValueError("offsets must not decrease")

    @classmethod
    def from_list(cls, matrices: Sequence[np.ndarray], width: int | None = None) -> TokenVectors:
        """Returns matrices ``(tokens, D)`` end to end; ``width`` is needed when there are none.

        Raises ``ValueError`` when they differ in width.
        """
        widths = {matrix.shape[1] for matrix in matrices} or {width}
        if len(widths) > 1 or None in widths:
            raise ValueError(f"matrices of widths {sorted(map(str, widths))}; they must agree, and none needs a width")
        offsets_N1 = np.concatenate([[0], np.cumsum([len(matrix) for matrix in matrices])]).astype(np.int64)
        empty = np.empty((0, widths.pop()), dtype=np.float32)
        return cls(np.concatenate([empty, *matrices]), offsets_N1)

    @property
    def width(self) -> int:
        """The number of dimensions of each vector."""
        return self.values_TD.shape[1]

    @property
    def lengths_N(self) -> np.ndarray:
        """The number of token vectors of each text."""
        return np.diff(self.offsets_N1)

    def __len__(self) -> int:
        return len(self.offsets_N1) - 1

    @overload
    def __getitem__(self, text: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, text: slice) -> TokenVectors: ...

    def __getitem__(self, text: int | slice) -> np.ndarray | TokenVectors:
        """Returns the vectors of one text, or the texts of a slice, without a copy where the slice has no step."""
        if isinstance(text, slice):
            low, high, step = text.indices(len(self))
            if step != 1:
                return self.select(range(low, high, step))
            offsets_N1 = self.offsets_N1[low : max(low, high) + 1]
            return TokenVectors(self.values_TD[offsets_N1[0] : offsets_N1[-1]], offsets_N1 - offsets_N1[0])
        text = range(len(self))[text]
        return self.values_TD[self.offsets_N1[text] : self.offsets_N1[text + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[text] for text in range(len(self)))

    def select(self, texts: Sequence[int] | np.ndarray) -> TokenVectors:
        """Returns the texts at these positions, in that order, or those where a mask is true; see :func:`positions`."""
        texts = positions(texts, len(self))
        lengths_N = self.lengths_N[texts]
        offsets_N1 = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64)
        places_T = np.arange(offsets_N1[-1]) + np.repeat(self.offsets_N1[:-1][texts] - offsets_N1[:-1], lengths_N)
        return TokenVectors(self.values_TD[places_T], offsets_N1)
