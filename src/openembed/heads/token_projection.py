"""One vector a token: a linear layer over every hidden state, brought to length 1 (ColBERT, arXiv 2004.12832).

Documents may leave tokens out (ColBERT: punctuation), and either side may keep fewer vectors than it has tokens
(:mod:`openembed.heads.token_pooling`). Tokens before the pooled span have no vectors.

Shapes: ``T`` tokens, ``B`` texts, ``R`` vectors of all texts, ``D`` width.
"""

from __future__ import annotations

import string
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from openembed.config import Config
from openembed.heads.projection import ProjectionConfig
from openembed.heads.token_pooling import TokenPoolConfig
from openembed.packing import Packed, TokenRows
from openembed.tokenization import TextTokenizer


class TokenProjectionConfig(Config):
    """``width`` of the vectors; 0 leaves the hidden states as they are (CRISP does). ``before``: layers under the last.

    ``skip``: tokens of documents that get no vector, by their spelling in the vocabulary, or ``punctuation``; a text of
    these alone keeps them. ``skip_queries`` leaves them out of queries too. Special tokens stay, as in ColBERT, unless listed.
    ``pool``: fewer vectors a text, in training and in use.
    """

    kind: Literal["token_projection"] = "token_projection"
    width: int = Field(128, ge=0)
    bias: bool = False
    before: tuple[ProjectionConfig, ...] = ()
    normalize: bool = True
    skip: Literal["punctuation"] | tuple[str, ...] = ()
    skip_queries: bool = False
    pool: TokenPoolConfig | None = None

    @model_validator(mode="after")
    def _one_scale(self) -> TokenProjectionConfig:
        if not self.normalize and getattr(self.pool, "renormalize", False):
            raise ValueError(
                "normalize = false beside clusters of length 1 puts texts of few tokens, which keep their own lengths, on "
                "another scale than the rest; set pool.renormalize = false too, or normalize"
            )
        return self

    def build(self, width: int) -> TokenProjection:
        """Returns the head for hidden states of ``width``."""
        return TokenProjection(self, width)


class TokenProjection(nn.Module):
    """A vector of length 1 for every token kept, ``(R, D)``."""

    kind = "tokens"

    def __init__(self, config: TokenProjectionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        layers = [*config.before]
        if config.width:
            layers.append(ProjectionConfig(width=config.width, bias=config.bias))
        widths = [width, *(layer.width for layer in layers)]
        self.layers = nn.ModuleList(layer.build(before) for layer, before in zip(layers, widths, strict=False))
        self.width: int = widths[-1]
        self._skipped = np.empty(0, dtype=np.int64)

    @property
    def sided(self) -> bool:
        """Whether queries and documents keep different tokens."""
        config, pool = self.config, self.config.pool
        return bool(config.skip and not config.skip_queries) or (pool is not None and pool.queries != pool.documents)

    def attach(self, backbone: nn.Module, tokenizer: TextTokenizer) -> None:
        """Looks up the ids of the tokens to skip; spellings that the vocabulary lacks never occur and are ignored.

        Raises ``ValueError`` where the vocabulary has none of those listed.
        """
        skip = self.config.skip
        words = string.punctuation if skip == "punctuation" else skip
        found = [tokenizer.backend.token_to_id(word) for word in words]
        self._skipped = np.array(sorted({i for i in found if i is not None}), dtype=np.int64)
        if words and not len(self._skipped):
            raise ValueError(f"head.skip: the tokenizer has none of the tokens {list(words)[:5]}; spell them as it does")

    def rows_of(self, rows: TokenRows) -> np.ndarray:
        """Returns the number of vectors of each text, int64 (N); a function of its ids and side alone."""
        _, counts_N = self._kept(rows)
        if self.config.pool is None:
            return counts_N
        pooled = {query: self.config.pool.counts(counts_N, query=query) for query in (False, True)}
        return np.where(_queries(rows), pooled[True], pooled[False])

    def places_of(self, rows: TokenRows) -> list[np.ndarray | None]:
        """Returns where in its row the token of each vector of a text stands, in order; None for a text whose are pooled."""
        kept_T, _ = self._kept(rows)
        kept = [np.flatnonzero(kept) for kept in np.split(kept_T, np.cumsum(rows.lengths)[:-1])][: len(rows)]
        return [places if len(places) == count else None for places, count in zip(kept, self.rows_of(rows), strict=True)]

    def forward(self, hidden_TD: Tensor, packed: Packed) -> Tensor:
        """Returns the vectors of all texts end to end, ``(R, D)`` float32."""
        kept_T, counts_B = self._kept(packed.rows)
        values_TD = hidden_TD[torch.from_numpy(np.flatnonzero(kept_T)).to(hidden_TD.device)]
        for layer in self.layers:
            values_TD = layer(values_TD)
        with torch.autocast(values_TD.device.type, enabled=False):
            values_TD = values_TD.float()
            if self.config.normalize:
                values_TD = nn.functional.normalize(values_TD, dim=-1)
            if self.config.pool is None:
                return values_TD
            return self.config.pool.pooled(values_TD, counts_B, query=packed.query)

    def _kept(self, rows: TokenRows) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens get a vector, bool (T), and how many of each text, int64 (N)."""
        lengths_N = rows.lengths
        text_T = np.repeat(np.arange(len(rows)), lengths_N)
        place_T = np.arange(len(text_T)) - (np.cumsum(lengths_N) - lengths_N)[text_T]
        kept_T = pooled_T = place_T >= rows.pool_starts[text_T]
        if len(self._skipped) and len(rows):
            skipped_T = np.isin(np.concatenate(rows.ids), self._skipped)
            if not self.config.skip_queries:
                skipped_T &= ~_queries(rows)[text_T]
            bare_N = np.bincount(text_T[pooled_T & ~skipped_T], minlength=len(rows)) == 0
            kept_T = pooled_T & (~skipped_T | bare_N[text_T])
        return kept_T, np.bincount(text_T[kept_T], minlength=len(rows))


def _queries(rows: TokenRows) -> np.ndarray:
    return np.zeros(len(rows), dtype=bool) if rows.queries is None else rows.queries
