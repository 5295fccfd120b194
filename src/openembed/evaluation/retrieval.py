"""Retrieval and reranking by exact search over all documents, scored as MTEB scores them.

Representations of any kind: inner products of dense and of sparse vectors; token vectors by MaxSim or another method.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from openembed.encoded import Encoded, take
from openembed.evaluation.costs import ALONE_K, alone_ms, costs_of
from openembed.evaluation.metrics import RETRIEVAL_METRICS, canonical, mean, per_query
from openembed.evaluation.result import Outcome
from openembed.evaluation.statistics import bootstrap_interval, generator
from openembed.evaluation.vectors import Vectors
from openembed.index import exact
from openembed.index.dense import best_first
from openembed.index.tokens.methods import EXACT, Exact, Method
from openembed.records import Document, Qrels, Query, Run

TOP_K = 1_000


@dataclass(frozen=True)
class RerankingItem:
    """A query with its candidates; ``positives`` and ``negatives`` are texts."""

    id: str
    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


def exact_search(
    queries: Encoded, query_ids: Sequence[str], documents: exact.Documents, document_ids: Sequence[str], top_k: int
) -> Run:
    """Returns the ``top_k`` documents of each query by the score of their kind; ties, also at the cut, by id descending."""
    rankings = documents.search(queries, top_k, document_ids.__getitem__)
    return {
        query_id: {document_ids[position]: score for position, score in ranking}
        for query_id, ranking in zip(query_ids, rankings, strict=True)
    }


def top_documents(scores_N: np.ndarray, document_ids: Sequence[str], top_k: int) -> dict[str, float]:
    """Returns the ``top_k`` best documents with their scores, ordered by (score, id) descending."""
    best = best_first(np.arange(len(scores_N)), scores_N, top_k, document_ids.__getitem__)
    return {document_ids[position]: score for position, score in best}


def score_run(run: Run, qrels: Qrels, metric: str, *, seed: int = 42, extra: Sequence[str] = RETRIEVAL_METRICS) -> Outcome:
    """Returns the metrics of ``run`` against ``qrels``: the means, per query, and the interval of ``metric``."""
    metric = canonical(metric)
    scores = per_query(run, qrels, tuple(dict.fromkeys((metric, *extra))))
    return Outcome(
        metric=metric,
        value=mean(scores[metric]),
        interval=bootstrap_interval(list(scores[metric].values()), generator(seed, "interval", metric)),
        metrics={name: mean(values) for name, values in scores.items()},
        counts={"queries": len(qrels), "judgements": sum(map(len, qrels.values()))},
        per_item=scores,
        run=run,
    )


def without_identical_ids(run: Run) -> Run:
    """Returns ``run`` without documents whose id is the query's, as ArguAna and Quora ask."""
    return {
        query_id: {document_id: score for document_id, score in ranking.items() if document_id != query_id}
        for query_id, ranking in run.items()
    }


def evaluate_retrieval(
    vectors: Vectors,
    corpus: Sequence[Document],
    queries: Sequence[Query],
    qrels: Qrels,
    *,
    metric: str = "ndcg_at_10",
    top_k: int = TOP_K,
    ignore_identical_ids: bool = False,
    method: Method = EXACT,
) -> Outcome:
    """Returns nDCG@10 (or ``metric``) of exact search; judged queries only, documents with their title.

    ``method``: how token vectors are searched.
    """
    judged = [query for query in queries if qrels.get(query.id)]
    documents = vectors.documents([document.full_text for document in corpus])
    texts, ids = [query.text for query in judged], [document.id for document in corpus]
    queries = vectors.queries(texts)
    searched = exact.prepared(documents, method)
    began = time.perf_counter()
    run = exact_search(queries, [q.id for q in judged], searched, ids, top_k)
    took = time.perf_counter() - began
    alone = alone_ms(lambda text: searched.search(vectors.one_query(text), ALONE_K, ids.__getitem__), texts)
    costs = costs_of(vectors, queries, documents, took, alone)
    outcome = score_retrieval(run, corpus, qrels, metric=metric, ignore_identical_ids=ignore_identical_ids)
    details = {} if isinstance(method, Exact) else {"scoring": method.model_dump()}
    return replace(outcome, costs=costs, details={**outcome.details, **details})


def score_retrieval(run: Run, corpus: Sequence[Document], qrels: Qrels, *, metric: str, ignore_identical_ids: bool) -> Outcome:
    """Returns the outcome of a finished run over ``corpus`` by MTEB's rules."""
    run = without_identical_ids(run) if ignore_identical_ids else run
    outcome = score_run(run, {query_id: judged for query_id, judged in qrels.items() if judged}, metric)
    return _with_counts(outcome, documents=len(corpus))


def reranking_qrels(items: Sequence[RerankingItem]) -> tuple[list[RerankingItem], Qrels, dict[str, str]]:
    """Returns the usable items, their judgements and candidate id → text.

    As in MTEB, a query without a positive or a negative is left out: every order of its candidates scores alike.
    """
    usable = [item for item in items if item.positives and item.negatives]
    qrels: Qrels = {}
    texts: dict[str, str] = {}
    for item in usable:
        candidates = [(text, 1) for text in item.positives] + [(text, 0) for text in item.negatives]
        qrels[item.id] = {}
        for number, (text, grade) in enumerate(candidates):
            identity = f"{item.id}_{number}"
            qrels[item.id][identity], texts[identity] = grade, text
    return usable, qrels, texts


def evaluate_reranking(vectors: Vectors, items: Sequence[RerankingItem], *, metric: str = "map_at_1000") -> Outcome:
    """Returns MAP (or ``metric``) of ordering each query's candidates by the score of their kind."""
    usable, qrels, texts = reranking_qrels(items)
    if not usable:
        raise ValueError("no query has both a positive and a negative candidate; there is nothing to rerank")
    identities = list(texts)
    documents = vectors.documents([texts[identity] for identity in identities])
    place = {identity: row for row, identity in enumerate(identities)}
    queries = vectors.queries([item.query for item in usable])
    run: Run = {}
    searched, began = exact.prepared(documents), time.perf_counter()
    for number, item in enumerate(usable):
        candidates = list(qrels[item.id])
        positions = np.array([place[identity] for identity in candidates])
        scores = searched.scores(take(queries, [number]), positions)
        run[item.id] = dict(zip(candidates, map(float, scores), strict=True))
    costs = costs_of(vectors, queries, documents, time.perf_counter() - began)
    return replace(score_reranking(run, items, metric=metric), costs=costs)


def score_reranking(run: Run, items: Sequence[RerankingItem], *, metric: str) -> Outcome:
    """Returns the outcome of a run over the candidates of ``items`` (ids ``<query id>_<number>``, positives first)."""
    _, qrels, texts = reranking_qrels(items)
    outcome = score_run(run, qrels, metric)
    return _with_counts(outcome, documents=len(texts), left_out=len(items) - len(qrels))


def _with_counts(outcome: Outcome, **counts: int) -> Outcome:
    merged: Mapping[str, int] = {**outcome.counts, **counts}
    return replace(outcome, counts=merged)
