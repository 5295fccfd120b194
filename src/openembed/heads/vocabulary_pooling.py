"""Token logits over a vocabulary, activated and pooled over each text, without ever holding the logits.

The plain form keeps ``(T, V)`` logits and their gradient: 1 GB each for 32 texts of 256 tokens and 30,522 words. Both
activations and maximum are monotone, so ``max_t f(z_t) = f(max_t z_t)``: the forward pass walks over the vocabulary and keeps
the largest logit and the token it came from, ``O(B · V)`` memory, and the backward pass sends each gradient to that token
alone, which is the exact gradient (the first of equal tokens wins, as in ``torch.max``).

Shapes: ``T`` tokens, ``B`` texts, ``V`` vocabulary, ``C`` vocabulary entries at a time, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from openembed.kernels import vocabulary as kernels

Activation = Literal["log1p_relu", "log1p_log1p_relu", "elu1p"]
"""``log(1 + relu(z))``; the same once more; ``elu(z) + 1``. All are at least 0 and never fall as z grows."""

LOGITS_HELD = {"cpu": 2**18, "cuda": 2**27}
"""Logits held at a time: few enough for a core's cache and memory, many enough for full-speed products."""

KEPT_BYTES = 2**28
"""A vocabulary that takes more is not kept packed."""

FEW_TOKENS = 24
"""Below so many the plain product is faster without gradients: laying the vocabulary out for the kernel takes longer."""


def activate(logits: Tensor, activation: Activation) -> Tensor:
    """Returns the weights of logits."""
    if activation == "elu1p":
        return F.elu(logits) + 1
    once = torch.log1p(torch.relu(logits))
    return once if activation == "log1p_relu" else torch.log1p(once)


def max_pooled(
    states_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    lengths_B: Sequence[int],
    activation: Activation,
    *,
    half: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    """Returns ``f(max over a text's tokens of (h · W_v + b_v))``, ``(B, V)``, float32 (float64 of float64 states).

    ``lengths_B``: tokens of each text, which lie end to end; a text without any has weight ``f(-inf) = 0`` everywhere. Products
    are of the weight's precision, or autocast's; with ``half``, of bfloat16 where there are kernels for it. Differentiable once
    in states, weight and bias. ``packed``: the weight as the kernels read it, made for such products (:func:`packed_for`).
    """
    if half and not kernels.serves(states_TD, weight_VD, torch.bfloat16):
        half, packed = False, None
    dtype = torch.bfloat16 if half else _product_dtype(states_TD, weight_VD)
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (states_TD, weight_VD, bias_V))
    return _MaxPooled.apply(states_TD, weight_VD, bias_V, tuple(lengths_B), activation, (dtype, wanted, packed))


def packed_for(weight_VD: Tensor, *, half: bool) -> Tensor | None:
    """Returns the weight packed for products in float32, or with ``half`` in bfloat16; None where no kernel serves or it is
    too large to be kept twice. Queries gain: of ten tokens' work, packing 30,000 words is nine tenths."""
    dtype = torch.bfloat16 if half else torch.float32
    if weight_VD.numel() * dtype.itemsize > KEPT_BYTES or not kernels.serves(weight_VD, weight_VD, dtype):
        return None
    return kernels.packed_vocabulary(weight_VD, half=half)


