"""Metrics against ir_measures and against a plain reading of their definitions, with ties and missing queries."""

import math

import ir_measures
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from search_paths import forced

from openembed.evaluation.metrics import mean, per_query
from openembed.evaluation.retrieval import exact_search, top_documents
from openembed.index.exact import prepared

QUERIES = [f"q{i}" for i in range(4)]
DOCUMENTS = [f"d{i}" for i in range(9)]
CUTS = (1, 3, 5, 10)
NAMES = {
    "ndcg": lambda k: ir_measures.nDCG @ k,
    "recall": lambda k: ir_measures.R @ k,
    "map": lambda k: ir_measures.AP @ k,
    "precision": lambda k: ir_measures.P @ k,
    "hit_rate": lambda k: ir_measures.Success @ k,
}
# few distinct scores, so that ties are the rule
runs = st.dictionaries(
    st.sampled_from(QUERIES), st.dictionaries(st.sampled_from(DOCUMENTS), st.sampled_from([0.0, 0.5, 0.25, 2.0, -1.0]))
)
judgements = st.dictionaries(
    st.sampled_from(QUERIES),
    st.dictionaries(st.sampled_from(DOCUMENTS), st.integers(-1, 3), min_size=1),
    min_size=1,
)


@settings(deadline=None, max_examples=150)
@given(run=runs, qrels=judgements)
def test_means_equal_ir_measures(run, qrels):
    names = [f"{family}_at_{k}" for family in NAMES for k in CUTS]
    ours = per_query(run, qrels, names)
    theirs = ir_measures.calc_aggregate([NAMES[family](k) for family in NAMES for k in CUTS], qrels, run)
    for family in NAMES:
        for k in CUTS:
            assert mean(ours[f"{family}_at_{k}"]) == pytest.approx(theirs[NAMES[family](k)], abs=1e-9), (family, k)


@settings(deadline=None, max_examples=150)
@given(run=runs, qrels=judgements)
def test_values_follow_the_definitions(run, qrels):
    scores = per_query(run, qrels, [f"{family}_at_3" for family in ("ndcg", "recall", "mrr", "precision")])
    for query, judged in qrels.items():
        order = [d for _, d in sorted(((s, d) for d, s in run.get(query, {}).items()), reverse=True)][:3]
        relevant = [d for d, grade in judged.items() if grade > 0]
        hits = [d in relevant for d in order]
        gain = sum(max(judged.get(d, 0), 0) / math.log2(rank + 2) for rank, d in enumerate(order))
        best = sorted((judged[d] for d in relevant), reverse=True)[:3]
        ideal = sum(grade / math.log2(rank + 2) for rank, grade in enumerate(best))
        assert scores["ndcg_at_3"][query] == pytest.approx(gain / ideal if ideal else 0)
        assert scores["recall_at_3"][query] == pytest.approx(sum(hits) / len(relevant) if relevant else 0)
        assert scores["precision_at_3"][query] == pytest.approx(sum(hits) / 3)
        assert scores["mrr_at_3"][query] == pytest.approx(1 / (hits.index(True) + 1) if any(hits) else 0)


@settings(deadline=None, max_examples=100)
@given(scores=st.lists(st.sampled_from([0.0, 0.5, -1.0, 2.0]), min_size=1, max_size=9), top_k=st.integers(1, 10))
def test_top_documents_equals_a_full_sort_with_ties(scores, top_k):
    ids = DOCUMENTS[: len(scores)]
    expected = sorted(zip(scores, ids, strict=True), reverse=True)[:top_k]
    assert [(s, d) for d, s in top_documents(np.array(scores), ids, top_k).items()] == expected


def test_exact_search_in_blocks_equals_one_product():
    rng = np.random.default_rng(0)
    queries, documents = rng.normal(size=(7, 5)).astype("f4"), rng.normal(size=(9, 5)).astype("f4")
    ids = [f"q{i}" for i in range(7)]
    whole = exact_search(queries, ids, prepared(documents), DOCUMENTS, 4)
    with forced("products", 3):
        blocked = exact_search(queries, ids, prepared(documents), DOCUMENTS, 4)
    assert {q: list(r) for q, r in blocked.items()} == {q: list(r) for q, r in whole.items()}
    assert list(whole["q0"]) == [DOCUMENTS[i] for i in np.argsort(-(documents @ queries[0]))[:4]]
