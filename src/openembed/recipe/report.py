"""The report of a run folder, from what its stages wrote."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from openembed import __version__
from openembed.data.mine import AUDIT
from openembed.files import read_json, read_jsonl
from openembed.recipe.config import BM25, UNTRAINED, EvaluateStage, FilterStage, MineStage, SearchStage, TrainStage
from openembed.recipe.stages import METRICS, MINED_REPORT, SEARCHES, Workplace, folder_name
from openembed.report import Cleaning, Cost, Hit, Removal, Report, Score, Search, TaskScores, TrainingRun

METRIC_NAMES = {
    "ndcg_at_10": "nDCG@10",
    "recall_at_100": "recall@100",
    "cosine_spearman": "Spearman",
    "accuracy": "accuracy",
    "map_at_1000": "MAP",
    "max_ap": "average precision",
    "v_measure": "V-measure",
}
REASONS = ("exact", "contains", "near_duplicate", "bm25", "duplicate", "near_duplicate_row")
"""Why a filter stage removes rows, in the order it looks."""
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "numpy")


def build_report(place: Workplace, command: str = "") -> Report:
    """Returns the report of what the finished stages of ``place`` wrote."""
    recipe = place.recipe
    training = [
        TrainingRun(label(name), [row for _, row in read_jsonl(place.out / name / METRICS)])
        for name, stage in recipe.stage.items()
        if isinstance(stage, TrainStage) and (place.out / name / METRICS).is_file()
    ]
    searches = [
        Search(answer["query"], label(answer["system"]), [Hit(h["score"], h["text"], h["title"]) for h in answer["hits"]])
        for name, stage in recipe.stage.items()
        if isinstance(stage, SearchStage) and (place.out / name / SEARCHES).is_file()
        for answer in read_json(place.out / name / SEARCHES)
    ]
    systems = _systems(place)
    return Report(
        title=recipe.title or recipe.name,
        summary=" ".join(recipe.description.split()),
        systems=[label(system) for system in systems],
        baseline=label(BM25),
        tasks=task_scores(place),
        training=training,
        searches=searches,
        cleaning=_cleaning(place),
        recipe=recipe.to_toml(),
        environment=environment(place, command),
        mining=_audits(place),
    )


def _audits(place: Workplace) -> list[tuple[str, dict[str, Any]]]:
    """The audit of every mined source, named for its stage and itself."""
    return [
        (f"{label(name)}: {source.name}", read_json(path))
        for name, stage in place.recipe.stage.items()
        if isinstance(stage, MineStage)
        for source in stage.sources
        if (path := place.out / name / source.name / AUDIT).is_file()
    ]


def task_scores(place: Workplace) -> list[TaskScores]:
    """Returns the scores of every model on every task of the recipe's evaluate stages."""
    tasks = []
    for name, stage in place.recipe.stage.items():
        if not isinstance(stage, EvaluateStage):
            continue
        p_values = _p_values(place.out / name, stage)
        for task in stage.tasks:
            scores, costs, metric = {}, {}, ""
            for model in stage.models:
                path = place.out / name / folder_name(model) / task.name.replace("/", "__") / "result.json"
                if path.is_file():
                    result = read_json(path)["result"]
                    scores[label(model)] = Score(result["value"], *(result["interval"] or ()))
                    metric = METRIC_NAMES.get(result["metric"], result["metric"])
                    if result.get("costs"):
                        costs[label(model)] = cost(result["costs"])
            if scores:
                tasks.append(TaskScores(task.name, metric, scores, task.note, p_values.get(task.name, {}), costs))
    return tasks


def cost(costs: dict[str, Any]) -> Cost:
    """Returns what the report shows of a result's costs (:mod:`openembed.evaluation.costs`)."""
    of = {"dense": "dimensions", "tokens": "token vectors"}.get(costs["kind"], "terms")
    return Cost(costs["document_bytes"], costs.get("query_ms"), costs["document_entries"], of)


def _cleaning(place: Workplace) -> list[Cleaning]:
    """What the filter stages removed."""
    found = []
    for name, stage in place.recipe.stage.items():
        if not isinstance(stage, FilterStage) or not (place.out / name / MINED_REPORT).is_file():
            continue
        report = read_json(place.out / name / MINED_REPORT)
        sources = {source: (row["rows"], row["kept"], row["removed"]) for source, row in report["sources"].items()}
        reasons = dict.fromkeys(reason for _, _, counts in sources.values() for reason in counts)
        against = {row["name"]: (row["texts"], sum(row["matched"].values())) for row in report["against"]}
        keys = ("source", "reason", "score", "text", "set", "match")
        samples = [Removal(**{key: row[key] for key in keys}) for row in report["samples"]]
        found.append(Cleaning(label(name), sorted(reasons, key=REASONS.index), sources, against, samples))
    return found


def _p_values(folder: Path, stage: EvaluateStage) -> dict[str, dict[str, float]]:
    """Task → system → p-value of the paired test between the last model of the stage and that system."""
    from openembed.evaluation.compare import compare_results

    final = [model for model in stage.models if model != BM25][-1:]
    found: dict[str, dict[str, float]] = {}
    for other in stage.models:
        try:
            compared = (
                compare_results(folder / folder_name(other), folder / folder_name(final[0])) if other not in final else []
            )
        except (ValueError, IndexError):
            continue  # not evaluated yet, or nothing in common that could be paired
        for comparison in compared:
            found.setdefault(comparison.task, {})[label(other)] = comparison.test.p_bootstrap
    return found


def label(model: str) -> str:
    """Returns a model reference as people write it: ``bm25`` → BM25, ``stage1`` → stage 1."""
    if model == BM25:
        return "BM25"
    return f"stage {model[5:]}" if model.startswith("stage") and model[5:].isdigit() else model


def environment(place: Workplace, command: str) -> dict[str, str]:
    """Returns what is needed to run it again: command, seed, device, versions."""
    import torch

    device = place.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    versions = {package: metadata.version(package) for package in PACKAGES}
    return {
        **({"command": command} if command else {}),
        "recipe": place.recipe.name,
        "seed": str(place.recipe.seed),
        "device": f"{device} ({name}), {torch.get_num_threads()} threads, {os.cpu_count()} cores",
        "openembed": __version__,
        "python": platform.python_version(),
        **versions,
    }


def _systems(place: Workplace) -> list[str]:
    """The models of all evaluate stages: untrained first, then in the order given, BM25 last."""
    models = [m for stage in place.recipe.stage.values() if isinstance(stage, EvaluateStage) for m in stage.models]
    return sorted(dict.fromkeys(models), key=lambda model: (model == BM25, model != UNTRAINED))
