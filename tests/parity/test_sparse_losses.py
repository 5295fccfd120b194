"""The same sparse losses and gradients as sentence-transformers, where both can express the case."""

import numpy as np
import pytest
import torch

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.objectives.distillation import DistillationConfig
from openembed.records import Document, Example, Query
from openembed.representations import Sparse

losses = pytest.importorskip("sentence_transformers.sparse_encoder.losses")

ROWS, TERMS = 6, 40


def case(negatives):
    generator = np.random.default_rng(2)
    rows = [
        Example(
            Query("", f"q{n}"),
            (Document("", f"p{n}"),),
            tuple(Document("", f"n{n} {k}") for k in range(negatives)),
            "s",
            (float(generator.normal()),),
            tuple(generator.normal(size=negatives).tolist()),
        )
        for n in range(ROWS)
    ]
    batch = collate(rows, {"s": RowSource("s")}, BatchConfig(negatives=negatives), np.random.default_rng(0))
    torch.manual_seed(4)
    values = torch.rand(len(batch.texts), TERMS)
    values = values * (values > 0.6)
    place = {text: number for number, text in enumerate(batch.texts)}
    columns = [[place[f"q{n}"] for n in range(ROWS)], [place[f"p{n}"] for n in range(ROWS)]]
    columns += [[place[f"n{n} {k}"] for n in range(ROWS)] for k in range(negatives)]
    scores = torch.tensor([[*row.positive_scores, *row.negative_scores] for row in rows])
    return batch, values, columns, scores


def theirs(values, columns):
    leaf = values.clone().requires_grad_()
    return leaf, [leaf[column] for column in columns]


def ours(objective, values, batch, step=0):
    leaf = values.clone().requires_grad_()
    loss = objective.loss(Sparse(leaf), batch, step)
    loss.total.backward()
    return loss, leaf.grad


@pytest.mark.parametrize("threshold", [None, 15])
@pytest.mark.parametrize("negatives", [0, 2])
def test_equals_splade_loss_over_ranking_loss_and_flops(negatives, threshold):
    batch, values, columns, _ = case(negatives)
    leaf, embeddings = theirs(values, columns)
    ranking = losses.SparseMultipleNegativesRankingLoss(None, scale=1.0)
    flops = losses.FlopsLoss(None, threshold=threshold)
    documents = torch.cat(embeddings[1:])
    expected = (
        ranking.compute_loss_from_embeddings(embeddings, None)
        + 0.3 * flops.compute_loss_from_embeddings(documents)
        + 0.7 * flops.compute_loss_from_embeddings(embeddings[0])
    )
    expected.backward()
    penalties = [
        {"kind": "flops", "weight": 0.3, "side": "document", "threshold": threshold},
        {"kind": "flops", "weight": 0.7, "side": "query", "threshold": threshold},
    ]
    loss, grad = ours(ContrastiveConfig(similarity="dot", temperature=1.0, regularizers=penalties).build(), values, batch)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("negatives", [1, 3])
def test_equals_sparse_margin_mse_loss(negatives):
    batch, values, columns, scores = case(negatives)
    leaf, embeddings = theirs(values, columns)
    labels = scores[:, :1] - scores[:, 1:]
    expected = losses.SparseMarginMSELoss(None).compute_loss_from_embeddings(
        embeddings, labels[:, 0] if negatives == 1 else labels
    )
    expected.backward()
    ensemble = {"teachers": [{}], "normalize": "none", "scale": 1.0, "loss": "margin_mse"}
    config = DistillationConfig(embedding="none", score_weight=1.0, similarity="dot", temperature=1.0, ensemble=ensemble)
    loss, grad = ours(config.build(), values, batch)
    assert loss.parts["margin_mse"] == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)


def test_equals_sparse_distill_kl_loss():
    batch, values, columns, scores = case(3)
    leaf, embeddings = theirs(values, columns)
    expected = losses.SparseDistillKLDivLoss(None, temperature=1.0).compute_loss_from_embeddings(embeddings, scores)
    expected.backward()
    ensemble = {"teachers": [{}], "normalize": "none", "scale": 1.0}
    config = DistillationConfig(embedding="none", score_weight=1.0, similarity="dot", temperature=1.0, ensemble=ensemble)
    loss, grad = ours(config.build(), values, batch)
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)
