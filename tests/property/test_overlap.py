"""The fast overlap tests against plain ones over all pairs."""

import math
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.data.overlap import K1, B, Bm25Index, RunIndex, SetIndex, WordHasher

words = st.lists(st.sampled_from("abcdefgh"), max_size=14).map(" ".join)
many = st.lists(words, min_size=1, max_size=12)


def shingles(text, size):
    row = text.split()
    if len(row) < size:
        return {tuple(row)} if row else set()
    return {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}


@given(many, many, st.integers(1, 4), st.sampled_from([0.3, 0.5, 0.8, 0.9, 1.0]))
@settings(deadline=None, max_examples=200)
def test_set_index_finds_every_pair(indexed, texts, size, threshold):
    hasher = WordHasher()
    found = {(i, j): round(s, 9) for i, j, s in SetIndex(hasher(indexed), size, threshold).find(hasher(texts))}
    expected = {}
    for i, one in enumerate(texts):
        for j, other in enumerate(indexed):
            a, b = shingles(one, size), shingles(other, size)
            if a and b and len(a & b) / len(a | b) >= threshold - 1e-9:
                expected[i, j] = round(len(a & b) / len(a | b), 9)
    assert found == expected


@given(many, many, st.integers(2, 5))
@settings(deadline=None, max_examples=200)
def test_run_index_finds_every_text_with_a_shared_run(indexed, texts, size):
    hasher = WordHasher()
    found = list(RunIndex(hasher(indexed), size, size, len(indexed)).find(hasher(texts)))
    runs = [{tuple(t.split()[i : i + size]) for i in range(len(t.split()) - size + 1)} for t in indexed]
    expected = [
        i
        for i, t in enumerate(texts)
        for row in [t.split()]
        if any(tuple(row[k : k + size]) in run for run in runs for k in range(len(row) - size + 1))
    ]
    assert [text for text, _, _, _ in found] == expected
    for text, other, first, count in found:
        run = " ".join(texts[text].split()[first : first + count])
        assert count >= size
        assert f" {run} " in f" {indexed[other]} "


def plain_bm25(indexed, text):
    """The similarity of ``text`` to each indexed text, from the definition."""
    documents = [Counter(t.split()) for t in indexed]
    average = sum(sum(d.values()) for d in documents) / len(documents)
    frequency = Counter(term for d in documents for term in d)

    def weights(counts):
        penalty = K1 * (1 - B + B * sum(counts.values()) / average)
        idf = {t: math.log(1 + (len(documents) - frequency[t] + 0.5) / (frequency[t] + 0.5)) for t in counts}
        return {t: idf[t] * n / (n + penalty) for t, n in counts.items()}

    mine = weights(Counter(text.split()))
    for document in documents:
        theirs = weights(document)
        shared = mine.keys() & theirs.keys()
        yield min(
            sum(theirs[t] for t in shared) / sum(theirs.values()) if theirs else 0.0,
            sum(mine[t] for t in shared) / sum(mine.values()) if mine else 0.0,
        )


@given(many.filter(any), many, st.sampled_from([0.3, 0.6, 0.85, 1.0]), st.integers(1, 3))
@settings(deadline=None, max_examples=200)
def test_bm25_index_finds_the_best_of_all_pairs(indexed, texts, threshold, terms):
    found = {text: (other, value) for text, other, value in Bm25Index(indexed, threshold, terms, "none").find(texts)}
    for number, text in enumerate(texts):
        scores = list(plain_bm25(indexed, text))
        usable = [
            s if len(set(t.split())) >= terms and len(set(text.split())) >= terms else 0.0
            for s, t in zip(scores, indexed, strict=True)
        ]
        best = max(usable)
        if number in found:
            other, value = found[number]
            assert abs(value - best) < 1e-5
            assert abs(usable[other] - best) < 1e-5
            assert best >= threshold - 1e-5
        else:
            assert best < threshold + 1e-5
