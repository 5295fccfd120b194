"""Which texts are encoded next: rows of many requests, mixed into micro-batches under a token budget.

A row (one text) is the unit, so a request of 2,000 texts is spread over many micro-batches and others run between. Requests
fall into classes by the tokens they have left: up to 1/16 of the budget, 8 times that, 64 times, and so on. Shorter classes go
first; inside a class it is first come, first served, which keeps the slowest answers close to the middle ones. Each
micro-batch is filled in three steps:

1. up to half the budget: requests in that order;
2. the oldest request of all: at least one row, and rows up to a quarter of the budget;
3. what is still free: requests in that order again.

Two guarantees follow, whatever else waits. *Short never waits behind long*: a request is handed out whole in the very next
micro-batch when it, and those of its class or a shorter one that came before it, fit in half the budget; requests of longer
classes cannot delay it. *Nobody starves*: every micro-batch holds a row of the oldest request. A micro-batch has at most
``budget`` tokens, or half the budget and one row where a row is longer than the other half.

Pure bookkeeping: no thread, no clock, no model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

SHORTEST = 16
"""The first class is up to this part of the budget."""

STEP = 8
"""How many times longer each class is than the one before."""

OLDEST = 4
"""The oldest request may have this part of every micro-batch, even after many shorter ones."""


class Job(Generic[T]):
    """The rows of one request that are not handed out yet. ``owner`` is whatever the caller wants back with them."""

    __slots__ = ("_lengths", "_rows", "owner", "tokens")

    def __init__(self, lengths: Sequence[int], owner: T) -> None:
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        self._rows = order
        self._lengths = [lengths[row] for row in order]  # ascending, so that the longest is taken from the end
        self.tokens = sum(self._lengths)
        self.owner = owner

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row left."""
        return self._lengths[-1]

    def take(self, room: int) -> tuple[list[int], int]:
        """Removes and returns rows, longest fitting first, while they fit in ``room`` tokens; and their tokens."""
        taken: list[int] = []
        left = room
        while self._rows:
            place = bisect_left(self._lengths, left + 1) - 1
            if place < 0:
                break
            left -= self._lengths.pop(place)
            taken.append(self._rows.pop(place))
        self.tokens -= room - left
        return taken, room - left


class Scheduler(Generic[T]):
    """Jobs in order of arrival, handed out as micro-batches."""

    def __init__(self, budget: int) -> None:
        if budget < 1:
            raise ValueError(f"token budget must be at least 1, got {budget}")
        self.budget = budget
        self.tokens = 0
        self.rows = 0
        self._jobs: dict[int, Job[T]] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, lengths: Sequence[int], owner: T) -> int:
        """Queues rows of ``lengths`` tokens; returns the number by which the request can be taken back."""
        job = Job(lengths, owner)
        self._arrivals += 1
        if len(job):
            self._jobs[self._arrivals] = job
            self.tokens += job.tokens
            self.rows += len(job)
        return self._arrivals

    def remove(self, number: int) -> None:
        """Forgets the rows of a request that are still queued, if there are any."""
        job = self._jobs.pop(number, None)
        if job is not None:
            self.tokens -= job.tokens
            self.rows -= len(job)

    def next_batch(self) -> list[tuple[T, list[int]]]:
        """Hands out the next micro-batch as (owner, rows); empty when nothing is queued."""
        if not self._jobs:
            return []
        batch: dict[int, list[int]] = {}
        oldest = next(iter(self._jobs))
        ordered = sorted(self._jobs, key=self._class)  # stable: inside a class by arrival
        used = self._fill(batch, ordered, self.budget // 2, 0)
        job = self._jobs[oldest]
        if len(job):
            share = min(self.budget, used + self.budget // OLDEST)
            used = self._fill(batch, [oldest], max(share, used + job.longest), used)
        used = self._fill(batch, ordered, self.budget, used)
        handed = [(self._jobs[number].owner, rows) for number, rows in batch.items()]
        for number in batch:
            if not len(self._jobs[number]):
                del self._jobs[number]
        self.tokens -= used
        self.rows -= sum(map(len, batch.values()))
        return handed

    def _class(self, number: int) -> int:
        """The class of a request, from 0: the shortest."""
        limit, found = max(1, self.budget // SHORTEST), 0
        while self._jobs[number].tokens > limit:
            limit, found = limit * STEP, found + 1
        return found

    def _fill(self, batch: dict[int, list[int]], numbers: Sequence[int], limit: int, used: int) -> int:
        """Adds rows of jobs in their order while they fit under ``limit``; returns the tokens used then."""
        for number in numbers:
            if used >= limit:
                break
            rows, tokens = self._jobs[number].take(limit - used)
            if rows:
                batch.setdefault(number, []).extend(rows)
                used += tokens
        return used
