"""From a sweep's folder to its table: scores of every variant over seeds, and the verdict on every claim."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from openembed.evaluation.over_seeds import SeedScores, mean_scores, seed_scores, verdict
from openembed.evaluation.runner import read_results
from openembed.recipe.config import EvaluateStage
from openembed.recipe.report import METRIC_NAMES, environment
from openembed.recipe.stages import Workplace, folder_name
from openembed.recipe.sweep import Sweep, SweepRun
from openembed.recipe.sweep_config import OVERALL, Claim, SweepConfig
from openembed.report.sweep import ClaimResult, Range, SweepGroup, SweepReport, VariantScores

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
    scores = {
        name: _scores(config, [run for run in finished if run.variant == name], out, base)
        for name in config.variant
        if any(run.variant == name for run in finished)
    }
    metrics = list(next(iter(scores.values())))
    recipe = sweep.recipe
    place = Workplace(recipe, out, base, device)
    facts = environment(place, command)
    del facts["seed"]  # a sweep has several
    return SweepReport(
        title=finished[0].recipe.title if finished[0].recipe.title.endswith("(smoke run)") else recipe.title or recipe.name,
        summary=" ".join(recipe.description.split()),
        seeds=config.seeds,
        runs=(len(finished), len(sweep.runs)),
        measures={name: tuple(task for task in tasks if task in metrics) for name, tasks in config.measure.items()},
        metrics={name: kinds.get(name, "mean") for name in metrics},
        groups=[SweepGroup(g.title, g.note, tuple(n for n in g.variants if n in scores)) for g in config.group],
        variants={name: VariantScores(config.variant[name].title, _ranges(found)) for name, found in scores.items()},
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


def _scores(config: SweepConfig, runs: list[SweepRun], out: Path, base: Path) -> dict[str, SeedScores]:
    """Tasks first, in the order of the measures, then measures, then overall."""
    found = {run.seed: _results(run, out, base) for run in runs}
    present = set.intersection(*(set(results) for results in found.values()))
    measures = {name: [task for task in tasks if task in present] for name, tasks in config.measure.items()}
    measures = {name: tasks for name, tasks in measures.items() if tasks}
    scores = {
        task: seed_scores({seed: results[task] for seed, results in found.items()})
        for tasks in measures.values()
        for task in tasks
    }
    means = {name: mean_scores([scores[task] for task in tasks]) for name, tasks in measures.items()}
    return {**scores, **means, OVERALL: mean_scores(list(means.values()))}


def _ranges(scores: Scores) -> dict[str, Range]:
    return {name: _range(found, over_items=False) for name, found in scores.items()}


def _range(scores: SeedScores, *, over_items: bool) -> Range:
    interval = scores.interval() if over_items else scores.seed_interval()
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return Range(scores.mean, low, high, tuple(float(value) for value in scores.values_S))


def _claim(claim: Claim, scores: Mapping[str, Scores]) -> ClaimResult:
    """The verdict on a claim, by the interval of the difference alone; nan-free: a metric not run is told as such."""
    better, worse = scores[claim.better], scores[claim.worse]
    if claim.metric not in better or not set(better[claim.metric].seeds) & set(worse[claim.metric].seeds):
        return ClaimResult(claim.text, claim.better, claim.worse, claim.metric, claim.paper, None, "cannot be told")
    difference = better[claim.metric] - worse[claim.metric]
    shown = _range(difference, over_items=True)
    return ClaimResult(claim.text, claim.better, claim.worse, claim.metric, claim.paper, shown, verdict(difference.interval()))
