"""What ships inside the package: the model openembed-nano, and the demo's data and tokenizer."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PREFIX = "package:"
NANO = "openembed-nano"
"""The name of the model in the package: a name for ``openembed.load`` and for ``--model``, wherever it is installed."""


def packaged(name: str) -> Path | None:
    """Returns the place of ``openembed-nano`` or of ``package:...``; None for every other name."""
    if name == NANO:
        name = f"{PREFIX}nano/model"
    if not name.startswith(PREFIX):
        return None
    return Path(str(resources.files("openembed"))) / name.removeprefix(PREFIX)
