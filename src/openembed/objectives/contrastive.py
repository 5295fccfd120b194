"""Contrastive learning over row-level batches: InfoNCE with hard and in-batch negatives, Matryoshka as an option.

NV-Embed sections 3.3 and 4: stage 1 trains with in-batch and hard negatives, stage 2 with hard negatives only.
Shapes: U texts, Q rows, N documents.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from openembed import similarity
from openembed.config import Config
from openembed.data.batch import Batch, Candidates, InBatch, allowed_mask
from openembed.data.margin import MarginConfig
from openembed.losses import info_nce_rows, weighted_mean
from openembed.objectives import Loss, Views, split_by_source
from openembed.representations import Dense

HISTOGRAM_BINS = 40
"""Similarity histograms have this many equal bins from -1 to 1."""


class ContrastiveConfig(Config):
    """Settings of the contrastive objective.

    ``in_batch`` says which documents of other rows may be negatives, for the rows whose source permits any: ``all``,
    their ``positives`` only, or ``none`` (NV-Embed stage 2). ``teacher_margin`` drops a hard negative whose teacher
    score is too close to the positive's. ``matryoshka`` sums the loss over the first d dimensions for each d given,
    weighted by ``matryoshka_weights`` (all 1 when empty); list the full width to train it too.
    """

    kind: Literal["contrastive"] = "contrastive"
    temperature: float = Field(default=0.02, gt=0)
    similarity: Literal["cosine", "dot"] = "cosine"
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


class Contrastive:
    """InfoNCE of every row against its allowed candidates."""

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config = config
        self._similarity = {"cosine": similarity.cosine, "dot": similarity.dot}[config.similarity]

    def views(self, batch: Batch) -> Views:
        """Returns every distinct text of the batch once."""
        return Views(batch.texts, batch.prompts)

    def loss(self, representations: Dense, batch: Batch) -> Loss:
        """Returns the loss over the batch's rows and what the report shows of it."""
        device = representations.values_ND.device
        candidates = allowed_mask(batch, self.config.in_batch, self.config.teacher_margin)
        positives_QN = torch.from_numpy(candidates.positives_QN).to(device)
        allowed_QN = torch.from_numpy(candidates.allowed_QN).to(device)
        weights_Q = torch.from_numpy(batch.weight_Q).to(device)
        queries = representations.select(torch.from_numpy(batch.query_Q).to(device))
        documents = representations.select(torch.from_numpy(batch.document_N).to(device))

        widths = self.config.matryoshka or (representations.width,)
        width_weights = self.config.matryoshka_weights or (1.0,) * len(widths)
        rows_Q = representations.values_ND.new_zeros(batch.rows, dtype=torch.float32)
        parts: dict[str, float] = {}
        for width, weight in zip(widths, width_weights, strict=True):
            scores_QN = self._similarity(queries.truncated(width).values_ND, documents.truncated(width).values_ND)
            width_Q = info_nce_rows(scores_QN, positives_QN, allowed_QN, self.config.temperature)
            rows_Q = rows_Q + weight * width_Q
            parts[f"info_nce_{width}"] = weighted_mean(width_Q.detach(), weights_Q).item()
        diagnostics = _diagnostics(self._similarity(queries.values_ND, documents.values_ND), rows_Q, candidates, batch)
        return Loss(weighted_mean(rows_Q, weights_Q), parts, diagnostics)


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
