"""Objectives say what to encode and how the representations become a loss; they never run a model themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from openembed.data.batch import Batch
from openembed.representations import Representation


@dataclass(frozen=True)
class Views:
    """The texts to encode, each with the literal prompt put before it; ``queries``: which of them are (None: all alike)."""

    texts: Sequence[str]
    prompts: Sequence[str]
    queries: np.ndarray | None = None


@dataclass(frozen=True)
class Loss:
    """``total`` is what is minimised (a scalar with gradient); ``parts`` are its terms by name; ``diagnostics`` are
    plain JSON values for the metrics file."""

    total: Tensor
    parts: dict[str, float] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)


class Objective(Protocol):
    """What the trainer needs of an objective."""

    def views(self, batch: Batch) -> Views:
        """Returns what to encode for ``batch``."""

    def loss(self, representations: Representation, batch: Batch, step: int = 0) -> Loss:
        """Returns the loss of ``batch``, given one representation a view, in the order of :meth:`views`.

        ``step``: how many optimizer steps are done, for what is turned on gradually.
        """

    def state(self) -> dict[str, Tensor]:
        """Returns what is remembered of earlier steps, for a checkpoint; most objectives remember nothing."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes back what :meth:`state` gave."""


def every_text(batch: Batch) -> Views:
    """Returns every distinct text of the batch once."""
    return Views(batch.texts, batch.prompts, batch.as_query_U)


def sides(representations: Representation, batch: Batch) -> tuple[Any, Any]:
    """Returns the queries' and the documents' representations, of the kind given, in the order of rows and columns."""
    query_Q, document_N = torch.from_numpy(batch.query_Q), torch.from_numpy(batch.document_N)
    device = representations.device
    return representations.select(query_Q.to(device)), representations.select(document_N.to(device))


@torch.no_grad()
def split_by_source(rows_Q: Tensor, batch: Batch) -> dict[str, Any]:
    """Returns the diagnostics ``loss_by_source`` and ``rows_by_source`` of each row's loss (Q,)."""
    rows_Q = rows_Q.detach().cpu()
    losses, counts = {}, {}
    for number, source in enumerate(batch.sources):
        mine = torch.from_numpy(batch.source_Q == number)
        if mine.any():
            losses[source.name] = rows_Q[mine].mean().item()
            counts[source.name] = int(mine.sum())
    return {"loss_by_source": losses, "rows_by_source": counts}
