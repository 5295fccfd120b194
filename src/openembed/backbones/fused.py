"""A transformer's layers run by our own CPU kernels: few passes over memory, in exact float32 or with 8-bit products.

``int8`` quantises what enters each linear layer to 8 bits a row (dynamic, one scale and zero point a token) and the
weights to 8 bits (one scale an output); no calibration data. Products are summed in int32; residual stream, norms and
softmax stay float32, the products of attention are bfloat16 where the processor has them.

What is run is read off the layers' structure (:mod:`openembed.backbones.structure`), and compared with the model's own
code before it is used.

Shapes: ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from openembed.kernels.calls import Heads, Norm, PackedLinear, Rows, attention, norm_rows, quantize
from openembed.packing import Packed

Precision = Literal["exact", "int8"]


@dataclass(frozen=True)
class Weights:
    """A linear layer as the model holds it; ``parts`` are stacked (query, key, value; gate and value)."""

    parts: tuple[nn.Linear, ...]
    factor: float = 1.0

    def packed(self, precision: Precision, activation: str = "none", *, gated: bool = False) -> PackedLinear:
        """Returns the layer laid out for the kernels."""
        weight = torch.cat([part.weight.detach().float() for part in self.parts]) * self.factor
        biased = any(part.bias is not None for part in self.parts)
        bias = torch.cat([_bias(part) for part in self.parts]) * self.factor if biased else None
        return PackedLinear(weight, bias, int8=precision == "int8", activation=activation, gated=gated)


def _bias(linear: nn.Linear) -> Tensor:
    return torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float()


@dataclass(frozen=True)
class LayerPlan:
    """One layer: attention, then a feed-forward network, each followed by addition and a norm.

    ``norms``: what follows attention and what follows the network. Where norms come first (``post_norm`` is False in the
    plan), the second is the first norm of the layer above, or the model's last.
    """

    heads: Heads
    qkv: Weights
    out: Weights
    up: Weights
    down: Weights
    activation: str
    gated: bool
    norms: tuple[Norm, Norm]


@dataclass(frozen=True)
class Plan:
    """A model as the kernels run it. ``embed`` gives the residual stream and, where there are any, rotary positions."""

    layers: tuple[LayerPlan, ...]
    post_norm: bool
    first_norm: Norm | None
    embed: Callable[[Packed], tuple[Tensor, tuple[Tensor, Tensor] | None]]
    window: int | None


@dataclass(frozen=True)
class _Layer:
    plan: LayerPlan
    qkv: PackedLinear
    out: PackedLinear
    up: PackedLinear
    down: PackedLinear


class FusedLayers:
    """Runs the plan that ``read`` finds; its packed weights are made at first use, and anew when the model changes.

    A model changes when a weight does, or when a module takes another's place (an adapter, say).
    """

    def __init__(self, model: nn.Module, read: Callable[[], Plan | None], precision: Precision) -> None:
        self.precision: Precision = precision
        self._model, self._read = model, read
        self._plan: Plan | None = None
        self._layers: tuple[_Layer, ...] = ()
        self._links: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []
        self._weights: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []

    def _changed(self) -> bool:
        moved = any(modules.get(name) is not child for modules, name, child in self._links)
        return moved or self._versions != [(w.data_ptr(), w._version) for w in self._weights]

    def plan(self) -> Plan | None:
        """Returns the plan of the model as it is now, None when its structure is not known (any more)."""
        if not self._links or self._changed():
            self._links = [(m._modules, name, child) for m in self._model.modules() for name, child in m.named_children()]
            self._weights = list(self._model.parameters())
            self._versions = [(w.data_ptr(), w._version) for w in self._weights]
            self._plan, self._layers = self._read(), ()
        return self._plan

    def serves(self, packed: Packed, *, bidirectional: bool) -> bool:
        """True when the plan is whole and no text is so long that a sliding window would hide part of it."""
        plan = self.plan()
        if plan is None or plan.window is None:
            return plan is not None
        return packed.layout.max_length - int(bidirectional) <= plan.window

    def __call__(self, packed: Packed, *, bidirectional: bool) -> Tensor:
        """Returns the last hidden state of every token, ``(T, D)`` float32."""
        plan, codes = self.plan(), self.precision == "int8"
        assert plan is not None, "ask serves() first"
        self._layers = self._layers or tuple(_pack(layer, self.precision) for layer in plan.layers)
        stream_TD, rotary = plan.embed(packed)
        if plan.first_norm is None:
            x: Rows = quantize(stream_TD) if codes else stream_TD
        else:
            x = norm_rows(stream_TD, plan.first_norm, codes=codes)
        view = {"causal": not bidirectional, "half": codes, "rotary": rotary}
        for number, layer in enumerate(self._layers):
            more = codes and number + 1 < len(self._layers)
            after, end = layer.plan.norms
            mixed_TI = attention(layer.qkv.store(x), packed.layout.offsets_B1, layer.plan.heads, **view)
            mixed: Rows = quantize(mixed_TI) if codes else mixed_TI
            x = layer.out.add_norm(mixed, stream_TD, after, post_norm=plan.post_norm, codes=codes)
            x = layer.up.codes(x) if codes else layer.up.store(x)
            x = layer.down.add_norm(x, stream_TD, end, post_norm=plan.post_norm, codes=more)
        return x


def _pack(layer: LayerPlan, precision: Precision) -> _Layer:
    up = layer.up.packed(precision, layer.activation, gated=layer.gated)
    return _Layer(layer, layer.qkv.packed(precision), layer.out.packed(precision), up, layer.down.packed(precision))


def used_weights(plan: Plan) -> list[Tensor]:
    """Returns the matrices that are packed."""
    return [part.weight for layer in plan.layers for w in (layer.qkv, layer.out, layer.up, layer.down) for part in w.parts]
