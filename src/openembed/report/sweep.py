"""From a sweep's plain results to its table: one HTML page without any outside asset, Markdown, and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openembed.files import atomic_write, write_json
from openembed.report.charts import number
from openembed.report.dots import Row, dot_chart, interval_mark
from openembed.report.sections import Figure
from openembed.report.tradeoff import Cost, tradeoff_figures

COSTS = ("a document", "bytes a document", "ms a query")
VERDICTS = ("holds", "does not hold", "cannot be told")


@dataclass(frozen=True)
class Range:
    """A mean over ``seeds`` (one value each) and its 95 % interval; None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    seeds: tuple[float, ...]


@dataclass(frozen=True)
class VariantScores:
    """What a variant scored: metric → mean over seeds with Student's interval over seeds; ``cost``: its mean over tasks."""

    title: str
    scores: Mapping[str, Range]
    cost: Cost | None = None


@dataclass(frozen=True)
class SweepGroup:
    """Variants shown together."""

    title: str
    note: str
    variants: tuple[str, ...]


@dataclass(frozen=True)
class ClaimResult:
    """A claim and what became of it: the difference ``better - worse`` over seeds and test items, and the verdict."""

    text: str
    better: str
    worse: str
    metric: str
    paper: str
    difference: Range | None
    verdict: str


@dataclass(frozen=True)
class SweepReport:
    """Everything the page shows. ``metrics``: name → what it is; ``measures``: mean → its tasks; ``runs``: done, planned.

    ``also``: those of ``metrics`` that are means of a further metric over all tasks. ``smoke``: the scores mean nothing.
    """

    title: str
    summary: str
    seeds: tuple[int, ...]
    runs: tuple[int, int]
    measures: Mapping[str, tuple[str, ...]]
    metrics: Mapping[str, str]
    groups: Sequence[SweepGroup]
    variants: Mapping[str, VariantScores]
    claims: Sequence[ClaimResult]
    environment: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    smoke: bool = False

    @property
    def verdicts(self) -> dict[str, list[ClaimResult]]:
        """The claims by verdict."""
        return {verdict: [claim for claim in self.claims if claim.verdict == verdict] for verdict in VERDICTS}

    @property
    def columns(self) -> list[str]:
        """The metrics of the table: each measure's tasks, then its mean where both are several, then the rest."""
        columns = []
        for name, tasks in self.measures.items():
            columns += [*tasks, *([name] if len(tasks) > 1 and len(self.measures) > 1 else [])]
        return columns + [name for name in self.metrics if name not in columns and name not in self.measures]

    @property
    def panels(self) -> list[str]:
        """The metrics that are drawn: overall first, then the measures, or what a single one is the mean of."""
        measured = [name for name, tasks in self.measures.items() if tasks]
        means = [name for name in self.columns if name not in measured and not self._is_task(name)]
        return means + (measured if len(measured) > 1 else list(self.measures[measured[0]]) if measured else [])

    def _is_task(self, name: str) -> bool:
        return any(name in tasks for tasks in self.measures.values())

    def costly(self, group: SweepGroup) -> list[str]:
        """The variants of ``group`` whose costs are known."""
        return [name for name in group.variants if self.variants[name].cost is not None]

    def best(self, group: SweepGroup, metric: str) -> str:
        """The variant of ``group`` with the highest mean; the first of equals."""
        return max(group.variants, key=lambda name: self.variants[name].scores[metric].mean)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def write_sweep(report: SweepReport, folder: str | Path) -> Path:
    """Writes ``report.html``, ``report.md`` and ``report.json`` into ``folder``, atomically; returns the page's path."""
    folder = Path(folder)
    write_json(folder / "report.json", report.as_dict())
    for name, text in (("report.md", render_markdown(report)), ("report.html", render_sweep(report))):
        with atomic_write(folder / name) as file:
            file.write(text)
    return folder / "report.html"


