"""Checkpoints with a vector a token: sentence-transformers' MultiVectorEncoder, PyLate's, and those of Stanford's ColBERT.

sentence-transformers (6 and later) lists Transformer, Dense, MultiVectorMask and Normalize in ``modules.json``; PyLate (up to
3) lists Transformer and Dense, and keeps the rest in ``config_sentence_transformers.json``; ColBERT has one weight file with
``linear.weight`` beside the backbone's, and ``artifact.metadata``. The last two insert a marker token after [CLS]; here it is
a prompt that the tokenizer reads as one token, which makes the same row.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer

from openembed.backbones.text import BackboneConfig, TextBackbone, load_text_backbone
from openembed.checkpoints.markers import spaced
from openembed.checkpoints.sentence_transformers import dense_layer, dense_weights, read_max_length, read_optional, read_prompts
from openembed.checkpoints.weights import place, read_file
from openembed.config import parse
from openembed.encoder import Encoder, EncoderConfig
from openembed.files import read_json
from openembed.heads.projection import ProjectionConfig
from openembed.heads.token_projection import TokenProjectionConfig
from openembed.tokenization import QueryExpansionConfig, TextTokenizer, TokenizerConfig

ST_CONFIG = "config_sentence_transformers.json"
COLBERT_ARCHITECTURE, COLBERT_METADATA = "HF_ColBERT", "artifact.metadata"
MODULES = {
    "Transformer": "Transformer",
    "Dense": "Dense",
    "MultiVectorMask": "MultiVectorMask",
    "Normalize": "Normalize",
    "pylate.models.Dense.Dense": "Dense",
}
"""The classes that ``modules.json`` may name: sentence-transformers' by their last part, and PyLate's own."""
LENGTHS = ("query_length", "document_length", "query_expansion")
PYLATE_LENGTH, COLBERT_DOCUMENT = 32, 220
"""Tokens of an expanded query, and of ColBERT's documents, where a checkpoint does not say."""


@dataclass(frozen=True)
class _Parts:
    """What the layouts say in their different ways."""

    folder: Path
    layers: list[ProjectionConfig]
    normalize: bool
    skip: list[str]
    skip_queries: bool
    lengths: dict[str, Any]
    expansion_token: str
    lowercase: bool
    prompts: dict[str, Any]
    markers: list[str]


def is_multi_vector(folder: Path) -> bool:
    """True for a folder in one of the layouts that :func:`load_multi_vector` opens."""
    return _is_colbert(folder) or read_optional(folder / ST_CONFIG).get("model_type") in ("MultiVectorEncoder", "ColBERT")


def load_multi_vector(folder: Path, dtype: torch.dtype | None, head_dtype: torch.dtype | None = None) -> Encoder:
    """Returns the encoder; raises ``ValueError`` naming the first module or setting that has no counterpart here."""
    if (folder / "modules.json").is_file():
        return _listed(folder, dtype, head_dtype)
    if _is_colbert(folder):
        return _colbert(folder, dtype, head_dtype)
    raise ValueError(f"{folder}: a model with a vector a token lacks modules.json; download it again")


def _is_colbert(folder: Path) -> bool:
    architectures = read_optional(folder / "config.json").get("architectures") or []
    return COLBERT_ARCHITECTURE in architectures and not (folder / "modules.json").is_file()


