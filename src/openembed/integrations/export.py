"""``openembed export``: an index's documents, ids, metadata and vectors into someone else's database."""

from __future__ import annotations

import os
from collections.abc import Callable
from urllib.parse import urlsplit

from openembed.index.manifest import Kind
from openembed.index.store import Store
from openembed.integrations import pgvector, qdrant
from openembed.integrations.database import DatabaseInfo, VectorDatabase, fill


def open_database(target: str, info: DatabaseInfo | None = None) -> VectorDatabase:
    """Returns the database at ``qdrant://HOST:6333/COLLECTION`` or ``postgresql://USER@HOST/DATABASE#TABLE``.

    With ``info`` it is made where it is not there. The key of a Qdrant server comes from ``QDRANT_API_KEY``.
    Raises ``ValueError`` for a target that is neither.
    """
    scheme = urlsplit(target).scheme
    if scheme in ("qdrant", "qdrants"):
        client, collection = qdrant.connect(target, api_key=os.environ.get("QDRANT_API_KEY"))
        return qdrant.QdrantIndex(client, collection, info)
    if scheme in ("postgresql", "postgres"):
        connection, table = pgvector.connect(target)
        return pgvector.PgVectorIndex(connection, table, info)
    raise ValueError(
        f"{pgvector.shown(target)}: not known; use qdrant://HOST:6333/COLLECTION or postgresql://HOST/DATABASE#TABLE"
    )


def export(
    store: Store,
    target: str,
    *,
    dimensions: int | None = None,
    precision: str = "float32",
    index: bool = True,
    prune: bool = False,
    kind: Kind | None = None,
    advance: Callable[[int], None] = lambda _n: None,
) -> dict[str, int]:
    """Puts the live documents of ``store`` into the database at ``target``; returns the counts of ``fill``.

    Killed and run again, it writes what is missing; run after changes, what changed. ``prune`` removes what the store no
    longer holds. ``index``: makes pgvector's HNSW index at the end. ``kind``: which vectors (default: dense ones where there
    are, else sparse ones, which Qdrant alone takes). Raises ``ValueError`` for a store without them, and what the databases
    raise.
    """
    if not store.models:
        raise ValueError(f"{store.directory}: was built without a model, so it has no vectors to export; index with a model")
    kind = kind or next(iter(sorted(store.models)))
    if kind not in store.models:
        raise ValueError(f"{store.directory}: has no {kind} vectors to export; it has {' and '.join(store.models)} ones")
    info = DatabaseInfo(model=store.models[kind], dimensions=dimensions, precision=precision)
    if kind == "tokens":
        raise ValueError("a database takes one vector a document or sparse ones, not a vector a token; search the index itself")
    if kind == "sparse" and (not target.startswith("qdrant") or dimensions is not None or precision != "float32"):
        raise ValueError("sparse vectors go to Qdrant, whole and in float32, or into files (opensearch:FILE, anserini:FILE)")
    info.format.width(info.model.width)
    database = open_database(target, info)
    counts = fill(database, store.rows(kind), prune=prune, advance=advance)
    if index and isinstance(database, pgvector.PgVectorIndex):
        database.create_index()
    return counts
