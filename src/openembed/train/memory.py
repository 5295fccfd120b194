"""What a training step needs of memory, counted before the first step, and the largest micro-batch that fits.

Weights, gradients and moments follow from the shapes of the parameters. Activations are what autograd keeps of a
micro-batch: the model runs once on shapes alone (fake tensors: no numbers, no memory) and every tensor saved for the
backward pass is counted once. On a GPU, kernels may keep other copies than on a CPU (fused attention over grouped heads
keeps keys and values a query head), so the count is an estimate there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openembed.backbones.adapters import is_quantized, plain_linear
from openembed.encoder import CPU_TOKEN_BUDGET, Encoder
from openembed.packing import TokenRows, micro_batches, pack
from openembed.train.cached import ComputeConfig
from openembed.train.distributed import share
from openembed.train.parallel import BUCKET_BYTES, hollow, layers

logger = logging.getLogger(__name__)

SHARE_OF_DEVICE = 0.9
"""A measured micro-batch may fill this much of the GPU; the rest is for fragments and longer texts."""
SMALLEST_CHUNK = 256
"""Tokens: below this a micro-batch is not tried."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank at the peak of a step. ``workspace``: passing results of the largest layer, and the optimizer's.

    ``weights``: as stored, with what ``fsdp`` makes whole; ``activations``: of the micro-batches that are live at once;
    ``vectors``: of all texts with their gradient, and the scores.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    vectors: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {size(getattr(self, field.name))}" for field in fields(self))
        return f"{size(self.total)} a rank: {parts}"


def estimate_memory(
    encoder: Encoder, compute: ComputeConfig, lengths: np.ndarray, *, pairs: int = 0, ranks: int = 1
) -> MemoryEstimate:
    """Returns the memory of a step over texts of ``lengths`` tokens, of which ``pairs`` (query, document) are scored.

    ``encoder`` is as it is trained (adapters added, precision set); its weights are not read and may be on the meta device.
    """
    assert compute.chunk_tokens != "auto", "settled before it is counted"
    chunks = micro_batches(lengths, compute.chunk_tokens)
    shares = share([int(lengths[indices].sum()) for indices in chunks], ranks)
    passes = max(map(len, shares))
    live = passes if compute.live_chunks == "all" else min(max(1, compute.live_chunks), passes)
    largest = max(chunks, key=lambda indices: int(lengths[indices].sum()))
    saved, widest = activation_bytes(encoder, lengths[largest], compute)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    gradient = sum(p.numel() * 4 for p in trained)
    rows = int(lengths.sum()) if encoder.kind == "tokens" else len(lengths)
    split = ranks if compute.parallel == "fsdp" else 1
    update = gradient // split  # AdamW works on all parameters at once
    return MemoryEstimate(
        weights=_weights(encoder, compute, ranks),
        gradients=_gradients(gradient, compute, ranks, passes),
        moments=2 * gradient // split,
        activations=live * saved,
        vectors=3 * 4 * rows * encoder.width + 4 * 4 * pairs,
        workspace=max(2 * widest + _head_bytes(encoder, compute, int(lengths[largest].sum())), update - live * saved),
    )


def try_estimate(
    encoder: Encoder, compute: ComputeConfig, lengths: np.ndarray, *, pairs: int = 0, ranks: int = 1
) -> MemoryEstimate | None:
    """As :func:`estimate_memory`; None, and a line in the log, for a model whose code cannot run on shapes alone."""
    try:
        return estimate_memory(encoder, compute, lengths, pairs=pairs, ranks=ranks)
    except Exception as error:  # whatever a family's code makes of fake tensors; training does not depend on it
        logger.warning("the step's memory could not be counted (%s: %.200s)", type(error).__name__, error)
        return None


