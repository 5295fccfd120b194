"""Heads turn a text's hidden states into its representation; ``HeadConfig`` is the closed set of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from openembed.heads.latent_attention import LatentAttentionConfig
from openembed.heads.pooling import (
    ClsConfig,
    ConcatConfig,
    LastTokenConfig,
    MaxConfig,
    MeanConfig,
    MeanSqrtConfig,
    WeightedMeanConfig,
)
from openembed.heads.self_attention import SelfAttentionConfig

HeadConfig = Annotated[
    MeanConfig
    | WeightedMeanConfig
    | LastTokenConfig
    | ClsConfig
    | MaxConfig
    | MeanSqrtConfig
    | ConcatConfig
    | LatentAttentionConfig
    | SelfAttentionConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "ClsConfig",
    "ConcatConfig",
    "HeadConfig",
    "LastTokenConfig",
    "LatentAttentionConfig",
    "MaxConfig",
    "MeanConfig",
    "MeanSqrtConfig",
    "SelfAttentionConfig",
    "WeightedMeanConfig",
]
