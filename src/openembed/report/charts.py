"""Charts as SVG text: themed by the page's CSS variables, sized to be read on a phone, with title and description.

Every chart is 360 units wide and meant to fill a grid cell of 300 to 480 pixels, so that its text stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 36
MAX_POINTS = 160
COLORS = 8
"""The page defines the CSS variables --c0 … --c7."""


@dataclass(frozen=True)
class Line:
    """One series; ``color`` is the number of a page colour. ``points`` are (x, y) in order of x."""

    name: str
    points: tuple[tuple[float, float], ...]
    color: int = 0
    dashed: bool = False
    marks: bool = False


@dataclass(frozen=True)
class Divider:
    """A vertical line at ``x`` with a label above it, such as the start of a stage."""

    x: float
    label: str


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    dividers: Sequence[Divider] = (),
    y_range: tuple[float | None, float | None] = (None, None),
    x_ticks: bool = True,
) -> str:
    """Returns an SVG line chart; ``y_range`` fixes an end of the y axis. Long series are averaged into 160 points."""
    lines = [Line(item.name, thin(item.points), item.color, item.dashed, item.marks) for item in lines if item.points]
    xs = [x for item in lines for x, _ in item.points] or [0.0, 1.0]
    ys = [y for item in lines for _, y in item.points] or [0.0, 1.0]
    frame = _around(xs, ys, y_range)
    parts = [*_axes(frame, x_label, x_ticks=x_ticks), *_dividers(frame, dividers)]
    for item in lines:
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in item.points)
        dash = ' stroke-dasharray="5 4"' if item.dashed else ""
        if len(item.points) > 1:
            parts.append(f'<polyline class="line s{item.color % COLORS}"{dash} points="{path}"/>')
        if item.marks or len(item.points) == 1:
            parts += [_dot(frame.x(x), frame.y(y), item.color, f"{item.name}: {number(y)}") for x, y in item.points]
    return svg_frame(title, description, parts)


def density_chart(
    title: str,
    description: str,
    curves: Sequence[tuple[str, Sequence[float], int]],
    *,
    x_range: tuple[float, float] = (-1.0, 1.0),
    x_label: str = "cosine similarity",
) -> str:
    """Returns overlaid histograms over ``x_range``, scaled to the same area; a curve is (name, bins, colour)."""
    low, high = x_range
    shares = [(name, _shares(counts), color) for name, counts, color in curves if sum(counts) > 0]
    top = max((max(values) for _, values, _ in shares), default=1.0)
    frame = Frame(low, high, 0.0, top * 1.05)
    parts = _axes(frame, x_label, y_ticks=False)
    for name, values, color in shares:
        step = (high - low) / len(values)
        corners = [(low, 0.0)]
        for index, value in enumerate(values):
            corners += [(low + index * step, value), (low + (index + 1) * step, value)]
        corners.append((high, 0.0))
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in corners)
        parts.append(f'<polygon class="area s{color % COLORS}" points="{path}"><title>{escape(name)}</title></polygon>')
    return svg_frame(title, description, parts)


def thin(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> tuple[tuple[float, float], ...]:
    """Returns at most ``limit`` points, each the mean of a run of neighbours, those not finite left out."""
    finite = [(float(x), float(y)) for x, y in points if math.isfinite(y)]
    if len(finite) <= limit:
        return tuple(finite)
    size = math.ceil(len(finite) / limit)
    runs = [finite[start : start + size] for start in range(0, len(finite), size)]
    return tuple((sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs)


def number(value: float) -> str:
    """Returns a short form: 0.00002 → 2e-05, 0.1234 → 0.123, 12345 → 12.3k."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if value == int(value):
        return str(int(value))
    return f"{value:.3g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about ``count`` round numbers from ``low`` to ``high``, both included where they are round."""
    raw = (high - low) / max(count - 1, 1)
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Frame:
    """The plotting area: the ends of its scales, the height of the chart, and the room below it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: int = HEIGHT
    below: int = BOTTOM

    @property
    def bottom(self) -> int:
        """Where the horizontal axis lies."""
        return self.height - self.below

    def x(self, value: float) -> float:
        """Returns where ``value`` lies from left to right."""
        share = (value - self.x_low) / (self.x_high - self.x_low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Returns where ``value`` lies from top to bottom."""
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.bottom - share * (self.bottom - TOP)


def _around(xs: Sequence[float], ys: Sequence[float], fixed: tuple[float | None, float | None]) -> Frame:
    low, high = min(ys), max(ys)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    low = fixed[0] if fixed[0] is not None else low - room
    high = fixed[1] if fixed[1] is not None else high + room
    if high <= low:
        high = low + 1.0
    x_low, x_high = min(xs), max(xs)
    return Frame(x_low, x_high if x_high > x_low else x_low + 1.0, low, high)


def _axes(frame: Frame, x_label: str, *, x_ticks: bool = True, y_ticks: bool = True) -> list[str]:
    parts = grid(ticks(frame.y_low, frame.y_high) if y_ticks else [], frame.y)
    for value in ticks(frame.x_low, frame.x_high, 6) if x_ticks else []:
        parts.append(f'<text x="{frame.x(value):.1f}" y="{frame.bottom + 15}" text-anchor="middle">{number(value)}</text>')
    return parts + base_line(frame.bottom, x_label, frame.height)


def grid(values: Sequence[float], y_of: Callable[[float], float]) -> list[str]:
    """Returns the horizontal lines at ``values`` with their numbers."""
    parts = []
    for value in values:
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    return parts


def base_line(bottom: float, label: str, height: int) -> list[str]:
    """Returns the horizontal axis at ``bottom``, and its label at the lower edge of a chart so high."""
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>']
    if label:
        middle = (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{middle}" y="{height - 5}" text-anchor="middle">{escape(label)}</text>')
    return parts


def _dividers(frame: Frame, dividers: Sequence[Divider]) -> list[str]:
    parts = []
    for item in dividers:
        x = frame.x(item.x)
        line = f'<line class="divider" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        parts += [line, f'<text x="{x:.1f}" y="{TOP - 7}">{escape(item.label)}</text>']
    return parts


def _dot(x: float, y: float, color: int, label: str) -> str:
    return f'<circle class="dot s{color % COLORS}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(label)}</title></circle>'


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts]


def svg_frame(title: str, description: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    """Returns an SVG element around ``parts`` with its title and description for those who cannot see it."""
    label = quoteattr(f"{title}. {description}")
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label={label}><title>{escape(title)}</title>{body}</svg>'