def _listed(folder: Path, dtype: torch.dtype | None, head_dtype: torch.dtype | None) -> Encoder:
    """A folder with ``modules.json``: sentence-transformers' or PyLate's."""
    modules = _modules(folder)
    body, settings = modules["Transformer"][0], read_optional(folder / ST_CONFIG)
    own = read_optional(body / "sentence_bert_config.json")
    pylate = settings.get("model_type") == "ColBERT"
    if not pylate and not modules["MultiVectorMask"]:
        raise ValueError(f"{folder}: modules.json lists no MultiVectorMask; without it, which tokens count is undefined")
    mask = {} if pylate else read_json(modules["MultiVectorMask"][0] / "config.json")
    if mask.get("keep_only_token_ids"):
        raise ValueError(f"{folder}: keep_only_token_ids (image tokens) is not supported")
    lengths = _pylate_lengths(settings) if pylate else {key: own.get(key) for key in LENGTHS}
    tokenizer_settings = read_optional(body / "tokenizer_config.json")
    skip = settings.get("skiplist_words", list(string.punctuation)) if pylate else mask.get("skiplist_words")
    tasks = mask.get("skiplist_tasks") or ["document"]
    if "document" not in tasks:
        raise ValueError(f"{folder}: a skip list for {tasks} without documents is not supported")
    parts = _Parts(
        folder=body,
        layers=[dense_layer(path) for path in modules["Dense"]],
        normalize=pylate or bool(modules["Normalize"]),
        skip=skip or [],
        skip_queries="query" in tasks,
        lengths=lengths,
        expansion_token=_spelling(tokenizer_settings.get("mask_token")),
        lowercase=bool(own.get("do_lower_case", False)),
        prompts=_with_prefixes(settings),
        markers=[settings.get(key) or "" for key in ("query_prefix", "document_prefix")],
    )
    tensors = {}
    for number, path in enumerate(modules["Dense"]):
        tensors.update({f"layers.{number}.{name}": tensor for name, tensor in dense_weights(path).items()})
    backbone = load_text_backbone(_backbone_config(body), dtype=dtype)
    limit = read_max_length(own, tokenizer_settings, backbone.model.config)
    return _encoder(parts, backbone, tensors, max(limit, lengths["document_length"] or 0), head_dtype or dtype)


def _modules(folder: Path) -> dict[str, list[Path]]:
    """The folders of the modules by their kind, in order."""
    found: dict[str, list[Path]] = {kind: [] for kind in set(MODULES.values())}
    for row in read_json(folder / "modules.json"):
        short = row["type"].rpartition(".")[2] if row["type"].startswith("sentence_transformers.") else row["type"]
        if short not in MODULES:
            known = "Transformer, Dense, MultiVectorMask, Normalize"
            raise ValueError(f"{folder}: module {row['type']} is not supported in a multi-vector model; known are {known}")
        found[MODULES[short]].append(folder / row["path"])
    if len(found["Transformer"]) != 1:
        raise ValueError(f"{folder}: expected one Transformer module in modules.json, got {len(found['Transformer'])}")
    return found


def _pylate_lengths(settings: dict[str, Any]) -> dict[str, Any]:
    """PyLate's flat settings as sentence-transformers writes them; queries are expanded unless a checkpoint says no."""
    lengths = {"query_length": settings.get("query_length"), "document_length": settings.get("document_length")}
    if settings.get("do_query_expansion") is False:
        return {**lengths, "query_expansion": None}
    attend = bool(settings.get("attend_to_expansion_tokens", False))
    expansion = {"strategy": "fixed", "attend": attend, "length": lengths["query_length"] or PYLATE_LENGTH}
    return {**lengths, "query_length": None, "query_expansion": expansion}


