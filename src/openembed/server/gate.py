"""What every request passes before the API sees it: host, key, limits, body, deadline; and what every answer carries.

A request is *accepted* once it is let in; a stopping server finishes those and refuses others.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from openembed.server.errors import ApiError, internal
from openembed.server.metrics import Metrics
from openembed.server.settings import Settings

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

WITHOUT_KEY = frozenset({"/", "/health", "/docs", "/openapi.json", "/favicon.ico"})
"""Paths that tell nothing of what is served."""

ALWAYS_ANSWERED = frozenset({"/health", "/metrics"})
"""Paths for operators: neither counted nor refused while the server stops."""

RETRY_S = 5.0
COMMON_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


class Gone(Exception):
    """The client has left; nobody reads an answer."""


class Gate:
    """ASGI middleware around the API."""

    def __init__(self, app: Any, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.draining = False
        self.under_way = 0
        self.buffered = 0
        self._keys = [hashlib.sha256(key.encode()).digest() for key in settings.api_keys]
        self._hosts = frozenset(host.lower() for host in settings.hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await Passage(self, scope, receive, send).run()

    def admit(self, scope: Message, headers: dict[bytes, bytes]) -> None:
        """Raises ``ApiError`` for a request that is not let in: host (403), key (401), stopping (503), too many (429)."""
        path = scope["path"]
        if self._hosts and _host(headers) not in self._hosts:
            raise ApiError(403, "this server does not answer to that host name; see --allowed-host", code="host_not_allowed")
        if self._keys and path not in WITHOUT_KEY and not self._has_key(headers):
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if path in ALWAYS_ANSWERED:
            return
        if self.draining:
            raise ApiError(503, "the server is stopping; send the request again", code="draining", retry_after=RETRY_S)
        if self.under_way >= self.settings.limits.requests:
            raise ApiError(429, "too many requests are under way; try again later", code="queue_full", retry_after=1)

    def take(self, count: int) -> None:
        """Counts bytes of bodies that are held; raises ``ApiError`` 429 when that would be too many."""
        if self.buffered + count > self.settings.limits.buffered_bytes:
            raise ApiError(429, "too much is being sent at once; try again later", code="queue_full", retry_after=RETRY_S)
        self.buffered += count

    def _has_key(self, headers: dict[bytes, bytes]) -> bool:
        """Compares with every key in constant time, whatever was sent."""
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", headers.get(b"api-key", b""))
        digest = hashlib.sha256(given).digest()
        return any([hmac.compare_digest(digest, key) for key in self._keys])  # noqa: C419  all of them, always


class Passage:
    """One request on its way through the gate."""

    def __init__(self, gate: Gate, scope: Message, receive: Receive, send: Send) -> None:
        # HEAD is answered as GET everywhere; the server that gave us the request sends heads alone for it
        self.scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        self.gate, self._receive, self._send = gate, receive, send
        self.headers = dict(reversed(scope["headers"]))  # of headers sent twice, the first counts
        self.status = 0
        self.finished = False
        self.held = 0
        self.gone = False

    async def run(self) -> None:
        """Answers the request."""
        start = time.perf_counter()
        try:
            self.gate.admit(self.scope, self.headers)
            await self._let_in()
        except ApiError as error:
            await self._answer(error)
        except Gone:
            self.gate.metrics.dropped.labels("disconnect").inc()
        except Exception:
            logger.exception("%s %s failed", self.scope["method"], self.scope["path"][:200])
            await self._answer(internal())
        finally:
            route = getattr(self.scope.get("route"), "path", "other")
            self.gate.metrics.requests.labels(route, str(self.status or 499)).inc()
            self.gate.metrics.seconds.labels(route).observe(time.perf_counter() - start)

    async def _let_in(self) -> None:
        counted = self.scope["path"] not in ALWAYS_ANSWERED
        self.gate.under_way += counted
        try:
            body = await self._body()
            await self._call(body)
        finally:
            self.gate.under_way -= counted
            self.gate.buffered -= self.held

    async def _body(self) -> bytes:
        """The whole body; refused as soon as it is too large, not after it was read."""
        limits = self.gate.settings.limits
        if self.headers.get(b"content-encoding", b"identity").lower() not in (b"", b"identity"):
            raise ApiError(415, "send the body as it is, without Content-Encoding", code="unsupported_media_type")
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limits.body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(limits.read_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    if self.held + len(part) > limits.body_bytes:
                        raise self._too_large()
                    self.gate.take(len(part))
                    self.held += len(part)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", code="timeout") from None

    async def _call(self, body: bytes) -> None:
        """Runs the API under the deadline; stops it when the client leaves."""
        task = asyncio.current_task()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await asyncio.Event().wait()  # type: ignore[return-value]

        async def watch() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            if not self.finished:
                self.gone = True
                task.cancel()  # type: ignore[union-attr]

        watcher = asyncio.create_task(watch())
        try:
            async with asyncio.timeout(self.gate.settings.limits.request_s):
                await self.gate.app(self.scope, replay, self._out)
        except TimeoutError:
            self.gate.metrics.dropped.labels("timeout").inc()
            raise ApiError(504, "the answer took too long and was given up; send less at once", code="timeout") from None
        except asyncio.CancelledError:
            if not self.gone:
                raise
            task.uncancel()  # type: ignore[union-attr]
            raise Gone from None
        finally:
            watcher.cancel()

    async def _out(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            close = [(b"connection", b"close")] if self.gate.draining or self.status in (408, 413) else []
            message = {**message, "headers": [*message.get("headers", []), *COMMON_HEADERS, *close]}
        elif not message.get("more_body", False):
            self.finished = True
        await self._send(message)

    async def _answer(self, error: ApiError) -> None:
        if self.status:  # an answer has begun; the server closes the connection
            return
        body = error.body()
        headers = [*error.headers(), (b"content-length", str(len(body)).encode())]
        await self._out({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._out({"type": "http.response.body", "body": body})

    def _too_large(self) -> ApiError:
        most = self.gate.settings.limits.body_bytes
        return ApiError(413, f"the body is larger than {most} bytes; send it in parts", code="body_too_large")


def _host(headers: dict[bytes, bytes]) -> str:
    """The host name a request was sent to, without its port."""
    host = headers.get(b"host", b"").decode("latin-1").lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
