"""Documents and vectors in Qdrant, through its own client. Needs the extra ``openembed[qdrant]``.

A point a document: its id is the UUID (version 5) of the document's id, its payload ``{"_id", "title", "text",
"metadata", "fields"}``; ``fields`` are the values that filters ask for, by their dotted names.
The collection's own metadata say which model made the vectors. ``float16`` is the datatype of the vectors; ``int8`` and
``binary`` are Qdrant's scalar and binary quantization, held in memory beside the float32 vectors on disk, which rescore.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from openembed.config import parse
from openembed.index.filters import RANGES, All, Any_, Field, Filter, Not, flat_values, kind, parse_filter
from openembed.index.sparse import SparseField, checked
from openembed.index.store import Condition, Hits
from openembed.integrations.database import DatabaseInfo, VectorDatabase, require
from openembed.records import Document

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://github.com/openembed/openembed#document")
INFO = "openembed"
SPARSE = "sparse"
"""What sparse vectors are called in a collection."""
QUERIES = 64
"""Queries in one request."""
OVERSAMPLING = 3.0
"""Candidates of a quantized search that are rescored, times k."""


class QdrantIndex(VectorDatabase):
    """A collection. Opens the one that is there; makes it where there is none and ``info`` says of what.

    Raises ``ValueError`` for a collection that is not
    there, that was not made here, or that holds other vectors than ``info`` says. Of a sparse model it holds sparse vectors.
    """

    def __init__(self, client: Any, collection: str, info: DatabaseInfo | None = None) -> None:
        self._client, self._collection = client, collection
        self._models = require("qdrant_client.models", "qdrant")
        self.place = f"Qdrant collection {collection!r}"
        if not client.collection_exists(collection):
            if info is None:
                raise ValueError(f"{self.place}: there is none of that name; `openembed export` makes one")
            self._create(info)
        found = (getattr(client.get_collection(collection).config, "metadata", None) or {}).get(INFO)
        if found is None:
            raise ValueError(f"{self.place}: not made by openembed, or kept by a Qdrant before 1.16; choose another name")
        self.info = parse(DatabaseInfo, found, self.place)
        if info is not None:
            self.check_info(info)

    def _create(self, info: DatabaseInfo) -> None:
        models = self._models
        if info.model.kind == "sparse":
            self._client.create_collection(
                self._collection,
                vectors_config={},
                sparse_vectors_config={SPARSE: models.SparseVectorParams()},
                metadata={INFO: info.model_dump(mode="json")},
            )
            return
        quantization = None
        if info.precision == "int8":
            scalar = models.ScalarQuantizationConfig(type=models.ScalarType.INT8, always_ram=True)
            quantization = models.ScalarQuantization(scalar=scalar)
        elif info.precision == "binary":
            quantization = models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
        vectors = models.VectorParams(
            size=info.width,
            distance=models.Distance.DOT,
            datatype=models.Datatype.FLOAT16 if info.precision == "float16" else None,
            on_disk=True if quantization else None,
        )
        self._client.create_collection(
            self._collection,
            vectors_config=vectors,
            quantization_config=quantization,
            metadata={INFO: info.model_dump(mode="json")},
        )

    def __len__(self) -> int:
        return self._client.count(self._collection, exact=True).count

    def ids(self) -> Iterator[str]:
        """Yields every document's id."""
        offset = None
        while True:
            points, offset = self._client.scroll(self._collection, limit=1000, offset=offset, with_payload=["_id"])
            yield from (point.payload["_id"] for point in points)
            if offset is None:
                return

    def documents(self, identifiers: Sequence[str]) -> list[Document]:
        """Returns the documents of these ids, in their order."""
        found = {payload["_id"]: payload for payload in self._payloads(identifiers, True)}
        missing = [name for name in identifiers if name not in found]
        if missing:
            raise ValueError(f"{self.place}: no document with id {missing[0]!r}")
        rows = (found[name] for name in identifiers)
        return [Document(row["_id"], row["text"], row["title"], row["metadata"]) for row in rows]

    def delete(self, identifiers: Sequence[str]) -> None:
        """Removes documents."""
        points = self._models.PointIdsList(points=[_point(name) for name in identifiers])
        self._client.delete(self._collection, points, wait=True)

    def _digests(self, identifiers: Sequence[str]) -> dict[str, str]:
        return {payload["_id"]: payload["_digest"] for payload in self._payloads(identifiers, ["_id", "_digest"])}

    def _payloads(self, identifiers: Sequence[str], wanted: bool | list[str]) -> list[dict[str, Any]]:
        points = [_point(name) for name in identifiers]
        return [point.payload for point in self._client.retrieve(self._collection, points, with_payload=wanted)]

    def dense(self, queries_QD: np.ndarray, k: int = 10, *, filter: Condition = None, exact: bool | None = None) -> list[Hits]:
        """As :meth:`VectorDatabase.dense`; raises ``ValueError`` for a collection of sparse vectors."""
        self._check_kind("dense")
        return super().dense(queries_QD, k, filter=filter, exact=exact)

    def _check_kind(self, kind: str) -> None:
        if self.model.kind != kind:
            raise ValueError(f"{self.place}: holds {self.model.kind} vectors; search it with {self.model.kind}()")

    def sparse(self, queries_QV: csr_matrix, k: int = 10, *, filter: Condition = None) -> list[Hits]:
        """Returns for each sparse query vector the k documents of greatest score, best first, as ``Store.sparse`` does.

        Scores are Qdrant's own float32 sums. Raises ``ValueError`` for a collection of dense vectors.
        """
        models = self._models
        self._check_kind("sparse")
        queries = checked(queries_QV, self.model.width, lambda row: f"query {row}")
        condition = filter if isinstance(filter, Field | All | Any_ | Not) else parse_filter(filter or {})
        wanted, hits = models.Filter(must=[translate(models, condition)]), []
        for row in SparseField.each(queries):
            vector = models.SparseVector(indices=row.terms.tolist(), values=row.weights.tolist())
            options = {"using": SPARSE, "limit": k, "query_filter": wanted, "with_payload": ["_id"]}
            points = self._client.query_points(self._collection, vector, **options).points if len(row.terms) else []
            scored = [(float(np.float32(point.score)), point.payload["_id"]) for point in points if point.score > 0]
            hits.append({name: score for score, name in sorted(scored, reverse=True)})
        return hits

    def _kept(self, vectors: Sequence[Any]) -> Sequence[Any]:
        return vectors if self.model.kind == "sparse" else super()._kept(vectors)

    def _vectors(self, vectors: Sequence[Any]) -> Any:
        if self.model.kind != "sparse":
            return np.asarray(vectors).tolist()
        rows = ((row.terms.tolist(), row.weights.tolist()) for row in vectors)
        return {SPARSE: [self._models.SparseVector(indices=terms, values=weights) for terms, weights in rows]}

    def _upsert(self, documents: Sequence[Document], vectors: Sequence[Any], digests: Sequence[str]) -> None:
        payloads = [
            {
                "_id": d.id,
                "title": d.title,
                "text": d.text,
                "metadata": d.metadata,
                "fields": flat_values(d.metadata),
                "_digest": digest,
            }
            for d, digest in zip(documents, digests, strict=True)
        ]
        batch = self._models.Batch(ids=[_point(d.id) for d in documents], vectors=self._vectors(vectors), payloads=payloads)
        self._client.upsert(self._collection, batch, wait=True)

    def _search(self, queries_QD: np.ndarray, k: int, condition: Filter, exact: bool) -> list[list[tuple[str, float]]]:
        models = self._models
        quantized = self.info.precision in ("int8", "binary")
        rescoring = models.QuantizationSearchParams(rescore=True, oversampling=OVERSAMPLING) if quantized else None
        parameters = models.SearchParams(exact=exact, quantization=rescoring)
        wanted = models.Filter(must=[translate(models, condition)])
        hits = []
        for start in range(0, len(queries_QD), QUERIES):
            requests = [
                models.QueryRequest(query=query, limit=k, filter=wanted, params=parameters, with_payload=["_id"])
                for query in queries_QD[start : start + QUERIES].tolist()
            ]
            for response in self._client.query_batch_points(self._collection, requests):
                hits.append([(point.payload["_id"], float(np.float32(point.score))) for point in response.points])
        return hits


