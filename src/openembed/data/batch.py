"""The row-level batch: one flat list of texts with index arrays, and the one place that decides who competes with whom.

Shapes: U texts to encode, Q rows (one query each), N documents (columns), P positive pairs, M hard-negative pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from openembed.config import Config
from openembed.data.margin import MarginConfig
from openembed.records import Document, Example

InBatch = Literal["all", "positives", "none"]


class BatchConfig(Config):
    """How many rows a batch has and how many documents each row brings.

    A row takes at most ``positives`` of its positives and ``negatives`` of its hard negatives, at random; fewer when it
    has fewer. ``accumulation`` batches make one optimizer step.
    """

    size: int = Field(default=128, ge=1)
    positives: int = Field(default=1, ge=1)
    negatives: int = Field(default=7, ge=0)
    accumulation: int = Field(default=1, ge=1)


@dataclass(frozen=True, slots=True)
class RowSource:
    """What a row inherits from its source: literal prompts, permission for in-batch negatives, weight in the loss.

    ``sided``: the encoder treats queries and documents differently, so that a text that is both is encoded twice.
    """

    name: str
    query_prompt: str = ""
    document_prompt: str = ""
    in_batch: bool = True
    loss_weight: float = 1.0
    sided: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows over one flat list of distinct (side, prompt, text); each is encoded once, however often it is used.

    A column is one distinct document text. Keys are 64-bit hashes: one for a document's text, one for its id within its
    source. ``forbidden`` holds, per row, the keys that may never be its negatives: those of all its known positives
    (also the ones not drawn into the batch) and its own query text.
    """

    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    as_query_U: np.ndarray | None
    """bool (U,): whether a text is encoded as a query; None where the encoder makes no difference."""
    query_Q: np.ndarray
    """int64 (Q,): the text of each row's query."""
    document_N: np.ndarray
    """int64 (N,): the text of each column."""
    positive_P2: np.ndarray
    """int64 (P, 2): (row, column)."""
    positive_score_P: np.ndarray
    """float64 (P,): the teacher's score of each pair in ``positive_P2``; NaN when unknown."""
    negative_M2: np.ndarray
    """int64 (M, 2): (row, column), each row's own hard negatives."""
    negative_score_M: np.ndarray
    """float64 (M,): the teacher's score of each pair in ``negative_M2``; NaN when unknown."""
    positive_score_Q: np.ndarray
    """float64 (Q,): the teacher's lowest score over all the row's positives; NaN when unknown."""
    forbidden: np.ndarray
    """int64 (·, 2): (row, key)."""
    document_key: np.ndarray
    """int64 (·, 2): (column, key); the first N are the text keys in column order, id keys follow."""
    source_Q: np.ndarray
    """int64 (Q,): index into ``sources``."""
    sources: tuple[RowSource, ...]

    @property
    def rows(self) -> int:
        """The number of queries, Q."""
        return len(self.query_Q)

    @property
    def columns(self) -> int:
        """The number of distinct documents, N."""
        return len(self.document_N)

    @property
    def in_batch_Q(self) -> np.ndarray:
        """bool (Q,): whether each row's source permits in-batch negatives."""
        return np.array([source.in_batch for source in self.sources], dtype=bool)[self.source_Q]

    @property
    def weight_Q(self) -> np.ndarray:
        """float32 (Q,): each row's weight in the loss."""
        return np.array([source.loss_weight for source in self.sources], dtype=np.float32)[self.source_Q]


@dataclass(frozen=True)
class Candidates:
    """The boolean masks (Q, N) of one batch.

    ``positives_QN``: the row's positives; ``allowed_QN``: its negatives; ``hard_QN``: those of them that are its own
    hard negatives (the rest are in-batch); ``masked_QN``: would-be negatives refused as false negatives.
    """

    positives_QN: np.ndarray
    allowed_QN: np.ndarray
    hard_QN: np.ndarray
    masked_QN: np.ndarray


