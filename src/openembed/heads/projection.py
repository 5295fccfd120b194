"""A linear layer after pooling, with an optional activation (sentence-transformers' Dense module)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from openembed.config import Config

ACTIVATIONS = {"none": nn.Identity, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class ProjectionConfig(Config):
    """From the width before it to ``width``; ``residual`` adds the input (itself projected when widths differ)."""

    width: int
    bias: bool = True
    activation: Literal["none", "tanh", "relu", "gelu", "silu"] = "none"
    residual: bool = False

    def build(self, width: int) -> Projection:
        """Returns the layer for vectors of ``width``."""
        return Projection(self, width)


class Projection(nn.Module):
    """``activation(W x + b)``, ``(B, D)`` to ``(B, width)``."""

    def __init__(self, config: ProjectionConfig, width: int) -> None:
        super().__init__()
        self.width = config.width
        self.linear = nn.Linear(width, config.width, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.residual = None
        if config.residual:
            same = width == config.width
            self.residual = nn.Identity() if same else nn.Linear(width, config.width, bias=False)

    def forward(self, values_BD: Tensor) -> Tensor:
        """Returns the projected vectors."""
        out = self.activation(self.linear(values_BD.to(self.linear.weight.dtype)))
        return (out if self.residual is None else out + self.residual(values_BD)).float()
