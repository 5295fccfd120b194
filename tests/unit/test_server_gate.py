"""Keys, limits, deadlines, clients that leave, and a server that stops: nothing leaks, nothing accepted is lost."""

import asyncio
import logging
import threading
import time

import pytest
import torch
from server_setup import listening, served
from starlette.testclient import TestClient

from openembed.server.settings import Limits, Settings

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def encoder(make_encoder):
    return make_encoder()


class Slow(torch.nn.Module):
    """An encoder whose forward waits until it is let go, and may fail."""

    def __init__(self, encoder):
        super().__init__()
        self._inner = encoder
        self.go, self.error, self.calls, self.entered = threading.Event(), None, [], 0
        self.go.set()

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ("_inner", "go") else getattr(self.__dict__["_modules"]["_inner"], name)

    def forward(self, packed):
        self.entered += 1
        self.go.wait(20)
        self.calls.append(len(packed))
        if self.error is not None:
            raise self.error
        return self._inner(packed)


@pytest.fixture
def slow(encoder):
    made = Slow(encoder)
    yield made
    made.go.set()


def ask(app, **body):
    return TestClient(app).post("/v1/embeddings", json={"input": "a cat", **body})


def in_background(call):
    found = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    return thread, found


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_keys(encoder):
    settings = Settings(api_keys=("first", "second"))
    with served(["tiny"], encoder, settings) as (app, _gate, _catalog):
        client = TestClient(app)

        def status(**headers):
            return client.get("/v1/models", headers=headers).status_code

        assert status(Authorization="Bearer first") == status(Authorization="bearer second") == 200
        assert status(**{"x-api-key": "first"}) == status(**{"api-key": "second"}) == 200
        assert status() == status(Authorization="Bearer third") == status(Authorization="first") == 401
        assert status(Authorization="Bearer ") == status(**{"x-api-key": "firs"}) == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200
        refused = client.post("/v1/embeddings", content=b"x" * 100)
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
        assert "first" not in repr(settings)


def test_every_key_is_compared(encoder, monkeypatch):
    compared = []
    monkeypatch.setattr("openembed.server.gate.hmac.compare_digest", lambda a, b: compared.append(1) or a == b)
    with served(["tiny"], encoder, Settings(api_keys=("a", "b", "c"))) as (app, _gate, _catalog):
        TestClient(app).get("/v1/models", headers={"Authorization": "Bearer a"})
    assert len(compared) == 3


def test_only_known_hosts(encoder):
    with served(["tiny"], encoder, Settings(hosts=("localhost", "[::1]"))) as (app, _gate, _catalog):
        client = TestClient(app)
        assert client.get("/health", headers={"host": "localhost:8000"}).status_code == 200
        assert client.get("/health", headers={"host": "[::1]:8000"}).status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/health", headers={"host": "localhost.evil.example"}).status_code == 403


def test_no_other_origin_unless_named(encoder):
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    with served(["tiny"], encoder) as (app, _gate, _catalog):
        answer = TestClient(app).options("/v1/embeddings", headers=preflight)
        assert "access-control-allow-origin" not in answer.headers
        assert answer.status_code == 405
    settings = Settings(origins=("https://a.example",), api_keys=("key",))
    with served(["tiny"], encoder, settings) as (app, _gate, _catalog):
        client = TestClient(app)
        assert client.options("/v1/embeddings", headers=preflight).headers["access-control-allow-origin"] == "https://a.example"
        other = client.options("/v1/embeddings", headers={**preflight, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_a_large_body_is_refused_while_it_arrives(encoder):
    limits = Limits(body_bytes=2000)
    taken = 0

    async def receive():
        nonlocal taken
        taken += 1
        return {"type": "http.request", "body": b"x" * 900, "more_body": True}

    sent = []

    async def send(message):
        sent.append(message)

    with served(["tiny"], encoder, Settings(limits=limits)) as (app, gate, _catalog):
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "query_string": b""}
        asyncio.run(app(scope, receive, send))
        assert (sent[0]["status"], taken) == (413, 3)
        assert (b"connection", b"close") in sent[0]["headers"]
        declared = TestClient(app).post("/v1/embeddings", content=b"x" * 2001, headers=JSON)
        assert declared.status_code == 413
        assert (gate.buffered, gate.under_way) == (0, 0)


def test_bodies_together_are_bounded(encoder):
    limits = Limits(body_bytes=2000, buffered_bytes=3000)
    with served(["tiny"], encoder, Settings(limits=limits)) as (app, gate, _catalog):
        gate.buffered = 2000
        response = TestClient(app).post("/v1/embeddings", content=b"x" * 1500, headers=JSON)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1


def test_a_body_that_does_not_come(encoder):
    async def never():
        await asyncio.sleep(60)

    sent = []

    async def send(message):
        sent.append(message)

    with served(["tiny"], encoder, Settings(limits=Limits(read_s=0.05))) as (app, _gate, _catalog):
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "query_string": b""}
        asyncio.run(app(scope, never, send))
    assert sent[0]["status"] == 408


