"""From a run's plain results to one HTML page without any outside asset."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openembed.files import atomic_write
from openembed.report.mining import Audit, sheet
from openembed.report.sections import Figure, evaluation_figures, training_figures
from openembed.report.tradeoff import Cost, tradeoff_figures

COMMON = frozenset({"the", "are", "and", "for", "who", "why", "how", "what", "does", "which", "when", "where", "can", "was"})
"""Words of a question that would be highlighted everywhere."""


SMOKE = "smoke: scores mean nothing"
SIGNIFICANT = 0.05
"""Two systems are told apart when the p-value of their paired test is below this."""


@dataclass(frozen=True)
class Score:
    """A score in 0..1 with its confidence interval where one is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TaskScores:
    """One evaluation task: what every system scored. ``note`` says what the task is, in a few words.

    ``p_values``: (system, other) → two-sided paired test, where it was made and items could be paired.
    ``costs``: what each system's quality costs, where documents were searched.
    """

    task: str
    metric: str
    scores: Mapping[str, Score]
    note: str = ""
    p_values: Mapping[tuple[str, str], float] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def winner(self) -> str:
        """The system with the highest score; the first of equals."""
        return max(self.scores, key=lambda system: self.scores[system].value)


@dataclass(frozen=True)
class TrainingRun:
    """The metrics of one training stage: one object a step, as ``metrics.jsonl`` holds them."""

    name: str
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Hit:
    """One result of a search."""

    score: float
    text: str
    title: str = ""


@dataclass(frozen=True)
class Search:
    """A question, what was found, and by which system."""

    query: str
    system: str
    hits: Sequence[Hit]


@dataclass(frozen=True)
class Removal:
    """A text taken out of the training data, and the one it was found to repeat (of evaluation set or source ``set``)."""

    source: str
    reason: str
    score: float
    text: str
    set: str
    match: str


@dataclass(frozen=True)
class Cleaning:
    """What a filter stage removed: for each source its rows, those kept, and removals by reason; removals to look at.

    ``against``: evaluation set → (its texts, rows removed for it).
    """

    name: str
    reasons: Sequence[str]
    sources: Mapping[str, tuple[int, int, Mapping[str, int]]]
    against: Mapping[str, tuple[int, int]]
    samples: Sequence[Removal]


@dataclass(frozen=True)
class Report:
    """Everything the page shows; a part left empty leaves its section with a line that says so.

    ``systems`` orders the columns of the headline table, the model's states first (untrained, stage 1, stage 2);
    ``baseline`` names the column that is not the model. ``comparisons``: (after, before) of every training to be judged;
    ``finals``: the systems that the baseline is held against (all of the model's where there are none). ``mining``: (name,
    audit) of every source that was mined. ``smoke``: the scores mean nothing.
    """

    title: str
    summary: str = ""
    systems: Sequence[str] = ()
    baseline: str = "BM25"
    tasks: Sequence[TaskScores] = ()
    training: Sequence[TrainingRun] = ()
    searches: Sequence[Search] = ()
    cleaning: Sequence[Cleaning] = ()
    recipe: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    mining: Sequence[tuple[str, Audit]] = ()
    comparisons: Sequence[tuple[str, str]] = ()
    finals: Sequence[str] = ()
    smoke: bool = False

    @property
    def states(self) -> list[str]:
        """The columns that are the model."""
        return [system for system in self.systems if system != self.baseline]


def verdicts(report: Report) -> list[str]:
    """Returns plain sentences: what each training gained, and on which tasks the baseline is ahead of what it ended in."""
    lines = [SMOKE] if report.smoke else []
    lines += [line for after, before in report.comparisons for line in _gained(report.tasks, after, before)]
    ahead = [
        line
        for system in report.finals or report.states
        for task in report.tasks
        if (line := _ahead(task, report.baseline, system))
    ]
    if not ahead and any(report.baseline in task.scores for task in report.tasks):
        ahead = [f"{report.baseline} is ahead on no task."]
    return lines + ahead


