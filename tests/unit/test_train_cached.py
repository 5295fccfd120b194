import pytest
import torch
from tiny_training import tiny_encoder, two_sources

from openembed.backbones.adapters import LoraConfig, add_lora
from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.packing import micro_batches, pack
from openembed.representations import Dense
from openembed.seeds import derive, generator
from openembed.train.cached import ComputeConfig, backward, prepare, seeded

SOURCES = {name: RowSource(name, query_prompt="w1 w2 ", in_batch=name == "first") for name in ("first", "second")}


def gradients(encoder):
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def batch_of(count=10):
    rows = [example for examples in two_sources().values() for example in examples][:count]
    return collate(rows, SOURCES, BatchConfig(negatives=2), generator(0, "rows", 0))


def plain(encoder, objective, prepared, compute, seed):
    """Everything in one graph, nothing run twice."""
    encoder.zero_grad()
    values = [None] * len(prepared.rows)
    for number, indices in enumerate(micro_batches(prepared.rows.lengths, compute.chunk_tokens)):
        with seeded(derive(seed, "chunk", number), encoder.device):
            for index, value in zip(indices, encoder(pack(prepared.rows, indices)), strict=True):
                values[index] = value
    loss = objective.loss(Dense(torch.stack(values)), prepared.batch)
    loss.total.backward()
    return loss.total.item(), gradients(encoder)


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("chunk_tokens", [1, 17, 60, 10_000])
@pytest.mark.parametrize("live_chunks", [0, 1, 2, "all"])
def test_cached_equals_plain_with_dropout(tmp_path, family, chunk_tokens, live_chunks):
    encoder = tiny_encoder(tmp_path, family, dropout=0.2).train()
    if family == "llama":
        with seeded(1, encoder.device):
            add_lora(encoder.backbone.model, LoraConfig(rank=4, dropout=0.3))
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    objective = ContrastiveConfig(temperature=0.1, matryoshka=(8, 32)).build()
    compute = ComputeConfig(chunk_tokens=chunk_tokens, live_chunks=live_chunks)
    prepared = prepare(encoder, objective, batch_of(), compute)
    expected_loss, expected = plain(encoder, objective, prepared, compute, seed=5)
    encoder.zero_grad()
    loss = backward(encoder, objective, prepared, compute, seed=5)
    found = gradients(encoder)
    assert loss.total.item() == pytest.approx(expected_loss, abs=1e-6)
    assert found.keys() == expected.keys()
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_is_on_and_belongs_to_the_seed(tmp_path):
    encoder = tiny_encoder(tmp_path, "bert", dropout=0.2).train()
    objective, compute = ContrastiveConfig(temperature=0.1).build(), ComputeConfig(chunk_tokens=50)
    prepared = prepare(encoder, objective, batch_of(), compute)
    losses = [backward(encoder, objective, prepared, compute, seed=seed).total.item() for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_global_generator_is_left_alone(tmp_path):
    encoder = tiny_encoder(tmp_path).train()
    objective, compute = ContrastiveConfig().build(), ComputeConfig()
    prepared = prepare(encoder, objective, batch_of(), compute)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    backward(encoder, objective, prepared, compute, seed=1)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_bf16_and_checkpointing_come_close(tmp_path):
    encoder = tiny_encoder(tmp_path, dropout=0.0).train()
    objective = ContrastiveConfig(temperature=0.1).build()
    full = ComputeConfig(chunk_tokens=60)
    prepared = prepare(encoder, objective, batch_of(), full)
    expected = backward(encoder, objective, prepared, full, seed=1).total.item()
    exact = gradients(encoder)

    encoder.zero_grad()
    encoder.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    backward(encoder, objective, prepared, full, seed=1)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-6, atol=1e-6)

    encoder.zero_grad()
    half = ComputeConfig(chunk_tokens=60, precision="bf16")
    loss = backward(encoder, objective, prepared, half, seed=1)
    assert loss.total.item() == pytest.approx(expected, rel=0.05)
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, gradients(encoder))]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98
    assert all(gradient.dtype == torch.float32 for gradient in gradients(encoder).values())
