"""The threads that run the model: rows in, vectors out, one micro-batch after another.

There is no window in which requests are collected: a free thread takes what is there. Everything that arrives while a
micro-batch runs is in the next one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from openembed.encoder import Encoder
from openembed.packing import TokenRows, pack
from openembed.server.metrics import Metrics
from openembed.server.scheduler import Scheduler

logger = logging.getLogger(__name__)

SMOOTHING = 0.2
"""Weight of the newest micro-batch in the measured rate."""

ALIGNED = 32
"""On a CPU a micro-batch is filled up to a multiple of so many tokens (8 for short ones): its matrix kernels are made anew for
each number of rows they meet and kept, some megabytes a number. So memory stays flat, and it is 6 % faster."""

FAILURES_BEFORE_UNHEALTHY = 3


class Work:
    """The rows of one request and the vectors made so far. ``done`` is called once, in a model thread."""

    __slots__ = ("done", "left", "normalize", "number", "rows", "values_ND")

    def __init__(self, rows: TokenRows, width: int, normalize: bool, done: Callable[[Any], None]) -> None:
        self.rows, self.normalize, self.done = rows, normalize, done
        self.left = len(rows)
        self.values_ND = np.empty((len(rows), width), dtype=np.float32)
        self.number = 0


Handed = list[tuple[Work, list[int]]]


class Batcher:
    """Queues work of any thread and runs it in ``workers`` threads of its own, which share the model."""

    def __init__(self, encoder: Encoder, name: str, budget: int, metrics: Metrics, workers: int = 1) -> None:
        self.encoder, self.name, self.budget = encoder, name, budget
        self._scheduler: Scheduler[Work] = Scheduler(budget)
        self._calls: deque[tuple[Callable[[], Any], Callable[[Any], None]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._failed = 0
        self._metrics = metrics
        self.rate = 0.0
        self._threads = [
            threading.Thread(target=self._serve, name=f"encoder {name} {number}", daemon=True) for number in range(workers)
        ]

    def start(self) -> None:
        """Starts the threads."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends the threads when everything queued is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return self._scheduler.tokens

    @property
    def texts(self) -> int:
        """Texts that wait."""
        return self._scheduler.rows

    @property
    def healthy(self) -> bool:
        """False when threads are gone or one micro-batch after another fails."""
        return self._failed < FAILURES_BEFORE_UNHEALTHY and all(thread.is_alive() for thread in self._threads)

    def submit(self, rows: TokenRows, *, normalize: bool, done: Callable[[Any], None]) -> Work:
        """Queues rows; ``done`` gets the vectors (N, width), or the exception that kept them from being made."""
        work = Work(rows, self.encoder.width, normalize, done)
        lengths = rows.lengths.tolist()
        with self._changed:
            work.number = self._scheduler.add(lengths, work)
            self._changed.notify()
        return work

    def call(self, function: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Runs ``function`` in a model thread before the next micro-batch; ``done`` gets its result or its exception."""
        with self._changed:
            self._calls.append((function, done))
            self._changed.notify()

    def cancel(self, work: Work) -> None:
        """Takes back what is still queued of a request; what runs is finished and forgotten."""
        with self._changed:
            self._scheduler.remove(work.number)

    def _serve(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._closed or self._calls or self._scheduler.rows):
                        self._changed.wait()
                    call = self._calls.popleft() if self._calls else None
                    handed = [] if call else self._scheduler.next_batch()
                    if self._scheduler.rows:
                        self._changed.notify()  # of a request of several micro-batches, which was one notice
                if call:
                    call[1](_outcome(call[0]))
                elif handed:
                    self._run(handed)
                else:
                    return

    def _run(self, handed: Handed) -> None:
        start = time.perf_counter()
        outcome = _outcome(lambda: self._vectors(handed))
        seconds = time.perf_counter() - start
        if isinstance(outcome, Exception):
            logger.error("%s: a micro-batch failed", self.name, exc_info=outcome)
            self._failed += 1
            self._metrics.failures.labels(self.name).inc()
            self._fail([work for work, _ in handed], outcome)
            return
        self._failed = 0
        raw_BD, unit_BD, finite_B, tokens = outcome
        self._count(tokens, len(finite_B), seconds)
        place = 0
        for work, rows in handed:
            part = slice(place, place + len(rows))
            place = part.stop
            if not finite_B[part].all():
                self._fail([work], ValueError("a vector is not finite"))
                continue
            work.values_ND[rows] = (unit_BD if work.normalize else raw_BD)[part]
            with self._changed:
                work.left -= len(rows)
                done = work.left == 0
            if done:
                work.done(work.values_ND)

    def _vectors(self, handed: Handed) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Vectors in the order of ``handed``: as they are, of length 1, whether finite; and the number of tokens."""
        ids = [work.rows.ids[row] for work, rows in handed for row in rows]
        starts = np.concatenate([work.rows.pool_starts[rows] for work, rows in handed])
        together = TokenRows(ids, starts)
        lengths = together.lengths
        order = np.argsort(-lengths, kind="stable")  # equal lengths side by side: attention computes them in one call
        raw_BD = self._forward(together, order)
        unit_BD = F.normalize(raw_BD, dim=-1)
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        raw, unit = raw_BD.cpu().numpy()[back], unit_BD.cpu().numpy()[back]
        return raw, unit, np.isfinite(raw).all(axis=1), int(lengths.sum())

    def _forward(self, rows: TokenRows, order: np.ndarray) -> torch.Tensor:
        """One forward pass; where the GPU has no room for it, two of half the texts."""
        try:
            return self._aligned(rows.select(order))[: len(order)]
        except torch.OutOfMemoryError:
            if len(order) == 1:
                raise
        logger.warning("%s: no room for a micro-batch of %d texts; it is run in halves", self.name, len(order))
        torch.cuda.empty_cache()
        half = len(order) // 2
        return torch.cat([self._forward(rows, order[:half]), self._forward(rows, order[half:])])

    def _aligned(self, rows: TokenRows) -> torch.Tensor:
        """The vectors of ``rows``, and perhaps of one more text that fills the micro-batch up (no text sees another)."""
        tokens, device = int(rows.lengths.sum()), self.encoder.device
        missing = -tokens % (ALIGNED if tokens > 4 * ALIGNED else 8)
        if device.type == "cpu" and missing:
            filler = np.full(missing, rows.ids[0][0], dtype=np.int32)
            rows = TokenRows([*rows.ids, filler], np.append(rows.pool_starts, 0))
        return self.encoder(pack(rows, device=device))

    def _fail(self, works: Sequence[Work], error: Exception) -> None:
        for work in works:
            with self._changed:
                self._scheduler.remove(work.number)
                first, work.left = work.left > 0, -1  # with several threads, another may have failed it already
            if first:
                work.done(error)

    def _count(self, tokens: int, texts: int, seconds: float) -> None:
        rate = tokens / max(seconds, 1e-9) * len(self._threads)
        self.rate = rate if self.rate == 0.0 else (1 - SMOOTHING) * self.rate + SMOOTHING * rate
        self._metrics.tokens.labels(self.name).inc(tokens)
        self._metrics.texts.labels(self.name).inc(texts)
        self._metrics.batches.labels(self.name).observe(seconds)
        self._metrics.fill.labels(self.name).observe(tokens / self.budget)


def _outcome(function: Callable[[], Any]) -> Any:
    """The result of ``function``, or its exception: a model thread outlives every request."""
    try:
        return function()
    except Exception as error:
        return error
