"""``serve``: models and indexes over HTTP."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from openembed.server.catalog import Catalog
    from openembed.server.engine import Engine
    from openembed.server.settings import Settings

NEEDED = ("fastapi", "uvicorn", "httptools", "orjson", "prometheus_client")
KEYS_VARIABLE = "OPENEMBED_API_KEYS"
LOOPBACK = {"127.0.0.1": ("127.0.0.1", "localhost"), "localhost": ("127.0.0.1", "localhost"), "::1": ("[::1]", "localhost")}


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(serve)


def serve(
    targets: Annotated[
        list[str], typer.Argument(metavar="MODEL|INDEX...", help="Models and indexes, each perhaps as NAME=PATH.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 8000,
    reranker: Annotated[str | None, typer.Option(help="Cross-encoder folder or hub id for /rerank.")] = None,
    name: Annotated[list[str] | None, typer.Option("--name", help="Another name of the first model, for clients.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: the best there is).")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ..., or int8 on a CPU (default: the best, exact).")
    ] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="Tokens a micro-batch (default: the device's).")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads that run a model; more than 1 may help on many cores.")] = 1,
    writable: Annotated[bool, typer.Option("--writable", help="Let clients add and delete documents.")] = False,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"API keys, one a line (or the variable {KEYS_VARIABLE}, with commas).")
    ] = None,
    cors_origin: Annotated[list[str] | None, typer.Option(help="A web page's origin that may call this server.")] = None,
    allowed_host: Annotated[list[str] | None, typer.Option(help="A host name to answer to; * for any.")] = None,
    limit: Annotated[list[str] | None, typer.Option(help="KEY=VALUE, for example request_s=30; see docs/serving.md.")] = None,
    drain_s: Annotated[float, typer.Option(min=0, help="Seconds that accepted requests get when stopping.")] = 60.0,
    drain_delay_s: Annotated[float, typer.Option(min=0, help="Seconds to stay reachable, and say so, when stopping.")] = 0.0,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Serve the search page at /.")] = True,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
) -> None:
    """Serve models and indexes over HTTP: embeddings, reranking, search, and a search page."""
    _require_installed()
    from openembed.config import parse
    from openembed.server.app import create_app
    from openembed.server.metrics import Metrics
    from openembed.server.run import bind, run
    from openembed.server.settings import Limits, Settings

    values = {
        "limits": parse(Limits, _limits(limit or []), "--limit"),
        "api_keys": _api_keys(api_key_file),
        "origins": tuple(cors_origin or ()),
        "hosts": _hosts(host, allowed_host or []),
        "writable": writable,
        "page": page,
        "drain_s": drain_s,
        "drain_delay_s": drain_delay_s,
    }
    settings, metrics = parse(Settings, values, "options"), Metrics()
    bound = bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    catalog = _catalog(targets, settings.limits, metrics, device, dtype, reranker, name or [], token_budget, workers)
    address = f"http://{shown}:{bound.getsockname()[1]}"
    _say(f"serving at {address}   (API: {address}/docs)" + _reach(bound.getsockname()[0], settings))
    app, gate = create_app(catalog, settings, metrics)
    run(app, gate, bound, access_log=access_log)
    if gate.under_way == 0:
        catalog.close()
    _say("stopped")


def _reach(address: str, settings: Settings) -> str:
    """Returns who may ask a server that is bound to ``address``."""
    from ipaddress import ip_address

    if settings.api_keys:
        return ""
    if ip_address(address.partition("%")[0]).is_loopback:
        return ", reached from this machine alone"
    return ", open to all who reach it: --api-key-file asks for a key"


def _catalog(
    targets: list[str],
    limits: Any,
    metrics: Any,
    device: str | None,
    dtype: str | None,
    reranker: str | None,
    names: list[str],
    token_budget: int | None,
    workers: int,
) -> Catalog:
    """Loads and warms everything that is served, and says what it is."""
    import openembed
    from openembed.server.catalog import open_catalog
    from openembed.server.engine import Engine

    scorer = None
    if reranker is not None:
        import torch

        from openembed.rerankers.cross_encoder import load_cross_encoder

        scorer = load_cross_encoder(reranker, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def make_engine(encoder: Any, served_as: str) -> Engine:
        engine = Engine(encoder, served_as, limits, metrics, token_budget=token_budget, workers=workers)
        engine.warm()
        _say(_described(engine))
        return engine

    catalog = open_catalog(
        targets, lambda reference: openembed.load(reference, device, dtype), make_engine, reranker=scorer, aliases=names
    )
    for index in catalog.indexes.values():
        without = "".join(f"; without {kind}: {why}" for kind, why in index.missing.items())
        _say(f"index {index.name}: {len(index.store):,} documents, {', '.join(index.modes)}{without}")
    if catalog.reranker is not None:
        _say(f"reranker {catalog.reranker.name}")
    return catalog


def _described(engine: Engine) -> str:
    """A line about a model: size, device, precision, memory measured after a full micro-batch, speed."""
    import torch

    from openembed.server.metrics import resident_bytes

    encoder = engine.encoder
    weights = sum(p.numel() * p.element_size() for p in (*encoder.parameters(), *encoder.buffers()))
    on_gpu = encoder.device.type == "cuda"
    used = torch.cuda.max_memory_allocated(encoder.device) if on_gpu else resident_bytes()
    threads = "" if on_gpu else f" ({torch.get_num_threads()} threads)"
    precision = encoder.computed_in
    gives = {"dense": "{} dimensions", "sparse": "weights of {} terms", "tokens": "{} dimensions a token"}[engine.kind]
    return (
        f"model {engine.name}: {gives.format(encoder.width)}, at most {encoder.max_length} tokens, {encoder.device}{threads}, "
        f"{precision}; weights {_mb(weights)}, {_mb(used)} {'on the GPU' if on_gpu else 'resident'} after a full micro-batch; "
        f"{engine.batcher.rate:,.0f} tokens/s"
    )


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _limits(given: list[str]) -> dict[str, Any]:
    """Returns KEY=VALUE settings as a mapping; values are numbers."""
    values: dict[str, Any] = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--limit {item!r}: write KEY=VALUE, for example request_s=30")
        values[key.strip()] = value.strip()
    return values


def _api_keys(path: Path | None) -> tuple[str, ...]:
    """Returns the keys of a file and of the environment. They are never given on the command line, which others can read."""
    lines = os.environ.get(KEYS_VARIABLE, "").split(",")
    if path is not None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of API keys")
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = [line for line in found if line and not line.startswith("#")]
        if not found:
            raise ValueError(f"{path}: holds no API key; write one a line")
        lines += found
    return tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _hosts(host: str, allowed: list[str]) -> tuple[str, ...]:
    """Names to answer to: those given, else on this machine's own addresses only its own names (against DNS rebinding)."""
    if "*" in allowed:
        return ()
    return tuple(dict.fromkeys([*LOOPBACK.get(host, ()), *allowed])) if allowed or host in LOOPBACK else ()


def _require_installed() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'openembed[serve]'")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
