"""The figures of the report, each with its chart, a caption and the table of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openembed.report.charts import Divider, Line, density_chart, line_chart, number

Row = Mapping[str, Any]
Stages = Sequence[tuple[str, Sequence[Row]]]
SIMILARITIES = (("positive", "positive"), ("hard", "hard negative"), ("in_batch", "in-batch negative"))
SPARSITY = (
    ("query_terms", "Terms a query", "Weights above 0 a query, mean of the batch"),
    ("document_terms", "Terms a document", "Weights above 0 a document, mean of the batch"),
    ("empty_documents", "Empty documents", "Share of documents without any weight"),
    ("empty_queries", "Empty queries", "Share of queries without any weight"),
    (
        "flops",
        "Products a pair",
        "Terms that a query and a document of the batch share, as expected from how often each is used",
    ),
)
"""What training shows of sparse representations: key, title and description."""
SNAPSHOTS = 3
"""Moments of a stage at which similarity histograms are shown: its start, its middle and its end."""


@dataclass(frozen=True)
class Figure:
    """A chart with a heading, a legend of (colour number, name), and the table of its data."""

    title: str
    svg: str
    legend: tuple[tuple[int, str], ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def training_figures(stages: Stages) -> dict[str, list[Figure]]:
    """Returns the figures of each training section, by the section's name; a section without data has none."""
    stages = [(name, rows) for name, rows in stages if rows]
    return {
        "loss": _single("Loss", "Mean loss of the batch at each step", stages, lambda row: row.get("loss")),
        "loss_by_source": _by_source(stages),
        "lr": _single("Learning rate", "Learning rate at each step", stages, lambda row: row.get("lr"), floor=0.0),
        "similarity": _similarity(stages),
        "penalties": _penalties(stages),
        "sparsity": [
            figure
            for key, title, description in SPARSITY
            for figure in _single(title, description, stages, lambda row, k=key: row.get("sparsity", {}).get(k), floor=0.0)
        ],
        "false_negatives": _single(
            "False negatives masked",
            "Would-be negatives refused at each step: known positives of the row, its own query, or too close by the teacher",
            stages,
            lambda row: row.get("false_negatives_masked"),
            floor=0.0,
        ),
        "padding": _single(
            "Padding avoided (%)",
            "Share of the tokens that padded batches would have spent on padding",
            stages,
            padding_avoided,
            floor=0.0,
        ),
        "speed": _single("Tokens per second", "Training speed in real tokens", stages, tokens_per_second, floor=0.0),
    }


def padding_avoided(row: Row) -> float | None:
    """Returns the percentage of a padded batch that would have been padding; None when the row does not say."""
    real, padded = row.get("tokens"), row.get("padded_tokens")
    return None if real is None or not padded else 100.0 * (1.0 - real / padded)


def tokens_per_second(row: Row) -> float | None:
    """Returns real tokens a second; None when the row does not say."""
    tokens, seconds = row.get("tokens"), row.get("seconds")
    return None if tokens is None or not seconds else tokens / seconds


def evaluation_figures(
    stages: Stages,
    states: Sequence[str],
    baseline: str,
    tasks: Mapping[str, Mapping[str, float]],
    made_from: Mapping[str, str] | None = None,
) -> list[Figure]:
    """Returns one chart a task: its score over the steps where training was scored on it, else over the model's states.

    The baseline is a dashed line. ``made_from``: state → the one it was trained from; only such two are joined (None: each
    and the next).
    """
    stages = [(name, rows) for name, rows in stages if rows]
    return [
        figure
        for task, scores in tasks.items()
        if (figure := _evaluation_figure(stages, states, baseline, task, scores, made_from)) is not None
    ]


def _evaluation_figure(
    stages: Stages,
    states: Sequence[str],
    baseline: str,
    task: str,
    scores: Mapping[str, float],
    made_from: Mapping[str, str] | None,
) -> Figure | None:
    series = _series(stages, lambda row: row.get("evaluation", {}).get(task))
    steps = [point for _, points in series for point in points]
    if steps:
        points = tuple(([(0.0, scores[states[0]])] if states and states[0] in scores else []) + steps)
        names, x_label = [f"step {number(x)}" for x, _ in points], "step"
    else:
        known = [(float(index), state) for index, state in enumerate(states) if state in scores]
        points = tuple((index, scores[state]) for index, state in known)
        names, x_label = [state for _, state in known], " → ".join(states)
    if len(points) < 2:
        return None
    lines, legend = [Line("model", points, 0, marks=True)], [(0, "model")]
    if made_from and not steps:
        places = dict(zip(names, points, strict=True))
        pairs = [(places[made_from[name]], places[name]) for name in names if made_from.get(name) in places]
        lines = [Line("model", part, 0) for part in (*((point,) for point in points), *pairs)]
    rows = [(name, f"{value:.4f}") for name, (_, value) in zip(names, points, strict=True)]
    if baseline in scores:
        lines.append(Line(baseline, ((points[0][0], scores[baseline]), (points[-1][0], scores[baseline])), 1, dashed=True))
        legend.append((1, f"{baseline} (dashed)"))
        rows.append((baseline, f"{scores[baseline]:.4f}"))
    svg = line_chart(
        task,
        ", ".join(" ".join(row) for row in rows),
        lines,
        x_label=x_label,
        dividers=_dividers(stages) if steps else (),
        y_range=(0.0, None),
        x_ticks=bool(steps),
    )
    return Figure(task, svg, tuple(legend), ("when", "score"), tuple(rows))


