"""sentence-transformers dense checkpoints: Transformer, Pooling, Dense, Normalize and prompts become our parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from openembed.backbones.text import BackboneConfig, load_text_backbone
from openembed.checkpoints.weights import place, read_file
from openembed.config import parse
from openembed.encoder import Encoder, EncoderConfig, PromptConfig
from openembed.files import read_json
from openembed.heads.projection import ACTIVATIONS, ProjectionConfig
from openembed.tokenization import TokenizerConfig

POOLING_KINDS = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_length",
    "weightedmean": "weighted_mean",
    "lasttoken": "last_token",
}
"""sentence-transformers' pooling modes and our heads."""

LEGACY_POOLING = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The flags older releases wrote, in the order their outputs are concatenated."""


def load_sentence_transformers(folder: Path, dtype: torch.dtype | None, head_dtype: torch.dtype | None = None) -> Encoder:
    """Returns the encoder; raises ``ValueError`` naming the first module that has no counterpart here."""
    from openembed.checkpoints import read_tokenizer

    modules = {kind: [] for kind in ("Transformer", "Pooling", "Dense", "Normalize")}
    for row in read_json(folder / "modules.json"):
        kind = row["type"].rpartition(".")[2]
        if kind not in modules or not row["type"].startswith("sentence_transformers."):
            raise ValueError(f"{folder}: module {row['type']} is not supported; known are {', '.join(modules)}")
        modules[kind].append(folder / row["path"])
    if len(modules["Transformer"]) != 1 or len(modules["Pooling"]) != 1:
        raise ValueError(f"{folder}: expected one Transformer and one Pooling module in modules.json")
    body, pooling = modules["Transformer"][0], read_json(modules["Pooling"][0] / "config.json")
    settings = read_optional(body / "sentence_bert_config.json")
    tokenizer_settings = read_optional(body / "tokenizer_config.json")
    backbone_config = BackboneConfig(path=str(body), attention="model")
    backbone = load_text_backbone(backbone_config, dtype=dtype)
    fields = {
        "backbone": backbone_config,
        "head": _head(pooling, folder),
        "projections": [dense_layer(path) for path in modules["Dense"]],
        "tokenizer": TokenizerConfig(
            eos_token=read_eos(tokenizer_settings),
            pool_instruction="include" if pooling.get("include_prompt", True) else "exclude_by_count_and_prefix",
            lowercase=bool(settings.get("do_lower_case", False)),
        ),
        "prompts": read_prompts(read_optional(folder / "config_sentence_transformers.json")),
        "max_length": read_max_length(settings, tokenizer_settings, backbone.model.config),
    }
    config = parse(EncoderConfig, fields, str(folder))
    encoder = Encoder(config, read_tokenizer(body, config.tokenizer), backbone, config.head.build(backbone.width))
    for projection, path in zip(encoder.projections, modules["Dense"], strict=True):
        place(projection, dense_weights(path), head_dtype or dtype, str(path))
    return encoder.eval()


def read_optional(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, an empty one where there is no file."""
    return read_json(path) if path.is_file() else {}


def _head(pooling: dict[str, Any], folder: Path) -> dict[str, Any]:
    modes = pooling.get("pooling_mode") or [mode for flag, mode in LEGACY_POOLING.items() if pooling.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    unknown = [mode for mode in modes if mode not in POOLING_KINDS]
    if unknown or not modes:
        raise ValueError(f"{folder}: pooling mode {unknown or 'none'} is not supported; known are {', '.join(POOLING_KINDS)}")
    kinds = [POOLING_KINDS[mode] for mode in modes]
    if "cls" in kinds and not pooling.get("include_prompt", True):
        if len(kinds) > 1:
            raise ValueError(f"{folder}: cls pooling beside others with include_prompt = false is not supported")
        return {"kind": "cls", "after_instruction": True}
    return {"kind": kinds[0]} if len(kinds) == 1 else {"kind": "concat", "parts": kinds}


def dense_layer(path: Path) -> ProjectionConfig:
    """Returns the layer of a Dense module's folder."""
    config = read_json(path / "config.json")
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")[2].lower()
    activation = {"identity": "none"}.get(activation, activation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{path}: activation {activation!r} is not supported; known are {', '.join(ACTIVATIONS)}")
    return ProjectionConfig(
        width=config["out_features"],
        bias=config.get("bias", True),
        activation=activation,
        residual=config.get("use_residual", False),
    )


def dense_weights(path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of a Dense module's folder."""
    if (path / "model.safetensors").is_file():
        return read_file(path / "model.safetensors")
    old = path / "pytorch_model.bin"
    if not old.is_file():
        raise ValueError(f"{path}: neither model.safetensors nor pytorch_model.bin is there")
    return torch.load(old, map_location="cpu", weights_only=True)


def read_prompts(settings: dict[str, Any]) -> PromptConfig:
    """Returns the prompts of ``config_sentence_transformers.json``."""
    named = {name: text for name, text in (settings.get("prompts") or {}).items() if isinstance(text, str)}
    default = named.get(settings.get("default_prompt_name") or "", "")
    document = next((named[name] for name in ("document", "passage", "corpus") if name in named), default)
    return PromptConfig(query=named.get("query", default), document=document, named=named)


def read_eos(tokenizer_settings: dict[str, Any]) -> str | None:
    """Returns the end token of a tokenizer whose settings ask for one (``tokenizer.json`` alone may not add it)."""
    if not tokenizer_settings.get("add_eos_token"):
        return None
    eos = tokenizer_settings.get("eos_token")
    return eos["content"] if isinstance(eos, dict) else eos


def read_max_length(settings: dict[str, Any], tokenizer_settings: dict[str, Any], model_config: Any) -> int:
    """Returns ``max_seq_length``, else what tokenizer and position table allow (as sentence-transformers does), at most 512."""
    if settings.get("max_seq_length"):
        return int(settings["max_seq_length"])
    limits = (tokenizer_settings.get("model_max_length"), getattr(model_config, "max_position_embeddings", None))
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 1_000_000]
    return min(known, default=512)
