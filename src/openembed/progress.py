"""Progress bars with rate and time left, on standard error; silent when that is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(description: str, total: int | None, unit: str = "", *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields ``advance(n)``; while the block runs a bar shows done/total, rate a second and time left.

    ``total`` of None shows a counter. Nothing is drawn when ``show`` is false or standard error is no terminal.
    """
    if not show or not sys.stderr.isatty():
        yield lambda _n: None
        return
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
