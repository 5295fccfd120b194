"""Encoders with a vector a token in the layouts of PyLate (up to 3) and Stanford's ColBERT.

Neither can say all that an encoder here can. What a layout cannot say is refused by the name of the setting: no folder is
better than one that ranks otherwise than the model.
"""

from __future__ import annotations

import logging
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from openembed.backbones.text import has_causal_layers, quiet_unless_terminal
from openembed.checkpoints.folder import whole_folder
from openembed.checkpoints.markers import inserted, is_special, split_marker
from openembed.checkpoints.multi_vector import COLBERT_ARCHITECTURE, COLBERT_METADATA, ST_CONFIG
from openembed.checkpoints.multi_vector_export import skipped_words
from openembed.checkpoints.native import require_whole
from openembed.checkpoints.sentence_transformers_export import end_names, write_dense, write_tokenizer
from openembed.checkpoints.weights import read_tensors
from openembed.encoder import Encoder, PromptConfig
from openembed.files import read_json, write_json
from openembed.heads.projection import Projection, ProjectionConfig
from openembed.layouts import LAYOUTS, check_layout

logger = logging.getLogger(__name__)

SIDES = ("query", "document")


@dataclass(frozen=True)
class _Side:
    """What is put before the texts of a side: a marker token and a text (either may be empty); and how long they are."""

    marker: str
    text: str
    length: int


def save_layout(encoder: Encoder, path: str | Path, layout: str, *, named_prompts: bool = False) -> None:
    """Writes ``encoder`` to a new folder ``path`` as ``pylate`` or ``colbert``, all or nothing.

    ``named_prompts``: PyLate puts a prompt of text before a text only where it is told the prompt's name; True writes a model
    with such prompts all the same. Raises what :func:`openembed.layouts.check_layout` does, and ``ValueError`` for an encoder
    of another kind or naming every setting that the layout cannot say.
    """
    path = Path(path)
    check_layout(path, layout, named_prompts=named_prompts)
    if encoder.kind != "tokens":
        raise ValueError(f"layout {layout!r} holds a vector a token, this model's kind is {encoder.kind}; leave layout out")
    require_whole(encoder)
    refused = [*_refused(encoder, layout), *_refused_prompts(encoder, layout, named_prompts)]
    if refused:
        raise ValueError(
            f"{LAYOUTS[layout]}'s layout cannot say what this model does, and would rank otherwise: {'; '.join(refused)}. "
            "The layout openembed keeps everything."
        )
    sides = {side: _side(encoder, side) for side in SIDES}
    with whole_folder(path) as folder:
        with quiet_unless_terminal():
            encoder.backbone.model.save_pretrained(folder)
        _write_tokenizer(encoder, folder)
        if layout == "pylate":
            _write_pylate(encoder, folder, sides)
        else:
            _write_colbert(encoder, folder, sides, path.name)


def _refused(encoder: Encoder, layout: str) -> Iterator[str]:
    """Why the layout is not for this encoder, prompts aside."""
    head, tokenizer, name = encoder.config.head, encoder.config.tokenizer, LAYOUTS[layout]
    if head.pool is not None:
        yield f"head.pool = {head.pool.kind!r} keeps fewer vectors a text (encoder.with_pool(None) keeps all)"
    if not head.normalize:
        yield f"head.normalize = false ({name} brings every vector to length 1; train with normalize = true)"
    if head.skip and head.skip_queries:
        yield f"head.skip_queries = true ({name} skips tokens of documents alone; set it to false)"
    if tokenizer.repeat is not None:
        yield f"tokenizer.repeat ({name} reads a text once)"
    if tokenizer.truncation == "cut_end" and encoder.tokenizer.suffix:
        yield f"tokenizer.truncation = 'cut_end' ({name} keeps the end token of a text that is cut: 'keep_eos')"
    yield from _refused_expansion(encoder, name)
    yield from _refused_mask(encoder, layout)
    around = {*encoder.tokenizer.prefix, *encoder.tokenizer.suffix, *encoder.tokenizer.prefix_ids(_marker(encoder, "document"))}
    skipped = {encoder.tokenizer.backend.token_to_id(word) for word in skipped_words(encoder)}
    if skipped and around <= skipped:
        yield f"head.skip lists what is around every text (a text of such tokens alone keeps them here and has none in {name})"
    if layout == "colbert":
        yield from _refused_by_colbert(encoder, skipped)


def _refused_expansion(encoder: Encoder, name: str) -> Iterator[str]:
    tokenizer, expansion = encoder.tokenizer, encoder.config.tokenizer.expansion
    if expansion is None:
        return
    filled = min(expansion.length, encoder.max_length)
    if tokenizer.config.limit(encoder.max_length, query=True) != filled:
        yield f"tokenizer.expansion.cut = false ({name} cuts queries to the length they are filled up to; set cut = true)"
    token = tokenizer.backend.token_to_id(expansion.token)
    if not is_special(tokenizer, expansion.token):
        yield f"tokenizer.expansion.token = {expansion.token!r} (to be {name}'s mask token it must be a special token)"
    elif encoder.backbone.position_offset and token == encoder.backbone.model.config.pad_token_id:
        yield f"tokenizer.expansion.token = {expansion.token!r} (as the padding token it has no positions in {name})"


