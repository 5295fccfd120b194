"""The candidates of each query: a teacher's ranking without known positives, their copies and what else may not be mined.

Q queries of a block, K fetched, P candidates of one query.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from openembed.data.batch import text_key
from openembed.data.corpus import Corpus, word_set
from openembed.data.select import Ranking
from openembed.data.teachers import Teacher
from openembed.records import Document, Example
from openembed.rerankers import Reranker

Exclude = Callable[[Example, Document], bool]
"""Whether a document may not be a negative of an example, such as a pair whose true score is known."""


@dataclass(frozen=True)
class More:
    """Further documents of a query that may be mined, best first, with scores and ranks (0: drawn at random)."""

    documents: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray


class Candidates:
    """Rankings of what may be mined, under a teacher or, where there is one, a reranker of the teacher's best."""

    def __init__(
        self,
        examples: Sequence[Example],
        corpus: Corpus,
        near: float,
        teacher: Teacher,
        reranker: Reranker | None = None,
        exclude: Exclude | None = None,
    ) -> None:
        self._examples, self._corpus, self._near = examples, corpus, near
        self._teacher, self._reranker, self._exclude = teacher, reranker, exclude
        self._rows: dict[int, list[int]] = defaultdict(list)
        for number, example in enumerate(examples):
            self._rows[text_key(example.query.text)].append(number)

    def rankings(self, part: range, wanted: int) -> list[Ranking]:
        """Returns the ranking of each query of ``part``.

        Twice ``wanted`` are fetched, and the positives, so that ``wanted`` remain; a reranker scores only ``wanted``.
        """
        positives = [self._positives(number) for number in part]
        known = [self._known(number) for number in part]
        found = self._teacher.search(np.array(part), 2 * wanted + max(map(len, known), default=0))
        ranked = []
        for place, number in enumerate(part):
            fetched = found.documents_QK[place] >= 0
            documents_P, scores_P = found.documents_QK[place][fetched], found.scores_QK[place][fetched]
            allowed_P, passed = self._allowed(number, known[place], documents_P)
            documents_P, scores_P = documents_P[allowed_P], scores_P[allowed_P]
            if self._reranker is None:
                own_scores = self._teacher.score(number, positives[place])
            else:
                documents_P = documents_P[:wanted]
                own_scores, scores_P = self._rerank(number, positives[place]), self._rerank(number, documents_P)
                order_P = np.argsort(-scores_P, kind="stable")
                documents_P, scores_P = documents_P[order_P], scores_P[order_P]
            ranked.append(Ranking(documents_P, scores_P, positives[place], own_scores, passed))
        return ranked

    def deeper(self, numbers: list[int], limits: np.ndarray, count: int) -> list[More]:
        """Returns the best documents below each query's limit, however deep; ranks count all documents.

        Nothing under a reranker, which has scored only the pool.
        """
        if self._reranker is not None or not numbers:
            return [_none() for _ in numbers]
        known = [self._known(number) for number in numbers]
        found = self._teacher.search(np.array(numbers), count + max(map(len, known)), limits.astype(np.float32))
        more = []
        for place, number in enumerate(numbers):
            documents_K = found.documents_QK[place]
            ranks_K = found.above_Q[place] + 1 + np.arange(len(documents_K))
            documents_P = documents_K[documents_K >= 0]
            allowed_P, _ = self._allowed(number, known[place], documents_P)
            rows = np.flatnonzero(allowed_P)
            more.append(More(documents_P[rows], found.scores_QK[place][rows], ranks_K[rows]))
        return more

    def random(self, number: int, count: int, generator: np.random.Generator) -> More:
        """Returns up to ``count`` documents that may be mined, drawn evenly from the corpus, with their scores."""
        drawn = np.array(list(dict.fromkeys(generator.integers(len(self._corpus), size=count).tolist())), dtype=np.int64)
        allowed_P, _ = self._allowed(number, self._known(number), drawn)
        drawn = drawn[allowed_P]
        scores_P = self._teacher.score(number, drawn) if self._reranker is None else self._rerank(number, drawn)
        return More(drawn, scores_P, np.zeros(len(drawn), dtype=np.int64))

    def _positives(self, number: int) -> np.ndarray:
        found = [self._corpus.find(document) for document in self._examples[number].positives]
        return np.array(found, dtype=np.int64)

    def _known(self, number: int) -> np.ndarray:
        """The positives of all rows that ask this query: sets with one positive a row repeat it."""
        rows = self._rows[text_key(self._examples[number].query.text)]
        return np.unique(np.concatenate([self._positives(row) for row in rows]))

    def _rerank(self, number: int, documents_P: np.ndarray) -> np.ndarray:
        texts = [self._corpus[int(document)].full_text for document in documents_P]
        scores = self._reranker.score(self._examples[number].query.text, texts) if texts else []
        return np.asarray(scores, dtype=np.float32)

    def _allowed(self, number: int, known: np.ndarray, documents_P: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """Returns which documents may be mined for a query (bool (P,)), and how many may not, by reason."""
        example, corpus = self._examples[number], self._corpus
        texts_P = corpus.text_N[documents_P]
        known_ids = corpus.id_N[known][corpus.id_N[known] != 0]
        positive_P = np.isin(documents_P, known) | np.isin(corpus.id_N[documents_P], known_ids)
        known_texts = [text_key(example.query.text), *corpus.text_N[known].tolist(), *corpus.bare_N[known].tolist()]
        equal_P = (np.isin(texts_P, known_texts) | np.isin(corpus.bare_N[documents_P], known_texts)) & ~positive_P
        first_P = np.zeros(len(documents_P), dtype=bool)
        first_P[np.unique(texts_P, return_index=True)[1]] = True
        allowed_P = first_P & ~positive_P & ~equal_P
        counts = Counter(known_positive=int(positive_P.sum()), equal_text=int(equal_P.sum()))
        counts["repeated_text"] = int((~first_P & ~positive_P & ~equal_P).sum())
        self._refuse_near(known, documents_P, allowed_P, counts)
        if self._exclude is not None:
            for place in np.flatnonzero(allowed_P):
                if self._exclude(example, corpus[int(documents_P[place])]):
                    allowed_P[place] = False
                    counts["excluded"] += 1
        return allowed_P, {reason: count for reason, count in counts.items() if count}

    def _refuse_near(self, positives: np.ndarray, documents_P: np.ndarray, allowed_P: np.ndarray, counts: Counter) -> None:
        """Takes out what shares nearly all its words with a positive; only texts of about its length need be read."""
        if self._near >= 1:
            return
        words_P = self._corpus.words_N[documents_P]
        for positive in positives.tolist():
            count = self._corpus.words_N[positive]
            alike = allowed_P & (words_P >= self._near * count) & (words_P * self._near <= count) & (words_P > 0)
            if not alike.any():
                continue
            wanted = word_set(self._corpus[positive].full_text)
            for place in np.flatnonzero(alike):
                words = word_set(self._corpus[int(documents_P[place])].full_text)
                if len(words & wanted) >= self._near * len(words | wanted):
                    allowed_P[place] = False
                    counts["near_text"] += 1


def _none() -> More:
    return More(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64))
