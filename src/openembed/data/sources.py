"""Sources of training examples: files, BEIR folders and hub data sets, and how their rows become examples."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from openembed.config import Config
from openembed.data.examples import parse_example
from openembed.data.readers import read_beir
from openembed.files import read_jsonl
from openembed.records import Document, Example, Query
from openembed.seeds import generator

POOLED_POSITIVES = 8
POOLED_NEGATIVES = 32
"""Class and label constructions give each example this many random documents; every batch draws anew from them."""


class HubConfig(Config):
    """A data set of the Hugging Face hub."""

    id: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None


class SourceConfig(Config):
    """One source of training examples and what its rows are allowed in a batch.

    ``path``: a JSON-lines file or a BEIR folder (``split`` names its qrels); ``package:...`` is inside the installed
    package. ``columns``: field → column, where the data names it differently. ``construction``: ``pairs`` (rows are
    examples); ``label_text`` (fields text, label_text: the label's text is the document); ``class_examples`` (fields
    text, label: another text of the class is the document, NV-Embed v2 section 4); ``scored_pairs`` (fields sentence1,
    sentence2, score: each pair from ``minimum_score`` up, in both directions); ``texts`` (field text: unlabelled, each
    text its own positive, for objectives that need no pairs). ``instruction`` and
    ``document_instruction`` are task descriptions, rendered by the model's template; empty means the model's default
    prompt. ``weight`` scales how often rows are drawn, ``loss_weight`` what a row counts; ``count`` caps the examples.
    """

    name: str = Field(min_length=1)
    path: str | None = None
    split: str = "train"
    hub: HubConfig | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    construction: Literal["pairs", "label_text", "class_examples", "scored_pairs", "texts"] = "pairs"
    instruction: str = ""
    document_instruction: str = ""
    in_batch: bool = True
    weight: float = Field(default=1.0, gt=0)
    loss_weight: float = Field(default=1.0, ge=0)
    count: int | None = Field(default=None, ge=1)
    minimum_score: float = 4.0

    @model_validator(mode="after")
    def _one_origin(self) -> SourceConfig:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"source {self.name!r}: give either path or hub")
        return self


def load_source(config: SourceConfig, base_dir: str | Path = ".", seed: int = 0) -> list[Example]:
    """Returns the examples of a source, a pure function of its data, ``config`` and ``seed``.

    A relative ``path`` counts from ``base_dir``. Raises ``ValueError`` naming the source when its data is missing,
    unreachable, malformed, or gives no example.
    """
    folder = None if config.path is None else _resolve(config.path, Path(base_dir))
    if folder is not None and folder.is_dir():
        if config.construction != "pairs":
            raise ValueError(f"source {config.name!r}: a BEIR folder holds pairs, not {config.construction}")
        examples = _beir(folder, config)
    else:
        examples = _construct(config, _rows(config, folder), generator(seed, "source", config.name))
    if not examples:
        raise ValueError(f"source {config.name!r}: no examples in {config.path or config.hub}")
    if config.count is not None and config.count < len(examples):
        chosen = generator(seed, "count", config.name).choice(len(examples), size=config.count, replace=False)
        examples = [examples[index] for index in sorted(chosen.tolist())]
    return examples


def _resolve(path: str, base_dir: Path) -> Path:
    if path.startswith("package:"):
        return Path(str(resources.files("openembed"))) / path.removeprefix("package:")
    return base_dir / path


def _rows(config: SourceConfig, path: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, row) with columns renamed to our field names."""
    if path is not None:
        if not path.exists():
            raise ValueError(f"source {config.name!r}: {path}: no such file or folder")
        raw: Iterator[tuple[Any, Mapping[str, Any]]] = read_jsonl(path)
        origin = str(path)
    else:
        raw = enumerate(_hub_rows(config), 1)
        origin = f"source {config.name!r}"
    for number, row in raw:
        renamed = dict(row)
        for field, column in config.columns.items():
            if column not in row:
                raise ValueError(f"{origin}:{number}: no column {column!r} (for {field}); has {', '.join(sorted(row))}")
            renamed[field] = row[column]
        yield f"{origin}:{number}", renamed


def _hub_rows(config: SourceConfig) -> Iterator[Mapping[str, Any]]:
    hub = config.hub
    assert hub is not None
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"source {config.name!r} comes from the hub and needs the datasets package: pip install 'openembed[eval]'"
        ) from None
    try:
        return iter(load_dataset(hub.id, hub.config, split=hub.split, revision=hub.revision))
    except Exception as error:  # the hub client raises many unrelated types
        raise ValueError(
            f"source {config.name!r}: hub data set {hub.id!r} cannot be loaded ({type(error).__name__}: {error}). "
            "Check the id and the network, or give path to a local copy."
        ) from None


