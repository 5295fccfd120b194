"""What encoders produce and similarities compare: one vector a text, weights over the vocabulary, or a vector a token.

Shapes: N texts, D width, V vocabulary, T tokens of all texts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["dense", "sparse", "tokens"]
"""What a head makes of a text."""


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
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values_ND.device

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


@dataclass(frozen=True)
class Sparse:
    """Weights over the vocabulary, at least 0: ``values_NV``. Most are 0 once a model is trained.

    ``bag_NV`` (bool) marks each text's own tokens, where the head says which of them count.
    """

    values_NV: Tensor
    bag_NV: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values_NV.ndim != 2:
            raise ValueError(f"Sparse holds a matrix (texts, vocabulary); got shape {tuple(self.values_NV.shape)}")
        if self.bag_NV is not None and self.bag_NV.shape != self.values_NV.shape:
            raise ValueError(f"a bag of shape {tuple(self.bag_NV.shape)} for weights of {tuple(self.values_NV.shape)}")

    def __len__(self) -> int:
        return self.values_NV.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.values_NV.device

    @property
    def width(self) -> int:
        """The size of the vocabulary."""
        return self.values_NV.shape[1]

    def select(self, indices: Tensor) -> Sparse:
        """Returns the texts at ``indices``, in that order."""
        return Sparse(self.values_NV[indices], None if self.bag_NV is None else self.bag_NV[indices])


@dataclass(frozen=True)
class Tokens:
    """One vector a kept token: ``values_TD`` of all texts end to end; text ``i`` has ``lengths_N[i]`` of them (int64)."""

    values_TD: Tensor
    lengths_N: Tensor

    def __post_init__(self) -> None:
        if self.values_TD.ndim != 2 or self.lengths_N.ndim != 1 or int(self.lengths_N.sum()) != len(self.values_TD):
            raise ValueError(
                f"Tokens holds a matrix (tokens, width) and the number of tokens of each text; got shape "
                f"{tuple(self.values_TD.shape)} and {int(self.lengths_N.sum())} tokens"
            )

    def __len__(self) -> int:
        return len(self.lengths_N)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.values_TD.device

    @property
    def width(self) -> int:
        """The number of dimensions of each vector."""
        return self.values_TD.shape[1]

    def select(self, indices: Tensor) -> Tokens:
        """Returns the texts at ``indices``, in that order."""
        lengths_N = self.lengths_N[indices]
        starts_N = (self.lengths_N.cumsum(0) - self.lengths_N)[indices]
        within_T = torch.arange(int(lengths_N.sum()), device=self.device)
        within_T = within_T - torch.repeat_interleave(lengths_N.cumsum(0) - lengths_N, lengths_N)
        return Tokens(self.values_TD[torch.repeat_interleave(starts_N, lengths_N) + within_T], lengths_N)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Returns ``(N, longest, D)`` with zeros behind each text, and which places are tokens: bool ``(N, longest)``."""
        longest = int(self.lengths_N.max()) if len(self) else 0
        mask_NL = torch.arange(longest, device=self.device) < self.lengths_N[:, None]
        padded_NLD = self.values_TD.new_zeros(len(self), longest, self.width)
        return padded_NLD.masked_scatter(mask_NL[..., None], self.values_TD), mask_NL


Representation = Dense | Sparse | Tokens
