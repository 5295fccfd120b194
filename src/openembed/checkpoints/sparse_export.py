"""The sentence-transformers side of a saved sparse encoder: what ``SparseEncoder(path)`` opens.

The language model in the folder computes the logits; where queries are looked up, a Router stands before it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from openembed.backbones.text import has_causal_layers
from openembed.checkpoints.sentence_transformers_export import literal_prompts, write_tokenizer
from openembed.checkpoints.sparse import ACTIVATIONS, ROUTER_NAME
from openembed.encoder import Encoder
from openembed.files import read_json, write_json
from openembed.heads.splade import SideConfig

logger = logging.getLogger(__name__)

MODULES = "sentence_transformers.sparse_encoder.modules"
TRANSFORMER, ROUTER = "sentence_transformers.base.modules.Transformer", "sentence_transformers.base.modules.Router"
LOGITS = {
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "token_embeddings",
}
MASKED = {"transformer_task": "fill-mask", **LOGITS}
CAUSAL = {"transformer_task": "text-generation", "processing_kwargs": {"text": {"logits_to_keep": 0}}, **LOGITS}
"""How sentence-transformers computes the logits of every token; of a decoder it would keep the last token's alone."""

BODY, POOLING, LOOKUP = ".", "document_1_SpladePooling", "query_0_SparseStaticEmbedding"


def write_sparse_files(encoder: Encoder, folder: Path, language_model: nn.Module | None) -> None:
    """Writes the files beside the model in ``folder``, or says in the log why sentence-transformers cannot run the encoder."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    reasons = list(refused(encoder, language_model))
    write_tokenizer(encoder.tokenizer, folder, frame=True)
    settings = read_json(folder / "tokenizer_config.json")  # the limit is for those who take the language model alone
    write_json(folder / "tokenizer_config.json", {**settings, "model_max_length": encoder.max_length})
    if reasons:
        logger.info("%s: sentence-transformers cannot open this sparse encoder: %s", folder, "; ".join(reasons))
        return
    head = encoder.config.head
    by_ours = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    pooling = {"pooling_strategy": head.pooling, "activation_function": by_ours[head.activation]}
    (folder / POOLING).mkdir()
    write_json(folder / POOLING / "config.json", {**pooling, "embedding_dimension": encoder.width})
    if encoder.query_head is None:
        rows = [{"path": "", "type": TRANSFORMER}, {"path": POOLING, "type": f"{MODULES}.SpladePooling"}]
    else:
        _write_router(encoder, folder)
        rows = [{"path": "", "type": ROUTER}]
    write_json(folder / "modules.json", [{"idx": i, "name": str(i), **row} for i, row in enumerate(rows)])
    task = MASKED if type(encoder.backbone.model.config) in MODEL_FOR_MASKED_LM_MAPPING else CAUSAL
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": encoder.max_length, **task})
    settings = {"prompts": literal_prompts(encoder), "default_prompt_name": None, "similarity_fn_name": "dot"}
    write_json(folder / "config_sentence_transformers.json", {"model_type": "SparseEncoder", **settings})


def refused(encoder: Encoder, language_model: nn.Module | None) -> Iterator[str]:
    """Yields why sentence-transformers' modules would not give the same weights, by the names of settings."""
    head, backbone = encoder.config.head, encoder.backbone
    if language_model is None:
        yield f"head.transform = {head.transform!r}, tied, bias (no language model of transformers computes these logits)"
    if head.activation not in ACTIVATIONS.values():
        yield f"head.activation = {head.activation!r} (there is no activation {head.activation})"
    if head.fold:
        yield "head.fold = true (no entries count as one)"
    for side in ("query", "document"):
        if getattr(head, side) != SideConfig() and not (side == "query" and encoder.query_head is not None):
            yield f"head.{side} (no part of the weights is left out: top_k, gate, prune_ratio)"
    tokens = encoder.tokenizer.backend.get_vocab_size()
    if encoder.query_head is not None and encoder.width != tokens:
        yield f"backbone's vocab_size = {encoder.width} (tables for queries have an entry for each of {tokens} tokens)"
    causal = has_causal_layers(backbone.model)
    if backbone.bidirectional and causal and backbone.opens_masks:
        yield "backbone.attention = 'bidirectional' (the model's own code hides later tokens)"
    elif not backbone.bidirectional and not causal:
        yield "backbone.attention = 'causal' (the model's own code looks both ways)"
    yield from _refused_texts(encoder)


def _refused_texts(encoder: Encoder) -> Iterator[str]:
    """Why texts would become other tokens there, or other tokens would be pooled."""
    tokenizer = encoder.config.tokenizer
    for name in ("query_length", "document_length", "expansion"):
        if getattr(tokenizer, name) is not None:
            yield f"tokenizer.{name} (queries and documents have one length)"
    if tokenizer.repeat is not None:
        yield "tokenizer.repeat (a text is read once, by this model twice)"
    if tokenizer.truncation != "keep_eos" or tokenizer.lowercase:
        yield f"tokenizer.truncation = {tokenizer.truncation!r}, lowercase (texts are cut or written differently)"
    if any(literal_prompts(encoder).values()) and tokenizer.pool_instruction != "include":
        yield f"tokenizer.pool_instruction = {tokenizer.pool_instruction!r} (the prompts' tokens are pooled too: 'include')"


def _write_router(encoder: Encoder, folder: Path) -> None:
    query_head = encoder.query_head
    assert query_head is not None, "asked for only where there is one"
    types = {LOOKUP: f"{MODULES}.SparseStaticEmbedding", BODY: TRANSFORMER, POOLING: f"{MODULES}.SpladePooling"}
    routes = {"query": [LOOKUP], "document": [BODY, POOLING]}
    parameters = {"default_route": "document", "allow_empty_key": True, "route_mappings": {}}
    write_json(folder / ROUTER_NAME, {"types": types, "structure": routes, "parameters": parameters})
    (folder / LOOKUP).mkdir()
    write_json(folder / LOOKUP / "config.json", {"frozen": not query_head.config.trainable})
    save_file({"weight": query_head.table().detach().cpu().contiguous()}, str(folder / LOOKUP / "model.safetensors"))
    encoder.tokenizer.save(folder / LOOKUP)
    write_tokenizer(encoder.tokenizer, folder / LOOKUP, frame=True)
    own = encoder.max_length - len(encoder.tokenizer.prefix) - len(encoder.tokenizer.suffix)  # tables read no frame
    settings = read_json(folder / LOOKUP / "tokenizer_config.json")
    write_json(folder / LOOKUP / "tokenizer_config.json", {**settings, "model_max_length": own})
