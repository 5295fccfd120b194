"""The vocabulary head of pretrained language models: where its weights are, taken over into ours and written back.

Nothing is read from names of models. A tiny twin (the model's own class and configuration, no layers, a vocabulary of 64)
shows which of its modules follow the backbone, and its logits must be those of one of the two forms that our head knows:
states times a matrix, or dense, activation and LayerNorm before it.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from openembed.backbones.text import quiet_unless_terminal
from openembed.encoder import Encoder
from openembed.files import read_json
from openembed.heads.splade import TRANSFORM_ACTIVATIONS, Splade, SpladeConfig

logger = logging.getLogger(__name__)

TWIN_VOCABULARY = 64
NEVER = -1e4
"""Bias of an entry that must not count, in files of programs that know no such entries."""


@dataclass(frozen=True)
class LanguageHead:
    """A language model's head: the names of its modules in the model, and the settings of ours that compute the same."""

    output: str
    dense: str | None
    norm: str | None
    biases: tuple[str, ...]
    """Where the bias of the output is: the same numbers under each name."""
    settings: dict[str, Any]
    """Fields of :class:`SpladeConfig`."""

    def names(self) -> dict[str, tuple[str, ...]]:
        """Returns for each of our head's tensors what the model calls it."""
        found: dict[str, tuple[str, ...]] = {}
        if self.dense is not None:
            found |= {"dense.weight": (f"{self.dense}.weight",), "dense.bias": (f"{self.dense}.bias",)}
        if self.norm is not None:  # old files say gamma and beta
            weight, bias = (
                (f"{self.norm}.{name}", f"{self.norm}.{old}") for name, old in (("weight", "gamma"), ("bias", "beta"))
            )
            found |= {"norm.weight": weight, "norm.bias": bias}
        if not self.settings["tied"]:
            found["matrix_VD"] = (f"{self.output}.weight",)
        if self.biases:
            found["bias_V"] = self.biases
        return found


def language_head(config: Any) -> LanguageHead | None:
    """Returns the head of the language model of a transformers configuration; None where there is none that ours can be."""
    kind = language_model(config)
    if kind is None:
        return None
    for layers in (0, 1):  # a layer of a large model takes a while to make, and some models cannot be without
        try:
            return _matching(_twin(kind, config, layers))
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, NameError) as error:
            logger.debug("%s with %d layers: %s", type(config).__name__, layers, error)
    return None


def language_model(config: Any) -> Any:
    """Returns transformers' automatic class for the language model of a configuration, masked if there is one; or None."""
    import transformers

    if type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING:
        return transformers.AutoModelForMaskedLM
    return transformers.AutoModelForCausalLM if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING else None


def take_language_head(encoder: Encoder, folder: Path) -> bool:
    """Puts the weights of the language model in ``folder`` into the encoder's vocabulary head, where they are there and fit.

    Returns whether it did, and logs that.
    """
    head, found = encoder.head, language_head(encoder.backbone.model.config)
    if not isinstance(head, Splade) or found is None:
        return False
    if head.config.transform != found.settings["transform"]:
        wanted, there = head.config.transform, found.settings["transform"]
        logger.info(
            "%s: its language model's head is not taken: transform = %r was asked for, it has %r", folder, wanted, there
        )
        return False
    own, tensors = head.state_dict(), {}
    for ours, theirs in found.names().items():
        if ours in own:
            tensors[ours] = _first(_stored(folder), folder, theirs)
    if head.config.tied and not found.settings["tied"]:
        logger.info("%s: its language model's output matrix is not taken: tied = true was asked for", folder)
        return False
    unfit = [name for name, value in tensors.items() if value is None or value.shape != own[name].shape]
    unfit += [name for name in own if name in ("dense.bias", "norm.bias") and name not in tensors]
    if unfit:
        logger.info("%s: its language model's head is not taken: %s is missing or of another shape", folder, unfit[0])
        return False
    head.load_state_dict(tensors, strict=False)
    taken = "its output matrix" if head.config.transform == "none" else "its transform and output"
    logger.info("%s: the vocabulary head is the checkpoint's own language model head (%s)", folder, taken)
    return True


def fill_language_model(encoder: Encoder) -> nn.Module | None:
    """Returns the language model whose activated logits are the encoder's weights; None where no such model can hold them.

    Entries that must not count get a bias of :data:`NEVER`, or a row of zeros where there is no bias and the matrix is the
    head's own.
    """
    head, config = encoder.head, encoder.backbone.model.config
    found = language_head(config)
    if found is None or not isinstance(head, Splade) or not _same_form(head.config, found.settings):
        return None
    bias_V, matrix_VD = head.biases().clamp_min(NEVER).detach().cpu(), head.output_VD.detach().cpu()
    if not found.biases and bias_V.abs().max() > 0:
        if head.config.tied or not bool(((bias_V == 0) | head.excluded_V.cpu()).all()):
            return None
        matrix_VD = matrix_VD * ~head.excluded_V.cpu()[:, None]
    with torch.device("meta"):
        model = language_model(config).from_config(config)
    prefix = model.base_model_prefix
    state = {f"{prefix}.{name}": value.detach().cpu() for name, value in encoder.backbone.model.state_dict().items()}
    ours = {**head.state_dict(), "bias_V": bias_V, "matrix_VD": matrix_VD}
    for name, theirs in found.names().items():
        state |= {their: ours[name].detach().cpu().to(matrix_VD.dtype) for their in theirs if name in ours}
    wanted = model.state_dict()
    state[f"{found.output}.weight"] = matrix_VD
    missing = [name for name in wanted if name not in state]
    if missing:
        return None
    model.load_state_dict({name: state[name] for name in wanted}, assign=True)
    model.tie_weights()
    return model


