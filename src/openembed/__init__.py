"""openembed turns language models into retrievers. Public names load on first use; importing this loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "load": "openembed.checkpoints",
    "build": "openembed.checkpoints",
    "Encoder": "openembed.encoder",
    "EncoderConfig": "openembed.encoder",
    "Document": "openembed.records",
    "Query": "openembed.records",
    "Example": "openembed.records",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'openembed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
