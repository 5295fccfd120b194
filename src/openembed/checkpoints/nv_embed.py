"""NV-Embed v1 and v2 checkpoints (``model_type: nvembed``) on today's libraries, without their remote code.

Only the fields that define the model are read; the decoder is transformers' own Mistral, the latent head, the mask, the
pooled span and the tokenizer call are ours. Every tensor of the checkpoint must have its place and the other way round.
"""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openembed.backbones.attention import install_attention
from openembed.backbones.text import BackboneConfig, wrap
from openembed.checkpoints.weights import place, read_tensors
from openembed.encoder import Encoder, EncoderConfig, PromptConfig, TaskInstruction
from openembed.files import read_json
from openembed.heads.latent_attention import LatentAttention, LatentAttentionConfig
from openembed.tokenization import TextTokenizer, TokenizerConfig

BACKBONE_PREFIX, HEAD_PREFIX = "embedding_model.", "latent_attention_model."

HEAD_NAMES = {
    "latents": "latents",
    "cross_attend_blocks.0.norm.weight": "norm.weight",
    "cross_attend_blocks.0.norm.bias": "norm.bias",
    "cross_attend_blocks.0.norm_context.weight": "norm_latents.weight",
    "cross_attend_blocks.0.norm_context.bias": "norm_latents.bias",
    "cross_attend_blocks.0.fn.to_q.weight": "to_q.weight",
    "cross_attend_blocks.0.fn.to_kv.weight": "to_kv.weight",
    "cross_attend_blocks.0.fn.to_out.weight": "to_out.weight",
    "cross_attend_blocks.1.norm.weight": "norm_feed_forward.weight",
    "cross_attend_blocks.1.norm.bias": "norm_feed_forward.bias",
    "cross_attend_blocks.1.fn.net.0.weight": "feed_forward.up.weight",
    "cross_attend_blocks.1.fn.net.0.bias": "feed_forward.up.bias",
    "cross_attend_blocks.1.fn.net.2.weight": "feed_forward.down.weight",
    "cross_attend_blocks.1.fn.net.2.bias": "feed_forward.down.bias",
}
"""The released head's tensor names (after its prefix) and ours."""

TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""The fields of ``text_config`` that define the decoder; several dozen others are leftovers of generation settings."""

PUBLISHED_MAX_LENGTH = 4096
"""The default of the released ``encode``; the published scores were made with 512 (paper, section 5)."""


def load_nv_embed(folder: Path, dtype: torch.dtype | None, head_dtype: torch.dtype | None = None) -> Encoder:
    """Returns the encoder of an NV-Embed layout; raises ``ValueError`` for any tensor missing, left over or misshapen."""
    settings = read_json(folder / "config.json")
    groups = _split(read_tensors(folder), folder)
    dtype = dtype or torch.float32
    backbone_config = BackboneConfig(path=str(folder), attention="bidirectional", sliding_window="off")
    backbone = wrap(_backbone(settings.get("text_config", {}), groups[BACKBONE_PREFIX], dtype, str(folder)), backbone_config)
    head_tensors = groups[HEAD_PREFIX]
    head_config = _head_config(settings.get("latent_attention_config", {}), head_tensors)
    head = _empty(lambda: LatentAttention(head_config, head_tensors["latents"].shape[1]))
    place(head, head_tensors, head_dtype or dtype, f"{folder} ({HEAD_PREFIX}*)")
    config = EncoderConfig(
        backbone=backbone_config,
        head=head_config,
        tokenizer=_tokenizer_config(folder, settings),
        prompts=PromptConfig(template="Instruct: {task}\nQuery: ", tasks=read_tasks(folder)),
        max_length=PUBLISHED_MAX_LENGTH,
    )
    return Encoder(config, TextTokenizer.from_folder(folder, config.tokenizer), backbone, head)


def read_tasks(folder: Path) -> dict[str, TaskInstruction]:
    """Returns the checkpoint's own ``instructions.json`` (v2), else the table of the paper (v1)."""
    path = folder / "instructions.json"
    if not path.is_file():
        table = tomllib.loads(resources.files("openembed.checkpoints").joinpath("nv_embed_tasks.toml").read_text("utf-8"))
        return {name: TaskInstruction(**row) for name, row in table.items()}
    try:
        rows = {name: (row["query"], row.get("corpus", "")) for name, row in read_json(path).items()}
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f'{path}: expected {{task: {{"query": ..., "corpus": ...}}}}; restore the file or remove it') from None
    return {name: TaskInstruction(query=query, document=document) for name, (query, document) in rows.items()}


def _split(tensors: dict[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Sorts tensors into backbone and head by prefix; head names become ours."""
    groups: dict[str, dict[str, Tensor]] = {BACKBONE_PREFIX: {}, HEAD_PREFIX: {}}
    for name, tensor in tensors.items():
        prefix = next((p for p in groups if name.startswith(p)), None)
        rest = name.removeprefix(prefix or "")
        if prefix is None or (prefix == HEAD_PREFIX and rest not in HEAD_NAMES):
            raise ValueError(f"{folder}: unexpected tensor {name!r}; an NV-Embed checkpoint has embedding_model.* and the head")
        groups[prefix][HEAD_NAMES[rest] if prefix == HEAD_PREFIX else rest] = tensor
    missing = [HEAD_PREFIX + theirs for theirs, ours in HEAD_NAMES.items() if ours not in groups[HEAD_PREFIX]]
    if missing:
        raise ValueError(f"{folder}: the head's weights are incomplete; missing {missing[:5]}. Download the model again.")
    return groups


def _backbone(text: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, where: str) -> nn.Module:
    from transformers import MistralConfig, MistralModel

    given = {name: text[name] for name in TEXT_FIELDS if text.get(name) is not None}
    rope = text.get("rope_parameters") or {"rope_type": "default", "rope_theta": text.get("rope_theta", 10000.0)}
    config = MistralConfig(**given, rope_parameters=rope, sliding_window=None, use_cache=False)
    config._attn_implementation = install_attention()
    model = _empty(lambda: MistralModel(config))
    place(model, tensors, dtype, f"{where} ({BACKBONE_PREFIX}*)")
    return model


def _head_config(given: dict[str, Any], tensors: dict[str, Tensor]) -> LatentAttentionConfig:
    """Head sizes from the tensors; the number of heads, which no shape tells, from the config (8 when it is silent)."""
    heads = int(given.get("num_cross_heads", 8))
    inner, width = tensors["to_q.weight"].shape
    expansion = tensors["feed_forward.down.weight"].shape[1] // width
    return LatentAttentionConfig(latents=len(tensors["latents"]), heads=heads, head_width=inner // heads, expansion=expansion)


def _tokenizer_config(folder: Path, settings: dict[str, Any]) -> TokenizerConfig:
    return TokenizerConfig(
        eos_token=_eos(folder),
        truncation="cut_end",
        pool_instruction="exclude_by_count" if settings.get("is_mask_instruction", True) else "include",
    )


def _eos(folder: Path) -> str:
    """The end token, from the file that names it; newer libraries write no ``special_tokens_map.json``."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        eos = read_json(folder / name).get("eos_token") if (folder / name).is_file() else None
        if eos is not None:
            return eos["content"] if isinstance(eos, dict) else eos
    return "</s>"


def _empty(build: Any) -> Any:
    """Builds a module whose parameters hold no memory until weights are placed; buffers are real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build()