def _refused_mask(encoder: Encoder, layout: str) -> Iterator[str]:
    """Layouts say nothing of what tokens see: that is up to transformers' classes and ``config.is_causal``."""
    backbone, causal = encoder.backbone, has_causal_layers(encoder.backbone.model)
    if not backbone.bidirectional and not causal:
        yield "backbone.attention = 'causal' (the model's own code looks both ways)"
    elif backbone.bidirectional and causal and (layout == "colbert" or backbone.opens_masks):
        yield "backbone.attention = 'bidirectional' (the model's own code hides later tokens there)"


def _refused_by_colbert(encoder: Encoder, skipped: set[int]) -> Iterator[str]:
    layers, config, tokenizer = encoder.head.layers, encoder.backbone.model.config, encoder.tokenizer
    plain = all(each.linear.bias is None and isinstance(each.activation, torch.nn.Identity) for each in layers)
    if len(layers) > 1 or not plain or any(each.residual is not None for each in layers):
        yield "head.before, head.bias (ColBERT has one linear layer and nothing else; PyLate's layout takes more)"
    if encoder.config.tokenizer.expansion is None:
        yield "tokenizer.expansion is not set (ColBERT fills queries up with mask tokens; PyLate's layout can leave that)"
    if encoder.config.tokenizer.lowercase:
        yield "tokenizer.lowercase = true (ColBERT leaves that to the tokenizer; PyLate's layout has it)"
    marks = {i for mark in string.punctuation for i in tokenizer.backend.encode(mark, add_special_tokens=False).ids[:1]}
    if skipped != marks:
        yield (
            "head.skip (ColBERT always skips the first token of each of string.punctuation, which here are "
            f"{len(marks)} tokens, {len(skipped & marks)} of them in head.skip and {len(skipped - marks)} others; "
            "PyLate's layout takes any)"
        )
    if _padding(encoder) is None:
        yield "the tokenizer has no special token left for padding (ColBERT drops that token from texts; add '[PAD]')"
    if config.model_type.replace("-", "").lower() + "model" != type(encoder.backbone.model).__name__.lower():
        yield f"backbone {config.model_type!r} (ColBERT's code finds no class of that name)"


def _refused_prompts(encoder: Encoder, layout: str, named_prompts: bool) -> Iterator[str]:
    prompts, tokenizer, name = encoder.config.prompts, encoder.tokenizer, LAYOUTS[layout]
    if (prompts.query or prompts.document) and tokenizer.config.pool_instruction != "include":
        yield (
            f"tokenizer.pool_instruction = {tokenizer.config.pool_instruction!r} ({name} gives a marker and a prompt vectors "
            "too: 'include')"
        )
    others = [key for key, text in prompts.named.items() if text not in (prompts.query, prompts.document)]
    for setting, given in (("tasks", bool(prompts.tasks)), ("named", bool(others)), ("template", _own_template(prompts))):
        if given:
            yield f"prompts.{setting} ({name} has no instructions; take it out of the model's openembed.json to do without)"
    for side in SIDES:
        prompt, marker = getattr(prompts, side), _marker(encoder, side)
        text = prompt[len(marker) :].lstrip()
        if marker and len(tokenizer.prefix) != 1:
            yield f"prompts.{side} = {prompt!r} ({name} puts a marker behind the first token of {len(tokenizer.prefix)})"
        elif not inserted(tokenizer, prompt, marker, text):
            yield f"prompts.{side} = {prompt!r} (texts are read otherwise behind it than alone, as {name} reads them)"
        elif text and layout == "colbert":
            yield f"prompts.{side} = {prompt!r} (ColBERT puts one marker token before a text, and no more)"
        elif text and not named_prompts:
            yield (
                f"prompts.{side} = {prompt!r} (PyLate puts text before a text only where told its name; named_prompts = True, "
                "--named-prompts, if you will encode with prompt_name there)"
            )
        if layout == "colbert" and not marker:
            yield f"prompts.{side} has no marker (ColBERT always puts one, a special token of the tokenizer, before a text)"


def _own_template(prompts: PromptConfig) -> bool:
    return prompts.template != PromptConfig().template


def _marker(encoder: Encoder, side: str) -> str:
    return split_marker(encoder.tokenizer, getattr(encoder.config.prompts, side))[0]


def _side(encoder: Encoder, side: str) -> _Side:
    marker, text = split_marker(encoder.tokenizer, getattr(encoder.config.prompts, side))
    limit = encoder.config.tokenizer.limit(encoder.max_length, query=side == "query")
    assert limit is not None, "an encoder has a max_length"
    return _Side(marker, text.lstrip(), limit)


