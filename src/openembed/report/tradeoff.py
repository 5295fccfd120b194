"""Quality against what it costs, as SVG text: a point a system, its interval, and the line of those that none beats in both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from openembed.report.charts import COLORS, LEFT, RIGHT, WIDTH, Frame, base_line, grid, number, svg_frame, ticks
from openembed.report.sections import Figure

HEIGHT, BELOW = 260, 38
LETTER, LINE = 7.0, 13
"""Width and height of a label's letters, about."""


@dataclass(frozen=True)
class Cost:
    """What a system's quality costs on a task: bytes a document, and milliseconds a query where they were measured.

    ``entries``, ``of``: what the bytes are of, such as 120 and ``terms``.
    """

    document_bytes: float
    query_ms: float | None = None
    entries: float | None = None
    of: str = ""

    @property
    def told(self) -> str:
        """What the bytes are of, in words."""
        return "" if self.entries is None else f"{self.entries:.4g} {self.of}"


@dataclass(frozen=True)
class Point:
    """A system: its cost, greater than 0, its score and the ends of its interval, and the number of a page colour."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    color: int = 0


def tradeoff_figures(
    task: str,
    metric: str,
    scores: Mapping[str, tuple[float, float | None, float | None]],
    costs: Mapping[str, Cost],
    systems: Sequence[str],
) -> list[Figure]:
    """Returns a chart of the scores over bytes a document and one over milliseconds a query.

    A cost that fewer than two systems have, or that all share, is left out. ``systems`` gives each its colour.
    """
    known = [name for name in systems if name in scores and name in costs]
    axes = {
        "bytes a document": {name: costs[name].document_bytes for name in known},
        "milliseconds a query": {name: costs[name].query_ms for name in known},
    }
    figures = []
    for axis, values in axes.items():
        points = [Point(name, x, *scores[name], systems.index(name)) for name, x in values.items() if x]
        if len({point.x for point in points}) < 2:
            continue
        svg = scatter(f"{metric} on {task}", points, axis)
        rows = tuple((p.name, f"{p.y:.3f}", f"{number(p.x)}", costs[p.name].told) for p in points)
        legend = tuple((point.color % COLORS, point.name) for point in points)
        figures.append(Figure(f"{task}: {metric} and {axis}", svg, legend, ("system", metric, axis, "of"), rows))
    return figures


def scatter(title: str, points: Sequence[Point], x_label: str) -> str:
    """Returns an SVG scatter plot over a logarithmic axis; a dashed line joins the :func:`frontier`."""
    frame = _around(points)
    parts = _axes(frame, x_label)
    steps = [(frame.x(p.x), frame.y(p.y)) for p in frontier(points)]
    corners = [corner for (_, y), (x, top) in pairwise(steps) for corner in ((x, y), (x, top))]
    corners = [steps[0], *corners, (WIDTH - RIGHT, steps[-1][1])]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    parts.append(f'<polyline class="frontier" points="{path}"/>')
    for p in points:
        x = frame.x(p.x)
        if p.low is not None and p.high is not None:
            low, high = frame.y(p.low), frame.y(p.high)
            parts.append(
                f'<line class="whisker s{p.color % COLORS}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
    for p in points:
        told = escape(f"{p.name}: {p.y:.3f} at {number(p.x)} {x_label}")
        place = f'cx="{frame.x(p.x):.1f}" cy="{frame.y(p.y):.1f}"'
        parts.append(f'<circle class="dot s{p.color % COLORS}" {place} r="4.5"><title>{told}</title></circle>')
    parts += _labels([(p.name, frame.x(p.x), frame.y(p.y)) for p in points])
    told = "; ".join(f"{p.name} {p.y:.3f} at {number(p.x)}" for p in points)
    return svg_frame(title, f"Score over {x_label}: {told}.", parts, HEIGHT)


def frontier(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no cheaper or equally cheap one equals or beats, cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


class _LogFrame(Frame):
    """A plotting area whose horizontal scale is logarithmic; its ends are powers of ten."""

    def x(self, value: float) -> float:
        return super().x(math.log10(value))


def _around(points: Sequence[Point]) -> _LogFrame:
    logs = [math.log10(point.x) for point in points]
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None]
    room = max((max(logs) - min(logs)) * 0.1, 0.05)
    above = (max(ys) - min(ys)) * 0.1 or 0.05
    return _LogFrame(min(logs) - room, max(logs) + room, min(ys) - above, max(ys) + above, HEIGHT, BELOW)


def _axes(frame: _LogFrame, x_label: str) -> list[str]:
    parts = grid(ticks(frame.y_low, frame.y_high, 7), frame.y)
    for value in log_ticks(10**frame.x_low, 10**frame.x_high):
        x = f"{frame.x(value):.1f}"
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{frame.bottom}" y2="{frame.bottom + 4}"/>')
        parts.append(f'<text x="{x}" y="{frame.bottom + 16}" text-anchor="middle">{number(value)}</text>')
    return parts + base_line(frame.bottom, f"{x_label} (logarithmic)", HEIGHT)


def log_ticks(low: float, high: float) -> list[float]:
    """Returns round numbers from ``low`` to ``high``: powers of ten where there are three, else 1, 2 and 5 times them too."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            break
    return found


def _labels(points: Sequence[tuple[str, float, float]]) -> list[str]:
    """A name beside each point, on the side where it covers nothing that is there already."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for _, x, y in points]
    parts = []
    for name, x, y in points:
        wide = LETTER * len(name)
        sides = [(x + 8, y + 4), (x - 8 - wide, y + 4), (x - wide / 2, y - 9), (x - wide / 2, y + 17)]
        for step in (1, -1, 2, -2, 3, -3):
            sides += [(x + 8, y + 4 + step * LINE), (x - 8 - wide, y + 4 + step * LINE)]
        boxes = [(left, base - LINE + 3, left + wide, base + 3) for left, base in sides]
        inside = [box for box in boxes if box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BELOW]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        box = (free or inside or boxes)[0]
        taken.append(box)
        parts.append(f'<text class="name" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(name)}</text>')
    return parts


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
