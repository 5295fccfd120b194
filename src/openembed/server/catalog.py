"""What is served, under names: models of every kind with their queues, indexes with their models, and a reranker.

Requests choose among these names and nothing else; no path ever comes from a request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from openembed.encoded import CALLED
from openembed.encoder import Encoder
from openembed.index.store import Store
from openembed.representations import Kind
from openembed.rerankers import Reranker
from openembed.server.engine import Engine
from openembed.server.errors import ApiError, refused
from openembed.steps.modes import modes_of

logger = logging.getLogger(__name__)
R = TypeVar("R")

LOOK_AGAIN_S = 1.0
"""Seconds after which a search looks whether another process has changed the index."""

RETRY_S = 2.0
RERANK_SLICE = 32
"""Documents scored in one go; between two slices of a request other requests have their turn."""


ROUTES = {"dense": "/v1/embeddings", "sparse": "/embed_sparse", "tokens": "/v1/multi-vector"}
"""Where texts go to a model of each kind."""


class ServedIndex:
    """An index and the models of its vectors, by kind. Searching and writing each have one thread."""

    def __init__(self, name: str, directory: Path, engines: Mapping[Kind, Engine]) -> None:
        self.name, self.engines = name, dict(engines)
        self._directory = directory
        self._store = Store(directory)
        self._manifest = directory / "manifest.json"
        self._seen, self._looked = self._manifest.stat().st_mtime_ns, time.monotonic()
        self._opening = threading.Lock()
        self._searching = ThreadPoolExecutor(1, thread_name_prefix=f"search {name}")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix=f"write {name}")

    @property
    def store(self) -> Store:
        """The index as it is now: changes of this and of other processes are seen, the latter within a second."""
        if time.monotonic() - self._looked > LOOK_AGAIN_S:
            self._looked = time.monotonic()
            try:
                if self._manifest.stat().st_mtime_ns != self._seen:
                    self._reopen()
            except (OSError, ValueError):
                logger.exception("%s: cannot be opened again; what was open is served", self.name)
        return self._store

    @property
    def modes(self) -> list[str]:
        """How it can be searched, the best way last."""
        return modes_of(self.engines)

    @property
    def model(self) -> str | None:
        """The name of its first model; None where it has words alone."""
        return next((engine.name for engine in self.engines.values()), None)

    async def search(self, function: Callable[[Store], R]) -> R:
        """Returns ``function`` of the index, run in the thread that searches."""
        return await asyncio.get_running_loop().run_in_executor(self._searching, lambda: function(self.store))

    async def change(self, function: Callable[[Store], R]) -> R:
        """Returns ``function`` of a store to write to, run in the thread that writes; its change is durable and seen then.

        A change that has begun is finished even when the request is given up.
        """

        def run() -> R:
            result = function(Store(self._directory))
            self._reopen()
            return result

        changing = asyncio.get_running_loop().run_in_executor(self._writing, run)
        changing.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, though nobody may wait for it
        return await asyncio.shield(changing)

    def close(self) -> None:
        """Ends its threads when what they do is done."""
        self._writing.shutdown()
        self._searching.shutdown()

    def _reopen(self) -> None:
        with self._opening:
            seen = self._manifest.stat().st_mtime_ns
            self._store, self._seen = Store(self._directory), seen


class ServedReranker:
    """A reranker with its thread."""

    def __init__(self, name: str, reranker: Reranker) -> None:
        self.name, self.reranker = name, reranker
        self._waiting = 0
        self._scoring = ThreadPoolExecutor(1, thread_name_prefix="rerank")

    async def score(self, query: str, documents: Sequence[str], most_waiting: int) -> np.ndarray:
        """Returns float32 (N,); a slice at a time, so that requests take turns. ``ApiError`` 429 when too many wait."""
        if self._waiting >= most_waiting:
            raise ApiError(429, "too many rerank requests wait; try again later", code="queue_full", retry_after=RETRY_S)
        loop = asyncio.get_running_loop()
        parts = []
        self._waiting += 1
        try:
            for start in range(0, len(documents), RERANK_SLICE):
                chunk = documents[start : start + RERANK_SLICE]
                parts.append(await loop.run_in_executor(self._scoring, self.reranker.score, query, chunk))
        finally:
            self._waiting -= 1
        return np.concatenate(parts)

    def close(self) -> None:
        """Ends its thread."""
        self._scoring.shutdown()


@dataclass
class Catalog:
    """Everything that is served. The first model and the first index answer requests that name none."""

    engines: dict[str, Engine] = field(default_factory=dict)
    indexes: dict[str, ServedIndex] = field(default_factory=dict)
    reranker: ServedReranker | None = None
    aliases: dict[str, str] = field(default_factory=dict)
    made: int = field(default_factory=lambda: int(time.time()))

    def engine(self, name: str | None, kind: Kind | None = None) -> Engine:
        """Returns a model, without a name the first one of that kind (None: any).

        ``ApiError`` 404 for a name that is not served, 400 for a model of another kind.
        """
        alike = {own: engine for own, engine in self.engines.items() if kind in (None, engine.kind)}
        found = _named(self.engines if name or not alike else alike, self.aliases.get(name, name) if name else None, "model")
        if kind not in (None, found.kind):
            raise _other_kind(found, kind)
        return found

    def index(self, name: str | None) -> ServedIndex:
        """Returns an index; ``ApiError`` 404 for a name that is not served."""
        return _named(self.indexes, name, "index")

    @property
    def healthy(self) -> bool:
        """False when a model's thread is gone or keeps failing."""
        return all(engine.batcher.healthy for engine in self.engines.values())

    def close(self) -> None:
        """Ends all threads when what they do is done."""
        for part in (*self.indexes.values(), *self.engines.values(), *([self.reranker] if self.reranker else [])):
            part.close()


