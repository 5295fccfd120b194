"""A directory of documents that can be searched: by dense and sparse vectors and by words, with add, delete, and reopening
at no cost.

    DIR/manifest.json            what is whole: model, segments, deletions; replaced atomically, the only mutable file
    DIR/segments/000001/         immutable segments, written and synced before the manifest names them
    DIR/deleted/000001-000004.npy  positions deleted from segment 1 as of change 4

A segment holds documents, metadata by value, vectors of each kind that the store has a model for, and inverted lists (see
``segments``). A crash at any
time leaves the manifest of the last acknowledged change; what it does not name is removed by the next change. Readers take no
lock; one writer at a time does.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from openembed.config import parse
from openembed.documents import check_document
from openembed.files import atomic_write, fsync_directory, remove_temporary
from openembed.index.encoding import Encoders, count_of, encoded, encoders_by_kind, kind_of, vectors_by_kind
from openembed.index.fields import FIELDS, Vectors
from openembed.index.lexical import Analyzer
from openembed.index.manifest import (
    EncodesDocuments,
    Kind,
    Manifest,
    ModelInfo,
    SegmentInfo,
    check_absent,
    describe_model,
    read_manifest,
    write_manifest,
)
from openembed.index.searching import Condition, Hits, Searches, TermScore, TokenScore, refuse_string
from openembed.index.segments import Segment, SegmentWriter
from openembed.index.state import State
from openembed.index.strings import named, write_array
from openembed.index.tokens.files import TokenCoding
from openembed.locks import exclusive
from openembed.records import Document

__all__ = [
    "Condition",
    "EncodesDocuments",
    "Hits",
    "ModelInfo",
    "Store",
    "TermScore",
    "TokenScore",
    "check_absent",
    "describe_model",
]

CHUNK = 1024
SEGMENTS = 16
"""Beyond this many segments the smallest are merged: each costs a dozen open files and a pass of every search."""

logger = logging.getLogger(__name__)


class Store(Searches):
    """Documents, their vectors and their terms in one directory.

    ``Store.create`` makes one, ``Store(directory)`` opens one; it has at most one model of each kind (dense, sparse), and
    without any it serves BM25 alone. Opening maps files
    and loads neither documents nor weights. A reader sees the state at its opening, whatever others write meanwhile, until
    it calls ``refresh``; every change of its own includes the changes of others. Threads may share it: what is searched or read
    while another thread changes the store is its state before, or after.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._opening = Lock()
        self._open()

    @classmethod
    def create(
        cls,
        directory: str | Path,
        documents: Iterable[Document] = (),
        vectors: Vectors | Mapping[Kind, Vectors] | None = None,
        *,
        language: str = "en",
        model: ModelInfo | Iterable[ModelInfo] | None = None,
    ) -> Store:
        """Returns a new store of ``documents`` (with their ``vectors`` when there is a model), all or nothing.

        ``model``: one, or one of each kind. Raises ``FileExistsError`` when ``directory`` already holds a store, and what
        ``add`` raises.
        """
        store = cls.__new__(cls)
        store.directory, store._opening = Path(directory), Lock()
        models = () if model is None else (model,) if isinstance(model, ModelInfo) else tuple(model)
        manifest = parse(Manifest, {"language": language, "models": models}, "models")
        store._state = State(store.directory, manifest, [])
        store.directory.mkdir(parents=True, exist_ok=True)
        with exclusive(store.directory):
            check_absent(store.directory)
            with store._cleaned():
                if store._append(store._state, documents, {}, vectors_by_kind(vectors)) == 0:
                    write_manifest(store.directory, manifest)
        return store

    # ---- reading

    def __len__(self) -> int:
        return int(sum(segment.live_N.sum() for segment in self._state.segments))

    def __contains__(self, identifier: str) -> bool:
        return self._state.find(identifier) is not None

    @property
    def models(self) -> dict[Kind, ModelInfo]:
        """Which models made the vectors, by kind; none when the store serves BM25 alone."""
        return dict(self._state.models)

    @property
    def model(self) -> ModelInfo | None:
        """Which model made the dense vectors; None when there are none."""
        return self.models.get("dense")

    @property
    def empty(self) -> dict[Kind, int]:
        """How many live documents have no term, or no token vector, by kind; kinds without such documents are left out."""
        state = self._state
        counts = {
            kind: sum(int((segment.fields[kind].empty() & segment.live_N).sum()) for segment in state.segments)
            for kind in state.models
        }
        return {kind: count for kind, count in counts.items() if count}

    @property
    def analyzer(self) -> Analyzer:
        """How the texts become BM25 terms."""
        return self._state.analyzer

    def ids(self) -> Iterator[str]:
        """Yields the ids of the live documents, segment by segment."""
        for segment in self._state.segments:
            for position in np.flatnonzero(segment.live_N):
                yield segment.ids[int(position)]

    def document(self, identifier: str) -> Document:
        """Returns a document, read from disk; raises ``ValueError`` when there is none of that id."""
        state = self._state
        number, position = state.place(identifier)
        return state.segments[number].document(position)

    def documents(self) -> Iterator[Document]:
        """Yields the live documents one by one, in the order of ``ids``."""
        for segment in self._state.segments:
            yield from segment.live_documents()

    def rows(self, kind: Kind = "dense") -> Iterator[tuple[Document, Any]]:
        """Yields the live documents with their vectors of ``kind``, in the order of ``ids``.

        Dense ones are float32 (width,), sparse ones (terms, weights). Raises ``ValueError`` when the store has none.
        """
        state = self._state
        state.model_of(kind)
        return chain.from_iterable(segment.live_rows(kind) for segment in state.segments)

    def refresh(self) -> bool:
        """Opens the newest state; returns whether there was a newer one."""
        if read_manifest(self.directory).change == self._state.manifest.change:
            return False
        self._open()
        return True

    def check_encoder(self, encoder: EncodesDocuments) -> None:
        """Raises ``ValueError`` when ``encoder`` is not the model that made the vectors of its kind."""
        model = self._state.model_of(kind_of(encoder))
        if encoder.width != model.width:
            raise ValueError(
                f"{self.directory}: vectors are {model.width} wide ({model.name}), the model given has {encoder.width}"
            )
        if encoder.fingerprint != model.fingerprint:
            raise ValueError(
                f"{self.directory}: its vectors were made by {model.name} (fingerprint {model.fingerprint[:12]}), the "
                f"model given has {encoder.fingerprint[:12]}; use that model, or build the index anew with this one"
            )

    # ---- changing

    def add(
        self,
        documents: Iterable[Document],
        encoder: Encoders = None,
        *,
        vectors: Vectors | Mapping[Kind, Vectors] | None = None,
        replace: bool = False,
        advance: Callable[[int], None] = lambda _n: None,
    ) -> int:
        """Adds documents, encoded by ``encoder`` or with ``vectors`` (N, width) given in their order; returns how many.

        Where the store has models of several kinds, there are as many encoders, or vectors by kind, or some of both.
        All or nothing. Raises ``ValueError`` for an id twice in ``documents``, an id already in the store (unless
        ``replace``, which deletes the old document in the same change), another model, and vectors of a wrong shape.
        Documents are streamed; their ids, metadata and term counts are held in memory until the end.
        """
        encoders, given = encoders_by_kind(encoder), vectors_by_kind(vectors)
        self._check_given(encoders, given)
        with self._change() as state:
            count = self._append(state, documents, encoders, given, replace=replace, advance=advance)
            if len(self._state.segments) > SEGMENTS:
                self._merge_smallest()
        return count

    def update(
        self,
        documents: Iterable[Document],
        encoder: Encoders = None,
        *,
        vectors: Vectors | Mapping[Kind, Vectors] | None = None,
    ) -> int:
        """Puts documents in the place of those with their ids; returns how many. All or nothing.

        Without ``vectors``, only documents whose title or text changed are encoded; the others keep their vectors, and where
        none changed ``encoder`` may be None. Raises ``ValueError`` for an id that is not there, and what ``add`` raises.
        """
        documents = [_checked(document) for document in documents]
        for document in documents:
            if document.id not in self:
                raise ValueError(f"{self.directory}: no document with id {document.id!r}; nothing was updated")
        encoders, given = encoders_by_kind(encoder), vectors_by_kind(vectors)
        if not documents:
            return 0
        given |= self._updated_vectors(documents, encoders, [kind for kind in self.models if kind not in given])
        return self.add(documents, encoder, vectors=given, replace=True)

    def check_addable(self, identifiers: Iterable[str], *, replace: bool = False) -> None:
        """Raises the ``ValueError`` that ``add`` would raise for these ids, before anything is encoded."""
        state, seen = self._state, set()
        for identifier in identifiers:
            _admit(state, identifier, seen, {}, replace)

    def delete(self, identifiers: Iterable[str]) -> int:
        """Deletes documents; returns how many. All or nothing: raises ``ValueError`` naming an id that is not there.

        Raises ``TypeError`` for a bare string, whose characters would be taken for ids.
        """
        refuse_string(identifiers, "identifiers")
        with self._change() as state:
            positions: dict[int, list[int]] = {}
            wanted = dict.fromkeys(identifiers)
            for identifier in wanted:
                place = state.find(identifier)
                if place is None:
                    raise ValueError(f"{self.directory}: no document with id {identifier!r}; nothing was deleted")
                positions.setdefault(place[0], []).append(place[1])
            if wanted:
                self._commit(state.manifest, self._with_deleted(state, positions))
        return len(wanted)

    def compact(self, coding: TokenCoding | None = None) -> None:
        """Copies the live documents into one segment and frees the space of deleted ones; encodes no text.

        ``coding``: how token vectors are coded now and in additions from now on, from the vectors as they are kept. Raises
        ``ValueError`` for it in a store without token vectors, or where vectors are to be kept that are gone.
        """
        with self._change() as state:
            manifest = state.manifest
            if coding is not None:
                tokens = state.model_of("tokens").model_copy(update={"coding": coding})
                held = [segment.fields["tokens"].segment.info.vectors for segment in state.segments]
                if coding.keep_vectors and not all(held):
                    raise ValueError(
                        f"{self.directory}: token vectors are kept as codes alone and cannot be brought back; index again"
                    )
                models = tuple(tokens if model.kind == "tokens" else model for model in manifest.models)
                manifest = manifest.model_copy(update={"models": models})
            whole = len(state.segments) <= 1 and all(segment.live_N.all() for segment in state.segments)
            if not whole or manifest.models != state.manifest.models:
                self._merge(state, manifest, range(len(state.segments)))

    # ---- inside

    def _open(self) -> State:
        """Makes the newest state this store's, and returns it. One thread at a time: so none puts an older one in its place."""
        with self._opening:
            for attempt in range(3):
                manifest = read_manifest(self.directory)
                try:
                    segments = [self._open_segment(info, manifest.models) for info in manifest.segments]
                    break
                except ValueError:  # a compaction may have removed what was just named; then the manifest has moved on
                    if attempt == 2 or read_manifest(self.directory).change == manifest.change:
                        raise
            self._state = state = State(self.directory, manifest, segments)
        return state

    def _open_segment(self, info: SegmentInfo, models: Sequence[ModelInfo]) -> Segment:
        directory = self.directory / "segments" / info.name
        segment = Segment(directory, info, models)
        if info.deleted:
            path = self.directory / "deleted" / info.deleted
            try:
                segment.live_N[np.load(path, allow_pickle=False)] = False
            except (OSError, ValueError, EOFError, IndexError) as error:
                raise ValueError(f"{path}: damaged ({error}); build the index anew") from None
        return segment

    @contextmanager
    def _change(self) -> Iterator[State]:
        """Yields the newest state with the writer's lock held."""
        with exclusive(self.directory):
            state = self._open()
            with self._cleaned():
                yield state

    @contextmanager
    def _cleaned(self) -> Iterator[None]:
        """Removes what the manifest does not name, before (what a killed writer left) and after the block."""
        self._remove_unnamed()
        try:
            yield
        finally:
            self._remove_unnamed()

    def _commit(self, manifest: Manifest, segments: tuple[SegmentInfo, ...]) -> None:
        fsync_directory(self.directory / "segments")
        write_manifest(self.directory, manifest.model_copy(update={"change": manifest.change + 1, "segments": segments}))
        self._open()

    def _remove_unnamed(self) -> None:
        remove_temporary(self.directory)
        written = (self.directory / "manifest.json").exists()  # what is committed but could not be opened is named too
        segments = (read_manifest(self.directory) if written else self._state.manifest).segments
        named = {info.name for info in segments} | {info.deleted for info in segments}
        for folder in ("segments", "deleted"):
            for path in (self.directory / folder).glob("*"):
                if path.name not in named:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _append(
        self,
        state: State,
        documents: Iterable[Document],
        encoders: Mapping[Kind, EncodesDocuments],
        vectors: Mapping[Kind, Vectors],
        *,
        replace: bool = False,
        advance: Callable[[int], None] = lambda _n: None,
    ) -> int:
        """Commits a manifest with one more segment; returns its number of documents (of none, nothing is committed)."""
        manifest, name = state.manifest, f"{state.manifest.change + 1:06d}"
        writer = SegmentWriter(self.directory / "segments" / name, manifest.models)
        superseded: dict[int, list[int]] = {}
        seen: set[str] = set()
        stream = map(_checked, documents)
        while chunk := list(islice(stream, CHUNK)):
            for document in chunk:
                check_document(document, f"document {document.id!r}")
                _admit(state, document.id, seen, superseded, replace)
            if not writer.ids:
                self._check_given(encoders, vectors)
            part = slice(len(writer.ids), len(writer.ids) + len(chunk))
            own = {kind: FIELDS[kind].take(given, part) for kind, given in vectors.items()}
            own |= {m.kind: encoded(m, encoders[m.kind], chunk) for m in manifest.models if m.kind not in vectors}
            writer.add(chunk, own, state.analyzer)
            advance(len(chunk))
        for given in vectors.values():
            if count_of(given) != len(writer.ids):
                raise ValueError(f"got {count_of(given)} vectors for {len(writer.ids)} documents; nothing was added")
        if writer.ids:
            writer.close()
            kept = self._with_deleted(state, superseded)
            self._commit(manifest, (*kept, writer.info(name)))
            self._warn_of_empty(self._state.segments[-1])
        return len(writer.ids)

    def _warn_of_empty(self, segment: Segment) -> None:
        """Says how many of a new segment's documents a kind of search will not find, whatever the query."""
        for kind, field in segment.fields.items():
            if count := int(field.empty().sum()):
                told = "%s: %s of %s documents without any %s: search by mode %s will not find them"
                part = "term in their sparse vectors" if kind == "sparse" else "token vector"
                logger.warning(told, self.directory, f"{count:,}", f"{segment.count:,}", part, kind)

    def _merge_smallest(self) -> None:
        """Merges the smallest segments. What was added stays when this fails: the next addition tries again."""
        state = self._state
        smallest = sorted(range(len(state.segments)), key=lambda number: state.segments[number].count)
        try:
            self._merge(state, state.manifest, smallest[:SEGMENTS])
        except (OSError, ValueError) as error:
            logger.warning("%s: the documents were added, but segments could not be merged: %s", self.directory, error)

    def _merge(self, state: State, manifest: Manifest, numbers: Iterable[int]) -> None:
        """Commits ``manifest``, but that one new segment holds the live documents of the segments ``numbers``."""
        name = f"{manifest.change + 1:06d}"
        writer = SegmentWriter(self.directory / "segments" / name, manifest.models)
        merged = set(numbers)
        for number in sorted(merged):
            segment = state.segments[number]
            live = np.flatnonzero(segment.live_N)
            for start in range(0, len(live), CHUNK):
                chunk = live[start : start + CHUNK]
                kept_rows = {kind: field.rows(chunk) for kind, field in segment.fields.items()}
                writer.add([segment.document(int(p)) for p in chunk], kept_rows, None)
            segment.postings.copy_live(segment.live_N, writer.postings)
        writer.close()
        kept = [info for number, info in enumerate(manifest.segments) if number not in merged]
        if writer.ids:
            kept.append(writer.info(name))
        self._commit(manifest, tuple(kept))

    def _with_deleted(self, state: State, positions: dict[int, list[int]]) -> tuple[SegmentInfo, ...]:
        """Returns the manifest's segments with further positions deleted, written to new files."""
        segments = list(state.manifest.segments)
        for number, added in positions.items():
            live_N = state.segments[number].live_N.copy()
            live_N[added] = False
            name = f"{segments[number].name}-{state.manifest.change + 1:06d}.npy"
            path = self.directory / "deleted" / name
            with named(path), atomic_write(path, "wb") as file:
                write_array(file, np.flatnonzero(~live_N))
            segments[number] = segments[number].model_copy(update={"deleted": name})
        return tuple(segments)

    def _check_given(self, encoders: Mapping[Kind, EncodesDocuments], vectors: Mapping[Kind, Vectors]) -> None:
        for kind in vectors:
            self._state.model_of(kind)
        for encoder in encoders.values():
            self.check_encoder(encoder)
        for kind, model in self.models.items():
            if kind not in vectors and kind not in encoders:
                raise ValueError(f"{self.directory}: give the encoder ({model.name}) or the documents' vectors")

    def _updated_vectors(
        self, documents: list[Document], encoders: Mapping[Kind, EncodesDocuments], kinds: Sequence[Kind]
    ) -> dict[Kind, Vectors]:
        """Returns the vectors of documents that are there: those of unchanged texts as they are, the others encoded."""
        state = self._state
        places = [state.place(document.id) for document in documents]
        numbers, positions = np.array(places).T
        texts = [state.segments[number].document(position).full_text for number, position in places]
        changed_N = np.array([old != document.full_text for old, document in zip(texts, documents, strict=True)])
        changed, updated = [document for document, new in zip(documents, changed_N, strict=True) if new], {}
        for encoder in encoders.values():
            self.check_encoder(encoder)
        for kind in kinds:
            model, parts, rows = state.model_of(kind), [], []
            for number in np.unique(numbers[~changed_N]):
                rows.append(np.flatnonzero((numbers == number) & ~changed_N))
                parts.append(state.segments[number].fields[kind].rows(positions[rows[-1]]))
            if changed:
                if kind not in encoders:
                    raise ValueError(f"{self.directory}: {len(changed)} texts changed; give the encoder ({model.name})")
                rows.append(np.flatnonzero(changed_N))
                parts.append(encoded(model, encoders[kind], changed))
            updated[kind] = FIELDS[kind].take(FIELDS[kind].join(parts), np.argsort(np.concatenate(rows)))
        return updated


def _admit(state: State, identifier: str, seen: set[str], superseded: dict[int, list[int]], replace: bool) -> None:
    """Notes an id that is to be added, and which document it supersedes; raises ``ValueError`` for one that may not be."""
    if identifier in seen:
        raise ValueError(f"id {identifier!r} is given twice; nothing was added")
    seen.add(identifier)
    place = state.find(identifier)
    if place is None:
        return
    if not replace:
        raise ValueError(
            f"{state.directory}: id {identifier!r} is already in the index; nothing was added "
            "(replace=True, or --replace, puts new documents in the place of old ones)"
        )
    superseded.setdefault(place[0], []).append(place[1])


def _checked(given: Document) -> Document:
    """Returns what was given; raises ``TypeError`` for what is not a document."""
    if not isinstance(given, Document):
        raise TypeError(
            f"documents are openembed.Document, got {type(given).__name__}; write "
            'openembed.Document(id="d1", text="...", title="", metadata={})'
        )
    return given