def _construct(config: SourceConfig, rows: Iterator[tuple[str, dict[str, Any]]], random: np.random.Generator) -> list[Example]:
    if config.construction == "pairs":
        return [parse_example(row, config.name, where) for where, row in rows]
    if config.construction == "scored_pairs":
        return _scored_pairs(config, rows)
    if config.construction == "label_text":
        return _label_text(config, rows, random)
    if config.construction == "texts":
        texts = (_text(row, "text", where) for where, row in rows)
        return [Example(Query("", text), (Document("", text),), source=config.name) for text in texts]
    return _class_examples(config, rows, random)


def _scored_pairs(config: SourceConfig, rows: Iterator[tuple[str, dict[str, Any]]]) -> list[Example]:
    examples = []
    for where, row in rows:
        first, second = _text(row, "sentence1", where), _text(row, "sentence2", where)
        score = row.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise ValueError(f"{where}: 'score' must be a number, got {score!r:.80}")
        if score >= config.minimum_score:
            for query, document in ((first, second), (second, first)):
                examples.append(Example(Query("", query), (Document("", document),), source=config.name))
    return examples


def _label_text(config: SourceConfig, rows: Iterator[tuple[str, dict[str, Any]]], random: np.random.Generator) -> list[Example]:
    """Query = text, positive = its label's text, negatives = other labels at random (a binary set has one)."""
    texts = [(_text(row, "text", where), _text(row, "label_text", where)) for where, row in rows]
    labels = {label: Document(f"label:{label}", label) for label in sorted({label for _, label in texts})}
    others = {label: [d for other, d in labels.items() if other != label] for label in labels}
    return [
        Example(
            Query("", text),
            (labels[label],),
            tuple(others[label][index] for index in _choose(len(others[label]), POOLED_NEGATIVES, random)),
            config.name,
        )
        for text, label in texts
    ]


def _class_examples(
    config: SourceConfig, rows: Iterator[tuple[str, dict[str, Any]]], random: np.random.Generator
) -> list[Example]:
    """Positives = other texts of the class, negatives = texts of other classes.

    The class is the documents' id, so that no text of the query's class is ever its negative. A class of one text has
    no positive and is left out as query.
    """
    classes: dict[str, list[Document]] = defaultdict(list)
    for where, row in rows:
        label = row.get("label", row.get("label_text"))
        if label is None:
            raise ValueError(f"{where}: no 'label'")
        classes[str(label)].append(Document(f"class:{label}", _text(row, "text", where)))
    every = [document for members in classes.values() for document in members]
    examples = []
    for members in classes.values():
        for index, document in enumerate(members):
            others = _choose(len(members) - 1, POOLED_POSITIVES, random)
            positives = tuple(members[other + (other >= index)] for other in others)
            if positives:
                negatives = _sample_outside(every, document.id, POOLED_NEGATIVES, random)
                examples.append(Example(Query("", document.text), positives, negatives, config.name))
    return examples


def _choose(available: int, count: int, random: np.random.Generator) -> list[int]:
    if available <= count:
        return list(range(available))
    return random.choice(available, size=count, replace=False).tolist()


def _sample_outside(
    documents: Sequence[Document], class_id: str, count: int, random: np.random.Generator
) -> tuple[Document, ...]:
    """Up to ``count`` documents of other classes, from twice as many draws, so a dominant class may leave fewer."""
    drawn = dict.fromkeys(random.integers(len(documents), size=2 * count).tolist())
    return tuple(documents[index] for index in drawn if documents[index].id != class_id)[:count]


def _beir(folder: Path, config: SourceConfig) -> list[Example]:
    """Each judged query with all its relevant documents as positives (their full text: title and text)."""
    try:
        corpus, queries, qrels = read_beir(folder, config.split)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"source {config.name!r}: {error}") from None
    documents = {document.id: document for document in corpus}
    examples = []
    for query in queries:
        relevant = tuple(documents[i] for i, grade in qrels.get(query.id, {}).items() if grade > 0)
        if relevant:
            examples.append(Example(query, relevant, source=config.name))
    return examples


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field!r} must be a text, got {value!r:.80} (fields: {', '.join(sorted(row))})")
    return value