def _with_prefixes(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with PyLate's marker tokens put before the prompts."""
    prompts = dict(settings.get("prompts") or {})
    for name in ("query", "document"):
        prefix = settings.get(f"{name}_prefix") or ""
        if prefix:
            prompts[name] = prefix + (prompts.get(name) or "").removeprefix(prefix)
    return {**settings, "prompts": prompts}


def _colbert(folder: Path, dtype: torch.dtype | None, head_dtype: torch.dtype | None) -> Encoder:
    """A folder of Stanford's ColBERT."""
    metadata, tokenizer_settings = read_optional(folder / COLBERT_METADATA), read_optional(folder / "tokenizer_config.json")
    weight = _linear_weight(folder)
    markers = {
        "query": _led(metadata.get("query_token_id") or "[unused0]"),
        "document": _led(metadata.get("doc_token_id") or "[unused1]"),
    }
    attend = bool(metadata.get("attend_to_mask_tokens"))
    length = metadata.get("query_maxlen") or PYLATE_LENGTH
    parts = _Parts(
        folder=folder,
        layers=[ProjectionConfig(width=weight.shape[0], bias=False)],
        normalize=True,
        skip=list(string.punctuation) if metadata.get("mask_punctuation", True) else [],
        skip_queries=False,
        lengths={
            "query_length": None,
            "document_length": metadata.get("doc_maxlen") or COLBERT_DOCUMENT,
            "query_expansion": {"strategy": "fixed", "attend": attend, "length": length},
        },
        expansion_token=_spelling(tokenizer_settings.get("mask_token")),
        lowercase=False,
        prompts={"prompts": markers},
        markers=list(markers.values()),
    )
    backbone = load_text_backbone(_backbone_config(folder), dtype=dtype)
    limit = read_max_length({}, tokenizer_settings, backbone.model.config)
    return _encoder(parts, backbone, {"layers.0.linear.weight": weight}, limit, head_dtype or dtype)


def _led(marker: str) -> str:
    """A marker with a space behind it; some have it in their name."""
    return marker if marker[-1].isspace() else f"{marker} "


def _linear_weight(folder: Path) -> torch.Tensor:
    """ColBERT's projection, from the file that holds the backbone too."""
    old = folder / "pytorch_model.bin"
    if (folder / "model.safetensors").is_file():
        tensors = read_file(folder / "model.safetensors")
    elif old.is_file():
        tensors = torch.load(old, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"{folder}: neither model.safetensors nor pytorch_model.bin is there")
    if "linear.weight" not in tensors:
        raise ValueError(f"{folder}: the weights of a ColBERT hold linear.weight, these do not; download the model again")
    return tensors["linear.weight"]


def _encoder(
    parts: _Parts, backbone: TextBackbone, tensors: dict[str, torch.Tensor], limit: int, head_dtype: torch.dtype | None
) -> Encoder:
    """The encoder of what a layout says, with the weights of the layers after the backbone."""
    from openembed.checkpoints import read_tokenizer

    expansion = parts.lengths["query_expansion"]
    tokenizer_config = TokenizerConfig(
        pool_instruction="include",
        lowercase=parts.lowercase,
        query_length=parts.lengths["query_length"],
        document_length=parts.lengths["document_length"],
        expansion=None if expansion is None else _expansion(expansion, parts.expansion_token),
    )
    tokenizer = _with_markers(read_tokenizer(parts.folder, tokenizer_config), parts.markers)
    fields = {
        "backbone": _backbone_config(parts.folder),
        "head": _head(parts, tokenizer),
        "tokenizer": tokenizer_config,
        "prompts": read_prompts(_spaced(parts, tokenizer)),
        "max_length": limit,
    }
    config = parse(EncoderConfig, fields, str(parts.folder))
    encoder = Encoder(config, tokenizer, backbone, config.head.build(backbone.width))
    place(encoder.head, tensors, head_dtype, str(parts.folder))
    return encoder.eval()


def _spaced(parts: _Parts, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The settings with as much space behind markers as the tokenizer needs to read what follows as it is alone."""
    prompts = dict(parts.prompts.get("prompts") or {})
    for name, marker in zip(("query", "document"), parts.markers, strict=True):
        if marker.strip():
            prompts[name] = spaced(tokenizer, prompts[name])
    return {**parts.prompts, "prompts": prompts}


def _backbone_config(folder: Path) -> BackboneConfig:
    """Returns the backbone of a folder, seeing what its checkpoint says."""
    return BackboneConfig(path=str(folder), attention="model")


def _expansion(given: dict[str, Any], token: str) -> QueryExpansionConfig:
    return QueryExpansionConfig(
        length=given["length"],
        token=given.get("token") or token,
        attend=bool(given.get("attend", False)),
        cut=given.get("strategy", "fixed") == "fixed",
    )


def _head(parts: _Parts, tokenizer: TextTokenizer) -> TokenProjectionConfig:
    """The head's settings; words to skip that the vocabulary lacks never occur."""
    *before, last = parts.layers or [None]
    plain = last is not None and last.activation == "none" and not last.residual
    if not plain:
        before = parts.layers
    known = tuple(word for word in parts.skip if tokenizer.backend.token_to_id(word) is not None)
    return TokenProjectionConfig(
        width=last.width if plain else 0,
        bias=last.bias if plain else False,
        before=tuple(before),
        normalize=parts.normalize,
        skip="punctuation" if known and set(parts.skip) == set(string.punctuation) else known,
        skip_queries=parts.skip_queries,
    )


def _with_markers(tokenizer: TextTokenizer, prefixes: list[str]) -> TextTokenizer:
    """The tokenizer reading each marker that its vocabulary knows as one token, whatever its normalisation does to it."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    known = backend.get_vocab(with_added_tokens=True)
    names = [next((n for n in (prefix, prefix.strip()) if n in known), None) for prefix in prefixes if prefix.strip()]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names if name])
    return TextTokenizer(backend, tokenizer.config)


def _spelling(token: Any) -> str:
    """A token as settings files spell it: alone or as a table; ``[MASK]`` where there is none."""
    return token["content"] if isinstance(token, dict) else token or "[MASK]"
