"""Bulk encoding on a Ray cluster: the same files as on one machine, whatever workers are lost. Needs ``openembed[ray]``.

The driver divides the input into the chunks that one machine would encode, Ray Data has its actors encode them in any order,
and the driver alone writes each to its place in the arrays and then to the journal. Where texts have different numbers of
entries (sparse weights, token vectors), a chunk that comes before its turn waits on the driver's disk. A chunk that was encoded
twice, because a worker died before its result arrived, has the same bytes and is written once. A killed driver resumes from
its journal, with or without Ray. Nodes see the input file, and the model, at the same paths; the output is the driver's alone.
"""

from __future__ import annotations

import hashlib
import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from openembed.bulk import BulkConfig, encoded_chunk
from openembed.config import Config
from openembed.shards import Shard, divide

MISTAKE = re.compile(r"^\s*(?:ValueError|TypeError|FileNotFoundError): (.+?)\s*$", re.MULTILINE)
"""The line of a traceback that says what was raised."""

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Times that Ray may fail one after the other without a single chunk encoded in between."""

ROW_BYTES = 2**31 - 1
"""The most that Ray Data (pyarrow) carries in one value."""

BLOCKS = 10_000
"""Ray Data keeps track of at most so many blocks; beyond, a block has several chunks."""


class RayConfig(Config):
    """Where, and what a worker takes. ``address``: ``auto`` (the cluster this machine is in), ``local`` or ``HOST:PORT``.

    ``workers`` (None: as many as fit) each hold the model, with ``gpus`` (None: 1 where the cluster has any) and ``cpus``
    (None: beside a GPU 1, else all of the smallest node: one worker a node).
    """

    address: str = "auto"
    workers: int | None = Field(None, ge=1)
    cpus: float | None = Field(None, gt=0)
    gpus: float | None = Field(None, ge=0)


class RayEncoder:
    """An encoder on the nodes of a Ray cluster; ``make`` is called there and returns it.

    What bulk encoding and mining ask of an encoder beside encoding (fingerprint, width, prompts) is asked once, there: the
    driver loads no weights. Raises ``ValueError`` when Ray is not installed, no cluster answers or the model cannot be
    opened there.
    """

    def __init__(self, make: Callable[[], Any], config: RayConfig | None = None) -> None:
        self._make, self._ray, given = make, _require_ray(), config or RayConfig()
        _connect(self._ray, given.address)
        self._config = _settled(given, self._ray.nodes())
        describe = self._ray.remote(_describe).options(num_cpus=self._config.cpus, num_gpus=self._config.gpus)
        try:
            self._adopt(self._ray.get(describe.remote(make)))
        except self._ray.exceptions.RayError as error:
            raise ValueError(f"the model cannot be opened on the cluster: {_said(error)}") from None

    def _adopt(self, described: dict[str, Any]) -> None:
        self.fingerprint, self.width, self.kind = (described[name] for name in ("fingerprint", "width", "kind"))
        self.computed_in, self.device, self.config = described["computed_in"], described["device"], described["config"]

    def query_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of queries."""
        from openembed.encoder import Encoder

        return Encoder.query_prompt(self, task, instruction)

    def document_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of documents."""
        from openembed.encoder import Encoder

        return Encoder.document_prompt(self, task, instruction)

    def _task(self, task: str) -> Any:
        from openembed.encoder import Encoder

        return Encoder._task(self, task)

    def wrap(self, wrapper: Callable[[Any], Any]) -> RayEncoder:
        """Returns the encoder that ``wrapper`` makes of this one on the nodes, with its prompts."""
        other, make = object.__new__(RayEncoder), self._make
        other.__dict__.update(self.__dict__)
        other._make = lambda: wrapper(make())
        local = wrapper(self)
        other.query_prompt, other.document_prompt = local.query_prompt, local.document_prompt
        return other

    def encode_chunks(self, path: Path, numbers: Sequence[int], config: BulkConfig) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Yields (number, arrays) of each chunk once, as they come; chunks lost with a worker are encoded again.

        Raises ``ValueError`` for what the encoder refuses, and when Ray fails ``ATTEMPTS`` times without a chunk in between.
        """
        rest, failures, path = set(numbers), 0, Path(path).resolve()
        while rest:
            try:
                for number, arrays in self._pass(path, rest, config):
                    if number in rest:
                        rest.remove(number)
                        failures = 0
                        yield number, arrays
                failures += bool(rest)  # Ray ended well without some of them
            except self._ray.exceptions.RayError as error:
                _raise_mistake(error)
                failures += 1
                logger.warning("Ray failed with %d chunks to go (%s); going on with those", len(rest), _said(error))
            if rest and failures >= ATTEMPTS:
                raise ValueError(f"Ray failed {failures} times in a row with {len(rest)} chunks to go; run again to resume")

    def _pass(self, path: Path, rest: set[int], config: BulkConfig) -> Iterator[tuple[int, list[np.ndarray]]]:
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = [{"shard": shard.model_dump_json()} for shard in divide(path, config.chunk, rest)]
        workers = min(self._config.workers, len(rows))
        encoded = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map_batches(
            _Worker,
            fn_constructor_args=(self._make, self.fingerprint, str(path), config),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=self._config.cpus,
            num_gpus=self._config.gpus,
        )
        for row in encoded.iter_rows():
            yield int(row["number"]), _unpacked(row)


