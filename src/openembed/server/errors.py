"""Errors as clients see them: OpenAI's body, and never a path, a trace or another request's data."""

from __future__ import annotations

import math
from typing import Any

import orjson

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}

LONGEST_MESSAGE = 500
CONFLICT = "conflicting_parameters"
"""Code of an error about two keys that exclude each other."""


class ApiError(Exception):
    """A request that is refused, with its status. ``param``: the key that is wrong; ``code``: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = None if retry_after is None else min(max(math.ceil(retry_after), 1), 3600)

    def body(self) -> bytes:
        """Returns ``{"error": {"message", "type", "param", "code"}}`` as JSON."""
        message = self.message.encode("utf-8", "replace").decode()
        if len(message) > LONGEST_MESSAGE:
            message = message[: LONGEST_MESSAGE - 1] + "…"
        error = {"message": message, "type": TYPES.get(self.status, "server_error"), "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the headers that go with the body."""
        headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            headers.append((b"retry-after", str(self.retry_after).encode()))
        if self.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error of a request whose content is wrong (400)."""
    return ApiError(400, message, param=param, code=code)


def internal() -> ApiError:
    """Returns the error of a fault of ours: what happened is in the log, not in the answer."""
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def of_status(status: int, detail: Any) -> ApiError:
    """Returns the error of a status that the framework decided (no such path, method not allowed, ...)."""
    messages = {404: "there is nothing at this path", 405: "this path does not take this method"}
    return ApiError(status, messages.get(status, str(detail)))
