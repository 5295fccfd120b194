"""Sources of training examples: files, BEIR folders and hub data sets, and how their rows become examples."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from openembed.config import Config
from openembed.data.batch import text_key
from openembed.data.constructions import (
    Row,
    class_examples,
    label_examples,
    read_labelled,
    read_scored,
    scored_examples,
    stratified,
    text_field,
    with_classmate,
)
from openembed.data.examples import parse_example
from openembed.data.rows import HubConfig, HubRows, Judged, Rows, is_beir, read_judged, read_rows
from openembed.packaged import packaged
from openembed.records import Document, Example, Query
from openembed.seeds import generator

logger = logging.getLogger(__name__)

Columns = dict[str, str | tuple[str, ...]]
NUMBERS = {"positive": "positives", "positives": "positive", "negative": "negatives", "negatives": "negative"}
"""Two names of one field: a column of the other name does not come before the one that ``columns`` gives."""


class SourceConfig(Config):
    """One source of training examples and what its rows are allowed in a batch.

    ``path``: a JSON-lines or Parquet file, a folder of them, or a BEIR folder (``split`` names its qrels);
    ``package:...`` is inside the installed package. ``columns``: field → column where the data names it differently, or
    several columns, whose texts are joined by a space. ``construction``: ``pairs`` (rows are examples); ``label_text``
    and ``class_examples`` (fields text and label_text, label or categories, see :mod:`openembed.data.constructions`);
    ``scored_pairs`` (fields sentence1, sentence2, score: each pair from ``minimum_score`` up, in both directions; a
    document scored above ``maximum_negative_score`` with a query is never mined as its negative); ``texts`` (field text:
    unlabelled, each text its own positive, for objectives that need no pairs).

    ``label_texts``: the text of each label value; ``separator`` divides ``categories`` that are one string.
    ``instruction`` and ``document_instruction`` are task descriptions, rendered by the model's template; empty means the
    model's default prompt. ``weight`` scales how often rows are drawn, ``cap`` is the most rows of a round,
    ``loss_weight`` what a row counts; ``count`` caps the examples, each label in its share.
    """

    name: str = Field(min_length=1)
    path: str | None = None
    split: str = "train"
    hub: HubConfig | None = None
    licence: str = ""
    columns: Columns = Field(default_factory=dict)
    construction: Literal["pairs", "label_text", "class_examples", "scored_pairs", "texts"] = "pairs"
    label_texts: dict[str, str] = Field(default_factory=dict)
    separator: str | None = Field(default=None, min_length=1)
    instruction: str = ""
    document_instruction: str = ""
    in_batch: bool = True
    weight: float = Field(default=1.0, gt=0)
    cap: int | None = Field(default=None, ge=1)
    loss_weight: float = Field(default=1.0, ge=0)
    count: int | None = Field(default=None, ge=1)
    minimum_score: float = 4.0
    maximum_negative_score: float = 2.5

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
    try:
        judged = _judged(config, base_dir)
        if judged is not None:
            examples = [Example(query, relevant, source=config.name) for query, relevant in judged.pairs()]
            examples = [examples[place] for place in _cut(config, len(examples), seed)]
        else:
            examples = _construct(config, _rows(config, base_dir), seed)
    except ValueError as error:
        raise ValueError(f"source {config.name!r}: {error}") from None
    if not examples:
        raise ValueError(f"source {config.name!r}: no examples in {config.path or config.hub}")
    return examples


def load_sources(configs: Iterable[SourceConfig], base_dir: str | Path = ".", seed: int = 0) -> dict[str, list[Example]]:
    """Returns the examples of all sources by name, as :func:`load_source`; see :func:`without_known_positives`."""
    return without_known_positives({config.name: load_source(config, base_dir, seed) for config in configs})


def without_known_positives(examples: Mapping[str, list[Example]]) -> dict[str, list[Example]]:
    """Returns ``examples`` without hard negatives that are a positive of the same query in another row, of any source."""
    rows: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for name, source in examples.items():
        for place, example in enumerate(source):
            rows[text_key(example.query.text)].append((name, place))
    cleaned = {name: list(source) for name, source in examples.items()}
    removed = 0
    for places in rows.values():
        if len(places) > 1:
            asked = [cleaned[name][place] for name, place in places]
            known = {text_key(document.full_text) for example in asked for document in example.positives}
            for (name, place), example in zip(places, asked, strict=True):
                kept = [n for n, d in enumerate(example.negatives) if text_key(d.full_text) not in known]
                removed += len(example.negatives) - len(kept)
                cleaned[name][place] = _with_negatives(example, kept)
    if removed:
        logger.info("%d hard negatives are positives of the same query in another row: left out", removed)
    return cleaned


def _with_negatives(example: Example, kept: list[int]) -> Example:
    if len(kept) == len(example.negatives):
        return example
    scores = tuple(example.negative_scores[n] for n in kept) if example.negative_scores else ()
    return replace(example, negatives=tuple(example.negatives[n] for n in kept), negative_scores=scores)


def load_corpus(config: SourceConfig, base_dir: str | Path = ".") -> Sequence[Document]:
    """Returns the documents to mine negatives from besides the positives.

    A BEIR set has its corpus, scored pairs all their sentences; other sources have none of their own.
    """
    try:
        judged = _judged(config, base_dir)
        if judged is not None:
            return judged.corpus
        if config.construction != "scored_pairs":
            return []
        pairs = read_scored(_fields(config, _rows(config, base_dir)))
    except ValueError as error:
        raise ValueError(f"source {config.name!r}: {error}") from None
    return [Document("", text) for text in dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second))]


def never_negative(config: SourceConfig, base_dir: str | Path = ".") -> Callable[[Example, Document], bool] | None:
    """Returns what tells whether a document is known to be too similar to an example's query; None where nothing is.

    Scored pairs know (NV-Embed v1, section 4.2): a document that people scored above ``maximum_negative_score`` with
    this very query is not its negative, one without a score may be.
    """
    if config.construction != "scored_pairs":
        return None
    try:
        pairs = read_scored(_fields(config, _rows(config, base_dir)))
    except ValueError as error:
        raise ValueError(f"source {config.name!r}: {error}") from None
    similar: set[tuple[int, int]] = set()
    for pair in pairs:
        if pair.score > config.maximum_negative_score:
            first, second = text_key(pair.first), text_key(pair.second)
            similar |= {(first, second), (second, first)}
    return lambda example, document: (text_key(example.query.text), text_key(document.full_text)) in similar


def _judged(config: SourceConfig, base_dir: str | Path) -> Judged | None:
    """The judgements of a source in the BEIR layout; None for rows."""
    folder = None if config.path is None else _resolve(config.path, Path(base_dir))
    layout = config.hub.layout == "beir" if config.hub else folder is not None and is_beir(folder)
    if not layout:
        return None
    if config.construction != "pairs":
        raise ValueError(f"a BEIR set holds pairs, not {config.construction}")
    return read_judged(folder, config.split, config.hub)


def _resolve(path: str, base_dir: Path) -> Path:
    return packaged(path) or base_dir / path


def _rows(config: SourceConfig, base_dir: str | Path) -> Rows:
    if config.hub is not None:
        return HubRows(config.hub)
    assert config.path is not None, "a source has a path or a hub set"
    return read_rows(_resolve(config.path, Path(base_dir)))


def _fields(config: SourceConfig, rows: Iterable[Row]) -> Iterator[Row]:
    """Yields the rows with columns renamed to our field names."""
    for where, row in rows:
        renamed = dict(row)
        for field, columns in config.columns.items():
            names = (columns,) if isinstance(columns, str) else columns
            for name in names:
                if name not in row:
                    raise ValueError(f"{where}: no column {name!r} (for {field}); has {', '.join(sorted(row))}")
            joined = " ".join(str(row[name]) for name in names if row[name] is not None)
            renamed[field] = row[columns] if isinstance(columns, str) else joined
            if (other := NUMBERS.get(field)) and other not in config.columns:
                renamed.pop(other, None)
        yield where, renamed


def _cut(config: SourceConfig, available: int, seed: int) -> list[int]:
    """The places that ``count`` leaves, in order; all where it does not cut."""
    if config.count is None or config.count >= available:
        return list(range(available))
    chosen = generator(seed, "count", config.name).choice(available, size=config.count, replace=False)
    return sorted(chosen.tolist())


def _construct(config: SourceConfig, rows: Rows, seed: int) -> list[Example]:
    random = generator(seed, "source", config.name)
    if config.construction == "pairs":
        kept = (rows[place] for place in _cut(config, len(rows), seed))
        return [parse_example(row, config.name, where) for where, row in _fields(config, kept)]
    if config.construction == "texts":
        kept = (rows[place] for place in _cut(config, len(rows), seed))
        texts = (text_field(row, "text", where) for where, row in _fields(config, kept))
        return [Example(Query("", text), (Document("", text),), source=config.name) for text in texts]
    if config.construction == "scored_pairs":
        examples = scored_examples(read_scored(_fields(config, rows)), config.minimum_score, config.name)
        return [examples[place] for place in _cut(config, len(examples), seed)]
    return _labelled(config, rows, seed, random)


def _labelled(config: SourceConfig, rows: Rows, seed: int, random: np.random.Generator) -> list[Example]:
    """Examples from labels, by the rule of the binary exception (v2, section 4): two classes pair with label texts."""
    texts, worded = read_labelled(_fields(config, rows), config.name, config.label_texts, config.separator)
    classes = {label for row in texts for label in row.labels}
    by_text = config.construction == "label_text"
    if len(classes) == 2 and not by_text:
        logger.info("source %r has two classes: its label texts are the documents, not examples of a class", config.name)
        by_text = True
    if by_text and texts and not worded:
        raise ValueError(
            f"its labels are numbers ({', '.join(sorted(classes)[:5])}) and cannot be documents; "
            "say what they mean, as in label_texts = { 0 = 'negative', 1 = 'positive' }"
        )
    eligible = list(range(len(texts))) if by_text else with_classmate(texts)
    if config.count is not None and config.count < len(eligible):
        labels = [texts[place].labels[0] for place in eligible]
        kept = stratified(labels, config.count, generator(seed, "count", config.name))
        eligible = [eligible[place] for place in kept]
    return (label_examples if by_text else class_examples)(texts, eligible, config.name, random)
