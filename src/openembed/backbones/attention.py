"""Attention over packed texts, for any model of transformers, through its own attention-function registry.

A flat stream of ``T`` tokens holds many texts; every token sees only its own text, and within it every token
(bidirectional) or the tokens up to itself (causal). Because this function decides what is visible, a decoder becomes
bidirectional by construction, whatever mask its own code would have built (NV-Embed, arXiv 2405.17428, section 3.1).

Shapes: ``T`` tokens, ``H`` query heads, ``K`` key/value heads, ``d`` head width, ``B`` texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openembed.backbones import packed_kernel
from openembed.packing import Layout, Run

ATTENTION_NAME = "openembed_packed"


@dataclass(frozen=True)
class Visibility:
    """Which tokens a token may see inside its own text, and how scores are shaped.

    ``window``: at most this far back (causal: fewer than ``window``; bidirectional: at most ``window`` either way, as
    transformers defines its sliding windows). ``softcap``: scores become ``softcap · tanh(scores / softcap)`` (Gemma 2).
    ``sinks_H``: one extra logit a head that takes part in the softmax and has no value (gpt-oss).
    """

    causal: bool
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


def packed_attention(
    query_HTd: Tensor,
    key_KTd: Tensor,
    value_KTd: Tensor,
    layout: Layout,
    visibility: Visibility,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Returns ``(T, H, d)``: softmax(q kᵀ · scale) v inside each text of ``layout``; texts never see one another.

    Neighbouring texts of equal length are computed in one call. On a GPU in half precision one variable-length flash
    kernel serves the whole stream when nothing but causality restricts the view; training on a CPU has its own kernel too.
    """
    if not query_HTd.dtype == key_KTd.dtype == value_KTd.dtype:  # under autocast, rotary positions leave float32 behind
        query_HTd, key_KTd = query_HTd.to(value_KTd.dtype), key_KTd.to(value_KTd.dtype)
    if _plain(visibility, dropout) and layout.attended_B is None:
        if _flash_serves(query_HTd):
            return _flash_varlen(query_HTd, key_KTd, value_KTd, layout, visibility.causal, scale)
        if torch.is_grad_enabled() and packed_kernel.serves(query_HTd):
            offsets_B1, causal = layout.offsets_B1, visibility.causal
            return packed_kernel.attention(query_HTd, key_KTd, value_KTd, offsets_B1, causal=causal, scale=scale)
    pieces, first = [], 0
    for run in layout.runs:
        seen = None if layout.attended_B is None else layout.attended_B[first : first + run.count]
        visible = _visible(run.length, visibility, seen, query_HTd.device)
        pieces.append(_run_attention(run, query_HTd, key_KTd, value_KTd, visibility, visible, scale, dropout))
        first += run.count
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _run_attention(
    run: Run,
    query_HTd: Tensor,
    key_KTd: Tensor,
    value_KTd: Tensor,
    view: Visibility,
    visible: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Attention of ``count`` texts of ``length`` tokens as one batch; returns ``(count · length, H, d)``."""
    query, key, value = (
        x[:, run.start : run.stop].unflatten(1, (run.count, run.length)).transpose(0, 1)
        for x in (query_HTd, key_KTd, value_KTd)
    )
    if view.softcap is None and view.sinks_H is None:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=dropout,
            is_causal=view.causal and visible is None and run.length > 1,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    else:
        out = _explicit_attention(query, key, value, view, visible, scale, dropout)
    return out.transpose(1, 2).reshape(run.count * run.length, out.shape[1], out.shape[3])


def _explicit_attention(
    query: Tensor, key: Tensor, value: Tensor, view: Visibility, visible: Tensor | None, scale: float | None, dropout: float
) -> Tensor:
    """Attention written out, for soft-capped scores and attention sinks; inputs ``(n, heads, L, d)``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if view.softcap is not None:
        scores = view.softcap * torch.tanh(scores / view.softcap)
    length = query.shape[2]
    if view.causal and visible is None:
        visible = _window_mask(length, length, True, query.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    scores = scores.float()
    if view.sinks_H is None:
        weights = scores.softmax(-1)
    else:
        sinks = view.sinks_H.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, length, 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]
    return F.dropout(weights.to(value.dtype), dropout) @ value


def _visible(length: int, view: Visibility, attended: Tensor | None, device: torch.device) -> Tensor | None:
    """What restricts the view beyond causality, bool broadcastable to ``(count, heads, L, L)``; None where nothing does."""
    window = view.window if view.window is not None and view.window < length else None
    mask = None if window is None else _window_mask(length, window, view.causal, device)
    if attended is None:
        return mask
    seen = (torch.arange(length, device=device) < attended[:, None])[:, None, None]
    if mask is None and view.causal:
        mask = _window_mask(length, length, True, device)
    return seen.expand(-1, -1, length, -1) if mask is None else seen & mask


def _window_mask(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """True where position ``i`` may see ``j``, ``(L, L)``; window conventions are those of transformers' masks."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window) if causal else distance.abs() <= window


def _plain(view: Visibility, dropout: float) -> bool:
    return view.window is None and view.softcap is None and view.sinks_H is None and dropout == 0.0


def _flash_serves(query_HTd: Tensor) -> bool:
    return query_HTd.is_cuda and query_HTd.dtype in (torch.float16, torch.bfloat16) and query_HTd.shape[-1] <= 256


def _flash_varlen(
    query_HTd: Tensor, key_KTd: Tensor, value_KTd: Tensor, layout: Layout, causal: bool, scale: float | None
) -> Tensor:
    """PyTorch's variable-length flash kernel: one call for all texts, no mask, no padding."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (x.transpose(0, 1).contiguous() for x in (query_HTd, key_KTd, value_KTd))
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    offsets, longest = layout.offsets_B1, layout.max_length
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scale, window_size=window)


def transformers_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer: ``(1, heads, T, d)`` in, ``(1, T, H, d)`` out.

    ``layout`` and ``bidirectional`` reach it as keyword arguments of the model's forward. Raises ``RuntimeError`` where
    a family's code does not hand them on; the load-time probe then runs that family without packing.
    """
    layout, bidirectional = kwargs.get("layout"), kwargs.get("bidirectional")
    if layout is None or bidirectional is None:
        raise RuntimeError(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    view = Visibility(
        causal=not bidirectional,
        window=_window(module, kwargs.get("sliding_window"), bidirectional),
        softcap=kwargs.get("softcap"),
        sinks_H=kwargs.get("s_aux"),
    )
    out_THd = packed_attention(
        query[0], key[0], value[0], layout, view, scale=scaling, dropout=dropout if module.training else 0.0
    )
    return out_THd.unsqueeze(0), None


def _window(module: nn.Module, given: int | None, bidirectional: bool) -> int | None:
    """The window of a layer. ModernBERT's family hands its layers one more than its masks allow, as flash attention counts."""
    own = getattr(getattr(module, "config", None), "sliding_window", None)
    return min(given, own) if given is not None and own is not None and bidirectional else given


def install_attention() -> str:
    """Makes :func:`transformers_attention` known to transformers and returns the name to load models with."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, transformers_attention)
    return ATTENTION_NAME
