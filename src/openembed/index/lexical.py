"""BM25 over inverted lists on disk.

The scores are those of bm25s (method "lucene", k1 1.5, b 0.75) built from scratch on the live documents, bit for bit.
bm25s stores finished scores, so it can add and delete nothing; here each segment keeps its term counts, and the
statistics (document count, average length, document frequency) come from the live documents when a query is scored.
Nothing is tokenised again on opening, and a query reads only its own terms' lists.

N documents of a segment, P postings of a term.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from openembed.index.damage import Once, check_kept, check_lists, check_starts, check_within
from openembed.index.native import postings_library
from openembed.index.postings import Searches, WordList, Words
from openembed.index.strings import Strings, load_array, save_array, write_strings

ONE = np.float32(1)
TABLED = 1_024
"""Document lengths up to which it is computed once for a list what a term adds that stands there once."""
K1 = 1.5
B = 0.75
WORD = re.compile(r"(?u)\b\w\w+\b")

STEMMERS = {
    "ar": "arabic",
    "cs": "czech",
    "da": "danish",
    "de": "german",
    "el": "greek",
    "en": "english",
    "es": "spanish",
    "fi": "finnish",
    "fr": "french",
    "hi": "hindi",
    "hu": "hungarian",
    "it": "italian",
    "nl": "dutch",
    "no": "norwegian",
    "pl": "polish",
    "pt": "portuguese",
    "ro": "romanian",
    "ru": "russian",
    "sv": "swedish",
    "tr": "turkish",
}
STOP_WORDS = frozenset({"da", "de", "en", "es", "fr", "it", "nl", "no", "pt", "ru", "sv", "tr"})
"""Languages of which bm25s has a list."""


class Tokenized(NamedTuple):
    """The terms' numbers of each text, in order, and the number of each term."""

    ids: list[list[int]]
    vocab: dict[str, int]


@dataclass(frozen=True)
class Analyzer:
    """How texts of one language become terms: lower case, words of two letters or more, stop words out, stems."""

    language: str
    stopwords: str | None
    stemmer: Any | None

    def tokenize(self, texts: Sequence[str]) -> Tokenized:
        """Returns the terms of the texts, those of ``bm25s.tokenize``.

        That function takes a lock which forked processes share, and which one that is killed never gives back.
        """
        stop_words, vocabulary, rows = _stop_words(self.stopwords), {}, []
        for text in texts:
            words = [word for word in WORD.findall(text.lower()) if word not in stop_words]
            rows.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        if self.stemmer is None:
            return Tokenized(rows, vocabulary)
        stems: dict[str, int] = {}
        numbers = [stems.setdefault(stem, len(stems)) for stem in self.stemmer.stemWords(list(vocabulary))]
        return Tokenized([[numbers[word] for word in row] for row in rows], stems)

    def terms(self, text: str) -> list[str]:
        """Returns the terms of one text, in order."""
        tokenized = self.tokenize([text])
        names = {number: term for term, number in tokenized.vocab.items()}
        return [names[number] for number in tokenized.ids[0]]

    def spans(self, text: str) -> list[tuple[int, int, str]]:
        """Returns (start, end, term) of every word of ``text``, stop words among them."""
        found = [(match.start(), match.end(), match.group().lower()) for match in WORD.finditer(text)]
        if self.stemmer is None:
            return found
        words = list({word for _, _, word in found})
        stems = dict(zip(words, self.stemmer.stemWords(words), strict=True))
        return [(start, end, stems[word]) for start, end, word in found]


@cache
def _stop_words(language: str | None) -> frozenset[str]:
    if language is None:
        return frozenset()
    from bm25s import stopwords

    return frozenset(getattr(stopwords, f"STOPWORDS_{'EN' if language == 'en' else STEMMERS[language].upper()}"))


def analyzer(language: str) -> Analyzer:
    """Returns the analyzer of a language code: its Snowball stemmer, and its stop words where bm25s has a list.

    ``none`` splits words only. Raises ``ValueError`` for another code or when PyStemmer lacks the stemmer.
    """
    if language == "none":
        return Analyzer(language, None, None)
    if language not in STEMMERS:
        raise ValueError(f"language {language!r} is not known; allowed: none, {', '.join(STEMMERS)}")
    import Stemmer

    name = STEMMERS[language]
    if name not in Stemmer.algorithms():
        raise ValueError(f"the installed PyStemmer has no {name} stemmer; install PyStemmer>=3.1")
    return Analyzer(language, language if language in STOP_WORDS else None, Stemmer.Stemmer(name))


