"""Hard-negative mining: the best-ranked documents of a teacher that are unlikely to be unlabelled positives.

NV-Retriever (arXiv 2407.15831), NV-Embed v2 section 4. Shapes: Q queries of a block, N documents, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from openembed.config import Config
from openembed.data.batch import text_key
from openembed.data.margin import MarginConfig
from openembed.encoder import Encoder
from openembed.progress import progress
from openembed.records import Document, Example
from openembed.seeds import generator

Scorer = Callable[[slice], np.ndarray]
"""Given a range of queries, returns their scores against every document, float32 (Q, N)."""


class MineConfig(Config):
    """What to mine. ``keep`` negatives a query, from the ``depth`` best-ranked documents that are not its positives.

    ``skip`` leaves out the first ranks; ``filter`` is the positive-aware ceiling, set by the lowest of the query's
    positive scores. ``instruction`` and ``document_instruction`` are for an ``encoder`` teacher, as in a source;
    ``block_scores`` bounds memory: how many scores are held at once. The teacher ``random`` knows nothing: its scores are
    drawn from 0 to 1 with ``seed``, to be used without ceiling.
    """

    teacher: Literal["encoder", "bm25", "random"] = "encoder"
    keep: int = Field(default=20, ge=1)
    depth: int = Field(default=100, ge=1)
    skip: int = Field(default=0, ge=0)
    filter: MarginConfig = MarginConfig()
    instruction: str = ""
    document_instruction: str = ""
    block_scores: int = Field(default=2**26, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Mined:
    """Examples with mined negatives and teacher scores, where each came from, and counts over all.

    ``notes`` has one entry an example (teacher, ranks of its negatives among the non-positives, from 1); pass both to
    ``write_examples``. ``report``: queries, negatives, without_negatives, refused (by the ceiling, among the first
    ``depth``).
    """

    examples: list[Example]
    notes: list[dict[str, Any]]
    report: dict[str, int]


def mine(examples: Sequence[Example], corpus: Sequence[Document], config: MineConfig, encoder: Encoder | None = None) -> Mined:
    """Returns ``examples`` with their negatives replaced by mined ones; a query may end with none.

    Never mined: a known positive (by id or text), the query's own text, a second copy of a text. ``corpus`` and
    ``examples`` share document ids; positives that ``corpus`` lacks are added to it, so an empty one mines among all
    positives. Raises ``ValueError`` when the encoder teacher is missing.
    """
    documents = _with_positives(corpus, examples)
    place = {_identity(document): number for number, document in enumerate(documents)}
    keys = np.array([text_key(document.full_text) for document in documents], dtype=np.int64)
    scorer = _teacher(config, encoder, [e.query.text for e in examples], [d.full_text for d in documents])
    block = max(1, config.block_scores // max(1, len(documents)))
    mined, notes = [], []
    refused = 0
    with progress("mine", len(examples), "queries") as advance:
        for start in range(0, len(examples), block):
            part = slice(start, min(start + block, len(examples)))
            for example, scores_N in zip(examples[part], scorer(part), strict=True):
                positives = [place[_identity(document)] for document in example.positives]
                ranked = _rank(example, scores_N, positives, documents, keys, config)
                ceiling = float(config.filter.ceiling(scores_N[positives].min()))
                kept = [(rank, n) for rank, n in ranked if scores_N[n] < ceiling]
                refused += len(ranked) - len(kept)
                mined.append(_replaced(example, positives, kept[: config.keep], documents, scores_N))
                ranks = [rank for rank, _ in kept[: config.keep]]
                notes.append({"mined": {"teacher": _teacher_name(config, encoder), "ranks": ranks}})
            advance(part.stop - part.start)
    report = {
        "queries": len(mined),
        "negatives": sum(len(example.negatives) for example in mined),
        "without_negatives": sum(not example.negatives for example in mined),
        "refused": refused,
    }
    return Mined(mined, notes, report)


def _rank(
    example: Example,
    scores_N: np.ndarray,
    positives: Sequence[int],
    documents: Sequence[Document],
    keys: np.ndarray,
    config: MineConfig,
) -> list[tuple[int, int]]:
    """(rank, document) of the best ``depth`` eligible documents after ``skip``; equal scores in corpus order."""
    known_ids = {document.id for document in example.positives if document.id}
    seen = {text_key(example.query.text), *(int(keys[number]) for number in positives)}
    ranked: list[tuple[int, int]] = []
    wanted = config.depth + config.skip
    for number in best_first(scores_N, 2 * wanted + len(positives)):
        if len(ranked) == wanted:
            break
        if int(keys[number]) not in seen and documents[number].id not in known_ids:
            seen.add(int(keys[number]))
            ranked.append((len(ranked) + 1, number))
    return ranked[config.skip :]


def best_first(scores_N: np.ndarray, count: int) -> Iterator[int]:
    """Yields document numbers by falling score, equal ones in corpus order.

    Only about the first ``count`` are sorted unless more are taken: sorting millions of scores a query takes longer than
    computing them.
    """
    rest = np.arange(len(scores_N))
    if count < len(scores_N):
        cut = np.partition(scores_N, len(scores_N) - count)[len(scores_N) - count]
        top = np.flatnonzero(scores_N >= cut)
        yield from top[np.argsort(-scores_N[top], kind="stable")].tolist()
        rest = np.flatnonzero(scores_N < cut)
    yield from rest[np.argsort(-scores_N[rest], kind="stable")].tolist()


def _replaced(
    example: Example,
    positives: Sequence[int],
    kept: Sequence[tuple[int, int]],
    documents: Sequence[Document],
    scores_N: np.ndarray,
) -> Example:
    return Example(
        example.query,
        example.positives,
        tuple(documents[number] for _, number in kept),
        example.source,
        tuple(float(scores_N[number]) for number in positives),
        tuple(float(scores_N[number]) for _, number in kept),
    )


def _with_positives(corpus: Sequence[Document], examples: Sequence[Example]) -> list[Document]:
    """The corpus, and below it the positives it lacks, so that every positive gets a score."""
    documents = list(corpus)
    known = {_identity(document) for document in documents}
    for example in examples:
        for document in example.positives:
            if _identity(document) not in known:
                known.add(_identity(document))
                documents.append(document)
    return documents


def _identity(document: Document) -> tuple[str, str]:
    return document.id, document.full_text


def _teacher_name(config: MineConfig, encoder: Encoder | None) -> str:
    return config.teacher if encoder is None or config.teacher != "encoder" else encoder.fingerprint


def _teacher(config: MineConfig, encoder: Encoder | None, queries: list[str], documents: list[str]) -> Scorer:
    if config.teacher == "bm25":
        return _bm25(queries, documents)
    if config.teacher == "random":
        draw = generator(config.seed, "random negatives")
        return lambda part: draw.random((part.stop - part.start, len(documents)), dtype=np.float32)
    if encoder is None:
        raise ValueError("mining with teacher = 'encoder' needs an encoder; pass one or set teacher = 'bm25'")
    queries_QD = encoder.encode_queries(queries, instruction=config.instruction or None, progress=True)
    documents_ND = encoder.encode_documents(documents, instruction=config.document_instruction or None, progress=True)
    return lambda part: queries_QD[part] @ documents_ND.T


def _bm25(queries: list[str], documents: list[str]) -> Scorer:
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")

    def tokens(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)

    empty_N = np.zeros(len(documents), dtype=np.float32)
    indexed = tokens(documents)
    if not any(indexed):  # bm25s cannot index a corpus without a word; nothing is like anything then
        return lambda part: np.stack([empty_N] * (part.stop - part.start))
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index(indexed, show_progress=False)

    def scores(part: slice) -> np.ndarray:
        known = [[word for word in words if word in index.vocab_dict] for words in tokens(queries[part])]
        return np.stack([index.get_scores(words) if words else empty_N for words in known])

    return scores
