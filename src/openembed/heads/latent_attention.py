"""Latent attention pooling: every token attends to a learned dictionary of latents, then tokens are averaged.

NV-Embed (arXiv 2405.17428, section 3.2). Two variants: ``nvembed`` is what the released checkpoints compute (learned
query, key, value and output projections, pre-norms, residuals and a gated feed-forward); ``paper`` is the text of the
paper (``softmax(Q Kᵀ) V`` with K = V = latents, Q = hidden states, then a two-layer MLP with GELU). Tokens never see one
another here, so the head is a map on single tokens followed by the masked mean.

Shapes: ``T`` tokens, ``D`` width, ``L`` latents, ``H`` heads, ``d`` head width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from openembed.config import Config
from openembed.heads.pooling import mean_pool
from openembed.packing import Packed
from openembed.versions import version


class LatentAttentionConfig(Config):
    """``latents`` learned vectors, ``heads`` attention heads of ``head_width`` each (None: the model's width, as released)."""

    kind: Literal["latent_attention"] = "latent_attention"
    variant: Literal["nvembed", "paper"] = "nvembed"
    latents: int = Field(512, gt=0)
    heads: int = Field(8, gt=0)
    head_width: int | None = Field(None, gt=0)
    expansion: int = Field(4, gt=0)

    def build(self, width: int) -> LatentAttention | PaperLatentAttention:
        """Returns the head for hidden states of ``width``."""
        return PaperLatentAttention(self, width) if self.variant == "paper" else LatentAttention(self, width)


class GatedFeedForward(nn.Module):
    """``W2 (value · GELU(gate)) + b2`` with ``[value; gate] = W1 x + b1`` (value first), ``(T, D)`` to ``(T, D)``."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Returns ``(T, D)``."""
        value, gate = self.up(x_TD).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class LatentAttention(nn.Module):
    """The released head: pre-norm cross-attention to the latents and a gated feed-forward, each with a residual."""

    def __init__(self, config: LatentAttentionConfig, width: int) -> None:
        super().__init__()
        self.config, self.width = config, width
        inner = config.heads * (config.head_width or width)
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.norm = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = GatedFeedForward(width, config.expansion)
        self._folded: tuple[tuple[object, ...], Tensor, Tensor] | None = None

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        return mean_pool(self.token_states(hidden_TD, packed), packed)

    def token_states(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns what is averaged, ``(T, D)``; folded weights are used when no gradient is wanted (the same to 1e-5)."""
        states_TD = hidden_TD.to(self.latents.dtype)
        folded = not self.training and not torch.is_grad_enabled()
        if not folded:
            self._folded = None  # training changes it at every step
        attended_TD = self._attend_folded(states_TD) if folded else self._attend(states_TD)
        states_TD = attended_TD + states_TD
        return self.feed_forward(self.norm_feed_forward(states_TD)) + states_TD

    def _attend(self, states_TD: Tensor) -> Tensor:
        """Cross-attention as trained: queries from tokens, keys and values from the latents."""
        heads, count = self.config.heads, len(states_TD)
        query_HTd = self.to_q(self.norm(states_TD)).view(count, heads, -1).transpose(0, 1)
        key_LI, value_LI = self.to_kv(self.norm_latents(self.latents)).chunk(2, dim=-1)
        key_HLd, value_HLd = (x.view(len(self.latents), heads, -1).transpose(0, 1) for x in (key_LI, value_LI))
        scores_HTL = query_HTd @ key_HLd.transpose(1, 2) * query_HTd.shape[-1] ** -0.5
        out_HTd = scores_HTL.float().softmax(-1).to(value_HLd.dtype) @ value_HLd
        return self.to_out(out_HTd.transpose(0, 1).reshape(count, -1))

    def _attend_folded(self, states_TD: Tensor) -> Tensor:
        """The same with keys, values and projections multiplied out: two ``(H·L, D)`` matrices instead of four large ones."""
        score_weights, value_weights = self.folded()
        scores = (self.norm(states_TD) @ score_weights.T).view(len(states_TD), self.config.heads, -1)
        return scores.float().softmax(-1).to(value_weights.dtype).flatten(1) @ value_weights

    def folded(self) -> tuple[Tensor, Tensor]:
        """Returns ``A`` and ``B``, both ``(H·L, D)``: ``A_h = K_h Wq_h / √d``, ``B_h = V_h Wo_hᵀ``.

        They are kept until a weight changes or a pass is made with gradients. At the released size this replaces 536.9 M
        parameters by 33.6 M, exactly to rounding.
        """
        sources = (
            self.latents,
            self.to_q.weight,
            self.to_kv.weight,
            self.to_out.weight,
            *self.norm_latents.parameters(),
        )
        versions = version(*sources)
        if self._folded is None or self._folded[0] != versions:
            with torch.no_grad():
                self._folded = (versions, *self._fold())
        return self._folded[1], self._folded[2]

    def _fold(self) -> tuple[Tensor, Tensor]:
        heads, latents, dtype = self.config.heads, len(self.latents), self.latents.dtype
        context = self.norm_latents(self.latents)
        key_LI, value_LI = F.linear(context, self.to_kv.weight).float().chunk(2, dim=-1)
        key_HLd, value_HLd = (x.view(latents, heads, -1).transpose(0, 1) for x in (key_LI, value_LI))
        query_HdD = self.to_q.weight.float().view(heads, -1, self.width)
        out_HdD = self.to_out.weight.float().T.reshape(heads, -1, self.width)
        score_weights = key_HLd @ query_HdD * query_HdD.shape[1] ** -0.5
        return score_weights.flatten(0, 1).to(dtype), (value_HLd @ out_HdD).flatten(0, 1).to(dtype)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_folded": None}


class PaperLatentAttention(nn.Module):
    """The head as the paper prints it: ``O = softmax(Q Kᵀ) V`` with K = V = latents, an MLP with GELU, then the mean."""

    def __init__(self, config: LatentAttentionConfig, width: int) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(f"head.heads {config.heads} must divide the model's width {width} in the paper variant")
        self.config, self.width = config, width
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.up = nn.Linear(width, config.expansion * width)
        self.down = nn.Linear(config.expansion * width, width)

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        return mean_pool(self.token_states(hidden_TD, packed), packed)

    def token_states(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns what is averaged, ``(T, D)``."""
        heads = self.config.heads
        query_HTd = hidden_TD.to(self.latents.dtype).view(len(hidden_TD), heads, -1).transpose(0, 1)
        latents_HLd = self.latents.view(len(self.latents), heads, -1).transpose(0, 1)
        weights_HTL = (query_HTd @ latents_HLd.transpose(1, 2)).float().softmax(-1).to(latents_HLd.dtype)
        out_TD = (weights_HTL @ latents_HLd).transpose(0, 1).reshape(len(hidden_TD), -1)
        return self.down(F.gelu(self.up(out_TD)))