def connect(target: str, *, api_key: str | None = None) -> tuple[Any, str]:
    """Returns (client, collection) of ``qdrant://HOST[:6333]/COLLECTION``, ``qdrants://`` for TLS.

    Without a host, ``qdrant:///FOLDER/COLLECTION`` is Qdrant's own local mode in a folder: no server, for small data and one
    process. Raises ``ValueError`` for a target of another form.
    """
    qdrant_client = require("qdrant_client", "qdrant")
    parts = urlsplit(target)
    folder, _, collection = parts.path.rpartition("/")
    if parts.scheme not in ("qdrant", "qdrants") or not collection or (parts.netloc and folder):
        raise ValueError(f"{target}: expected qdrant://HOST:6333/COLLECTION or qdrant:///FOLDER/COLLECTION")
    if not parts.netloc:
        return qdrant_client.QdrantClient(path=folder or "/"), collection
    scheme = "https" if parts.scheme == "qdrants" else "http"
    client = qdrant_client.QdrantClient(url=f"{scheme}://{parts.netloc}", api_key=api_key, timeout=60)
    try:
        client.get_collections()
    except Exception as error:  # the client's own kinds of failure differ by transport
        raise ValueError(f"{scheme}://{parts.netloc}: no Qdrant answers there ({str(error)[:200]})") from None
    return client, collection


