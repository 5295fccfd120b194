"""mteb's own task classes on our encoders, offline: an adapter, a loader of local folders, results in mteb's format.

Needs the extra ``openembed[eval]``. The data come from folders in the layouts of :mod:`openembed.evaluation.tasks`;
mteb never asks the hub for them. Results lie as mteb keeps them: ``results/<model>/<revision>/<Task>.json``.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openembed.data.readers import read_beir
from openembed.evaluation.prompts import KIND_INSTRUCTIONS, KIND_NAMES, find_entry, plain
from openembed.evaluation.result import TaskResult
from openembed.evaluation.retrieval import reranking_qrels
from openembed.evaluation.rows import read_labelled, read_pairs, read_reranking, read_sets
from openembed.evaluation.tasks import Task, find_tasks
from openembed.evaluation.vectors import TextEncoder

log = logging.getLogger(__name__)

KINDS = {name: kind for kind, name in KIND_NAMES.items()}
LANGUAGES = {
    "arb": "ar", "ces": "cs", "dan": "da", "deu": "de", "ell": "el", "eng": "en", "spa": "es", "fin": "fi", "fra": "fr",
    "hin": "hi", "hun": "hu", "ita": "it", "nld": "nl", "nob": "no", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru",
    "swe": "sv", "tur": "tr", "zho": "zh", "cmn": "zh",
}  # fmt: skip


def require_mteb() -> Any:
    """Returns the mteb module; raises ``ValueError`` naming the extra when it is not installed."""
    for package in ("mteb", "datasets"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed; mteb's task classes need: pip install 'openembed[eval]'")
    import mteb

    return mteb


class MtebEncoder:
    """An encoder as mteb's ``EncoderProtocol`` wants it.

    Prompts: ``instruction`` where one is given; else the model's own entry for the task or its type, as mteb finds a
    prompt name; else, for a model with an instruction table, the task's prompt in mteb; else its query and document
    prompts. Retrieval documents carry an instruction only where mteb's task states one for documents.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        name: str,
        *,
        revision: str | None = None,
        instruction: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        require_mteb()
        from mteb.models import ModelMeta

        self.encoder, self._instruction, self._options = encoder, instruction, dict(options or {})
        self._meta = ModelMeta.create_empty(
            overwrites={
                "name": name if name.count("/") == 1 else f"openembed/{plain_name(name)}",
                "revision": revision or encoder.fingerprint[:40],
                "embed_dim": encoder.width,
                "use_instructions": bool(encoder.config.prompts.tasks) or instruction is not None,
            }
        )

    @property
    def mteb_model_meta(self) -> Any:
        """Returns mteb's ``ModelMeta``: name, revision (the encoder's fingerprint) and width."""
        return self._meta

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Returns vectors ``(N, D)`` float32 of all texts that ``inputs`` yields in batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        if not texts:
            return np.zeros((0, self.encoder.width), dtype=np.float32)
        prefix = self.prefix(task_metadata, None if prompt_type is None else str(getattr(prompt_type, "value", prompt_type)))
        return self.encoder.encode(texts, instruction=prefix, **self._options)

    def prefix(self, task_metadata: Any, side: str | None) -> str:
        """Returns what goes before the texts of a task's ``side`` (``query``, ``document`` or None: symmetric)."""
        table = self.encoder.config.prompts
        if self._instruction is not None:
            return "" if side == "document" else self.encoder.query_prompt(instruction=self._instruction)
        entry = self._entry(task_metadata, side)
        if entry in table.named:
            return table.named[entry]
        if entry is not None:
            return (self.encoder.document_prompt if side == "document" else self.encoder.query_prompt)(task=entry)
        if table.tasks:
            instruction = _mteb_instruction(task_metadata, side)
            return self.encoder.query_prompt(instruction=instruction) if instruction else ""
        if side is None:
            return ""
        return self.encoder.document_prompt() if side == "document" else self.encoder.query_prompt()

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of every pair, ``(N1, N2)``."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Returns the cosine of corresponding rows, ``(N,)``."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)

    def _entry(self, task_metadata: Any, side: str | None) -> str | None:
        from mteb.models.abs_encoder import get_prompt_name
        from mteb.types import PromptType

        table = self.encoder.config.prompts
        entries = dict.fromkeys((*table.tasks, *table.named), "")
        exact = get_prompt_name(entries, task_metadata, None if side is None else PromptType(side))
        specific = [entry for entry in entries if entry not in ("query", "document", "passage")]
        found = exact if exact not in (None, "query", "document", "passage") else None
        return found or find_entry(specific, (task_metadata.name, task_metadata.type)) or exact


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
    model = MtebEncoder(encoder, name, instruction=instruction, options=options)
    cache = None if out is None else mteb.ResultCache(Path(out))
    results = []
    for task_name in tasks:
        task = load_task(task_name, data, split)
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


def plain_name(name: str) -> str:
    """Returns the last part of a path or hub id, fit for a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(name).name) or "model"


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


def _mteb_instruction(task_metadata: Any, side: str | None) -> str:
    prompt, kind = task_metadata.prompt, KINDS.get(task_metadata.type)
    if isinstance(prompt, dict):
        return prompt.get(side or "query", "")
    if side == "document" and (prompt is None or kind == "retrieval"):
        return ""
    return prompt or KIND_INSTRUCTIONS.get(kind or "", "")


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
