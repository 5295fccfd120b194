"""What databases that hold our vectors have in common: which model made them, queries cut to fit, and export into them.

Q queries, N documents, D dimensions kept.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from openembed.config import Config, parse
from openembed.index.filters import All, Any_, Field, Filter, Not, parse_filter
from openembed.index.store import Condition, EncodesDocuments, Hits, ModelInfo
from openembed.records import Document
from openembed.vectors import Precision, VectorFormat

BATCH = 256


class DatabaseInfo(Config):
    """What the database remembers of its vectors; ``format`` is how it keeps them."""

    model: ModelInfo
    dimensions: int | None = None
    precision: Precision = "float32"

    @property
    def format(self) -> VectorFormat:
        """Dimensions and precision."""
        return parse(VectorFormat, {"dimensions": self.dimensions, "precision": self.precision}, "options")

    @property
    def width(self) -> int:
        """D."""
        return self.format.width(self.model.width)


class VectorDatabase(ABC):
    """Documents and their vectors in someone else's database, searched as a :class:`openembed.index.store.Store` is.

    ``dense`` returns the same hits as a store of the same vectors, up to the database's rounding and its approximation.
    """

    info: DatabaseInfo
    place: str
    """Names the database in messages."""

    @property
    def model(self) -> ModelInfo:
        """Which model made the vectors."""
        return self.info.model

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """Yields every document's id, in no particular order."""

    @abstractmethod
    def documents(self, identifiers: Sequence[str]) -> list[Document]:
        """Returns the documents of these ids, in their order; raises ``ValueError`` naming one that is not there."""

    @abstractmethod
    def delete(self, identifiers: Sequence[str]) -> None:
        """Removes documents; an id that is not there is passed over."""

    @abstractmethod
    def _search(self, queries_QD: np.ndarray, k: int, condition: Filter, exact: bool) -> list[list[tuple[str, float]]]:
        """The k nearest (id, inner product) of each query, of the documents for which ``condition`` holds."""

    @abstractmethod
    def _digests(self, identifiers: Sequence[str]) -> dict[str, str]:
        """The digest of every row that is there."""

    @abstractmethod
    def _upsert(self, documents: Sequence[Document], vectors: Sequence[Any], digests: Sequence[str]) -> None:
        """Puts rows in, in the place of those of the same ids."""

    def document(self, identifier: str) -> Document:
        """Returns one document; raises ``ValueError`` when there is none of that id."""
        return self.documents([identifier])[0]

    def dense(self, queries_QD: np.ndarray, k: int = 10, *, filter: Condition = None, exact: bool | None = None) -> list[Hits]:
        """Returns for each query vector the k documents of greatest inner product, best first.

        ``filter``: see :mod:`openembed.index.filters`. ``exact``: every vector is compared, whatever graph the database
        has; by default it decides. Queries of the model's whole width are cut to what is
        kept here. Raises ``ValueError`` for another width, a vector that is not finite, and a filter not understood.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        condition = filter if isinstance(filter, Field | All | Any_ | Not) else parse_filter(filter or {})
        found = self._search(self._fitted(np.asarray(queries_QD, dtype=np.float32)), k, condition, bool(exact))
        return [{name: score for score, name in sorted(((s, n) for n, s in hits), reverse=True)} for hits in found]

    def check_encoder(self, encoder: EncodesDocuments) -> None:
        """Raises ``ValueError`` when ``encoder`` is not the model that made the vectors."""
        if encoder.fingerprint != self.model.fingerprint:
            raise ValueError(
                f"{self.place}: its vectors were made by {self.model.name} (fingerprint {self.model.fingerprint[:12]}), the "
                f"model given has {encoder.fingerprint[:12]}; use that model, or export anew under another name"
            )

    def add(self, documents: Sequence[Document], vectors_ND: Sequence[Any]) -> int:
        """Puts documents with their whole vectors in; returns how many were new or different.

        Rows whose text, metadata and vector are there already are passed over, so a repeated call costs a look-up.
        """
        kept = self._kept(vectors_ND)
        digests = [_digest(document, vector) for document, vector in zip(documents, kept, strict=True)]
        there = self._digests([document.id for document in documents])
        new = [n for n, document in enumerate(documents) if there.get(document.id) != digests[n]]
        if new:
            self._upsert([documents[n] for n in new], [kept[n] for n in new], [digests[n] for n in new])
        return len(new)

    def _kept(self, vectors: Sequence[Any]) -> Sequence[Any]:
        """What is kept of vectors."""
        cut = VectorFormat(dimensions=self.info.dimensions)
        return cut.apply(np.asarray(vectors), normalize=self.model.normalize).values_NC

    def check_info(self, wanted: DatabaseInfo) -> None:
        """Raises ``ValueError`` when what is there was made otherwise than ``wanted``."""
        ours, theirs = self.info.model_dump(), wanted.model_dump()
        for part in (ours["model"], theirs["model"]):
            part.pop("name")
        if ours != theirs:
            raise ValueError(
                f"{self.place}: holds vectors of {self.model.name} ({self.info.precision}, {self.info.width} dimensions, "
                f"fingerprint {self.model.fingerprint[:12]}); these differ. Choose another name, or remove it first"
            )

    def _fitted(self, queries_QD: np.ndarray) -> np.ndarray:
        if queries_QD.ndim != 2 or queries_QD.shape[1] not in (self.info.width, self.model.width):
            raise ValueError(
                f"queries of shape {queries_QD.shape}; this index needs (count, {self.info.width}) ({self.model.name})"
            )
        if not np.isfinite(queries_QD).all():
            raise ValueError("a query vector holds NaN or infinity")
        cut = VectorFormat(dimensions=self.info.width)
        return cut.apply(queries_QD, normalize=self.model.normalize).values_NC


def fill(
    database: VectorDatabase,
    rows: Iterable[tuple[Document, Any]],
    *,
    prune: bool = False,
    batch: int = BATCH,
    advance: Callable[[int], None] = lambda _n: None,
) -> dict[str, int]:
    """Puts all ``rows`` (document, whole vector) into ``database``; returns the counts ``written``, ``unchanged``, ``removed``.

    Killed and run again, it writes only what is not there yet. ``prune`` removes what is there and not in ``rows``.
    """
    stream, written, seen = iter(rows), 0, set()
    while part := list(islice(stream, batch)):
        documents = [document for document, _ in part]
        written += database.add(documents, [vector for _, vector in part])
        seen.update(document.id for document in documents)
        advance(len(part))
    stale = [name for name in database.ids() if name not in seen] if prune else []
    for start in range(0, len(stale), batch):
        database.delete(stale[start : start + batch])
    return {"written": written, "unchanged": len(seen) - written, "removed": len(stale)}


def require(package: str, extra: str) -> Any:
    """Returns the module ``package``; raises ``ValueError`` naming the extra where it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{package} is not installed; this needs: pip install 'openembed[{extra}]'") from None


def _digest(document: Document, vector: Any) -> str:
    content = json.dumps([document.id, document.title, document.text, document.metadata], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode() + vector.tobytes(), digest_size=16).hexdigest()
