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
    """An index and the models of its vectors, by kind. Searching and writing each have one thread.

    ``missing`` says, by kind of vectors that the index has and no model here can be asked for, why.
    """

    def __init__(
        self, name: str, directory: Path, engines: Mapping[Kind, Engine], missing: Mapping[Kind, str] | None = None
    ) -> None:
        self.name, self.engines, self.missing = name, dict(engines), dict(missing or {})
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

    def require(self, kinds: Iterable[Kind]) -> None:
        """Raises ``ApiError`` 409, which says why, where the model of one of these kinds of vectors is ``missing``."""
        for kind in kinds:
            if kind in self.missing:
                modes = ", ".join(self.modes)
                message = f"the index holds {CALLED[kind]}, but {self.missing[kind]}; the server's log says more"
                raise ApiError(409, f"{message}. Modes served: {modes}", param="index", code="model_missing")

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


class _Models:
    """What a catalog opens, each model once, whatever asks for it; those that are to be served get an engine."""

    def __init__(self, catalog: Catalog, load: Callable[[str], Encoder], make_engine: Callable[[Encoder, str], Engine]) -> None:
        self._catalog, self._load, self._make_engine = catalog, load, make_engine
        self._encoders: dict[str, Encoder] = {}
        self._engines: dict[str, Engine] = {}

    def opened(self, reference: str) -> Encoder:
        """Returns the model; raises what ``load`` does."""
        key = self._key(reference)
        if key not in self._encoders:
            self._encoders[key] = self._load(reference)
        return self._encoders[key]

    def served(self, reference: str, name: str) -> Engine:
        """Returns the model's engine, from then on in the catalog under ``name``, made unique."""
        key = self._key(reference)
        if key not in self._engines:
            unique = _unique(name, self._catalog.engines)
            engine = self._make_engine(self.opened(reference), unique)
            self._engines[key] = self._catalog.engines[unique] = engine
        return self._engines[key]

    @staticmethod
    def _key(reference: str) -> str:
        return str(Path(reference).resolve()) if Path(reference).exists() else reference


def open_catalog(
    targets: Iterable[str],
    load: Callable[[str], Encoder],
    make_engine: Callable[[Encoder, str], Engine],
    *,
    reranker: Reranker | None = None,
    aliases: Sequence[str] = (),
) -> Catalog:
    """Returns the catalog of models and indexes; each target is a model, an index, or ``NAME=`` one of them.

    Indexes of one model share it. Where a model of an index cannot be opened, or is another than the one that made its
    vectors, that is logged, and the index served in its other modes. Raises what ``load`` raises for a target.
    """
    catalog = Catalog()
    models = _Models(catalog, load, make_engine)
    for target in targets:
        name, reference = _name_of(target)
        directory = Path(reference)
        if not (directory / "manifest.json").is_file():
            models.served(reference, name)
            continue
        unique, store = _unique(name, catalog.indexes), Store(directory)
        missing = _missing(unique, store, models)
        own = {k: models.served(m.name, _name_of(m.name)[0]) for k, m in store.models.items() if k not in missing}
        catalog.indexes[unique] = ServedIndex(unique, directory, own, missing)
    if reranker is not None:
        catalog.reranker = ServedReranker(_name_of(str(reranker.name))[0], reranker)
    if aliases:
        first = next(iter(catalog.engines), None)
        if first is None:
            raise ValueError("a model's other names need a model; only indexes without one were given")
        catalog.aliases = dict.fromkeys(aliases, first)
    return catalog


def _missing(index: str, store: Store, models: _Models) -> dict[Kind, str]:
    """Returns why an index must do without a model, by kind; each is logged, with what to do. Clients are told no paths."""
    missing: dict[Kind, str] = {}
    for kind, model in store.models.items():
        why = "their model could not be opened"
        try:
            encoder = models.opened(model.name)
            why = "the model of that name is not the one that made them"
            store.check_encoder(encoder)
        except (ValueError, FileNotFoundError) as error:
            missing[kind] = why
            logger.warning("index %s is served without its %s (%s): %s", index, CALLED[kind], why, error)
    return missing


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
