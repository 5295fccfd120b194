"""Training with vectors a token: cached equals plain gradients, every objective runs, losses fall."""

import numpy as np
import pytest
import torch
from tiny_training import examples
from token_models import token_encoder

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.objectives.distillation import DistillationConfig
from openembed.packing import TokenRows, pack
from openembed.records import Example
from openembed.representations import Tokens
from openembed.seeds import derive, generator
from openembed.train.cached import ComputeConfig, backward, prepare, seeded
from openembed.train.memory import counting, estimate_memory

EXPANDED = {"pool_instruction": "include", "expansion": {"length": 8}}
CLUSTERS = {"kind": "token_projection", "width": 16, "pool": {"kind": "clusters", "queries": 2, "documents": 3}}
OBJECTIVES = [
    ContrastiveConfig(similarity="mean_maxsim", temperature=0.1),
    ContrastiveConfig(similarity="maxsim", temperature=1.0, in_batch="none"),
    ContrastiveConfig(similarity="xtr", k_train=4, temperature=0.1),
    ContrastiveConfig(similarity="xtr", k_train=100_000, temperature=0.1),
    DistillationConfig(similarity="mean_maxsim", embedding="none", score_weight=1.0),
    DistillationConfig(similarity="xtr", k_train=8, embedding="none", score_weight=1.0),
]


def scored(rows: list[Example]) -> list[Example]:
    return [
        Example(
            row.query,
            row.positives,
            row.negatives,
            row.source,
            positive_scores=(0.9,),
            negative_scores=tuple(0.1 * number for number in range(len(row.negatives))),
        )
        for row in rows
    ]


def batch_of(encoder):
    source = RowSource("first", sided=encoder.sided)
    return collate(scored(examples("first", 8)), {"first": source}, BatchConfig(negatives=2), generator(0, "rows", 0))


def plain(encoder, objective, prepared, compute, seed):
    """Everything in one graph, nothing run twice."""
    encoder.zero_grad()
    texts = [None] * len(prepared.rows)
    for number, indices in enumerate(prepared.rows.micro_batches(compute.chunk_tokens)):
        with seeded(derive(seed, "chunk", number), encoder.device):
            values = encoder(pack(prepared.rows, indices))
            counts = encoder.rows_of(prepared.rows.select(indices)).tolist()
            for index, value in zip(indices, values.split(counts), strict=True):
                texts[index] = value
    lengths = torch.tensor([len(text) for text in texts])
    loss = objective.loss(Tokens(torch.cat(texts), lengths), prepared.batch)
    loss.total.backward()
    return loss.total.item(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{o.similarity}")
@pytest.mark.parametrize(("fields", "live"), [({"tokenizer": EXPANDED}, 0), ({"head": CLUSTERS}, 1)], ids=["colbert", "crisp"])
def test_cached_equals_plain_with_dropout(tmp_path, objective, fields, live):
    encoder = token_encoder(tmp_path, dropout=0.2, **fields).train()
    compute = ComputeConfig(chunk_tokens=40, live_chunks=live)
    prepared = prepare(encoder, objective.build(), batch_of(encoder), compute)
    assert encoder.sided
    assert prepared.rows.queries.any()
    expected_loss, expected = plain(encoder, objective.build(), prepared, compute, seed=5)
    encoder.zero_grad()
    loss = backward(encoder, objective.build(), prepared, compute, seed=5)
    assert loss.total.item() == pytest.approx(expected_loss, abs=1e-6)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for name, parameter in encoder.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{o.kind}-{o.similarity}")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_fall_and_every_parameter_is_reached(tmp_path, objective, precision):
    encoder = token_encoder(tmp_path, head=CLUSTERS).train()
    compute, built = ComputeConfig(precision=precision), objective.build()
    prepared = prepare(encoder, built, batch_of(encoder), compute)
    optimizer, losses = torch.optim.AdamW(encoder.parameters(), lr=3e-3), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(backward(encoder, built, prepared, compute, seed=1).total.item())
        for name, parameter in encoder.named_parameters():
            unused = "pooler" in name or "token_type" in name
            assert unused or (parameter.grad is not None and torch.isfinite(parameter.grad).all()), name
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("head", [CLUSTERS, {**CLUSTERS, "skip": "punctuation", "pool": None}])
def test_memory_is_counted_before_the_first_step(tmp_path, head):
    encoder = token_encoder(tmp_path, head=head)
    lengths = np.array([40, 12, 9, 7])
    estimate = estimate_memory(encoder, ComputeConfig(chunk_tokens=100), lengths)
    with counting(encoder) as kept:
        encoder(pack(TokenRows([np.full(length, 9, dtype=np.int32) for length in lengths], np.zeros(4, dtype=np.int64))))
    assert estimate.activations == pytest.approx(sum(kept.values()), rel=0.1)
    assert estimate.vectors == 3 * 4 * 68 * 16


def test_matryoshka_and_vectors_are_refused(tmp_path):
    encoder, compute = token_encoder(tmp_path), ComputeConfig()
    objective = ContrastiveConfig(similarity="maxsim", matryoshka=(8,)).build()
    with pytest.raises(ValueError, match="matryoshka"):
        backward(encoder, objective, prepare(encoder, objective, batch_of(encoder), compute), compute, seed=0)
