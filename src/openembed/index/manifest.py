"""What a store's one mutable file says: the model, the segments, the deletions. Replaced atomically at every change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from openembed.config import Config, parse
from openembed.encoded import CALLED
from openembed.files import read_json, write_json
from openembed.index.tokens.files import TokenCoding

FORMAT = 3
READABLE = (1, 2, 3)
"""Format 1 had no codes and no columns: its segments are searched more slowly until they are merged or compacted.
Formats 1 and 2 had one ``model``, of dense vectors, or none."""

Kind = Literal["dense", "sparse", "tokens"]
"""What a model gives of a text: a vector, weights of a vocabulary's terms, or a vector a token."""


StoredPrecision = Literal["float32", "float16", "uint8"]
"""Of sparse weights and token vectors; ``uint8`` of sparse weights alone. Dense vectors are float32."""


class EncodesDocuments(Protocol):
    """What the store needs of an encoder."""

    fingerprint: str
    width: int

    def encode_documents(self, texts: Sequence[str], **options: Any) -> Any:
        """Returns vectors of N texts, of the encoder's ``kind`` (dense where it has none): float32 (N, width), or sparse."""
        ...

    def document_prompt(self, *, instruction: str | None = None) -> str:
        """Returns the text put before every document."""
        ...


class ModelInfo(Config):
    """Which model made the vectors, and how; ``name`` is a path or hub id that ``openembed.load`` takes.

    ``width``: dimensions, or terms of the vocabulary. ``precision``: how sparse weights and token vectors are kept. ``coding``:
    what every segment has for approximate search of token vectors.
    """

    name: str
    fingerprint: str
    width: int
    kind: Kind = "dense"
    precision: StoredPrecision = "float32"
    coding: TokenCoding = Field(TokenCoding(), exclude_if=lambda coding: coding == TokenCoding())
    document_instruction: str | None = None
    document_prompt: str = ""
    normalize: bool = True
    max_length: int | None = None

    @model_validator(mode="after")
    def _precision_of_its_kind(self) -> ModelInfo:
        if self.kind == "tokens" and self.precision == "uint8":
            raise ValueError("precision uint8 is for sparse weights; token vectors are kept in float32 or float16")
        if self.kind != "tokens" and self.coding != TokenCoding():
            raise ValueError(f"coding is of token vectors; {self.name} gives {CALLED[self.kind]}: leave it out")
        return self


class SegmentInfo(Config):
    """A segment as the manifest names it. ``largest_norm``, ``coded`` and ``sketch`` are about its dense vectors."""

    name: str
    count: int
    largest_norm: float = 0.0
    deleted: str | None = None
    coded: bool = False
    columns: bool = False
    sketch: int = 0
    """Which version of sketches it has (``true`` of the first); 0: none."""


class Manifest(Config):
    """The state of a store after its ``change``-th change."""

    format: int = FORMAT
    change: int = 0
    language: str
    models: tuple[ModelInfo, ...] = ()
    segments: tuple[SegmentInfo, ...] = ()

    @model_validator(mode="after")
    def _one_of_a_kind(self) -> Manifest:
        kinds = [model.kind for model in self.models]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"two models of one kind ({', '.join(kinds)}); a store has at most one of each")
        return self


def describe_model(
    name: str,
    encoder: EncodesDocuments,
    *,
    instruction: str | None = None,
    normalize: bool = True,
    max_length: int | None = None,
    precision: StoredPrecision = "float32",
    coding: TokenCoding | None = None,
) -> ModelInfo:
    """Returns what a new store records of the model that will make its vectors; an existing path is made absolute.

    The model is of the ``encoder``'s kind. ``precision``: of sparse weights and token vectors. ``coding``: of token vectors.
    """
    if precision != "float32" and getattr(encoder, "kind", "dense") == "dense":
        raise ValueError(f"precision {precision}: dense vectors are kept in float32; leave it out")
    values = {
        "name": str(Path(name).resolve()) if Path(name).exists() else name,
        "fingerprint": encoder.fingerprint,
        "width": encoder.width,
        "kind": getattr(encoder, "kind", "dense"),
        "precision": precision,
        "coding": coding or TokenCoding(),
        "document_instruction": instruction,
        "document_prompt": encoder.document_prompt(instruction=instruction),
        "normalize": normalize,
        "max_length": max_length,
    }
    return parse(ModelInfo, values, "options")


def check_absent(directory: Path) -> None:
    """Raises ``FileExistsError`` when ``directory`` holds a store."""
    if (directory / "manifest.json").exists():
        raise FileExistsError(f"{directory}: already an index; add documents with `openembed add`, or use another directory")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replaces the manifest; a crash leaves the old one or the new one."""
    write_json(directory / "manifest.json", manifest.model_dump())


def read_manifest(directory: Path) -> Manifest:
    """Returns the manifest; raises ``FileNotFoundError`` where there is none and ``ValueError`` for a damaged one."""
    path = directory / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory}: no openembed index (no manifest.json); make one with `openembed index`")
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if found not in READABLE:
        allowed = ", ".join(map(str, READABLE))
        raise ValueError(f"{path}: format {found!r}, this version reads {allowed}; build the index anew")
    if "model" in values:
        model = values.pop("model")
        values["models"] = [model] if model else []
    return parse(Manifest, {**values, "format": FORMAT}, str(path))
