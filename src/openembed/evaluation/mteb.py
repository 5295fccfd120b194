"""mteb's own task classes on our encoders, offline: an adapter, a loader of local folders, results in mteb's format.

Needs the extra ``openembed[eval]``. The data come from folders in the layouts of :mod:`openembed.evaluation.tasks`;
mteb never asks the hub for them. Results lie as mteb keeps them: ``results/<model>/<revision>/<Task>.json``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openembed.data.readers import read_beir
from openembed.evaluation.mteb_models import KINDS, MtebEncoder, MtebSearch, mteb_model, require_mteb
from openembed.evaluation.prompts import plain
from openembed.evaluation.result import TaskResult
from openembed.evaluation.retrieval import reranking_qrels
from openembed.evaluation.rows import read_labelled, read_pairs, read_reranking, read_sets
from openembed.evaluation.tasks import Task, find_tasks
from openembed.evaluation.vectors import TextEncoder

__all__ = ["MtebEncoder", "MtebSearch", "load_task", "mteb_model", "require_mteb", "run_mteb"]

log = logging.getLogger(__name__)

RANKED = ("retrieval", "reranking")
LANGUAGES = {
    "arb": "ar", "ces": "cs", "dan": "da", "deu": "de", "ell": "el", "eng": "en", "spa": "es", "fin": "fi", "fra": "fr",
    "hin": "hi", "hun": "hu", "ita": "it", "nld": "nl", "nob": "no", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru",
    "swe": "sv", "tur": "tr", "zho": "zh", "cmn": "zh",
}  # fmt: skip


def run_mteb(
    encoder: TextEncoder,
    name: str,
    tasks: Sequence[str],
    data: str | Path,
    out: str | Path | None = None,
    *,
    split: str | None = None,
    instruction: str | None = None,
    options: dict[str, Any] | None = None,
) -> list[TaskResult]:
    """Returns the results of mteb's task classes ``tasks`` on the local data of folder ``data``.

    With ``out`` mteb's JSON and its predictions are written there; a task that is there for the same model and data is
    not computed again. ``split`` names the local split to read where it differs from mteb's.
    """
    mteb = require_mteb()
    model = mteb_model(encoder, name, instruction=instruction, options=options)
    cache = None if out is None else mteb.ResultCache(Path(out))
    results = []
    for task_name in tasks:
        task = load_task(task_name, data, split)
        if isinstance(model, MtebSearch) and (kind := KINDS[task.metadata.type]) not in RANKED:
            allowed = " or ".join(RANKED)
            raise ValueError(f"{task_name}: mteb compares dense vectors in {kind}, {name} gives others; choose {allowed}")
        started = time.perf_counter()
        stored = None if cache is None else cache.load_task_result(task_name, model.mteb_model_meta)
        fresh = stored is None or stored.dataset_revision == task.metadata.dataset["revision"]
        scores = mteb.evaluate(
            model,
            task,
            cache=cache,
            overwrite_strategy="only-missing" if fresh else "always",
            prediction_folder=None if out is None else Path(out) / "predictions",
            show_progress_bar=False,
            co2_tracker=False,
        )
        result = _result(task, scores.task_results[0], name, time.perf_counter() - started)
        results.append(result)
    return results


def load_task(name: str, data: str | Path, split: str | None = None) -> Any:
    """Returns mteb's task ``name`` with its data read from a folder under ``data``, so that nothing is downloaded.

    The folder is the one whose name begins the task's (``scifact`` for ``SciFact``, ``stsb/en`` for ``STSBenchmark``)
    or
    ``data`` itself when it is a task folder. Raises ``ValueError`` for a name mteb does not have, a kind that
    cannot be read locally, or when no folder fits.
    """
    mteb = require_mteb()
    try:
        task = mteb.get_task(name)
    except KeyError as error:
        raise ValueError(f"mteb has no task {name!r} ({str(error).strip(chr(39))[:200]})") from None
    kind = KINDS.get(task.metadata.type)
    if kind is None:
        raise ValueError(f"{name} is of type {task.metadata.type}; local data are read for {', '.join(KINDS)}")
    subsets = _subsets(task, kind, find_tasks(data, {} if split is None else {"split": split}), str(data))
    eval_split = split if split in task.metadata.eval_splits else task.metadata.eval_splits[-1]
    task = mteb.get_task(name, eval_splits=[eval_split], hf_subsets=list(subsets) if task.metadata.is_multilingual else None)
    digest = "-".join(sorted({local.digest()[:12] for local in subsets.values()}))
    source = {**task.metadata.dataset, "revision": f"local-{digest}"[:120]}
    task.metadata = task.metadata.model_copy(update={"dataset": source})
    loaded = {subset: LOADERS[kind](local, task, eval_split) for subset, local in subsets.items()}
    nested = kind in ("retrieval", "reranking") or task.metadata.is_multilingual
    task.dataset = loaded if nested else loaded["default"]
    task.data_loaded = True
    return task


def _subsets(task: Any, kind: str, found: list[Task], data: str) -> dict[str, Task]:
    """mteb's subset → the local task that holds its data: the folders of its kind that share most of its name."""
    shared = {local: _shared_name(task.metadata.name, local) for local in found if local.kind == kind}
    longest = max(shared.values(), default=0)
    fitting = [local for local, length in shared.items() if length == longest]
    if longest == 0 and len(found) > 1:
        fitting = []
    if task.metadata.is_multilingual:
        chosen = {subset: local for subset in task.hf_subsets for local in fitting if local.language == subset}
    else:
        languages = {LANGUAGES.get(code.split("-")[0]) for code in task.metadata.languages}
        matching = [local for local in fitting if local.language in languages] or fitting
        chosen = {"default": matching[0]} if len(matching) == 1 else {}
    if not chosen:
        raise ValueError(
            f"{data}: no folder with the data of {task.metadata.name} ({kind}); its name must begin the task's. "
            f"Found: {', '.join(f'{local.name} ({local.kind})' for local in found)}"
        )
    return chosen