def translate(models: Any, condition: Filter) -> Any:
    """Returns ``condition`` in Qdrant's words; raises ``ValueError`` for what Qdrant cannot ask."""
    match condition:
        case Field(name, conditions):
            parts = [_field(models, name, operator, value) for operator, value in conditions if operator not in RANGES]
            ranges = {operator: value for operator, value in conditions if operator in RANGES}
            return models.Filter(must=[*parts, *([_range(models, name, ranges)] if ranges else [])])
        case Not(part):
            return models.Filter(must_not=[translate(models, part)])
        case All(parts):
            return models.Filter(must=[translate(models, part) for part in parts])
        case Any_(parts):
            return _any(models, [translate(models, part) for part in parts])


def _field(models: Any, name: str, operator: str, value: Any) -> Any:
    if operator == "exists":
        empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=_key(name)))
        return models.Filter(must_not=[empty]) if value else models.Filter(must=[empty])
    words = [one for one in value if isinstance(one, str)]
    parts = [_equal(models, _key(name), one) for one in value if not isinstance(one, str)]
    if words:
        parts.append(models.FieldCondition(key=_key(name), match=models.MatchAny(any=words)))
    return _any(models, parts)


def _equal(models: Any, key: str, value: bool | int | float) -> Any:
    if isinstance(value, bool):
        return models.FieldCondition(key=key, match=models.MatchValue(value=value))
    return models.FieldCondition(key=key, range=models.Range(gte=value, lte=value))  # matches are of integers alone


def _range(models: Any, name: str, bounds: dict[str, Any]) -> Any:
    kinds = {kind(value) for value in bounds.values()}
    if len(kinds) > 1:
        return _any(models, [])  # no value is a number and a string
    if kinds == {"number"}:
        return models.FieldCondition(key=_key(name), range=models.Range(**bounds))
    try:
        dates = models.DatetimeRange(**{operator: datetime.fromisoformat(value) for operator, value in bounds.items()})
    except ValueError:
        raise ValueError(f"filter.{name}: Qdrant orders numbers and dates (2024-01-31), not {bounds!r:.80}") from None
    return models.FieldCondition(key=_key(name), range=dates)


def _any(models: Any, parts: list[Any]) -> Any:
    if parts:
        return models.Filter(should=parts)
    return models.Filter(must=[models.HasIdCondition(has_id=[])])  # no part holds: nothing does


def _key(name: str) -> str:
    if '"' in name:
        raise ValueError(f"filter.{name}: Qdrant cannot ask for a name with a double quote")
    return f"fields.{name}" if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'fields."{name}"'


def _point(identifier: str) -> str:
    return str(uuid.uuid5(NAMESPACE, identifier))