class PostingsWriter:
    """Collects term counts of documents and writes a segment's inverted lists."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._terms: list[np.ndarray] = []
        self._documents: list[np.ndarray] = []
        self._counts: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._total = 0

    def add(self, texts: Sequence[str], analyze: Analyzer) -> None:
        """Tokenises and counts ``texts`` as the next documents."""
        tokenized = analyze.tokenize(texts)
        names = sorted(tokenized.vocab, key=tokenized.vocab.__getitem__)
        lengths_N = np.array([len(row) for row in tokenized.ids], dtype=np.int64)
        documents = np.repeat(np.arange(len(texts), dtype=np.int64), lengths_N)
        terms = np.fromiter((term for row in tokenized.ids for term in row), dtype=np.int64, count=len(documents))
        keys, counts = np.unique(documents * max(len(names), 1) + terms, return_counts=True)
        documents, terms = np.divmod(keys, max(len(names), 1))
        self.add_counts(names, terms, documents, counts, lengths_N)

    def add_counts(
        self, names: Sequence[str], terms: np.ndarray, documents: np.ndarray, counts: np.ndarray, lengths_N: np.ndarray
    ) -> None:
        """Adds documents already counted: parallel arrays of term (an index into ``names``), document and count."""
        numbers = np.array([self._numbers.setdefault(name, len(self._numbers)) for name in names], dtype=np.int64)
        self._terms.append(numbers[terms].astype(np.int32) if len(terms) else np.empty(0, dtype=np.int32))
        self._documents.append((documents + self._total).astype(np.int32))
        self._counts.append(counts.astype(np.int32))
        self._lengths.append(lengths_N.astype(np.int32))
        self._total += len(lengths_N)

    def write(self, directory: Path) -> None:
        """Writes terms (sorted), starts of their lists, documents and counts of each list, and document lengths."""
        names = sorted(self._numbers)
        rank = np.empty(len(names), dtype=np.int64)
        rank[[self._numbers[name] for name in names]] = np.arange(len(names))
        terms = _concatenated(self._terms)
        terms = rank[terms] if len(terms) else terms
        documents, counts = _concatenated(self._documents), _concatenated(self._counts)
        order = np.lexsort((documents, terms))
        starts = np.concatenate([[0], np.cumsum(np.bincount(terms, minlength=len(names)))]).astype(np.int64)
        write_strings(directory, "terms", names)
        save_array(directory / "postings.starts.npy", starts)
        save_array(directory / "postings.documents.npy", documents[order])
        save_array(directory / "postings.counts.npy", counts[order])
        save_array(directory / "lengths.npy", _concatenated(self._lengths))


class Postings:
    """The memory-mapped inverted lists of one segment. Raises ``ValueError`` naming a file that is missing or damaged."""

    def __init__(self, directory: Path) -> None:
        names = "postings.starts", "postings.documents", "postings.counts", "lengths"
        paths = starts, documents, counts, lengths = [directory / f"{name}.npy" for name in names]
        self.terms = Strings(directory, "terms")
        self.starts, self.documents, self.counts, self.lengths_N = map(load_array, paths)
        total = check_starts(starts, self.starts, len(self.terms))
        check_kept(documents, self.documents, "<i4", total)
        check_kept(counts, self.counts, "<i4", total)
        check_kept(lengths, self.lengths_N, "<i4", len(self.lengths_N))
        self._lists = Once(documents), Once(counts), Once(lengths)

    def check(self) -> None:
        """Raises ``ValueError`` naming a file of lists that is damaged; each is read for it once in a process."""
        documents, counts, lengths = self._lists
        documents(lambda: check_lists(documents.path, self.documents, self.starts, len(self.lengths_N)))
        counts(lambda: check_within(counts.path, self.counts, 1, 1 << 31))
        lengths(lambda: check_within(lengths.path, self.lengths_N, 0, int(self.counts.sum(dtype=np.int64)) + 1))

    def find(self, term: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (documents, counts) of ``term``, both empty when no document of the segment has it."""
        number = self.terms.find(term)
        low, high = (0, 0) if number is None else (int(self.starts[number]), int(self.starts[number + 1]))
        return self.documents[low:high], self.counts[low:high]

    def copy_live(self, live_N: np.ndarray, writer: PostingsWriter) -> None:
        """Adds the counts of the live documents to ``writer``, renumbered without gaps; raises as ``check`` does."""
        self.check()
        terms = np.repeat(np.arange(len(self.terms), dtype=np.int64), np.diff(self.starts))
        kept = live_N[self.documents]
        names, numbers = np.unique(terms[kept], return_inverse=True)
        renumbered_N = np.cumsum(live_N) - 1
        writer.add_counts(
            [self.terms[int(number)] for number in names],
            numbers,
            renumbered_N[self.documents[kept]],
            self.counts[kept],
            self.lengths_N[live_N],
        )


