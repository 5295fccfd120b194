"""Runs tasks for a system and keeps the results: a task is never computed twice for the same model and data.

Folder layout: ``<out>/<task>/result.json`` (scores, written last), ``items.json`` (per-query scores), ``run.trec``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openembed.data.readers import read_run, write_run
from openembed.evaluation.result import Outcome, TaskResult
from openembed.evaluation.systems import System
from openembed.evaluation.tasks import Task
from openembed.files import read_json, write_json

log = logging.getLogger(__name__)

PROTOCOL_VERSION = 1
RESULT_FILE = "result.json"
ITEMS_FILE = "items.json"
RUN_FILE = "run.trec"


def run_tasks(
    system: System,
    tasks: Sequence[Task],
    out: str | Path | None = None,
    *,
    run_file: str | Path | None = None,
) -> list[TaskResult]:
    """Returns the results of ``tasks`` in order.

    With ``out`` each finished task is written there at once, and one that is already there for the same model, data and
    settings is read instead of computed, so an interrupted run goes on where it stopped. ``run_file``
    receives the ranking of a single retrieval task.
    """
    results = []
    for task in tasks:
        result = _run_task(system, task, None if out is None else task_folder(out, task.name), run_file)
        results.append(result)
    return results


def task_folder(out: str | Path, name: str) -> Path:
    """Returns the folder of a task's results."""
    return Path(out) / name.replace("/", "__")


def read_results(out: str | Path) -> dict[str, tuple[TaskResult, dict[str, Any]]]:
    """Returns task name → (result, items) of a results folder, or of one task's folder in it.

    Raises ``ValueError`` when there are none.
    """
    out = Path(out)
    paths = [out / RESULT_FILE] if (out / RESULT_FILE).exists() else sorted(out.glob(f"*/{RESULT_FILE}"))
    if not paths:
        raise ValueError(f"{out}: holds no {RESULT_FILE}; give a folder written by openembed evaluate --out")
    found = {}
    for path in paths:
        result = TaskResult.from_dict(read_json(path)["result"])
        found[result.task] = (result, read_json(path.with_name(ITEMS_FILE)))
    return found


def _run_task(system: System, task: Task, folder: Path | None, run_file: str | Path | None) -> TaskResult:
    identity = _identity(system, task)
    if folder is not None and (finished := _finished(folder, identity)) is not None:
        log.info("%s: already evaluated, read from %s", task.name, folder)
        if run_file is not None and folder is not None:
            write_run(run_file, read_run(folder / RUN_FILE), tag=_tag(system.name))
        return finished
    started = time.perf_counter()
    outcome = system.evaluate(task)
    result = TaskResult(
        task=task.name,
        kind=task.kind,
        split=task.split,
        system=system.name,
        metric=outcome.metric,
        value=outcome.value,
        interval=outcome.interval,
        metrics=dict(outcome.metrics),
        counts=dict(outcome.counts),
        seconds=time.perf_counter() - started,
        prompts=system.prompts(task),
        details=dict(outcome.details),
        costs=dict(outcome.costs),
    )
    if run_file is not None and outcome.run is not None:
        write_run(run_file, outcome.run, tag=_tag(system.name))
    if folder is not None:
        _write(folder, identity, result, outcome)
    return result


def _write(folder: Path, identity: str, result: TaskResult, outcome: Outcome) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    if outcome.run is not None:
        write_run(folder / RUN_FILE, outcome.run, tag=_tag(result.system))
    write_json(folder / ITEMS_FILE, {"per_item": outcome.per_item, "paired": outcome.paired})
    write_json(folder / RESULT_FILE, {"identity": identity, "result": result.as_dict()})


def _finished(folder: Path, identity: str) -> TaskResult | None:
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    stored = read_json(path)
    return TaskResult.from_dict(stored["result"]) if stored.get("identity") == identity else None


def _identity(system: System, task: Task) -> str:
    settings = task.model_dump(mode="json", exclude={"folder"})
    parts = [PROTOCOL_VERSION, system.fingerprint, system.prompts(task), settings, task.digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tag(name: str) -> str:
    return "-".join(name.split()) or "openembed"
