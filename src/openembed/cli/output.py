"""How commands speak: a table or text for people, one JSON object with ``--json`` for programs."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def print_json(value: Any) -> None:
    """Writes ``value`` to standard output as one JSON document."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def console() -> Any:
    """Returns a rich console on standard output (plain text when it is no terminal)."""
    from rich.console import Console

    return Console()
