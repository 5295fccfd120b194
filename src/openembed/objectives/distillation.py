"""Distillation: a student learns a teacher's vectors (cosine or squared error) or its scores (KL divergence).

Three sources of teaching. ``vectors``: a folder of the teacher's vectors of every text (an encode stage writes it); texts
need no labels then. ``ensemble``: several teachers' scores of a query's candidates, whatever their kinds. Without either, the
scores that mining recorded beside positives and hard negatives. Shapes: U texts of a batch, Q rows, N documents, D student
width, E teacher width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from openembed.data.batch import Batch
from openembed.data.teacher import TeacherVectors
from openembed.losses import cosine_distance_rows, kl_divergence_rows, margin_mse_rows, squared_error_rows, weighted_mean
from openembed.objectives import Loss, sides, split_by_source
from openembed.objectives.ensemble import EnsembleConfig, recorded_scores
from openembed.objectives.regularizers import Regularized, RegularizedObjective, sparsity
from openembed.representations import Dense, Representation
from openembed.similarity import SimilarityName, cosine, similarity

ENSEMBLE_TEMPERATURE = 1.0


class DistillationConfig(Regularized):
    """What of the teacher is learned.

    ``embedding``: each text's vector, by ``cosine`` distance or ``squared_error`` (needs ``vectors``). A teacher wider than
    the student is projected to the student's width on its principal directions, which keeps its cosines as well as that
    width can. ``score_weight``: of KL(teacher || student) over scores / ``temperature``; with ``vectors`` each text against
    all others of the batch (the teacher at full width), without them each row's positives and hard negatives under the
    recorded scores, brought to the student's scale by ``teacher_temperature`` (cosines: leave it as it is). ``ensemble``: the
    score term learns from these teachers instead, by the loss named there; where ``temperature`` is not given it is 1 then, for
    the target has the ensemble's ``scale``, not that of cosines. ``similarity``: the student's, with ``k_train`` for
    ``xtr``. ``regularizers``: what is added for weights over the vocabulary.
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
    ensemble: EnsembleConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _temperature_of_an_ensemble(cls, values: Any) -> Any:
        """A default of its own, written out, so that it counts in what names a stage."""
        if isinstance(values, dict) and values.get("ensemble") is not None:
            return {"temperature": ENSEMBLE_TEMPERATURE, **values}
        return values

    @model_validator(mode="after")
    def _teaches_something(self) -> DistillationConfig:
        if self.vectors is None and self.embedding != "none":
            raise ValueError(
                f"embedding = {self.embedding!r} needs vectors; give them, or embedding = 'none' to use recorded scores"
            )
        if self.embedding == "none" and not self.score_weight:
            raise ValueError("nothing is learned: embedding is 'none' and score_weight is 0; set one of them")
        if self.ensemble is not None and not self.score_weight:
            raise ValueError("an ensemble teaches scores, and score_weight is 0; set it")
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of vectors it learns from: ``vectors``, then the ensemble's."""
        own = () if self.vectors is None else (self.vectors,)
        return own if self.ensemble is None else (*own, *self.ensemble.folders)

    def at(self, folders: Sequence[str]) -> DistillationConfig:
        """Returns the same settings reading these folders instead of :attr:`folders`."""
        own = 0 if self.vectors is None else 1
        changes: dict[str, Any] = {"vectors": folders[0]} if own else {}
        if self.ensemble is not None:
            changes["ensemble"] = self.ensemble.at(folders[own:])
        return self.model_copy(update=changes)

    def build(self) -> Distillation:
        """Returns the objective; ``ValueError`` when ``vectors`` is no folder of teacher vectors."""
        return Distillation(self, None if self.vectors is None else TeacherVectors(self.vectors))


class Distillation(RegularizedObjective):
    """The teacher's vectors and scores as targets."""

    def __init__(self, config: DistillationConfig, teacher: TeacherVectors | None) -> None:
        super().__init__(config.regularizers)
        self.config, self.teacher = config, teacher
        self._ensemble = None if config.ensemble is None else config.ensemble.build()
        self._directions: dict[int, Tensor] = {}

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
        queries, documents = sides(representations, batch)
        if config.score_weight:
            name, parts[name], rows_Q = self._score_term(representations, queries, documents, batch, teacher_UE)
            total = total + config.score_weight * parts[name]
            diagnostics = diagnostics or ({} if rows_Q is None else split_by_source(rows_Q, batch))
        penalty, penalties = self.penalties(queries, documents, step)
        parts |= penalties
        return Loss(
            total + penalty,
            {name: value.item() for name, value in parts.items()},
            diagnostics | sparsity(queries, documents),
        )

    def _projected(self, teacher_UE: Tensor, width: int) -> Tensor:
        """The teacher's vectors at the student's width; as they are when the widths agree."""
        assert self.teacher is not None
        if width == self.teacher.width:
            return teacher_UE
        if width not in self._directions:
            self._directions[width] = torch.from_numpy(self.teacher.principal_directions(width))
        return teacher_UE @ self._directions[width].to(teacher_UE.device)

    def _score_term(
        self,
        representations: Representation,
        queries: Representation,
        documents: Representation,
        batch: Batch,
        teacher_UE: Tensor | None,
    ) -> tuple[str, Tensor, Tensor | None]:
        """The name and value of the term, and its rows (Q,) where it is a mean over rows."""
        config, score = self.config, similarity(self.config.similarity, self.config.k_train)
        if self._ensemble is None and teacher_UE is not None:
            student = score(representations, representations)
            others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
            return "kl", kl_divergence_rows(student, cosine(teacher_UE, teacher_UE), others, config.temperature).mean(), None
        student_QN = score(queries, documents)
        if self._ensemble is None:
            teacher_QN, candidates_QN = (tensor.to(student_QN.device) for tensor in recorded_scores(batch))
            name, scale = "kl", config.temperature / (config.teacher_temperature or config.temperature)
            teacher_QN = teacher_QN * scale
        else:
            name = self._ensemble.config.loss
            teacher_QN, candidates_QN = self._ensemble.target(batch, student_QN.device)
        if name == "kl":
            rows_Q = kl_divergence_rows(student_QN, teacher_QN, candidates_QN, config.temperature)
        else:
            positives_QN = torch.zeros_like(candidates_QN)
            positives_QN[tuple(torch.from_numpy(batch.positive_P2.T))] = True
            rows_Q = margin_mse_rows(student_QN, teacher_QN, positives_QN, candidates_QN)
        return name, weighted_mean(rows_Q, torch.from_numpy(batch.weight_Q).to(rows_Q.device)), rows_Q
