"""The command as a process: real clients, and an end that loses nothing."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import httpx
import numpy as np
import openai
import pytest
from server_setup import make_index

import openembed
from openembed.records import Document

NANO = "openembed-nano"


@pytest.fixture(scope="module")
def encoder():
    return openembed.load(NANO)


@pytest.fixture(scope="module")
def folder(encoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "animals"
    make_index(path, encoder, [Document("cat", "Cats sleep in the sun."), Document("dog", "Dogs bark at night.")])
    name_model(path)
    return path


def name_model(index):
    """Says that the vectors are the packaged model's, so that it is served with them."""
    manifest = json.loads((index / "manifest.json").read_text())
    manifest["models"][0]["name"] = NANO
    (index / "manifest.json").write_text(json.dumps(manifest))


class Running:
    """A server process and its address."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "openembed", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("serving at "):
                self.url = line.split()[2]
                break
        else:
            raise AssertionError(f"did not start: {self.said}")
        self.wait_until_ready()

    def wait_until_ready(self):
        for _ in range(400):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise AssertionError("not ready")

    def end(self, seconds=30):
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@pytest.fixture(scope="module")
def running(folder):
    made = Running(folder, "--name", "text-embedding-3-small", OPENEMBED_API_KEYS="secret")
    yield made
    assert made.end() == 0


@pytest.fixture(scope="module")
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0)


def test_it_says_what_it_serves(running):
    text = "".join(running.said)
    for part in ("model openembed-nano: 256 dimensions", "cpu", "float32", "weights", "resident", "index animals: 2 documents"):
        assert part in text
    assert "secret" not in text


def test_openai_client_embeds(client, encoder):
    texts = ["cats that sleep", "naïve café 🙂"]
    expected = encoder.encode_documents(texts)
    answer = client.embeddings.create(model="text-embedding-3-small", input=texts)  # base64, the client's default
    assert np.allclose([row.embedding for row in answer.data], expected, atol=1e-6)
    assert answer.usage.prompt_tokens == encoder.tokenize(texts).lengths.sum()
    plain = client.embeddings.create(model=NANO, input=texts[0], encoding_format="float", dimensions=64)
    cut = expected[0][:64] / np.linalg.norm(expected[0][:64])
    assert np.allclose(plain.data[0].embedding, cut, atol=1e-6)
    asked = client.embeddings.create(model=NANO, input=texts, extra_body={"input_type": "query", "instruction": "Find animals"})
    assert np.allclose([r.embedding for r in asked.data], encoder.encode_queries(texts, instruction="Find animals"), atol=1e-6)
    ids = [row[1:-1].tolist() if len(row) > 2 else row.tolist() for row in encoder.tokenizer(texts).ids]
    assert len(client.embeddings.create(model=NANO, input=ids).data) == 2


def test_openai_client_understands_errors(client, running):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.embeddings.create(model="/etc/passwd", input="a")
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model=NANO, input="a", dimensions=100_000)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0).embeddings.create(model=NANO, input="a")
    assert [model.id for model in client.models.list()] == [NANO, "text-embedding-3-small"]


def test_async_openai_client_in_parallel(running, encoder):
    import asyncio

    async def many():
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="secret", max_retries=0) as client:
            return await asyncio.gather(*(client.embeddings.create(model=NANO, input=f"text {n} " * n) for n in range(1, 40)))

    answers = asyncio.run(many())
    expected = encoder.encode_documents([f"text {n} " * n for n in range(1, 40)])
    assert np.allclose([answer.data[0].embedding for answer in answers], expected, atol=2e-6)


def test_search_over_a_socket(running):
    with httpx.Client(base_url=running.url, headers={"authorization": "Bearer secret"}) as client:
        answer = client.post("/v1/search", json={"query": "sleeping cats"}).json()
        assert answer["hits"][0]["id"] == "cat"


def raw(url, data, shut=False):
    """What the server answers to bytes."""
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        while chunk := connection.recv(65_536):
            found += chunk
    return found


def test_what_is_no_http_has_the_same_error_body(running):
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\nhost\r\n\r\n", b"GET \xff\xfe HTTP/1.1\r\n\r\n"):
        found = raw(running.url, data)
        assert found.startswith(b"HTTP/1.1 400 ")
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


@pytest.mark.parametrize("path", ["/", "/health"])
def test_head_sends_no_body(running, path):
    found = raw(running.url, f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert int(re.search(rb"content-length: (\d+)", head)[1]) > 0
    assert body == b""


def test_heads_are_bounded(running):
    assert b" 400 " in raw(running.url, b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000)
    assert b" 400 " in raw(running.url, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n")


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest(folder):
    server = Running(folder, "--drain-delay-s", "1")
    text, found = "a cat and a dog in the garden " * 60, []

    def send(number):
        with httpx.Client(timeout=120) as client:
            answer = client.post(f"{server.url}/v1/embeddings", json={"input": [f"{number} {text}"] * 24})
            found.append((answer.status_code, len(answer.json().get("data", []))))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    while metric(server.url, "openembed_queue_texts") < 12 * 24 // 3:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    health = httpx.get(f"{server.url}/health")
    assert (health.status_code, health.json()["status"]) == (503, "draining")
    late = httpx.post(f"{server.url}/v1/embeddings", json={"input": "late"})
    assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
    assert int(late.headers["retry-after"]) > 0
    for thread in threads:
        thread.join()
    assert found == [(200, 24)] * 12
    assert server.process.wait(30) == 0


def test_two_threads_answer_write_and_drain(encoder, tmp_path):
    texts = [["a cat and a dog in the garden " * (1 + n % 40), f"text {n}"] * 12 for n in range(16)]
    expected = [encoder.encode_documents(some) for some in texts]
    index = tmp_path / "animals"
    make_index(index, encoder, [Document("cat", "Cats sleep in the sun.")])
    name_model(index)
    first = Running(index, "--workers", "2", "--writable", "--token-budget", "512")
    second = Running(index)
    found, added = {}, []

    def send(number):
        answer = httpx.post(f"{first.url}/v1/embeddings", json={"input": texts[number]}, timeout=120)
        found[number] = answer.status_code, [row["embedding"] for row in answer.json().get("data", [])]

    def add(number):
        document = {"id": f"new {number}", "text": f"newcomer {number}"}
        added.append(httpx.post(f"{first.url}/v1/documents", json={"documents": [document]}, timeout=120).status_code)

    threads = [threading.Thread(target=act, args=(n,)) for n in range(16) for act in ((send, add) if n < 6 else (send,))]
    for thread in threads:
        thread.start()
    while len(added) < 6:
        time.sleep(0.05)
    assert added == [200] * 6  # one after the other, whichever thread encoded them
    first.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert first.process.wait(30) == 0
    answered = [number for number, (status, _) in found.items() if status == 200]
    assert {status for status, _ in found.values()} <= {200, 503}  # 503: came when it was stopping
    assert len(answered) >= 8
    for number in answered:
        assert np.allclose(found[number][1], expected[number], atol=2e-6)
    time.sleep(1.1)  # a change of another process is seen within a second
    hits = httpx.post(f"{second.url}/v1/search", json={"query": "newcomer", "mode": "bm25"}).json()["hits"]
    assert {hit["id"] for hit in hits} == {f"new {number}" for number in range(6)}
    assert httpx.get(f"{second.url}/v1/indexes").json()["data"][0]["count"] == 7
    assert second.end() == 0


def metric(url, name):
    text = httpx.get(f"{url}/metrics").text
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


def test_a_second_signal_ends_it_at_once(folder):
    server = Running(folder, "--drain-delay-s", "60")
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.process.poll() is None
    assert server.end() == 0


def test_a_port_that_is_taken_is_named(running):
    port = running.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "openembed", "serve", NANO, "--port", port], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
