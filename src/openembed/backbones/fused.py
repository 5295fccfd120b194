"""A transformer's layers run by our own CPU kernels: few passes over memory, in exact float32 or with 8-bit products.

``int8`` quantises what enters each linear layer to 8 bits a row (dynamic, one scale and zero point a token) and the
weights to 8 bits (one scale an output); no calibration data. Products are summed in int32; residual stream, norms and
softmax stay float32, the products of attention are bfloat16 where the processor has them.

What is run is read off the layers' structure (:mod:`openembed.backbones.structure`), and compared with the model's own
code before it is used.

Shapes: ``T`` tokens, ``D`` width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from openembed.kernels.calls import Heads, Norm, PackedLinear, Rows, attention, norm_rows, taken
from openembed.packing import Packed
from openembed.versions import version

Precision = Literal["exact", "int8"]


@dataclass(frozen=True)
class Weights:
    """A linear layer as the model holds it; ``parts`` are stacked (query, key, value; gate and value)."""

    parts: tuple[nn.Linear, ...]
    factor: float = 1.0

    def packed(self, precision: Precision, **options: Any) -> PackedLinear:
        """Returns the layer laid out for the kernels; ``options`` are those of ``PackedLinear``."""
        weight = torch.cat([part.weight.detach().float() for part in self.parts]) * self.factor
        biased = any(part.bias is not None for part in self.parts)
        bias = torch.cat([_bias(part) for part in self.parts]) * self.factor if biased else None
        return PackedLinear(weight, bias, int8=precision == "int8", **options)


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
    """A model as the kernels run it. ``embed`` gives the residual stream and, where there are any, rotary positions.

    ``first_norm`` is what the first layer reads: applied by the kernels, or already by ``embed`` where ``post_norm``.
    """

    layers: tuple[LayerPlan, ...]
    post_norm: bool
    first_norm: Norm
    embed: Callable[[Packed], tuple[Tensor, tuple[Tensor, Tensor] | None]]
    window: int | None


@dataclass(frozen=True)
class _Layer:
    """A layer's weights as the kernels take them.

    ``entry``: query, key and value together, or with 8 bits the values apart: what evens out queries and keys spoils them.
    """

    plan: LayerPlan
    entry: tuple[PackedLinear, ...]
    out: PackedLinear
    up: PackedLinear
    down: PackedLinear

    def qkv(self, inputs: tuple[Rows, ...], tokens: int) -> Tensor:
        """Returns queries, keys and values of every token, side by side."""
        columns = [sum(part.outputs for part in self.entry[:i]) for i in range(len(self.entry))]
        out_TN = torch.empty(tokens, columns[-1] + self.entry[-1].padded)
        for part, column, x in zip(self.entry, columns, inputs, strict=True):
            part.store_in(out_TN, column, x)  # in order: padding of one lies where the next begins
        return out_TN


@dataclass(frozen=True)
class _State:
    """A plan with its packed weights, and what the model was when they were read."""

    plan: Plan | None
    layers: tuple[_Layer, ...]
    parts: list[Any]
    version: tuple[object, ...]


class FusedLayers:
    """Runs the plan that ``read`` finds; its packed weights are made at first use, and anew when the model changes.

    A model changes when a weight does, when a module or a parameter takes another's place (an adapter, say), or when a
    hook is set. Changes that torch does not count (``.data``, fused optimizers) are covered by :meth:`forget`, which
    every pass with gradients and every change of mode calls.
    """

    def __init__(self, model: nn.Module, read: Callable[[], Plan | None], precision: Precision) -> None:
        self.precision: Precision = precision
        self._model, self._read = model, read
        self._state: _State | None = None
        self._lock = threading.Lock()
        self._holders: list[dict[str, Any]] = []

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of a model, or one that is pickled, comes without: it runs by its own code until it is fused anew."""
        return type(None), ()

    def forget(self) -> None:
        """Has the weights packed anew at the next use."""
        self._state = None

    def _current(self) -> _State:
        state = self._state
        if state is None or self._changed(state):
            with self._lock:
                state = self._state
                if state is None or self._changed(state):
                    self._state = None
                    self._state = state = self._made()
        return state

    def _made(self) -> _State:
        modules = list(self._model.modules())
        self._holders = [d for m in modules for d in (m._modules, m._parameters, m._forward_hooks, m._forward_pre_hooks)]
        parts = [part for holder in self._holders for part in holder.values()]
        current = version(*(part for part in parts if isinstance(part, Tensor)))
        plan = self._read()
        return _State(plan, () if plan is None else _packed(plan, self.precision), parts, current)

    def _changed(self, state: _State) -> bool:
        parts = [part for holder in self._holders for part in holder.values()]
        if len(parts) != len(state.parts) or any(new is not old for new, old in zip(parts, state.parts, strict=True)):
            return True
        return state.version != version(*(part for part in parts if isinstance(part, Tensor)))

    def serves(self, packed: Packed, *, bidirectional: bool) -> bool:
        """True when the plan is whole and no text is so long that a sliding window would hide part of it."""
        return _serves(self._current().plan, packed, bidirectional)

    def __call__(self, packed: Packed, *, bidirectional: bool) -> Tensor | None:
        """Returns the last hidden state of every token, ``(T, D)`` float32; None where it does not serve."""
        state = self._current()
        plan, layers = state.plan, state.layers
        if plan is None or not _serves(plan, packed, bidirectional):
            return None
        stream_TD, rotary = plan.embed(packed)
        first, tokens = layers[0].entry, len(stream_TD)
        if plan.post_norm:
            inputs = tuple(taken(stream_TD, part) for part in first)
        else:
            inputs = norm_rows(stream_TD, plan.first_norm, first)
        view = {"causal": not bidirectional, "half": self.precision == "int8", "rotary": rotary}
        for number, layer in enumerate(layers):
            after, end = layer.plan.norms
            following = layers[number + 1].entry if number + 1 < len(layers) else ()
            mixed_TI = attention(layer.qkv(inputs, tokens), packed.layout.offsets_B1, layer.plan.heads, **view)
            mixed = taken(mixed_TI, layer.out)
            (x,) = layer.out.add_norm(mixed, stream_TD, after, (layer.up,), post_norm=plan.post_norm)
            x = layer.up.codes(x) if layer.down.int8 else layer.up.store(x)
            inputs = layer.down.add_norm(x, stream_TD, end, following, post_norm=plan.post_norm)
        return stream_TD if plan.post_norm else inputs[0]


def _serves(plan: Plan | None, packed: Packed, bidirectional: bool) -> bool:
    if plan is None or plan.window is None:
        return plan is not None
    return packed.layout.max_length - int(bidirectional) <= plan.window


def _packed(plan: Plan, precision: Precision) -> tuple[_Layer, ...]:
    layers, norm = [], plan.first_norm
    for layer in plan.layers:
        after, end = layer.norms
        up = layer.up.packed(precision, activation=layer.activation, gated=layer.gated, sizes_K=after.sizes_D)
        parts = layer.qkv.parts
        groups = (parts[:2], parts[2:]) if precision == "int8" else (parts,)
        entry = tuple(Weights(group).packed(precision, sizes_K=norm.sizes_D) for group in groups)
        layers.append(_Layer(layer, entry, layer.out.packed(precision), up, layer.down.packed(precision)))
        norm = end
    return tuple(layers)


def used_weights(plan: Plan) -> list[Tensor]:
    """Returns the matrices that are packed."""
    return [part.weight for layer in plan.layers for w in (layer.qkv, layer.out, layer.up, layer.down) for part in w.parts]