def _padding(encoder: Encoder) -> str | None:
    """A special token that no row holds: ColBERT gives it no vectors wherever it stands."""
    tokenizer, expansion = encoder.tokenizer, encoder.config.tokenizer.expansion
    used = {tokenizer.backend.id_to_token(i) for i in (*tokenizer.prefix, *tokenizer.suffix)}
    used |= {_marker(encoder, side) for side in SIDES} | {getattr(tokenizer.backend.model, "unk_token", None)}
    used |= {expansion.token} if expansion is not None else set()
    added = tokenizer.backend.get_added_tokens_decoder()
    free = [added[i].content for i in sorted(added) if added[i].special and added[i].content not in used]
    return next((name for name in free if "pad" in name.lower()), free[0] if free else None)


def _write_tokenizer(encoder: Encoder, folder: Path) -> None:
    """``tokenizer.json`` and the names that both layouts' code asks for: what queries are filled up with is the mask token."""
    tokenizer, expansion = encoder.tokenizer, encoder.config.tokenizer.expansion
    tokenizer.save(folder)
    write_tokenizer(tokenizer, folder, frame=True)
    settings = read_json(folder / "tokenizer_config.json") | {"model_max_length": encoder.max_length}
    settings["pad_token"] = _padding(encoder) or settings["pad_token"]
    if expansion is not None:
        settings["mask_token"] = expansion.token
    write_json(folder / "tokenizer_config.json", settings | end_names(tokenizer))


def _layers(encoder: Encoder) -> list[Projection]:
    """The head's layers; where it has none, one that changes nothing, since both layouts want one."""
    if len(encoder.head.layers):
        return list(encoder.head.layers)
    layer = ProjectionConfig(width=encoder.width, bias=False).build(encoder.width)
    with torch.no_grad():
        layer.linear.weight.copy_(torch.eye(encoder.width))
    return [layer.to(encoder.dtype)]


def _write_pylate(encoder: Encoder, folder: Path, sides: dict[str, _Side]) -> None:
    rows = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    for layer in _layers(encoder):
        rows.append({"path": f"{len(rows)}_Dense", "type": "pylate.models.Dense.Dense"})
        write_dense(layer, folder / rows[-1]["path"])
    write_json(folder / "modules.json", [{"idx": i, "name": str(i), **row} for i, row in enumerate(rows)])
    lengths: dict[str, Any] = {"max_seq_length": encoder.max_length, "do_lower_case": encoder.config.tokenizer.lowercase}
    write_json(folder / "sentence_bert_config.json", lengths)
    expansion = encoder.config.tokenizer.expansion
    settings = {
        "model_type": "ColBERT",
        "similarity_fn_name": "MaxSim",
        "prompts": {side: each.text for side, each in sides.items() if each.text},
        "default_prompt_name": None,
        **{f"{side}_prefix": each.marker for side, each in sides.items()},
        **{f"{side}_length": each.length for side, each in sides.items()},
        "do_query_expansion": expansion is not None,
        "attend_to_expansion_tokens": expansion is not None and expansion.attend,
        "skiplist_words": skipped_words(encoder),
    }
    write_json(folder / ST_CONFIG, settings)
    if encoder.backbone.bidirectional and has_causal_layers(encoder.backbone.model):
        logger.warning(
            "open this model in PyLate with transformers 5.2 or later: it is a decoder whose tokens see those after them too, "
            "which earlier versions leave out, giving other vectors without a word"
        )
    if settings["prompts"]:
        logger.warning("PyLate puts the prompts before texts with encode(..., prompt_name=...) alone: 'query', 'document'")


def _write_colbert(encoder: Encoder, folder: Path, sides: dict[str, _Side], name: str) -> None:
    """One weight file, as Stanford's class holds it: the backbone under its family's name, and ``linear.weight``."""
    prefix = encoder.backbone.model.base_model_prefix
    tensors = {f"{prefix}.{key}": tensor for key, tensor in read_tensors(folder).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    tensors["linear.weight"] = _layers(encoder)[0].linear.weight.detach().cpu().contiguous()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "architectures": [COLBERT_ARCHITECTURE]})
    expansion = encoder.config.tokenizer.expansion
    assert expansion is not None, "refused before"
    metadata = {
        "checkpoint": name,
        "dim": encoder.width,
        "query_maxlen": sides["query"].length,
        "doc_maxlen": sides["document"].length,
        "mask_punctuation": True,
        "attend_to_mask_tokens": expansion.attend,
        "query_token_id": sides["query"].marker,
        "doc_token_id": sides["document"].marker,
        "query_token": "[Q]",
        "doc_token": "[D]",
        "similarity": "cosine",
        "interaction": "colbert",
    }
    write_json(folder / COLBERT_METADATA, metadata)
