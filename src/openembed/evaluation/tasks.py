"""Tasks as data: a folder in one of the known layouts, described by what it holds and an optional ``task.toml``.

Layouts (``.jsonl`` or ``.jsonl.gz``): retrieval ``corpus``, ``queries`` and ``qrels/<split>.tsv``; all others
``<split>`` files whose rows have ``sentence1, sentence2, score`` (STS), ``sentence1, sentence2, label`` (pair
classification), ``query, positive, negative`` (reranking), ``text, label`` with a ``train`` split (classification) or
without (clustering), or ``sentences, labels`` lists (clustering, one set a row).
"""

from __future__ import annotations

import hashlib
import logging
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from openembed.config import Config, parse
from openembed.data.readers import beir_splits
from openembed.files import parse_value, read_lines
from openembed.index.lexical import STEMMERS

log = logging.getLogger(__name__)

Kind = Literal["retrieval", "reranking", "sts", "pair_classification", "classification", "clustering"]
METRICS: dict[str, str] = {
    "retrieval": "ndcg_at_10",
    "reranking": "map_at_1000",
    "sts": "cosine_spearman",
    "pair_classification": "max_ap",
    "classification": "accuracy",
    "clustering": "v_measure",
}
FIXED_METRIC = frozenset({"sts", "pair_classification", "clustering"})
LANGUAGES = frozenset(STEMMERS) | {"ja", "ko", "th", "vi", "zh"}
SPLIT_ORDER = ("test", "dev", "validation", "val")
LAYOUTS = (
    "corpus.jsonl + queries.jsonl + qrels/<split>.tsv (retrieval), or <split>.jsonl with sentence1, sentence2, score "
    "(STS); sentence1, sentence2, label (pair classification); query, positive, negative (reranking); text, label with "
    "a train split (classification) or without (clustering); each may be .jsonl.gz"
)


class TaskFile(Config):
    """What ``task.toml`` may set; everything left out is found from the files.

    ``prompt_task``: the name the model's instruction table has for this task. ``fraction`` and ``max_documents``: how
    much of a clustering set is embedded (mteb's default 4 %). ``protocol`` chooses mteb's clustering protocol.
    """

    name: str | None = None
    kind: Kind | None = None
    split: str | None = None
    metric: str | None = None
    language: str | None = None
    instruction: str | None = None
    document_instruction: str | None = None
    prompt_task: str | None = None
    ignore_identical_ids: bool = False
    samples_per_label: int = Field(8, gt=0)
    experiments: int = Field(10, gt=0)
    fraction: float | None = Field(0.04, gt=0, le=1)
    max_documents: int | None = Field(None, gt=0)
    protocol: Literal["bootstrap", "whole"] = "bootstrap"


class Task(TaskFile):
    """A task whose name, kind, split, metric and language are settled."""

    name: str
    kind: Kind
    split: str
    metric: str
    language: str
    folder: Path

    @property
    def prompt_names(self) -> tuple[str, ...]:
        """Names under which a model's instruction table may know the task."""
        return tuple(name for name in (self.prompt_task, self.name) if name)

    def files(self) -> list[Path]:
        """Returns the files the score depends on, sorted."""
        stems = {"retrieval": ("corpus", "queries"), "classification": ("train", self.split)}.get(self.kind, (self.split,))
        found = [path for stem in stems if (path := _split_file(self.folder, stem))]
        qrels = self.folder / "qrels" / f"{self.split}.tsv"
        return sorted([*found, qrels] if self.kind == "retrieval" else found)

    def digest(self) -> str:
        """Returns the SHA-256 of the files' contents."""
        digest = hashlib.sha256()
        for path in self.files():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def find_tasks(root: str | Path, overrides: dict[str, Any] | None = None) -> list[Task]:
    """Returns the task of folder ``root``, or all tasks of the folders in it, in the order of their names.

    ``overrides`` (fields of :class:`TaskFile`) win over ``task.toml``. Folders in no known layout, and folders in
    ``root`` without the split asked for, are passed over with a warning. Raises ``ValueError`` when nothing is found, and
    ``FileNotFoundError`` when ``root`` is no folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; --data takes a task folder or a folder of them")
    lacking: list[str] = []
    tasks = list(_walk(root, root, overrides or {}, lacking))
    if not tasks and lacking:
        raise ValueError("\n".join(lacking))
    if not tasks:
        raise ValueError(f"{root}: holds no task in a known layout; known are {LAYOUTS}")
    _require_distinct(tasks)
    return tasks


def find_all_tasks(roots: Sequence[str | Path], overrides: dict[str, Any] | None = None) -> list[Task]:
    """Returns the tasks of all ``roots``, in their order; ``ValueError`` when two have one name."""
    tasks = [task for root in roots for task in find_tasks(root, overrides)]
    _require_distinct(tasks)
    return tasks


def _require_distinct(tasks: Sequence[Task]) -> None:
    first: dict[str, Path] = {}
    for task in tasks:
        if task.name in first:
            raise ValueError(
                f"{first[task.name]} and {task.folder}: two tasks are named {task.name!r}; set another name in task.toml"
            )
        first[task.name] = task.folder


def read_task(folder: Path, name: str, overrides: dict[str, Any]) -> Task | None:
    """Returns the task of ``folder``, or None when it has no ``task.toml`` and is in no known layout."""
    path = folder / "task.toml"
    given = _read_toml(path) if path.exists() else {}
    settings = parse(TaskFile, {**given, **overrides}, str(path))
    splits = _splits(folder)
    kind = settings.kind or _detect(folder, splits)
    if kind is None:
        if path.exists():
            raise ValueError(f"{path}: the files beside it are in no known layout; known are {LAYOUTS}")
        return None
    values = settings.model_dump()
    values["name"] = settings.name or name
    values["kind"] = kind
    values["metric"] = _metric(kind, settings.metric, folder)
    values["language"] = settings.language or _language(name)
    return Task(**values | {"folder": folder, "split": _choose_split(folder, splits, settings.split, kind)})


class NoSplit(ValueError):
    """A task's folder has not the split asked for, or none to choose."""


