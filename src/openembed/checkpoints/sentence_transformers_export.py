"""The sentence-transformers side of a saved encoder.

An encoder whose head is a plain pooling mode, and whose pooled span sentence-transformers finds by itself, is described
with its own modules and needs no remote code. Any other (latent attention, self-attention, spans that only offsets find)
travels with one self-contained module file that ``SentenceTransformer(path, trust_remote_code=True)`` runs; where texts are
repeated, or the vectors of tokens are of texts cut, or less a prompt, in a way it does not know, that file refuses.
"""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer, processors

from openembed.checkpoints.multi_vector_export import leaves_prompts_out, token_modules, token_settings
from openembed.checkpoints.sentence_transformers import POOLING_KINDS
from openembed.encoder import Encoder
from openembed.files import write_json
from openembed.heads.projection import Projection
from openembed.tokenization import TextTokenizer

logger = logging.getLogger(__name__)

MODULE_NAME = "openembed_module"
REFUSAL = """import torch


class OpenEmbedModule(torch.nn.Module):
    @classmethod
    def load(cls, *args, **kwargs):
        raise ValueError(
            "this model {reason}, which sentence-transformers cannot be told; open it with openembed.load(folder)"
        )
"""
"""The module file of a model that sentence-transformers has no words for: better none of its vectors than wrong ones."""
TWICE = "reads every text twice"
BOUNDARY_TEXTS = ("word", "Word", "7", "中文", " led by a space", "(bracket", "-", '"quoted"', "é")
"""Text beginnings over which an instruction's tokens must not merge for sentence-transformers to find the span."""


def write_sentence_transformers_files(encoder: Encoder, folder: Path) -> None:
    """Writes ``modules.json`` and what it refers to beside the backbone and tokenizer already in ``folder``."""
    if encoder.kind == "tokens":
        _write_multi_vector(encoder, folder)
        return
    standard = is_standard(encoder)
    refused = encoder.config.tokenizer.repeat is not None
    source = REFUSAL.format(reason=TWICE) if refused else None
    rows = _standard_modules(encoder, folder) if standard else _remote_module(folder, source)
    write_tokenizer(encoder.tokenizer, folder, frame=standard)
    types = "sentence_transformers.models.Normalize"
    rows.append({"path": f"{len(rows)}_Normalize", "type": types})
    (folder / rows[-1]["path"]).mkdir()
    lengths = {"max_seq_length": encoder.max_length, "do_lower_case": False}
    _write_settings(encoder, folder, rows, lengths, {"similarity_fn_name": "cosine"})


def _write_multi_vector(encoder: Encoder, folder: Path) -> None:
    """What :class:`sentence_transformers.MultiVectorEncoder` opens."""
    reason = _not_multi_vector(encoder)
    if reason:
        logger.info("%s: sentence-transformers cannot open this encoder: it %s", folder, reason)
        rows = _remote_module(folder, REFUSAL.format(reason=reason))
    else:
        rows = token_modules(encoder, folder, write_dense)
    write_tokenizer(encoder.tokenizer, folder, frame=True)
    lowercase = encoder.config.tokenizer.lowercase
    lengths = {"max_seq_length": encoder.max_length, "do_lower_case": lowercase, **token_settings(encoder)}
    kind = {"model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim"}
    _write_settings(encoder, folder, rows, lengths, kind)


def _not_multi_vector(encoder: Encoder) -> str:
    """What a MultiVectorEncoder could not be told to do as this encoder does; empty where there is no such thing."""
    if encoder.config.tokenizer.repeat is not None:
        return TWICE
    if encoder.config.tokenizer.truncation == "cut_end" and encoder.tokenizer.suffix:
        return "cuts the end token off with the end of a long text"
    if leaves_prompts_out(encoder) and not _spans_agree(encoder):
        return "leaves out other tokens than counting those of a prompt alone finds (tokenizer.pool_instruction)"
    return ""


def _write_settings(
    encoder: Encoder, folder: Path, rows: list[dict[str, Any]], lengths: dict[str, Any], kind: dict[str, Any]
) -> None:
    write_json(folder / "modules.json", [{"idx": i, "name": str(i), **row} for i, row in enumerate(rows)])
    write_json(folder / "sentence_bert_config.json", lengths)
    prompts = {"prompts": literal_prompts(encoder), "default_prompt_name": None}
    write_json(folder / "config_sentence_transformers.json", {**prompts, **kind})


def is_standard(encoder: Encoder) -> bool:
    """True when sentence-transformers' own modules give the same vectors, instructions included."""
    head, tokenizer = encoder.config.head, encoder.config.tokenizer
    plain = head.kind in POOLING_KINDS.values() or head.kind == "concat"
    framed = tokenizer.truncation == "keep_eos" and not tokenizer.lowercase and tokenizer.repeat is None
    if head.kind == "concat" and "cls" in head.parts and tokenizer.pool_instruction != "include":
        return False  # there, leaving the instruction out moves cls to the first token after it; here it is the first token
    return plain and framed and (_first_token(head) or _spans_agree(encoder))


def _first_token(head: Any) -> bool:
    """True for a head that takes the first token whatever is left out of pooling."""
    return head.kind == "cls" and not head.after_instruction


