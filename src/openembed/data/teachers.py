"""Teachers: who ranks the documents that are mined. An encoder of any kind, or BM25; both live on disk.

Q queries asked for, N documents, K found, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from openembed.encoded import Encoded, kind_of, take
from openembed.index import exact
from openembed.index.dense import Found, first_places
from openembed.records import Example
from openembed.rerankers import Scale
from openembed.seeds import generator

if TYPE_CHECKING:
    from openembed.bulk import Encoded as BulkEncoded
    from openembed.bulk import EncodesTexts
    from openembed.data.corpus import Corpus

SEGMENT = 100_000
"""Documents whose word counts are held at once while BM25 is indexed."""


class Teacher(Protocol):
    """Ranks documents for queries, both by number. ``name`` says which model it is."""

    name: str
    scale: Scale

    def search(self, queries: np.ndarray, k: int, below_Q: np.ndarray | None = None) -> Found:
        """Returns the k best documents of each query, with ``below_Q`` the k best below the query's limit."""
        ...

    def score(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Returns float32 scores of these documents for one query, as ``search`` gives them."""
        ...


class Prompted:
    """An encoder under literal prompts: teachers want their own, such as E5's ``query: `` and ``passage: ``.

    ``template`` and ``document_template`` with ``{task}`` take in the instruction of their side; without, they are the prompt
    as it is. None: the encoder's own template, and its own default prompt where there is no instruction.
    """

    def __init__(
        self,
        encoder: Any,
        *,
        instruction: str = "",
        document_instruction: str = "",
        template: str | None = None,
        document_template: str | None = None,
    ) -> None:
        self._encoder = encoder
        self._query = _prompt(template, instruction, encoder.query_prompt)
        self._document = _prompt(document_template, document_instruction, encoder.document_prompt)
        self.fingerprint, self.width = encoder.fingerprint, encoder.width
        self.computed_in, self.device = encoder.computed_in, encoder.device
        self.kind, self._sided = getattr(encoder, "kind", "dense"), getattr(encoder, "sided", False)

    def query_prompt(self, **_none: None) -> str:
        """Returns the literal text put before queries."""
        return self._query

    def document_prompt(self, **_none: None) -> str:
        """Returns the literal text put before documents."""
        return self._document

    def encode_queries(self, texts: Sequence[str], **options: Any) -> Encoded:
        """Returns what the encoder gives for queries."""
        side = {"as_queries": True} if self._sided else {}
        return self._encoder.encode(texts, instruction=self._query, **side, **_options(options))

    def encode_documents(self, texts: Sequence[str], **options: Any) -> Encoded:
        """Returns what the encoder gives for documents."""
        return self._encoder.encode(texts, instruction=self._document, **_options(options))


def _prompt(template: str | None, instruction: str, own: Any) -> str:
    if template is None:
        return own(instruction=instruction or None)
    before, task, after = template.partition("{task}")
    return before + instruction + after if task else template


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in ("task", "instruction")}


class EncoderTeacher:
    """Scores of memory-mapped representations: inner products of vectors and of sparse weights, MaxSim of token vectors."""

    def __init__(self, name: str, queries: Encoded, documents: Encoded) -> None:
        self.name, self._queries, self._documents = name, queries, exact.prepared(documents)
        self.scale = scale_of(kind_of(documents))

    def search(self, queries: np.ndarray, k: int, below_Q: np.ndarray | None = None) -> Found:
        """Returns the exact k best documents of each query."""
        return self._documents.top(take(self._queries, queries), k, below_Q)

    def score(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Returns float32 scores of these documents."""
        return self._documents.scores(take(self._queries, np.array([query])), documents)


def scale_of(kind: str) -> Scale:
    """Returns what an encoder's scores mean: sums over terms or tokens have a zero but no greatest value, like BM25's."""
    return "cosine" if kind == "dense" else "lexical"


def encoder_teacher(
    encoder: EncodesTexts, examples: Sequence[Example], corpus: Corpus, folder: Path, max_length: int | None = None
) -> EncoderTeacher:
    """Returns the teacher of an encoder; what it gives is written to ``folder`` by resumable bulk encoding.

    Raises ``ValueError`` for a text that is not Unicode, naming its line.
    """
    import json

    from openembed.bulk import BulkConfig, encode_file
    from openembed.files import atomic_write

    with atomic_write(folder / "queries.jsonl") as file:
        for number, example in enumerate(examples):
            file.write(json.dumps({"_id": str(number), "text": example.query.text}) + "\n")
    asked = BulkConfig(kind="query", max_length=max_length)
    queries = encode_file(encoder, folder / "queries.jsonl", folder / "queries", asked, show_progress=True)
    config = BulkConfig(kind="document", max_length=max_length)
    documents = encode_file(encoder, corpus.path, folder / "documents", config, show_progress=True)
    return EncoderTeacher(encoder.fingerprint, *(_opened(encoded) for encoded in (queries, documents)))


def _opened(encoded: BulkEncoded) -> Encoded:
    return encoded.vectors() if encoded.kind == "dense" else encoded.representations()


class _AllScores(ABC):
    """Scores all documents for one query at a time; those with at most ``least`` are not found at all."""

    least = -np.inf

    def search(self, queries: np.ndarray, k: int, below_Q: np.ndarray | None = None) -> Found:
        """Returns the k best documents of each query, equal ones in order."""
        documents, values, above = [], [], []
        for place, query in enumerate(queries.tolist()):
            scores_N = self._scores(query)
            passed_N = scores_N >= (np.inf if below_Q is None else below_Q[place])
            out_N = passed_N | (scores_N <= self.least)
            places = first_places(np.where(out_N, -np.inf, scores_N), k)
            found = ~out_N[places]
            documents.append(np.where(found, places, -1))
            values.append(np.where(found, scores_N[places], -np.inf))
            above.append(int(passed_N.sum()))
        return Found(np.array(documents), np.array(values, dtype=np.float32), np.array(above))

    def score(self, query: int, documents: np.ndarray) -> np.ndarray:
        """Returns float32 scores of these documents."""
        return self._scores(query)[documents]

    @abstractmethod
    def _scores(self, query: int) -> np.ndarray:
        """Returns a query's scores of all documents, float32 (N,)."""


class Bm25Teacher(_AllScores):
    """BM25 over inverted lists in ``folder``; scores all documents for one query at a time."""

    name = "bm25"
    scale: Scale = "lexical"
    least = 0.0  # no word in common: the corpus's first documents, for every such query

    def __init__(self, queries: Sequence[str], documents: Iterable[str], folder: Path, language: str = "en") -> None:
        from openembed.index.lexical import Bm25, Postings, PostingsWriter, analyzer

        self._queries, self._analyzer = queries, analyzer(language)
        segments, live, rest = [], [], iter(documents)
        while texts := list(islice(rest, SEGMENT)):
            directory = folder / f"words{len(segments)}"
            directory.mkdir(parents=True, exist_ok=True)
            writer = PostingsWriter()
            for part in _parts(texts, 4_096):
                writer.add(part, self._analyzer)
            writer.write(directory)
            segments.append(Postings(directory))
            live.append(np.ones(len(texts), dtype=bool))
        self._index = Bm25(segments, live)

    def _scores(self, query: int) -> np.ndarray:
        return self._index.scores(self._analyzer.terms(self._queries[query]))


class RandomTeacher(_AllScores):
    """Knows nothing: every score is drawn from 0 to 1, so that negatives come at random. To be used without ceiling."""

    name = "random"
    scale: Scale = "lexical"

    def __init__(self, documents: int, seed: int) -> None:
        self._documents, self._seed = documents, seed

    def _scores(self, query: int) -> np.ndarray:
        return generator(self._seed, "random negatives", query).random(self._documents, dtype=np.float32)


def _parts(texts: list[str], size: int) -> Iterator[list[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))
