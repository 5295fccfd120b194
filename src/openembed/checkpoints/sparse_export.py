"""The sentence-transformers side of a saved sparse encoder: what ``SparseEncoder(path)`` opens.

The language model in the folder computes the logits; where queries are looked up, a Router stands before it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from openembed.checkpoints.sentence_transformers_export import literal_prompts, write_tokenizer
from openembed.checkpoints.sparse import ACTIVATIONS, ROUTER_NAME
from openembed.encoder import Encoder
from openembed.files import write_json
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

    reason = not_standard(encoder, language_model)
    write_tokenizer(encoder.tokenizer, folder, frame=True)
    if reason:
        logger.info("%s: sentence-transformers cannot open this sparse encoder: %s", folder, reason)
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


def not_standard(encoder: Encoder, language_model: nn.Module | None) -> str:
    """Returns why sentence-transformers' modules would not give the same weights; empty where they do."""
    head, tokenizer = encoder.config.head, encoder.config.tokenizer
    if language_model is None:
        return "no language model of transformers computes these logits"
    if head.activation not in ACTIVATIONS.values():
        return f"it has no activation {head.activation}"
    if head.fold:
        return "it has no entries that count as one (fold)"
    if SideConfig() != head.document or (encoder.query_head is None and SideConfig() != head.query):
        return "it does not keep a part of the weights (top_k, gate, prune_ratio)"
    if tokenizer.query_length is not None or tokenizer.document_length is not None or tokenizer.expansion is not None:
        return "its queries and documents have lengths of their own (query_length, document_length, expansion)"
    if tokenizer.repeat is not None:
        return "it reads a text once, this model twice"
    if tokenizer.truncation != "keep_eos" or tokenizer.lowercase:
        return "it cuts or writes texts differently"
    if any(literal_prompts(encoder).values()) and tokenizer.pool_instruction != "include":
        return "it pools the prompts' tokens too"
    return ""


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
