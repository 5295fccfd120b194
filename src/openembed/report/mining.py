"""The audit sheet of mining: what was kept and refused, why, and samples to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openembed.files import atomic_write
from openembed.report.charts import density_chart
from openembed.report.sections import Figure

Audit = Mapping[str, Any]
"""One source as mining's ``audit.json`` holds it."""

KINDS = (("positive", "positives"), ("kept", "kept negatives"), ("refused", "refused"))
REASONS = {
    "known_positive": "known positive",
    "equal_text": "same text as a positive or the query",
    "near_text": "nearly the text of a positive",
    "repeated_text": "second copy of a text",
    "excluded": "excluded by rule",
}


@dataclass(frozen=True)
class Sheet:
    """One source, ready to be shown."""

    name: str
    sentence: str
    figures: list[Figure]
    counts: list[tuple[str, str]]
    samples: Sequence[Mapping[str, Any]]


def sheet(audit: Audit, name: str = "") -> Sheet:
    """Returns the sheet of one source; ``name`` overrides the source's."""
    name = name or audit["source"] or "mined"
    figures = [_scores(audit), _survivors(audit)] if audit["queries"] else []
    return Sheet(name, _sentence(audit), figures, _counts(audit), audit["samples"])


def write_audit(audits: Sequence[Audit], path: str | Path, title: str = "Mined negatives") -> Path:
    """Writes the sheets of ``audits`` as one self-contained HTML page, atomically, and returns its path."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["svg"] = environment.filters["highlight"] = Markup
    page = environment.get_template("audit.html").render(title=title, mining=[sheet(a) for a in audits], alone=True)
    with atomic_write(path) as file:
        file.write(page)
    return Path(path)


def removed_share(audit: Audit) -> float:
    """Returns which part of the pool was refused by the ceiling, 0..1."""
    return audit["refused"] / max(audit["pool"], 1)


def _sentence(audit: Audit) -> str:
    queries = max(audit["queries"], 1)
    return (
        f"{audit['negatives']:,} negatives for {audit['queries']:,} queries ({audit['negatives'] / queries:.1f} each) by "
        f"{_short(audit['teacher'])}, policy: {audit['policy']}. The ceiling refused {removed_share(audit):.1%} of the pool; "
        f"{audit['short'] / queries:.1%} of the queries had fewer than {audit['keep']} survivors."
    )


def _short(teacher: str) -> str:
    return " ".join(word if len(word) <= 40 else f"{word[:12]}…" for word in teacher.split())


def _scores(audit: Audit) -> Figure:
    histograms = audit["histograms"]
    low, high = histograms["low"], histograms["high"]
    curves = [(name, histograms[kind], color) for color, (kind, name) in enumerate(KINDS)]
    rows = [(name, f"{sum(counts):,}", _mean(counts, low, high)) for name, counts, _ in curves]
    words = ", ".join(f"mean of {name} {mean}" for name, _, mean in rows)
    svg = density_chart("Teacher scores", words, curves, x_range=(low, high), x_label="teacher score")
    legend = tuple((color, name) for name, counts, color in curves if sum(counts))
    return Figure("Teacher scores", svg, legend, ("documents", "count", "mean"), tuple(rows))


def _survivors(audit: Audit) -> Figure:
    counts = audit["survivors"]
    names = [*map(str, range(len(counts) - 1)), f"{len(counts) - 1} or more"]
    title = "Documents below the ceiling, a query"
    svg = density_chart(
        title,
        f"{counts[0]} queries have none, {counts[-1]} have {names[-1]}",
        [("queries", counts, 0)],
        x_range=(0.0, float(len(counts))),
        x_label=f"survivors (the last bar: {names[-1]})",
    )
    rows = tuple((name, f"{count:,}") for name, count in zip(names, counts, strict=True))
    return Figure(title, svg, (), ("survivors", "queries"), rows)


def _mean(counts: Sequence[int], low: float, high: float) -> str:
    total, step = sum(counts), (high - low) / len(counts)
    if not total:
        return "–"
    return f"{sum(count * (low + (place + 0.5) * step) for place, count in enumerate(counts)) / total:.3f}"


def _counts(audit: Audit) -> list[tuple[str, str]]:
    named = {
        "queries": audit["queries"],
        "negatives": audit["negatives"],
        "queries without any": audit["without_negatives"],
        "queries with too few survivors": audit["short"],
        "queries dropped": audit["dropped"],
        "negatives from below the pool or at random": audit["filled"],
        "documents in the pools": audit["pool"],
        "refused: at or above the ceiling": audit["refused"],
        **{f"passed over: {REASONS.get(reason, reason)}": count for reason, count in audit["passed"].items()},
    }
    return [(name, f"{value:,}") for name, value in named.items()]
