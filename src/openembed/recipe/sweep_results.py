"""From a sweep's folder to its table: scores of every variant over seeds, and the verdict on every claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

from openembed.evaluation.over_seeds import SeedScores, mean_scores, seed_scores, verdict
from openembed.evaluation.runner import read_results
from openembed.recipe.config import EvaluateStage
from openembed.recipe.report import METRIC_NAMES, cost, environment
from openembed.recipe.smoke import WARNING
from openembed.recipe.stages import Workplace, folder_name
from openembed.recipe.sweep import Sweep, SweepRun
from openembed.recipe.sweep_config import OVERALL, Claim, SweepConfig
from openembed.report.sweep import ClaimResult, Range, SweepGroup, SweepReport, VariantScores
from openembed.report.tradeoff import Cost

Scores = Mapping[str, SeedScores]
"""Metric (task, measure or ``overall``) → scores."""


def sweep_report(sweep: Sweep, out: Path, base: Path, command: str = "", device: str | None = None) -> SweepReport:
    """Returns what the finished runs of ``sweep`` in ``out`` show.

    A variant without a finished run is left out; claims use the seeds that both their variants have. Raises
    ``ValueError`` when no run is finished.
    """
    finished = [run for run in sweep.runs if run.finished(out, base)]
    if not finished:
        raise ValueError(f"{out}: no run of this sweep is finished there yet")
    config = sweep.config
    kinds = metric_names(finished, out, base)
    found = {
        name: {run.seed: _results(run, out, base) for run in finished if run.variant == name}
        for name in config.variant
        if any(run.variant == name for run in finished)
    }
    scores = {name: _scores(config, results) for name, results in found.items()}
    metrics = list(next(iter(scores.values())))
    recipe = sweep.recipe
    place = Workplace(recipe, out, base, device)
    facts = environment(place, command)
    del facts["seed"]  # a sweep has several
    return SweepReport(
        title=finished[0].recipe.title if recipe.smoke else recipe.title or recipe.name,
        summary=" ".join(f"{WARNING if recipe.smoke else ''} {recipe.description}".split()),
        smoke=recipe.smoke,
        seeds=config.seeds,
        runs=(len(finished), len(sweep.runs)),
        measures={name: tuple(task for task in tasks if task in metrics) for name, tasks in config.measure.items()},
        metrics={name: kinds.get(name, "mean") for name in metrics},
        also=tuple(METRIC_NAMES.get(name, name) for name in config.also),
        groups=[SweepGroup(g.title, g.note, tuple(n for n in g.variants if n in scores)) for g in config.group],
        variants={
            name: VariantScores(config.variant[name].title, _ranges(scores[name]), _cost(list(results.values())))
            for name, results in found.items()
        },
        claims=[_claim(claim, scores) for claim in config.claim if {claim.better, claim.worse} <= set(scores)],
        environment=facts,
    )


def metric_names(runs: list[SweepRun], out: Path, base: Path) -> dict[str, str]:
    """Returns task → the name of its main metric."""
    results = _results(runs[0], out, base)
    return {task: METRIC_NAMES.get(result.metric, result.metric) for task, (result, _) in results.items()}


def _results(run: SweepRun, out: Path, base: Path) -> dict:
    stage = run.recipe.stage[run.evaluate]
    assert isinstance(stage, EvaluateStage), "a sweep's evaluate stage is checked when it is loaded"
    return read_results(run.place(out, base).out / run.evaluate / folder_name(stage.models[0]))


def _scores(config: SweepConfig, found: Mapping[int, dict]) -> dict[str, SeedScores]:
    """Tasks first, in the order of the measures, then measures, then overall, then the means of further metrics."""
    present = set.intersection(*(set(results) for results in found.values()))
    measures = {name: [task for task in tasks if task in present] for name, tasks in config.measure.items()}
    measures = {name: tasks for name, tasks in measures.items() if tasks}
    scores = {
        task: seed_scores({seed: results[task] for seed, results in found.items()})
        for tasks in measures.values()
        for task in tasks
    }
    means = {name: mean_scores([scores[task] for task in tasks]) for name, tasks in measures.items()}
    further = {}
    for name in config.also:
        having = _having(name, scores, found)
        parts = [seed_scores({seed: results[task] for seed, results in found.items()}, metric=name) for task in having]
        if parts:
            further[METRIC_NAMES.get(name, name)] = mean_scores(parts)
    return {**scores, **means, OVERALL: mean_scores(list(means.values())), **further}


def _having(metric: str, tasks: Iterable[str], found: Mapping[int, dict]) -> list[str]:
    """Those of ``tasks`` that have ``metric`` in every seed; STS has no recall."""
    return [task for task in tasks if all(metric in results[task][0].metrics for results in found.values())]


def _cost(seeds: Sequence[Mapping[str, tuple]]) -> Cost | None:
    """The mean cost over tasks; over seeds the mean of bytes and the median of milliseconds. None without costs."""
    found = [
        [cost(results[task][0].costs) for results in seeds if results[task][0].costs]
        for task in sorted(set.intersection(*map(set, seeds)))
    ]
    found = [costs for costs in found if costs]
    if not found:
        return None
    took = [[c.query_ms for c in costs if c.query_ms is not None] for costs in found]
    entries = fmean(fmean(c.entries for c in costs) for costs in found)
    return Cost(
        fmean(fmean(c.document_bytes for c in costs) for costs in found),
        fmean(median(times) for times in took if times) if any(took) else None,
        entries,
        found[0][0].of,
    )


def _ranges(scores: Scores) -> dict[str, Range]:
    return {name: _range(found, over_items=False) for name, found in scores.items()}


def _range(scores: SeedScores, *, over_items: bool) -> Range:
    interval = scores.interval() if over_items else scores.seed_interval()
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return Range(scores.mean, low, high, tuple(float(value) for value in scores.values_S))


def _claim(claim: Claim, scores: Mapping[str, Scores]) -> ClaimResult:
    """The verdict on a claim, by the interval of the difference alone; nan-free: a metric not run is told as such."""
    better, worse = scores[claim.better], scores[claim.worse]
    metric = METRIC_NAMES.get(claim.metric, claim.metric)
    if metric not in better or not set(better[metric].seeds) & set(worse[metric].seeds):
        return ClaimResult(claim.text, claim.better, claim.worse, metric, claim.paper, None, "cannot be told")
    difference = better[metric] - worse[metric]
    shown = _range(difference, over_items=True)
    return ClaimResult(claim.text, claim.better, claim.worse, metric, claim.paper, shown, verdict(difference.interval()))
