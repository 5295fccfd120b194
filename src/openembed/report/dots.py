"""Dot charts as SVG text: every seed a ring, their mean a bar across the line of its interval; themed by the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

from openembed.report.charts import number, ticks

LABEL, PANEL, GAP, RIGHT = 262, 176, 34, 14
TOP, BOTTOM, LINE = 30, 24, 24
MARK_WIDTH, MARK_HEIGHT = 150, 18

Dot = tuple[float, float | None, float | None, Sequence[float]]
"""Mean, low and high end of its interval where there is one, and the value of every seed."""


@dataclass(frozen=True)
class Row:
    """One line of the chart: its name and a dot a panel."""

    name: str
    dots: Sequence[Dot]


def dot_chart(title: str, panels: Sequence[str], rows: Sequence[Row]) -> str:
    """Returns an SVG chart with a row a variant and a panel a metric; each panel has its own scale."""
    width = LABEL + len(panels) * (PANEL + GAP) - GAP + RIGHT
    height = TOP + LINE * len(rows) + BOTTOM
    parts = [
        f'<text class="name" x="{LABEL - 14}" y="{_y(index) + 4}" text-anchor="end">{escape(row.name)}</text>'
        for index, row in enumerate(rows)
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, LABEL + index * (PANEL + GAP), [(row.name, row.dots[index]) for row in rows])
    label = quoteattr(f"{title}. " + "; ".join(_told(row, panels) for row in rows))
    return (
        f'<svg class="dots" style="max-width: {width}px" viewBox="0 0 {width} {height}" role="img" aria-label={label}>'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def interval_mark(mean: float, low: float | None, high: float | None, widest: float) -> str:
    """Returns a small SVG of a difference and its interval around 0, on a scale of ``-widest`` to ``widest``."""
    middle, y = MARK_WIDTH / 2, MARK_HEIGHT / 2

    def x(value: float) -> float:
        return middle + value / widest * (middle - 6)

    color = 7 if low is None or low <= 0 <= high else 2 if low > 0 else 6
    line = "" if low is None else f'<line class="span s{color}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>'
    return (
        f'<svg class="mark" viewBox="0 0 {MARK_WIDTH} {MARK_HEIGHT}" aria-hidden="true">'
        f'<line class="divider" x1="{middle}" x2="{middle}" y1="0" y2="{MARK_HEIGHT}"/>{line}'
        f'<circle class="dot s{color}" cx="{x(mean):.1f}" cy="{y}" r="3.5"/></svg>'
    )


def _told(row: Row, panels: Sequence[str]) -> str:
    return f"{row.name}: " + ", ".join(f"{panel} {dot[0]:.3f}" for panel, dot in zip(panels, row.dots, strict=True))


def _y(index: int) -> float:
    return TOP + LINE * (index + 0.5)


def _panel(title: str, left: int, dots: Sequence[tuple[str, Dot]]) -> list[str]:
    # the range of the dots, and of intervals as far as they leave the dots apart: a wide one is cut at the panel's edge
    values = [value for _, (_, _, _, seeds) in dots for value in seeds]
    low, high = min(values), max(values)
    room = (high - low) * 0.25 or abs(high) * 0.1 or 0.1
    low, high = low - room, high + room
    right, bottom = left + PANEL, TOP + LINE * len(dots)

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * PANEL

    parts = [f'<text class="head" x="{left}" y="14">{escape(title)}</text>']
    for value in ticks(low, high, 5):
        at = f"{x(value):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for index, (name, (mean, start, end, seeds)) in enumerate(dots):
        y = _y(index)
        if start is not None and end is not None:
            parts.append(f'<line class="span s0" x1="{x(start):.1f}" x2="{x(end):.1f}" y1="{y}" y2="{y}"/>')
        told, at = escape(f"{name}: {mean:.3f}"), x(mean) - 1.5
        parts.append(f'<rect class="dot s0" x="{at:.1f}" y="{y - 7}" width="3" height="14"><title>{told}</title></rect>')
        parts += [f'<circle class="seed s1" cx="{x(value):.1f}" cy="{y}" r="3.2"/>' for value in seeds]
    return parts