def sum_pooled(
    states_TD: Tensor, weight_VD: Tensor, bias_V: Tensor, lengths_B: Sequence[int], activation: Activation
) -> Tensor:
    """Returns ``sum over a text's tokens of f(h · W_v + b_v)``, ``(B, V)`` float32; the backward pass computes logits again."""
    lengths = torch.tensor(lengths_B, device=states_TD.device)

    def piece(states_TD: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
        logits_TC = _wide(F.linear(states_TD.to(weight_CD.dtype), weight_CD)) + bias_C
        return torch.segment_reduce(activate(logits_TC, activation), "sum", lengths=lengths, axis=0, unsafe=True)

    parts = [
        checkpoint(piece, states_TD, weight_VD[columns], _wide(bias_V[columns]), use_reentrant=False)
        for columns in _columns(len(states_TD), len(weight_VD), states_TD.device)
    ]
    return torch.cat(parts, dim=1)


def working_bytes(pooling: str, tokens: int, weight_VD: Tensor, dtype: torch.dtype) -> int:
    """Returns the most bytes that training holds for a moment: logits of all tokens and a stretch of the vocabulary, gradients.

    ``dtype``: of the products. The kernels hold none, but a float32 copy of a weight that is none.
    """
    if pooling == "max" and kernels.serves(weight_VD, weight_VD, dtype):
        return 0 if weight_VD.dtype == torch.float32 else 4 * weight_VD.numel()
    logits = tokens * min(_step(tokens, weight_VD.device), len(weight_VD))
    wide, narrow = _wide_dtype(dtype).itemsize, 0 if dtype == _wide_dtype(dtype) else dtype.itemsize
    if pooling == "max":  # the gradient of logits, and the logits or that gradient in the precision of products
        return logits * (wide + narrow)
    return logits * (5 * wide + narrow)  # with bias, cut at 0, log: each kept; of the last two a gradient at a time


class _MaxPooled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        lengths_B: tuple[int, ...],
        activation: Activation,
        how: tuple[torch.dtype, bool, Tensor | None],
    ) -> Tensor:
        ctx.activation, (ctx.dtype, wanted, packed) = activation, how  # needs_input_grad is True under no_grad too
        states, weight = states_TD.detach(), weight_VD.detach()
        ctx.offsets_B1 = torch.tensor([0, *accumulate(lengths_B)])
        best_BV, winner_BV = _largest(states, weight, lengths_B, ctx.dtype, wanted, packed)
        values_BV = activate(best_BV.add_(bias_V.detach()), activation)
        if wanted:
            ctx.save_for_backward(states_TD, weight_VD, bias_V, values_BV, winner_BV)
        return values_BV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BV: Tensor) -> tuple[Tensor | None, ...]:
        states_TD, weight_VD, bias_V, values_BV, winner_BV = ctx.saved_tensors
        grad_BV = grad_BV * _slope(values_BV, ctx.activation)
        if kernels.serves(states_TD, weight_VD, ctx.dtype):  # a product each where a gradient is: float32, whatever ctx.dtype
            inputs = states_TD, weight_VD, ctx.offsets_B1
            found = kernels.largest_products_backward(grad_BV, winner_BV, inputs, ctx.needs_input_grad[:2])
            for_states, for_weight = (g if g is None else g.to(x.dtype) for g, x in zip(found, inputs, strict=False))
        else:
            for_states, for_weight = _towards_winners(grad_BV, winner_BV, states_TD, weight_VD, ctx)
        for_bias = grad_BV.sum(0).to(bias_V.dtype) if ctx.needs_input_grad[2] else None
        return for_states, for_weight, for_bias, None, None, None


