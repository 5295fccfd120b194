"""Contrastive learning over row-level batches: InfoNCE with hard and in-batch negatives, Matryoshka as an option.

NV-Embed sections 3.3 and 4: stage 1 trains with in-batch and hard negatives, stage 2 with hard negatives only.
Shapes: U texts, Q rows, N documents.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from openembed.data.batch import Batch, Candidates, InBatch, allowed_mask
from openembed.data.margin import MarginConfig
from openembed.losses import info_nce_rows, weighted_mean
from openembed.objectives import Loss, sides, split_by_source
from openembed.objectives.regularizers import Regularized, RegularizedObjective, sparsity
from openembed.representations import Dense, Representation
from openembed.similarity import SimilarityName, similarity

HISTOGRAM_BINS = 40
"""Similarity histograms have this many equal bins from -1 to 1."""


class ContrastiveConfig(Regularized):
    """Settings of the contrastive objective.

    ``in_batch`` says which documents of other rows may be negatives, for the rows whose source permits any: ``all``,
    their ``positives`` only, or ``none`` (NV-Embed stage 2). ``teacher_margin`` drops a hard negative whose teacher
    score is too close to the positive's. ``matryoshka`` sums the loss over the first d dimensions for each d given,
    weighted by ``matryoshka_weights`` (all 1 when empty); list the full width to train it too. ``k_train``: of ``xtr``, see
    :func:`openembed.late_interaction.xtr`. ``regularizers``: what is added for weights over the vocabulary.
    """

    kind: Literal["contrastive"] = "contrastive"
    temperature: float = Field(default=0.02, gt=0)
    similarity: SimilarityName = "cosine"
    k_train: int = Field(default=256, ge=1)
    in_batch: InBatch = "all"
    teacher_margin: MarginConfig | None = None
    matryoshka: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _weights_match(self) -> ContrastiveConfig:
        if self.matryoshka_weights and len(self.matryoshka_weights) != len(self.matryoshka):
            raise ValueError(
                f"{len(self.matryoshka)} matryoshka dimensions but {len(self.matryoshka_weights)} matryoshka_weights; "
                "give one weight a dimension, or none"
            )
        return self

    def build(self) -> Contrastive:
        """Returns the objective."""
        return Contrastive(self)


class Contrastive(RegularizedObjective):
    """InfoNCE of every row against its allowed candidates."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__(config.regularizers)
        self.config = config
        self._similarity = similarity(config.similarity, config.k_train)

    def loss(self, representations: Representation, batch: Batch, step: int = 0) -> Loss:
        """Returns the loss over the batch's rows and what the report shows of it."""
        device = representations.device
        candidates = allowed_mask(batch, self.config.in_batch, self.config.teacher_margin)
        positives_QN = torch.from_numpy(candidates.positives_QN).to(device)
        allowed_QN = torch.from_numpy(candidates.allowed_QN).to(device)
        weights_Q = torch.from_numpy(batch.weight_Q).to(device)
        queries, documents = sides(representations, batch)

        rows_Q = torch.zeros(batch.rows, device=device)
        parts: dict[str, float] = {}
        for name, width, weight in self._widths(representations):
            scores_QN = self._similarity(_truncated(queries, width), _truncated(documents, width))
            width_Q = info_nce_rows(scores_QN, positives_QN, allowed_QN, self.config.temperature)
            rows_Q = rows_Q + weight * width_Q
            parts[name] = weighted_mean(width_Q.detach(), weights_Q).item()
        if width != representations.width:
            scores_QN = self._similarity(queries, documents)
        penalty, penalties = self.penalties(queries, documents, step)
        parts |= {name: value.item() for name, value in penalties.items()}
        diagnostics = _diagnostics(scores_QN, rows_Q, candidates, batch) | sparsity(queries, documents)
        return Loss(weighted_mean(rows_Q, weights_Q) + penalty, parts, diagnostics)

    def _widths(self, representations: Representation) -> list[tuple[str, int, float]]:
        """The widths the loss is taken at, each with the name of its term and its weight."""
        if not isinstance(representations, Dense):
            if self.config.matryoshka:
                raise ValueError("matryoshka cuts dense vectors; leave it out with this head")
            return [("info_nce", representations.width, 1.0)]
        widths = self.config.matryoshka or (representations.width,)
        names = [f"info_nce_{width}" for width in widths]
        return list(zip(names, widths, self.config.matryoshka_weights or (1.0,) * len(widths), strict=True))


def _truncated(representations: Representation, width: int) -> Representation:
    return representations if width == representations.width else representations.truncated(width)  # type: ignore[union-attr]


@torch.no_grad()
def _diagnostics(scores_QN: Tensor, rows_Q: Tensor, candidates: Candidates, batch: Batch) -> dict[str, Any]:
    scores_QN = scores_QN.detach().cpu()
    similarities = {
        "positive": scores_QN[torch.from_numpy(candidates.positives_QN)],
        "hard": scores_QN[torch.from_numpy(candidates.hard_QN)],
        "in_batch": scores_QN[torch.from_numpy(candidates.allowed_QN & ~candidates.hard_QN)],
    }
    return {
        **split_by_source(rows_Q, batch),
        "rows_without_negatives": int((~candidates.allowed_QN.any(1)).sum()),
        "false_negatives_masked": int(candidates.masked_QN.sum()),
        "similarity": {name: _summary(values) for name, values in similarities.items()},
    }


def _summary(values: Tensor) -> dict[str, Any]:
    """Count, mean (None when there are none) and the histogram over -1..1; scores beyond fall into the end bins."""
    histogram = torch.histc(values.clamp(-1, 1), bins=HISTOGRAM_BINS, min=-1, max=1)
    return {
        "count": values.numel(),
        "mean": values.mean().item() if values.numel() else None,
        "histogram": [int(count) for count in histogram],
    }
