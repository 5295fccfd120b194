"""Claims of the sparse systems on made-up corpora (benchmarks/sparse_toys.py); what trains runs when asked for."""

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

PATH = Path(__file__).parents[2] / "benchmarks" / "sparse_toys.py"
spec = importlib.util.spec_from_file_location("sparse_toys", PATH)
toys = importlib.util.module_from_spec(spec)
sys.modules["sparse_toys"] = toys
spec.loader.exec_module(toys)
slow = pytest.mark.skipif(os.environ.get("OPENEMBED_SLOW") != "1", reason="takes minutes: set OPENEMBED_SLOW=1 to run it")


def test_a_query_names_concepts_of_its_document():
    world = toys.synonyms(1)
    for query, document in zip(world.queries, world.documents, strict=True):
        asked, held = ({word[1:] for word in text.split() if word[0] in "ab"} for text in (query, document))
        assert len(asked) == 3
        assert asked < held
    assert toys.synonyms(1) == world


def test_a_meaning_is_told_by_the_last_word_and_said_by_no_document():
    world = toys.meanings(1)
    words = {word for document in world.documents for word in document.split()}
    assert not words & {word for query in world.queries for word in query.split()}
    assert all(document.split()[-1][0] == "c" for document in world.documents)


def test_scores_of_ties_are_those_of_their_middle():
    found = toys.scores(csr_matrix(np.eye(3)), csr_matrix(np.eye(3)))
    assert found["ndcg_at_10"] == 1
    assert found["flops"] == pytest.approx(1 / 3)
    assert toys.scores(csr_matrix((3, 3)), csr_matrix(np.eye(3)))["ndcg_at_10"] == pytest.approx(1 / np.log2(3))


@slow
def test_echo_beats_a_causal_mask_where_the_context_comes_last(tmp_path):
    found = toys.echo(tmp_path, 1)
    assert found["echo"]["ndcg_at_10"] > found["causal"]["ndcg_at_10"] + 0.05
    assert found["echo"]["recall_of_the_queries_words_in_20_terms"] >= 0.8


@slow
def test_the_entry_loss_lets_words_ask_without_a_model(tmp_path):
    found = toys.entry(tmp_path, 1)
    assert found["with, 64 weights"]["words to model"] > found["without, 64 weights"]["words to model"] + 0.05
    swept = [found[f"with, {k} weights"]["model to model"] for k in (8, 16, 32, 64)]
    assert swept == sorted(swept)


@slow
def test_the_l0_mask_keeps_documents_under_a_penalty_that_empties_them(tmp_path):
    """Not that it costs nothing beside a weaker penalty: that was not tried."""
    found = toys.threshold(tmp_path, 1)
    assert found["plain"]["document_terms"] < 1
    assert found["masked"]["ndcg_at_10"] > max(0.4, found["plain"]["ndcg_at_10"] + 0.2)
    least, *_, most = found["masked"]["terms_at_5_25_50_75_95_percent"]
    assert least >= 5
    assert most <= 40


@slow
def test_distilled_beats_labels_alone_where_these_are_few(tmp_path):
    """A second teacher neither helps nor harms so that it could be told: within two standard errors of the better one alone."""
    found = toys.teachers(tmp_path, 1)
    students = {name: found[f"student of {name}"] for name in ("labels", "lexical", "both")}
    quality = {name: student["ndcg_at_10"] for name, student in students.items()}
    assert min(quality["lexical"], quality["both"]) > quality["labels"] + 0.2
    error = np.hypot(students["lexical"]["standard_error"], students["both"]["standard_error"])
    assert abs(quality["both"] - quality["lexical"]) < 2 * error


@slow
def test_idf_in_the_match_costs_less_at_equal_quality(tmp_path):
    found = toys.idf_aware(tmp_path, 1)
    assert found["match 0.01"]["ndcg_at_10"] > found["none 0.05"]["ndcg_at_10"] > found["none 0.2"]["ndcg_at_10"]
    assert found["match 0.05"]["flops"] < found["none 0.05"]["flops"]
    assert found["match 0.05"]["ndcg_at_10"] >= found["none 0.05"]["ndcg_at_10"] - 0.01