class Bm25:
    """BM25 over segments; made anew, cheaply, whenever the set of live documents changes.

    Raises ``ValueError`` naming a damaged file.
    """

    def __init__(self, segments: Sequence[Postings], live: Sequence[np.ndarray]) -> None:
        for segment in segments:
            segment.check()
        self._segments = list(segments)
        self._live = list(live)
        self._whole = [bool(live_N.all()) for live_N in live]
        lengths = _concatenated([s.lengths_N[live_N] for s, live_N in zip(segments, live, strict=True)])
        self._count = len(lengths)
        self._average = (lengths.mean() if self._count else 0.0) or 1.0
        self._by_length: list[np.ndarray] = []
        self._searches: tuple[int, Searches] | None = None

    def search(self, terms: Sequence[str], k: int, eligible: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Returns (positions, scores) of no fewer than the k best eligible documents, and of no document without a term."""
        library, most = postings_library(), sum(int(np.count_nonzero(mask_N)) for mask_N in eligible)
        if most == 0:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        if library is None:
            scores_N = self.scores(terms)
            matching = np.flatnonzero(scores_N * np.concatenate(eligible))
            return matching, scores_N[matching]
        segments, kept = self._native(terms, [np.ascontiguousarray(mask_N) for mask_N in eligible])
        searches = self._searches
        if searches is None or searches[0] != min(k, most):
            searches = self._searches = min(k, most), Searches(library, min(k, most), 0)
        found = searches[1].run(lambda query: library.openembed_bm25_search(segments, len(segments), query), lists=len(terms))
        del kept  # until here the structures point to it
        return found

    def _native(self, terms: Sequence[str], eligible: Sequence[np.ndarray]) -> tuple[Any, list[Any]]:
        """Returns the lists of the terms as the compiled search takes them, and what they point to."""
        if not self._by_length:
            longest = [int(s.lengths_N.max(initial=0)) for s in self._segments]
            self._by_length = [self._penalties(np.arange(length + 1, dtype=np.int32)) for length in longest]
        lists = [[segment.find(term) for term in terms] for segment in self._segments]
        idfs = [self._idf([found[number] for found in lists]) for number in range(len(terms))]
        segments, kept, first = (Words * len(lists))(), [lists, eligible], 0
        for number, (segment, found) in enumerate(zip(self._segments, lists, strict=True)):
            penalties = self._by_length[number]
            ones = [(idf * (ONE / (penalties[:TABLED] + ONE))).astype(np.float32) for idf in idfs]
            own = (WordList * len(terms))(
                *(
                    (d.ctypes.data, c.ctypes.data, table.ctypes.data, len(d), float(idf))
                    for (d, c), table, idf in zip(found, ones, idfs, strict=True)
                )
            )
            pointers = [array.ctypes.data for array in (segment.lengths_N, penalties, eligible[number])]
            segments[number] = Words(
                ctypes.addressof(own), *pointers, len(terms), len(segment.lengths_N), first, len(penalties[:TABLED])
            )
            kept += [own, ones]
            first += len(segment.lengths_N)
        return segments, kept

    def _penalties(self, lengths: np.ndarray) -> np.ndarray:
        return K1 * ((1 - B) + B * lengths / self._average)

    def _idf(self, lists: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.float32:
        """The weight of a term that live documents of these (documents, counts) of the segments have."""
        parts = zip(lists, self._live, self._whole, strict=True)
        frequency = sum(len(found[0]) if whole else int(np.count_nonzero(live[found[0]])) for found, live, whole in parts)
        return np.float32(math.log(1 + (self._count - frequency + 0.5) / (frequency + 0.5)))

    def scores(self, terms: Sequence[str]) -> np.ndarray:
        """Returns float32 scores of all documents, positions counting through the segments; deleted ones score 0."""
        parts = [np.zeros(len(live_N), dtype=np.float32) for live_N in self._live]
        contributions: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for term in terms:
            if term not in contributions:
                contributions[term] = self._contributions(term)
            for part, (documents_P, values_P) in zip(parts, contributions[term], strict=True):
                part[documents_P] += values_P
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.float32)

    def explain(self, terms: Sequence[str], places: Sequence[tuple[int, int]]) -> list[list[tuple[str, float, float]]]:
        """Returns (term, its weight in the query, in the document) of what each document has of the terms.

        ``places``: each document's segment and its place there. The query's weight is the term's idf, as often as the query has
        the term; the document's is tf / (penalty + tf). The products sum to the score, up to rounding.
        """
        found: list[list[tuple[str, float, float]]] = [[] for _ in places]
        if not places:
            return found
        lengths = [self._segments[number].lengths_N[position] for number, position in places]
        penalties = self._penalties(np.array(lengths, dtype=np.int32)).tolist()
        for term, times in Counter(terms).items():
            lists = [segment.find(term) for segment in self._segments]
            weight = float(self._idf(lists)) * times
            for parts, (number, position), penalty in zip(found, places, penalties, strict=True):
                documents_P, counts_P = lists[number]
                place = int(np.searchsorted(documents_P, position))
                if place < len(documents_P) and documents_P[place] == position:
                    parts.append((term, weight, int(counts_P[place]) / (penalty + int(counts_P[place]))))
        return found

    def _contributions(self, term: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for each segment (documents, idf · tf / (penalty + tf)) of the live documents with ``term``."""
        lists = [segment.find(term) for segment in self._segments]
        idf, parts = self._idf(lists), []
        for segment, live_N, (documents_P, counts_P) in zip(self._segments, self._live, lists, strict=True):
            kept_P = live_N[documents_P]
            kept, counts = documents_P[kept_P], counts_P[kept_P].astype(np.float32)
            penalties = self._penalties(segment.lengths_N[kept])
            parts.append((kept, (idf * (counts / (penalties + counts))).astype(np.float32)))
        return parts


def _concatenated(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
