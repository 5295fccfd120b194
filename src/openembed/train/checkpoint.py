"""Checkpoints that are whole or absent: written aside, hashed, then renamed; damage is found and named.

A checkpoint ``step-00001000/`` holds ``weights.safetensors`` (trainable parameters), ``optimizer.safetensors`` (AdamW
moments by parameter name), where the objective remembers earlier steps ``objective.safetensors``, and ``state.json`` (step,
settings, SHA-256 of the others). There is no generator state and no scheduler state to keep: data order, dropout and learning
rate are functions of (seed, step). Tensors are whole, whatever the ranks held, so a run may be resumed on another number of
ranks, split or not: rank 0 brings them together, one after another, in its main memory (trainable weights and two moments of
them: 12 bytes a trainable parameter).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openembed.files import fsync_directory, read_json, write_json
from openembed.train.distributed import ALONE, World
from openembed.train.parallel import split_like, whole

logger = logging.getLogger(__name__)

KEPT = 2
"""This many of the newest checkpoints stay on disk."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, from the first gradient it gets; one that never gets any (BERT's pooler) has none."""
WEIGHTS, OPTIMIZER, OBJECTIVE, STATE = "weights.safetensors", "optimizer.safetensors", "objective.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint on disk."""

    path: Path
    step: int
    settings: dict[str, Any]


def save(
    folder: str | Path,
    step: int,
    encoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    *,
    objective: Mapping[str, Tensor] | None = None,
    world: World = ALONE,
) -> Path:
    """Returns the folder of a new checkpoint of ``step`` finished steps and removes all but the newest :data:`KEPT`.

    ``objective``: what it remembers, the same on all ranks. All ranks must call; rank 0 writes, and the others go on when it
    has finished.
    """
    tensors = {
        WEIGHTS: _collected(_trainable(encoder), world),
        OPTIMIZER: _collected(_moments(encoder, optimizer), world),
    }
    if objective:
        tensors[OBJECTIVE] = {name: tensor.cpu().contiguous() for name, tensor in objective.items()}
    return world.lead(lambda: _write(Path(folder), step, tensors, dict(settings)))


def _write(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], settings: dict[str, Any]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    parts = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        for name, values in tensors.items():
            save_file(values, parts / name)
        hashes = {name: _digest(parts / name, flush=True) for name in tensors}
        write_json(parts / STATE, {"step": step, "settings": settings, "sha256": hashes})
        if final.exists():
            shutil.rmtree(final)
        os.replace(parts, final)
    except BaseException:
        shutil.rmtree(parts, ignore_errors=True)
        raise
    fsync_directory(folder)
    for old in _all(folder)[KEPT:]:
        shutil.rmtree(old)
    return final


def latest(folder: str | Path) -> Checkpoint | None:
    """Returns the newest intact checkpoint, or None when there is none at all.

    A damaged one is named in the log and passed over for the one before; ``ValueError`` when all are damaged. What an
    interrupted write left behind is removed.
    """
    folder = Path(folder)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged = []
    for path in _all(folder):
        try:
            return _open(path)
        except ValueError as error:
            logger.warning("%s; trying the checkpoint before it", error)
            damaged.append(path.name)
    if damaged:
        raise ValueError(f"{folder}: every checkpoint is damaged ({', '.join(damaged)}); delete them to start anew")
    return None


def restore(checkpoint: Checkpoint, encoder: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts weights and optimizer state back, bit for bit, each rank its part; ``ValueError`` for another model's."""
    from safetensors.torch import load_file

    parameters = _trainable(encoder)
    weights = load_file(checkpoint.path / WEIGHTS)
    moments = load_file(checkpoint.path / OPTIMIZER)
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"{checkpoint.path}: trainable parameters differ from this model's: {', '.join(different[:5])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(split_like(weights[name], parameter))
            keys = [key for key in MOMENTS if f"{name}/{key}" in moments]
            state = {key: moments[f"{name}/{key}"] for key in keys}
            if state:
                optimizer.state[parameter] = {
                    key: value if key == "step" else split_like(value, parameter) for key, value in state.items()
                }


def remembered(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Returns what the objective remembered; nothing for most."""
    from safetensors.torch import load_file

    path = checkpoint.path / OBJECTIVE
    return load_file(path) if path.is_file() else {}


def _open(path: Path) -> Checkpoint:
    if not (path / STATE).is_file():
        raise ValueError(f"checkpoint {path} is damaged: no {STATE}")
    state = read_json(path / STATE)
    if not {"step", "settings", "sha256"} <= set(state):
        raise ValueError(f"checkpoint {path} is damaged: {STATE} lacks fields")
    for name, expected in state["sha256"].items():
        if not (path / name).is_file() or _digest(path / name) != expected:
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing, cut short or changed")
    return Checkpoint(path, state["step"], state["settings"])


def _all(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def _trainable(encoder: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}


def _moments(encoder: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in _trainable(encoder).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _collected(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU of rank 0; nothing on the others, which must take part."""
    collected = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if world.leads:
            collected[name] = full.cpu().contiguous()
    return collected


def _digest(path: Path, *, flush: bool = False) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
    return digest
