"""Published scores that a correct evaluator prints on the shared data. The long ones run when OPENEMBED_SLOW=1."""

import os

import pytest

import openembed
from openembed.evaluation.runner import run_tasks
from openembed.evaluation.systems import Bm25System, EncoderSystem
from openembed.evaluation.tasks import find_tasks

slow = pytest.mark.skipif(os.environ.get("OPENEMBED_SLOW") != "1", reason="takes minutes: set OPENEMBED_SLOW=1 to run it")


def score(system, folder, **settings):
    (result,) = run_tasks(system, find_tasks(folder, settings))
    return result.value


@pytest.mark.parametrize(
    ("name", "language", "expected"),
    [
        ("scifact", None, 0.6863),
        ("xquad/en", None, 0.9649),
        ("poquad-pl", None, 0.8768),
        ("poquad-pl", "none", 0.7832),
        ("cranfield", None, 0.5237),
    ],
)
def test_bm25(shared_dir, name, language, expected):
    settings = {} if language is None else {"language": language}
    assert score(Bm25System(), shared_dir / "data" / name, **settings) == pytest.approx(expected, abs=5e-4)


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    return EncoderSystem(openembed.load(minilm_dir), "all-MiniLM-L6-v2")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stsb/en", 82.03),
        ("sts13", 80.60),
        ("sts14", 75.59),
        ("sts16", 78.99),
        ("banking77", 80.04),
        ("xquad/en", 94.36),
    ],
)
def test_minilm(shared_dir, minilm, name, expected):
    assert score(minilm, shared_dir / "data" / name) * 100 == pytest.approx(expected, abs=0.05)


@slow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [("trecqa-rerank", 74.43), ("scifact", 64.508)],
)
def test_minilm_on_long_corpora(shared_dir, minilm, name, expected):
    assert score(minilm, shared_dir / "data" / name) * 100 == pytest.approx(expected, abs=0.05)
