"""Heads turn a text's hidden states into its representation; ``HeadConfig`` is the closed set of them.

A head has ``width`` and ``forward(hidden_TD, packed)``, which gives float32 rows: one a text, or one a token vector. It may
have ``kind`` (``dense`` where it has none), ``sided`` (queries and documents differ: read ``packed.query``),
``attach(backbone, tokenizer)``, which is called once before weights are placed, and ``reads_states(packed)``: where that is
False, ``forward`` takes None for the states. A ``sparse`` head has ``bag(rows, device)``, each text's own tokens or None; one
of ``tokens`` has ``rows_of(rows)``, the number of vectors of each text. What autograd keeps of a head is counted by running it
on shapes alone; ``working_bytes(tokens, autocast)`` may say what it holds for a moment beside that.
"""

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
from openembed.heads.splade import SpladeConfig
from openembed.heads.token_projection import TokenProjectionConfig

HeadConfig = Annotated[
    MeanConfig
    | WeightedMeanConfig
    | LastTokenConfig
    | ClsConfig
    | MaxConfig
    | MeanSqrtConfig
    | ConcatConfig
    | LatentAttentionConfig
    | SelfAttentionConfig
    | SpladeConfig
    | TokenProjectionConfig,
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
    "SpladeConfig",
    "TokenProjectionConfig",
    "WeightedMeanConfig",
]
