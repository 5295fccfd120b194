"""Learned sparse checkpoints of others: sentence-transformers' SparseEncoder, OpenSearch's, and plain language models.

sentence-transformers: a language model and SpladePooling, alone or as the document side of a Router whose query side is a
SparseStaticEmbedding. OpenSearch's own layout: a masked language model and ``idf.json``, the weight of each token of a query;
on the hub both lie in one folder, and then the modules are read, which say more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from openembed.backbones.text import BackboneConfig, load_text_backbone
from openembed.checkpoints.language_head import language_head, take_language_head
from openembed.checkpoints.sentence_transformers import read_eos, read_max_length, read_optional, read_prompts
from openembed.checkpoints.weights import read_file
from openembed.config import parse
from openembed.encoder import Encoder, EncoderConfig
from openembed.files import read_json
from openembed.heads.idf_lookup import ABSENT, IdfLookupConfig
from openembed.tokenization import TextTokenizer, TokenizerConfig

logger = logging.getLogger(__name__)

ACTIVATIONS = {"relu": "log1p_relu", "log1p_relu": "log1p_log1p_relu"}
"""What sentence-transformers calls the function before its logarithm, and our names with the logarithm."""

IDF_NAME, ROUTER_NAME, POOLING_CONFIG = "idf.json", "router_config.json", "config.json"
TRANSFORMERS = ("Transformer", "MLMTransformer")


@dataclass(frozen=True)
class Layout:
    """The folders of a SparseEncoder's modules."""

    body: Path
    pooling: Path
    lookup: Path | None


def is_sparse(folder: Path) -> bool:
    """Returns whether ``modules.json`` describes a sparse encoder, of a known layout or not."""
    kinds = {_kind(row["type"]) for row in read_json(folder / "modules.json")}
    if "Router" in kinds:
        kinds |= {_kind(name) for name in read_optional(folder / ROUTER_NAME).get("types", {}).values()}
    return bool(kinds & {"SpladePooling", "SparseStaticEmbedding", "SparseAutoEncoder", "MLMTransformer"})


def load_sparse(folder: Path, dtype: torch.dtype | None, head_dtype: torch.dtype | None = None) -> Encoder:
    """Returns the encoder of a SparseEncoder folder; raises ``ValueError`` for a module without a counterpart here."""
    from openembed.checkpoints import read_tokenizer

    layout = _layout(folder)
    settings = read_optional(layout.body / "sentence_bert_config.json")
    tokenizer_settings = read_optional(layout.body / "tokenizer_config.json")
    backbone_config = BackboneConfig(path=str(layout.body), attention="model")
    backbone = load_text_backbone(backbone_config, dtype=dtype)
    fields = {
        "backbone": backbone_config,
        "head": {**_head_settings(backbone.model.config, folder), **_pooling_settings(layout.pooling)},
        "query_head": None if layout.lookup is None else _lookup_config(layout.lookup),
        "tokenizer": TokenizerConfig(
            eos_token=read_eos(tokenizer_settings),
            pool_instruction="include",
            lowercase=bool(settings.get("do_lower_case", False)),
        ),
        "prompts": read_prompts(read_optional(folder / "config_sentence_transformers.json")),
        "max_length": read_max_length(settings, tokenizer_settings, backbone.model.config),
    }
    config = parse(EncoderConfig, fields, str(folder))
    encoder = Encoder(config, read_tokenizer(layout.body, config.tokenizer), backbone, config.head.build(backbone.width))
    if not take_language_head(encoder, layout.body):
        raise ValueError(f"{layout.body}: the language model's head has no weights, or of other shapes; download it again")
    encoder.head.to(head_dtype or dtype)
    if encoder.query_head is not None:
        encoder.query_head.set_table(_lookup_weights(layout.lookup, encoder.query_head.width))
    return encoder.eval()


def open_search_head(folder: Path) -> dict[str, Any]:
    """Returns the head's settings for OpenSearch's own layout: as a SpladePooling in the folder says, else as up to v2.

    ``idf.json`` does not say whether the logarithm is taken once (v1, v2) or twice (v3); the log says what was assumed.
    """
    stated = sorted(folder.glob(f"*SpladePooling/{POOLING_CONFIG}"))
    if stated:
        return {"kind": "splade", **_pooling_settings(stated[0].parent)}
    logger.warning(
        "%s: one logarithm is taken, as by OpenSearch's v1 and v2 models; nothing here says otherwise. "
        "Of a v3 model: openembed.load(path, head={'kind': 'splade', 'activation': 'log1p_log1p_relu'})",
        folder,
    )
    return {"kind": "splade"}


