"""The texts of evaluation sets, which training must not hold, from every layout that ``openembed evaluate`` reads.

A retrieval folder gives its judged queries and its documents; any other folder the texts of its split files; a file its
rows. The columns that hold texts are known by name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from openembed.config import Config
from openembed.data.overlap import normalised
from openembed.data.readers import beir_splits, read_beir_qrels, read_corpus, read_queries
from openembed.files import read_jsonl

COLUMNS = (
    "text",
    "query",
    "question",
    "positive",
    "positives",
    "negative",
    "negatives",
    "candidates",
    "sentence1",
    "sentence2",
    "sentences",
)
"""Columns of rows that hold texts, as a text or a list of them."""
SPLIT_ORDER = ("test", "dev", "validation", "val")


class EvaluationSet(Config):
    """An evaluation set to keep out of training.

    ``path``: a task folder, a folder of them, or a JSON-lines file. ``splits``: which are evaluated (default: the one that
    ``openembed evaluate`` chooses: test, or else dev; every split but ``train`` where neither is there).
    ``documents`` of a retrieval folder: ``all``; ``judged`` for these splits alone, for a corpus that training shares;
    or ``none``. ``columns``: those that hold texts, where they have other names; ``where``: only rows with these values.
    """

    name: str = ""
    path: str
    splits: tuple[str, ...] = ()
    documents: Literal["all", "judged", "none"] = "all"
    columns: tuple[str, ...] = ()
    where: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class EvaluationTexts:
    """Distinct texts of all sets (equal ones belong to the first set that has them), and what was read.

    ``known``: normalised text → number, with documents that have a title known without it too. ``sets`` are names by
    number, ``set_of`` the set of each text; ``counts`` has for each set its path, texts, texts no earlier set has, the
    SHA-256 of the files read, and ``empty``: folders and files in which no text was found.
    """

    texts: list[str]
    normalised: list[str]
    known: dict[str, int]
    set_of: list[int]
    sets: list[str]
    counts: list[dict[str, Any]]


def read_evaluation_texts(sets: Sequence[EvaluationSet], locate: Callable[[str], Path] = Path) -> EvaluationTexts:
    """Returns the texts of ``sets``; ``locate`` says where a set's path is.

    Raises ``ValueError`` naming the set when it is not there, lacks a split, holds no text, or two have one name.
    """
    found = EvaluationTexts([], [], {}, [], [], [])
    for number, config in enumerate(sets):
        name = config.name or config.path
        if name in found.sets:
            raise ValueError(f"two evaluation sets are named {name!r}; name one of them otherwise")
        reader = _Reader(config)
        total, before = 0, len(found.texts)
        for text, bare in reader.read(locate(config.path)):
            total += 1
            _add(found, text, bare, number)
        if not total:
            raise ValueError(f"evaluation set {config.path}: no texts; its rows need one of the columns {', '.join(COLUMNS)}")
        found.sets.append(name)
        row = {"name": name, "path": config.path, "splits": reader.splits_read, "documents": config.documents}
        row["empty"] = reader.empty
        new = len(found.texts) - before
        found.counts.append({**row, "texts": total, "new": new, "sha256": reader.digest.hexdigest()})
    return found


def _add(found: EvaluationTexts, text: str, bare: str, number: int) -> None:
    key = normalised(text)
    if key and key not in found.known:
        found.known[key] = len(found.texts)
        found.texts.append(text)
        found.normalised.append(key)
        found.set_of.append(number)
    if bare and (alone := normalised(bare)):
        found.known.setdefault(alone, found.known[key])


class _Reader:
    """Reads one set and remembers which splits and bytes it read."""

    def __init__(self, config: EvaluationSet) -> None:
        self.config = config
        self.digest = hashlib.sha256()
        self.splits_read: list[str] = []
        self.empty: list[str] = []

    def read(self, path: Path) -> Iterator[tuple[str, str]]:
        """Yields texts, and of documents with a title the text without it."""
        if path.is_file():
            yield from self._rows(path)
        elif not path.is_dir():
            raise ValueError(f"evaluation set {path}: no such file or folder")
        elif _file(path, "queries"):
            yield from self._retrieval(path)
        elif files := self._split_files(path):
            for file in files:
                yield from self._rows(file)
        else:
            children = sorted(item for item in path.iterdir() if item.is_dir() and not item.name.startswith("."))
            self.empty += [] if children else [str(path)]
            for child in children:
                yield from self.read(child)

    def _retrieval(self, folder: Path) -> Iterator[tuple[str, str]]:
        """Texts of judged queries (all, where there are no judgements to read) and of the documents asked for."""
        splits = self._chosen(beir_splits(folder), folder)
        qrels = [read_beir_qrels(self._hashed(folder / "qrels" / f"{split}.tsv")) for split in splits]
        judged = {query: documents for split in qrels for query, documents in split.items()}
        self._hashed(_require(folder, "queries"))
        yield from ((query.text, "") for query in read_queries(folder) if query.id in judged or not splits)
        corpus = _file(folder, "corpus")
        if corpus is None or self.config.documents == "none":
            return
        self._hashed(corpus)
        wanted = {document for split in qrels for documents in split.values() for document in documents}
        for document in read_corpus(folder):
            if self.config.documents == "all" or document.id in wanted:
                yield document.full_text, document.text if document.title else ""

    def _split_files(self, folder: Path) -> list[Path]:
        names = sorted({path.name.removesuffix(".gz").removesuffix(".jsonl") for path in folder.glob("*.jsonl*")})
        return [_require(folder, split) for split in self._chosen(names, folder)]

    def _chosen(self, names: Sequence[str], folder: Path) -> list[str]:
        wanted = list(self.config.splits)
        if missing := [split for split in wanted if split not in names]:
            if not names:
                return []
            raise ValueError(f"evaluation set {folder}: no split {missing[0]!r}; it has {', '.join(names)}")
        if not wanted:
            first = next((split for split in SPLIT_ORDER if split in names), None)
            wanted = [first] if first else [name for name in names if name != "train"]
        self.splits_read += [split for split in wanted if split not in self.splits_read]
        return wanted

    def _rows(self, path: Path) -> Iterator[tuple[str, str]]:
        columns, empty = self.config.columns or COLUMNS, True
        for _, row in read_jsonl(self._hashed(path)):
            if all(str(row.get(key)) == value for key, value in self.config.where.items()):
                for text in row_texts(row, columns):
                    empty = False
                    yield text, ""
        if empty:
            self.empty.append(str(path))

    def _hashed(self, path: Path) -> Path:
        with path.open("rb") as file:
            self.digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        return path


def row_texts(row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> Iterator[str]:
    """Yields the texts of a row: of its columns, of the items of lists, and of objects with a ``text``."""
    for column in columns:
        value = row.get(column)
        for item in value if isinstance(value, list) else [value]:
            text = item.get("text") if isinstance(item, Mapping) else item
            if isinstance(text, str):
                yield text


def _file(folder: Path, stem: str) -> Path | None:
    return next((path for suffix in (".jsonl", ".jsonl.gz") if (path := folder / f"{stem}{suffix}").exists()), None)


def _require(folder: Path, stem: str) -> Path:
    path = _file(folder, stem)
    if path is None:
        raise ValueError(f"evaluation set {folder}: holds neither {stem}.jsonl nor {stem}.jsonl.gz")
    return path
