"""A backbone's layers compiled by ``torch.compile``: norms, rotary positions, activations and residuals become few kernels.

The layers are compiled one by one for streams of any length, and equal layers share their code, so the cost does not grow
with depth. Attention and, on CPUs, linear layers stay what they are: operations the compiler does not look into. Passes
without gradients (evaluation, the first pass of gradient caching) run as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from openembed.backbones.text import TextBackbone


def compile_layers(backbone: TextBackbone) -> None:
    """Compiles the layers of ``backbone`` in place; names and shapes of its parameters stay as they are.

    The first step after it takes a good while longer (tens of seconds). Raises ``ValueError`` for a family that cannot be
    packed or whose layers are not found: it would be compiled anew for every shape of batch.
    """
    name = type(backbone.model).__name__
    if not backbone.packable:
        raise ValueError(f"compute.compile: {name} cannot be packed; set compute.compile = false")
    layers = _layers(backbone.model)
    if not layers:
        raise ValueError(f"compute.compile: {name} has no list of layers; set compute.compile = false")
    for layer in layers:
        layer._compiled_call_impl = _when_training(layer)


def restore_layers(backbone: TextBackbone) -> None:
    """Undoes :func:`compile_layers`."""
    for layer in _layers(backbone.model):
        layer._compiled_call_impl = None


def _when_training(layer: nn.Module) -> Callable[..., Any]:
    """The call that ``Module.compile`` would install, except where compiled code would be made anew for little use."""
    compiled = torch.compile(layer._call_impl, dynamic=True)

    def call(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        serves = torch.is_grad_enabled() and hidden.shape[1] > 1  # a stream of one token would need code of its own
        return (compiled if serves else layer._call_impl)(hidden, *args, **kwargs)

    return call


def _layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of equal modules: the model's layers."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    alike = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    return max(alike, key=len, default=[])
