"""Documents and vectors in PostgreSQL with the pgvector extension, through psycopg 3. Needs the extra ``openembed[pgvector]``.

A row a document: ``id text primary key, title, text, metadata jsonb, fields jsonb, embedding vector(D) or halfvec(D),
digest``; ``fields`` are the values that filters ask for, by their dotted names. The table's comment says which model made the
vectors. Search is exact until :meth:`PgVectorIndex.create_index` makes an HNSW index.
Whatever a user gives reaches the server as a parameter; names of tables as quoted identifiers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from openembed.config import parse
from openembed.index.filters import RANGES, All, Any_, Field, Filter, Not, flat_values
from openembed.integrations.database import DatabaseInfo, VectorDatabase, require
from openembed.records import Document

TABLE = "openembed"
TYPES = {"float32": ("vector", 2000), "float16": ("halfvec", 4000)}
"""Precision → pgvector's type, and the dimensions its HNSW index takes at most."""

SYMBOLS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
EF_SEARCH = 1000
"""The most that pgvector's ``hnsw.ef_search`` can be."""


class PgVectorIndex(VectorDatabase):
    """A table. Opens the one that is there; makes it where there is none and ``info`` says of what.

    ``connection``: a psycopg 3 connection, which is set to autocommit. Raises ``ValueError`` for a table that is not there,
    that was not made here, or that holds other vectors than ``info`` says, and for a server without pgvector.
    """

    def __init__(self, connection: Any, table: str = TABLE, info: DatabaseInfo | None = None) -> None:
        self._psycopg = require("psycopg", "pgvector")
        require("pgvector", "pgvector")
        from pgvector.psycopg import register_vector
        from psycopg import sql

        self._connection, self._sql, self.place = connection, sql, f"PostgreSQL table {table!r}"
        connection.autocommit = True
        self._table = sql.Identifier(*table.split("."))
        self._name = self._table.as_string(connection)
        self._version = self._extension()
        register_vector(connection)
        if self._one("SELECT to_regclass(%s)", self._name) is None:
            if info is None:
                raise ValueError(f"{self.place}: there is none of that name; `openembed export` makes one")
            self._create(info)
        comment = self._one("SELECT obj_description(to_regclass(%s), 'pg_class')", self._name)
        self.info = parse(DatabaseInfo, self._recorded(comment), self.place)
        if info is not None:
            self.check_info(info)

    def _extension(self) -> tuple[int, ...]:
        try:
            self._connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except self._psycopg.Error as error:
            raise ValueError(f"{self.place}: the server has no pgvector to use ({str(error).splitlines()[0]})") from None
        version = self._one("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        return tuple(int(part) for part in version.split("."))

    def _recorded(self, comment: str | None) -> Any:
        try:
            return json.loads(comment or "")["openembed"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.place}: not made by openembed; choose another name") from None

    def _create(self, info: DatabaseInfo) -> None:
        if info.precision not in TYPES:
            raise ValueError(
                f"pgvector keeps {' or '.join(TYPES)}, got {info.precision}; --precision float16 takes half the space"
            )
        sql = self._sql
        columns = sql.SQL("{} ({})").format(sql.Identifier(TYPES[info.precision][0]), sql.Literal(info.width))
        create = sql.SQL(
            "CREATE TABLE {} (id text PRIMARY KEY, title text NOT NULL, text text NOT NULL, metadata jsonb NOT NULL, "
            "fields jsonb NOT NULL, embedding {} NOT NULL, digest text NOT NULL)"
        )
        note = json.dumps({"openembed": info.model_dump(mode="json")})
        with self._connection.transaction():
            self._connection.execute(create.format(self._table, columns))
            self._connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(self._table, sql.Literal(note)))

    def create_index(self) -> None:
        """Makes the HNSW index, if it is not there: searches are fast and approximate from then on. Best done when filled.

        Raises ``ValueError`` where the vectors have more dimensions than pgvector can index.
        """
        kind, most = TYPES[self.info.precision]
        if self.info.width > most:
            fewer = "--dimensions" if kind == "halfvec" else "--precision float16 (to 4,000) or --dimensions"
            raise ValueError(
                f"pgvector's HNSW takes {most:,} dimensions of {kind}, these have {self.info.width:,}; use {fewer}"
            )
        sql = self._sql
        name = sql.Identifier(f"{self._name.replace(chr(34), '').replace('.', '_')[:50]}_hnsw")
        order = sql.Identifier(f"{kind}_ip_ops")
        command = sql.SQL("CREATE INDEX IF NOT EXISTS {} ON {} USING hnsw (embedding {})")
        self._connection.execute(command.format(name, self._table, order))

    def __len__(self) -> int:
        return self._execute("SELECT count(*) FROM {}").fetchone()[0]

    def ids(self) -> Iterator[str]:
        """Yields every document's id."""
        for (identifier,) in self._execute("SELECT id FROM {}"):
            yield identifier

    def documents(self, identifiers: Sequence[str]) -> list[Document]:
        """Returns the documents of these ids, in their order."""
        rows = self._execute("SELECT id, text, title, metadata FROM {} WHERE id = ANY(%s)", list(identifiers))
        found = {row[0]: Document(*row) for row in rows}
        missing = [name for name in identifiers if name not in found]
        if missing:
            raise ValueError(f"{self.place}: no document with id {missing[0]!r}")
        return [found[name] for name in identifiers]

    def delete(self, identifiers: Sequence[str]) -> None:
        """Removes documents."""
        self._execute("DELETE FROM {} WHERE id = ANY(%s)", list(identifiers))

    def _digests(self, identifiers: Sequence[str]) -> dict[str, str]:
        return dict(self._execute("SELECT id, digest FROM {} WHERE id = ANY(%s)", list(identifiers)).fetchall())

    def _upsert(self, documents: Sequence[Document], vectors_ND: np.ndarray, digests: Sequence[str]) -> None:
        from psycopg.types.json import Jsonb

        rows = []
        for document, vector, digest in zip(documents, vectors_ND, digests, strict=True):
            metadata = json.dumps(document.metadata, ensure_ascii=False)
            if any("\0" in part for part in (document.id, document.title, document.text)) or "\\u0000" in metadata:
                raise ValueError(f"document {document.id!r}: holds NUL, which PostgreSQL cannot keep; remove it")
            texts, fields = (document.id, document.title, document.text), flat_values(document.metadata)
            rows.append((*texts, Jsonb(document.metadata), Jsonb(fields), self._vector(vector), digest))
        names = ("title", "text", "metadata", "fields", "embedding", "digest")
        updates = self._sql.SQL(", ".join(f"{name} = EXCLUDED.{name}" for name in names))
        command = self._sql.SQL(
            "INSERT INTO {} (id, title, text, metadata, fields, embedding, digest) VALUES (%s, %s, %s, %s, %s, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET {}"
        )
        with self._connection.transaction(), self._connection.cursor() as cursor:
            cursor.executemany(command.format(self._table, updates), rows)

    def _vector(self, values_D: np.ndarray) -> Any:
        from pgvector import HalfVector, Vector

        return HalfVector(values_D) if self.info.precision == "float16" else Vector(values_D)

    def _search(self, queries_QD: np.ndarray, k: int, condition: Filter, exact: bool) -> list[list[tuple[str, float]]]:
        clause, values = translate(condition)
        text = f"SELECT id, embedding <#> %s FROM {{}} WHERE {clause} ORDER BY embedding <#> %s LIMIT %s"
        hits = []
        with self._connection.transaction():
            if exact:
                self._connection.execute("SET LOCAL enable_indexscan = off")
            self._connection.execute("SELECT set_config('hnsw.ef_search', %s, true)", [str(min(EF_SEARCH, max(40, 2 * k)))])
            if self._version >= (0, 8):  # a filter must not leave fewer than k where there are more
                self._connection.execute("SELECT set_config('hnsw.iterative_scan', 'strict_order', true)")
            for query_D in queries_QD:
                query = self._vector(query_D)
                rows = self._execute(text, query, *values, query, k)
                hits.append([(name, float(np.float32(-distance))) for name, distance in rows])
        return hits

    def _execute(self, text: str, *values: Any) -> Any:
        return self._connection.execute(self._sql.SQL(text).format(self._table), values)

    def _one(self, text: str, *values: Any) -> Any:
        return self._connection.execute(text, values).fetchone()[0]


