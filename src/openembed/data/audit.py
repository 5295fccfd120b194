"""What mining did, in numbers and in samples to read: plain values that the audit sheet shows.

``queries``, ``negatives``, ``without_negatives``, ``dropped``, ``short`` (queries with fewer than ``keep`` survivors),
``filled`` (negatives from below the pool or at random), ``refused`` (pool documents at or above the ceiling), ``passed``
(candidates left out, by reason), ``survivors`` (how many queries had 0, 1, ... ``keep`` or more), ``histograms`` of teacher
scores over ``low``..``high`` (those of the first block; what lies outside counts in the end bins).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from openembed.data.select import Picked, PolicyConfig, Ranking
from openembed.records import Document, Example
from openembed.seeds import generator

BINS = 60
SAMPLES = 20
SHOWN = 3
"""Kept and refused documents a sample shows."""
CHARACTERS = 600
KINDS = ("positive", "kept", "refused")


class Audit:
    """Counts over the queries added so far; ``state`` is all of it as JSON values."""

    def __init__(self, keep: int, state: dict[str, Any] | None = None) -> None:
        names = ("queries", "negatives", "without_negatives", "dropped", "short", "filled", "refused", "pool")
        fresh = {**dict.fromkeys(names, 0), "passed": {}, "survivors": [0] * (keep + 1), "histograms": None}
        self.state: dict[str, Any] = fresh if state is None else state
        self._keep = keep

    def add_block(self, rankings: Sequence[Ranking], picks: Sequence[Picked | None], refused: Sequence[Picked]) -> None:
        """Takes in one block: rankings, what was picked (None: the query was dropped), and the picks before filling."""
        state = self.state
        values = {kind: [] for kind in KINDS}
        for ranking, picked, before in zip(rankings, picks, refused, strict=True):
            state["queries"] += 1
            state["pool"] += len(before.refused) + before.survivors
            state["refused"] += len(before.refused)
            state["survivors"][min(before.survivors, self._keep)] += 1
            state["short"] += before.survivors < self._keep
            state["dropped"] += picked is None
            for reason, count in ranking.passed.items():
                state["passed"][reason] = state["passed"].get(reason, 0) + count
            values["positive"].append(ranking.positive_scores)
            values["refused"].append(ranking.scores[before.refused])
            if picked is not None:
                state["negatives"] += len(picked.documents)
                state["without_negatives"] += not len(picked.documents)
                state["filled"] += picked.filled
                values["kept"].append(picked.scores)
        self._count({kind: np.concatenate([*parts, np.empty(0, np.float32)]) for kind, parts in values.items()})

    def _count(self, values: dict[str, np.ndarray]) -> None:
        every = np.concatenate(list(values.values()))
        if self.state["histograms"] is None:
            low, high = (float(every.min()), float(every.max())) if len(every) else (0.0, 1.0)
            high = high if high > low else low + 1.0
            self.state["histograms"] = {"low": low, "high": high, **{kind: [0] * BINS for kind in KINDS}}
        histograms = self.state["histograms"]
        for kind, scores in values.items():
            within = np.clip(scores, histograms["low"], histograms["high"])
            counts, _ = np.histogram(within, BINS, (histograms["low"], histograms["high"]))
            histograms[kind] = [int(old + new) for old, new in zip(histograms[kind], counts, strict=True)]


def sampled_rows(count: int, seed: int) -> set[int]:
    """Returns which of ``count`` queries the audit sheet shows."""
    return set(generator(seed, "audit").choice(count, size=min(SAMPLES, count), replace=False).tolist())


def sample(
    example: Example, ranking: Ranking, picked: Picked, limit: float, document: Callable[[int], Document]
) -> dict[str, Any]:
    """Returns one query to read: its positives, the ceiling, the best kept and the best refused documents with scores."""

    def shown(numbers: Iterable[int], scores: np.ndarray, ranks: Iterable[int]) -> list[dict[str, Any]]:
        rows = list(zip(numbers, scores.tolist(), ranks, strict=True))[:SHOWN]
        return [{"text": _cut(document(int(n)).full_text), "score": s, "rank": int(r)} for n, s, r in rows]

    positives = zip(example.positives, ranking.positive_scores.tolist(), strict=True)
    refused = picked.refused
    return {
        "query": _cut(example.query.text),
        "ceiling": limit if np.isfinite(limit) else None,
        "positives": [{"text": _cut(d.full_text), "score": score, "rank": None} for d, score in list(positives)[:SHOWN]],
        "kept": shown(picked.documents, picked.scores, picked.ranks),
        "refused": shown(ranking.documents[refused], ranking.scores[refused], refused + 1),
    }


def summary(source: str, teacher: str, config: PolicyConfig, counts: dict[str, Any], samples: list[Any]) -> dict[str, Any]:
    """Returns the audit of one source, as ``audit.json`` holds it."""
    return {"source": source, "teacher": teacher, "policy": config.label, "keep": config.keep, **counts, "samples": samples}


def _cut(text: str) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be shown
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
