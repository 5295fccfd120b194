"""Is one system better than another: paired tests between two result folders or two TREC runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from openembed.data.readers import read_run, read_trec_qrels
from openembed.evaluation.metrics import canonical, per_query
from openembed.evaluation.pair_classification import average_precision
from openembed.evaluation.result import TaskResult
from openembed.evaluation.runner import read_results
from openembed.evaluation.statistics import PairedTest, generator, paired_mean_test, paired_statistic_test
from openembed.evaluation.sts import spearman


@dataclass(frozen=True)
class Comparison:
    """The paired test of one task."""

    task: str
    test: PairedTest

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return {"task": self.task, **self.test.as_dict()}


def compare_runs(a: str | Path, b: str | Path, qrels: str | Path, *, metric: str = "ndcg_at_10", seed: int = 42) -> Comparison:
    """Returns the paired test of two TREC run files over all judged queries; a query a run lacks scores 0."""
    metric = canonical(metric)
    judgements = read_trec_qrels(qrels)
    scores_a = per_query(read_run(a), judgements, (metric,))[metric]
    scores_b = per_query(read_run(b), judgements, (metric,))[metric]
    return Comparison(Path(qrels).stem, paired_mean_test(scores_a, scores_b, generator(seed, "compare"), metric=metric))


def compare_results(a: str | Path, b: str | Path, *, metric: str | None = None, seed: int = 42) -> list[Comparison]:
    """Returns the paired test of every task that two result folders share.

    ``metric`` instead of each task's main one. Raises ``ValueError`` when they share no task or a task's splits differ.
    """
    results_a, results_b = read_results(a), read_results(b)
    shared = [task for task in results_a if task in results_b]
    if not shared:
        raise ValueError(f"{a} and {b} share no task: {', '.join(results_a)} against {', '.join(results_b)}")
    return [Comparison(task, _test(task, results_a[task], results_b[task], metric, seed)) for task in shared]


def _test(
    task: str,
    a: tuple[TaskResult, Mapping[str, Any]],
    b: tuple[TaskResult, Mapping[str, Any]],
    metric: str | None,
    seed: int,
) -> PairedTest:
    (result_a, items_a), (result_b, items_b) = a, b
    if result_a.split != result_b.split:
        raise ValueError(f"{task}: one result is of split {result_a.split!r}, the other of {result_b.split!r}")
    name, rng = metric or result_a.metric, generator(seed, "compare", task)
    if name in items_a["per_item"] and name in items_b["per_item"]:
        return paired_mean_test(items_a["per_item"][name], items_b["per_item"][name], rng, metric=name)
    arrays_a, arrays_b = _arrays(items_a), _arrays(items_b)
    statistic = {"cosine_spearman": _spearman, "max_ap": _max_ap}.get(name)
    if statistic is None or not arrays_a or not arrays_b:
        known = ", ".join(items_a["per_item"]) or "none"
        raise ValueError(f"{task}: {name} has no per-item scores to pair (per-item metrics: {known})")
    if not np.array_equal(arrays_a["gold"], arrays_b["gold"]):
        raise ValueError(f"{task}: the two results are of different data; evaluate both on the same files")
    count = len(arrays_a["gold"])
    return paired_statistic_test(
        count, lambda index: statistic(arrays_a, index), lambda index: statistic(arrays_b, index), rng, metric=name
    )


def _arrays(items: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(values, dtype=np.float64) for name, values in items["paired"].items()}


def _spearman(arrays: dict[str, np.ndarray], index: np.ndarray) -> float:
    return spearman(arrays["cosine"][index], arrays["gold"][index])


def _max_ap(arrays: dict[str, np.ndarray], index: np.ndarray) -> float:
    gold = arrays["gold"][index]
    return max(average_precision(values[index], gold) for name, values in arrays.items() if name != "gold")
