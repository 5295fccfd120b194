"""Thousands of malformed requests: each answered, none with a fault of ours, none telling what is none of its business.

2,000 by default; 10,000 in process and 2,000 over a socket with OPENEMBED_SLOW=1.
"""

import asyncio
import json
import logging
import os
import re
import socket
import sys
import tempfile
from pathlib import Path

import pytest
from server_fuzz import request_of
from server_setup import listening, make_kinds, served
from tiny_training import tiny_sparse_encoder
from token_models import token_encoder

from openembed.server.metrics import resident_bytes
from openembed.server.settings import Limits, Settings

SLOW = os.environ.get("OPENEMBED_SLOW") == "1"
IN_PROCESS = 10_000 if SLOW else 2_000
OVER_A_SOCKET = 2_000 if SLOW else 200
PLACES = [Path.home(), Path(tempfile.gettempdir()), Path(sys.prefix), Path(__file__).parents[2], Path("/home"), Path("/tmp")]
TELLTALE = re.compile(
    "|".join(re.escape(f"{place}/") for place in PLACES)
    + r"|Traceback|File \"|site-packages|\.py\b|openembed/|Error\(|0x[0-9a-f]{6,}"
)
LIMITS = Limits(body_bytes=262_144, texts=128, rerank_documents=64, request_tokens=20_000, request_s=20, read_s=5)


@pytest.fixture(scope="module")
def encoders(make_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sparse = tiny_sparse_encoder(folder / "words", query_head={"kind": "idf_lookup"})
    return {"dense": make_encoder(), "sparse": sparse, "tokens": token_encoder(folder / "pieces")}


@pytest.fixture
def setup(encoders, tmp_path):
    make_kinds(tmp_path / "animals", encoders)
    with served([str(tmp_path / "animals")], encoders, Settings(limits=LIMITS, writable=True), token_budget=1024) as made:
        yield made


def waiting(catalog):
    return sum(engine.batcher.tokens for engine in catalog.engines.values())


async def call(app, seed):
    """The status and body that ``app`` answers to request ``seed``."""
    method, path, query, headers, parts = request_of(seed)
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode("latin-1", "replace"),
        "headers": [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "root_path": "",
    }
    incoming = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    incoming[-1]["more_body"] = False
    messages, sent = iter(incoming), []

    async def receive():
        message = next(messages, None)
        return message if message is not None else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), 60)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


def check(seed, status, body):
    assert status < 500, (seed, status, body[:300])
    if status >= 400:
        if request_of(seed)[0] != "HEAD":
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}, (seed, error)
        assert not TELLTALE.search(body.decode()), (seed, body)
        assert len(body) < 3000, (seed, body)


def test_malformed_requests_in_process(setup):
    app, gate, catalog = setup

    async def all_of_them():
        statuses = {}
        for first in range(0, IN_PROCESS, 50):
            seeds = range(first, first + 50)
            for seed, (status, body) in zip(seeds, await asyncio.gather(*(call(app, seed) for seed in seeds)), strict=True):
                check(seed, status, body)
                statuses[status] = statuses.get(status, 0) + 1
            if first == 1000:
                statuses["memory"] = resident_bytes()
        return statuses

    found = asyncio.run(all_of_them())
    grown = resident_bytes() - found.pop("memory")
    logging.getLogger(__name__).info("%s; memory grew by %.1f MB", found, grown / 1e6)
    assert sum(found.values()) == IN_PROCESS
    assert found[400] > IN_PROCESS / 3
    assert found[200] > IN_PROCESS / 100
    assert grown < 60e6
    assert (gate.under_way, gate.buffered, waiting(catalog)) == (0, 0, 0)
    assert catalog.healthy


def over_a_socket(address, seed):
    """What a server answers to the bytes of request ``seed``, headers as they come."""
    method, path, query, headers, parts = request_of(seed)
    target = path.replace(" ", "%20") + ("?" + query if query else "")
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "connection: close"]
    names = {name for name, _ in headers}
    chunked = seed % 3 == 0
    if not names & {"content-length", "transfer-encoding"}:
        lines.append("transfer-encoding: chunked" if chunked else f"content-length: {sum(map(len, parts))}")
    if "host" not in names:
        lines.append("host: localhost")
    body = b"".join(parts)
    if chunked:
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part) + (
            b"0\r\n\r\n" if seed % 2 else b"zz\r\n"
        )
    with socket.create_connection(address, timeout=30) as connection:
        try:
            connection.sendall("\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body)
            connection.shutdown(socket.SHUT_WR)
            found = b""
            while chunk := connection.recv(65_536):
                found += chunk
        except ConnectionError:  # closed before everything was read
            return b""
    return found


def test_malformed_requests_over_a_socket(setup):
    app, gate, catalog = setup
    answered = 0
    with listening(app) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        for seed in range(OVER_A_SOCKET):
            answer = over_a_socket((host, int(port)), seed)
            if not answer:
                continue
            answered += 1
            head, _, body = answer.partition(b"\r\n\r\n")
            status = int(head[9:12])
            if status == 100:
                head, _, body = body.partition(b"\r\n\r\n")
                status = int(head[9:12])
            check(seed, status, body)
    assert answered > OVER_A_SOCKET * 0.8
    assert (gate.under_way, gate.buffered, waiting(catalog)) == (0, 0, 0)
