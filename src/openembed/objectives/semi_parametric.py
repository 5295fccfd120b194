"""Vocabulary disentanglement (VDR, arXiv 2212.07699; SVDR): texts meet in weights over the vocabulary and in their own words.

Each side has a full representation (q, p), a gated one (q_k, p_k: the largest ``top_k`` weights and the text's own tokens) and
its bag of words (b_q, b_p), which needs no model. With NLL the two-way softmax loss below::

    gated = "query"   ½ [ NLL(q_k, p) + NLL(b_q, p) ]                                  (VDR)
    gated = "both"    ¼ [ NLL(q_k, p) + NLL(q, p_k) + NLL(b_q, p) + NLL(q, b_p) ]      (SVDR)

One side is always whole, so that gradients reach weights that were not kept. The terms with a bag are the entry loss: they make
"word in, document out" work without a model on the query's side, and tie each dimension to its word. NLL(A, C) is the InfoNCE
of each row over its candidates plus that of each positive over the rows it may be a negative of, raw inner products without
temperature; their code compares with the whole batch in the second direction, our mask leaves known positives out of both.

Shapes: Q rows, N documents, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from openembed.config import Config
from openembed.data.batch import Batch, InBatch, allowed_mask
from openembed.heads.splade import largest
from openembed.losses import info_nce_rows, weighted_mean
from openembed.objectives import Loss, sides, split_by_source
from openembed.objectives.regularizers import RegularizedObjective, sparsity
from openembed.representations import Representation, Sparse
from openembed.similarity import dot


class SemiParametricConfig(Config):
    """Settings of the objective; the head must give ``bags``.

    ``top_k``: weights kept of a gated text besides its own tokens. ``gated``: see above. ``entry_weight``: of the terms with a
    bag against those without, 1 as published, 0 leaves them out. ``contrastive_mask``: entries that no text of the batch has
    are dealt out to the rows; each is then part of its row's bag and not of its positive, so that rare entries are pushed down
    (in their code, off in the settings they used). ``scale``: weights are divided by it before they are compared, 1 as
    published; for models whose logits are larger than BERT's, so that terms with a bag (linear in the weights) and without
    (quadratic) stay of one size.
    """

    kind: Literal["semi_parametric"] = "semi_parametric"
    top_k: int = Field(768, ge=1)
    gated: Literal["query", "both"] = "query"
    entry_weight: float = Field(1.0, ge=0)
    contrastive_mask: bool = False
    in_batch: InBatch = "all"
    scale: float = Field(1.0, gt=0)

    def build(self) -> SemiParametric:
        """Returns the objective."""
        return SemiParametric(self)


class SemiParametric(RegularizedObjective):
    """See the module."""

    def __init__(self, config: SemiParametricConfig) -> None:
        super().__init__(())
        self.config = config

    def loss(self, representations: Representation, batch: Batch, step: int = 0) -> Loss:
        """Returns the loss over the batch's rows; ``parts`` are its terms before they are weighted."""
        if not isinstance(representations, Sparse) or representations.bag_NV is None:
            raise ValueError(
                "this objective needs weights over the vocabulary and each text's own tokens: set head.bags = true"
            )
        config, (queries, documents) = self.config, sides(representations, batch)
        q, p = (side.values_NV.float() / config.scale for side in (queries, documents))
        q_k, p_k = (
            values * largest(values.detach(), config.top_k, side.bag_NV) for values, side in ((q, queries), (p, documents))
        )
        sparse = {"parametric_query": (q_k, p)}
        entry = {"entry_query": self._entry(queries.bag_NV, p, batch, flip=False)} if config.entry_weight else {}
        if config.gated == "both":
            sparse["parametric_document"] = (q, p_k)
            if config.entry_weight:
                entry["entry_document"] = self._entry(documents.bag_NV, q, batch, flip=True)
        candidates = allowed_mask(batch, config.in_batch)
        masks = [torch.from_numpy(mask).to(q.device) for mask in (candidates.positives_QN, candidates.allowed_QN)]
        weights_Q = torch.from_numpy(batch.weight_Q).to(q.device)
        rows_Q, parts = torch.zeros(batch.rows, device=q.device), {}
        for terms, weight in ((sparse, 1.0), (entry, config.entry_weight)):
            for name, (left_QV, right_NV) in terms.items():
                term_Q = two_way_rows(dot(left_QV, right_NV), *masks)
                parts[name] = weighted_mean(term_Q.detach(), weights_Q).item()
                rows_Q = rows_Q + term_Q * weight / (len(terms) * (1 + config.entry_weight))
        diagnostics = split_by_source(rows_Q, batch) | sparsity(Sparse(q_k), Sparse(p_k))
        return Loss(weighted_mean(rows_Q, weights_Q), parts, diagnostics)

    def _entry(self, bag_MV: Tensor, other_MV: Tensor, batch: Batch, *, flip: bool) -> tuple[Tensor, Tensor]:
        """The bag of one side and the full weights of the other, queries first; under the contrastive mask, both changed."""
        bag_MV = bag_MV.float()
        if self.config.contrastive_mask:
            _, first = np.unique(batch.positive_P2[:, 0], return_index=True)
            row_R, column_R = torch.from_numpy(batch.positive_P2[first].T).to(bag_MV.device)
            owners, others = (column_R, row_R) if flip else (row_R, column_R)
            bag_MV, other_MV = dealt(bag_MV, other_MV, owners, others)
        return (other_MV, bag_MV) if flip else (bag_MV, other_MV)


def dealt(bag_MV: Tensor, other_MV: Tensor, owners_R: Tensor, others_R: Tensor) -> tuple[Tensor, Tensor]:
    """Returns both with every entry v that no bag has given to pair ``v mod R``: 1 in its owner's bag, 0 in its other text."""
    entries_V = torch.arange(bag_MV.shape[1], device=bag_MV.device)
    unused_V = entries_V[~(bag_MV > 0).any(0)]
    pair_V = unused_V % len(owners_R)
    bag_MV, keep_MV = bag_MV.clone(), torch.ones_like(other_MV)
    bag_MV[owners_R[pair_V], unused_V] = 1.0
    keep_MV[others_R[pair_V], unused_V] = 0.0
    return bag_MV, other_MV * keep_MV


def two_way_rows(scores_QN: Tensor, positives_QN: Tensor, allowed_QN: Tensor) -> Tensor:
    """Returns each row's InfoNCE over its candidates plus its positives' over the rows they may be negatives of (Q,)."""
    forward_Q = info_nce_rows(scores_QN, positives_QN, allowed_QN, 1.0)
    backward_N = info_nce_rows(scores_QN.T, positives_QN.T, allowed_QN.T, 1.0)
    share_QN = positives_QN / positives_QN.sum(1, keepdim=True).clamp(min=1)
    return forward_Q + share_QN @ backward_N