def _spans_agree(encoder: Encoder) -> bool:
    """True when counting gives the span after each of the encoder's prompts, and after one rendered from its template."""
    return all(_span_agrees(encoder.tokenizer, prompt) for prompt in _probe_prompts(encoder))


def _probe_prompts(encoder: Encoder) -> set[str]:
    prompts = encoder.config.prompts
    literal = {prompts.query, prompts.document, *prompts.named.values(), prompts.render("Retrieve text. Find it")}
    literal.update(prompts.render(task.query) for task in prompts.tasks.values())
    return literal - {""}


def _span_agrees(tokenizer: TextTokenizer, prompt: str) -> bool:
    """True when counting the prompt's tokens alone gives the span that offsets give, whatever text follows."""
    if tokenizer.config.pool_instruction in ("include", "exclude_by_count_and_prefix"):
        return True
    counted = len(tokenizer.prefix) + len(tokenizer.prefix_ids(prompt))
    return bool((tokenizer(BOUNDARY_TEXTS, prompt).pool_starts == counted).all())


def _standard_modules(encoder: Encoder, folder: Path) -> list[dict[str, Any]]:
    by_kind = {ours: theirs for theirs, ours in POOLING_KINDS.items()}
    head = encoder.config.head
    modes = [by_kind[part] for part in head.parts] if head.kind == "concat" else by_kind[head.kind]
    pooling = {
        "embedding_dimension": encoder.backbone.width,
        "pooling_mode": modes,
        "include_prompt": _first_token(head) or encoder.config.tokenizer.pool_instruction == "include",
    }
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", pooling)
    rows = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    for projection in encoder.projections:
        rows.append({"path": f"{len(rows)}_Dense", "type": "sentence_transformers.models.Dense"})
        write_dense(projection, folder / rows[-1]["path"])
    return rows


def write_dense(projection: Projection, folder: Path, ends: dict[str, str] | None = None) -> None:
    """Writes a Dense module's folder; ``ends``: which of the features it reads and writes, where that is not the default."""
    folder.mkdir()
    config = {
        "in_features": projection.linear.in_features,
        "out_features": projection.linear.out_features,
        "bias": projection.linear.bias is not None,
        "activation_function": f"{type(projection.activation).__module__}.{type(projection.activation).__name__}",
    }
    config.update(ends or {})
    if projection.residual is not None:
        config["use_residual"] = True
    write_json(folder / "config.json", config)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in projection.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"))


def _remote_module(folder: Path, source: str | None = None) -> list[dict[str, Any]]:
    source = source or resources.files("openembed.checkpoints").joinpath("sentence_transformers_module.py").read_text("utf-8")
    (folder / f"{MODULE_NAME}.py").write_text(source, encoding="utf-8")
    return [{"path": "", "type": f"{MODULE_NAME}.OpenEmbedModule"}]


def literal_prompts(encoder: Encoder) -> dict[str, str]:
    """Returns the prefixes of the encoder's prompts by name."""
    prompts = encoder.config.prompts
    table = {"query": prompts.query, "document": prompts.document, **prompts.named}
    table.update({name: prompts.render(task.query) for name, task in prompts.tasks.items()})
    return table


def write_tokenizer(tokenizer: TextTokenizer, folder: Path, *, frame: bool) -> None:
    """Writes the tokenizer transformers will read; with ``frame`` its template adds the end token that we append."""
    backend = Tokenizer.from_str(tokenizer.backend.to_str())
    if frame and tokenizer.config.eos_token is not None:
        pieces = [backend.id_to_token(i) for i in (*tokenizer.prefix, *tokenizer.suffix)]
        template = [*pieces[: len(tokenizer.prefix)], "$A", *pieces[len(tokenizer.prefix) :]]
        ids = dict(zip(pieces, (*tokenizer.prefix, *tokenizer.suffix), strict=True))
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(template), pair=" ".join([*template, "$B:1"]), special_tokens=list(ids.items())
        )
        backend.save(str(folder / "tokenizer.json"))
    eos = tokenizer.config.eos_token
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "clean_up_tokenization_spaces": False}
    pad = eos or _first_special(backend)
    if eos is None and tokenizer.suffix:  # sentence-transformers counts a prompt's tokens less an end token it knows as one
        eos = backend.id_to_token(tokenizer.suffix[-1])
    write_json(folder / "tokenizer_config.json", {**settings, "pad_token": pad, **({"eos_token": eos} if eos else {})})


def end_names(tokenizer: TextTokenizer) -> dict[str, str]:
    """Returns ``cls_token`` and ``sep_token``, as other code calls the one token before and the one behind every text."""
    ends = {"cls_token": tokenizer.prefix, "sep_token": tokenizer.suffix}
    return {name: tokenizer.backend.id_to_token(ids[0]) for name, ids in ends.items() if len(ids) == 1}


def _first_special(backend: Tokenizer) -> str:
    """A token to pad with where there is no end token: padding is masked, so any one will do."""
    named = [row["content"] for row in json.loads(backend.to_str())["added_tokens"] if row.get("special")]
    return next((name for name in named if "pad" in name.lower()), named[0] if named else backend.id_to_token(0))