def connect(target: str) -> tuple[Any, str]:
    """Returns (connection, table) of ``postgresql://USER@HOST:5432/DATABASE#TABLE`` (without ``#TABLE``: ``openembed``).

    The password comes from the target, ``PGPASSWORD`` or ``~/.pgpass``. Raises ``ValueError`` when no server answers.
    """
    psycopg = require("psycopg", "pgvector")
    parts = urlsplit(target)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError(f"{shown(target)}: expected postgresql://USER@HOST:5432/DATABASE#TABLE")
    try:
        connection = psycopg.connect(parts._replace(fragment="").geturl(), autocommit=True, connect_timeout=10)
    except psycopg.Error as error:
        raise ValueError(f"{shown(target)}: no connection ({' '.join(str(error).split())[:300]})") from None
    return connection, parts.fragment or TABLE


def shown(target: str) -> str:
    """Returns ``target`` without its password."""
    parts = urlsplit(target)
    return parts._replace(netloc=parts.netloc.replace(f":{parts.password}@", ":***@")).geturl() if parts.password else target


def translate(condition: Filter) -> tuple[str, list[Any]]:
    """Returns an SQL expression over ``fields``, all names and values of the filter left out of it, and those, in order."""
    match condition:
        case Field(name, conditions):
            parts = [_field(name, operator, value) for operator, value in conditions if operator not in RANGES]
            ranges = [(SYMBOLS[operator], value) for operator, value in conditions if operator in RANGES]
            return _joined(" AND ", "TRUE", [*parts, *([_path(name, ranges)] if ranges else [])])
        case Not(part):
            text, values = translate(part)
            return f"NOT ({text})", values
        case All(parts):
            return _joined(" AND ", "TRUE", [translate(part) for part in parts])
        case Any_(parts):
            return _joined(" OR ", "FALSE", [translate(part) for part in parts])


def _field(name: str, operator: str, value: Any) -> tuple[str, list[Any]]:
    if operator == "exists":
        return f"fields -> %s IS {'NOT ' if value else ''}NULL", [name]
    return _joined(" OR ", "FALSE", [_path(name, [("==", one)]) for one in value])


def _path(name: str, tests: list[tuple[str, Any]]) -> tuple[str, list[Any]]:
    """A JSON path, whose lax mode looks into lists, and finds false instead of failing where kinds differ."""
    path = " && ".join(f"@ {symbol} $v{number}" for number, (symbol, _) in enumerate(tests))
    variables = json.dumps({f"v{number}": value for number, (_, value) in enumerate(tests)})
    return f"coalesce(jsonb_path_exists(fields -> %s, '$ ? ({path})', %s::jsonb, true), FALSE)", [name, variables]


def _joined(word: str, none: str, parts: list[tuple[str, list[Any]]]) -> tuple[str, list[Any]]:
    if not parts:
        return none, []
    return word.join(f"({text})" for text, _ in parts), [value for _, values in parts for value in values]
