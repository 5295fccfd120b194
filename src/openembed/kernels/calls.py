"""The kernels' functions over torch tensors.

Shapes: ``T`` tokens, ``K`` inputs and ``N`` outputs of a linear layer, ``D`` width, ``d`` head width. All tensors are
contiguous CPU tensors; whoever builds a structure keeps its tensors alive.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openembed.kernels.library import library

BLOCK = 64
STORE, CODES, ADD_NORM = range(3)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "silu", "relu")


class _Codes(Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("stride", c_int64),
        ("factors", c_void_p),
    )


class _Linear(Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("scale", c_void_p),
        ("colsum", c_void_p),
        ("bias", c_void_p),
        ("K", c_int32),
        ("N", c_int32),
    )


class _Input(Structure):
    _fields_ = (("values", c_void_p), ("codes", _Codes), ("stride", c_int64))


class _Ending(Structure):
    _fields_ = (
        ("activation", c_int32),
        ("gated", c_int32),
        ("ending", c_int32),
        ("centred", c_int32),
        ("post_norm", c_int32),
        ("epsilon", c_float),
        ("out", c_void_p),
        ("stride", c_int64),
        ("residual", c_void_p),
        ("gain", c_void_p),
        ("bias", c_void_p),
        ("codes", _Codes),
        ("also", _Codes),
        ("outputs", c_int32),
    )


class _Attention(Structure):
    _fields_ = (
        ("qkv", c_void_p),
        ("stride", c_int64),
        ("out", c_void_p),
        ("offsets", c_void_p),
        ("texts", c_int32),
        ("heads", c_int32),
        ("groups", c_int32),
        ("width", c_int32),
        ("scale", c_float),
        ("causal", c_int32),
        ("half", c_int32),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("rotary", c_int32),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("epsilon", c_float),
    )


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / sqrt(variance + epsilon) * gain + bias``; the root-mean-square norm where not ``centred``."""

    gain_D: Tensor
    bias_D: Tensor | None
    epsilon: float
    centred: bool

    @property
    def sizes_D(self) -> Tensor:
        """How large its results are: three standard deviations and the mean."""
        sizes_D = 3 * self.gain_D.abs()
        return sizes_D if self.bias_D is None else sizes_D + self.bias_D.abs()


