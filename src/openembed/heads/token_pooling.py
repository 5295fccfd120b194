"""Fewer vectors a text: clusters of its token vectors (CRISP), and the baselines it is compared with.

CRISP (arXiv 2505.11471): in training and in use alike a text's vectors are replaced by the means of k clusters of them. The
paper does not say how clusters are found; here assignments come from a fixed number of Lloyd's iterations without gradient,
and the gradient flows through the means. How many vectors a text keeps depends on the number of its tokens alone.

Shapes: ``T`` tokens of all texts, ``B`` texts, ``R`` vectors kept of all texts, ``L`` tokens of a text, ``K`` clusters, ``D``
width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from openembed.config import Config

Amount = Annotated[int, Field(ge=0, strict=True)] | Annotated[float, Field(gt=0, lt=1)]
"""Of vectors kept: so many, or a share of the tokens (rounded down, at least one); 0: all of them."""


class ClustersConfig(Config):
    """Means of k clusters of a text's vectors: fixed (the paper's C4x8: 4 and 8, C8x32: 8 and 32) or relative (C25: 0.25).

    A text of no more than k tokens keeps all its vectors. ``renormalize`` brings the means to length 1, as indexes that
    compare cosines expect; the paper does not normalise.
    """

    kind: Literal["clusters"] = "clusters"
    queries: Amount = 8
    documents: Amount = 32
    iterations: int = Field(10, ge=1)
    renormalize: bool = True

    def counts(self, lengths_B: np.ndarray, *, query: bool) -> np.ndarray:
        """Returns how many vectors texts of these numbers of tokens keep."""
        return _amount(lengths_B, self.queries if query else self.documents)

    def pooled(self, values_TD: Tensor, lengths_B: np.ndarray, *, query: bool) -> Tensor:
        """Returns the vectors kept of all texts end to end, ``(R, D)``, with gradient to every token."""
        return _clustered(values_TD, lengths_B, self.counts(lengths_B, query=query), self)


class TailConfig(Config):
    """The last vectors of a text (the paper's tail pruning)."""

    kind: Literal["tail"] = "tail"
    queries: Amount = 8
    documents: Amount = 32

    def counts(self, lengths_B: np.ndarray, *, query: bool) -> np.ndarray:
        """Returns how many vectors texts of these numbers of tokens keep."""
        return _amount(lengths_B, self.queries if query else self.documents)

    def pooled(self, values_TD: Tensor, lengths_B: np.ndarray, *, query: bool) -> Tensor:
        """Returns the vectors kept of all texts end to end, ``(R, D)``."""
        counts_B = self.counts(lengths_B, query=query)
        return values_TD[_tensor(_spans(np.cumsum(lengths_B) - counts_B, counts_B), values_TD)]


class SpacingConfig(Config):
    """Every k-th vector of a text, beginning with the first (the paper's k-spacing); 1: all."""

    kind: Literal["spacing"] = "spacing"
    queries: int = Field(2, ge=1)
    documents: int = Field(2, ge=1)

    def counts(self, lengths_B: np.ndarray, *, query: bool) -> np.ndarray:
        """Returns how many vectors texts of these numbers of tokens keep."""
        return -(-lengths_B // (self.queries if query else self.documents))

    def pooled(self, values_TD: Tensor, lengths_B: np.ndarray, *, query: bool) -> Tensor:
        """Returns the vectors kept of all texts end to end, ``(R, D)``."""
        within_T = _spans(np.zeros_like(lengths_B), lengths_B)
        return values_TD[_tensor(np.flatnonzero(within_T % (self.queries if query else self.documents) == 0), values_TD)]


TokenPoolConfig = Annotated[ClustersConfig | TailConfig | SpacingConfig, Field(discriminator="kind")]


def _amount(lengths_B: np.ndarray, amount: int | float) -> np.ndarray:
    if amount == 0:
        return lengths_B
    if isinstance(amount, int):
        return np.minimum(lengths_B, amount)
    return np.minimum(lengths_B, np.maximum((amount * lengths_B).astype(np.int64), 1))


def _spans(starts_B: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """The numbers ``start`` to ``start + count`` of each text, end to end."""
    firsts_B = np.cumsum(counts_B) - counts_B
    return np.repeat(starts_B - firsts_B, counts_B) + np.arange(counts_B.sum())


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


def _clustered(values_TD: Tensor, lengths_B: np.ndarray, counts_B: np.ndarray, config: ClustersConfig) -> Tensor:
    """The means of each text that has more tokens than it may keep, the vectors of the others, in the texts' order."""
    starts_B = np.cumsum(lengths_B) - lengths_B
    sources_B, parts, taken = starts_B.copy(), [values_TD], len(values_TD)
    # Texts of like lengths are padded together, to at most twice their tokens.
    sizes_B = np.where(counts_B < lengths_B, np.ceil(np.log2(np.maximum(lengths_B, 1))), -1).astype(np.int64)
    for size in np.unique(sizes_B[sizes_B >= 0]):
        texts = np.flatnonzero(sizes_B == size)
        parts.append(_means(values_TD, starts_B[texts], lengths_B[texts], counts_B[texts], config))
        sources_B[texts] = taken + np.cumsum(counts_B[texts]) - counts_B[texts]
        taken += int(counts_B[texts].sum())
    if len(parts) == 1:
        return values_TD
    return torch.cat(parts)[_tensor(_spans(sources_B, counts_B), values_TD)]


def _means(
    values_TD: Tensor, starts_B: np.ndarray, lengths_B: np.ndarray, counts_B: np.ndarray, config: ClustersConfig
) -> Tensor:
    """The means of these texts' clusters end to end; the texts are padded to the longest."""
    mask_BL = np.arange(lengths_B.max()) < lengths_B[:, None]
    padded_BLD = values_TD[_tensor(starts_B[:, None] + mask_BL * np.arange(lengths_B.max()), values_TD)]
    with torch.no_grad():
        assigned_BLK = lloyd(padded_BLD.detach(), mask_BL, counts_B, config.iterations)
    sizes_BK1 = assigned_BLK.sum(1)[..., None]
    means_BKD = assigned_BLK.transpose(1, 2) @ padded_BLD / sizes_BK1.clamp(min=1)
    kept_R = np.flatnonzero(np.arange(counts_B.max()) < counts_B[:, None])
    means_RD = means_BKD.flatten(0, 1)[_tensor(kept_R, values_TD)]
    return torch.nn.functional.normalize(means_RD, dim=-1) if config.renormalize else means_RD


def lloyd(values_BLD: Tensor, mask_BL: np.ndarray, counts_B: np.ndarray, iterations: int) -> Tensor:
    """Returns k-means clusters of each text: ``(B, L, K)``, 1 where a token belongs to a cluster, else 0.

    ``mask_BL``: which places are tokens; ``counts_B``: how many clusters a text gets, less than it has tokens. Clusters
    begin at evenly spaced tokens. One that is left without tokens begins anew at the token farthest from its own centre,
    several at the next ones; if it is still empty at the end (vectors that are equal), it takes that token beside the
    cluster that has it, so no cluster is ever without one.
    """
    number_K, counts_B1 = np.arange(counts_B.max()), counts_B[:, None]
    first_BK = np.minimum((2 * number_K + 1) * mask_BL.sum(1, keepdims=True) // (2 * counts_B1), mask_BL.shape[1] - 1)
    centres_BKD = values_BLD[torch.arange(len(values_BLD))[:, None], _tensor(first_BK, values_BLD)]
    unused_BK, tokens_BL = _tensor(number_K >= counts_B1, values_BLD), _tensor(mask_BL, values_BLD)
    for _ in range(iterations):
        assigned_BLK, lost_BL = _assign(values_BLD, centres_BKD, tokens_BL, unused_BK)
        assigned_BLK = _filled(assigned_BLK, lost_BL, unused_BK)
        centres_BKD = assigned_BLK.transpose(1, 2) @ values_BLD / assigned_BLK.sum(1)[..., None].clamp(min=1)
    return assigned_BLK


def _assign(values_BLD: Tensor, centres_BKD: Tensor, mask_BL: Tensor, unused_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's nearest centre as (B, L, K), and by how much it is off (B, L; -inf where there is no token)."""
    half_BK = (centres_BKD.square().sum(-1) / 2).masked_fill(unused_BK, torch.inf)
    near_BLK = torch.baddbmm(half_BK[:, None], values_BLD, centres_BKD.transpose(1, 2), beta=-1)
    best_BL, nearest_BL = near_BLK.max(-1)
    assigned_BLK = torch.zeros_like(near_BLK).scatter_(2, nearest_BL[..., None], mask_BL[..., None].to(near_BLK.dtype))
    lost_BL = values_BLD.square().sum(-1) / 2 - best_BL
    return assigned_BLK, lost_BL.masked_fill(~mask_BL, -torch.inf)


def _filled(assigned_BLK: Tensor, lost_BL: Tensor, unused_BK: Tensor) -> Tensor:
    """The assignment with every empty cluster given the token that is farthest off, the next one the next."""
    empty_BK = (assigned_BLK.sum(1) == 0) & ~unused_BK
    farthest_BK = lost_BL.topk(empty_BK.shape[1], dim=1).indices
    token_BK = farthest_BK.gather(1, (empty_BK.cumsum(1) - 1).clamp(min=0))
    return assigned_BLK.scatter_add(1, token_BK[:, None], empty_BK[:, None].to(assigned_BLK.dtype))
