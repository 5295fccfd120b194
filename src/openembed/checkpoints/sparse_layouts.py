"""Sparse encoders in the layouts of OpenSearch's inference-free models and of naver's SPLADE.

Both are a masked language model with its tokenizer, and on the hub the modules by which sentence-transformers runs it;
OpenSearch's has ``idf.json`` too, what each token weighs in a query. What a layout cannot say is refused by the name of the
setting: no folder is better than one that ranks otherwise than the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from openembed.backbones.text import quiet_unless_terminal
from openembed.checkpoints.folder import whole_folder
from openembed.checkpoints.language_head import fill_language_model
from openembed.checkpoints.native import require_whole
from openembed.checkpoints.sentence_transformers_export import end_names
from openembed.checkpoints.sparse import IDF_NAME
from openembed.checkpoints.sparse_export import refused, write_sparse_files
from openembed.encoder import Encoder, PromptConfig
from openembed.files import read_json, write_json
from openembed.heads.idf_lookup import IdfLookup
from openembed.layouts import LAYOUTS, check_layout

logger = logging.getLogger(__name__)


def save_sparse_layout(encoder: Encoder, path: str | Path, layout: str) -> None:
    """Writes ``encoder`` to a new folder ``path`` as ``opensearch`` or ``splade``, all or nothing.

    Raises what :func:`openembed.layouts.check_layout` does, and ``ValueError`` for an encoder of another kind or naming every
    setting that the layout cannot say.
    """
    path = Path(path)
    check_layout(path, layout)
    if encoder.kind != "sparse":
        raise ValueError(
            f"layout {layout!r} holds weights over a vocabulary, this model's kind is {encoder.kind}; leave layout out"
        )
    require_whole(encoder)
    language_model = fill_language_model(encoder)
    reasons = [*refused(encoder, language_model), *_refused(encoder, layout)]
    if reasons:
        raise ValueError(
            f"{LAYOUTS[layout]}'s layout cannot say what this model does, and would rank otherwise: {'; '.join(reasons)}. "
            "The layout openembed keeps everything."
        )
    assert language_model is not None, "refused before"
    with whole_folder(path) as folder:
        _write(encoder, folder, language_model)
    if layout == "opensearch" and encoder.config.head.activation == "log1p_log1p_relu":
        logger.info("%s: takes the logarithm twice, as OpenSearch's v3 models; %s alone does not say so", path, IDF_NAME)


def _refused(encoder: Encoder, layout: str) -> Iterator[str]:
    """Why the layout is not for this encoder, beside what sentence-transformers' modules cannot do."""
    head, query_head, name = encoder.config.head, encoder.query_head, LAYOUTS[layout]
    config = encoder.backbone.model.config
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING:
        yield f"backbone {config.model_type!r} ({name}'s code opens masked language models alone)"
    if head.pooling != "max":
        yield f"head.pooling = {head.pooling!r} ({name}'s code takes the largest weight of a text's tokens: 'max')"
    if layout == "splade":
        if query_head is not None:
            yield "query_head (SPLADE's queries are encoded by the model; layout 'opensearch' has a table for them)"
        if head.activation != "log1p_relu":
            yield f"head.activation = {head.activation!r} (SPLADE's code takes 'log1p_relu')"
    elif query_head is None:
        yield f"query_head is not set (OpenSearch looks queries up in {IDF_NAME}; layout 'splade' has none)"
    elif not head.exclude_special and (names := _weighed_specials(encoder, query_head)):
        yield f"head.exclude_special = false (OpenSearch's code drops {', '.join(names)} from documents, and queries ask)"
    if layout == "opensearch" and query_head is not None and (other := _read_otherwise(encoder, query_head)):
        yield f"the tokenizer (OpenSearch knows a token by what it reads as alone: {other})"
    yield from _refused_prompts(encoder.config.prompts, name)


def _refused_prompts(prompts: PromptConfig, name: str) -> Iterator[str]:
    given = {"query": prompts.query, "document": prompts.document, "named": any(prompts.named.values()), "tasks": prompts.tasks}
    for setting, present in {**given, "template": prompts.template != PromptConfig().template}.items():
        if present:
            yield f"prompts.{setting} ({name}'s code puts nothing before texts; take it out of openembed.json to do without)"


def _weighed_specials(encoder: Encoder, query_head: IdfLookup) -> list[str]:
    """Special tokens that weigh something in queries."""
    table_V = query_head.table().detach().cpu()
    added = encoder.tokenizer.backend.get_added_tokens_decoder()
    return [token.content for number, token in sorted(added.items()) if token.special and table_V[number] > 0]


def _read_otherwise(encoder: Encoder, query_head: IdfLookup) -> str:
    """A token with a weight that reads as another text than its name; empty where there is none."""
    table_V, backend = query_head.table().detach().cpu().tolist(), encoder.tokenizer.backend
    for name, number in backend.get_vocab(with_added_tokens=True).items():
        if number < len(table_V) and table_V[number] > 0:
            text = backend.decode([number], skip_special_tokens=False)
            if text != name:
                return f"{name!r} reads {text!r}"
    return ""


def _write(encoder: Encoder, folder: Path, language_model: nn.Module) -> None:
    with quiet_unless_terminal():
        language_model.save_pretrained(folder)
    encoder.tokenizer.save(folder)
    write_sparse_files(encoder, folder, language_model)
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", settings | _special_names(encoder))
    if encoder.query_head is not None:
        write_json(folder / IDF_NAME, _weights(encoder, encoder.query_head))


def _special_names(encoder: Encoder) -> dict[str, str]:
    """What transformers calls the special tokens: those it knows no name for keep their weight in OpenSearch's code."""
    backend = encoder.tokenizer.backend
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    names = end_names(encoder.tokenizer)
    if getattr(backend.model, "unk_token", None) is not None:
        names["unk_token"] = backend.model.unk_token
    mask = next((name for name in special if "mask" in name.lower()), None)
    return names if mask is None else {**names, "mask_token": mask}


def _weights(encoder: Encoder, query_head: IdfLookup) -> dict[str, float]:
    """Every token's weight, zeros too: what the file lacks counts 1 for OpenSearch and 0 for sentence-transformers."""
    table_V = query_head.table().detach().cpu().numpy()
    vocabulary = encoder.tokenizer.backend.get_vocab(with_added_tokens=True)
    rows = sorted(vocabulary.items(), key=itemgetter(1))
    return {token: float(str(table_V[number])) for token, number in rows if number < len(table_V)}
