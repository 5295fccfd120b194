"""Gradients of a large batch in the memory of a small one (GradCache, arXiv 2101.06983), equal to the plain step.

All texts of a batch, whatever their role, run as one length-sorted stream of micro-batches. Each micro-batch has its own
dropout seed, so running it a second time gives the same numbers. With several ranks each runs its share of the same
micro-batches (:mod:`openembed.train.parallel`). Shapes: U texts, R rows of their representations (one a text, or one a
token vector), B texts of a micro-batch, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from openembed.config import Config
from openembed.data.batch import Batch
from openembed.encoder import Encoder
from openembed.objectives import Loss, Objective
from openembed.packing import TokenRows, pack
from openembed.seeds import derive
from openembed.train.parallel import KeepWhole, Replicated


class ComputeConfig(Config):
    """How a step is computed; none of it changes what is learned, up to rounding and dropout draws.

    ``chunk_tokens``: tokens a micro-batch; "auto" measures once what fits and keeps to it when the run is resumed.
    ``live_chunks``: how many micro-batches (of a rank) keep their activations for the backward pass; the others run twice
    (gradient caching). "all" is the plain step, fastest and largest. ``gradient_checkpointing`` recomputes inside the
    backbone instead. ``compile``: the backbone's layers go through ``torch.compile``, which makes the first step longer and
    the others faster (one process). ``max_length``: tokens a text (None: the model's). ``parallel``: what several ranks hold,
    all weights each (``ddp``) or a part each (``fsdp``); ``keep_whole``: what is not split under fsdp until a step's last
    micro-batch.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    chunk_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = 16384
    live_chunks: Annotated[int, Field(ge=0)] | Literal["all"] = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    max_length: int | None = Field(default=None, ge=1)
    parallel: Literal["ddp", "fsdp"] = "ddp"
    keep_whole: KeepWhole = "gradients"


PLACEMENT = {"parallel", "keep_whole"}
"""Settings of :class:`ComputeConfig` that say where a step is computed: a run may be resumed with others."""


@dataclass(frozen=True)
class Prepared:
    """A batch with its texts tokenized, in the order of the objective's views; ``step``: the optimizer step it is for."""

    batch: Batch
    rows: TokenRows
    step: int = 0


def prepare(encoder: Encoder, objective: Objective, batch: Batch, compute: ComputeConfig, step: int = 0) -> Prepared:
    """Returns ``batch`` with its views tokenized; runs no model."""
    views = objective.views(batch)
    return Prepared(batch, encoder.tokenize(views.texts, views.prompts, compute.max_length, queries=views.queries), step)


def backward(
    encoder: Encoder,
    objective: Objective,
    prepared: Prepared,
    compute: ComputeConfig,
    *,
    seed: int,
    scale: float = 1.0,
    ranks: Replicated | None = None,
    last: bool = True,
) -> Loss:
    """Adds the gradient of ``scale`` · loss to the encoder's parameters and returns the loss (detached).

    The representations of all micro-batches are computed first, the loss is differentiated with respect to them, then
    each micro-batch carries its share back to the parameters: at once when its activations were kept, else after running
    it again under the same dropout seed. The result does not depend on ``live_chunks``. With several ``ranks`` a rank adds
    the gradient of its own texts; ``ranks.finish`` makes it that of the batch. ``last``: no other batch follows in the step.
    """
    ranks, rows = ranks or Replicated(), prepared.rows
    chunks, places = rows.micro_batches(compute.chunk_tokens), _Places(encoder, rows)
    mine = ranks.assigned([int(rows.lengths[indices].sum()) for indices in chunks])
    first_live = 0 if compute.live_chunks == "all" else len(mine) - compute.live_chunks

    def run(number: int | None) -> Tensor:
        if number is None:  # keeps this rank in step with the others
            return _forward(encoder, rows, np.array([rows.lengths.argmin()]), compute, seed)
        return _forward(encoder, rows, chunks[number], compute, derive(seed, "chunk", number))

    values: list[Tensor] = []
    for place, number in enumerate(mine):
        with nullcontext() if place >= first_live else torch.no_grad():
            values.append(run(number))
    own_RD = torch.zeros(places.count, encoder.width, device=encoder.device)
    for number, value in zip(mine, values, strict=True):
        if number is not None:
            own_RD[places.of(chunks[number])] = value.detach()

    leaf_RD = ranks.gather(own_RD).requires_grad_()
    loss = objective.loss(encoder.represent(leaf_RD, rows), prepared.batch, prepared.step)
    (loss.total * scale).backward()
    assert leaf_RD.grad is not None
    for place in reversed(range(len(mine))):
        number, value = mine[place], values.pop()
        if place < first_live:
            value = run(number)
        ranks.before_backward(last=last and place == 0)
        value.backward(torch.zeros_like(value) if number is None else leaf_RD.grad[places.of(chunks[number])])
    return Loss(loss.total.detach(), loss.parts, loss.diagnostics)


class _Places:
    """Which rows of the table of all representations are those of a text: one, or one a token vector."""

    def __init__(self, encoder: Encoder, rows: TokenRows) -> None:
        self._counts_U = encoder.rows_of(rows)
        self._starts_U = np.cumsum(self._counts_U) - self._counts_U
        self.count, self._device = int(self._counts_U.sum()), encoder.device

    def of(self, texts: np.ndarray) -> Tensor:
        """Returns the table's rows of these texts, text after text."""
        counts, starts = self._counts_U[texts], self._starts_U[texts]
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return torch.from_numpy(np.repeat(starts, counts) + within).to(self._device)


def _forward(encoder: Encoder, rows: TokenRows, indices: np.ndarray, compute: ComputeConfig, seed: int) -> Tensor:
    packed = pack(rows, indices, encoder.device)
    # Autocast is entered anew for each pass: the weights it casts and keeps under no_grad carry no gradient.
    with (
        seeded(seed, encoder.device),
        torch.autocast(encoder.device.type, torch.bfloat16, enabled=compute.precision == "bf16"),
    ):
        return encoder(packed).float()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Runs the block under torch's generators seeded with ``seed``; afterwards they are as they were before."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
