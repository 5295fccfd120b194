"""Penalties on weights over the vocabulary: formulas, schedules, sides, and what they remember."""

import json

import numpy as np
import pytest
import torch

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.objectives.regularizers import DfFlops, DfFlopsConfig, FlopsConfig, RegularizedObjective, read_idf, sparsity
from openembed.records import Document, Example, Query
from openembed.representations import Dense, Sparse

ROWS, VOCABULARY = 4, 12


def batch(negatives=1):
    rows = [
        Example(Query("", f"q{n}"), (Document("", f"p{n}"),), tuple(Document("", f"n{n} {k}") for k in range(negatives)), "s")
        for n in range(ROWS)
    ]
    return collate(rows, {"s": RowSource("s")}, BatchConfig(), np.random.default_rng(0))


def weights(count, seed=0):
    values = torch.rand(count, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return values * (values > 0.5)


def contrastive(*regularizers, **fields):
    return ContrastiveConfig(similarity="dot", temperature=1.0, regularizers=regularizers, **fields).build()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kind": "flops"}, lambda w: sum(w[:, j].mean().item() ** 2 for j in range(VOCABULARY))),
        ({"kind": "l1"}, lambda w: sum(w[i, j].item() for i in range(len(w)) for j in range(VOCABULARY)) / len(w)),
        ({"kind": "anti_zero"}, lambda w: 1 / w.sum().item() ** 2),
        ({"kind": "df_flops"}, lambda w: sum(w[:, j].mean().item() ** 2 for j in range(VOCABULARY))),
        (
            {"kind": "flops", "threshold": 6},
            lambda w: sum((w[(w > 0).sum(1) > 6][:, j].sum().item() / len(w)) ** 2 for j in range(VOCABULARY)),
        ),
    ],
)
def test_each_penalty_is_its_formula(config, expected):
    values = weights(7)
    [(_, _, _, penalty)] = RegularizedObjective(
        ContrastiveConfig(regularizers=({**config, "weight": 1, "side": "query"},)).regularizers
    )._penalties
    assert penalty(values, 0).item() == pytest.approx(expected(values), rel=1e-5)


def test_queries_and_documents_have_their_own_weight_and_schedule():
    rows = batch()
    representations = Sparse(weights(len(rows.texts)))
    queries, documents = rows.query_Q, rows.document_N
    objective = contrastive(
        {"kind": "l1", "weight": 0.5, "side": "query"}, {"kind": "flops", "weight": 2.0, "side": "document", "steps": 10}
    )
    flops = representations.values_NV[documents].mean(0).square().sum().item()
    length = representations.values_NV[queries].sum(1).mean().item()
    for step, share in ((0, 0), (5, 0.25), (10, 1), (99, 1)):
        loss = objective.loss(representations, rows, step)
        assert loss.parts["flops_document"] == pytest.approx(2 * share * flops, rel=1e-5)
        assert loss.parts["l1_query"] == pytest.approx(0.5 * length, rel=1e-5)
        assert loss.total.item() == pytest.approx(sum(loss.parts.values()), rel=1e-5)


def test_both_sides_are_two_terms():
    parts = contrastive({"kind": "anti_zero", "weight": 1.0}).loss(Sparse(weights(len(batch().texts))), batch()).parts
    assert set(parts) == {"info_nce", "anti_zero_query", "anti_zero_document"}


def test_nothing_but_zeros_has_a_finite_loss_and_gradient():
    rows = batch()
    values = torch.zeros(len(rows.texts), VOCABULARY, requires_grad=True)
    every = [{"kind": kind, "weight": 1.0, "side": "both"} for kind in ("flops", "l1", "anti_zero", "df_flops")]
    objective = contrastive(*every)
    for step in (0, 200):
        loss = objective.loss(Sparse(values), rows, step)
        loss.total.backward()
        assert loss.total.isfinite()
        assert values.grad.isfinite().all()


