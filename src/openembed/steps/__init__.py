"""Steps of a search, each ``Search → Search``: built from a config, chained in a list."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from openembed.steps.fuse import FuseConfig
from openembed.steps.rerank import RerankConfig
from openembed.steps.retrieve import Bm25Config, DenseConfig, SparseConfig, TokensConfig
from openembed.steps.search import Search, Step

StepConfig = Annotated[
    DenseConfig | SparseConfig | TokensConfig | Bm25Config | FuseConfig | RerankConfig, Field(discriminator="kind")
]
"""Any step, told apart by ``kind``."""

__all__ = [
    "Bm25Config",
    "DenseConfig",
    "FuseConfig",
    "RerankConfig",
    "Search",
    "SparseConfig",
    "Step",
    "StepConfig",
    "TokensConfig",
]
