"""Attention over packed texts on a CPU as one differentiable operation, opaque to ``torch.compile``.

The plain path slices the stream into runs of texts of equal length, and autograd then fills a gradient of the whole
stream with zeros for every slice and adds them up. Here forward and backward walk over the runs themselves and write each
piece once. The kernels are PyTorch's own CPU flash attention; results are those of the plain path.

Shapes: ``T`` tokens, ``H`` query heads, ``K`` key/value heads, ``d`` head width, ``B`` texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def serves(query_HTd: Tensor) -> bool:
    """True when the kernel takes such queries: on a CPU, in float32 or bfloat16."""
    return query_HTd.device.type == "cpu" and query_HTd.dtype in (torch.float32, torch.bfloat16)


def attention(
    query_HTd: Tensor, key_KTd: Tensor, value_KTd: Tensor, offsets_B1: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """Returns ``(T, H, d)``: softmax(q kᵀ · scale) v inside each text ``offsets[i]:offsets[i + 1]``; no dropout."""
    groups = query_HTd.shape[0] // key_KTd.shape[0]
    if groups > 1:  # the backward kernel knows no shared heads
        key_KTd, value_KTd = key_KTd.repeat_interleave(groups, 0), value_KTd.repeat_interleave(groups, 0)
    scale = query_HTd.shape[-1] ** -0.5 if scale is None else scale
    out_THd, _ = _forward(query_HTd, key_KTd, value_KTd, offsets_B1, causal, scale)
    return out_THd


# torch keeps compiled graphs on disk under the names of these operations: a new signature needs a new name.
@torch.library.custom_op("openembed::packed_attention", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``(T, H, d)`` and the logarithms of the softmax's denominators ``(H, T)``."""
    heads, tokens, width = query.shape
    out_THd, sums_HT = query.new_empty(tokens, heads, width), query.new_empty(heads, tokens, dtype=torch.float32)
    for start, length, count in _runs(offsets):
        pieces = [_cut(x, start, length, count) for x in (query, key, value)]
        out, sums = FLASH(*pieces, 0.0, causal and length > 1, scale=scale)
        stop = start + length * count
        out_THd[start:stop].view(count, length, heads, width).copy_(out.transpose(1, 2))
        _cut(sums_HT, start, length, count).copy_(sums)
    return out_THd, sums_HT


@torch.library.custom_op("openembed::packed_attention_backward", mutates_args=())
def _backward(
    grad_THd: Tensor, inputs: Sequence[Tensor], out_THd: Tensor, sums_HT: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (``inputs``), each ``(H, T, d)``."""
    query, key, value = inputs
    heads, tokens, width = query.shape
    # Laid out (T, H, d) in memory, as the projections before it produce them.
    results = [query.new_empty(tokens, heads, width).transpose(0, 1) for _ in range(3)]
    grad_HTd, out_HTd = grad_THd.transpose(0, 1), out_THd.transpose(0, 1)
    for start, length, count in _runs(offsets):
        pieces = [_cut(x, start, length, count) for x in (grad_HTd, query, key, value, out_HTd)]
        sums_piece = _cut(sums_HT, start, length, count)
        found = FLASH_BACKWARD(*pieces, sums_piece, 0.0, causal and length > 1, scale=scale)
        for result, piece in zip(results, found, strict=True):
            _cut(result, start, length, count).copy_(piece)
    return results[0], results[1], results[2]


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    heads, tokens, width = query.shape
    return query.new_empty(tokens, heads, width), query.new_empty(heads, tokens, dtype=torch.float32)


@_backward.register_fake
def _(
    grad_THd: Tensor, inputs: Sequence[Tensor], out_THd: Tensor, sums_HT: Tensor, offsets: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads, tokens, width = inputs[0].shape
    query = inputs[0]
    first, second, third = (query.new_empty(tokens, heads, width).transpose(0, 1) for _ in range(3))
    return first, second, third


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001 (torch's own signature)
    query, key, value, offsets, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, offsets)


def _differentiate(ctx, grad: Tensor, _sums: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    query, key, value, out, sums, offsets = ctx.saved_tensors
    grads = _backward(grad, [query, key, value], out, sums, offsets, ctx.causal, ctx.scale)
    return (*grads, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _runs(offsets: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, length, count) of each stretch of neighbouring texts of equal length."""
    edges = offsets.tolist()
    start, length, count = 0, edges[1] - edges[0], 0
    for first, last in pairwise(edges):
        if last - first != length:
            yield start, length, count
            start, length, count = first, last - first, 0
        count += 1
    yield start, length, count


def _cut(x: Tensor, start: int, length: int, count: int) -> Tensor:
    """``(heads, T, …)`` → a view ``(count, heads, length, …)`` of one stretch."""
    return x[:, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)