@torch.library.custom_op("openembed::largest_logits", mutates_args=())
def _largest(
    states_TD: Tensor,
    weight_VD: Tensor,
    lengths_B: Sequence[int],
    dtype: torch.dtype,
    wanted: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each text's largest product with each row of the weight ``(B, V)``, and its token (int32; empty if not ``wanted``).

    One operation, so that its memory can be counted on shapes alone.
    """
    enough = wanted or packed is not None or len(states_TD) >= FEW_TOKENS
    enough = enough or dtype == torch.bfloat16  # torch would round the products themselves
    if enough and kernels.serves(states_TD, weight_VD, dtype):
        offsets_B1, half = torch.tensor([0, *accumulate(lengths_B)]), dtype == torch.bfloat16
        options = {"winners": wanted, "half": half, "packed": packed}
        best_BV, winner_BV = kernels.largest_products(states_TD, weight_VD, offsets_B1, **options)
        return best_BV, torch.empty(0, dtype=torch.int32) if winner_BV is None else winner_BV
    best_BV, winner_BV = _results(states_TD, weight_VD, lengths_B, dtype, wanted)
    best_BV.fill_(float("-inf"))
    states_TD = states_TD.to(dtype)
    for columns in _columns(len(states_TD), len(weight_VD), states_TD.device):
        logits_TC = states_TD @ weight_VD[columns].to(dtype).T
        _largest_of(logits_TC, lengths_B, best_BV[:, columns], winner_BV[:, columns] if wanted else None)
        del logits_TC  # before the next ones are made
    return best_BV, winner_BV


def _largest_of(logits_TC: Tensor, lengths_B: Sequence[int], best_BC: Tensor, winner_BC: Tensor | None) -> None:
    """Writes each text's largest logits and their tokens."""
    for text, start, count, length in _runs(lengths_B):
        pieces, texts = logits_TC[start : start + count * length].unflatten(0, (count, length)), slice(text, text + count)
        if winner_BC is None:
            best_BC[texts] = pieces.amax(1)
            continue
        best_BC[texts], place = pieces.max(1)
        starts = torch.arange(start, start + count * length, length, device=place.device)
        winner_BC[texts] = (place + starts[:, None]).int()


@_largest.register_fake
def _results(
    states_TD: Tensor,
    weight_VD: Tensor,
    lengths_B: Sequence[int],
    dtype: torch.dtype,
    wanted: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Where the results go: of the right shapes, without values; winners are token 0."""
    shape = len(lengths_B), len(weight_VD)
    winner_BV = states_TD.new_zeros(shape if wanted else 0, dtype=torch.int32)
    return states_TD.new_empty(shape, dtype=_wide_dtype(dtype)), winner_BV


def _towards_winners(
    grad_BV: Tensor, winner_BV: Tensor, states_TD: Tensor, weight_VD: Tensor, ctx: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of states and weight. A token and a word meet at most once: a chunk's gradient of logits is a scatter."""
    for_states = torch.zeros_like(states_TD, dtype=_wide_dtype(ctx.dtype)) if ctx.needs_input_grad[0] else None
    for_weight = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
    given_TD = states_TD.to(ctx.dtype)
    if not len(given_TD):
        return for_states, None if for_weight is None else for_weight.zero_()
    for columns in _columns(len(states_TD), len(weight_VD), states_TD.device):
        grad_TC = grad_BV.new_zeros(len(states_TD), columns.stop - columns.start)
        grad_TC.scatter_add_(0, winner_BV[:, columns].long(), grad_BV[:, columns])  # texts without tokens add their zeros
        grad_TC = grad_TC.to(ctx.dtype)
        if for_states is not None:
            for_states += grad_TC @ weight_VD[columns].to(ctx.dtype)
        if for_weight is not None:
            for_weight[columns] = (grad_TC.T @ given_TD).to(for_weight.dtype)
        del grad_TC  # before the next one is made
    return None if for_states is None else for_states.to(states_TD.dtype), for_weight


def _slope(values: Tensor, activation: Activation) -> Tensor:
    """df/dz, told from f(z)."""
    if activation == "elu1p":
        return values.clamp_max(1)
    if activation == "log1p_relu":
        return torch.exp(-values) * (values > 0)
    return torch.exp(-values - torch.expm1(values)) * (values > 0)


def _columns(tokens: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Stretches of the vocabulary whose logits may be held at once."""
    step = _step(tokens, device)
    for first in range(0, vocabulary, step):
        yield slice(first, min(first + step, vocabulary))


def _step(tokens: int, device: torch.device) -> int:
    return max(256, LOGITS_HELD.get(device.type, LOGITS_HELD["cpu"]) // max(1, tokens))


def _runs(lengths_B: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first text, its first token, texts, their length) of each stretch of neighbouring texts of equal length above 0."""
    text = start = 0
    for length, members in groupby(lengths_B):
        count = len(list(members))
        if length:
            yield text, start, count, length
        text, start = text + count, start + count * length


def _product_dtype(states: Tensor, weight: Tensor) -> torch.dtype:
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_dtype(values.dtype))
