"""Documents of an index, added, read and deleted: ``/v1/documents``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field

from openembed.server.schemas.fields import Free, Request


class NewDocument(Request):
    """A document to add. Without an id it gets one."""

    id: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    text: str
    title: str = ""
    metadata: Free = Field(default_factory=dict)


class AddRequest(Request):
    """``POST /v1/documents``. ``upsert``: replace documents whose id is there already; else that is an error (409)."""

    documents: Annotated[list[NewDocument], Field(min_length=1, fail_fast=True)]
    index: str | None = None
    upsert: bool = False


class DeleteRequest(Request):
    """``DELETE /v1/documents``: all of them or, when one is not there, none (404)."""

    ids: Annotated[list[str], Field(min_length=1, fail_fast=True)]
    index: str | None = None


class StoredDocument(BaseModel):
    """A document of an index."""

    id: str
    title: str
    text: str
    metadata: dict[str, Any]


class AddAnswer(BaseModel):
    """What was added, durably, and how many documents there are now."""

    added: int
    ids: list[str]
    count: int


class DeleteAnswer(BaseModel):
    """What was deleted, durably, and how many documents are left."""

    deleted: int
    count: int
