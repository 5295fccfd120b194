"""Malformed requests, as many kinds as anyone sends: a pure function of a seed."""

import json
import random

PATHS = [
    ("POST", "/v1/embeddings"),
    ("POST", "/embed"),
    ("POST", "/embed_sparse"),
    ("POST", "/v1/multi-vector"),
    ("POST", "/pooling"),
    ("POST", "/v1/rerank"),
    ("POST", "/rerank"),
    ("POST", "/v1/search"),
    ("POST", "/v1/contributions"),
    ("POST", "/v1/documents"),
    ("DELETE", "/v1/documents"),
]
GOOD = {
    "/v1/embeddings": {"input": ["a cat", "b"], "model": None, "encoding_format": "float", "dimensions": 8, "truncate": True},
    "/embed": {"inputs": "a cat", "normalize": True},
    "/embed_sparse": {"inputs": ["a cat"], "input_type": "query"},
    "/v1/multi-vector": {"input": ["a cat"], "embedding_type": "float", "dimensions": 16},
    "/pooling": {"input": ["a cat"], "task": "token_embed", "encoding_format": "base64"},
    "/v1/rerank": {"query": "cat", "documents": ["a", {"text": "b"}], "top_n": 1},
    "/rerank": {"query": "cat", "texts": ["a", "b"], "return_text": True},
    "/v1/search": {
        "query": "cat",
        "k": 3,
        "mode": "hybrid",
        "index": None,
        "explain": False,
        "method": {"kind": "xtr", "tokens": 5},
    },
    "/v1/contributions": {"text": "a cat", "index": None},
    "/v1/documents": {"documents": [{"id": "x", "text": "a", "metadata": {"a": 1}}], "ids": ["x"]},
}
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**40, -(10**40), 0.5, 1e308, -0.0, "", "a", "\x00", "\u202e", "🙂" * 50,
    "a" * 5000, " " * 4000, "../../etc/passwd", "/etc/passwd", "{{7*7}}", "%s%n", "'; DROP TABLE", "<script>",
    "\ufeff", "\uffff",
    [], {}, [[]], [None], [[], []], [1, "a"], ["a", 1], [1.5], [[1], "a"], [-5], [10**9], [[10**9]], [True], {"a": {"b": []}},
    ["a"] * 200, [[1] * 300], [0] * 3000, {"text": "a"}, [{"text": 1}], [{"id": "", "text": "a"}],
    [{"text": "a", "metadata": 5}],
]  # fmt: skip
ODD_PATHS = [
    "/v1/documents/../../etc/passwd", "/v1/documents/%00", "/v1/models/%2e%2e", "//", "/v1//embeddings", "/v1/documents/",
    "/v1/models/", "/v1/models/" + "a" * 2000, "/" + "é" * 20, "/docs/", "/page/index.html", "/v1/documents/cat",
]  # fmt: skip
KINDS = ["application/json", "application/json; charset=utf-16", "text/plain", "", "application/x-www-form-urlencoded",
         "multipart/form-data; boundary=x", "application/json" * 50, "application/xml",
         "*/*", "application/vnd.api+json"]  # fmt: skip
HEADERS = [
    ("content-encoding", "gzip"), ("authorization", "Bearer \x01"), ("authorization", "Basic " + "a" * 900), ("expect", "x"),
    ("host", ""), ("host", "[::1"), ("x-forwarded-for", "a" * 3000), ("content-length", "abc"), ("content-length", "-1"),
    ("content-length", "9" * 30), ("transfer-encoding", "chunked, chunked"), ("range", "bytes=0-"), ("accept", "text/html"),
    ("origin", "null"), ("cookie", "a=" + "b" * 2000), ("content-type", "a\xff"), ("connection", "upgrade"), ("te", "trailers"),
]  # fmt: skip
JSON_PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"NaN", b"Infinity", b"-", b"1e999", b"\\ud800", b"\\u0000",
               b"\xff\xfe", b"\xed\xa0\x80", b"//", b"'", b"\x00", b" ", b'"input"', b'"a":', b"0x10",
               b"\xef\xbb\xbf"]  # fmt: skip


def _nested(clock):
    depth = clock.choice([10, 30, 100, 900, 1100, 5000])
    opening, closing = clock.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return opening * depth + (b"1" if opening != b"[" else b"") + closing * clock.choice([depth, depth - 1])


def _changed(clock, path):
    """A good body with keys missing, added, doubled or of another type."""
    body = dict(GOOD[path])
    for _ in range(clock.randint(1, 3)):
        act = clock.random()
        if act < 0.6:
            body[clock.choice(list(body) or ["a"])] = clock.choice(VALUES)
        elif act < 0.75 and body:
            body.pop(clock.choice(list(body)))
        else:
            body[clock.choice(["filter", "task", "instruction", "input_type", "model", "nonsense", "k", "upsert", "user"])] = (
                clock.choice(VALUES)
            )
    return json.dumps(body, ensure_ascii=clock.random() < 0.5).encode("utf-8", "surrogatepass")


def body_of(clock, path):
    """The bytes of one body."""
    kind = clock.random()
    if kind < 0.5:
        return _changed(clock, path)
    good = _changed(clock, path) if kind < 0.6 else json.dumps(GOOD[path]).encode()
    if kind < 0.65:
        return good[: clock.randrange(len(good))]
    if kind < 0.75:
        damaged = bytearray(good)
        for _ in range(clock.randint(1, 6)):
            damaged[clock.randrange(len(damaged))] = clock.randrange(256)
        return bytes(damaged)
    if kind < 0.8:
        return clock.randbytes(clock.choice([0, 1, 10, 1000, 20_000]))
    if kind < 0.88:
        return b"".join(clock.choice(JSON_PIECES) for _ in range(clock.randint(1, 40)))
    if kind < 0.93:
        key = next(iter(GOOD[path])).encode()
        return b'{"' + key + b'": ' + _nested(clock) + b"}"
    if kind < 0.96:
        return b'{"input": [' + b",".join([b"1"] * clock.choice([1000, 30_000])) + b"]}"
    if kind < 0.98:
        return b"{" + b",".join(b'"%d": %d' % (i, i) for i in range(2000)) + b"}"
    return json.dumps({next(iter(GOOD[path])): "\ud83d lone"}).encode()


def request_of(seed):
    """(method, path, query, headers, parts of the body) of one malformed request."""
    clock = random.Random(seed)
    method, path = clock.choice(PATHS)
    body = body_of(clock, path)
    query = ""
    if clock.random() < 0.1:
        method = clock.choice(["GET", "PUT", "PATCH", "OPTIONS", "HEAD", "TRACE", "FOO"])
    if clock.random() < 0.1:
        path = clock.choice(ODD_PATHS)
        method = clock.choice(["GET", "POST", "DELETE"])
        query = clock.choice(["", "index=nonsense", "index=%ff", "index=&index=x", "a" * 2000])
    headers = [("content-type", "application/json" if clock.random() < 0.85 else clock.choice(KINDS))]
    if clock.random() < 0.15:
        headers.append(clock.choice(HEADERS))
    cuts = sorted(clock.randrange(len(body) + 1) for _ in range(clock.choice([0, 0, 1, 5])))
    parts = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    return method, path, query, headers, parts
