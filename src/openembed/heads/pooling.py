"""Heads without weights of their own: mean, position-weighted mean, last token and first token.

Shapes: ``T`` tokens, ``B`` texts, ``D`` width. Pooling runs in float32 whatever the hidden states' precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from openembed.config import Config
from openembed.packing import Packed


class MeanConfig(Config):
    """Mean over the pooled tokens of each text."""

    kind: Literal["mean"] = "mean"

    def build(self, width: int) -> Mean:
        """Returns the head for hidden states of ``width``."""
        return Mean(width)


class WeightedMeanConfig(Config):
    """Mean weighted by position (1, 2, 3, …; SGPT, arXiv 2202.08904, equation 2): later tokens of a causal model saw more."""

    kind: Literal["weighted_mean"] = "weighted_mean"

    def build(self, width: int) -> WeightedMean:
        """Returns the head for hidden states of ``width``."""
        return WeightedMean(width)


class LastTokenConfig(Config):
    """The last token of each text: its end-of-sequence token where the tokenizer appends one."""

    kind: Literal["last_token"] = "last_token"

    def build(self, width: int) -> LastToken:
        """Returns the head for hidden states of ``width``."""
        return LastToken(width)


class ClsConfig(Config):
    """The first token of each text (BERT's [CLS]).

    ``after_instruction``: the first pooled token, which follows a left-out instruction (sentence-transformers' meaning
    where prompts are not pooled).
    """

    kind: Literal["cls"] = "cls"
    after_instruction: bool = False

    def build(self, width: int) -> Cls:
        """Returns the head for hidden states of ``width``."""
        return Cls(width, after_instruction=self.after_instruction)


class MaxConfig(Config):
    """Largest value of each dimension over the pooled tokens."""

    kind: Literal["max"] = "max"

    def build(self, width: int) -> Max:
        """Returns the head for hidden states of ``width``."""
        return Max(width)


class MeanSqrtConfig(Config):
    """Sum over the pooled tokens divided by the square root of their number."""

    kind: Literal["mean_sqrt_length"] = "mean_sqrt_length"

    def build(self, width: int) -> MeanSqrt:
        """Returns the head for hidden states of ``width``."""
        return MeanSqrt(width)


PlainKind = Literal["cls", "max", "mean", "mean_sqrt_length", "weighted_mean", "last_token"]


class ConcatConfig(Config):
    """Several weightless heads side by side (sentence-transformers' combined pooling modes)."""

    kind: Literal["concat"] = "concat"
    parts: tuple[PlainKind, ...]

    def build(self, width: int) -> Concat:
        """Returns the head for hidden states of ``width``; its own width is ``len(parts)`` times that."""
        return Concat(self, width)


def mean_pool(hidden_TD: Tensor, packed: Packed, weights_T: Tensor | None = None) -> Tensor:
    """Returns the (weighted) mean of each text's pooled tokens, ``(B, D)`` float32."""
    mask_T = packed.pool_mask_T
    weights_T = mask_T.float() if weights_T is None else weights_T * mask_T
    sums_BD = segment_sum(hidden_TD.float() * weights_T[:, None], packed)
    totals_B = segment_sum(weights_T[:, None], packed)
    return sums_BD / totals_B


def segment_sum(values_TD: Tensor, packed: Packed) -> Tensor:
    """Returns the sum over each text's tokens, ``(B, D)``; deterministic on every device."""
    return torch.segment_reduce(values_TD, "sum", lengths=packed.lengths_B, axis=0, unsafe=True)


class Mean(nn.Module):
    """Mean over the pooled tokens, ``(B, D)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        return mean_pool(hidden_TD, packed)


class WeightedMean(Mean):
    """Mean with weights 1, 2, 3, … along each text."""

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        return mean_pool(hidden_TD, packed, (packed.positions_T + 1).float())


class LastToken(Mean):
    """The last token's state."""

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        return hidden_TD[packed.layout.offsets_B1[1:].long() - 1].float()


class Cls(Mean):
    """The first token's state, or that of the first pooled token."""

    def __init__(self, width: int, *, after_instruction: bool = False) -> None:
        super().__init__(width)
        self.after_instruction = after_instruction

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        first_B = packed.layout.offsets_B1[:-1].long()
        return hidden_TD[first_B + packed.pool_starts_B if self.after_instruction else first_B].float()


class Max(Mean):
    """The largest pooled value of each dimension."""

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        visible_TD = hidden_TD.float().masked_fill(~packed.pool_mask_T[:, None], float("-inf"))
        return torch.segment_reduce(visible_TD, "max", lengths=packed.lengths_B, axis=0, unsafe=True)


class MeanSqrt(Mean):
    """The pooled sum over the square root of the pooled count."""

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        weights_T = packed.pool_mask_T.float()
        sums_BD = segment_sum(hidden_TD.float() * weights_T[:, None], packed)
        return sums_BD / segment_sum(weights_T[:, None], packed).sqrt()


class Concat(nn.Module):
    """Several heads' outputs side by side, ``(B, parts · D)``."""

    def __init__(self, config: ConcatConfig, width: int) -> None:
        super().__init__()
        kinds = (ClsConfig, MaxConfig, MeanConfig, MeanSqrtConfig, WeightedMeanConfig, LastTokenConfig)
        by_kind = {kind.model_fields["kind"].default: kind for kind in kinds}
        self.parts = nn.ModuleList(by_kind[part]().build(width) for part in config.parts)
        self.width = width * len(config.parts)

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, parts · D)`` float32."""
        return torch.cat([part(hidden_TD, packed) for part in self.parts], dim=1)
