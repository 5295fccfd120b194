"""Removes evaluation texts and duplicates from training data, and says what was removed and why.

NV-Embed (arXiv 2405.17428, appendix on training data) removes what BM25 finds similar to evaluation texts, and exact
copies; the thresholds are not published. A text is tested in this order, and the first test that finds something is the
reason given: ``exact``, ``contains``, ``near_duplicate``, ``bm25``.

The thresholds were chosen by reading what they remove from 305,354 training texts against 28 evaluation sets (docs/log.md).
What is left of false alarms are questions of one template about two types of one disease ("type IV", "type V"), and
sentences that an evaluation text shares with many others; both cost little training data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from openembed.config import Config
from openembed.data.evaluation_texts import EvaluationTexts
from openembed.data.overlap import Bm25Index, RunIndex, SetIndex, WordHasher, normalised

Reason = Literal["exact", "contains", "near_duplicate", "bm25"]
BLOCK = 10_000
CUT = 200
"""Characters of a text that a record of its removal shows."""


class FilterConfig(Config):
    """What counts as an evaluation text in training, and as a duplicate.

    ``tests``: those that are made. ``exact``: equal letters and digits, case folded. ``contains``: a run of ``run`` words
    is in both; a run that holds ``template`` words that more than ``common`` evaluation texts have does not count.
    ``near_duplicate``: Jaccard similarity of ``shingle``-word shingles from ``jaccard`` up. ``bm25``: similarity from
    ``bm25`` up between texts of ``terms`` different stems or more, stop words not counted (see
    :class:`openembed.data.overlap.Bm25Index`); ``language`` is that of its stems.
    ``positives``: an example falls when ``any`` of its positives is an evaluation text, or only when ``all`` are (the
    others stay). ``duplicates`` inside the training data, the first kept: ``exact``, ``near`` (``jaccard`` again) too.
    """

    tests: tuple[Reason, ...] = ("exact", "contains", "near_duplicate", "bm25")
    run: int = Field(13, ge=2)
    template: int = Field(8, ge=1)
    common: int = Field(10, ge=1)
    jaccard: float = Field(0.8, gt=0, le=1)
    shingle: int = Field(3, ge=1)
    bm25: float = Field(0.85, gt=0, le=1)
    terms: int = Field(6, ge=1)
    language: str = "en"
    positives: Literal["any", "all"] = "any"
    duplicates: Literal["exact", "near", "none"] = "near"


@dataclass(frozen=True)
class Match:
    """Why a text was found: ``score`` is 1, the words of the shared run, the Jaccard similarity or the BM25 similarity.

    ``set`` and ``text`` are the evaluation set and its text; for duplicates the source and id of the row that stays.
    """

    reason: str
    score: float
    set: str
    text: str


class Decontaminator:
    """Finds the training texts that overlap with evaluation texts."""

    def __init__(self, evaluation: EvaluationTexts, config: FilterConfig) -> None:
        self._evaluation, self._config = evaluation, config
        self._hasher = WordHasher()
        words = self._hasher(evaluation.normalised)
        self._runs = RunIndex(words, config.run, config.template, config.common) if "contains" in config.tests else None
        self._sets = SetIndex(words, config.shingle, config.jaccard) if "near_duplicate" in config.tests else None
        self._bm25 = None
        if "bm25" in config.tests:
            self._bm25 = Bm25Index(evaluation.texts, config.bm25, config.terms, config.language)

    def find(self, texts: Sequence[str]) -> list[Match | None]:
        """Returns for each text why it must go, or None."""
        found: list[Match | None] = [None] * len(texts)
        keys = [normalised(text) for text in texts]
        if "exact" in self._config.tests:
            for number, key in enumerate(keys):
                if (known := self._evaluation.known.get(key)) is not None:
                    found[number] = self._match("exact", 1.0, known)
        for search in (self._contains, self._near, self._similar):
            left = [number for number, match in enumerate(found) if match is None and keys[number]]
            for place, match in search([keys[number] for number in left], [texts[number] for number in left]):
                found[left[place]] = match
        return found

    def _contains(self, keys: Sequence[str], _texts: Sequence[str]) -> Iterator[tuple[int, Match]]:
        if self._runs is None:
            return
        for text, other, first, count in self._runs.find(self._hasher(keys)):
            run = " ".join(keys[text].split()[first : first + count])
            if f" {run} " in f" {self._evaluation.normalised[other]} ":  # 64-bit hashes may collide
                yield text, self._match("contains", float(count), other, run)

    def _near(self, keys: Sequence[str], _texts: Sequence[str]) -> Iterator[tuple[int, Match]]:
        if self._sets is None:
            return
        best: dict[int, tuple[float, int]] = {}
        for text, other, similarity in self._sets.find(self._hasher(keys)):
            if similarity > best.get(text, (0.0, 0))[0]:
                best[text] = (similarity, other)
        for text, (similarity, other) in best.items():
            yield text, self._match("near_duplicate", similarity, other)

    def _similar(self, _keys: Sequence[str], texts: Sequence[str]) -> Iterator[tuple[int, Match]]:
        if self._bm25 is None:
            return
        for text, other, similarity in self._bm25.find(texts):
            yield text, self._match("bm25", similarity, other)

    def _match(self, reason: str, score: float, number: int, text: str | None = None) -> Match:
        evaluation = self._evaluation
        shown = evaluation.texts[number] if text is None else text
        return Match(reason, round(score, 4), evaluation.sets[evaluation.set_of[number]], cut(shown))


def cut(text: str) -> str:
    """Returns a text as records show it."""
    return text if len(text) <= CUT else f"{text[: CUT - 1]}…"
