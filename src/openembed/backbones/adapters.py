"""Low-rank adapters through peft, injected into a backbone in place and merged back exactly."""

from __future__ import annotations

import re
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from openembed.config import Config


class LoraConfig(Config):
    """Low-rank adaptation (NV-Embed: rank 16, alpha 32, dropout 0.1).

    ``targets``: names of the linear layers to adapt, such as ``["q_proj", "v_proj"]``; ``all-linear`` takes every
    linear layer of the backbone (q, k, v, o, gate, up and down in a Llama-style decoder).
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"


def add_lora(model: nn.Module, config: LoraConfig) -> None:
    """Adds adapters to ``model`` (a transformers model) in place and freezes everything else in it.

    The second factor starts at zero, so outputs do not change until training does. The first is drawn from torch's
    generator: seed it. Raises ``ValueError`` when a target names no linear layer or adapters are there already.
    """
    from peft import LoraConfig as PeftLora
    from peft import inject_adapter_in_model

    if has_lora(model):
        raise ValueError("the model carries adapters already; merge them first (merge_lora)")
    inject_adapter_in_model(
        PeftLora(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=_pattern(model, config.targets),
        ),
        model,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def has_lora(model: nn.Module) -> bool:
    """Whether ``model`` carries adapters that are not merged away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def merge_lora(model: nn.Module) -> None:
    """Adds every adapter into its weight and removes it, in place; outputs stay the same up to rounding.

    A 4-bit backbone becomes a bfloat16 one in main memory: the weights it was trained with (as rounded to 4 bits) with the
    adapters added, not rounded to 4 bits again, which would lose most of what was learned. Every parameter is trainable
    afterwards. Raises ``ValueError`` when an adapter holds values that are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        if is_quantized(layer.get_base_layer()):
            merged = dequantized(layer.get_base_layer(), layer.get_delta_weight("default"))
        else:
            layer.merge(safe_merge=True)
            merged = layer.get_base_layer()
        setattr(model.get_submodule(parent), child, merged)
    if has_quantized(model):
        _forget_quantization(model)
    for leftover in ("peft_config", "active_adapter"):
        if hasattr(model, leftover):
            delattr(model, leftover)
    model.requires_grad_(True)


def _pattern(model: nn.Module, targets: tuple[str, ...] | str) -> str:
    """A regular expression over the full names of the linear layers chosen."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if targets == "all-linear":
        chosen = linear
    else:
        chosen = [name for name in linear if name.rpartition(".")[2] in targets]
        missing = sorted(set(targets) - {name.rpartition(".")[2] for name in chosen})
        if missing:
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"lora targets {', '.join(missing)} name no linear layer; there are {', '.join(known)}")
    return "|".join(re.escape(name) for name in chosen)


def is_quantized(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer with 4-bit weights."""
    return isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")


def has_quantized(model: nn.Module) -> bool:
    """Whether ``model`` was loaded in 4 bits."""
    return getattr(model, "hf_quantizer", None) is not None or any(map(is_quantized, model.modules()))


def plain_linear(layer: nn.Module, device: torch.device | str) -> nn.Linear:
    """Returns a frozen bfloat16 linear layer of the shape of a 4-bit one, its values not set."""
    bias = layer.bias is not None
    plain = nn.Linear(layer.in_features, layer.out_features, bias=bias, device=device, dtype=torch.bfloat16)
    return plain.requires_grad_(False)


@torch.no_grad()
def dequantized(layer: nn.Module, delta: torch.Tensor | None = None) -> nn.Linear:
    """Returns a 4-bit layer as a bfloat16 one in main memory, ``delta`` added before it is rounded.

    Raises ``ValueError`` when the result is not finite.
    """
    from bitsandbytes.functional import dequantize_4bit

    stored = layer.weight.to(layer.weight.device)  # on a CPU an inference pass leaves the weights in another layout
    weight = dequantize_4bit(stored.data, stored.quant_state).float()
    weight = weight if delta is None else weight + delta.float()
    if not weight.isfinite().all():
        raise ValueError("an adapter holds values that are not finite; go back to an earlier checkpoint")
    plain = plain_linear(layer, "cpu")
    plain.weight.copy_(weight)
    if layer.bias is not None:
        plain.bias.copy_(layer.bias)
    return plain


def _forget_quantization(model: nn.Module) -> None:
    """Makes the rest of a 4-bit model a plain one, in main memory, as transformers will save it."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_quantized(child):
                setattr(parent, name, dequantized(child))
    for leftover in ("hf_quantizer", "is_loaded_in_4bit", "is_quantized", "quantization_method"):
        if leftover in vars(model):
            delattr(model, leftover)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for module in model.modules():  # not model.to: transformers refuses it for what was quantised
        module._apply(lambda tensor: tensor.cpu(), recurse=False)
