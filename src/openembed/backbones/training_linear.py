"""A linear layer for training in float32 on a CPU: oneDNN's kernels where they beat the default matrix products.

On CPUs whose vendor the default library does not tune for, oneDNN's product is 10 to 15 % faster forwards and towards the
input. The weight's gradient stays with the default, which is as fast there. One operation, opaque to ``torch.compile``.

Shapes: ``T`` tokens, ``I`` inputs, ``O`` outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("openembed::linear", mutates_args=())
def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Returns ``x Wᵀ + b``, differentiable; ``x`` is ``(…, I)``."""
    return torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")


@torch.library.custom_op("openembed::linear_input_gradient", mutates_args=())
def _input_gradient(grad: Tensor, weight_OI: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(grad, weight_OI.t(), None, "none", [], "")


@linear.register_fake
def _(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_OI.shape[0])


@_input_gradient.register_fake
def _(grad: Tensor, weight_OI: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight_OI.shape[1])


def _setup(ctx, inputs, output) -> None:  # noqa: ANN001 (torch's own signature)
    x, weight_OI, bias_O = inputs
    ctx.biased = bias_O is not None
    ctx.save_for_backward(x, weight_OI)


def _differentiate(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
    x, weight_OI = ctx.saved_tensors
    flat_TO = grad.reshape(-1, grad.shape[-1])
    for_x = _input_gradient(grad.contiguous(), weight_OI) if ctx.needs_input_grad[0] else None
    for_weight = flat_TO.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    for_bias = flat_TO.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
    return for_x, for_weight, for_bias


linear.register_autograd(_differentiate, setup_context=_setup)
