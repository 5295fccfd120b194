"""Reading weights: one safetensors file or shards, checked before use, placed into modules strictly."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from openembed.files import read_json


def check_folder(folder: Path) -> None:
    """Raises ``ValueError`` naming the first safetensors file of ``folder`` that is truncated or damaged."""
    for path in sorted(folder.rglob("*.safetensors")):
        check_file(path)


def check_file(path: Path) -> None:
    """Raises ``ValueError`` when the safetensors file at ``path`` is not whole."""
    try:
        with safe_open(str(path), framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged weights ({error}); copy or download the file again") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of ``model.safetensors``, or of the shards that ``model.safetensors.index.json`` lists.

    Raises ``ValueError`` naming the file that is missing, damaged or lacks a tensor its index promises.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed: dict[str, str] = read_json(index)["weight_map"]
        tensors = {}
        for name in sorted(set(listed.values())):
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name}: no such file, though {index.name} lists it; download the shard")
            tensors.update(read_file(folder / name))
        missing = sorted(set(listed) - set(tensors))
        if missing:
            raise ValueError(f"{folder}: the shards lack {len(missing)} tensors that {index.name} lists, first {missing[0]!r}")
        return tensors
    single = folder / "model.safetensors"
    if not single.is_file():
        raise ValueError(f"{folder}: neither model.safetensors nor model.safetensors.index.json is there")
    return read_file(single)


def read_file(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of one safetensors file."""
    check_file(path)
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a dict


def place(module: nn.Module, tensors: MutableMapping[str, Tensor], dtype: torch.dtype | None, where: str) -> None:
    """Moves ``tensors`` into ``module`` as its parameters, every name exactly once, and leaves ``tensors`` empty.

    Emptying it frees each tensor once it is converted: 16-bit and 32-bit weights of a large model never lie side by side.
    Raises ``ValueError`` listing what is missing, what is left over, or the first shape that differs.
    """
    expected = module.state_dict()
    missing, surplus = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or surplus:
        raise ValueError(f"{where}: weights do not fit; missing {missing[:5] or 'none'}, unexpected {surplus[:5] or 'none'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
            raise ValueError(f"{where}: {name} has shape {shapes}")
    converted = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        converted[name] = tensor if dtype is None else tensor.to(dtype)
    module.load_state_dict(converted, strict=True, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
