"""What flows through a search: the queries, and the ranking reached so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from openembed.records import Query, Run


@dataclass(frozen=True)
class Search:
    """Queries and the run so far; a step returns a new one."""

    queries: tuple[Query, ...]
    run: Run = field(default_factory=dict)


Step = Callable[[Search], Search]
"""Search → Search. Every run a step returns is ordered best first: score, then document id, both descending."""