def _single(
    title: str,
    description: str,
    stages: Stages,
    value: Callable[[Row], float | None],
    floor: float | None = None,
) -> list[Figure]:
    series = _series(stages, value)
    if not any(points for _, points in series):
        return []
    lines = [Line(name, points, 0) for name, points in series]
    spans = "; ".join(f"{name}: from {number(p[0][1])} to {number(p[-1][1])}" for name, p in series if p)
    svg = line_chart(title, f"{description}. {spans}.", lines, dividers=_dividers(stages), y_range=(floor, None))
    rows = tuple((name, *_ends(points)) for name, points in series if points)
    return [Figure(title, svg, (), ("stage", "first", "mean", "last"), rows)]


def _by_source(stages: Stages) -> list[Figure]:
    names = sorted({name for _, rows in stages for row in rows for name in row.get("loss_by_source", {})})
    figures = []
    for index, name in enumerate(names):
        figures += [
            Figure(name, figure.svg.replace("s0", f"s{index % 8}"), (), figure.header, figure.rows)
            for figure in _single(
                f"Loss of {name}",
                "Mean loss of its rows",
                stages,
                lambda row, n=name: row.get("loss_by_source", {}).get(n),
            )
        ]
    return figures


def _penalties(stages: Stages) -> list[Figure]:
    """The terms of losses that have several: what is learned, and what is paid for weights."""
    names = sorted({name for _, rows in stages for row in rows if len(row.get("parts", {})) > 1 for name in row["parts"]})
    return [
        figure
        for name in names
        for figure in _single(
            name.replace("_", " "), "This term of the loss", stages, lambda row, n=name: row.get("parts", {}).get(n), floor=0.0
        )
    ]


def _similarity(stages: Stages) -> list[Figure]:
    figures = []
    for stage, rows in stages:
        shown = [row for row in rows if row.get("similarity")]
        for start, end in _windows(len(shown)):
            window = shown[start:end]
            curves, table = [], []
            for color, (key, name) in enumerate(SIMILARITIES):
                counts = _sum_histograms([row["similarity"].get(key) for row in window])
                if counts:
                    curves.append((name, counts, color))
                    table.append((name, str(int(sum(counts))), f"{_histogram_mean(counts):.2f}"))
            title = f"{stage}, step {window[0]['step']}–{window[-1]['step']}"
            words = ", ".join(f"mean {name} {mean}" for name, _, mean in table)
            legend = tuple((color, name) for name, _, color in curves)
            svg = density_chart(title, words, curves)
            figures.append(Figure(title, svg, legend, ("pairs", "count", "mean"), tuple(table)))
    return figures


def _windows(length: int) -> list[tuple[int, int]]:
    """Spans of rows at the start, in the middle and at the end, a tenth of the stage long; fewer for short stages."""
    size = max(1, length // 10)
    starts = sorted({0, (length - size) // 2, length - size}) if length else []
    return [(start, start + size) for start in starts[:SNAPSHOTS]]


def _sum_histograms(parts: Sequence[Mapping[str, Any] | None]) -> list[int]:
    filled = [part["histogram"] for part in parts if part and part.get("count")]
    return [sum(column) for column in zip(*filled, strict=True)]


def _histogram_mean(counts: Sequence[int]) -> float:
    step = 2 / len(counts)
    return sum(count * (-1 + (index + 0.5) * step) for index, count in enumerate(counts)) / sum(counts)


def _series(stages: Stages, value: Callable[[Row], float | None]) -> list[tuple[str, tuple[tuple[float, float], ...]]]:
    series = []
    for (name, rows), offset in zip(stages, _offsets(stages), strict=True):
        points = [(offset + row["step"], value(row)) for row in rows]
        series.append((name, tuple((float(x), float(y)) for x, y in points if y is not None)))
    return series


def _offsets(stages: Stages) -> list[int]:
    offsets, total = [], 0
    for _, rows in stages:
        offsets.append(total)
        total += max(row["step"] for row in rows)
    return offsets


def _dividers(stages: Stages) -> list[Divider]:
    return [Divider(offset, name) for (name, _), offset in zip(stages, _offsets(stages), strict=True)]


def _ends(points: Sequence[tuple[float, float]]) -> tuple[str, str, str]:
    values = [y for _, y in points]
    return number(values[0]), number(sum(values) / len(values)), number(values[-1])
