"""Linear layers that run oneDNN's kernels: faster float32 on CPUs, same results.

Without gradients they use a copy of the weight laid out for the kernel; the ordinary weight stays the one truth (training,
saving, moving to a GPU), and the copy is made anew when it changes. It costs the size of the weights once more, so large
models do without. With gradients they use the weight as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openembed.backbones.int8 import Int8Weights
from openembed.backbones.training_linear import linear
from openembed.versions import version

MAX_WEIGHT_BYTES = 2 * 2**30
"""Models with more float32 linear weights than this keep the plain layers: a second copy would cost too much memory."""

MIN_ROWS = 16
"""Below so many tokens the plain kernel is as fast."""


class PrepackedLinear(nn.Linear):
    """An ``nn.Linear`` that runs oneDNN's kernel, on a prepared copy of its weight when no gradient is wanted.

    ``keeps_copy`` is False where weights come and go in the same memory (under fsdp): a copy could not be seen to be old.
    ``int8``: without gradients, products of 8-bit codes (see :mod:`openembed.backbones.int8`).
    """

    keeps_copy = True
    int8 = False

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.training = plain.training
        self._prepared: tuple[object, Tensor] | None = None
        self._codes: tuple[object, Int8Weights] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x Wᵀ + b``."""
        if torch.is_grad_enabled() and self.weight.requires_grad and not torch.compiler.is_compiling():
            self._prepared = self._codes = None  # training changes it at every step
        if self.int8 and self._without_gradient() and x.device.type == "cpu":
            return self._int8_weights()(x)
        if self.serves(x):
            return self.prepared(x, "none", "")
        if self._takes(x):
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def serves(self, x: Tensor) -> bool:
        """True when the prepared kernel can take ``x``: float32 on a CPU, no gradient, enough rows."""
        enough = x.numel() >= MIN_ROWS * self.in_features
        return self._without_gradient() and not self.int8 and self._takes(x) and enough

    def _without_gradient(self) -> bool:
        return self.keeps_copy and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _takes(self, x: Tensor) -> bool:
        both_float32 = x.dtype == torch.float32 and self.weight.dtype == torch.float32
        return both_float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")

    def prepared(self, x: Tensor, activation: str, algorithm: str) -> Tensor:
        """Returns ``activation(x Wᵀ + b)`` from one oneDNN kernel."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed_weight(), self.bias, activation, [], algorithm)

    def _int8_weights(self) -> Int8Weights:
        current = version(self.weight)
        if self._codes is None or self._codes[0] != current:
            self._codes = (current, Int8Weights(self.weight, self.bias))
        return self._codes[1]

    def _packed_weight(self) -> Tensor:
        current = version(self.weight)
        if self._prepared is None or self._prepared[0] != current:
            self._prepared = (current, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None))
        return self._prepared[1]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_prepared": None, "_codes": None}


class LinearGelu(nn.Module):
    """A BERT-type intermediate layer, ``GELU(x Wᵀ + b)``; the activation rides on the prepared kernel where that serves."""

    def __init__(self, dense: PrepackedLinear) -> None:
        super().__init__()
        self.dense = dense

    def forward(self, x: Tensor) -> Tensor:
        """Returns the activated states."""
        fused = isinstance(self.dense, PrepackedLinear) and self.dense.serves(x)  # an adapter may have taken its place
        return self.dense.prepared(x, "gelu", "none") if fused else F.gelu(self.dense(x))


def available() -> bool:
    """True where this torch has oneDNN's prepared kernels."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def use_int8(module: nn.Module, wanted: bool = True) -> None:
    """Makes every linear layer inside ``module`` one that multiplies 8-bit codes when no gradient is wanted, or not."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and wanted:
                setattr(parent, name, PrepackedLinear(child))
    for layer in module.modules():
        if isinstance(layer, PrepackedLinear):
            layer.int8 = wanted


def release_copies(module: nn.Module) -> None:
    """Frees the copies that linear layers inside ``module`` have prepared; one that is needed is made anew."""
    for layer in module.modules():
        if isinstance(layer, PrepackedLinear):
            layer._prepared = layer._codes = None


def prepack(module: nn.Module) -> None:
    """Replaces the float32 linear layers inside ``module`` by prepared ones, where that is possible and affordable."""
    layers = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    plain = [(p, n, c) for p, n, c in layers if type(c) is nn.Linear and c.weight.dtype == torch.float32]
    if not available() or sum(c.weight.nbytes for _, _, c in plain) > MAX_WEIGHT_BYTES:
        return
    for parent, name, child in plain:
        setattr(parent, name, PrepackedLinear(child))
    for parent, name, child in layers:
        if _is_linear_gelu(child):
            setattr(parent, name, LinearGelu(child.dense).train(child.training))


def _is_linear_gelu(module: nn.Module) -> bool:
    """True for a module made of just a prepared ``dense`` and an exact (erf) GELU after it."""
    children = dict(module.named_children())
    activation = children.get("intermediate_act_fn")
    exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
    exact = exact or getattr(activation, "act", None) is F.gelu
    return set(children) == {"dense", "intermediate_act_fn"} and exact and isinstance(module.dense, PrepackedLinear)
