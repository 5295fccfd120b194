"""Distillation: a student learns a teacher's vectors (cosine or squared error) or its scores (KL divergence).

Two sources of teaching. ``vectors``: a folder of the teacher's vectors of every text (an encode stage writes it); texts
need no labels then. Without it, the scores that mining recorded beside positives and hard negatives. Shapes: U texts of a
batch, Q rows, N documents, D student width, E teacher width.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from openembed.config import Config
from openembed.data.batch import Batch
from openembed.data.teacher import TeacherVectors
from openembed.losses import cosine_distance_rows, kl_divergence_rows, squared_error_rows, weighted_mean
from openembed.objectives import Loss, Views, every_text, sides, split_by_source
from openembed.representations import Dense, Representation
from openembed.similarity import SimilarityName, cosine, similarity


class DistillationConfig(Config):
    """What of the teacher is learned.

    ``embedding``: each text's vector, by ``cosine`` distance or ``squared_error`` (needs ``vectors``). A teacher wider than
    the student is projected to the student's width on its principal directions, which keeps its cosines as well as that
    width can. ``score_weight``: of KL(teacher || student) over scores / ``temperature``; with ``vectors`` each text against
    all others of the batch (the teacher at full width), without them each row's positives and hard negatives under the
    recorded scores, brought to the student's scale by ``teacher_temperature`` (cosines: leave it as it is). ``similarity``:
    the student's, with ``k_train`` for ``xtr``.
    """

    kind: Literal["distillation"] = "distillation"
    vectors: str | None = None
    embedding: Literal["cosine", "squared_error", "none"] = "cosine"
    embedding_weight: float = Field(default=1.0, gt=0)
    score_weight: float = Field(default=0.0, ge=0)
    similarity: SimilarityName = "cosine"
    k_train: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.05, gt=0)
    teacher_temperature: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _teaches_something(self) -> DistillationConfig:
        if self.vectors is None and self.embedding != "none":
            raise ValueError(
                f"embedding = {self.embedding!r} needs vectors; give them, or embedding = 'none' to use recorded scores"
            )
        if self.embedding == "none" and not self.score_weight:
            raise ValueError("nothing is learned: embedding is 'none' and score_weight is 0; set one of them")
        return self

    def build(self) -> Distillation:
        """Returns the objective; ``ValueError`` when ``vectors`` is no folder of teacher vectors."""
        return Distillation(self, None if self.vectors is None else TeacherVectors(self.vectors))


class Distillation:
    """The teacher's vectors and scores as targets."""

    def __init__(self, config: DistillationConfig, teacher: TeacherVectors | None) -> None:
        self.config, self.teacher = config, teacher
        self._directions: dict[int, Tensor] = {}

    def views(self, batch: Batch) -> Views:
        """Returns every distinct text of the batch once."""
        return every_text(batch)

    def loss(self, representations: Representation, batch: Batch, step: int = 0) -> Loss:
        """Returns the weighted sum of the terms asked for; each is a mean over texts, or over rows for recorded scores."""
        config, total = self.config, torch.zeros((), device=representations.device)
        parts: dict[str, Tensor] = {}
        diagnostics: dict[str, Any] = {}
        teacher_UE = None
        if self.teacher is not None:
            teacher_UE = torch.from_numpy(self.teacher.lookup(batch.texts)).to(representations.device)
        if config.embedding != "none":
            assert teacher_UE is not None, "the config demands vectors"
            if not isinstance(representations, Dense):
                raise ValueError("only dense vectors can be learned by embedding; set embedding = 'none' with this head")
            target_UD = self._projected(teacher_UE, representations.width)
            rows = cosine_distance_rows if config.embedding == "cosine" else squared_error_rows
            rows_U = rows(representations.values_ND, target_UD)
            parts[config.embedding] = rows_U.mean()
            total = total + config.embedding_weight * parts[config.embedding]
            diagnostics = split_by_source(rows_U.detach().cpu()[torch.from_numpy(batch.query_Q)], batch)
        if config.score_weight:
            parts["kl"] = self._score_term(representations, batch, teacher_UE)
            total = total + config.score_weight * parts["kl"]
        return Loss(total, {name: value.item() for name, value in parts.items()}, diagnostics)

    def _projected(self, teacher_UE: Tensor, width: int) -> Tensor:
        """The teacher's vectors at the student's width; as they are when the widths agree."""
        assert self.teacher is not None
        if width == self.teacher.width:
            return teacher_UE
        if width not in self._directions:
            self._directions[width] = torch.from_numpy(self.teacher.principal_directions(width))
        return teacher_UE @ self._directions[width].to(teacher_UE.device)

    def _score_term(self, representations: Representation, batch: Batch, teacher_UE: Tensor | None) -> Tensor:
        config, score = self.config, similarity(self.config.similarity, self.config.k_train)
        if teacher_UE is not None:
            student = score(representations, representations)
            others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
            return kl_divergence_rows(student, cosine(teacher_UE, teacher_UE), others, config.temperature).mean()
        student_QN = score(*sides(representations, batch))
        teacher_QN, candidates_QN = recorded_scores(batch, student_QN.device)
        scale = config.temperature / (config.teacher_temperature or config.temperature)
        rows_Q = kl_divergence_rows(student_QN, teacher_QN * scale, candidates_QN, config.temperature)
        return weighted_mean(rows_Q, torch.from_numpy(batch.weight_Q).to(rows_Q.device))


def recorded_scores(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the teacher's scores (Q, N), 0 where it gave none, and which pairs it scored (Q, N).

    Raises ``ValueError`` when no pair of the batch has a score.
    """
    pairs = torch.from_numpy(batch.positive_P2), torch.from_numpy(batch.negative_M2)
    scores = torch.from_numpy(batch.positive_score_P), torch.from_numpy(batch.negative_score_M)
    pair_X2, score_X = torch.cat(pairs), torch.cat(scores).float()
    known_X = ~score_X.isnan()
    if not known_X.any():
        raise ValueError(
            "distillation without vectors needs recorded scores, and no row of this batch has any; mine the sources with "
            "the teacher first, or give vectors"
        )
    teacher_QN = torch.zeros(batch.rows, batch.columns)
    candidates_QN = torch.zeros(batch.rows, batch.columns, dtype=torch.bool)
    rows_X, columns_X = pair_X2[known_X].T
    teacher_QN[rows_X, columns_X] = score_X[known_X]
    candidates_QN[rows_X, columns_X] = True
    return teacher_QN.to(device), candidates_QN.to(device)
