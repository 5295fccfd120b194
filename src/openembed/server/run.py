"""The process around the application: a socket, a loop, and an end that loses nothing."""

from __future__ import annotations

import logging
import socket
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from openembed.server.errors import refused
from openembed.server.gate import Gate

logger = logging.getLogger(__name__)

HEAD_BYTES = 65_536
"""Of a request line and its headers."""

HEAD_S = 20.0
"""Seconds until a connection must have sent them."""

KEEP_ALIVE_S = 75
BACKLOG = 2048


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 whose request heads are bounded in size and time, and whose own refusals have the API's shape."""

    def connection_made(self, transport: Any) -> None:
        """Starts the clock of the first head."""
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._deadline = self.loop.call_later(HEAD_S, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what belongs to a head that is not complete."""
        if self._in_head:
            if self._head_bytes == 0:
                self._deadline.cancel()
                self._deadline = self.loop.call_later(HEAD_S, self._late)
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The request's head is too large.")

    def on_headers_complete(self) -> None:
        """The head is whole; what follows is the gate's business."""
        self._in_head, self._head_bytes = False, 0
        self._deadline.cancel()
        if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser answers 400
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next bytes are a head again."""
        super().on_message_complete()
        self._in_head, self._head_bytes = True, 0

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, and closes."""
        body = refused(msg, code="invalid_http").body()
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: says so, refuses new requests, finishes those it has accepted, ends. A second signal: now."""

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self.gate = gate
        self._since = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain, or stops draining."""
        if not self.gate.draining:
            self._since = time.monotonic()
            self.gate.draining = True
            logger.info("stopping: %d requests are finished first", self.gate.under_way)
            return
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ends the server once nothing is under way, or after the time it was given."""
        if self.gate.draining and not self.should_exit:
            settings, waited = self.gate.settings, time.monotonic() - self._since
            over = waited >= settings.drain_s
            if over and self.gate.under_way:
                logger.warning("stopping with %d requests unfinished after %g s", self.gate.under_way, waited)
            self.should_exit = over or (waited >= settings.drain_delay_s and self.gate.under_way == 0)
        return await super().on_tick(counter)


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, on which nothing is accepted yet; ``ValueError`` when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); use another --host or --port") from None
    return bound


def run(app: Any, gate: Gate, bound: socket.socket, *, access_log: bool = False) -> None:
    """Serves ``app`` until a signal ends it."""
    config = uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        access_log=access_log,
        log_level="info" if access_log else "warning",
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=5,
    )
    DrainingServer(config, gate).run(sockets=[bound])