@dataclass(frozen=True)
class Codes:
    """Rows as unsigned bytes: ``factors · x ≈ scale · (codes − zero)`` with one scale and one zero point a row."""

    codes_TK: Tensor
    scale_T: Tensor
    zero_T: Tensor
    factors_K: Tensor | None

    @classmethod
    def empty(cls, rows: int, width: int, factors_K: Tensor | None = None) -> Codes:
        """Returns room for ``rows`` rows of ``width`` values."""
        padded = -(-width // 4) * 4
        codes_TK = torch.empty(rows, padded, dtype=torch.uint8)
        return cls(codes_TK, torch.empty(rows), torch.empty(rows, dtype=torch.int32), factors_K)

    def struct(self) -> _Codes:
        """Returns the C view."""
        pointers = (_pointer(t) for t in (self.codes_TK, self.scale_T, self.zero_T))
        return _Codes(*pointers, self.codes_TK.shape[1], _pointer(self.factors_K))


Rows = Tensor | Codes
"""Input of a linear layer: float32 rows, or their codes."""


class PackedLinear:
    """``y = x Wᵀ + b`` with its weights laid out for the kernel, as float32 or as 8-bit codes with a scale an output.

    ``gated``: ``weight`` is two stacked matrices, gate and value; ``y = activation(gate) · value`` has half the outputs.
    ``sizes_K``: how large each input is expected to be. int8 then evens inputs and weights out (SmoothQuant,
    arXiv 2211.10438, without its calibration): inputs are to be coded times ``factors_K``, and weights are divided by it.
    """

    def __init__(
        self,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        *,
        int8: bool,
        activation: str = "none",
        gated: bool = False,
        sizes_K: Tensor | None = None,
    ) -> None:
        weight_NK = weight_NK.detach().float()
        self.factors_K = evened(weight_NK, sizes_K) if int8 and sizes_K is not None else None
        weight_NK = weight_NK if self.factors_K is None else weight_NK / self.factors_K
        self.int8, self.gated, self.activation = int8, gated, ACTIVATIONS.index(activation)
        self.inputs, self.outputs = weight_NK.shape[1], len(weight_NK) // 2 if gated else len(weight_NK)
        order = _order(len(weight_NK), gated)
        weight_NK, bias_N = _arranged(weight_NK, order), None if bias_N is None else _arranged(bias_N.detach().float(), order)
        self._tensors = (*(_pack_int8(weight_NK) if int8 else (_pack_float32(weight_NK), None, None)), bias_N)
        pointers = [_pointer(t) for t in self._tensors]
        self._struct = _Linear(*pointers, -(-self.inputs // 4) * 4 if int8 else self.inputs, len(order))

    @property
    def padded(self) -> int:
        """Width of a row of ``y`` as the kernel writes it: a whole number of blocks."""
        return self._struct.N // (2 if self.gated else 1)

    def store(self, x: Rows) -> Tensor:
        """Returns ``activation(x Wᵀ + b)``, float32 ``(T, padded)``; columns past ``outputs`` hold nothing."""
        return self.store_in(torch.empty(_count(x), self.padded), 0, x)

    def store_in(self, out_TN: Tensor, column: int, x: Rows) -> Tensor:
        """Writes ``activation(x Wᵀ + b)`` to ``padded`` columns of ``out`` from ``column`` on, and returns ``out``."""
        place = out_TN.data_ptr() + column * out_TN.element_size()
        self._run(x, self._ending(STORE, out=place, stride=out_TN.shape[1]))
        return out_TN

    def codes(self, x: Rows) -> Codes:
        """Returns ``activation(x Wᵀ + b)`` as codes."""
        found = Codes.empty(_count(x), self.outputs)
        self._run(x, self._ending(CODES, codes=found.struct()))
        return found

    def add_norm(
        self, x: Rows, residual_TD: Tensor, norm: Norm, then: Sequence[PackedLinear], *, post_norm: bool
    ) -> tuple[Rows, ...]:
        """Adds ``y`` to the residual stream in place and returns its norm as each layer of ``then`` takes it.

        ``then`` may be empty: float32. ``post_norm``: the norm becomes the residual stream itself.
        """
        ending = self._ending(ADD_NORM, residual=residual_TD.data_ptr(), post_norm=int(post_norm), **_norm_fields(norm))
        found = _results(ending, residual_TD, then, in_place=post_norm)
        self._run(x, ending)
        return found

    def _ending(self, kind: int, **fields: Any) -> _Ending:
        return _Ending(activation=self.activation, gated=int(self.gated), ending=kind, outputs=self.outputs, **fields)

    def _run(self, x: Rows, ending: _Ending) -> None:
        given = _Input(None, x.struct(), 0) if isinstance(x, Codes) else _Input(x.data_ptr(), _Codes(), x.shape[1])
        threads = torch.get_num_threads()
        _check(
            _kernels().oe_linear(byref(self._struct), byref(given), c_int64(_count(x)), byref(ending), int(self.int8), threads)
        )


def norm_rows(x_TD: Tensor, norm: Norm, then: Sequence[PackedLinear]) -> tuple[Rows, ...]:
    """Returns the norm of every row as each layer of ``then`` takes it."""
    ending = _Ending(outputs=x_TD.shape[1], **_norm_fields(norm))
    found = _results(ending, x_TD, then, in_place=False)
    _check(_kernels().oe_norm(c_void_p(x_TD.data_ptr()), c_int64(len(x_TD)), byref(ending)))
    return found


def taken(x_TK: Tensor, then: PackedLinear) -> Rows:
    """Returns the rows in the form ``then`` takes."""
    return quantize(x_TK, then.factors_K) if then.int8 else x_TK


def quantize(x_TK: Tensor, factors_K: Tensor | None = None) -> Codes:
    """Returns the rows as codes; a value is at most half a step (range / 510) away from its code."""
    found, (rows, width) = Codes.empty(*x_TK.shape, factors_K), x_TK.shape
    arguments = c_void_p(x_TK.data_ptr()), c_int64(rows), width, c_int64(width), byref(found.struct())
    _kernels().oe_quantize(*arguments, torch.get_num_threads())
    return found


def evened(weight_NK: Tensor, sizes_K: Tensor) -> Tensor:
    """Returns the factors for inputs that spread the range of inputs over inputs and weights, ``(K,)``.

    ``weight^0.9 / size^0.1`` with each input's root-mean-square weight. The shares were chosen on all-MiniLM-L6-v2, where
    0 to 0.4 for the size differ little in the mean and beyond that lose.
    """
    weight_K = weight_NK.square().mean(0).sqrt().clamp_min(1e-8)
    factors_K = weight_K**0.9 / sizes_K.clamp_min(1e-8) ** 0.1
    return (factors_K / factors_K.mean()).clamp_(1e-3, 1e3).contiguous()


@dataclass(frozen=True)
class Heads:
    """The shape of an attention layer, and what is done to queries and keys before their products."""

    heads: int
    groups: int
    width: int
    scale: float
    query_norm_d: Tensor | None = None
    key_norm_d: Tensor | None = None
    epsilon: float = 0.0


def attention(
    qkv_TN: Tensor, offsets_B1: Tensor, heads: Heads, *, causal: bool, half: bool, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Returns ``(T, H·d)``: softmax(q kᵀ · scale) v inside each text; ``half``: products in bfloat16.

    ``qkv_TN`` holds in each row the query, key and value heads. ``rotary``: cosines and sines ``(T, r)`` of the first
    ``r`` dimensions, whose halves are turned.
    """
    out = torch.empty(len(qkv_TN), heads.heads * heads.width)
    cosine, sine = rotary or (None, None)
    if cosine is not None and cosine.shape[1] > heads.width:
        raise ValueError(f"rotary positions for {cosine.shape[1]} dimensions, but heads are {heads.width} wide")
    struct = _Attention(
        qkv_TN.data_ptr(),
        qkv_TN.shape[1],
        out.data_ptr(),
        offsets_B1.data_ptr(),
        len(offsets_B1) - 1,
        heads.heads,
        heads.groups,
        heads.width,
        heads.scale,
        int(causal),
        int(half and has_half()),
        *(_pointer(t) for t in (cosine, sine)),
        0 if cosine is None else cosine.shape[1],
        *(_pointer(t) for t in (heads.query_norm_d, heads.key_norm_d)),
        heads.epsilon,
    )
    _check(_kernels().oe_attention(byref(struct), torch.get_num_threads()))
    return out


def has_half() -> bool:
    """True where products in bfloat16 are compiled in."""
    return bool(_kernels().oe_has_half())


def _kernels() -> ctypes.CDLL:
    found = library()
    assert found is not None, "ask library() first"
    return found


def _check(result: int) -> None:
    if result:
        raise MemoryError("no memory for a kernel's working space; use a smaller token budget")


def _count(x: Rows) -> int:
    return len(x.codes_TK) if isinstance(x, Codes) else len(x)


def _norm_fields(norm: Norm) -> dict[str, Any]:
    fields = {"gain": _pointer(norm.gain_D), "bias": _pointer(norm.bias_D)}
    return {**fields, "epsilon": norm.epsilon, "centred": int(norm.centred)}


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _results(ending: _Ending, stream_TD: Tensor, then: Sequence[PackedLinear], *, in_place: bool) -> tuple[Rows, ...]:
    """Room for a norm as each layer of ``then`` takes it, made known to ``ending``: codes for two at most, or float32."""
    if then and then[0].int8:
        found = tuple(Codes.empty(*stream_TD.shape, layer.factors_K) for layer in then)
        ending.codes = found[0].struct()
        if len(found) > 1:
            ending.also = found[1].struct()
        return found
    out_TD = stream_TD if in_place else torch.empty_like(stream_TD)
    if not in_place:
        ending.out, ending.stride = out_TD.data_ptr(), out_TD.shape[1]
    return (out_TD,) * max(len(then), 1)


def _order(count: int, gated: bool) -> Tensor:
    """Which row of the weight each place of the blocks takes; -1 for none. Gated: 32 gates, then their 32 values."""
    if not gated:
        places = torch.full((-(-count // BLOCK) * BLOCK,), -1)
        places[:count] = torch.arange(count)
        return places
    half, step = count // 2, BLOCK // 2
    gates = torch.full((-(-half // step) * step,), -1)
    gates[:half] = torch.arange(half)
    values = torch.where(gates >= 0, gates + half, -1)
    return torch.stack([gates.view(-1, step), values.view(-1, step)], 1).flatten()


def _arranged(rows: Tensor, order: Tensor) -> Tensor:
    """``rows`` in that order, zeros where there is none."""
    taken = rows[order.clamp_min(0)].clone()
    taken[order < 0] = 0
    return taken


def _pack_float32(weight_NK: Tensor) -> Tensor:
    count, inputs = weight_NK.shape
    packed = _aligned((count // BLOCK, inputs, BLOCK), torch.float32)
    return packed.copy_(weight_NK.view(-1, BLOCK, inputs).transpose(1, 2))


def _pack_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes (N/64, K/4, 64, 4), scales (N) and the sums of each output's codes (N)."""
    codes_NK, scale_N = weight_codes(weight_NK)
    padding = -codes_NK.shape[1] % 4
    codes_NK = torch.nn.functional.pad(codes_NK, (0, padding))
    count, inputs = codes_NK.shape
    packed = _aligned((count // BLOCK, inputs // 4, BLOCK, 4), torch.int8)
    packed.copy_(codes_NK.view(-1, BLOCK, inputs // 4, 4).transpose(1, 2))
    return packed, scale_N, codes_NK.sum(1, dtype=torch.int32)


def weight_codes(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Returns signed codes (N, K) and a scale an output (N): ``W ≈ codes · scale``.

    Of a few ranges the one with the least squared error is taken; clipping the largest weights costs less than it saves
    where they stand alone.
    """
    largest_N1 = weight_NK.abs().amax(1, keepdim=True).clamp_min(1e-12)
    best_N1 = torch.full_like(largest_N1, float("inf"))
    scale_N1 = largest_N1 / 127
    for share in (1.0, 0.95, 0.9, 0.85, 0.8):
        tried_N1 = largest_N1 * share / 127
        error_N1 = ((weight_NK / tried_N1).round_().clamp_(-127, 127) * tried_N1 - weight_NK).square_().sum(1, keepdim=True)
        scale_N1 = torch.where(error_N1 < best_N1, tried_N1, scale_N1)
        best_N1 = torch.minimum(best_N1, error_N1)
    return (weight_NK / scale_N1).round_().clamp_(-127, 127).to(torch.int8), scale_N1.flatten().contiguous()


def _aligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory that starts at a cache line."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.empty(size + 64, dtype=torch.uint8)
    start = -raw.data_ptr() % 64
    return raw[start : start + size].view(dtype).view(shape)
