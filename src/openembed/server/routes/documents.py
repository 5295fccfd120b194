"""``/v1/documents``: adding, reading and deleting documents of an index; what is acknowledged is on the disk."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from openembed.encoded import Encoded
from openembed.index.store import Store
from openembed.records import Document
from openembed.representations import Kind
from openembed.server.body import answer, read
from openembed.server.catalog import ServedIndex
from openembed.server.engine import Prompt
from openembed.server.errors import ApiError, refused
from openembed.server.routes import REFUSALS, catalog, described, settings
from openembed.server.schemas.documents import AddAnswer, AddRequest, DeleteAnswer, DeleteRequest, StoredDocument
from openembed.server.schemas.fields import ErrorAnswer

logger = logging.getLogger(__name__)
router = APIRouter(tags=["documents"])
R = TypeVar("R")

CHANGES = {
    **REFUSALS,
    403: {"model": ErrorAnswer, "description": "The server was started without --writable."},
    409: {"model": ErrorAnswer, "description": "An id is there already, another process is writing, or a model is missing."},
}


@router.post("/v1/documents", responses={200: {"model": AddAnswer}, **CHANGES}, openapi_extra=described(AddRequest))
async def add(request: Request) -> Response:
    """Adds documents, all or none."""
    _require_writable(request)
    body = await read(request, AddRequest)
    index = catalog(request).index(body.index)
    most = settings(request).limits.texts
    if len(body.documents) > most:
        raise ApiError(413, f"{len(body.documents)} documents in one request; at most {most}", code="too_many_texts")
    documents = [Document(new.id or uuid.uuid4().hex, new.text, new.title, new.metadata) for new in body.documents]
    _refuse_twice([document.id for document in documents])
    vectors = await _vectors(index, documents)

    def write(store: Store) -> int:
        if not body.upsert:
            _refuse_known(store, documents)
        store.add(documents, vectors=vectors, replace=body.upsert)
        return len(store)

    count = await _changed(index, write)
    return answer({"added": len(documents), "ids": [document.id for document in documents], "count": count})


@router.delete("/v1/documents", responses={200: {"model": DeleteAnswer}, **CHANGES}, openapi_extra=described(DeleteRequest))
async def delete(request: Request) -> Response:
    """Deletes documents by id, all or none."""
    _require_writable(request)
    body = await read(request, DeleteRequest)
    index = catalog(request).index(body.index)
    wanted = list(dict.fromkeys(body.ids))

    def write(store: Store) -> int:
        absent = next((identifier for identifier in wanted if identifier not in store), None)
        if absent is not None:
            raise _no_document(absent)
        store.delete(wanted)
        return len(store)

    count = await _changed(index, write)
    return answer({"deleted": len(wanted), "count": count})


@router.get("/v1/documents/{identifier:path}", responses={200: {"model": StoredDocument}, **REFUSALS})
async def get(request: Request, identifier: str, index: Annotated[str | None, Query()] = None) -> Response:
    """One document."""
    found = await catalog(request).index(index).search(lambda store: _document(store, identifier))
    if found is None:
        raise _no_document(identifier)
    return answer({"id": found.id, "title": found.title, "text": found.text, "metadata": found.metadata})


def _document(store: Store, identifier: str) -> Document | None:
    return store.document(identifier) if identifier in store else None


async def _vectors(index: ServedIndex, documents: list[Document]) -> dict[Kind, Encoded]:
    """The documents' vectors of each kind that the index has, made as those in it were; ``ApiError`` 409 without its models."""
    texts, models = [document.full_text for document in documents], index.store.models
    index.require(models)
    found = {}
    for kind, engine in index.engines.items():
        prompt = Prompt(models[kind].document_prompt, models[kind].max_length)
        found[kind] = (await engine.encode(texts, prompt, normalize=models[kind].normalize)).values
    return found


async def _changed(index: ServedIndex, write: Callable[[Store], R]) -> R:
    try:
        return await index.change(write)
    except ValueError:
        logger.exception("%s: a change was refused", index.name)
        raise ApiError(
            409, "the index did not take the change (another process may be writing); its log says why", code="not_changed"
        ) from None


def _require_writable(request: Request) -> None:
    if not settings(request).writable:
        raise ApiError(403, "documents cannot be changed here; the server was started without --writable", code="read_only")


def _refuse_twice(identifiers: list[str]) -> None:
    seen: set[str] = set()
    for identifier in identifiers:
        if identifier in seen:
            raise refused(f"documents: id {identifier[:80]!r} is given twice", "documents", "duplicate_id")
        seen.add(identifier)


def _refuse_known(store: Store, documents: list[Document]) -> None:
    known = next((document.id for document in documents if document.id in store), None)
    if known is not None:
        raise ApiError(
            409, f"id {known[:80]!r} is in the index already; upsert replaces it", param="documents", code="document_exists"
        )


def _no_document(identifier: str) -> ApiError:
    return ApiError(404, f"no document with id {identifier[:80]!r}", code="document_not_found")