def _gained(tasks: Sequence[TaskScores], after: str, before: str) -> list[str]:
    """What training made of ``before``, in one line; none where no task has scores of both."""
    both = [task for task in tasks if {after, before} <= set(task.scores)]
    if not both:
        return []
    worse = [task.task for task in both if task.scores[after].value <= task.scores[before].value]
    close = [task.task for task in both if task.task not in worse and _close(task, after, before)]
    largest = max(task.p_values.get((after, before), 1.0) for task in both)
    tested = f" (paired tests, p ≤ {largest:.1g})" if not worse and not close and largest < SIGNIFICANT else ""
    line = f"After {after} the model is better than {before} on {len(both) - len(worse)} of {len(both)} tasks{tested}."
    line += f" It is better, but not beyond chance, on: {', '.join(close)}." if close else ""
    return [line + (f" It is not better on: {', '.join(worse)}." if worse else "")]


def _ahead(task: TaskScores, baseline: str, system: str) -> str:
    """That the baseline is ahead of ``system`` on a task; empty where it is not."""
    if not {system, baseline} <= set(task.scores) or task.scores[baseline].value <= task.scores[system].value:
        return ""
    near = " (within chance)" if _close(task, system, baseline) else ""
    mine, theirs = task.scores[system].value, task.scores[baseline].value
    return f"{baseline} is ahead of {system} on {task.task}: {theirs:.3f} against {mine:.3f}{near}."


def render(report: Report) -> str:
    """Returns the page as HTML text. It refers to nothing outside itself."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["highlight"] = lambda text, query: Markup(highlight(text, query))
    environment.filters["svg"] = Markup
    stages = [(run.name, run.rows) for run in report.training]
    scores = {task.task: {name: score.value for name, score in task.scores.items()} for task in report.tasks}
    sections: dict[str, list[Figure]] = training_figures(stages)
    made_from = dict(reversed(report.comparisons))  # of several the first, which is the nearest
    sections["evaluation"] = evaluation_figures(stages, report.states, report.baseline, scores, made_from)
    sections["costs"] = [
        figure
        for task in report.tasks
        for figure in tradeoff_figures(
            task.task,
            task.metric,
            {name: (score.value, score.low, score.high) for name, score in task.scores.items()},
            task.costs,
            report.systems,
        )
    ]
    mining = [sheet(audit, name) for name, audit in report.mining]
    return environment.get_template("page.html").render(
        report=report, verdicts=verdicts(report), figures=sections, mining=mining, alone=False
    )


def write_report(report: Report, path: str | Path) -> Path:
    """Writes the page to ``path``, atomically, and returns the path."""
    with atomic_write(path) as file:
        file.write(render(report))
    return Path(path)


def highlight(text: str, query: str) -> str:
    """Returns ``text`` as HTML with the words of ``query`` in ``<mark>``, short and common ones left out."""
    words = {re.escape(word) for word in re.findall(r"\w{3,}", query) if word.casefold() not in COMMON}
    if not words:
        return html.escape(text)
    pattern = re.compile(rf"\b({'|'.join(sorted(words, key=len, reverse=True))})\b", re.I)
    pieces = pattern.split(text)
    return "".join(
        f"<mark>{html.escape(piece)}</mark>" if index % 2 else html.escape(piece) for index, piece in enumerate(pieces)
    )


def _close(task: TaskScores, system: str, other: str) -> bool:
    """True when the two cannot be told apart: by the paired test, or by their intervals where there is none."""
    if (system, other) in task.p_values:
        return task.p_values[system, other] >= SIGNIFICANT
    return _overlap(task.scores[system], task.scores[other])


def _overlap(one: Score, other: Score) -> bool:
    if None in (one.low, one.high, other.low, other.high):
        return False
    return one.low <= other.high and other.low <= one.high  # type: ignore[operator]
