"""Self-attention pooling, the paper's ablation of latent attention: tokens attend to one another, then are averaged.

NV-Embed (arXiv 2405.17428, section 5 and its pooling ablation). The paper gives no equations for it; this takes the
latent block with the latents replaced by the text's own tokens: pre-norm multi-head attention and a gated feed-forward,
each with a residual, then the masked mean.

Shapes: ``T`` tokens, ``D`` width, ``H`` heads, ``d`` head width.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from openembed.backbones.attention import Visibility, packed_attention
from openembed.config import Config
from openembed.heads.latent_attention import GatedFeedForward
from openembed.heads.pooling import mean_pool
from openembed.packing import Packed


class SelfAttentionConfig(Config):
    """``heads`` attention heads of ``width / heads`` each over the tokens of a text, both ways."""

    kind: Literal["self_attention"] = "self_attention"
    heads: int = Field(8, gt=0)
    expansion: int = Field(4, gt=0)

    def build(self, width: int) -> SelfAttention:
        """Returns the head for hidden states of ``width``."""
        return SelfAttention(self, width)


class SelfAttention(nn.Module):
    """One bidirectional transformer block over each text, then the mean of its pooled tokens."""

    def __init__(self, config: SelfAttentionConfig, width: int) -> None:
        super().__init__()
        if width % config.heads:
            raise ValueError(f"head.heads {config.heads} must divide the model's width {width}")
        self.config, self.width = config, width
        self.norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = GatedFeedForward(width, config.expansion)

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns ``(B, D)`` float32."""
        return mean_pool(self.token_states(hidden_TD, packed), packed)

    def token_states(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns what is averaged, ``(T, D)``."""
        states_TD = hidden_TD.to(self.to_qkv.weight.dtype)
        query, key, value = (
            x.view(len(states_TD), self.config.heads, -1).transpose(0, 1)
            for x in self.to_qkv(self.norm(states_TD)).chunk(3, dim=-1)
        )
        out_THd = packed_attention(query, key, value, packed.layout, Visibility(causal=False))
        states_TD = self.to_out(out_THd.flatten(1)) + states_TD
        return self.feed_forward(self.norm_feed_forward(states_TD)) + states_TD
