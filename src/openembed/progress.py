"""How far long work is, with rate and time left: a bar where standard error is a terminal, elsewhere few lines in the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds between two lines of the log."""


@contextmanager
def progress(description: str, total: int | None, unit: str = "", *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(n)``; while the block runs a bar shows done/total, rate a second and time left.

    ``total`` of None shows a counter. Where standard error is no terminal, a line at the start says what is done to how many
    (where that is known), and one a minute how far it is: logged at INFO, which the command line writes to standard error.
    Nothing is said when ``show`` is false.
    """
    if not show:
        yield lambda _n: None
    elif sys.stderr.isatty():
        with _bar(description, total, unit) as advance:
            yield advance
    else:
        yield _Lines(description, total, unit)


class _Lines:
    """Logs the start, and every ``EVERY`` seconds how far it is."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, 0
        self.start = self.told = time.monotonic()
        if total is not None:
            logger.info("%s: %s", description, f"{total:,} {unit}".rstrip())

    def __call__(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told < EVERY:
            return
        self.told, rate = now, self.done / (now - self.start)
        of = "" if self.total is None else f" of {self.total:,}"
        left = f", {_duration((self.total - self.done) / rate)} left" if self.total is not None and rate else ""
        logger.info("%s: %s", self.description, f"{self.done:,}{of} {self.unit}".rstrip() + f", {rate:,.1f}/s{left}")


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def _bar(description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            current = bar.tasks[task]
            seconds = current.elapsed or 0.0
            if seconds > 0:
                bar.update(task, rate=f"{current.completed / seconds:,.1f} {unit}/s".replace(" /s", "/s"))

        yield advance