class _Worker:
    """An actor: the model, and chunks through it."""

    def __init__(self, make: Callable[[], Any], fingerprint: str, path: str, config: BulkConfig) -> None:
        self._encoder, self._path, self._config = make(), Path(path), config
        if self._encoder.fingerprint != fingerprint:
            raise ValueError("this node's copy of the model is another than the first node's; give all nodes the same")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        (text,) = batch["shard"]
        shard = Shard.model_validate_json(text)
        arrays = encoded_chunk(self._encoder, self._config, shard.read(self._path))
        size = sum(array.nbytes for array in arrays)
        if size > ROW_BYTES:
            much = f"{shard.count} texts give {size / 1e9:.1f} GB, Ray carries 2.1 at once"
            raise ValueError(f"{much}; run again with a smaller --chunk and --restart")
        data = b"".join(array.tobytes() for array in arrays)
        return {
            "number": [shard.number],
            "data": [data],
            "dtypes": [[array.dtype.str for array in arrays]],
            "shapes": [[list(array.shape) for array in arrays]],
            "sha256": [hashlib.sha256(data).hexdigest()],
        }


def _unpacked(row: dict[str, Any]) -> list[np.ndarray]:
    data, offset, arrays = row["data"], 0, []
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise ValueError(f"chunk {row['number']}: damaged on its way from a worker; run again to resume")
    for dtype, shape in zip(row["dtypes"], row["shapes"], strict=True):
        shape, kind = tuple(int(length) for length in shape), np.dtype(str(dtype))
        arrays.append(np.frombuffer(data, dtype=kind, count=int(np.prod(shape)), offset=offset).reshape(shape))
        offset += arrays[-1].nbytes
    return arrays


def _describe(make: Callable[[], Any]) -> dict[str, Any]:
    encoder = make()
    described = {name: getattr(encoder, name) for name in ("fingerprint", "width", "config")}
    described["kind"] = getattr(encoder, "kind", "dense")
    return {**described, "computed_in": encoder.computed_in, "device": str(encoder.device)}


def _require_ray() -> Any:
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError:
        raise ValueError("ray is not installed; --ray needs: pip install 'openembed[ray]' on every node") from None
    return ray


def _connect(ray: Any, address: str) -> None:
    if ray.is_initialized():
        return
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon and port.isdigit():
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        help_ = "start one (`ray start --head`, `ray start --address HOST:6379`) or use --ray local"
        raise ValueError(f"no Ray cluster at {address!r} ({' '.join(str(error).split())[:200]}); {help_}") from None


def _settled(config: RayConfig, nodes: list[dict[str, Any]]) -> RayConfig:
    """The configuration with nothing left open, for a cluster of these nodes."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = [node.get("CPU", 0.0) for node in resources]
    gpus = sum(node.get("GPU", 0.0) for node in resources)
    a_gpu = (1.0 if gpus else 0.0) if config.gpus is None else config.gpus
    a_cpu = (1.0 if a_gpu else min((c for c in cpus if c), default=1.0)) if config.cpus is None else config.cpus
    fitting = sum(
        int(min(c // a_cpu, node.get("GPU", 0.0) // a_gpu if a_gpu else c)) for c, node in zip(cpus, resources, strict=True)
    )
    if not fitting:
        raise ValueError(f"no node of the cluster has the {a_cpu:g} CPUs and {a_gpu:g} GPUs that a worker is to have")
    return RayConfig(address=config.address, workers=config.workers or fitting, cpus=a_cpu, gpus=a_gpu)


def _raise_mistake(error: Exception) -> None:
    """Raises what the encoder or the input is to blame for: doing it again would fail again. Ray hands it on as text alone."""
    found = MISTAKE.findall(str(error))
    if found:
        raise ValueError(found[-1]) from None


def _said(error: BaseException) -> str:
    """The last line of what was raised on a node."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