def test_idf_in_the_match_equals_idf_in_the_penalty_after_a_change_of_variable(tmp_path):
    """Spec 2.2: with u = idf * w, queries weighted by idf and plain FLOPS are binary queries and FLOPS / idf²."""
    rows = batch()
    idf = np.random.default_rng(1).uniform(0.1, 9, VOCABULARY).astype(np.float32)
    np.save(tmp_path / "idf.npy", idf)
    plain = {"kind": "flops", "weight": 0.3}
    binary = (weights(len(rows.texts), seed=2) > 0).float()
    w = weights(len(rows.texts))
    is_query = torch.zeros(len(rows.texts), 1, dtype=torch.bool)
    is_query[rows.query_Q] = True
    leaf = w.clone().requires_grad_()
    match = contrastive(plain).loss(Sparse(torch.where(is_query, binary * torch.from_numpy(idf), leaf)), rows)
    priced = contrastive({**plain, "idf": str(tmp_path / "idf.npy")})
    other = w.clone().requires_grad_()
    loss = priced.loss(Sparse(torch.where(is_query, binary, other * torch.from_numpy(idf))), rows)
    assert loss.total.item() == pytest.approx(match.total.item(), rel=1e-6)
    assert loss.parts == pytest.approx(match.parts, rel=1e-6)
    match.total.backward()
    loss.total.backward()
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-5, atol=1e-7)
    none = contrastive(plain).loss(Sparse(torch.where(is_query, binary, w)), rows)
    assert abs(none.total.item() - match.total.item()) > 1e-3, "without idf it is another loss"


@pytest.mark.parametrize("table", [np.zeros(3, np.float32), np.ones((2, 2)), np.arange(3)])
def test_a_table_of_idf_must_be_one(tmp_path, table):
    np.save(tmp_path / "idf.npy", table)
    with pytest.raises(ValueError, match="one value above 0 a term"):
        read_idf(tmp_path / "idf.npy")
    with pytest.raises(ValueError, match="cannot be read as a table of idf"):
        read_idf(tmp_path / "none.npy")


def test_document_frequencies_come_from_the_batches_before_and_survive_a_stop():
    config = DfFlopsConfig(weight=1.0, refresh=3, alpha=0.3)
    whole, seen = DfFlops(config), []
    for step in range(8):
        values = weights(5, seed=step)
        if step == 4:
            resumed = DfFlops(config)
            resumed.restore(whole.state())
        expected = values.mean(0).square()
        if step >= 3:
            first = 3 * (step // 3 - 1)
            shares = torch.stack([weights(5, seed=s) > 0 for s in range(first, first + 3)]).float().mean((0, 1))
            expected = expected * whole.price(shares)
        found = whole(values, step)
        assert found.item() == pytest.approx(expected.sum().item(), rel=1e-5)
        if step >= 4:
            seen.append((resumed(values, step).item(), found.item()))
    assert all(a == b for a, b in seen)
    prices = whole.price(torch.tensor([0.0, 1e-6, 0.05, 0.3, 0.9, 1.0]))
    assert prices[0] == 0
    assert prices[3] == pytest.approx(0.5, abs=1e-5)
    assert prices[-1] == 1
    assert (prices.diff() >= 0).all()


def test_the_diagnostics_count_terms():
    queries = Sparse(torch.tensor([[1.0, 0, 0, 2], [0, 0, 0, 0]]))
    documents = Sparse(torch.tensor([[1.0, 1, 0, 0], [0, 1, 0, 1], [3, 0, 0, 0]]))
    found = sparsity(queries, documents)["sparsity"]
    assert found == pytest.approx(
        {"query_terms": 1, "document_terms": 5 / 3, "empty_queries": 0.5, "empty_documents": 0, "flops": 0.5 * 2 / 3 + 0.5 / 3}
    )
    assert sparsity(Dense(torch.zeros(1, 2)), Dense(torch.zeros(1, 2))) == {}


def test_what_cannot_be_penalised_is_refused():
    rows = batch()
    with pytest.raises(ValueError, match="drop regularizers"):
        contrastive({"kind": "flops", "weight": 1.0}).loss(Dense(torch.randn(len(rows.texts), 3)), rows)
    with pytest.raises(ValueError, match="given more than once"):
        contrastive({"kind": "flops", "weight": 1.0}, {"kind": "flops", "weight": 1.0, "side": "both"})
    with pytest.raises(ValueError, match="greater than 0"):
        FlopsConfig(weight=0)
    with pytest.raises(ValueError, match="remembers nothing"):
        contrastive({"kind": "df_flops", "weight": 1.0}).restore({})
    assert json.loads(FlopsConfig(weight=1).model_dump_json())["kind"] == "flops"