def _other_kind(engine: Engine, wanted: Kind) -> ApiError:
    message = f"model {engine.name!r} gives {CALLED[engine.kind]}, and this asks for {CALLED[wanted]}; its own path is "
    return refused(message + ROUTES[engine.kind], "model", "other_kind")


def _named(served: dict[str, Any], name: str | None, what: str) -> Any:
    if not served:
        raise ApiError(404, f"no {what} is served here", param=what, code=f"{what}_not_found")
    if name is None:
        return next(iter(served.values()))
    if name not in served:
        known = ", ".join(list(served)[:20])
        raise ApiError(404, f"{what} {name[:80]!r} is not served here; served: {known}", param=what, code=f"{what}_not_found")
    return served[name]


def open_catalog(
    targets: Iterable[str],
    load: Callable[[str], Encoder],
    make_engine: Callable[[Encoder, str], Engine],
    *,
    reranker: Reranker | None = None,
    aliases: Sequence[str] = (),
) -> Catalog:
    """Returns the catalog of models and indexes; each target is a model, an index, or ``NAME=`` one of them.

    Indexes of one model share it. One of several models of an index may be missing: that is logged, and the index served in
    its other modes. Raises ``ValueError`` for a model that is not the one of an index, and what ``load`` raises.
    """
    catalog = Catalog()
    loaded: dict[str, Engine] = {}

    def engine_of(reference: str, name: str) -> Engine:
        key = str(Path(reference).resolve()) if Path(reference).exists() else reference
        if key not in loaded:
            unique = _unique(name, catalog.engines)
            loaded[key] = catalog.engines[unique] = make_engine(load(reference), unique)
        return loaded[key]

    for target in targets:
        name, reference = _name_of(target)
        directory = Path(reference)
        if not (directory / "manifest.json").is_file():
            engine_of(reference, name)
            continue
        unique, store = _unique(name, catalog.indexes), Store(directory)
        engines = _engines_of(unique, store, engine_of)
        for engine in engines.values():
            store.check_encoder(engine.encoder)
        catalog.indexes[unique] = ServedIndex(unique, directory, engines)
    if reranker is not None:
        catalog.reranker = ServedReranker(_name_of(str(reranker.name))[0], reranker)
    if aliases:
        first = next(iter(catalog.engines), None)
        if first is None:
            raise ValueError("a model's other names need a model; only indexes without one were given")
        catalog.aliases = dict.fromkeys(aliases, first)
    return catalog


def _engines_of(index: str, store: Store, engine_of: Callable[[str, str], Engine]) -> dict[Kind, Engine]:
    """Returns the models of an index that can be opened, by kind; raises why the last one cannot where none can."""
    engines: dict[Kind, Engine] = {}
    for number, (kind, model) in enumerate(store.models.items(), 1):
        try:
            engines[kind] = engine_of(model.name, _name_of(model.name)[0])
        except (ValueError, FileNotFoundError) as error:
            if number == len(store.models) and not engines:
                raise
            logger.warning("index %s: its model %s cannot be opened (%s); served without %s", index, model.name, error, kind)
    return engines


def _name_of(target: str) -> tuple[str, str]:
    """Returns the name and the reference of a target: the folder's name, or that of its parent where it says nothing."""
    name, equals, reference = target.partition("=")
    if equals and name and not Path(target).exists():
        return name, reference
    parts = [part for part in Path(target).parts if part not in ("/", ".", "..")]
    plain = [part for part in parts if part not in ("model", "index", "store")] or parts or [target]
    return plain[-1], target


def _unique(name: str, taken: Iterable[str]) -> str:
    used, candidate, number = set(taken), name, 2
    while candidate in used:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
