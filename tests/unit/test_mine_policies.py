"""What each policy lets through on a corpus with planted false negatives, over seeds; the world is in benchmarks."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from openembed.data.margin import MarginConfig

PATH = Path(__file__).parents[2] / "benchmarks" / "mining_policies.py"
SEEDS = 5


@pytest.fixture(scope="module")
def policies():
    specification = importlib.util.spec_from_file_location("mining_policies", PATH)
    module = importlib.util.module_from_spec(specification)
    sys.modules["mining_policies"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rates(policies):
    """Policy → false-negative rate of each seed."""
    world = policies.World(facts=80, held_out=5)
    results = [policies.measure(world, seed, train=False) for seed in range(SEEDS)]
    return {name: np.array([row[name]["false"] for row in results]) for name in policies.POLICIES}


@pytest.mark.parametrize("better", ["percent", "margin", "absolute", "shifted"])
def test_naive_lets_most_planted_documents_through(policies, rates, better):
    mean, half = policies.interval(rates["naive"] - rates[better])
    assert mean > half


def test_margin_lets_fewer_through_than_absolute(policies, rates):
    mean, half = policies.interval(rates["absolute"] - rates["margin"])
    assert mean > half


def test_percent_removes_more_than_half_of_the_planted_documents(policies, rates):
    mean, half = policies.interval(1 - rates["percent"] / rates["naive"])
    assert mean - half > 0.5  # the paper's judges: 57 % on NQ, 50 % on StackExchange


def test_percent_of_a_cosine_is_the_looser_ceiling(rates):
    """So the published order of these two cannot be one of false negatives: it is one of how hard the negatives are."""
    scores = np.linspace(0.05, 0.999, 50)
    assert (MarginConfig().ceiling(scores) > MarginConfig(kind="margin", value=0.05).ceiling(scores)).all()
    assert rates["percent"].mean() > rates["margin"].mean()
