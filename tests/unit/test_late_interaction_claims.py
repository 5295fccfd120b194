"""What XTR and CRISP claim, in a world where the truth is known (benchmarks/late_interaction.py), and its scorer of retrieved
tokens against loops and the index. The trained comparisons take minutes: OPENEMBED_SLOW=1."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from openembed.evaluation.metrics import per_query
from openembed.index.tokens.files import TokenSegment, TokenSettings, TokenWriter
from openembed.index.tokens.search import Tokens, search
from openembed.index.tokens.xtr import Xtr
from openembed.token_vectors import TokenVectors

PATH = Path(__file__).parents[2] / "benchmarks" / "late_interaction.py"
slow = pytest.mark.skipif(os.environ.get("OPENEMBED_SLOW") != "1", reason="takes minutes: set OPENEMBED_SLOW=1 to run it")
SETTINGS = {"documents": 500, "queries": 100, "aspects": 100, "temperature": 0.05, "k_train": 32, "lr": 2e-3}


@pytest.fixture(scope="module")
def bench():
    specification = importlib.util.spec_from_file_location("late_interaction_benchmark", PATH)
    module = importlib.util.module_from_spec(specification)
    sys.modules["late_interaction_benchmark"] = module
    specification.loader.exec_module(module)
    return module


def vectors(lengths, seed, width=8):
    values = np.random.default_rng(seed).standard_normal((sum(lengths), width)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return TokenVectors(values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def retrieved_scores(bench, query, documents, k, how):
    tokens, products = bench.nearest(query, documents, k)
    owners = np.repeat(np.arange(len(documents)), documents.lengths_N)[tokens]
    return bench.imputed(bench.best_retrieved(owners, products, len(documents)), products[:, -1], how)


def loop(query, documents, k, how):
    """XTR's section 3.3, one document and one query token at a time."""
    everything, scores = np.concatenate(list(documents)), []
    for document in documents:
        total, found = 0.0, 0
        for q in query:
            last = sorted((d @ q for d in everything), reverse=True)[k - 1]
            here = [d @ q for d in document if d @ q >= last]
            found += bool(here)
            total += max(here) if here else (last if how == "last" else 0.0)
        scores.append(-np.inf if not found else total / (found if how == "none" else len(query)))
    return np.array(scores)


@pytest.mark.parametrize("how", ["last", "zero", "none"])
@pytest.mark.parametrize("k", [1, 4, 9, 31])
def test_scores_of_retrieved_tokens_are_the_papers_and_the_indexs(bench, how, k, tmp_path):
    query, documents = vectors([5], 1), vectors([4, 9, 1, 12, 5], 2)
    found = retrieved_scores(bench, query[0], documents, k, how)
    np.testing.assert_allclose(found, loop(query[0], documents, k, how), atol=1e-5)
    writer = TokenWriter(tmp_path, 8, TokenSettings(precision="float32"))
    writer.add(documents)
    writer.close()
    ranking = search(query, [Tokens(TokenSegment(tmp_path), np.ones(5, dtype=bool))], 5, str, Xtr(tokens=k, imputation=how))[0]
    listed = dict(ranking)
    assert sorted(listed) == np.flatnonzero(np.isfinite(found)).tolist()
    np.testing.assert_allclose([listed[n] / 5 for n in sorted(listed)], found[np.isfinite(found)], atol=1e-5)


def test_with_every_token_retrieved_the_score_is_the_mean_maxsim(bench):
    queries, documents = vectors([5, 3], 1), vectors([4, 9, 1, 12, 5], 2)
    for query, expected in zip(queries, bench.exact(queries, documents), strict=True):
        for how in ("last", "zero", "none"):
            np.testing.assert_allclose(retrieved_scores(bench, query, documents, 10_000, how), expected, atol=1e-6)


def test_the_world_is_what_it_says(bench):
    data = bench.world(0, 50, 40, 10)
    assert (len(data.documents), len(data.queries), data.relevant_QN.shape) == (40, 10, (10, 40))
    assert data.relevant_QN[np.arange(10), np.arange(10)].all()
    for query, document in zip(data.queries, data.documents, strict=False):
        assert not set(query.split()) & set(document.split()), "words in common would do without meaning"
        aspects = {word.partition("w")[0] for word in query.split()}
        assert len(aspects) == 2
        assert aspects <= {word.partition("w")[0] for word in document.split()}


def test_ndcg_is_the_evaluations(bench):
    rng = np.random.default_rng(0)
    scores, relevant = rng.standard_normal(30), rng.random(30) < 0.2
    run = {"q": {str(n): float(score) for n, score in enumerate(scores)}}
    qrels = {"q": {str(n): 1 for n in np.flatnonzero(relevant)}}
    assert bench.ndcg(scores, relevant) == pytest.approx(per_query(run, qrels, ["ndcg_at_10"])["ndcg_at_10"]["q"])


@pytest.fixture(scope="module")
def xtr_results(bench):
    return bench.xtr_run(0, argparse.Namespace(**SETTINGS, steps=400, xtr_steps=600))


@slow
def test_xtr_keeps_its_quality_on_few_retrieved_tokens(xtr_results):
    """At k' = 20 of 12,000 tokens; the model trained with MaxSim loses most of its own, and wins with many."""
    kept = {name: dict(zip(row["k"], np.array(row["last"]) / row["maxsim"], strict=True)) for name, row in xtr_results.items()}
    assert kept["xtr"][20] > 0.8
    assert kept["mean_maxsim"][20] < 0.75
    assert all(kept["xtr"][k] > kept["mean_maxsim"][k] for k in (10, 20, 50))
    assert min(kept["xtr"][500], kept["mean_maxsim"][500]) > 0.97
    assert xtr_results["xtr"]["maxsim"] <= xtr_results["mean_maxsim"]["maxsim"] + 0.02


@slow
def test_xtr_retrieves_more_tokens_of_relevant_documents(xtr_results):
    assert xtr_results["xtr"]["precision"][0] > 1.5 * xtr_results["mean_maxsim"]["precision"][0]


@slow
def test_imputing_something_beats_nothing(xtr_results):
    for row in xtr_results.values():
        assert min(row["last"][1], row["zero"][1]) > row["none"][1] + 0.05


@slow
def test_clusters_that_are_trained_beat_clusters_afterwards_and_last_vectors(bench):
    """In the benchmark's own world: in a smaller one, clusters afterwards are too good already at C4x8 (.966)."""
    world = {**SETTINGS, "documents": 1000, "queries": 200, "aspects": 150}
    found = bench.crisp_run(0, argparse.Namespace(**world, steps=500, tuning_steps=220))
    assert found["C2x4 trained"] > found["C2x4 post-hoc"] + 0.05
    assert found["C4x8 trained"] > found["C4x8 post-hoc"] + 0.03
    assert found["tail 4x8 trained"] < found["C4x8 trained"] - 0.1
    assert found["tail 2x4 trained"] < found["C2x4 trained"] - 0.1
    assert found["C4x8 trained"] <= found["all vectors trained"] + 0.02


@pytest.mark.parametrize(("part", "missing"), [("sweep", "--runs and --data"), ("models", "--model and --data")])
def test_what_a_part_needs_is_asked_for(bench, monkeypatch, capsys, part, missing):
    monkeypatch.setattr("sys.argv", ["late_interaction.py", part])
    with pytest.raises(SystemExit):
        bench.main()
    assert f"{part} needs {missing}" in capsys.readouterr().err
