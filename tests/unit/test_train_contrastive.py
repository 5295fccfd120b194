import math

import numpy as np
import pytest
import torch

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.contrastive import HISTOGRAM_BINS, ContrastiveConfig
from openembed.records import Document, Example, Query
from openembed.representations import Dense

SOURCES = {"open": RowSource("open"), "closed": RowSource("closed", in_batch=False, loss_weight=0.5)}


def row(number, source="open", negatives=1):
    documents = tuple(Document(f"n{number}{k}", f"neg {number} {k}") for k in range(negatives))
    return Example(Query("", f"query {number}"), (Document(f"p{number}", f"pos {number}"),), documents, source)


def batch_of(*rows):
    return collate(rows, SOURCES, BatchConfig(), np.random.default_rng(0))


def vectors(batch, width=16, seed=0):
    torch.manual_seed(seed)
    return torch.randn(len(batch.texts), width, requires_grad=True)


def test_rows_without_any_negative_give_zero_loss_and_gradient():
    batch = batch_of(row(0, "closed", negatives=0), row(1, "closed", negatives=0))
    values = vectors(batch)
    loss = ContrastiveConfig().build().loss(Dense(values), batch)
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert (values.grad == 0).all()
    assert loss.diagnostics["rows_without_negatives"] == 2


def test_ragged_rows_by_hand():
    batch = batch_of(row(0, negatives=0), row(1, "closed", negatives=2), row(2, negatives=3))
    values = vectors(batch)
    loss = ContrastiveConfig(temperature=0.2).build().loss(Dense(values), batch)
    unit = torch.nn.functional.normalize(values.detach(), dim=1).double()
    place = {text: number for number, text in enumerate(batch.texts)}
    everything = [text for text in batch.texts if not text.startswith("query")]
    total, weights = 0.0, (1.0, 0.5, 1.0)
    for number, weight in enumerate(weights):
        own = [text for text in everything if text.startswith(f"neg {number} ")]
        against = own if number == 1 else [text for text in everything if text != f"pos {number}"]
        query = unit[place[f"query {number}"]]
        score = {text: float(query @ unit[place[text]]) / 0.2 for text in everything}
        total += weight * math.log1p(sum(math.exp(score[t] - score[f"pos {number}"]) for t in against))
    assert loss.total.item() == pytest.approx(total / sum(weights), abs=1e-6)
    histograms = loss.diagnostics["similarity"]
    assert {name: summary["count"] for name, summary in histograms.items()} == {"positive": 3, "hard": 5, "in_batch": 11}
    for summary in histograms.values():
        assert len(summary["histogram"]) == HISTOGRAM_BINS
        assert sum(summary["histogram"]) == summary["count"]
    assert loss.diagnostics["rows_by_source"] == {"open": 2, "closed": 1}


def test_in_batch_none_ignores_every_other_row():
    rows = (row(0), row(1), row(2))
    objective = ContrastiveConfig(in_batch="none", temperature=0.3).build()
    batch = batch_of(*rows)
    values = vectors(batch)
    objective.loss(Dense(values), batch).total.backward()
    alone = batch_of(rows[1])
    kept = values.detach()[[batch.texts.index(text) for text in alone.texts]].requires_grad_()
    objective.loss(Dense(kept), alone).total.backward()
    for number, text in enumerate(alone.texts):
        torch.testing.assert_close(values.grad[batch.texts.index(text)] * 3, kept.grad[number], rtol=1e-5, atol=1e-7)


def test_matryoshka_sums_losses_of_renormalised_prefixes():
    batch = batch_of(row(0), row(1))
    values = vectors(batch)
    both = ContrastiveConfig(matryoshka=(4, 16), matryoshka_weights=(0.5, 2.0)).build().loss(Dense(values), batch)
    single = [ContrastiveConfig().build().loss(Dense(values[:, :width].contiguous()), batch).total for width in (4, 16)]
    assert both.total.item() == pytest.approx(0.5 * single[0].item() + 2.0 * single[1].item(), rel=1e-6)
    assert set(both.parts) == {"info_nce_4", "info_nce_16"}
    with pytest.raises(ValueError, match="cannot truncate vectors of width 16 to 32"):
        ContrastiveConfig(matryoshka=(32,)).build().loss(Dense(values), batch)


def test_weights_must_match_dimensions():
    with pytest.raises(ValueError, match="2 matryoshka dimensions but 1"):
        ContrastiveConfig(matryoshka=(4, 16), matryoshka_weights=(1.0,))


def test_teacher_margin_drops_a_too_close_negative():
    example = Example(
        Query("", "q"), (Document("p", "p"),), (Document("a", "a"), Document("b", "b")), "open", (0.8,), (0.79, 0.5)
    )
    batch = batch_of(example)
    objective = ContrastiveConfig(teacher_margin={"kind": "percent", "value": 0.95}).build()
    assert objective.loss(Dense(vectors(batch)), batch).diagnostics["similarity"]["hard"]["count"] == 1
    assert objective.loss(Dense(vectors(batch)), batch).diagnostics["false_negatives_masked"] == 1


def test_zero_vectors_are_finite():
    batch = batch_of(row(0), row(1))
    values = torch.zeros(len(batch.texts), 8, requires_grad=True)
    loss = ContrastiveConfig().build().loss(Dense(values), batch)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(values.grad).all()
