"""The data sets of NV-Embed's mixtures as data: where each is, under which licence, and how its rows become examples.

The tables of the TOML files beside this module have the keys of :class:`openembed.data.sources.SourceConfig`, and:
``title`` (the paper's name of it), ``note``, ``v1`` and ``v2`` (keys that hold in that version of NV-Embed alone, or that
are empty where it only takes part) and ``evidence`` (how it is known, where not as in ``EVIDENCE``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from openembed.config import Config, parse
from openembed.data.sources import SourceConfig

VERSIONS = ("v1", "v2")
FAMILIES = ("retrieval", "similarity", "classification", "clustering")
"""The files, in the order of a listing."""

Evidence = Literal["paper", "derived", "checked", "recalled", "ours"]
"""Stated in the paper; derived from what is; read in mteb's metadata or on the hub; from memory; our own choice."""

EVIDENCE: dict[str, Evidence] = {
    "instruction": "paper",
    "v1": "paper",
    "v2": "recalled",
    "hub": "ours",
    "columns": "recalled",
    "revision": "checked",
    "licence": "checked",
}
"""How a part of an entry is known, unless the entry says otherwise."""


class LibraryEntry(Config):
    """A data set: ``source`` has the keys of both versions, ``v1`` and ``v2`` their own (None: not in that mixture)."""

    name: str
    family: str
    title: str
    source: dict[str, Any]
    v1: dict[str, Any] | None = None
    v2: dict[str, Any] | None = None
    note: str = ""
    evidence: dict[str, Evidence] = Field(default_factory=dict)

    def table(self, version: str | None = None) -> dict[str, Any]:
        """Returns the keys of a source; those of ``version`` (None: of both) over the common ones."""
        own = getattr(self, version) if version else None
        return {**self.source, **(own or {})}

    def config(self, version: str | None = None) -> SourceConfig:
        """Returns the source, under its library name."""
        return parse(SourceConfig, {"name": self.name, **self.table(version)}, f"library source {self.name!r}")

    @property
    def summary(self) -> dict[str, Any]:
        """What a listing shows: origin, licence, construction and count by version, and how it is known."""
        configs = {version: self.config(version) for version in VERSIONS if getattr(self, version) is not None}
        any_config = next(iter(configs.values()), self.config())
        hub = any_config.hub
        return {
            "name": self.name,
            "family": self.family,
            "title": self.title,
            "licence": any_config.licence,
            "hub": hub.id if hub else None,
            "config": hub.config if hub else None,
            "revision": hub.revision if hub else None,
            "path": any_config.path,
            "instruction": any_config.instruction,
            "in_batch": any_config.in_batch,
            "construction": {version: config.construction for version, config in configs.items()},
            "count": {version: config.count for version, config in configs.items()},
            "evidence": {**EVIDENCE, **self.evidence},
            "note": self.note,
        }


@lru_cache(maxsize=1)
def library() -> Mapping[str, LibraryEntry]:
    """Returns the data sets by name, in the order of their files."""
    entries: dict[str, LibraryEntry] = {}
    for family in FAMILIES:
        path = Path(__file__).parent / f"{family}.toml"
        for name, table in tomllib.loads(path.read_text(encoding="utf-8")).items():
            own = {key: table.pop(key) for key in (*VERSIONS, "title", "note", "evidence") if key in table}
            if name in entries:
                raise ValueError(f"{path}: {name}: another file has an entry of this name; rename one")
            entries[name] = parse(LibraryEntry, {"name": name, "family": family, "source": table, **own}, f"{path}: {name}")
    return entries


def resolve(name: str, table: Mapping[str, Any], version: str | None) -> dict[str, Any]:
    """Returns a recipe's table ``[source.NAME]`` with what it takes from the library filled in.

    ``use`` names the entry; without it, a table that has neither ``path`` nor ``hub`` takes the entry of its own name.
    The table's keys replace the entry's whole, and a ``path`` its ``hub`` (or the other way about). Raises
    ``ValueError`` for an entry that is not there.
    """
    own = {key: value for key, value in table.items() if key != "use"}
    entry = table.get("use")
    if entry is None:
        entry = name if name in library() and not {"path", "hub"} & own.keys() else None
    if entry is None:
        return {"name": name, **own}
    if entry not in library():
        raise ValueError(f"no such entry of the source library (got {entry!r}); `openembed recipe sources` lists them")
    common = library()[entry].table(version)
    if own.keys() & {"path", "hub"}:
        common = {key: value for key, value in common.items() if key not in ("path", "hub")}
    return {"name": name, **common, **own}
