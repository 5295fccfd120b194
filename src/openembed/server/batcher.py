"""The threads that run the model: rows in, representations out, one micro-batch after another.

There is no window in which requests are collected: a free thread takes what is there. Everything that arrives while a
micro-batch runs is in the next one. Where the model encodes queries and documents differently, a micro-batch that holds both is
two forward passes.

Shapes: ``B`` texts of a micro-batch, ``R`` rows of their representations (one a text, or one a token vector), ``D`` width.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from openembed.encoded import Gathered, gathered
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
    """The rows of one request and what was made of them so far. ``done`` is called once, in a model thread."""

    __slots__ = ("done", "left", "made", "normalize", "number", "rows")

    def __init__(self, rows: TokenRows, made: Gathered, normalize: bool, done: Callable[[Any], None]) -> None:
        self.rows, self.made, self.normalize, self.done = rows, made, normalize, done
        self.left = len(rows)
        self.number = 0


Handed = list[tuple[Work, list[int]]]


class Made(NamedTuple):
    """What a micro-batch gave, in the order in which its texts were handed out: rows of the model, as they are and of length 1
    (``unit``: dense vectors alone), whether each is finite, where each text's rows end, and the number of tokens."""

    raw_RD: np.ndarray
    unit_RD: np.ndarray | None
    finite_R: np.ndarray
    ends_B: list[int]
    tokens: int


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
        """Queues rows; ``done`` gets the representations, or the exception that kept them from being made.

        ``normalize``: dense vectors are given length 1.
        """
        encoder = self.encoder
        work = Work(rows, gathered(encoder.kind, encoder.rows_of(rows), encoder.width), normalize, done)
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
        outcome = _outcome(lambda: self._made(handed))
        seconds = time.perf_counter() - start
        if isinstance(outcome, Exception):
            logger.error("%s: a micro-batch failed", self.name, exc_info=outcome)
            self._failed += 1
            self._metrics.failures.labels(self.name).inc()
            self._fail([work for work, _ in handed], outcome)
            return
        self._failed = 0
        self._count(outcome.tokens, len(outcome.ends_B), seconds)
        last, first = 0, 0
        for work, rows in handed:
            last += len(rows)
            part = slice(first, outcome.ends_B[last - 1])
            first = part.stop
            if not outcome.finite_R[part].all():
                self._fail([work], ValueError("a vector is not finite"))
                continue
            unit = work.normalize and outcome.unit_RD is not None
            values_RD = (outcome.unit_RD if unit else outcome.raw_RD)[part]
            failed = _outcome(partial(work.made.put, np.array(rows), values_RD))
            if failed is not None:
                logger.error("%s: what a micro-batch gave could not be kept", self.name, exc_info=failed)
                self._fail([work], failed)
                continue
            with self._changed:
                work.left -= len(rows)
                done = work.left == 0
            if done:
                work.done(_outcome(work.made.result))

    def _made(self, handed: Handed) -> Made:
        ids = [work.rows.ids[row] for work, rows in handed for row in rows]
        starts = np.concatenate([work.rows.pool_starts[rows] for work, rows in handed])
        together = TokenRows(ids, starts, *(_sides(handed) if self.encoder.sided else ()))
        lengths, counts = together.lengths, self.encoder.rows_of(together)
        order = np.argsort(-lengths, kind="stable")  # equal lengths side by side: attention computes them in one call
        if together.queries is not None:
            order = order[np.argsort(together.queries[order], kind="stable")]
        raw_RD = self._forward(together, order)
        unit_RD = F.normalize(raw_RD, dim=-1) if self.encoder.kind == "dense" else None
        back_R = np.argsort(np.repeat(order, counts[order]), kind="stable")
        raw, unit = (None if rows is None else rows.cpu().numpy()[back_R] for rows in (raw_RD, unit_RD))
        return Made(raw, unit, np.isfinite(raw).all(axis=1), np.cumsum(counts).tolist(), int(lengths.sum()))

    def _forward(self, rows: TokenRows, order: np.ndarray) -> torch.Tensor:
        """One forward pass for each side; where the GPU has no room for it, two of half the texts."""
        if rows.queries is not None and rows.queries[order[0]] != rows.queries[order[-1]]:
            split = int(np.count_nonzero(~rows.queries[order]))
            return torch.cat([self._forward(rows, order[:split]), self._forward(rows, order[split:])])
        try:
            return self._aligned(rows.select(order))
        except torch.OutOfMemoryError:
            if len(order) == 1:
                raise
        logger.warning("%s: no room for a micro-batch of %d texts; it is run in halves", self.name, len(order))
        torch.cuda.empty_cache()
        half = len(order) // 2
        return torch.cat([self._forward(rows, order[:half]), self._forward(rows, order[half:])])

    def _aligned(self, rows: TokenRows) -> torch.Tensor:
        """What the model makes of ``rows``, run perhaps with one more text that fills the micro-batch up (no text sees
        another)."""
        tokens, device = int(rows.lengths.sum()), self.encoder.device
        missing = -tokens % (ALIGNED if tokens > 4 * ALIGNED else 8)
        if device.type != "cpu" or not missing:
            return self.encoder(pack(rows, device=device))
        filler = np.full(missing, rows.ids[0][0], dtype=np.int32)
        queries = None if rows.queries is None else np.append(rows.queries, rows.queries[0])
        unattended = None if rows.unattended is None else np.append(rows.unattended, 0)
        filled = TokenRows([*rows.ids, filler], np.append(rows.pool_starts, 0), queries, unattended)
        return self.encoder(pack(filled, device=device))[: int(self.encoder.rows_of(rows).sum())]

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


def _sides(handed: Handed) -> tuple[np.ndarray, np.ndarray]:
    """Which texts of a micro-batch are queries, and how many tokens at the end of each none attends to."""
    queries = [work.rows.queries[rows] for work, rows in handed]
    unattended = [
        np.zeros(len(rows), dtype=np.int64) if work.rows.unattended is None else work.rows.unattended[rows]
        for work, rows in handed
    ]
    return np.concatenate(queries), np.concatenate(unattended)


def _outcome(function: Callable[[], Any]) -> Any:
    """The result of ``function``, or its exception: a model thread outlives every request."""
    try:
        return function()
    except Exception as error:
        return error