def test_a_packed_body_is_refused(encoder):
    with served(["tiny"], encoder) as (app, _gate, _catalog):
        response = TestClient(app).post("/v1/embeddings", content=b"x", headers={**JSON, "content-encoding": "gzip"})
        assert response.status_code == 415


def test_a_full_queue_says_when_to_come_back(slow, encoder):
    texts = ["the quick brown fox " * 3] * 6
    tokens = int(encoder.tokenize(texts).lengths.sum())
    limits = Limits(request_tokens=tokens, queue_tokens=int(tokens * 1.5))
    with served(["tiny"], slow, Settings(limits=limits), token_budget=32) as (app, _gate, catalog):
        slow.go.clear()
        slow.entered = 0
        batcher = catalog.engine(None).batcher
        threads = [in_background(lambda: ask(app))]
        until(lambda: slow.entered)
        threads.append(in_background(lambda: ask(app, input=texts)))
        until(lambda: batcher.tokens == tokens)
        batcher.rate = tokens / 4
        refused = ask(app, input=texts)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "2"  # half of the tokens too many, a quarter of them a second
        threads.append(in_background(lambda: ask(app)))  # there is room for a short one
        until(lambda: batcher.tokens > tokens)
        slow.go.set()
        for thread, found in threads:
            thread.join()
            assert found[0].status_code == 200
        assert ask(app, input=texts).status_code == 200


def test_too_many_requests(slow):
    with served(["tiny"], slow, Settings(limits=Limits(requests=1))) as (app, gate, _catalog):
        slow.go.clear()
        thread, found = in_background(lambda: ask(app))
        until(lambda: gate.under_way == 1)
        assert ask(app).status_code == 429
        assert TestClient(app).get("/health").status_code == 200
        slow.go.set()
        thread.join()
        assert found[0].status_code == 200


def test_a_request_that_takes_too_long_is_given_up(slow):
    with served(["tiny"], slow, Settings(limits=Limits(request_s=0.2)), token_budget=16) as (app, gate, catalog):
        slow.go.clear()
        thread, found = in_background(lambda: ask(app, input=["a cat sat on a mat"] * 50))
        thread.join(5)
        assert (found[0].status_code, found[0].json()["error"]["code"]) == (504, "timeout")
        assert (catalog.engine(None).batcher.tokens, gate.under_way) == (0, 0)
        slow.calls.clear()
        slow.go.set()
        until(lambda: slow.calls)
        assert ask(app).status_code == 200
        assert sum(slow.calls) < 15  # what ran, and the new one; not the fifty


def test_the_rows_of_a_client_that_left_are_dropped(slow):
    import http.client

    with served(["tiny"], slow, token_budget=16) as (app, gate, catalog), listening(app) as url:
        slow.go.clear()
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        body = b'{"input": ["a cat sat on a mat"' + b', "a cat sat on a mat"' * 50 + b"]}"
        connection.request("POST", "/v1/embeddings", body, JSON)
        batcher = catalog.engine(None).batcher
        until(lambda: batcher.texts > 40)
        connection.close()
        until(lambda: batcher.texts == 0 and gate.under_way == 0)
        slow.go.set()
        assert ask(app).status_code == 200
        assert 'dropped_requests_total{reason="disconnect"} 1' in TestClient(app).get("/metrics").text


