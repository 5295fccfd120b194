"""MaxSim and XTR: equal to loops written out, whatever the lengths; gradients too; padding never wins; memory is bounded."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed import late_interaction
from openembed.late_interaction import NO_TOKENS, maxsim, xtr
from openembed.representations import Dense, Tokens
from openembed.similarity import similarity


def tokens(lengths, width=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.nn.functional.normalize(torch.randn(sum(lengths), width, generator=generator) + shift, dim=-1)
    return Tokens(values, torch.tensor(lengths, dtype=torch.long))


def matrices(representation, values=None):
    return (representation.values_TD if values is None else values).split(representation.lengths_N.tolist())


def loop_maxsim(queries, documents, mean=False):
    rows = []
    for query in queries:
        row = []
        for document in documents:
            if len(document) == 0:
                row.append(torch.tensor(NO_TOKENS))
                continue
            total = sum((torch.stack([q @ d for d in document]).max() for q in query), torch.tensor(0.0))
            row.append(total / max(len(query), 1) if mean else total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def loop_xtr(queries, documents, k):
    """The paper's equations 4 and 5, token by token."""
    pool = torch.cat(list(documents))
    rows = []
    for query in queries:
        row = []
        for document in documents:
            if len(document) == 0:
                row.append(torch.tensor(NO_TOKENS))
                continue
            total, retrieving = torch.tensor(0.0), 0
            for q in query:
                least = sorted((q @ d for d in pool), reverse=True)[min(k, len(pool)) - 1]
                found = [q @ d for d in document if q @ d >= least]
                if found:
                    total, retrieving = total + torch.stack(found).max(), retrieving + 1
            row.append(total / max(retrieving, 1))
        rows.append(torch.stack(row))
    return torch.stack(rows)


lengths = st.lists(st.integers(0, 6), min_size=1, max_size=5)


mean_maxsim = partial(maxsim, mean=True), partial(loop_maxsim, mean=True)
scores = st.one_of(
    st.sampled_from([(maxsim, loop_maxsim), mean_maxsim]),
    st.integers(1, 20).map(lambda k: (partial(xtr, k=k), partial(loop_xtr, k=k))),
)