def splade_fields(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ``head`` and ``query_head`` of a plain language model's folder that is to be a sparse encoder.

    What ``given`` leaves open of the head is the language model's own; ``idf.json`` makes queries a lookup.
    """
    from transformers import AutoConfig

    found = language_head(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    head = {**({} if found is None else found.settings), **given}
    return {"head": head, "query_head": {"kind": "idf_lookup"} if (folder / IDF_NAME).is_file() else None}


def take_weights(encoder: Encoder, folder: Path) -> bool:
    """Puts what ``folder`` has for the vocabulary head and the query table into them; returns whether the head was there."""
    if encoder.query_head is not None and (folder / IDF_NAME).is_file():
        encoder.query_head.set_table(read_idf(folder / IDF_NAME, encoder.tokenizer))
        logger.info("%s: queries are looked up in its %s", folder, IDF_NAME)
    return take_language_head(encoder, folder)


def read_idf(path: Path, tokenizer: TextTokenizer) -> np.ndarray:
    """Returns the weights of ``idf.json`` by token id, float32 ``(V,)``; tokens that it lacks weigh what absent ones do.

    Raises ``ValueError`` naming a token that the tokenizer does not have, or a weight that is no number.
    """
    table = read_json(path)
    weights_V = np.full(tokenizer.vocabulary, ABSENT, dtype=np.float32)
    for token, weight in table.items():
        number = tokenizer.backend.token_to_id(token)
        if number is None or not isinstance(weight, int | float):
            reason = (
                "is not in the tokenizer's vocabulary" if number is None else f"has the weight {weight!r}, which is no number"
            )
            raise ValueError(f"{path}: the token {token!r} {reason}; take the table that belongs to this model")
        weights_V[number] = weight
    return weights_V


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def _layout(folder: Path) -> Layout:
    rows = read_json(folder / "modules.json")
    kinds = [_kind(row["type"]) for row in rows]
    if kinds == ["Router"]:
        return _routes(folder / rows[0]["path"])
    if len(kinds) == 2 and kinds[0] in TRANSFORMERS and kinds[1] == "SpladePooling":
        return Layout(folder / rows[0]["path"], folder / rows[1]["path"], None)
    raise ValueError(
        f"{folder}: the modules {', '.join(kinds)} are not supported; known are Transformer, SpladePooling and Router"
    )


def _routes(folder: Path) -> Layout:
    router = read_json(folder / ROUTER_NAME)
    types, routes = router["types"], router["structure"]
    kinds = {side: [_kind(types[name]) for name in names] for side, names in routes.items()}
    document, query = kinds.get("document", []), kinds.get("query", [])
    lookup, same = query == ["SparseStaticEmbedding"], routes.get("query") == routes.get("document")
    splade = len(document) == 2 and document[0] in TRANSFORMERS and document[1] == "SpladePooling"
    if set(kinds) != {"query", "document"} or not splade or not (lookup or same):
        raise ValueError(
            f"{folder / ROUTER_NAME}: routes {kinds} are not supported; known are query: SparseStaticEmbedding (or the "
            "document's modules) and document: Transformer, SpladePooling"
        )
    body, pooling = (folder / name for name in routes["document"])
    return Layout(body, pooling, folder / routes["query"][0] if lookup else None)


def _head_settings(config: PretrainedConfig, folder: Path) -> dict[str, Any]:
    found = language_head(config)
    if found is None:
        raise ValueError(f"{folder}: the head of this language model ({config.model_type}) is of a form that is not supported")
    return {"kind": "splade", "exclude_special": False, **found.settings}


def _pooling_settings(folder: Path) -> dict[str, Any]:
    pooling = read_json(folder / POOLING_CONFIG)
    activation, strategy = pooling.get("activation_function", "relu"), pooling.get("pooling_strategy", "max")
    if activation not in ACTIVATIONS or strategy not in ("max", "sum"):
        raise ValueError(f"{folder}: SpladePooling with {strategy!r} of {activation!r} is not supported")
    return {"activation": ACTIVATIONS[activation], "pooling": strategy}


def _lookup_config(folder: Path) -> IdfLookupConfig:
    frozen = bool(read_optional(folder / "config.json").get("frozen", False))
    return IdfLookupConfig(trainable=not frozen, exclude_special=False)


def _lookup_weights(folder: Path | None, width: int) -> np.ndarray:
    assert folder is not None, "a query head comes from its folder"
    weights = read_file(folder / "model.safetensors").get("weight")
    if weights is None or weights.ndim != 1 or len(weights) > width:
        raise ValueError(f"{folder}: expected one weight for each of {width} tokens; the table belongs to another model")
    return weights.float().numpy()