def text_key(text: str) -> int:
    """Returns the 64-bit identity of a text, blind to case and to how white space is laid out."""
    return _hash("text", " ".join(text.split()).casefold())


def id_key(source: str, document_id: str) -> int:
    """Returns the 64-bit identity of a document id within its source."""
    return _hash("id", source, document_id)


def collate(
    examples: Sequence[Example],
    sources: Mapping[str, RowSource],
    config: BatchConfig,
    generator: np.random.Generator,
) -> Batch:
    """Returns the batch of ``examples``, one row each; ``generator`` draws which positives and negatives take part.

    Rows that ask the same query share their known positives, whatever their sources. Raises ``ValueError`` for an example of an
    unknown source or without a positive.
    """
    build = _Builder(tuple(sources.values()))
    for example in examples:
        if example.source not in sources:
            raise ValueError(f"example {example.query.id!r} has source {example.source!r}; known: {sorted(sources)}")
        if not example.positives:
            raise ValueError(f"example {example.query.id!r} of source {example.source!r} has no positive document")
        positives = _draw(len(example.positives), config.positives, generator)
        negatives = _draw(len(example.negatives), config.negatives, generator)
        build.add(example, positives, negatives)
    return build.batch()


def allowed_mask(batch: Batch, in_batch: InBatch = "all", margin: MarginConfig | None = None) -> Candidates:
    """Returns who competes with whom, decided here and nowhere else, vectorised over (Q, N).

    A column is a candidate for a row when it is one of the row's own hard negatives, or when the row's source permits
    in-batch negatives and ``in_batch`` admits it (``all`` documents of other rows, their ``positives``, or ``none``).
    A candidate is refused when it shares an id or a text with any known positive of the row, when it is the query's own
    text, or when ``margin`` says the teacher scored it too close to the positive (as this row's hard negative).
    """
    shape = (batch.rows, batch.columns)
    positives_QN = _scatter(batch.positive_P2, shape)
    hard_QN = _scatter(batch.negative_M2, shape)
    if in_batch == "none":
        candidates_QN = hard_QN
    else:
        open_N = positives_QN.any(0) if in_batch == "positives" else np.ones(batch.columns, dtype=bool)
        candidates_QN = hard_QN | (batch.in_batch_Q[:, None] & open_N[None, :])
    candidates_QN = candidates_QN & ~positives_QN
    refused_QN = _shares_key(batch, np.concatenate([batch.forbidden, _over_margin(batch, margin)]))
    allowed_QN = candidates_QN & ~refused_QN
    return Candidates(positives_QN, allowed_QN, allowed_QN & hard_QN, candidates_QN & refused_QN)


def _over_margin(batch: Batch, margin: MarginConfig | None) -> np.ndarray:
    """The (row, text key) pairs of hard negatives at or above their row's ceiling; unknown scores are never above."""
    if margin is None or not len(batch.negative_M2):
        return np.empty((0, 2), dtype=np.int64)
    ceiling_M = margin.ceiling(batch.positive_score_Q)[batch.negative_M2[:, 0]]
    row_column = batch.negative_M2[batch.negative_score_M >= ceiling_M]
    return np.stack([row_column[:, 0], batch.document_key[row_column[:, 1], 1]], axis=1)


def _shares_key(batch: Batch, forbidden: np.ndarray) -> np.ndarray:
    """bool (Q, N): whether a column has a key among those the row forbids."""
    refused_QN = np.zeros((batch.rows, batch.columns), dtype=bool)
    if not len(forbidden) or not batch.columns:
        return refused_QN
    keys, entry_key = np.unique(batch.document_key[:, 1], return_inverse=True)
    place = np.searchsorted(keys, forbidden[:, 1]).clip(max=len(keys) - 1)
    present = keys[place] == forbidden[:, 1]
    flag_QK = _scatter(np.stack([forbidden[present, 0], place[present]], axis=1), (batch.rows, len(keys)))
    rows, entries = np.nonzero(flag_QK[:, entry_key])
    refused_QN[rows, batch.document_key[entries, 0]] = True
    return refused_QN


