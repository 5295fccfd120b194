"""A stand-in for the search server: the page's own contract over a dozen documents, difficult ones among them."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from openembed.server.page import content_security_policy, html

ATTACK = "<img src=x onerror=\"window.attacked='yes'\"><script>window.attacked='yes'</script>"
SENTENCE = "Meltwater runs beneath the glacier and lowers the friction at its bed, so the ice slides faster in summer. "

DOCUMENTS = [
    {
        "id": "glacier-07",
        "title": "Why glaciers move faster in summer",
        "text": SENTENCE
        + "The effect fades once the water has cut itself channels, which drain the bed and press ice and rock together again.",
        "metadata": {"lang": "en", "year": 2011, "tag": ["ice", "hydrology"], "peer_reviewed": True},
    },
    {
        "id": "glacier-19",
        "title": "Surge-type glaciers of Svalbard",
        "text": "A surge-type glacier lies almost still for decades and then advances by kilometres within months. What sets "
        "it off is debated: water at the bed, warm ice, or a layer of soft sediment that yields all at once.",
        "metadata": {"lang": "en", "year": 1998, "tag": ["ice"], "place": {"country": "NO", "coordinates": [78.9, 18.0]}},
    },
    {
        "id": "calving-02",
        "title": "Calving fronts and the sea",
        "text": "Where ice meets the sea it breaks. Warm water undercuts the front, the cliff above loses its footing, and "
        "blocks the size of a house fall into the fjord.",
        "metadata": {"lang": "en", "year": 2019, "tag": ["ice", "ocean"]},
    },
    {
        "id": "plain-text-without-title",
        "title": "",
        "text": "A glacier is a body of dense ice that moves under its own weight.",
        "metadata": {},
    },
    {
        "id": "emoji-🧊",
        "title": "Field notes 🏔️🧊 from the glacier",
        "text": "👩🏽‍🔬🧊 Day three 🌨️: the glacier creaked all night 😴. "
        "We drilled twelve metres 🕳️ and the water came up warm.",
        "metadata": {"lang": "en", "year": 2023, "mood": "😴 tired"},
    },
    {
        "id": "rtl-ar",
        "title": "لماذا تتحرك الأنهار الجليدية",
        "text": "تتحرك الأنهار الجليدية (glacier) تحت وزنها، وتنزلق أسرع في الصيف عندما تصل المياه الذائبة إلى قاعها.",
        "metadata": {"lang": "ar", "year": 2015},
    },
    {
        "id": f'bad"><id {ATTACK}',
        "title": f"Glacier {ATTACK}",
        "text": f"A glacier text that carries markup: {ATTACK} and goes on after it.",
        "metadata": {"lang": "en", f"key {ATTACK}": f"value {ATTACK}", "list": [ATTACK]},
    },
    {
        "id": "long-01",
        "title": "The glacier handbook, all chapters in one document, with a title that is itself so long that it has to break "
        "over several lines on a phone and must not push anything aside",
        "text": SENTENCE * 400 + "The last words of a very long glacier text.",
        "metadata": {f"field_{n}": f"value {n} of a document with many fields" for n in range(14)},
    },
    {
        "id": "albedo-11",
        "title": "Albedo",
        "text": "Fresh snow throws back nine tenths of the light; old ice half of it; soot on a glacier almost nothing.",
        "metadata": {"lang": "en", "year": 2004, "tag": ["climate"]},
    },
    {
        "id": "rivers-03",
        "title": "Rivers fed by ice",
        "text": "A third of humankind drinks from rivers that begin at a glacier. In dry summers little else feeds them.",
        "metadata": {"lang": "en", "year": 2009, "tag": ["hydrology", "people"]},
    },
    {
        "id": "nolongwordbreaks-" + "x" * 120,
        "title": "Unbreakable",
        "text": "glacier" + "http://example.org/" + "path" * 60,
        "metadata": {"url": "http://example.org/" + "a" * 90},
    },
    {
        "id": "volcano-05",
        "title": "Volcanoes under ice",
        "text": "When a volcano erupts beneath a glacier the water it melts is held back, and then let go in a single flood.",
        "metadata": {"lang": "en", "year": 1996, "tag": ["ice", "fire"]},
    },
]

TWO = [
    {
        "name": "papers-nano",
        "count": 5183,
        "model": "openembed-nano",
        "models": {"dense": "openembed-nano"},
        "modes": ["dense", "bm25", "hybrid"],
        "language": "en",
        "contributions": True,
    },
    {
        "name": "papers-minilm",
        "count": 5183,
        "model": "all-MiniLM-L6-v2",
        "models": {"dense": "all-MiniLM-L6-v2"},
        "modes": ["dense", "bm25", "hybrid"],
        "language": "en",
        "contributions": False,
    },
]
WORDS_ONLY = [
    {"name": "words", "count": 1, "model": None, "models": {}, "modes": ["bm25"], "language": "en", "contributions": False}
]
ALL = [
    {
        **TWO[0],
        "name": "papers-all",
        "models": {"dense": "openembed-nano", "sparse": "splade", "tokens": "colbert"},
        "modes": ["dense", "sparse", "tokens", "bm25", "hybrid"],
    }
]


class PageServer:
    """Serves the page and its API on a free port; attributes say what the next answers are.

    ``delays``: query → seconds. ``errors``: query → (status, error object, headers). ``key``: wanted, or None.
    ``asked``: the (path, body) of every request to the API.
    """

    def __init__(self):
        self.reset()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        server.daemon_threads = True
        self._server = server
        self.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def reset(self, indexes=TWO):
        """Forgets everything asked and arranged, methods replaced by a test included."""
        for name in ("search", "contributions"):
            self.__dict__.pop(name, None)
        self.indexes, self.key = indexes, None
        self.delays, self.errors, self.asked = {}, {}, []

    def searches(self):
        """The bodies of the searches asked for."""
        return [body for path, body in self.asked if path == "/v1/search"]

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def search(self, body):
        index = body.get("index") or self.indexes[0]["name"]
        mode = body.get("mode") or "hybrid"
        hits = [(_score(document, body["query"], index, mode), document) for document in DOCUMENTS]
        hits = [(score, document) for score, document in hits if score > 0 and _passes(document, body.get("filter"))]
        hits.sort(key=lambda hit: -hit[0])
        took = {"encode": 0.0 if mode == "bm25" else 8.13, "search": 3.2, "total": 3.4 if mode == "bm25" else 11.6}
        model = next(entry["model"] for entry in self.indexes if entry["name"] == index)
        found = [_hit(rank, *hit, body["query"], mode) for rank, hit in enumerate(hits[: body["k"]], 1)]
        if body.get("explain"):
            parts = _met if mode == "tokens" else _terms
            found = [hit | {"terms": parts(body["query"], hit)} for hit in found]
        return {"query": body["query"], "index": index, "mode": mode, "model": model, "took_ms": took, "hits": found}

    def contributions(self, body):
        spans = [match.span() for match in re.finditer(r"\w+|[^\w\s]", body["text"])][:256]
        raw = [_noise(body["text"][low:high], 1) ** 3 - 0.04 for low, high in spans]
        tokens = [
            {"text": body["text"][low:high], "start": low, "end": high, "weight": value / sum(raw), "pooled": True}
            for (low, high), value in zip(spans, raw, strict=True)
        ]
        if body["input_type"] == "query":
            tokens.insert(0, {"text": "Query:", "start": None, "end": None, "weight": 0.0, "pooled": False})
        return {"tokens": tokens, "explained": "The share of each token in the length of the pooled vector."}


def _noise(text, salt):
    return int.from_bytes(hashlib.sha256(f"{salt} {text}".encode()).digest()[:4], "big") / 2**32


def _score(document, query, index, mode):
    text = f"{document['title']} {document['text']}".lower()
    words = re.findall(r"\w+", query.lower())
    share = sum(word in text for word in words) / max(1, len(words))
    if mode in ("bm25", "sparse"):
        return share * (4 + 9 * _noise(document["id"], "bm25"))
    if not share and not any(word in "ice water cold" for word in words):
        return 0
    shy = document["id"].startswith(("long", "bad", "nolong"))  # the difficult ones come last
    cosine = 0.35 + 0.25 * share + 0.3 * _noise(document["id"], index) - 0.3 * shy
    return {"dense": cosine, "tokens": 8 * cosine}.get(mode, cosine / 30)


def _met(query, hit):
    """What each word of the query meets, itself where the document has it; the query is filled up with four [MASK]."""
    full = f"{hit['title']} {hit['text']}".strip()
    spans = [match.span() for match in re.finditer(r"\S+", full)]
    words = [full[low:high].lower() for low, high in spans]
    names = [*re.findall(r"\w+", query.lower()), *["[MASK]"] * 4]
    whole = sum(1 / (number + 1.5) for number in range(len(names)))
    rows = []
    for number, name in enumerate(names):
        place = words.index(name) if name in words else len(name) % len(words)
        met, span = ("[CLS]", None) if number == len(names) - 1 else (full[slice(*spans[place])], spans[place])
        row = {"term": name, "met": met, "score": 1 / (number + 1.5), "share": 1 / (number + 1.5) / whole}
        rows.append(row | {"position": number, "met_position": place + 1 if span else 0, "met_span": span})
    return rows


def _terms(query, hit):
    """Terms of a score, as many as the query has words and a rest of small ones."""
    score = hit["score"]
    names = [*re.findall(r"\w+", query.lower()), "##s", *(f"related{n}" for n in range(30))]
    weights = [1 / (place + 1) for place in range(len(names))]
    shares = [weight / sum(weights) for weight in weights]
    return [
        {"term": name, "score": score * share, "share": share, "query": 1.0, "document": score * share}
        for name, share in zip(names, shares, strict=True)
    ]


def _passes(document, wanted):
    if not wanted:
        return True
    if "and" in wanted:
        return all(_passes(document, part) for part in wanted["and"])
    if "not" in wanted:
        return not _passes(document, wanted["not"])
    ((field, value),) = wanted.items()
    have = document["metadata"].get(field)
    if isinstance(value, dict) and "gte" in value:
        return have is not None and have >= value["gte"]
    return value in have if isinstance(have, list) else have == value


def _hit(rank, score, document, query, mode):
    words = [re.escape(word) for word in re.findall(r"\w+", query)]
    pattern = re.compile(rf"\b({'|'.join(words)})\b" if words else r"\Z.", re.I)
    marks = {name: [list(match.span()) for match in pattern.finditer(document[name])] for name in ("title", "text")}
    first = marks["text"][0][0] if marks["text"] else 0
    start = max(0, first - 90)
    snippet = [start, min(len(document["text"]), start + 200)]
    return {"rank": rank, "score": score, **document, "highlights": marks, "snippet": snippet}


class _Handler(BaseHTTPRequestHandler):
    fake: PageServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path.split("?")[0] == "/":
            headers = {"Content-Security-Policy": content_security_policy(), "Content-Type": "text/html; charset=utf-8"}
            return self._send(200, html().encode(), headers)
        if self.path == "/v1/indexes":
            return self._api(lambda _: {"data": self.fake.indexes}, None)
        return self._error(404, {"message": f"there is no {self.path}"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answers = {"/v1/search": self.fake.search, "/v1/contributions": self.fake.contributions}
        return self._api(answers[self.path], body)

    def _api(self, answer, body):
        self.fake.asked.append((self.path, body))
        if self.fake.key and self.headers.get("Authorization") != f"Bearer {self.fake.key}":
            return self._error(401, {"message": "no valid API key was given", "code": "invalid_api_key"})
        query = (body or {}).get("query")
        time.sleep(self.fake.delays.get(query, 0))
        if query in self.fake.errors:
            status, error, headers = self.fake.errors[query]
            return self._error(status, error, headers)
        return self._send(200, json.dumps(answer(body)).encode(), {"Content-Type": "application/json"})

    def _error(self, status, error, headers=()):
        self._send(status, json.dumps({"error": error}).encode(), {"Content-Type": "application/json", **dict(headers)})

    def _send(self, status, data, headers):
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
