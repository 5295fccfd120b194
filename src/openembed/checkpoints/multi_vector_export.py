"""The sentence-transformers side of a saved encoder with a vector a token: a MultiVectorEncoder of version 6 or later.

Its own modules say everything but two things: clusters or other pooling of the vectors, and an instruction whose tokens have
no vectors. These travel as one self-contained module file, which ``MultiVectorEncoder(path, trust_remote_code=True)`` runs.
"""

from __future__ import annotations

import string
from importlib import resources
from pathlib import Path
from typing import Any

from openembed.encoder import Encoder
from openembed.files import write_json
from openembed.heads.projection import Projection

MODULE_NAME = "openembed_tokens"


def token_modules(encoder: Encoder, folder: Path, write_dense: Any) -> list[dict[str, Any]]:
    """Writes the modules after the backbone into ``folder`` and returns the rows of ``modules.json``, Transformer first."""
    rows = [{"path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}]
    head, ends = encoder.config.head, {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    for layer in encoder.head.layers:
        assert isinstance(layer, Projection)
        rows.append(_row(rows, "base.modules.dense.Dense"))
        write_dense(layer, folder / rows[-1]["path"], ends)
    rows.append(_row(rows, "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"))
    tasks = ["query", "document"] if head.skip_queries else ["document"]
    mask = {"skiplist_words": skipped_words(encoder), "skiplist_tasks": tasks, "keep_only_token_ids": None}
    _write(folder / rows[-1]["path"], mask)
    if head.normalize:
        rows.append(_row(rows, "base.modules.normalize.Normalize"))
        _write(folder / rows[-1]["path"], ends)
    leave_out = leaves_prompts_out(encoder)
    if head.pool is not None or leave_out:
        source = resources.files("openembed.checkpoints").joinpath("multi_vector_module.py").read_text("utf-8")
        (folder / f"{MODULE_NAME}.py").write_text(source, encoding="utf-8")
        rows.append({"path": f"{len(rows)}_Tokens", "type": f"{MODULE_NAME}.OpenEmbedTokens"})
        pool = None if head.pool is None else head.pool.model_dump(mode="json")
        _write(folder / rows[-1]["path"], {"pool": pool, "leave_out_prompt": leave_out})
    return rows


def skipped_words(encoder: Encoder) -> list[str]:
    """Returns the tokens of documents that get no vector, of those that the vocabulary has."""
    skip = encoder.config.head.skip
    words = string.punctuation if skip == "punctuation" else skip
    return [word for word in words if encoder.tokenizer.backend.token_to_id(word) is not None]


def token_settings(encoder: Encoder) -> dict[str, Any]:
    """Returns what ``sentence_bert_config.json`` says beside lengths common to all: lengths of sides and query expansion."""
    config, settings = encoder.config.tokenizer, {}
    for name in ("query_length", "document_length"):
        if getattr(config, name) is not None:
            settings[name] = min(getattr(config, name), encoder.max_length)
    if config.expansion is not None:
        settings["query_expansion"] = {
            "strategy": "fixed" if config.expansion.cut else "min",
            "attend": config.expansion.attend,
            "token": config.expansion.token,
            "length": min(config.expansion.length, encoder.max_length),
        }
        if config.expansion.cut:
            settings.pop("query_length", None)
    return settings


def _row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return {"path": f"{len(rows)}_{name.rpartition('.')[2]}", "type": f"sentence_transformers.{name}"}


def _write(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir()
    write_json(folder / "config.json", settings)


def leaves_prompts_out(encoder: Encoder) -> bool:
    """Returns whether there are prompts whose tokens have no vectors."""
    prompts = encoder.config.prompts
    present = prompts.query or prompts.document or prompts.named or prompts.tasks
    return bool(present) and encoder.config.tokenizer.pool_instruction != "include"
