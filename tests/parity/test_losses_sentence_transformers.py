"""The same loss and gradient as sentence-transformers, where both can express the case."""

import numpy as np
import pytest
import torch

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.records import Document, Example, Query
from openembed.representations import Dense

losses = pytest.importorskip("sentence_transformers.losses")

ROWS, WIDTH = 6, 16


class Vectors(torch.nn.Module):
    """Hands out given vectors in the shape sentence-transformers' losses expect of a model."""

    def __init__(self, columns):
        super().__init__()
        self.columns = torch.nn.ParameterList(torch.nn.Parameter(column.clone()) for column in columns)

    def forward(self, features):
        return {"sentence_embedding": self.columns[features["column"]]}

    def features(self):
        return [{"column": number} for number in range(len(self.columns))]


def case(negatives):
    rows = [
        Example(Query("", f"q{n}"), (Document("", f"p{n}"),), tuple(Document("", f"n{n} {k}") for k in range(negatives)), "s")
        for n in range(ROWS)
    ]
    batch = collate(rows, {"s": RowSource("s")}, BatchConfig(), np.random.default_rng(0))
    torch.manual_seed(4)
    values = torch.randn(len(batch.texts), WIDTH)
    place = {text: number for number, text in enumerate(batch.texts)}
    names = [
        [f"q{n}" for n in range(ROWS)],
        [f"p{n}" for n in range(ROWS)],
        *([f"n{n} {k}" for n in range(ROWS)] for k in range(negatives)),
    ]
    indices = [[place[name] for name in column] for column in names]
    return batch, values, indices


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_equals_multiple_negatives_ranking_loss(negatives):
    batch, values, indices = case(negatives)
    model = Vectors([values[column] for column in indices])
    expected = losses.MultipleNegativesRankingLoss(model, scale=20.0)(model.features(), None)
    expected.backward()
    leaf = values.clone().requires_grad_()
    loss = ContrastiveConfig(temperature=0.05).build().loss(Dense(leaf), batch).total
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for parameter, column in zip(model.columns, indices, strict=True):
        torch.testing.assert_close(leaf.grad[column], parameter.grad, rtol=1e-5, atol=1e-6)
