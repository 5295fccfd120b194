"""What each token gives to the vector of its text, before projections.

The pooled vector is a weighted sum of token states, ``p = Σ w_t s_t``. A token's contribution is the part of ``p`` it makes in
the direction of ``p``: ``c_t = w_t (s_t · p) / (p · p)``. So contributions sum to 1; one that points away is negative.
``s_t`` are the hidden states for mean pooling and, for latent and self-attention pooling, what is averaged after the head's
own layers. With cls or last-token pooling the one token has 1. Max pooling takes each dimension from one token:
``c_t = Σ p_d² / (p · p)`` over the dimensions taken from ``t``. Heads side by side share by their part of ``p · p``.

Shapes: ``T`` tokens of one text, ``D`` width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openembed.encoder import Encoder
from openembed.heads.pooling import Cls, Concat, LastToken, Max, MeanSqrt, WeightedMean
from openembed.packing import Packed, pack


@dataclass(frozen=True)
class Token:
    """A token of a row: its characters ``start:end`` of the text (code points, equal where it has none), and its weight."""

    text: str
    start: int
    end: int
    weight: float
    pooled: bool


def contributions(encoder: Encoder, text: str, instruction: str = "", max_length: int | None = None) -> list[Token]:
    """Returns the tokens of a text's row with their contributions, which sum to 1.

    ``instruction`` is the literal prefix; its tokens are seen and, as a rule, not pooled: their weight is 0. Raises what
    :meth:`Encoder.encode` raises, and ``ValueError`` for a pooled vector of length 0.
    """
    rows = encoder.tokenize([text], instruction, max_length)
    spans = encoder.tokenizer.offsets(text, instruction, encoder.row_limit(max_length))
    packed = pack(rows, device=encoder.device)
    with torch.inference_mode():
        shares_T = shares(encoder.head, encoder.backbone(packed), packed).cpu()
        pooled_T = pooled(encoder.head, packed).cpu()
    names = encoder.tokenizer.backend
    tokens = []
    for identifier, span, weight, is_pooled in zip(
        rows.ids[0].tolist(), spans, shares_T.tolist(), pooled_T.tolist(), strict=True
    ):
        start, end = span or (0, 0)
        shown = text[start:end] if span else names.id_to_token(identifier) or ""
        tokens.append(Token(shown, start, end, weight, is_pooled))
    return tokens


def shares(head: nn.Module, hidden_TD: Tensor, packed: Packed) -> Tensor:
    """Returns the contributions of the tokens of one text, ``(T,)`` float64, which sum to 1."""
    parts = head.parts if isinstance(head, Concat) else [head]
    shares_T = torch.stack([_share(part, hidden_TD, packed) for part in parts]).sum(0)
    total = shares_T.sum()
    if not total > 0:
        raise ValueError("the pooled vector of this text has length 0, so no token has a share of it")
    return shares_T / total


def pooled(head: nn.Module, packed: Packed) -> Tensor:
    """Returns which tokens of one text the head pools, ``(T,)`` bool."""
    parts = head.parts if isinstance(head, Concat) else [head]
    return torch.stack([_pooled(part, packed) for part in parts]).any(0)


def _pooled(head: nn.Module, packed: Packed) -> Tensor:
    if not isinstance(head, Cls | LastToken):
        return packed.pool_mask_T
    first = int(packed.pool_starts_B[0]) if isinstance(head, Cls) and head.after_instruction else 0
    chosen = first if isinstance(head, Cls) else len(packed.ids_T) - 1
    return packed.positions_T == chosen


def _share(head: nn.Module, hidden_TD: Tensor, packed: Packed) -> Tensor:
    """The contributions of one head times the squared length ``p · p`` of what it pools."""
    mask_T = _pooled(head, packed)
    states_TD = head.token_states(hidden_TD, packed) if hasattr(head, "token_states") else hidden_TD
    states_TD = states_TD.double()
    if isinstance(head, Max):
        values_D, places_D = states_TD.masked_fill(~mask_T[:, None], float("-inf")).max(0)
        shares_T = torch.zeros(len(states_TD), dtype=torch.float64, device=states_TD.device)
        return shares_T.index_add_(0, places_D, values_D.square())
    weights_T = mask_T.double() * ((packed.positions_T + 1) if isinstance(head, WeightedMean) else 1)
    divisor = weights_T.sum().sqrt() if isinstance(head, MeanSqrt) else weights_T.sum()
    states_TD = states_TD * (weights_T / divisor)[:, None]
    return states_TD @ states_TD.sum(0)
