"""The layouts that a model can be written in, and what can be said against writing it before it is loaded. Loads no torch."""

from __future__ import annotations

from pathlib import Path

CONFIG_NAME = "openembed.json"
"""The file by which a folder is known for a checkpoint of ours."""
LAYOUTS = {
    "openembed": "openembed",
    "pylate": "PyLate",
    "colbert": "ColBERT",
    "opensearch": "OpenSearch",
    "splade": "SPLADE",
}
"""Layouts, and what those who made them call them."""
SPARSE_LAYOUTS = ("opensearch", "splade")


def check_layout(path: str | Path, layout: str, *, named_prompts: bool = False) -> None:
    """Raises what writing to folder ``path`` in a layout does whatever the model is.

    ``ValueError`` for another layout than ``LAYOUTS``, and ``named_prompts`` with another than PyLate's; ``FileExistsError``
    where ``path`` holds something, but for a checkpoint of ours, which our own layout replaces.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        *others, last = LAYOUTS
        raise ValueError(f"layout {layout!r} is not known; use {', '.join(others)} or {last}")
    if named_prompts and layout != "pylate":
        why = "openembed's own keeps every prompt" if layout == "openembed" else f"{LAYOUTS[layout]} has no prompts of text"
        raise ValueError(f"named_prompts is for layout 'pylate'; {why}, leave it out")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if layout != "openembed":
        raise FileExistsError(f"{path}: exists; give a new folder")
    if not (path / CONFIG_NAME).is_file():
        raise FileExistsError(f"{path}: exists and is no openembed checkpoint; give another path or remove it")