@pytest.mark.parametrize("error", [RuntimeError("/secret/path exploded"), MemoryError("no"), KeyError("x")])
def test_a_fault_shows_nothing_and_is_logged(slow, error, caplog):
    with served(["tiny"], slow) as (app, _gate, catalog):
        slow.error = error
        with caplog.at_level(logging.ERROR):
            response = TestClient(app, raise_server_exceptions=False).post("/v1/embeddings", json={"input": "a"})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert any(record.exc_info for record in caplog.records)
        slow.error = None
        assert ask(app).status_code == 200
        assert catalog.healthy


def test_a_model_that_keeps_failing_is_not_healthy(slow):
    with served(["tiny"], slow) as (app, _gate, _catalog):
        slow.error = RuntimeError("broken")
        assert all(ask(app).status_code == 500 for _ in range(3))
        assert TestClient(app).get("/health").json()["status"] == "failing"
        slow.error = None
        ask(app)
        assert TestClient(app).get("/health").json()["status"] == "ok"


def test_without_room_a_micro_batch_is_run_in_halves(slow, encoder):
    real = slow._inner

    def forward(packed):
        slow.calls.append(len(packed))
        if len(packed) > 3:
            raise torch.OutOfMemoryError
        return real(packed)

    slow.forward = forward
    from openembed.server.batcher import Batcher
    from openembed.server.metrics import Metrics

    batcher = Batcher(slow, "tiny", 1000, Metrics())
    batcher.start()
    rows, found = encoder.tokenize(["a cat"] * 7), []
    batcher.submit(rows, normalize=True, done=found.append)
    until(lambda: found)
    batcher.close()
    assert slow.calls[0] > 3
    assert min(slow.calls) <= 3
    assert abs(found[0] - encoder.encode(["a cat"] * 7)).max() < 1e-6


def test_two_threads_share_one_large_request(slow, encoder):
    from openembed.server.batcher import Batcher
    from openembed.server.metrics import Metrics

    metrics, texts, found = Metrics(), ["a cat", "dogs bark at night"] * 20, []
    batcher = Batcher(slow, "tiny", 32, metrics, workers=2)
    batcher.start()
    until(lambda: len(batcher._changed._waiters) == 2)  # both are asleep
    slow.go.clear()
    batcher.submit(encoder.tokenize(texts), normalize=True, done=found.append)
    until(lambda: slow.entered == 2)  # two micro-batches run at once
    slow.go.set()
    until(lambda: found)
    batcher.close()
    assert abs(found[0] - encoder.encode(texts)).max() < 1e-6
    assert metrics.registry.get_sample_value("openembed_texts_total", {"model": "tiny"}) == len(texts)


def test_one_vector_that_is_not_finite_fails_its_request_alone(slow):
    real = slow._inner

    def forward(packed):
        slow.go.wait(20)
        values_BD = real(packed)
        values_BD[packed.lengths_B > 20] = float("nan")
        return values_BD

    with served(["tiny"], slow, token_budget=512) as (app, gate, _catalog):
        slow.forward = forward
        slow.go.clear()
        first = in_background(lambda: ask(app))
        until(lambda: gate.under_way == 1)
        good, bad = in_background(lambda: ask(app)), in_background(lambda: ask(app, input="the quick brown fox " * 8))
        until(lambda: gate.under_way == 3)
        slow.go.set()
        for thread, _ in (first, good, bad):
            thread.join()
        assert [found[0].status_code for _, found in (first, good, bad)] == [200, 200, 500]


def test_a_stopping_server_says_so_and_finishes(slow):
    with served(["tiny"], slow) as (app, gate, _catalog):
        slow.go.clear()
        thread, found = in_background(lambda: ask(app))
        until(lambda: gate.under_way == 1)
        gate.draining = True
        client = TestClient(app)
        assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "draining")
        refused = ask(app)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert refused.headers["retry-after"] == "5"
        assert refused.headers["connection"] == "close"
        slow.go.set()
        thread.join()
        assert found[0].status_code == 200


def test_limits_that_contradict_are_refused():
    with pytest.raises(ValueError, match="more than queue_tokens"):
        Limits(request_tokens=100, queue_tokens=50)
