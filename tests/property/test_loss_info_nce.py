import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.losses import info_nce, info_nce_rows, weighted_mean


def loop_loss(scores, positives, allowed, temperature):
    """The same formula one query and one positive at a time, in double precision."""
    losses = []
    for q in range(len(scores)):
        terms = []
        negatives = [n for n in range(len(scores[q])) if allowed[q][n] and not positives[q][n]]
        for p in range(len(scores[q])):
            if positives[q][p] and negatives:
                total = sum(math.exp((scores[q][n] - scores[q][p]) / temperature) for n in negatives)
                terms.append(math.log1p(total))
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return losses


@st.composite
def problems(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    density = draw(st.sampled_from([0.0, 0.2, 0.6, 1.0]))
    scores = random.uniform(-1, 1, (rows, columns))
    return scores, random.random((rows, columns)) < 0.3, random.random((rows, columns)) < density


@given(problems(), st.sampled_from([0.02, 0.05, 1.0]))
@settings(max_examples=200, deadline=None)
def test_equals_loop_and_is_finite(problem, temperature):
    scores, positives, allowed = problem
    leaf = torch.tensor(scores, dtype=torch.float32, requires_grad=True)
    rows = info_nce_rows(leaf, torch.tensor(positives), torch.tensor(allowed), temperature)
    expected = loop_loss(leaf.detach().double().tolist(), positives, allowed, temperature)
    np.testing.assert_allclose(rows.detach().numpy(), expected, rtol=2e-5, atol=2e-6)
    rows.sum().backward()
    assert torch.isfinite(leaf.grad).all()
    untouched = ~(torch.tensor(positives) | torch.tensor(allowed))
    assert (leaf.grad[untouched] == 0).all()
    dead = ~(torch.tensor(positives).any(1) & (torch.tensor(allowed) & ~torch.tensor(positives)).any(1))
    assert (rows[dead] == 0).all()
    assert (leaf.grad[dead] == 0).all()


def test_closed_form_two_by_two():
    scores = torch.tensor([[0.5, 0.1], [0.2, 0.4]])
    eye = torch.eye(2, dtype=torch.bool)
    expected = (math.log(1 + math.exp(-0.4 / 0.5)) + math.log(1 + math.exp(-0.2 / 0.5))) / 2
    assert info_nce(scores, eye, ~eye, 0.5).item() == pytest.approx(expected, abs=1e-7)


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    positives = torch.tensor([[True, False], [True, False]])
    loss = info_nce(scores, positives, ~positives, 0.01)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()


def test_no_term_has_another_positive_in_its_denominator():
    scores = torch.tensor([[0.3, 0.9, 0.1]])
    both = info_nce(scores, torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.bool), 1.0)
    single = [math.log1p(math.exp(0.1 - positive)) for positive in (0.3, 0.9)]
    assert both.item() == pytest.approx(sum(single) / 2, abs=1e-6)


def test_weights():
    values = torch.tensor([1.0, 3.0])
    assert weighted_mean(values, torch.tensor([3.0, 1.0])).item() == 1.5
    assert weighted_mean(values, torch.zeros(2)).item() == 0.0


def test_refuses_temperature_zero():
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="temperature must be positive"):
        info_nce(torch.zeros(1, 1), mask, mask, 0.0)