def _scatter(pairs: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[pairs[:, 0], pairs[:, 1]] = True
    return mask


def _draw(available: int, wanted: int, generator: np.random.Generator) -> list[int]:
    if available <= wanted:
        return list(range(available))
    return sorted(generator.choice(available, size=wanted, replace=False).tolist())


def _hash(*parts: str) -> int:
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class _Builder:
    """Gathers rows one by one; distinct texts, columns and keys get their number at first sight."""

    def __init__(self, sources: tuple[RowSource, ...]) -> None:
        self.sources = sources
        self.source_index = {source.name: number for number, source in enumerate(sources)}
        self.sided = any(source.sided for source in sources)
        self.texts: dict[tuple[bool, str, str], int] = {}
        self.columns: dict[int, int] = {}
        self.text_keys: list[tuple[int, int]] = []
        self.id_keys: dict[tuple[int, int], None] = {}
        self.queries: list[int] = []
        self.asked: list[tuple[int, int]] = []
        self.known: dict[int, set[int]] = {}
        self.positives: list[tuple[int, int]] = []
        self.negatives: list[tuple[int, int]] = []
        self.negative_scores: list[float] = []
        self.drawn_positive_scores: list[float] = []
        self.positive_scores: list[float] = []

    def add(self, example: Example, positives: Sequence[int], negatives: Sequence[int]) -> None:
        row, number = len(self.queries), self.source_index[example.source]
        source = self.sources[number]
        self.queries.append(self.text(source.query_prompt, example.query.text, as_query=self.sided))
        question = text_key(example.query.text)
        self.asked.append((number, question))
        known = self.known.setdefault(question, {question})
        for document in example.positives:
            known.add(text_key(document.full_text))
            if document.id:
                known.add(id_key(source.name, document.id))
        self.positives += [(row, self.column(source, example.positives[index])) for index in positives]
        self.negatives += [(row, self.column(source, example.negatives[index])) for index in negatives]
        self.drawn_positive_scores += _scores(example.positive_scores, positives)
        self.negative_scores += _scores(example.negative_scores, negatives)
        self.positive_scores.append(min(example.positive_scores, default=np.nan))

    def text(self, prompt: str, text: str, *, as_query: bool = False) -> int:
        return self.texts.setdefault((as_query, prompt, text), len(self.texts))

    def column(self, source: RowSource, document: Document) -> int:
        text = self.text(source.document_prompt, document.full_text)
        column = self.columns.setdefault(text, len(self.columns))
        if column == len(self.text_keys):
            self.text_keys.append((column, text_key(document.full_text)))
        if document.id:
            self.id_keys[column, id_key(source.name, document.id)] = None
        return column

    def batch(self) -> Batch:
        forbidden = [(row, key) for row, (_, question) in enumerate(self.asked) for key in sorted(self.known[question])]
        return Batch(
            texts=tuple(text for _, _, text in self.texts),
            prompts=tuple(prompt for _, prompt, _ in self.texts),
            as_query_U=np.array([as_query for as_query, _, _ in self.texts], dtype=bool) if self.sided else None,
            query_Q=np.array(self.queries, dtype=np.int64),
            document_N=np.array(list(self.columns), dtype=np.int64),
            positive_P2=_pairs(self.positives),
            positive_score_P=np.array(self.drawn_positive_scores, dtype=np.float64),
            negative_M2=_pairs(self.negatives),
            negative_score_M=np.array(self.negative_scores, dtype=np.float64),
            positive_score_Q=np.array(self.positive_scores, dtype=np.float64),
            forbidden=_pairs(forbidden),
            document_key=_pairs([*self.text_keys, *self.id_keys]),
            source_Q=np.array([number for number, _ in self.asked], dtype=np.int64),
            sources=self.sources,
        )


def _scores(scores: Sequence[float], drawn: Sequence[int]) -> list[float]:
    return [scores[index] if scores else np.nan for index in drawn]


def _pairs(values: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.array(values, dtype=np.int64).reshape(-1, 2)
