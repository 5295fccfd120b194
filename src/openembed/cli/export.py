"""``export``: an index into Qdrant or PostgreSQL."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from openembed.cli.encode import Dimensions
from openembed.cli.output import JsonFlag, print_json


def register(app: typer.Typer) -> None:
    """Adds ``export`` to ``app``."""
    app.command()(export)


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory made by `openembed index`.")],
    to: Annotated[str, typer.Option(help="qdrant://HOST:6333/COLLECTION or postgresql://USER@HOST/DATABASE#TABLE.")],
    dimensions: Dimensions = None,
    precision: Annotated[str, typer.Option(help="float32, float16; Qdrant also int8 and binary, rescored.")] = "float32",
    index: Annotated[bool, typer.Option("--index/--no-index", help="Make pgvector's HNSW index when filled.")] = True,
    prune: Annotated[bool, typer.Option("--prune", help="Remove there what the index no longer holds.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Put documents, metadata and vectors into a database; run again, it writes only what is missing or has changed."""
    from openembed.index.store import Store
    from openembed.integrations.export import export as put
    from openembed.integrations.pgvector import shown
    from openembed.progress import progress

    store = Store(directory)
    with progress("export", len(store), "documents") as advance:
        counts = put(store, to, dimensions=dimensions, precision=precision, index=index, prune=prune, advance=advance)
    if as_json:
        print_json({"to": shown(to), **counts})
    else:
        written, unchanged = f"{counts['written']:,} documents written", f"{counts['unchanged']:,} were there"
        removed = f", {counts['removed']:,} removed" if counts["removed"] else ""
        sys.stdout.write(f"{written}, {unchanged}{removed}: {shown(to)}\n")
