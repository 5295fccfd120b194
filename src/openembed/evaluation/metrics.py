"""Ranking metrics for each query, computed by trec_eval (pytrec_eval).

Rules, everywhere: documents are ordered by (score, document id) descending; a judged query that is absent from the run
scores 0 and counts in every mean; the gain is linear; a grade of 0 or less is not relevant. Scores are compared in
single precision, as trec_eval does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from openembed.records import Qrels, Run

FAMILIES = {
    "ndcg": "ndcg_cut",
    "map": "map_cut",
    "recall": "recall",
    "precision": "P",
    "hit_rate": "success",
    "mrr": "recip_rank",
}
RETRIEVAL_METRICS = (
    *(f"ndcg_at_{k}" for k in (1, 3, 5, 10, 20, 100, 1000)),
    *(f"recall_at_{k}" for k in (1, 5, 10, 20, 100, 1000)),
    *(f"map_at_{k}" for k in (10, 100, 1000)),
    *(f"mrr_at_{k}" for k in (10, 100, 1000)),
    *(f"precision_at_{k}" for k in (1, 5, 10)),
    "hit_rate_at_10",
)


def parse_metric(name: str) -> tuple[str, int]:
    """Returns (family, k) of a name such as ``ndcg_at_10`` or ``nDCG@10``; a ``ValueError`` lists the families."""
    match = re.fullmatch(r"([a-z_]+?)(?:_at_|@)([1-9]\d*)", name.lower())
    if not match or match[1] not in FAMILIES:
        raise ValueError(f"unknown metric {name!r}; write family_at_k with a family of {', '.join(FAMILIES)}")
    return match[1], int(match[2])


def canonical(name: str) -> str:
    """Returns the name as results spell it: ``nDCG@10`` becomes ``ndcg_at_10``."""
    family, k = parse_metric(name)
    return f"{family}_at_{k}"


def per_query(run: Run, qrels: Qrels, metrics: Sequence[str] = RETRIEVAL_METRICS) -> dict[str, dict[str, float]]:
    """Returns metric → query id → value for every judged query, in the order of ``qrels``.

    Queries of the run without judgements are left out. Raises ``ValueError`` for an unknown metric, a score that is not
    finite, or empty ``qrels``.
    """
    import pytrec_eval

    wanted = {name: parse_metric(name) for name in metrics}
    if not qrels:
        raise ValueError("there are no judgements; nothing can be scored")
    _require_finite(run)
    cuts: dict[str, set[int]] = {}
    for family, k in wanted.values():
        cuts.setdefault(FAMILIES[family], set()).add(k)
    measures = {
        measure if measure == "recip_rank" else f"{measure}.{','.join(map(str, sorted(ks)))}" for measure, ks in cuts.items()
    }
    judged_run = {query_id: dict(run[query_id]) for query_id in qrels if run.get(query_id)}
    scored = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(judged_run)
    return {
        name: {query_id: _value(scored.get(query_id), family, k) for query_id in qrels} for name, (family, k) in wanted.items()
    }


def mean(values: Mapping[str, float] | Iterable[float]) -> float:
    """Returns the plain mean of the values (of a mapping: of its values)."""
    numbers = list(values.values() if isinstance(values, Mapping) else values)
    return math.fsum(numbers) / len(numbers)


def _value(scored: Mapping[str, float] | None, family: str, k: int) -> float:
    if scored is None:
        return 0.0
    if family == "mrr":
        reciprocal = scored["recip_rank"]
        return reciprocal if reciprocal > 0 and round(1 / reciprocal) <= k else 0.0
    return scored[f"{FAMILIES[family]}_{k}"]


def _require_finite(run: Run) -> None:
    for query_id, ranking in run.items():
        for document_id, score in ranking.items():
            if not math.isfinite(score):
                raise ValueError(f"query {query_id!r}, document {document_id!r}: the score must be finite, got {score}")
