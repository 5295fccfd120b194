"""Several processes as one trainer: who they are, how they talk, how they fail together.

A launcher (torchrun, ``accelerate launch``, srun + torchrun) starts the processes and sets ``RANK``, ``WORLD_SIZE``,
``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``. Rank 0 leads: it alone writes files and reports. Results of collective
calls here are equal on all ranks, so every rank takes the same decisions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

STEP_TIMEOUT = timedelta(minutes=30)
"""A collective of a training step that takes longer ends the run: another rank is gone or stuck."""
WAIT_TIMEOUT = timedelta(days=7)
"""How long ranks wait while rank 0 mines, evaluates or indexes. A rank whose process ends is noticed at once."""


class OtherRankError(ValueError):
    """Another rank failed; its own message, repeated here, says why."""


@dataclass(frozen=True)
class World:
    """This process among all; the default is a process on its own, for which every method is trivial.

    ``control``: the group for Python objects, on the CPU and with the long timeout. ``device``: what this rank computes on.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None
    control: Any = None

    @property
    def leads(self) -> bool:
        """True for rank 0, which alone writes files."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Returns every rank's ``value`` (any object that pickles), by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_leader(self, value: T) -> T:
        """Returns rank 0's ``value`` on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def agree(self, action: Callable[[], T], *, leader_first: bool = False) -> T:
        """Returns ``action()`` of this rank once it succeeded on all; when it fails on one, it fails on all.

        The rank that failed raises its own error, the others :class:`OtherRankError` with its message.
        ``leader_first`` lets rank 0 finish before the others begin, for actions that fill a shared cache.
        """
        if leader_first and self.size > 1:
            if self.leads:
                result, error = _attempt(action)
            self._raise_first(self.gather(_message(error) if self.leads else ""), error if self.leads else None)
            if not self.leads:
                result, error = _attempt(action)
        else:
            result, error = _attempt(action)
        self._raise_first(self.gather(_message(error)), error)
        return result

    def lead(self, action: Callable[[], T]) -> T:
        """Returns rank 0's ``action()`` on every rank (the result must pickle); the other ranks wait for it."""
        result, error = _attempt(action) if self.leads else (None, None)
        message, result = self.from_leader((_message(error), result if error is None else None))
        self._raise_first([message], error)
        return result

    def require_equal(self, what: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` on every rank, naming the key, when ``what`` is not the same on all ranks."""
        for rank, other in enumerate(self.gather(dict(what))):
            wrong = sorted(key for key in what.keys() | other.keys() if other.get(key) != what.get(key))
            if wrong:
                raise ValueError(
                    f"rank {rank} and rank {self.rank} differ in {', '.join(wrong)}; "
                    "start all ranks with the same recipe, data and model files"
                )

    def sum_(self, tensor: Tensor) -> Tensor:
        """Returns ``tensor`` overwritten with its sum over all ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def _raise_first(self, messages: list[str], own: BaseException | None) -> None:
        if own is not None:
            raise own
        for rank, message in enumerate(messages):
            if message:
                raise OtherRankError(f"rank {rank} failed: {message}")


ALONE = World()
"""A process on its own."""


def launched() -> bool:
    """True when a launcher started this process as one of several; loads no process group."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined(device: str | None = None) -> Iterator[World]:
    """Joins the other processes of a launcher while the block runs; yields :data:`ALONE` where there is none.

    ``device``: ``cpu`` or ``cuda`` (default: a GPU where there is one); each rank takes the GPU of its ``LOCAL_RANK``.
    Raises ``ValueError`` for a launch without its variables or with more ranks on a node than GPUs.
    """
    if not launched():
        yield World(device=device)
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start the ranks with torchrun")
    place = _rank_device(device, int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=STEP_TIMEOUT)
    try:
        control = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        yield World(dist.get_rank(), dist.get_world_size(), str(place), control)
    finally:
        dist.destroy_process_group()


def _rank_device(device: str | None, local_rank: int) -> torch.device:
    from openembed.checkpoints import known_device

    kind = known_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if kind.type != "cuda":
        return kind
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; "
            "lower --nproc-per-node, or run on the CPU with --device cpu"
        )
    return torch.device("cuda", local_rank)


def lost_contact(error: BaseException) -> bool:
    """True for what a collective raises when another rank has ended; that rank's own message says why it did."""
    text = str(error).lower()
    return isinstance(error, (RuntimeError, ConnectionError)) and any(
        sign in text for sign in ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")
    )


def share(tokens: list[int], ranks: int) -> list[list[int]]:
    """Returns for each rank the micro-batches it runs, ascending; a pure function of its arguments.

    Micro-batches go to the least loaded rank, largest first: no rank has more than one micro-batch over the mean. Equal
    loads are broken towards fewer micro-batches, then the lower rank.
    """
    order = sorted(range(len(tokens)), key=lambda number: (-tokens[number], number))
    loads, shares = np.zeros(ranks, dtype=np.int64), [[] for _ in range(ranks)]
    for number in order:
        rank = min(range(ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].append(number)
        loads[rank] += tokens[number]
    return [sorted(numbers) for numbers in shares]


def balance(tokens: list[int], ranks: int) -> float:
    """Returns the mean over the largest number of tokens a rank runs: 1 when all ranks have equally much to do."""
    loads = [sum(tokens[number] for number in numbers) for numbers in share(tokens, ranks)]
    return sum(loads) / (ranks * max(loads)) if tokens else 1.0


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def _message(error: BaseException | None) -> str:
    return "" if error is None else f"{error or type(error).__name__}"
