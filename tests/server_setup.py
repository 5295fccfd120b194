"""A served catalog of tiny models and indexes, in process and behind a socket."""

import asyncio
import threading
from contextlib import contextmanager

import uvicorn

from openembed.index.store import Store, describe_model
from openembed.records import Document
from openembed.server.app import create_app
from openembed.server.catalog import open_catalog
from openembed.server.engine import Engine
from openembed.server.metrics import Metrics
from openembed.server.run import BoundedProtocol, bind
from openembed.server.settings import Settings

DOCUMENTS = [
    Document("cat", "A cat sat on the mat and watched birds.", "Cats", {"year": 2020}),
    Document("dog", "Dogs bark at cats in the garden.", "Dogs", {"year": 2021}),
    Document("tea/green", "Green tea is steeped, never boiled.", "Tea", {}),
    Document("empty", "", "", {}),
]


def post(client, path, **body):
    """Returns the JSON answer to a request that must succeed."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def make_index(folder, encoder, documents=DOCUMENTS, **model):
    """A store of ``documents`` whose vectors ``encoder`` made."""
    info = describe_model("tiny", encoder, **model)
    vectors = encoder.encode_documents([d.full_text for d in documents], normalize=info.normalize)
    return Store.create(folder, documents, vectors, model=info)


def make_kinds(folder, encoders, documents=DOCUMENTS):
    """A store of ``documents`` with the vectors of several ``encoders``, by name."""
    store = Store.create(folder, model=[describe_model(name, encoder) for name, encoder in encoders.items()])
    store.add(documents, list(encoders.values()))
    return store


@contextmanager
def served(targets, encoder, settings=None, *, reranker=None, aliases=(), token_budget=256):
    """(app, gate, catalog) of ``targets``, where every model is ``encoder``, or the one of its name where that is a dict."""
    settings, metrics = settings or Settings(), Metrics()
    load = encoder.__getitem__ if isinstance(encoder, dict) else lambda _reference: encoder

    def make_engine(given, name):
        engine = Engine(given, name, settings.limits, metrics, token_budget=token_budget)
        engine.warm()
        return engine

    catalog = open_catalog(targets, load, make_engine, reranker=reranker, aliases=aliases)
    app, gate = create_app(catalog, settings, metrics)
    try:
        yield app, gate, catalog
    finally:
        catalog.close()


@contextmanager
def listening(app):
    """The address of ``app`` on a real socket."""
    bound = bind("127.0.0.1", 0)
    config = uvicorn.Config(app, http=BoundedProtocol, ws="none", lifespan="off", log_level="critical", server_header=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
    thread.start()
    while not server.started:
        pass
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
