"""openembed's own checkpoint: one folder that both openembed and sentence-transformers open.

``openembed.json`` (the encoder's configuration), ``config.json`` and ``model.safetensors`` (the backbone, transformers'
format), ``tokenizer.json``, ``head.safetensors`` (head and projections), and the files of the sentence-transformers layout.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from openembed.backbones.adapters import has_lora, has_quantized
from openembed.backbones.text import load_text_backbone, quiet_unless_terminal
from openembed.checkpoints.folder import whole_folder
from openembed.checkpoints.language_head import fill_language_model
from openembed.checkpoints.sentence_transformers_export import write_sentence_transformers_files
from openembed.checkpoints.sparse_export import write_sparse_files
from openembed.checkpoints.weights import place, read_file
from openembed.config import parse
from openembed.encoder import Encoder, EncoderConfig
from openembed.files import read_json, write_json
from openembed.layouts import CONFIG_NAME, check_layout
from openembed.tokenization import TextTokenizer

HEAD_NAME = "head.safetensors"


def save_encoder(encoder: Encoder, path: str | Path) -> None:
    """Writes ``encoder`` to folder ``path``; a crash leaves what was there before, or the new one, never a mixture.

    Raises ``FileExistsError`` when ``path`` holds something that is no openembed checkpoint, ``ValueError`` for a backbone
    with adapters, which would not open again.
    """
    path = Path(path)
    require_whole(encoder)
    check_layout(path, "openembed")
    with whole_folder(path) as folder:
        _write(encoder, folder)


def require_whole(encoder: Encoder) -> None:
    """Raises ``ValueError`` for a backbone with adapters or in 4 bits, whose weights no layout holds."""
    if has_lora(encoder.backbone.model):
        raise ValueError("the backbone carries adapters; merge them before saving (openembed.backbones.adapters.merge_lora)")
    if has_quantized(encoder.backbone.model):
        raise ValueError("the backbone is held in 4 bits; load it without quantization to save it")


def load_native(
    folder: Path, dtype: torch.dtype | None, head_dtype: torch.dtype | None = None, quantization: str | None = None
) -> Encoder:
    """Returns the encoder saved in ``folder``; raises ``ValueError`` naming the file that is missing or damaged."""
    stored = read_json(folder / CONFIG_NAME)
    stored["backbone"] = {**stored["backbone"], "path": str(folder), "quantization": quantization}
    config = parse(EncoderConfig, stored, str(folder / CONFIG_NAME))
    backbone = load_text_backbone(config.backbone, dtype=dtype)
    encoder = Encoder(config, TextTokenizer.from_folder(folder, config.tokenizer), backbone, config.head.build(backbone.width))
    if _head_parts(encoder):
        if not (folder / HEAD_NAME).is_file():
            raise ValueError(f"{folder / HEAD_NAME}: no such file, though the head of {CONFIG_NAME} has weights")
        place_head(encoder, read_file(folder / HEAD_NAME), head_dtype or dtype, str(folder / HEAD_NAME))
    return encoder.eval()


def place_head(encoder: Encoder, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None, where: str) -> None:
    """Puts ``head.*``, ``projections.*`` and ``query_head.*`` tensors into the encoder, strictly."""
    for name in head_modules(encoder):
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        place(getattr(encoder, name), own, dtype, f"{where} ({name})")


def head_modules(encoder: Encoder) -> list[str]:
    """Returns the names of the encoder's parts beside its backbone."""
    return ["head", "projections", *(["query_head"] if encoder.query_head is not None else [])]


def _head_parts(encoder: Encoder) -> dict[str, torch.Tensor]:
    parts = {f"{name}.{k}": v for name in head_modules(encoder) for k, v in getattr(encoder, name).state_dict().items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}


def _write(encoder: Encoder, folder: Path) -> None:
    config = encoder.config.model_dump(mode="json")
    config["backbone"] = {**config["backbone"], "path": ".", "revision": None, "architecture": None, "quantization": None}
    config["tokenizer_path"] = None
    if encoder.query_head is None:
        del config["query_head"]  # releases that know no such key open the folder too
    language_model = fill_language_model(encoder) if encoder.kind == "sparse" else None
    with quiet_unless_terminal():
        (language_model or encoder.backbone.model).save_pretrained(folder)
    encoder.tokenizer.save(folder)
    parts = _head_parts(encoder)
    if parts:
        save_file(parts, str(folder / HEAD_NAME))
    if encoder.kind == "sparse":
        write_sparse_files(encoder, folder, language_model)
    else:
        write_sentence_transformers_files(encoder, folder)
    write_json(folder / CONFIG_NAME, config)
