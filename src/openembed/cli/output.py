"""How commands speak: a table or text for people, one JSON object with ``--json`` for programs."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

UNBROKEN = 100_000
"""Characters of a line where there is no terminal."""
NARROW, PADDING = 10, 3
"""Characters that a column that folds needs at least, and what is put around one that does not."""
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def print_json(value: Any) -> None:
    """Writes ``value`` to standard output as one JSON document."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def console() -> Any:
    """Returns a rich console on standard output: plain text in lines as long as they are when it is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=UNBROKEN)


def print_table(table: Any) -> None:
    """Prints a rich table with nothing cut: columns of names and numbers stay whole while there is room, the rest folds."""
    from rich.measure import Measurement

    out = console()
    left = out.width
    for number, column in enumerate(table.columns, 1):
        sizes = [Measurement.get(out, out.options, cell) for cell in (column.header, *column.cells)]
        widest = max(size.maximum for size in sizes)
        whole = widest == max(size.minimum for size in sizes) and widest + NARROW * (len(table.columns) - number) <= left
        column.no_wrap, column.overflow = whole, "fold"
        left -= widest + PADDING if whole else NARROW
    out.print(table)
