"""A directory of documents that can be searched: exact dense and BM25, with add, delete, and reopening at no cost.

    DIR/manifest.json            what is whole: model, segments, deletions; replaced atomically, the only mutable file
    DIR/segments/000001/         immutable segments, written and synced before the manifest names them
    DIR/deleted/000001-000004.npy  positions deleted from segment 1 as of change 4

A segment holds documents, metadata by value, vectors, their int8 codes and inverted lists (see ``segments``). A crash at any
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
from typing import Any

import numpy as np

from openembed.documents import check_document
from openembed.files import atomic_write, fsync_directory, remove_temporary
from openembed.index.dense import Vectors, best_first
from openembed.index.dense import search as search_vectors
from openembed.index.filters import Filter, parse_filter
from openembed.index.lexical import Analyzer, Bm25, analyzer
from openembed.index.manifest import (
    EncodesDocuments,
    Manifest,
    ModelInfo,
    SegmentInfo,
    check_absent,
    describe_model,
    read_manifest,
    write_manifest,
)
from openembed.index.segments import Segment, SegmentWriter
from openembed.index.strings import named, write_array
from openembed.locks import exclusive
from openembed.records import Document

__all__ = ["Hits", "ModelInfo", "Store", "check_absent", "describe_model"]

Hits = dict[str, float]
"""Document id → score, best first."""
Condition = Mapping[str, Any] | Filter | None
"""What a search may find: as ``filters.parse_filter`` takes it; None: everything."""
CHUNK = 1024
EXACT_FROM = 16
SEGMENTS = 16
"""Beyond this many segments the smallest are merged: each costs a dozen open files and a pass of every search."""

logger = logging.getLogger(__name__)


class Store:
    """Documents, their vectors and their terms in one directory.

    ``Store.create`` makes one, ``Store(directory)`` opens one; without a model it serves BM25 alone. Opening maps files
    and loads neither documents nor weights. A reader sees the state at its opening, whatever others write meanwhile, until
    it calls ``refresh``; every change of its own includes the changes of others.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._open()

    @classmethod
    def create(
        cls,
        directory: str | Path,
        documents: Iterable[Document] = (),
        vectors: np.ndarray | None = None,
        *,
        language: str = "en",
        model: ModelInfo | None = None,
    ) -> Store:
        """Returns a new store of ``documents`` (with their ``vectors`` when there is a model), all or nothing.

        Raises ``FileExistsError`` when ``directory`` already holds a store, and what ``add`` raises.
        """
        store = cls.__new__(cls)
        store.directory = Path(directory)
        manifest = Manifest(language=language, model=model)
        store._use(manifest, [])
        store.directory.mkdir(parents=True, exist_ok=True)
        with exclusive(store.directory):
            check_absent(store.directory)
            with store._cleaned():
                if store._append(manifest, documents, vectors=vectors) == 0:
                    write_manifest(store.directory, manifest)
        return store

    # ---- reading

    def __len__(self) -> int:
        return int(sum(segment.live_N.sum() for segment in self._segments))

    def __contains__(self, identifier: str) -> bool:
        return self._find(identifier) is not None

    @property
    def model(self) -> ModelInfo | None:
        """Which model made the vectors; None when the store serves BM25 alone."""
        return self._manifest.model

    @property
    def analyzer(self) -> Analyzer:
        """How the texts become BM25 terms."""
        return self._analyzer

    def ids(self) -> Iterator[str]:
        """Yields the ids of the live documents, segment by segment."""
        for segment in self._segments:
            for position in np.flatnonzero(segment.live_N):
                yield segment.ids[int(position)]

    def document(self, identifier: str) -> Document:
        """Returns a document, read from disk; raises ``ValueError`` when there is none of that id."""
        place = self._find(identifier)
        if place is None:
            raise ValueError(f"{self.directory}: no document with id {identifier!r}")
        return self._segments[place[0]].document(place[1])

    def documents(self) -> Iterator[Document]:
        """Yields the live documents one by one, in the order of ``ids``."""
        for segment in self._segments:
            yield from segment.live_documents()

    def rows(self) -> Iterator[tuple[Document, np.ndarray]]:
        """Yields the live documents with their vectors, float32 (width,), in the order of ``ids``.

        Raises ``ValueError`` when the store has no vectors.
        """
        self._vectors_of()
        return chain.from_iterable(segment.live_rows() for segment in self._segments)

    def refresh(self) -> bool:
        """Opens the newest state; returns whether there was a newer one."""
        if read_manifest(self.directory).change == self._manifest.change:
            return False
        self._open()
        return True

    def dense(self, queries_QD: np.ndarray, k: int = 10, *, filter: Condition = None, exact: bool | None = None) -> list[Hits]:
        """Returns for each query vector the k documents of greatest dot product, best first.

        With ``filter``, of the documents for which it holds. ``exact``: True looks at every document; False lets segments of
        ``segments.SKETCHED`` documents and more be searched approximately (about 99 of the 100 true ones are found); None does
        so for fewer than ``EXACT_FROM`` queries, since for more at once exact search is as fast. The scores are exact always.

        Raises ``ValueError`` when the store has no vectors, the width
        differs, or the filter is malformed.
        """
        model = self._vectors_of()
        _check_k(k)
        queries_QD = np.asarray(queries_QD)
        if queries_QD.ndim != 2 or queries_QD.shape[1] != model.width:
            raise ValueError(f"queries of shape {queries_QD.shape}; this index needs (count, {model.width}) ({model.name})")
        if not np.isfinite(queries_QD).all():
            raise ValueError("a query vector holds NaN or infinity")
        masks = self._eligible(filter)
        segments = [
            Vectors(segment.vectors_ND, mask_N, segment.codes, segment.largest_norm, segment.sketch)
            for segment, mask_N in zip(self._segments, masks, strict=True)
        ]
        approximate = len(queries_QD) < EXACT_FROM if exact is None else not exact
        found = search_vectors(queries_QD, segments, k, self._id_at, approximate=approximate)
        return [self._named(ranking) for ranking in found]

    def bm25(self, texts: Sequence[str], k: int = 10, *, filter: Condition = None) -> list[Hits]:
        """Returns for each query text the k documents of greatest BM25 score, best first; no term in common, no hit.

        With ``filter``, of the documents for which it holds; scores do not depend on it.
        """
        _check_k(k)
        _refuse_string(texts, "texts")
        if self._bm25 is None:
            self._bm25 = Bm25([s.postings for s in self._segments], [s.live_N for s in self._segments])
        hits, masks = [], None if filter is None else self._eligible(filter)
        for text in texts:
            scores_N = self._bm25.scores(self._analyzer.terms(text))
            matching = np.flatnonzero(scores_N if masks is None else scores_N * np.concatenate(masks))
            hits.append(self._named(best_first(matching, scores_N[matching], k, self._id_at)))
        return hits

    def check_encoder(self, encoder: EncodesDocuments) -> None:
        """Raises ``ValueError`` when ``encoder`` is not the model that made the vectors."""
        model = self._vectors_of()
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
        encoder: EncodesDocuments | None = None,
        *,
        vectors: np.ndarray | None = None,
        replace: bool = False,
        advance: Callable[[int], None] = lambda _n: None,
    ) -> int:
        """Adds documents, encoded by ``encoder`` or with ``vectors`` (N, width) given in their order; returns how many.

        All or nothing. Raises ``ValueError`` for an id twice in ``documents``, an id already in the store (unless
        ``replace``, which deletes the old document in the same change), another model, and vectors of a wrong shape.
        Documents are streamed; their ids, metadata and term counts are held in memory until the end.
        """
        if self.model is not None and vectors is None:
            if encoder is None:
                raise ValueError(f"{self.directory}: give the encoder ({self.model.name}) or the documents' vectors")
            self.check_encoder(encoder)
        with self._change() as manifest:
            count = self._append(manifest, documents, encoder, vectors, replace=replace, advance=advance)
            if len(self._segments) > SEGMENTS:
                self._merge_smallest()
        return count

    def update(
        self, documents: Iterable[Document], encoder: EncodesDocuments | None = None, *, vectors: np.ndarray | None = None
    ) -> int:
        """Puts documents in the place of those with their ids; returns how many. All or nothing.

        Without ``vectors``, only documents whose title or text changed are encoded; the others keep their vectors, and where
        none changed ``encoder`` may be None. Raises ``ValueError`` for an id that is not there, and what ``add`` raises.
        """
        documents = list(documents)
        for document in documents:
            if document.id not in self:
                raise ValueError(f"{self.directory}: no document with id {document.id!r}; nothing was updated")
        if self.model is not None and vectors is None:
            vectors = self._updated_vectors(documents, encoder)
        return self.add(documents, encoder, vectors=vectors, replace=True)

    def check_addable(self, identifiers: Iterable[str], *, replace: bool = False) -> None:
        """Raises the ``ValueError`` that ``add`` would raise for these ids, before anything is encoded."""
        seen: set[str] = set()
        for identifier in identifiers:
            self._admit(identifier, seen, {}, replace)

    def delete(self, identifiers: Iterable[str]) -> int:
        """Deletes documents; returns how many. All or nothing: raises ``ValueError`` naming an id that is not there.

        Raises ``TypeError`` for a bare string, whose characters would be taken for ids.
        """
        _refuse_string(identifiers, "identifiers")
        with self._change() as manifest:
            positions: dict[int, list[int]] = {}
            wanted = dict.fromkeys(identifiers)
            for identifier in wanted:
                place = self._find(identifier)
                if place is None:
                    raise ValueError(f"{self.directory}: no document with id {identifier!r}; nothing was deleted")
                positions.setdefault(place[0], []).append(place[1])
            if wanted:
                self._commit(manifest, self._with_deleted(manifest, positions))
        return len(wanted)

    def compact(self) -> None:
        """Copies the live documents into one segment and frees the space of deleted ones; encodes nothing."""
        with self._change() as manifest:
            if len(self._segments) > 1 or not all(segment.live_N.all() for segment in self._segments):
                self._merge(manifest, range(len(self._segments)))

    # ---- inside

    def _open(self) -> None:
        for attempt in range(3):
            manifest = read_manifest(self.directory)
            try:
                segments = [self._open_segment(info, manifest.model) for info in manifest.segments]
                break
            except ValueError:  # a compaction may have removed what was just named; then the manifest has moved on
                if attempt == 2 or read_manifest(self.directory).change == manifest.change:
                    raise
        self._use(manifest, segments)

    def _use(self, manifest: Manifest, segments: list[Segment]) -> None:
        self._manifest = manifest
        self._segments = segments
        self._starts = np.cumsum([0, *(segment.count for segment in segments)])
        self._analyzer = analyzer(manifest.language)
        self._bm25: Bm25 | None = None

    def _open_segment(self, info: SegmentInfo, model: ModelInfo | None) -> Segment:
        directory = self.directory / "segments" / info.name
        segment = Segment(directory, info, model.width if model else 0)
        if info.deleted:
            path = self.directory / "deleted" / info.deleted
            try:
                segment.live_N[np.load(path, allow_pickle=False)] = False
            except (OSError, ValueError, EOFError, IndexError) as error:
                raise ValueError(f"{path}: damaged ({error}); build the index anew") from None
        return segment

    def _eligible(self, condition: Condition) -> list[np.ndarray]:
        """Returns for each segment which documents may be found."""
        if condition is None:
            return [segment.live_N for segment in self._segments]
        parsed = parse_filter(condition) if isinstance(condition, Mapping) else condition
        return [segment.live_N & segment.matching(parsed) for segment in self._segments]

    @contextmanager
    def _change(self) -> Iterator[Manifest]:
        """Yields the newest manifest with the writer's lock held."""
        with exclusive(self.directory):
            self._open()
            with self._cleaned():
                yield self._manifest

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
        named = {info.name for info in self._manifest.segments} | {info.deleted for info in self._manifest.segments}
        for folder in ("segments", "deleted"):
            for path in (self.directory / folder).glob("*"):
                if path.name not in named:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def _append(
        self,
        manifest: Manifest,
        documents: Iterable[Document],
        encoder: EncodesDocuments | None = None,
        vectors: np.ndarray | None = None,
        *,
        replace: bool = False,
        advance: Callable[[int], None] = lambda _n: None,
    ) -> int:
        """Commits a manifest with one more segment; returns its number of documents (of none, nothing is committed)."""
        name = f"{manifest.change + 1:06d}"
        writer = SegmentWriter(self.directory / "segments" / name, self.model.width if self.model else 0)
        superseded: dict[int, list[int]] = {}
        seen: set[str] = set()
        stream = iter(documents)
        while chunk := list(islice(stream, CHUNK)):
            for document in chunk:
                check_document(document, f"document {document.id!r}")
                self._admit(document.id, seen, superseded, replace)
            start = len(writer.ids)
            writer.add(chunk, self._vectors_for(chunk, encoder, vectors, start), self._analyzer)
            advance(len(chunk))
        if vectors is not None and len(vectors) != len(writer.ids):
            raise ValueError(f"got {len(vectors)} vectors for {len(writer.ids)} documents; nothing was added")
        if writer.ids:
            writer.close()
            kept = self._with_deleted(manifest, superseded)
            self._commit(manifest, (*kept, writer.info(name)))
        return len(writer.ids)

    def _merge_smallest(self) -> None:
        """Merges the smallest segments. What was added stays when this fails: the next addition tries again."""
        smallest = sorted(range(len(self._segments)), key=lambda number: self._segments[number].count)
        try:
            self._merge(self._manifest, smallest[:SEGMENTS])
        except OSError as error:
            logger.warning("%s: the documents were added, but segments could not be merged: %s", self.directory, error)

    def _merge(self, manifest: Manifest, numbers: Iterable[int]) -> None:
        """Commits a manifest where one new segment holds the live documents of the segments ``numbers``."""
        name = f"{manifest.change + 1:06d}"
        writer = SegmentWriter(self.directory / "segments" / name, self.model.width if self.model else 0)
        merged = set(numbers)
        for number in sorted(merged):
            segment = self._segments[number]
            live = np.flatnonzero(segment.live_N)
            for start in range(0, len(live), CHUNK):
                chunk = live[start : start + CHUNK]
                writer.add([segment.document(int(p)) for p in chunk], segment.vectors_ND[chunk], None)
            segment.postings.copy_live(segment.live_N, writer.postings)
        writer.close()
        kept = [info for number, info in enumerate(manifest.segments) if number not in merged]
        if writer.ids:
            kept.append(writer.info(name))
        self._commit(manifest, tuple(kept))

    def _with_deleted(self, manifest: Manifest, positions: dict[int, list[int]]) -> tuple[SegmentInfo, ...]:
        """Returns the manifest's segments with further positions deleted, written to new files."""
        segments = list(manifest.segments)
        for number, added in positions.items():
            live_N = self._segments[number].live_N.copy()
            live_N[added] = False
            name = f"{segments[number].name}-{manifest.change + 1:06d}.npy"
            path = self.directory / "deleted" / name
            with named(path), atomic_write(path, "wb") as file:
                write_array(file, np.flatnonzero(~live_N))
            segments[number] = segments[number].model_copy(update={"deleted": name})
        return tuple(segments)

    def _admit(self, identifier: str, seen: set[str], superseded: dict[int, list[int]], replace: bool) -> None:
        if identifier in seen:
            raise ValueError(f"id {identifier!r} is given twice; nothing was added")
        seen.add(identifier)
        place = self._find(identifier)
        if place is None:
            return
        if not replace:
            raise ValueError(
                f"{self.directory}: id {identifier!r} is already in the index; nothing was added "
                "(replace=True, or --replace, puts new documents in the place of old ones)"
            )
        superseded.setdefault(place[0], []).append(place[1])

    def _vectors_for(
        self, chunk: list[Document], encoder: EncodesDocuments | None, vectors: np.ndarray | None, start: int
    ) -> np.ndarray:
        model = self.model
        if model is None:
            return np.empty((len(chunk), 0), dtype=np.float32)
        if vectors is not None:
            return vectors[start : start + len(chunk)]
        return encoder.encode_documents(
            [document.full_text for document in chunk],
            instruction=model.document_instruction,
            normalize=model.normalize,
            max_length=model.max_length,
        )

    def _updated_vectors(self, documents: list[Document], encoder: EncodesDocuments | None) -> np.ndarray:
        """Returns the vectors of documents that are there: those of unchanged texts as they are, the others encoded."""
        vectors_ND = np.empty((len(documents), self._vectors_of().width), dtype=np.float32)
        changed = []
        for number, document in enumerate(documents):
            segment, position = self._find(document.id)
            vectors_ND[number] = self._segments[segment].vectors_ND[position]
            if self._segments[segment].document(position).full_text != document.full_text:
                changed.append(number)
        if changed and encoder is None:
            raise ValueError(f"{self.directory}: {len(changed)} texts changed; give the encoder ({self.model.name})")
        if encoder is not None:
            self.check_encoder(encoder)
        for start in range(0, len(changed), CHUNK):
            part = changed[start : start + CHUNK]
            vectors_ND[part] = self._vectors_for([documents[number] for number in part], encoder, None, 0)
        return vectors_ND

    def _vectors_of(self) -> ModelInfo:
        if self.model is None:
            raise ValueError(f"{self.directory}: was built without a model, so it serves BM25 only; index with a model")
        return self.model

    def _find(self, identifier: str) -> tuple[int, int] | None:
        for number, segment in enumerate(self._segments):
            position = segment.find(identifier)
            if position is not None:
                return number, position
        return None

    def _id_at(self, position: int) -> str:
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._segments[number].ids[position - int(self._starts[number])]

    def _named(self, ranking: list[tuple[int, float]]) -> Hits:
        return {self._id_at(position): score for position, score in ranking}


def _refuse_string(given: object, what: str) -> None:
    if isinstance(given, str):
        raise TypeError(f"{what} must be a list of strings; got one string. Write [{given[:40]!r}] for a single one.")


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
