"""How much two texts overlap, for many texts against many: equal words, shared runs of words, word sets, BM25.

Words are compared as 64-bit hashes of what :func:`normalised` leaves. Both set tests find every pair at or above their
threshold (no sampling, no MinHash): with all items in one global order, rarest first, two sets alike enough share an item
of both their prefixes, so only texts that share one are compared (Bayardo et al., "Scaling up all pairs similarity
search", 2007). Shapes: W words, G n-grams, N indexed texts, B texts of a block, P pairs.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from openembed.index.lexical import K1, B, analyzer

WORD = re.compile(r"[^\W_]+")
MULTIPLIER = 0x9E3779B97F4A7C15 | 1
PAIRS = 2**20
"""At most about this many candidate pairs are held at once."""
ROUNDING = 1e-9


def normalised(text: str) -> str:
    """Returns the letters and digits of a text, case folded, one space between words: what counts as the same text."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def fingerprint(text: str) -> bytes:
    """Returns 16 bytes that two texts share only if they are equal after :func:`normalised`, or as they are without words."""
    return hashlib.blake2b((normalised(text) or text.strip()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclass(frozen=True)
class Words:
    """The word hashes of texts in one row: text ``i`` is ``hashes_W[starts[i]:starts[i + 1]]``."""

    hashes_W: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def counts(self) -> np.ndarray:
        """Words of each text."""
        return np.diff(self.starts)

    @classmethod
    def joined(cls, parts: Sequence[Words]) -> Words:
        """Returns the texts of all ``parts``, in order."""
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *(part.counts for part in parts)])
        hashes_W = np.concatenate([np.zeros(0, dtype=np.uint64), *(part.hashes_W for part in parts)])
        return cls(hashes_W, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))

    def part(self, start: int, stop: int) -> Words:
        """Returns the texts from ``start`` up to ``stop``."""
        low, high = self.starts[start], self.starts[min(stop, len(self))]
        return Words(self.hashes_W[low:high], self.starts[start : stop + 1] - low)

    def ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns hash, text and first word (in ``hashes_W``) of every run of ``size`` words inside one text, in order."""
        usable = max(len(self.hashes_W) - size + 1, 0)
        grams_G = np.zeros(usable, dtype=np.uint64)
        power = 1
        for offset in range(size):
            grams_G += self.hashes_W[offset : offset + usable] * np.uint64(power)
            power = power * MULTIPLIER % 2**64
        owners = np.repeat(np.arange(len(self)), self.counts)[:usable]
        places = np.flatnonzero(np.arange(usable) + size <= self.starts[owners + 1])
        return grams_G[places], owners[places], places


class WordHasher:
    """Turns texts into :class:`Words`; remembers words it has seen, up to ``limit`` of them."""

    def __init__(self, limit: int = 2_000_000) -> None:
        self._known: dict[str, int] = {}
        self._limit = limit

    def __call__(self, normalised_texts: Sequence[str]) -> Words:
        """Returns the words of texts that :func:`normalised` made."""
        rows = [text.split() for text in normalised_texts]
        if len(self._known) > self._limit:
            self._known.clear()
        for word in {word for row in rows for word in row}.difference(self._known):
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            self._known[word] = int.from_bytes(digest, "little")
        known = self._known
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        hashes_W = np.fromiter((known[word] for row in rows for word in row), dtype=np.uint64, count=int(starts[-1]))
        return Words(hashes_W, starts)


class RunIndex:
    """Finds texts that share a run of ``size`` words with an indexed text.

    Where ``template`` words in a row are in more than ``common`` of the indexed texts they are a template ("provides the
    following list of signs and symptoms for ..."), and a run that holds one says nothing; it is left out.
    """

    def __init__(self, words: Words, size: int, template: int, common: int) -> None:
        self.size = size
        starts_G = np.zeros(len(words.hashes_W) + 1, dtype=np.int64)
        grams_G, owners_G, places_G = words.ngrams(min(template, size))
        order = np.lexsort((owners_G, grams_G))
        new_text = _new(grams_G[order]) | _new(owners_G[order])
        _, counts = np.unique(grams_G[order][new_text], return_counts=True)
        starts_G[places_G[order] + 1] = np.repeat(counts, np.diff(_edges(grams_G[order]))) > common
        templates_G = np.cumsum(starts_G)
        grams_G, owners_G, places_G = words.ngrams(size)
        clear = templates_G[places_G + size - min(template, size) + 1] == templates_G[places_G]
        self._grams, first = np.unique(grams_G[clear], return_index=True)
        self._owners = owners_G[clear][first].astype(np.int32)
        self._places = places_G[clear][first]

    def find(self, words: Words) -> Iterator[tuple[int, int, int, int]]:
        """Yields (text, indexed text, first word in the text, words) of the longest shared run of each text with one.

        Of a run that is in several indexed texts the first is named, so a run may be longer than said.
        """
        if not len(self._grams):
            return
        grams_G, owners_G, places_G = words.ngrams(self.size)
        found_G = np.searchsorted(self._grams, grams_G).clip(max=len(self._grams) - 1)
        hits = np.flatnonzero(self._grams[found_G] == grams_G)
        if not len(hits):
            return
        texts, places, matched = owners_G[hits], places_G[hits], self._owners[found_G[hits]]
        together = (np.diff(places) == 1) & (np.diff(self._places[found_G[hits]]) == 1)
        begins = np.flatnonzero(np.r_[True, ~together | (np.diff(texts) != 0) | (np.diff(matched) != 0)])
        lengths = np.diff(np.r_[begins, len(hits)]) + self.size - 1
        order = np.lexsort((begins, -lengths, texts[begins]))
        firsts = order[np.r_[True, np.diff(texts[begins][order]) != 0]]
        for run in firsts.tolist():
            hit = begins[run]
            text = int(texts[hit])
            yield text, int(matched[hit]), int(places[hit] - words.starts[text]), int(lengths[run])


class SetIndex:
    """Finds every pair of texts whose sets of ``size``-word shingles have a Jaccard similarity of ``threshold`` or more.

    A text shorter than ``size`` is one shingle. Memory: about 30 bytes a shingle.
    """

    def __init__(self, words: Words, size: int, threshold: float) -> None:
        self._size, self._threshold = size, threshold
        grams_G, owners_G = self._shingles(words)
        self._known, numbers_G = np.unique(grams_G, return_inverse=True)
        self._frequency = np.bincount(numbers_G, minlength=len(self._known))
        self._sets = self._matrix(numbers_G, owners_G, len(words))
        self._sizes = np.diff(self._sets.indptr).astype(np.int64)
        keys, texts, places = self._prefixes(numbers_G, owners_G, self._sizes)
        order = np.argsort(keys, kind="stable")
        self._keys, self._texts, self._places = keys[order], texts[order].astype(np.int32), places[order].astype(np.int32)

    def find(self, words: Words) -> Iterator[tuple[int, int, float]]:
        """Yields (text, indexed text, Jaccard) of all pairs, by text and indexed text."""
        if not len(self._known) or not len(words.hashes_W):
            return
        grams_G, owners_G = self._shingles(words)
        sizes = np.bincount(owners_G, minlength=len(words))
        numbers_G = np.searchsorted(self._known, grams_G).clip(max=len(self._known) - 1)
        numbers_G[self._known[numbers_G] != grams_G] = -1
        found = [np.zeros(0, dtype=np.int64), *self._candidates(*self._prefixes(numbers_G, owners_G, sizes), sizes)]
        pairs = np.unique(np.concatenate(found))
        seen = numbers_G >= 0
        sets = self._matrix(numbers_G[seen], owners_G[seen], len(words))
        for start in range(0, len(pairs), PAIRS // 8):
            ones, others = np.divmod(pairs[start : start + PAIRS // 8], len(self._sizes))
            shared = np.diff(sets[ones].multiply(self._sets[others]).tocsr().indptr)
            similarity = shared / (sizes[ones] + self._sizes[others] - shared)
            for pair in np.flatnonzero(similarity >= self._threshold - ROUNDING).tolist():
                yield int(ones[pair]), int(others[pair]), float(similarity[pair])

    def _shingles(self, words: Words) -> tuple[np.ndarray, np.ndarray]:
        """The distinct shingles of each text, sorted inside it, and their texts."""
        grams_G, owners_G, _ = words.ngrams(self._size)
        for count in range(1, self._size):
            whole_G, owners, _ = words.ngrams(count)
            whole = words.counts[owners] == count
            grams_G, owners_G = np.concatenate([grams_G, whole_G[whole]]), np.concatenate([owners_G, owners[whole]])
        order = np.lexsort((grams_G, owners_G))
        grams_G, owners_G = grams_G[order], owners_G[order]
        new = _new(grams_G) | _new(owners_G)
        return grams_G[new], owners_G[new]

    def _matrix(self, numbers_G: np.ndarray, owners_G: np.ndarray, count: int) -> Any:
        """The sets as rows of a sparse matrix of ones (texts, known shingles)."""
        from scipy.sparse import csr_array

        starts = np.concatenate([[0], np.cumsum(np.bincount(owners_G, minlength=count))])
        ones = np.ones(len(numbers_G), dtype=np.int8)
        return csr_array((ones, numbers_G, starts), shape=(count, len(self._known)))

    def _prefixes(
        self, numbers_G: np.ndarray, owners_G: np.ndarray, sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number, text and place of the rarest shingles of each text, of which two texts alike enough share one.

        Shingles that are not indexed (-1) are the rarest of all.
        """
        frequency = np.where(numbers_G < 0, 0, self._frequency[numbers_G])
        order = np.lexsort((numbers_G, frequency, owners_G))
        starts = np.cumsum(sizes) - sizes
        places = np.arange(len(order)) - starts[owners_G[order]]
        needed = sizes - np.ceil(self._threshold * sizes - ROUNDING).astype(np.int64) + 1
        kept = (places < needed[owners_G[order]]) & (numbers_G[order] >= 0)
        return numbers_G[order][kept], owners_G[order][kept], places[kept]

    def _candidates(self, keys: np.ndarray, texts: np.ndarray, places: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
        """Yields pairs (text x indexed texts + indexed text) that share a shingle of their prefixes and could be alike.

        What two texts share from their first common shingle on is at most what the shorter has left there.
        """
        low, high = np.searchsorted(self._keys, keys, "left"), np.searchsorted(self._keys, keys, "right")
        total = np.cumsum(high - low)
        most = int(total[-1]) if len(total) else 0
        cuts = [0, *np.searchsorted(total, np.arange(PAIRS, most, PAIRS)).tolist(), len(keys)]
        for start, stop in pairwise(cuts):
            counts = (high - low)[start:stop]
            ones = np.repeat(texts[start:stop], counts)
            offsets = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            entries = np.repeat(low[start:stop], counts) + offsets
            others = self._texts[entries].astype(np.int64)
            a, b = sizes[ones], self._sizes[others]
            left = np.minimum(a - np.repeat(places[start:stop], counts), b - self._places[entries])
            fits = left >= self._threshold / (1 + self._threshold) * (a + b) - ROUNDING
            yield np.unique(ones[fits] * len(self._sizes) + others[fits])


class Bm25Index:
    """Finds texts of which an indexed text is the other half by BM25: each mostly made of the other's informative words.

    For a text ``x`` and an indexed text ``e``, as sets of terms with the BM25 weights (bm25s, ``lucene``, k1 1.5, b 0.75,
    statistics of the indexed texts) that they have in ``e``, ``forward`` is the score of ``e`` for the query ``x`` over
    its score for itself, and ``backward`` the same with the roles changed. The similarity is the lower of the two:
    forward alone calls every long text that happens to hold a question's words a copy of it. Texts with fewer than
    ``terms`` different terms are neither indexed nor looked up: two or three words say too little.
    """

    def __init__(self, texts: Sequence[str], threshold: float, terms: int, language: str) -> None:
        import bm25s
        from scipy.sparse import csc_array

        self._threshold, self._terms = threshold, terms
        self._analyzer = analyzer(language)
        tokenized = self._tokenize(texts)
        self._vocabulary: dict[str, int] = {}
        if not any(tokenized.ids):
            return
        model = bm25s.BM25(k1=K1, b=B, method="lucene")
        model.index(tokenized, show_progress=False)
        parts = (model.scores["data"], model.scores["indices"], model.scores["indptr"])
        weights = csc_array(parts, shape=(len(texts), len(parts[2]) - 1)).astype(np.float64)
        self._vocabulary = dict(tokenized.vocab)
        frequency = np.diff(weights.indptr)
        self._rank = np.argsort(np.lexsort((np.arange(len(frequency)), frequency)))
        self._idf = np.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
        self._unseen = float(np.log(1 + (len(texts) + 0.5) / 0.5))
        self._average = float(np.mean([len(row) for row in tokenized.ids])) or 1.0
        self._weights = weights.tocsr()
        self._own = np.asarray(self._weights.sum(axis=1)).ravel()
        usable = np.diff(self._weights.indptr) >= terms
        self._prefix = _prefix(self._weights, self._own, self._rank, threshold, usable).T.tocsr()
        self._present = self._weights.astype(bool).astype(np.float64)

    def find(self, texts: Sequence[str]) -> Iterator[tuple[int, int, float]]:
        """Yields (text, indexed text, similarity) of the best indexed text of each text that has one."""
        if not self._vocabulary or not texts:
            return
        own, total, distinct = self._own_weights(texts)
        usable = distinct >= self._terms
        pairs = (_prefix(own, total, self._rank, self._threshold, usable) @ self._prefix).tocoo()
        best: dict[int, tuple[float, int]] = {}
        for start in range(0, len(pairs.data), PAIRS // 8):
            ones, others = pairs.coords[0][start : start + PAIRS // 8], pairs.coords[1][start : start + PAIRS // 8]
            shared = own[ones].astype(bool).multiply(self._weights[others])
            forward = np.asarray(shared.sum(axis=1)).ravel() / self._own[others]
            near = np.flatnonzero(forward >= self._threshold)
            ones, others = ones[near], others[near]
            back = np.asarray(own[ones].multiply(self._present[others]).sum(axis=1)).ravel() / total[ones]
            similarity = np.minimum(forward[near], back)
            for pair in np.flatnonzero(similarity >= self._threshold).tolist():
                one, other, value = int(ones[pair]), int(others[pair]), float(similarity[pair])
                if (value, -other) > (best.get(one, (0.0, 0))[0], -best.get(one, (0.0, 0))[1]):
                    best[one] = (value, other)
        for one, (value, other) in sorted(best.items()):
            yield one, other, min(value, 1.0)

    def _tokenize(self, texts: Sequence[str]) -> Any:
        """Terms of one letter too, which bm25s and search leave out: ``type I`` is not ``type V``."""
        import bm25s

        options = {"stopwords": self._analyzer.stopwords, "stemmer": self._analyzer.stemmer, "show_progress": False}
        return bm25s.tokenize([normalised(text) for text in texts], token_pattern=r"\S+", **options)

    def _own_weights(self, texts: Sequence[str]) -> tuple[Any, np.ndarray, np.ndarray]:
        """BM25 weights of the texts' own terms that are indexed (B, terms), of all their terms (B,), and term counts."""
        from scipy.sparse import csr_array

        tokenized = self._tokenize(texts)
        names = sorted(tokenized.vocab, key=tokenized.vocab.__getitem__)
        columns = np.array([self._vocabulary.get(name, -1) for name in names] or [-1])
        lengths = np.array([len(row) for row in tokenized.ids])
        rows = np.repeat(np.arange(len(texts)), lengths)
        terms = np.fromiter((term for row in tokenized.ids for term in row), dtype=np.int64, count=int(lengths.sum()))
        keys, counts = np.unique(rows * len(columns) + terms, return_counts=True)
        rows, terms = np.divmod(keys, len(columns))
        penalty = K1 * (1 - B + B * lengths / self._average)
        idf = np.where(columns[terms] < 0, self._unseen, self._idf[columns[terms]])
        values = idf * counts / (counts + penalty[rows])
        total = np.bincount(rows, values, minlength=len(texts))
        known = columns[terms] >= 0
        shape = (len(texts), len(self._idf))
        own = csr_array((values[known], (rows[known], columns[terms][known])), shape=shape)
        return own, np.maximum(total, 1e-12), np.bincount(rows, minlength=len(texts))


def _prefix(weights: Any, total: np.ndarray, rank: np.ndarray, threshold: float, usable: np.ndarray) -> Any:
    """Of each usable row the terms, rarest first, without which the rest weighs less than ``threshold`` of ``total``."""
    from scipy.sparse import csr_array

    rows = np.repeat(np.arange(weights.shape[0]), np.diff(weights.indptr))
    order = np.lexsort((rank[weights.indices], rows))
    running = np.cumsum(weights.data[order])
    row_end = np.concatenate([[0.0], running])[weights.indptr[1:]]
    rest = row_end[rows] - running + weights.data[order]
    kept = order[(rest >= threshold * total[rows] - 1e-6) & usable[rows]]
    ones = np.ones(len(kept), dtype=np.int32)
    return csr_array((ones, (rows[kept], weights.indices[kept])), shape=weights.shape)


def _new(values: np.ndarray) -> np.ndarray:
    """True where a value differs from the one before it."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return new


def _edges(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin, and the end."""
    return np.append(np.flatnonzero(_new(values)), len(values))
