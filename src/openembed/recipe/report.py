"""The report of a run folder, from what its stages wrote."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from openembed import __version__
from openembed.data.mine import AUDIT
from openembed.files import read_json, read_jsonl
from openembed.recipe.config import (
    BM25,
    UNTRAINED,
    EvaluateStage,
    FilterStage,
    InitialiseStage,
    MineStage,
    Recipe,
    SearchStage,
    TrainStage,
)
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
    tasks = task_scores(place)
    systems = _systems(recipe, tasks)
    return Report(
        title=recipe.title or recipe.name,
        summary=" ".join(recipe.description.split()),
        systems=[label(system) for system in systems],
        baseline=label(BM25),
        tasks=tasks,
        training=training,
        searches=searches,
        cleaning=_cleaning(place),
        recipe=recipe.to_toml(),
        environment=environment(place, command),
        mining=_audits(place),
        comparisons=[(label(after), label(before)) for after, before in comparisons(recipe)],
        finals=[label(final) for final in finals(recipe)],
        smoke=recipe.smoke,
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
        p_values = _p_values(place, name, stage)
        for task in stage.tasks:
            scores, costs, metric = {}, {}, ""
            for model in stage.systems:
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


def _p_values(place: Workplace, name: str, stage: EvaluateStage) -> dict[str, dict[tuple[str, str], float]]:
    """Task → (system, other) → p-value of their paired test, of every two that the report compares."""
    from openembed.evaluation.compare import compare_results

    folder, found = place.out / name, {}
    against = [(model, BM25) for model in finals(place.recipe) or stage.models if model != BM25]
    for after, before in [*comparisons(place.recipe), *against]:
        if not {after, before} <= set(stage.models):
            continue
        try:
            compared = compare_results(folder / folder_name(before), folder / folder_name(after))
        except ValueError:
            continue  # not evaluated yet, or nothing in common that could be paired
        for comparison in compared:
            found.setdefault(comparison.task, {})[label(after), label(before)] = comparison.test.p_bootstrap
    return found


def comparisons(recipe: Recipe) -> list[tuple[str, str]]:
    """Returns (after, before) for every train stage that is evaluated: it, and the nearest model it was made from that is.

    A stage after others is held against what the first of them started from too, where that is no stage: it is what all
    training together gained. What the untrained encoder was made from counts where nothing nearer is evaluated.
    """
    evaluated, pairs = _evaluated(recipe), []
    for name in _trained(recipe):
        made_from = [model for model in _origins(recipe, name) if model in evaluated]
        backbone = recipe.encoder.backbone.path if recipe.encoder is not None else None
        if not made_from and UNTRAINED in _origins(recipe, name) and backbone in evaluated:
            made_from = [backbone]
        base = [model for model in made_from if model not in recipe.stage]
        pairs += [(name, before) for before in dict.fromkeys(made_from[:1] + base)]
    return pairs


def finals(recipe: Recipe) -> list[str]:
    """Returns the train stages that are evaluated and that none of these goes on from."""
    trained = _trained(recipe)
    passed = {model for name in trained for model in _origins(recipe, name)}
    return [name for name in trained if name not in passed]


def _origins(recipe: Recipe, name: str) -> list[str]:
    """The models that stage ``name`` was made from, the nearest first; the last is no stage."""
    found = []
    while (stage := recipe.stage.get(name)) is not None:
        name = UNTRAINED if isinstance(stage, InitialiseStage) else stage.start
        found.append(name)
    return found


def _trained(recipe: Recipe) -> list[str]:
    evaluated = _evaluated(recipe)
    return [name for name, stage in recipe.stage.items() if isinstance(stage, TrainStage) and name in evaluated]


def _evaluated(recipe: Recipe) -> list[str]:
    """The models of all evaluate stages, in the order given."""
    models = [model for stage in recipe.stage.values() if isinstance(stage, EvaluateStage) for model in stage.models]
    return list(dict.fromkeys(models))


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


def _systems(recipe: Recipe, tasks: list[TaskScores]) -> list[str]:
    """What all evaluate stages score: untrained first, then in the order given, BM25 last; by other methods what has scores."""
    models, scored = _evaluated(recipe), {name for task in tasks for name in task.scores}
    named = (name for stage in recipe.stage.values() if isinstance(stage, EvaluateStage) for name in stage.systems)
    found = [name for name in dict.fromkeys(named) if name in models or label(name) in scored]
    return sorted(found, key=lambda name: (name == BM25, name.partition(" by ")[0] != UNTRAINED))
