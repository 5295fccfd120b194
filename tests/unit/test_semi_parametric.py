"""The semi-parametric objective against the equations written out, and what its parts do."""

import numpy as np
import pytest
import torch

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.semi_parametric import SemiParametricConfig, dealt
from openembed.records import Document, Example, Query
from openembed.representations import Dense, Sparse

ROWS, VOCABULARY = 4, 20


def batch(negatives=1):
    rows = [
        Example(Query("", f"q{n}"), (Document("", f"p{n}"),), tuple(Document("", f"n{n} {k}") for k in range(negatives)), "s")
        for n in range(ROWS)
    ]
    return collate(rows, {"s": RowSource("s")}, BatchConfig(), np.random.default_rng(0))


def texts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Sparse(torch.rand(count, VOCABULARY, generator=generator), torch.rand(count, VOCABULARY, generator=generator) > 0.8)


def nll_symmetric(scores, positives):
    """Cross-entropy of each row over all columns, and of each positive over all rows."""
    rows = torch.nn.functional.cross_entropy(scores, positives)
    return rows + torch.nn.functional.cross_entropy(scores[:, positives].T, torch.arange(len(scores)))


def gate(weights, bag, k):
    kept = torch.zeros_like(weights)
    for row in range(len(weights)):
        for place in {*weights[row].topk(k).indices.tolist(), *bag[row].nonzero().flatten().tolist()}:
            kept[row, place] = weights[row, place]
    return kept


@pytest.mark.parametrize("gated", ["query", "both"])
def test_is_the_published_loss(gated):
    rows = batch()
    given = texts(len(rows.texts))
    loss = SemiParametricConfig(top_k=3, gated=gated).build().loss(given, rows)
    q, p = given.values_NV[rows.query_Q], given.values_NV[rows.document_N]
    b_q, b_p = given.bag_NV[rows.query_Q], given.bag_NV[rows.document_N]
    positives = torch.tensor([next(c for r, c in rows.positive_P2 if r == row) for row in range(ROWS)])
    terms = [nll_symmetric(gate(q, b_q, 3) @ p.T, positives), nll_symmetric(b_q.float() @ p.T, positives)]
    if gated == "both":
        terms += [nll_symmetric(q @ gate(p, b_p, 3).T, positives), nll_symmetric(q @ b_p.float().T, positives)]
    assert loss.total.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)
    assert loss.diagnostics["sparsity"]["query_terms"] < VOCABULARY


def test_gradient_reaches_weights_that_were_not_kept():
    rows = batch()
    given = texts(len(rows.texts))
    leaf = given.values_NV.clone().requires_grad_()
    SemiParametricConfig(top_k=1).build().loss(Sparse(leaf, given.bag_NV), rows).total.backward()
    unkept = given.values_NV < given.values_NV.max(1, keepdim=True).values
    reached = leaf.grad[rows.document_N] != 0
    assert reached[(unkept & ~given.bag_NV)[rows.document_N]].float().mean() > 0.5


def test_without_the_entry_loss_bags_of_words_are_not_learned_from():
    rows = batch()
    given = texts(len(rows.texts))
    loss = SemiParametricConfig(top_k=VOCABULARY, entry_weight=0).build().loss(given, rows)
    assert set(loss.parts) == {"parametric_query"}
    other = Sparse(given.values_NV, ~given.bag_NV)
    assert SemiParametricConfig(top_k=VOCABULARY, entry_weight=0).build().loss(other, rows).total == loss.total


def test_the_scale_divides_all_weights():
    rows = batch()
    given = texts(len(rows.texts))
    plain = SemiParametricConfig(top_k=3, gated="both").build().loss(given, rows)
    scaled = SemiParametricConfig(top_k=3, gated="both", scale=8).build().loss(Sparse(given.values_NV * 8, given.bag_NV), rows)
    assert scaled.parts == pytest.approx(plain.parts, rel=1e-5)


def test_the_contrastive_mask_deals_out_what_no_bag_has():
    bag = torch.zeros(2, 7)
    bag[0, [0, 3]], bag[1, 5] = 1.0, 1.0
    bags, others = dealt(bag, torch.ones(2, 7), torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert bags.tolist() == [[1, 0, 1, 1, 1, 0, 1], [0, 1, 0, 0, 0, 1, 0]]
    assert others.tolist() == [[1, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 0]]
    rows = batch()
    given = texts(len(rows.texts))
    plain, masked = (SemiParametricConfig(contrastive_mask=m, gated="both").build().loss(given, rows) for m in (False, True))
    assert masked.parts["parametric_query"] == plain.parts["parametric_query"]
    assert masked.parts["entry_query"] != plain.parts["entry_query"]
    assert masked.parts["entry_document"] != plain.parts["entry_document"]


@pytest.mark.parametrize("given", [Dense(torch.ones(12, 3)), Sparse(torch.ones(12, 3))])
def test_needs_bags(given):
    with pytest.raises(ValueError, match=r"head\.bags = true"):
        SemiParametricConfig().build().loss(given, batch())