def _walk(folder: Path, root: Path, overrides: dict[str, Any], lacking: list[str]) -> Iterator[Task]:
    try:
        task = read_task(folder, _name(folder, root), overrides)
    except NoSplit as error:
        if folder == root:
            raise
        log.warning("%s; passed over", error)
        lacking.append(str(error))
        return
    if task is not None:
        yield task
        return
    children = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name != "qrels")
    if not children and any(_splits(folder)):
        log.warning("%s: in no known layout, passed over", folder)
    for child in children:
        yield from _walk(child, root, overrides, lacking)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None


def _detect(folder: Path, splits: list[str]) -> Kind | None:
    if _split_file(folder, "corpus") and _split_file(folder, "queries"):
        return "retrieval"
    for split in sorted(splits, key=lambda name: (*SPLIT_ORDER, name).index(name)):
        keys = _first_keys(folder, split)
        if {"sentence1", "sentence2"} <= keys:
            return "sts" if "score" in keys else "pair_classification" if "label" in keys else None
        if {"query", "positive", "negative"} <= keys:
            return "reranking"
        if {"sentences", "labels"} <= keys:
            return "clustering"
        if {"text", "label"} <= keys:
            return "classification" if "train" in splits else "clustering"
        return None
    return None


def _first_keys(folder: Path, split: str) -> set[str]:
    """The keys of the first row; none where rows are no objects, since such a file is in no layout."""
    path = _split_file(folder, split)
    lines = read_lines(path) if path else iter(())
    first = next((parse_value(path, number, line) for number, line in lines if line.strip()), None)
    return set(first) if isinstance(first, dict) else set()


def _splits(folder: Path) -> list[str]:
    if _split_file(folder, "corpus"):
        return beir_splits(folder)
    names = {path.name.removesuffix(".gz").removesuffix(".jsonl") for path in folder.glob("*.jsonl*")}
    return sorted(names - {"corpus", "queries"})


def _choose_split(folder: Path, splits: list[str], wanted: str | None, kind: str) -> str:
    usable = [split for split in splits if kind != "classification" or split != "train"]
    if wanted is None:
        wanted = next((split for split in SPLIT_ORDER if split in usable), usable[0] if len(usable) == 1 else None)
        if wanted is None:
            raise NoSplit(f"{folder}: no test or dev split; choose one with --split: {', '.join(usable) or 'none'}")
    if wanted not in usable:
        raise NoSplit(f"{folder}: no split {wanted!r}; it has {', '.join(usable) or 'none'}")
    return wanted


def _metric(kind: str, wanted: str | None, folder: Path) -> str:
    if wanted is not None and kind in FIXED_METRIC and wanted != METRICS[kind]:
        raise ValueError(f"{folder}: {kind} is scored by {METRICS[kind]}, got metric {wanted!r}")
    return wanted or METRICS[kind]


def _language(name: str) -> str:
    """A two-letter code that is a part of the name (``stsb/pl``, ``poquad-pl``), or English."""
    last = name.replace("-", "/").replace("_", "/").split("/")[-1]
    return last if last in LANGUAGES else "en"


def _name(folder: Path, root: Path) -> str:
    """The path below ``root``; a language's folder is named after what it is a language of (``stsb/pl``)."""
    below = folder.relative_to(root).parts
    above = root.resolve()
    if not below:
        return f"{above.parent.name}/{above.name}" if above.name in LANGUAGES else above.name
    return "/".join((above.name, *below) if below[0] in LANGUAGES else below)


def _split_file(folder: Path, stem: str) -> Path | None:
    for suffix in (".jsonl", ".jsonl.gz"):
        if (folder / f"{stem}{suffix}").exists():
            return folder / f"{stem}{suffix}"
    return None