def _twin(kind: Any, config: Any, layers: int) -> nn.Module:
    """The language model of ``config`` with so few layers and with a small vocabulary, its weights random."""
    small = copy.deepcopy(config)
    small.vocab_size, small.num_hidden_layers = TWIN_VOCABULARY, layers
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 0)
    if getattr(small, "layer_types", None) is not None:
        small.layer_types = small.layer_types[:layers]
    small._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), quiet_unless_terminal():
        torch.manual_seed(0)
        twin = kind.from_config(small, dtype=torch.float32).eval()
        for parameter in twin.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))  # biases start at 0 and would not be seen
    return twin


@torch.no_grad()
def _matching(twin: nn.Module) -> LanguageHead | None:
    """The form of our head that gives the twin's logits."""
    output, base = twin.get_output_embeddings(), twin.base_model
    inside = {id(module) for module in base.modules()}
    names = {id(module): name for name, module in twin.named_modules()}
    others = [m for m in twin.modules() if id(m) not in inside and m is not output and not list(m.children())]
    others = [m for m in others if list(m.parameters(recurse=False))]
    dense, norm = ([m for m in others if isinstance(m, kind)] for kind in (nn.Linear, nn.LayerNorm))
    if len(others) != len(dense) + len(norm) or (len(dense), len(norm)) not in ((0, 0), (1, 1)):
        return None
    ids = torch.arange(1, TWIN_VOCABULARY - 1)[None]
    mask = {"attention_mask": torch.ones_like(ids)}
    logits, states = twin(input_ids=ids, **mask).logits, base(input_ids=ids, **mask).last_hidden_state
    tied = output.weight is twin.get_input_embeddings().weight
    bias = output.bias if getattr(output, "bias", None) is not None else _loose_bias(twin, inside)
    settings: dict[str, Any] = {"transform": "mlm" if dense else "none", "tied": tied, "bias": bias is not None}
    if dense:
        norm_bias = norm[0].bias is not None
        settings |= {"dense_bias": dense[0].bias is not None, "norm_bias": norm_bias, "norm_epsilon": norm[0].eps}
    for name, function in TRANSFORM_ACTIVATIONS.items():
        transformed = norm[0](function(dense[0](states))) if dense else states
        if torch.allclose(F.linear(transformed, output.weight, bias), logits, atol=1e-4, rtol=1e-4):
            settings |= {"transform_activation": name} if dense else {}
            biases = tuple(n for n, p in twin.named_parameters(remove_duplicate=False) if p is bias)
            parts = (names[id(dense[0])], names[id(norm[0])]) if dense else (None, None)
            return LanguageHead(names[id(output)], *parts, biases, settings)
    return None


def _loose_bias(twin: nn.Module, inside: set[int]) -> Tensor | None:
    """A bias of the vocabulary that is a parameter of its own."""
    modules = [module for module in twin.modules() if id(module) not in inside]
    loose = [p for m in modules for p in m.parameters(recurse=False) if p.shape == (TWIN_VOCABULARY,) and p.ndim == 1]
    return loose[0] if len(loose) == 1 and not any(isinstance(m, nn.Linear) and m.bias is loose[0] for m in modules) else None


def _same_form(config: SpladeConfig, settings: dict[str, Any]) -> bool:
    compared = ("transform", "tied", "transform_activation", "dense_bias", "norm_bias", "norm_epsilon")
    return all(getattr(config, name) == settings.get(name, getattr(config, name)) for name in compared)


def _stored(folder: Path) -> dict[str, str]:
    """In which file of ``folder`` each tensor is."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return read_json(index)["weight_map"]
    single, old = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not single.is_file():
        return dict.fromkeys(_read_old(old), old.name) if old.is_file() else {}
    with safe_open(str(single), framework="pt") as file:
        return dict.fromkeys(file.keys(), single.name)


def _first(files: dict[str, str], folder: Path, names: tuple[str, ...]) -> Tensor | None:
    """The first of these tensors that is there."""
    found = next((name for name in names if name in files), None)
    if found is None:
        return None
    path = folder / files[found]
    if path.suffix == ".bin":
        return _read_old(path)[found]
    with safe_open(str(path), framework="pt") as file:
        return file.get_tensor(found)


def _read_old(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
