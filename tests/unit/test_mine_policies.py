"""What each policy lets through on a corpus with planted false negatives, over seeds; the world is in benchmarks."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from openembed.data.margin import MarginConfig

PATH = Path(__file__).parents[2] / "benchmarks" / "mining_policies.py"
SEEDS = 8


@pytest.fixture(scope="module")
def policies():
    specification = importlib.util.spec_from_file_location("mining_policies", PATH)
    module = importlib.util.module_from_spec(specification)
    sys.modules["mining_policies"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(policies):
    """Of each seed: policy → false-negative rate and nDCG@10 of its student, at the policies' best settings."""
    return [policies.measure(policies.World(), seed, policies.TUNED) for seed in range(SEEDS)]


def difference(policies, results, metric, better, worse):
    sign = -1 if metric == "false" else 1
    return policies.interval([sign * (row[better][metric] - row[worse][metric]) for row in results])


@pytest.mark.parametrize(("better", "worse"), [("absolute", "shifted"), ("shifted", "naive"), ("percent", "shifted")])
def test_planted_false_negatives_go_in_the_published_order(policies, results, better, worse):
    mean, half = difference(policies, results, "false", better, worse)
    assert mean > half


@pytest.mark.parametrize("policy", ["percent", "margin"])
def test_the_positive_aware_ceilings_remove_the_planted_documents(results, policy):
    assert np.mean([row["naive"]["false"] for row in results]) > 0.5, "half of what naive mining takes is planted"
    assert np.mean([row[policy]["false"] for row in results]) < 0.005


@pytest.mark.parametrize(("better", "worse"), [("margin", "absolute"), ("margin", "shifted"), ("shifted", "naive")])
def test_students_come_in_the_published_order(policies, results, better, worse):
    assert difference(policies, results, "ndcg", better, worse)[0] > 0


def test_percent_is_not_behind_margin(policies, results):
    mean, half = difference(policies, results, "ndcg", "percent", "margin")
    assert mean + half > 0


def test_percent_of_a_cosine_is_the_looser_ceiling_at_the_papers_values():
    """So the published order of these two cannot be one of false negatives: it is one of how hard the negatives are."""
    scores = np.linspace(0.05, 0.999, 50)
    assert (MarginConfig().ceiling(scores) > MarginConfig(kind="margin", value=0.05).ceiling(scores)).all()