def activation_bytes(encoder: Encoder, lengths: np.ndarray, compute: ComputeConfig) -> tuple[int, int]:
    """Returns the bytes saved for the backward pass of one micro-batch of texts of ``lengths`` tokens, and of the largest
    of its tensors.

    4-bit layers count as plain ones, which keep the same. With gradient checkpointing: what is kept between layers, and
    the inside of one layer while it is run again.
    """
    from torch._subclasses import FakeTensorMode

    count = max(1, len(layers(encoder)))
    twin = hollow(encoder)
    for name in [name for name, module in encoder.named_modules() if is_quantized(module)]:
        twin.set_submodule(name, plain_linear(twin.get_submodule(name), device="meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake(twin)
        if not compute.gradient_checkpointing:
            return _saved(twin, lengths, compute)
        kept, _ = _saved(twin, lengths, compute)
        twin.backbone.model.gradient_checkpointing_disable()
        everything, widest = _saved(twin, lengths, compute)
        return kept + everything // count, widest


@contextmanager
def counting(encoder: nn.Module) -> Iterator[dict[Any, int]]:
    """Yields the bytes of the storages saved for a backward pass in the block, the encoder's own weights left out."""
    own = {_storage(tensor) for tensor in (*encoder.parameters(), *encoder.buffers())}
    kept: dict[Any, int] = {}
    alive: list[Tensor] = []  # a storage that is gone could come again under the same address

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def require_fit(estimate: MemoryEstimate | None, device: torch.device) -> None:
    """Raises ``ValueError`` when ``estimate`` is more than a GPU has, saying what to change; nothing on a CPU."""
    if estimate is None or device.type != "cuda":
        return
    available = available_bytes(device)
    if available is not None and estimate.total > available:
        raise ValueError(
            f"the step will not fit: it needs about {estimate}; {size(available)} are to be had on {device}. "
            "Lower compute.chunk_tokens or live_chunks, set gradient_checkpointing = true, train lora with "
            "compute.precision = 'bf16', load the backbone with quantization = 'nf4', or split it with parallel = 'fsdp'."
        )


def available_bytes(device: torch.device) -> int | None:
    """Returns the memory this process has or could get on ``device``; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def choose_chunk_tokens(encoder: Encoder, compute: ComputeConfig, lengths: np.ndarray, ranks: int) -> int:
    """Returns the micro-batch size for ``chunk_tokens = "auto"``, given the lengths of a first batch.

    On a GPU the largest that fits, from the measured peak of two trial passes (under ``fsdp`` from the count of
    :func:`estimate_memory`, since no rank may fail alone); on a CPU, where larger ones are no faster, the budget that
    encoding uses. No larger than an even share of the batch: a rank with nothing to do would wait.
    """
    even = max(SMALLEST_CHUNK, math.ceil(int(lengths.sum()) / ranks))
    if encoder.device.type != "cuda":
        return min(CPU_TOKEN_BUDGET, even)
    limit = int((available_bytes(encoder.device) or 0) * SHARE_OF_DEVICE)
    if compute.parallel == "fsdp" and ranks > 1:
        return largest_fitting(lambda tokens: _counted(encoder, compute, lengths, tokens, ranks), limit, even)
    return largest_fitting(lambda tokens: _measured(encoder, compute, lengths, tokens), limit, even)


def largest_fitting(peak: Callable[[int], int | None], limit: int, most: int) -> int:
    """Returns the largest multiple of :data:`SMALLEST_CHUNK` up to ``most`` whose ``peak`` (bytes) stays within ``limit``.

    ``peak`` is None where it ran out of memory. Memory grows in a straight line with tokens, so two trials give a guess;
    the guess is tried too and shrunk by a quarter until it fits. ``ValueError`` when not even the smallest does.
    """
    first = peak(SMALLEST_CHUNK)
    if first is None or first > limit:
        raise ValueError(f"not even a micro-batch of {SMALLEST_CHUNK} tokens fits into {size(limit)}; see docs/distributed.md")
    second = peak(2 * SMALLEST_CHUNK)
    slope = max(1, (second or limit) - first) / SMALLEST_CHUNK
    guess = SMALLEST_CHUNK + int((limit - first) / slope)
    guess = min(guess, max(most, SMALLEST_CHUNK)) // SMALLEST_CHUNK * SMALLEST_CHUNK
    while guess > SMALLEST_CHUNK:
        found = peak(guess)
        if found is not None and found <= limit:
            return guess
        guess = int(guess * 0.75) // SMALLEST_CHUNK * SMALLEST_CHUNK
    return SMALLEST_CHUNK


def size(count: int) -> str:
    """Returns bytes in GB (10⁹) or MB (10⁶)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _weights(encoder: Encoder, compute: ComputeConfig, ranks: int) -> int:
    stored = sum(p.nbytes for p in (*encoder.parameters(), *encoder.buffers()))
    if compute.parallel == "ddp" or ranks == 1:
        return stored
    width = 2 if compute.precision == "bf16" else 4
    everything = sum(p.numel() for p in encoder.parameters()) * width
    blocks = [sum(p.numel() for p in layer.parameters()) * width for layer in layers(encoder)]
    if compute.keep_whole == "weights":
        return stored // ranks + everything
    outside = everything - sum(blocks)  # stays whole from the forward to the backward pass
    return stored // ranks + outside + 2 * max(blocks, default=0)  # one layer at work, the next on its way


def _gradients(gradient: int, compute: ComputeConfig, ranks: int, passes: int) -> int:
    if ranks == 1:
        return gradient
    if compute.parallel == "ddp":
        return gradient + min(BUCKET_BYTES, gradient)
    return gradient // ranks + (gradient if passes > 1 and compute.keep_whole != "nothing" else 0)


def _counted(encoder: Encoder, compute: ComputeConfig, lengths: np.ndarray, tokens: int, ranks: int) -> int:
    settled = compute.model_copy(update={"chunk_tokens": tokens})
    return estimate_memory(encoder, settled, lengths, ranks=ranks).total


def _measured(encoder: Encoder, compute: ComputeConfig, lengths: np.ndarray, tokens: int) -> int | None:
    """The peak of a pass over ``tokens`` tokens, and what the rest of a step needs beside it; None: out of memory."""
    device = encoder.device
    live = 1 if compute.live_chunks == "all" else max(1, compute.live_chunks)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=compute.precision == "bf16"):
            value = encoder(_packed(np.full(max(1, tokens // int(lengths.max())), lengths.max()), device))
        value.float().sum().backward()
        peak = torch.cuda.max_memory_allocated(device)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        encoder.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    moments = 8 * sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    return before + live * (peak - before) + moments + 12 * len(lengths) * encoder.width


def _head_bytes(encoder: Encoder, compute: ComputeConfig, tokens: int) -> int:
    """What the head holds for a moment in a micro-batch, where it says so."""
    if not hasattr(encoder.head, "working_bytes"):
        return 0
    return encoder.head.working_bytes(tokens, torch.bfloat16 if compute.precision == "bf16" else None)


def _packed(lengths: np.ndarray, device: torch.device | str = "cpu") -> Any:
    rows = TokenRows([np.zeros(int(length), dtype=np.int64) for length in lengths], np.zeros(len(lengths), dtype=np.int64))
    return pack(rows, device=device)


def _saved(twin: Encoder, lengths: np.ndarray, compute: ComputeConfig) -> tuple[int, int]:
    with (
        counting(twin) as kept,
        torch.enable_grad(),
        torch.autocast("cpu", torch.bfloat16, enabled=compute.precision == "bf16"),
    ):
        result = twin(_packed(lengths)).float()
    del result
    return sum(kept.values()), max(kept.values(), default=0)


def _fake(twin: Encoder) -> None:
    """Turns a hollow encoder's tensors into fake ones."""
    for module in twin.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
