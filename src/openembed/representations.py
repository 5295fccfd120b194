"""What encoders produce and similarities compare.

Shapes: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """One vector a text: ``values_ND``."""

    values_ND: Tensor

    def __post_init__(self) -> None:
        if self.values_ND.ndim != 2:
            raise ValueError(f"Dense holds a matrix (texts, width); got shape {tuple(self.values_ND.shape)}")

    def __len__(self) -> int:
        return self.values_ND.shape[0]

    @property
    def width(self) -> int:
        """The number of dimensions of each vector."""
        return self.values_ND.shape[1]

    def select(self, indices: Tensor) -> Dense:
        """Returns the vectors at ``indices``, in that order."""
        return Dense(self.values_ND[indices])

    def normalized(self) -> Dense:
        """Returns the vectors at unit length in fp32; a zero vector stays zero, with finite gradient."""
        return Dense(torch.nn.functional.normalize(self.values_ND.float(), dim=-1))

    def truncated(self, width: int) -> Dense:
        """Returns the first ``width`` dimensions, not renormalised; raises ``ValueError`` when there are fewer."""
        if not 0 < width <= self.width:
            raise ValueError(f"cannot truncate vectors of width {self.width} to {width}; choose 1 to {self.width}")
        return Dense(self.values_ND[:, :width])

    @staticmethod
    def concat(parts: Sequence[Dense]) -> Dense:
        """Returns all vectors of ``parts`` below one another."""
        return Dense(torch.cat([part.values_ND for part in parts]))
