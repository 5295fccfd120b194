"""JSON in and out."""

from __future__ import annotations

import asyncio
import base64
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import Request
from pydantic import ValidationError
from scipy.sparse import csr_matrix
from starlette.responses import Response

from openembed.config import Config
from openembed.server.errors import ApiError, refused
from openembed.token_vectors import TokenVectors
from openembed.vectors import VectorFormat

C = TypeVar("C", bound=Config)

MOST_KEYS = 64
"""Of a request's object: each one that is not known costs an error message."""

VALUES_AT_ONCE = 1 << 17
"""Numbers written to JSON between two looks at other requests (some 5 ms)."""

TERMS_AT_ONCE = 1 << 14
"""Terms of sparse vectors written to JSON between two looks at other requests."""


async def read(request: Request, kind: type[C]) -> C:
    """Returns the body as a ``kind``; raises ``ApiError`` 400 that names what is wrong in it, 415 when it is not JSON."""
    return checked(await values(request), kind)


async def values(request: Request) -> dict[str, Any]:
    """Returns the body as a JSON object; raises ``ApiError`` 400, or 415 when it is not JSON."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", code="unsupported_media_type")
    try:
        found = orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise refused(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise refused("the body must be a JSON object", code="invalid_json")
    return found


def checked(found: dict[str, Any], kind: type[C]) -> C:
    """Returns a JSON object as a ``kind``; raises ``ApiError`` 400 that names the first thing that is wrong."""
    if len(found) > MOST_KEYS:
        raise refused(f"the body has {len(found)} keys; known are {', '.join(_keys(kind))}")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise _explained(error, kind) from None


def _explained(error: ValidationError, kind: type[Config]) -> ApiError:
    """The first thing that is wrong, in words, without the value that was sent."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:120]
    if first["type"] == "extra_forbidden":
        names = f"; known are {', '.join(_keys(kind))}" if len(first["loc"]) == 1 else ""
        return refused(f"{place}: this key is not known{names}", place, "unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    return refused(f"{place}: {message}" if place else message, place or None)


def _keys(kind: type[Config]) -> list[str]:
    return list(kind.model_fields)


def answer(value: Any, status: int = 200) -> Response:
    """Returns ``value`` as JSON."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status, media_type="application/json")


def encoded_base64(values: np.ndarray | TokenVectors) -> list[str]:
    """Returns each text's vector, or its vectors one after the other, as base64 of little-endian float32 bytes."""
    rows = np.ascontiguousarray(values, dtype="<f4") if isinstance(values, np.ndarray) else values
    return [base64.b64encode(row.data).decode("ascii") for row in rows]


async def encoded_rows(values_ND: np.ndarray) -> list[orjson.Fragment]:
    """Returns each vector as a JSON list of numbers; other requests have their turn in between."""
    rows = np.ascontiguousarray(values_ND, dtype=np.float32)
    at_once = max(1, VALUES_AT_ONCE // max(1, rows.shape[1]))
    found = []
    for start in range(0, len(rows), at_once):
        if start:
            await asyncio.sleep(0)
        found += [
            orjson.Fragment(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)) for row in rows[start : start + at_once]
        ]
    return found


async def encoded_matrices(matrices: TokenVectors) -> list[orjson.Fragment]:
    """Returns each text's vectors as a JSON list of lists; other requests have their turn in between."""
    found, values = [], 0
    for matrix in matrices:
        if values > VALUES_AT_ONCE:
            await asyncio.sleep(0)
            values = 0
        values += matrix.size
        found.append(orjson.Fragment(orjson.dumps(matrix, option=orjson.OPT_SERIALIZE_NUMPY)))
    return found


async def encoded_terms(values_NV: csr_matrix) -> list[orjson.Fragment]:
    """Returns the terms of each text as a JSON list of ``{"index", "value"}``; other requests have their turn in between."""
    found, at_once = [], max(1, len(values_NV.indptr) * TERMS_AT_ONCE // max(1, values_NV.nnz))
    for start in range(0, values_NV.shape[0], at_once):
        if start:
            await asyncio.sleep(0)
        ends = values_NV.indptr[start : start + at_once + 1]
        part = slice(ends[0], ends[-1])
        numbers = zip(_items(values_NV.indices[part]), _items(values_NV.data[part]), strict=True)
        pairs = [b'{"index":%b,"value":%b}' % pair for pair in numbers]
        found += [orjson.Fragment(b"[%b]" % b",".join(pairs[low:high])) for low, high in pairwise((ends - ends[0]).tolist())]
    return found


def _items(array: np.ndarray) -> list[bytes]:
    """Each number as JSON."""
    return orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def shortened(values_ND: np.ndarray, dimensions: int | None, *, normalize: bool) -> np.ndarray:
    """Returns the first ``dimensions`` of each vector (all of them for None), of length 1 again where ``normalize``.

    Raises ``ApiError`` 400 when the vectors have fewer.
    """
    try:
        return VectorFormat(dimensions=dimensions).apply(values_ND, normalize=normalize).to_float32()
    except ValueError as error:
        raise refused(str(error), "dimensions", "too_many_dimensions") from None
