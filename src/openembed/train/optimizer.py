"""AdamW over parameter groups and the warm-up + linear-decay schedule, both free of hidden state."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn

from openembed.config import Config


class OptimizerConfig(Config):
    """AdamW with warm-up and linear decay to 0 (NV-Embed v1, table 5: lr 2e-5 / 1.5e-5, warm-up 500, weight decay 0.03).

    ``warmup``: steps, or a fraction of all steps when below 1. ``clip``: largest gradient norm (0 does not clip).
    ``head_lr_factor`` and ``embedding_lr_factor`` scale the rate of the head (with its projections) and of the
    backbone's embedding tables. Weight decay applies to parameters of two or more dimensions: not to biases and norms.
    """

    lr: float = Field(default=2e-5, gt=0)
    warmup: float = Field(default=500, ge=0)
    weight_decay: float = Field(default=0.03, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, ge=0)
    head_lr_factor: float = Field(default=1.0, gt=0)
    embedding_lr_factor: float = Field(default=1.0, gt=0)

    def build(self, encoder: nn.Module) -> torch.optim.AdamW:
        """Returns AdamW over the trainable parameters of ``encoder``; each group keeps its full rate in ``base_lr``.

        Raises ``ValueError`` when nothing is trainable.
        """
        embeddings = {
            id(parameter)
            for module in encoder.backbone.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        backbone = {id(parameter) for parameter in encoder.backbone.parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                factor = self.head_lr_factor
                if id(parameter) in backbone:
                    factor = self.embedding_lr_factor if id(parameter) in embeddings else 1.0
                decay = self.weight_decay if parameter.ndim >= 2 else 0.0
                groups.setdefault((self.lr * factor, decay), []).append(parameter)
        if not groups:
            raise ValueError("the encoder has no trainable parameter; add lora or unfreeze the backbone")
        settings: list[dict[str, Any]] = [
            {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": decay} for (lr, decay), parameters in groups.items()
        ]
        return torch.optim.AdamW(settings, betas=self.betas, eps=self.epsilon)

    def rate(self, step: int, steps: int) -> float:
        """Returns the fraction of the full rate at ``step`` (0-based) of ``steps``.

        Rises as (step + 1) / warm-up, then falls linearly; the last step still moves, the one after it would not.
        """
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, (steps - step) / max(1, steps - warmup))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Sets every group to ``rate`` of its full learning rate; returns the highest learning rate now in use."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * rate
    return max(group["lr"] for group in optimizer.param_groups)