def _shared_name(task_name: str, local: Task) -> int:
    """Length of the longest folder name on the task's path that begins mteb's name of the task."""
    parts = {plain(part) for part in (*local.name.split("/"), local.folder.name, local.folder.parent.name)}
    return max((len(part) for part in parts if plain(task_name).startswith(part)), default=0)


def _retrieval(local: Task, task: Any, split: str) -> dict[str, Any]:
    from datasets import Dataset

    corpus, queries, qrels = read_beir(local.folder, local.split)
    documents = [{"id": d.id, "title": d.title, "text": d.text} for d in corpus]
    asked = [{"id": q.id, "text": q.text} for q in queries if q.id in qrels]
    values = {"corpus": Dataset.from_list(documents), "queries": Dataset.from_list(asked)}
    return {split: {**values, "relevant_docs": qrels, "top_ranked": None}}


def _reranking(local: Task, task: Any, split: str) -> dict[str, Any]:
    from datasets import Dataset

    usable, qrels, texts = reranking_qrels(read_reranking(local.folder, local.split))
    values = {
        "corpus": Dataset.from_list([{"id": identity, "title": "", "text": text} for identity, text in texts.items()]),
        "queries": Dataset.from_list([{"id": item.id, "text": item.query} for item in usable]),
        "relevant_docs": qrels,
        "top_ranked": {query_id: list(judged) for query_id, judged in qrels.items()},
    }
    return {split: values}


def _sts(local: Task, task: Any, split: str) -> Any:
    first, second, gold = read_pairs(local.folder, local.split, "score")
    left, right = task.column_names
    return _columns({split: {left: first, right: second, "score": gold}})


def _pair_classification(local: Task, task: Any, split: str) -> Any:
    first, second, labels = read_pairs(local.folder, local.split, "label")
    left, right, label = task.input1_column_name, task.input2_column_name, task.label_column_name
    return _columns({split: {left: first, right: second, label: [int(value) for value in labels]}})


def _classification(local: Task, task: Any, split: str) -> Any:
    read = {task.train_split: read_labelled(local.folder, "train"), split: read_labelled(local.folder, local.split)}
    return _columns(
        {name: {task.input_column_name: texts, task.label_column_name: labels} for name, (texts, labels) in read.items()}
    )


def _clustering(local: Task, task: Any, split: str) -> Any:
    from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy

    sets = read_sets(local.folder, local.split)
    texts: list[Any] = [list(texts) for texts, _ in sets]
    labels: list[Any] = [list(labels) for _, labels in sets]
    if not isinstance(task, AbsTaskClusteringLegacy):
        texts, labels = [t for one in texts for t in one], [label for one in labels for label in one]
    return _columns({split: {task.input_column_name: texts, task.label_column_name: labels}})


def _columns(splits: dict[str, dict[str, list[Any]]]) -> Any:
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})


LOADERS: dict[str, Callable[[Task, Any, str], Any]] = {
    "retrieval": _retrieval,
    "reranking": _reranking,
    "sts": _sts,
    "pair_classification": _pair_classification,
    "classification": _classification,
    "clustering": _clustering,
}


def _result(task: Any, scored: Any, system: str, seconds: float) -> TaskResult:
    split, rows = next(iter(scored.scores.items()))
    value = float(np.mean([row["main_score"] for row in rows]))
    numbers = {key: float(v) for key, v in rows[0].items() if isinstance(v, int | float)} if len(rows) == 1 else {}
    return TaskResult(
        task=task.metadata.name,
        kind=KINDS[task.metadata.type],
        split=split,
        system=system,
        metric=task.metadata.main_score,
        value=value,
        interval=None,
        metrics=numbers,
        counts={"subsets": len(rows)},
        seconds=seconds,
        details={"subsets": {row["hf_subset"]: row["main_score"] for row in rows}, "mteb_version": scored.mteb_version},
    )