def render_sweep(report: SweepReport) -> str:
    """Returns the page as HTML text. It refers to nothing outside itself."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["svg"] = Markup
    widest = max([abs(end) for claim in report.claims for end in _ends(claim.difference)], default=0.0) or 0.01
    return environment.get_template("sweep.html").render(
        report=report,
        figure=lambda group: Markup(_figure(report, group)),
        tradeoffs=lambda group: _tradeoffs(report, group),
        costs=lambda name: cost_cells(report.variants[name].cost),
        mark=lambda claim: Markup(interval_mark(*_three(claim.difference), widest)) if claim.difference else "",
    )


def _figure(report: SweepReport, group: SweepGroup) -> str:
    rows = [
        Row(
            report.variants[name].title,
            [(r.mean, r.low, r.high, r.seeds) for r in (report.variants[name].scores[metric] for metric in report.panels)],
        )
        for name in group.variants
    ]
    return dot_chart(group.title, report.panels, rows)


def _tradeoffs(report: SweepReport, group: SweepGroup) -> list[Figure]:
    """Quality over bytes and over milliseconds; none where the group's variants cost the same."""
    known = report.costly(group)
    scores = {name: _three(report.variants[name].scores[report.panels[0]]) for name in known}
    costs = {name: cost for name in known if (cost := report.variants[name].cost) is not None}
    found = tradeoff_figures("all tasks", report.panels[0], scores, costs, known)
    return found if len({round(math.log2(cost.document_bytes + 1)) for cost in costs.values()}) > 1 else []


def cost_cells(cost: Cost | None) -> tuple[str, str, str]:
    """Returns what a document's bytes are of, how many they are, and the milliseconds of a query."""
    if cost is None:
        return "–", "–", "–"
    return cost.told, number(cost.document_bytes), "–" if cost.query_ms is None else f"{cost.query_ms:.3g}"


def _three(found: Range) -> tuple[float, float | None, float | None]:
    return found.mean, found.low, found.high


def _ends(found: Range | None) -> list[float]:
    return [] if found is None else [value for value in _three(found) if value is not None]


def render_markdown(report: SweepReport) -> str:
    """Returns the table, the claims and the statement as Markdown."""
    lines = [f"# {report.title}", "", report.summary, "", *_statement(report), "", "## Claims", ""]
    lines += ["| claim | metric | `paper` | difference here | verdict |", "|---|---|---|---|---|"]
    lines += [f"| {c.text} | {c.metric} | {c.paper} | {difference(c.difference)} | {c.verdict} |" for c in report.claims]
    for group in report.groups:
        lines += ["", f"## {group.title}", ""] + ([group.note, ""] if group.note else [])
        columns = [*report.columns, *(COSTS if report.costly(group) else ())]
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name in group.variants:
            scores = report.variants[name].scores
            cells = [spread(scores[metric]) for metric in report.columns]
            cells += cost_cells(report.variants[name].cost) if report.costly(group) else ()
            lines.append(f"| {report.variants[name].title} | {' | '.join(cells)} |")
    lines += ["", "## Environment", ""]
    lines += [f"- {name}: `{value}`" for name, value in report.environment.items()]
    return "\n".join(lines) + "\n"


def _statement(report: SweepReport) -> list[str]:
    done, planned = report.runs
    seeds = ", ".join(map(str, report.seeds))
    lines = [
        f"{done} of {planned} runs, seeds {seeds}. A claim holds when the 95 % interval of the difference lies above 0, "
        "does not hold when it lies below, and cannot be told otherwise. The interval counts seeds and test items as chance. "
        "± in the tables is half of Student's 95 % interval over seeds alone. Of "
        f"{len(report.claims)} claims about which nothing were true, {0.05 * len(report.claims):.1f} would leave 0 by chance."
    ]
    for verdict, claims in report.verdicts.items():
        listed = "; ".join(f"{claim.text} ({claim.metric})" for claim in claims) or "none"
        lines += ["", f"**{verdict.capitalize()}** ({len(claims)} of {len(report.claims)}): {listed}."]
    return lines


def difference(found: Range | None) -> str:
    """Returns ``+0.012 [+0.003, +0.021]``."""
    if found is None:
        return "–"
    return f"{found.mean:+.3f}" + ("" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]")


def spread(found: Range) -> str:
    """Returns ``0.512 ± 0.008``: the mean and half its interval."""
    return f"{found.mean:.3f}" + ("" if found.low is None else f" ± {found.mean - found.low:.3f}")
