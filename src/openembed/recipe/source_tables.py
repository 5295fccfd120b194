"""Sources of recipes: the tables that stages may name, and stages with those names replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openembed.config import Config, Name, parse
from openembed.data.library import VERSIONS, library, resolve
from openembed.data.sources import SourceConfig

MINED = "stage:"
"""Begins the path of what a mine or filter stage writes: ``stage:<stage>/<source>.jsonl``."""


class _Sources(Config):
    source: dict[Name, SourceConfig]


def named_sources(named: Any, version: Any, where: str) -> dict[str, SourceConfig]:
    """Returns the sources that stages may name: those of the recipe, over those of the library."""
    if not isinstance(named, Mapping):
        raise ValueError(f"{where}: source: expected tables [source.NAME] (got {named!r})")
    if version not in (None, *VERSIONS):
        raise ValueError(f"{where}: library: expected {' or '.join(VERSIONS)} (got {version!r})")
    tables: dict[str, Any] = {name: {"name": name, **entry.table(version)} for name, entry in library().items()}
    for name, row in named.items():
        try:
            tables[name] = resolve(name, row, version) if isinstance(row, Mapping) else row
        except ValueError as error:
            raise ValueError(f"{where}: source.{name}.use: {error}") from None
    return parse(_Sources, {"source": tables}, where).source


def expanded_stage(name: str, stage: Any, sources: Mapping[str, SourceConfig], where: str) -> Any:
    """Returns the stage with names of sources replaced by the sources themselves, in ``sources`` or ``data.sources``."""
    if not isinstance(stage, Mapping):
        return stage
    if isinstance(stage.get("data"), Mapping):
        inner = expanded_stage(f"{name}.data", stage["data"], sources, where)
        return {**stage, "data": inner}
    listed = stage.get("sources")
    if not isinstance(listed, (list, tuple)):
        return stage
    places = [f"{where}: stage.{name}.sources.{index}" for index in range(len(listed))]
    return {**stage, "sources": [_source(item, sources, place) for item, place in zip(listed, places, strict=True)]}


def _source(item: Any, sources: Mapping[str, SourceConfig], where: str) -> Any:
    if not isinstance(item, str):
        return item
    mined, _, name = item.rpartition("/")
    if name not in sources:
        known = ", ".join(own for own in sources if own not in library()) or "none"
        raise ValueError(f"{where}: no table [source.{name}] (got {item!r}); known: {known}, and `openembed recipe sources`")
    given = sources[name].model_dump(exclude_unset=True)
    if mined:
        kept = ("name", "licence", "instruction", "document_instruction", "in_batch", "weight", "cap", "loss_weight")
        return {key: given[key] for key in kept if key in given} | {"path": f"{MINED}{mined}/{name}.jsonl"}
    return given
