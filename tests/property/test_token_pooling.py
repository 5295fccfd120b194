"""Fewer vectors a text: clusters equal to loops written out, with gradient to every token; the baselines; numbers kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.config import parse
from openembed.heads.token_pooling import ClustersConfig, SpacingConfig, TailConfig, lloyd
from openembed.heads.token_projection import TokenProjectionConfig


def vectors(lengths, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(sum(lengths), width, generator=generator), dim=-1)


def loop_lloyd(values, k, iterations):
    """Clusters of one text, token by token; begins and re-seeds as the module says."""
    length = len(values)
    centres = torch.stack([values[(2 * j + 1) * length // (2 * k)] for j in range(k)])
    for _ in range(iterations):
        squares = torch.stack([torch.stack([(x - c).square().sum() for c in centres]) for x in values])
        nearest = squares.argmin(1)
        members = [[i for i in range(length) if nearest[i] == j] for j in range(k)]
        farthest = iter(squares.min(1).values.argsort(descending=True, stable=True).tolist())
        members = [found or [next(farthest)] for found in members]
        centres = torch.stack([values[found].mean(0) for found in members])
    return centres


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_clusters_are_lloyds_written_out(lengths, k, iterations, seed):
    values, config = vectors(lengths, seed=seed), ClustersConfig(documents=k, iterations=iterations, renormalize=False)
    found = config.pooled(values, np.array(lengths), query=False)
    expected = [x if len(x) <= k else loop_lloyd(x, k, iterations) for x in values.split(lengths)]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_neighbours_and_padding_change_nothing():
    lengths, config = [30, 3, 17, 64, 9], ClustersConfig(documents=0.25)
    values = vectors(lengths, seed=1)
    together = config.pooled(values, np.array(lengths), query=False)
    alone = [config.pooled(x, np.array([len(x)]), query=False) for x in values.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert [len(x) for x in alone] == [7, 1, 4, 16, 2]
    torch.testing.assert_close(together.norm(dim=1), torch.ones(30))


@pytest.mark.parametrize("config", [ClustersConfig(documents=3), ClustersConfig(documents=0.3, renormalize=False)])
def test_the_gradient_reaches_every_token(config):
    lengths = [12, 2, 20]
    values = vectors(lengths).requires_grad_()
    pooled = config.pooled(values, np.array(lengths), query=False)
    (pooled * torch.randn(pooled.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert torch.isfinite(values.grad).all()
    assert (values.grad.abs().sum(1) > 0).all()


def test_equal_vectors_fill_every_cluster():
    values = torch.ones(9, 4).div(2).requires_grad_()
    pooled = ClustersConfig(documents=4).pooled(values, np.array([9]), query=False)
    torch.testing.assert_close(pooled, torch.full((4, 4), 0.5))
    pooled.sum().backward()
    assert torch.isfinite(values.grad).all()


def test_clusters_found_are_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    label = torch.tensor([0] * 11 + [1] * 3 + [2] * 9 + [3] * 7)
    values = centres[label] + 0.02 * torch.randn(30, 16, generator=generator)
    assigned = lloyd(values[None], np.ones((1, 30), dtype=bool), np.array([4]), 10)[0]
    assert sorted(assigned.sum(0).tolist()) == [3, 7, 9, 11]
    assert all(len(label[assigned[:, j] > 0].unique()) == 1 for j in range(4))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TailConfig(documents=2), [[3, 4], [5], [10, 11]]),
        (TailConfig(documents=0.5), [[3, 4], [5], [9, 10, 11]]),
        (TailConfig(documents=0), [[0, 1, 2, 3, 4], [5], [6, 7, 8, 9, 10, 11]]),
        (SpacingConfig(documents=2), [[0, 2, 4], [5], [6, 8, 10]]),
        (SpacingConfig(documents=4), [[0, 4], [5], [6, 10]]),
    ],
)
def test_the_baselines_keep_the_tokens_they_say(config, expected):
    lengths = np.array([5, 1, 6])
    found = config.pooled(torch.arange(12.0)[:, None], lengths, query=False)
    assert found[:, 0].tolist() == [number for text in expected for number in text]
    assert config.counts(lengths, query=False).tolist() == [len(text) for text in expected]


def test_numbers_kept_are_those_of_the_paper():
    lengths = np.array([1, 3, 4, 7, 100])
    assert ClustersConfig(queries=4, documents=8).counts(lengths, query=True).tolist() == [1, 3, 4, 4, 4]
    assert ClustersConfig(queries=4, documents=8).counts(lengths, query=False).tolist() == [1, 3, 4, 7, 8]
    assert ClustersConfig(queries=0.25).counts(lengths, query=True).tolist() == [1, 1, 1, 1, 25]
    assert ClustersConfig(queries=0.5).counts(lengths, query=True).tolist() == [1, 1, 2, 3, 50]
    for wrong in (-1, 1.0, 1.5):
        with pytest.raises(ValueError, match="pool"):
            parse(TokenProjectionConfig, {"pool": {"kind": "clusters", "queries": wrong}}, "head")
