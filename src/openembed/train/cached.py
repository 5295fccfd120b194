"""Gradients of a large batch in the memory of a small one (GradCache, arXiv 2101.06983), equal to the plain step.

All texts of a batch, whatever their role, run as one length-sorted stream of micro-batches. Each micro-batch has its own
dropout seed, so running it a second time gives the same numbers. Shapes: U texts, B texts of a micro-batch, D width.
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
from openembed.packing import TokenRows, micro_batches, pack
from openembed.representations import Dense
from openembed.seeds import derive


class ComputeConfig(Config):
    """How a step is computed; none of it changes what is learned, up to rounding and dropout draws.

    ``chunk_tokens``: tokens a micro-batch. ``live_chunks``: how many micro-batches keep their activations for the
    backward pass; the others run twice (gradient caching). "all" is the plain step, fastest and largest.
    ``gradient_checkpointing`` recomputes inside the backbone instead. ``compile``: the backbone's layers go through
    ``torch.compile``, which makes the first step longer and the others faster. ``max_length``: tokens a text (None: the
    model's).
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    chunk_tokens: int = Field(default=16384, ge=1)
    live_chunks: Annotated[int, Field(ge=0)] | Literal["all"] = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    max_length: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Prepared:
    """A batch with its texts tokenized, in the order of the objective's views."""

    batch: Batch
    rows: TokenRows


def prepare(encoder: Encoder, objective: Objective, batch: Batch, compute: ComputeConfig) -> Prepared:
    """Returns ``batch`` with its views tokenized; runs no model."""
    views = objective.views(batch)
    return Prepared(batch, encoder.tokenize(views.texts, views.prompts, compute.max_length))


def backward(
    encoder: Encoder, objective: Objective, prepared: Prepared, compute: ComputeConfig, *, seed: int, scale: float = 1.0
) -> Loss:
    """Adds the gradient of ``scale`` · loss to the encoder's parameters and returns the loss (detached).

    The representations of all micro-batches are computed first, the loss is differentiated with respect to them, then
    each micro-batch carries its share back to the parameters: at once when its activations were kept, else after running
    it again under the same dropout seed. The result does not depend on ``live_chunks``.
    """
    chunks = micro_batches(prepared.rows.lengths, compute.chunk_tokens)
    first_live = 0 if compute.live_chunks == "all" else len(chunks) - compute.live_chunks
    values: list[Tensor] = []
    for number, indices in enumerate(chunks):
        with nullcontext() if number >= first_live else torch.no_grad():
            values.append(_forward(encoder, prepared.rows, indices, compute, derive(seed, "chunk", number)))

    leaf_UD = torch.cat([value.detach() for value in values]).requires_grad_()
    back = torch.from_numpy(np.argsort(np.concatenate(chunks), kind="stable")).to(leaf_UD.device)
    loss = objective.loss(Dense(leaf_UD[back]), prepared.batch)
    (loss.total * scale).backward()
    assert leaf_UD.grad is not None
    gradients = leaf_UD.grad.split([len(indices) for indices in chunks])

    for number in reversed(range(len(chunks))):
        value = values.pop()
        if number < first_live:
            value = _forward(encoder, prepared.rows, chunks[number], compute, derive(seed, "chunk", number))
        value.backward(gradients[number])
    return Loss(loss.total.detach(), loss.parts, loss.diagnostics)


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