@settings(max_examples=50, deadline=None)
@given(scores, lengths, lengths, st.integers(0, 9), st.sampled_from([1, 40, 1 << 22]))
def test_scores_are_the_papers_equations_token_by_token(score, of_queries, of_documents, seed, products):
    queries, documents = tokens(of_queries, seed=seed), tokens(of_documents, seed=seed + 1)
    ours, loop = score
    before, late_interaction.PRODUCTS = late_interaction.PRODUCTS, products
    try:
        found = ours(queries, documents)
    finally:
        late_interaction.PRODUCTS = before
    torch.testing.assert_close(found, loop(matrices(queries), matrices(documents)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("score", "loop"), [(maxsim, loop_maxsim), (lambda q, d: xtr(q, d, 7), lambda q, d: loop_xtr(q, d, 7))]
)
def test_gradients_are_those_of_the_loops(score, loop):
    queries, documents = tokens([3, 5, 1], seed=3), tokens([4, 0, 9, 2], seed=4)
    weights = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
    gradients = []
    for ours in (True, False):
        leaves = [x.values_TD.clone().requires_grad_() for x in (queries, documents)]
        pair = [Tokens(leaf, x.lengths_N) for leaf, x in zip(leaves, (queries, documents), strict=True)]
        scores = score(*pair) if ours else loop(*(matrices(x) for x in pair))
        (scores * weights).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for mine, theirs in zip(*gradients, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_padding_never_wins_where_all_similarities_are_negative():
    queries = Tokens(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    documents = Tokens(torch.tensor([[-0.5, 0.0], [-0.9, 0.0], [-0.8, 0.0]]), torch.tensor([1, 2]))
    assert maxsim(queries, documents).tolist() == [[-0.5, pytest.approx(-0.8)]]
    assert xtr(queries, documents, 3).tolist() == [[-0.5, pytest.approx(-0.8)]]
    assert xtr(queries, documents, 1).tolist() == [[-0.5, 0.0]]


def test_xtr_with_every_token_retrieved_is_the_mean_maxsim():
    queries, documents = tokens([3, 5], seed=1), tokens([4, 7, 2], seed=2)
    torch.testing.assert_close(xtr(queries, documents, 13), maxsim(queries, documents, mean=True))
    torch.testing.assert_close(xtr(queries, documents, 10_000), maxsim(queries, documents, mean=True))


def test_pylates_variant_blows_negative_documents_up():
    """Beside the paper: only where maxima are negative do they differ, and then by a thousand."""
    queries = Tokens(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([2]))
    documents = Tokens(torch.tensor([[0.6, 0.8], [-0.5, -0.3]]), torch.tensor([1, 1]))
    paper, other = xtr(queries, documents, 2), xtr(queries, documents, 2, variant="pylate")
    assert paper.tolist() == [[pytest.approx(0.7), pytest.approx(-0.4)]]
    assert other.tolist() == [[pytest.approx(0.7), pytest.approx(-800.0)]]


@pytest.mark.parametrize("of_documents", [[4, 4, 4], [4, 1, 3]])
@pytest.mark.parametrize("k", [1, 3, 7, 8])
def test_pylates_variant_is_masks_times_scores(of_documents, k):
    """Its code in our words: products of padded texts, times 1 where retrieved and 0 elsewhere, then maxima."""
    queries, documents = tokens([3, 2], seed=6, width=3), tokens(of_documents, seed=7, width=3)
    values_NLD, mask_NL = documents.padded()
    products = torch.einsum("td,nld->tnl", queries.values_TD, values_NLD)
    masked = products.masked_fill(~mask_NL, torch.finfo(torch.float32).min).flatten(1)
    chosen = torch.zeros_like(masked).scatter_(1, masked.topk(k, dim=1).indices, 1.0)
    best = (masked * chosen).view_as(products).amax(-1)
    best = torch.where(best < -10, 0.0, best)
    sums = torch.stack([part.sum(0) for part in best.split([3, 2])])
    counts = torch.stack([(part > 0).sum(0) for part in best.split([3, 2])])
    torch.testing.assert_close(xtr(queries, documents, k, variant="pylate"), sums / counts.clamp(min=1e-3))


def test_scores_equal_sentence_transformers():
    scoring = pytest.importorskip("sentence_transformers.multi_vector_encoder.scoring.xtr")
    from sentence_transformers.util.similarity import maxsim as theirs

    queries, documents = tokens([3, 8, 5], seed=1, shift=0.2), tokens([4, 17, 2, 6, 6, 11], seed=2, shift=0.2)
    (query_values, query_mask), (document_values, document_mask) = queries.padded(), documents.padded()
    expected = theirs(query_values, document_values, query_mask, document_mask)
    torch.testing.assert_close(maxsim(queries, documents), expected)
    for k in (1, 5, 20, 500):
        grouped = document_values.unflatten(0, (3, 2)), document_mask.unflatten(0, (3, 2))
        expected = scoring.xtr_scores(query_values, grouped[0], query_mask, grouped[1], top_k=k)
        torch.testing.assert_close(xtr(queries, documents, k), expected)


def test_products_of_all_tokens_are_never_held_at_once(monkeypatch):
    monkeypatch.setattr(late_interaction, "PRODUCTS", 64)
    sizes = []
    groups = late_interaction._groups
    monkeypatch.setattr(late_interaction, "_groups", lambda *a: (sizes.append(g[1].numel()) or g for g in groups(*a)))
    queries = tokens([2, 2])
    xtr(queries, tokens([5, 3, 8, 1, 1, 4], seed=2), 3)
    assert len(sizes) > 1
    assert max(sizes) * 4 <= 64


def test_half_precision_and_autocast_score_in_fp32():
    queries, documents = tokens([3]), tokens([4, 6], seed=1)
    half = [Tokens(x.values_TD.bfloat16(), x.lengths_N) for x in (queries, documents)]
    with torch.autocast("cpu", torch.bfloat16):
        found = maxsim(*half)
    expected = maxsim(*(Tokens(x.values_TD.float(), x.lengths_N) for x in half))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    leaf = half[0].values_TD.clone().requires_grad_()
    maxsim(Tokens(leaf, half[0].lengths_N), half[1]).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def test_similarities_say_what_they_compare():
    dense, some = Dense(torch.ones(2, 3)), tokens([2])
    with pytest.raises(ValueError, match="tokens: maxsim"):
        similarity("cosine")(some, some)
    with pytest.raises(ValueError, match="does not compare dense"):
        similarity("maxsim")(dense, dense)
    with pytest.raises(ValueError, match="at least 1"):
        xtr(some, some, 0)
    np.testing.assert_allclose(similarity("xtr", 1)(some, some), xtr(some, some, 1))


@pytest.mark.parametrize("variant", ["paper", "pylate"])
def test_no_documents_give_no_scores(variant):
    queries = Tokens(torch.randn(3, 4), torch.tensor([2, 1]))
    nothing = Tokens(torch.empty(0, 4), torch.empty(0, dtype=torch.int64))
    assert xtr(queries, nothing, 5, variant=variant).shape == (2, 0)
