"""``export``: an index into Qdrant or PostgreSQL, or its sparse vectors into files for OpenSearch and Anserini."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openembed.cli.encode import Dimensions
from openembed.cli.output import JsonFlag, print_json

if TYPE_CHECKING:
    from openembed.index.store import Store

FILES = "opensearch", "anserini"


def register(app: typer.Typer) -> None:
    """Adds ``export`` to ``app``."""
    app.command()(export)


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory made by `openembed index`.")],
    to: Annotated[
        str,
        typer.Option(
            help="qdrant://HOST:6333/COLLECTION or postgresql://USER@HOST/DATABASE#TABLE; of sparse vectors also "
            "opensearch:FILE.jsonl (bulk requests) or anserini:FILE.jsonl (weights times 100)."
        ),
    ],
    vectors: Annotated[str | None, typer.Option(help="dense or sparse (default: dense where there are).")] = None,
    model: Annotated[str | None, typer.Option(help="Files: where the sparse model is now, if it moved.")] = None,
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
    from openembed.integrations.sparse_files import write_sparse
    from openembed.progress import progress

    store = Store(directory)
    form, _, path = to.partition(":")
    names = _names(store, model) if form in FILES else str
    options = {"dimensions": dimensions, "precision": precision, "index": index, "prune": prune, "kind": vectors}
    with progress("export", len(store), "documents") as advance:
        if form in FILES:
            counts = write_sparse(store, form, Path(path), names, advance)
        else:
            counts = put(store, to, **options, advance=advance)
    if as_json:
        print_json({"to": shown(to), **counts})
    else:
        written, unchanged = f"{counts['written']:,} documents written", f"{counts['unchanged']:,} were there"
        removed = f", {counts['removed']:,} removed" if counts["removed"] else ""
        sys.stdout.write(f"{written}, {unchanged}{removed}: {shown(to)}\n")


def _names(store: Store, model: str | None) -> Callable[[int], str]:
    """Returns what the tokenizer of the store's sparse model calls its terms."""
    from openembed.cli.encode import load_model
    from openembed.index.encoding import term_names

    if "sparse" not in store.models:
        raise ValueError(f"{store.directory}: has no sparse vectors to export; index with a sparse model")
    encoder = load_model(model or store.models["sparse"].name, None, None)
    store.check_encoder(encoder)
    return term_names(encoder)
