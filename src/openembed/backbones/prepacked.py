"""Linear layers whose weights oneDNN has laid out once for its own kernels: faster float32 on CPUs, same results.

Used for inference on a CPU only; the ordinary weight stays the one truth (training, saving, moving to a GPU), and the
laid-out copy is made anew when it changes. It costs the size of the weights once more, so large models do without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_WEIGHT_BYTES = 2 * 2**30
"""Models with more float32 linear weights than this keep the plain layers: a second copy would cost too much memory."""

MIN_ROWS = 16
"""Below so many tokens the plain kernel is as fast."""


class PrepackedLinear(nn.Linear):
    """An ``nn.Linear`` that runs oneDNN's kernel on a prepared copy of its weight when no gradient is wanted."""

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.training = plain.training
        self._prepared: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x Wᵀ + b``."""
        if torch.is_grad_enabled() or x.dtype != torch.float32 or x.is_cuda or x.numel() < MIN_ROWS * self.in_features:
            return F.linear(x, self.weight, self.bias)
        if self.weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed_weight(), self.bias, "none", [], "")

    def _packed_weight(self) -> Tensor:
        version = (self.weight.data_ptr(), self.weight._version)
        if self._prepared is None or self._prepared[0] != version:
            self._prepared = (version, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None))
        return self._prepared[1]

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_prepared": None}


def available() -> bool:
    """True where this torch has oneDNN's prepared kernels."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def prepack(module: nn.Module) -> None:
    """Replaces the float32 linear layers inside ``module`` by prepared ones, where that is possible and affordable."""
    layers = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    plain = [(p, n, c) for p, n, c in layers if type(c) is nn.Linear and c.weight.dtype == torch.float32]
    if not available() or sum(c.weight.nbytes for _, _, c in plain) > MAX_WEIGHT_BYTES:
        return
    for parent, name, child in plain:
        setattr(parent, name, PrepackedLinear(child))
