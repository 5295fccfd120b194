"""Scores of several teachers of any kind made one target (heterogeneous ensemble distillation, arXiv 2411.04403, section 4).

Each teacher scores a query's candidates on a scale of its own; min-max over the candidates of a query makes them comparable,
their weighted mean times ``scale`` is what the student's raw scores are to follow. Shapes: Q queries, N documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from openembed.config import Config
from openembed.data.batch import Batch, allowed_mask
from openembed.data.teacher import TeacherScores
from openembed.losses import min_max_rows


class TeacherConfig(Config):
    """One teacher: a folder of its ``vectors`` of every text, dense or sparse, or the scores recorded in the rows (None).

    ``queries``: the folder of the queries' vectors, where this teacher encodes queries in another way. ``similarity``: dense
    vectors' (sparse ones have their inner product). ``weight``: its share of the mean, relative to the others'.
    """

    vectors: str | None = None
    queries: str | None = None
    similarity: Literal["cosine", "dot"] = "cosine"
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _queries_of_vectors(self) -> TeacherConfig:
        if self.queries is not None and self.vectors is None:
            raise ValueError("queries without vectors; give the folder of the documents' vectors too")
        return self

    @property
    def folders(self) -> tuple[str, ...]:
        """What it reads, documents first."""
        return tuple(folder for folder in (self.vectors, self.queries) if folder is not None)


class EnsembleConfig(Config):
    """What a student's scores follow.

    ``candidates``: a row's ``own`` positives and hard negatives, or ``in_batch``, all documents that may stand beside them.
    Recorded scores cover a row's own. ``normalize``: ``min_max`` a query, or ``none`` for one teacher whose scale is wanted.
    ``scale``: of the target; the student's scores are not normalised, so it sets their spread. ``loss``: ``kl`` of the softmax
    over candidates, or ``margin_mse`` of the positives' distance to the others.
    """

    teachers: tuple[TeacherConfig, ...] = Field(min_length=1)
    candidates: Literal["own", "in_batch"] = "own"
    normalize: Literal["min_max", "none"] = "min_max"
    scale: float = Field(30.0, gt=0)
    loss: Literal["kl", "margin_mse"] = "kl"

    @property
    def folders(self) -> tuple[str, ...]:
        """What all teachers read, in their order."""
        return tuple(folder for teacher in self.teachers for folder in teacher.folders)

    def at(self, folders: Sequence[str]) -> EnsembleConfig:
        """Returns the ensemble reading these folders instead of :attr:`folders`."""
        given = iter(folders)
        teachers = [
            teacher.model_copy(
                update={name: next(given) for name in ("vectors", "queries") if getattr(teacher, name) is not None}
            )
            for teacher in self.teachers
        ]
        return self.model_copy(update={"teachers": tuple(teachers)})

    def build(self) -> Ensemble:
        """Returns the ensemble; ``ValueError`` when a folder holds no vectors."""
        return Ensemble(self)


class Ensemble:
    """See :class:`EnsembleConfig`."""

    def __init__(self, config: EnsembleConfig) -> None:
        self.config = config
        self._scores = [
            None if teacher.vectors is None else TeacherScores(teacher.vectors, teacher.queries, teacher.similarity)
            for teacher in config.teachers
        ]

    def target(self, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the scores aimed at (Q, N), 0 where there are none, and which pairs have one (Q, N).

        A pair counts when every teacher has scored it. Raises ``ValueError`` for a text that a teacher has no vector of.
        """
        mask = allowed_mask(batch, "none" if self.config.candidates == "own" else "all")
        candidates_QN = torch.from_numpy(mask.positives_QN | mask.allowed_QN)
        queries = [batch.texts[i] for i in batch.query_Q]
        documents = [batch.texts[i] for i in batch.document_N]
        found: list[Tensor] = []
        for scores in self._scores:
            if scores is None:
                teacher_QN, known_QN = recorded_scores(batch)
                candidates_QN = candidates_QN & known_QN
            else:
                teacher_QN = torch.from_numpy(scores(queries, documents))
            found.append(teacher_QN)
        if self.config.normalize == "min_max":
            found = [min_max_rows(teacher_QN, candidates_QN) for teacher_QN in found]
        weights = [teacher.weight for teacher in self.config.teachers]
        mean_QN = sum(weight * teacher_QN for weight, teacher_QN in zip(weights, found, strict=True)) / sum(weights)
        target_QN = (self.config.scale * mean_QN).masked_fill(~candidates_QN, 0.0)
        return target_QN.to(device), candidates_QN.to(device)


def recorded_scores(batch: Batch) -> tuple[Tensor, Tensor]:
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
    return teacher_QN, candidates_QN
