"""The counted memory of a step against what autograd and the optimizer really hold, and the search for a micro-batch."""

import numpy as np
import pytest
import torch
from tiny_training import tiny_encoder, tiny_sparse_encoder, train_config, two_sources

from openembed.backbones.adapters import LoraConfig, add_lora
from openembed.kernels.vocabulary import serves
from openembed.packing import TokenRows, pack
from openembed.train.cached import ComputeConfig
from openembed.train.loop import train
from openembed.train.memory import (
    SMALLEST_CHUNK,
    MemoryEstimate,
    activation_bytes,
    choose_chunk_tokens,
    counting,
    estimate_memory,
    largest_fitting,
    require_fit,
    try_estimate,
)
from openembed.train.optimizer import OptimizerConfig

LENGTHS = np.array([30, 30, 24, 24, 24, 9, 9, 5, 3])


def packed(lengths=LENGTHS):
    return pack(TokenRows([np.ones(n, dtype=np.int64) for n in lengths], np.zeros(len(lengths), dtype=np.int64)))


def really_saved(encoder, compute):
    """Bytes that autograd keeps of one real pass, found by their addresses."""
    own = {p.untyped_storage().data_ptr() for p in (*encoder.parameters(), *encoder.buffers())}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=compute.precision == "bf16"),
    ):
        value = encoder(packed())
    assert value.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_counted_without_being_made(tmp_path, family, precision, lora):
    encoder = tiny_encoder(tmp_path, family).train()
    if lora:
        add_lora(encoder.backbone.model, LoraConfig(rank=4))
    compute = ComputeConfig(precision=precision)
    counted, widest = activation_bytes(encoder, LENGTHS, compute)
    assert counted == pytest.approx(really_saved(encoder, compute), rel=0.15)
    assert 0 < widest < counted
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pooling", ["max", "sum"])
@pytest.mark.parametrize("transform", ["none", "mlm"])
def test_a_vocabulary_head_is_counted(tmp_path, caplog, precision, pooling, transform):
    encoder = tiny_sparse_encoder(tmp_path, pooling=pooling, transform=transform).train()
    compute = ComputeConfig(precision=precision, chunk_tokens=60)
    assert activation_bytes(encoder, LENGTHS, compute)[0] == pytest.approx(really_saved(encoder, compute), rel=0.15)
    estimate = try_estimate(encoder, compute, LENGTHS)
    assert not caplog.records
    assert estimate.vectors == 3 * 4 * len(LENGTHS) * encoder.width
    working = encoder.head.working_bytes(60, torch.bfloat16 if precision == "bf16" else None)
    assert estimate.workspace > working
    products = torch.bfloat16 if precision == "bf16" else torch.float32
    kernels = pooling == "max" and serves(encoder.head.output_VD, encoder.head.output_VD, products)
    assert (working == 0) == kernels, "kernels hold no logits"


def test_counting_sees_each_storage_once(tmp_path):
    encoder = tiny_encoder(tmp_path).train()
    with counting(encoder) as kept:
        encoder(packed())
    assert sum(kept.values()) == pytest.approx(really_saved(encoder, ComputeConfig()), rel=0.01)


def test_checkpointing_keeps_less_but_more_than_its_borders(tmp_path):
    encoder = tiny_encoder(tmp_path).train()
    everything, _ = activation_bytes(encoder, LENGTHS, ComputeConfig())
    encoder.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    compute = ComputeConfig(gradient_checkpointing=True)
    borders = really_saved(encoder, compute)
    counted, _ = activation_bytes(encoder, LENGTHS, compute)
    assert borders < counted < borders + everything


@pytest.mark.parametrize("lora", [False, True])
def test_weights_gradients_and_moments_are_exact(tmp_path, lora):
    encoder = tiny_encoder(tmp_path).train()
    if lora:
        add_lora(encoder.backbone.model, LoraConfig(rank=4))
    estimate = estimate_memory(encoder, ComputeConfig(chunk_tokens=60, live_chunks="all"), LENGTHS)
    optimizer = OptimizerConfig().build(encoder)
    encoder(packed()).sum().backward()
    optimizer.step()
    trained = [p for p in encoder.parameters() if p.grad is not None]
    assert estimate.gradients == sum(p.grad.nbytes for p in trained)
    moments = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    assert estimate.moments == moments
    assert estimate.weights == sum(p.nbytes for p in (*encoder.parameters(), *encoder.buffers()))


def test_estimate_follows_what_is_live_and_split(tmp_path):
    encoder = tiny_encoder(tmp_path).train()
    one, two, whole = (
        estimate_memory(encoder, ComputeConfig(chunk_tokens=60, live_chunks=live), LENGTHS) for live in (1, 2, "all")
    )
    assert one.activations * 2 == two.activations < whole.activations
    ddp, fsdp = (
        estimate_memory(encoder, ComputeConfig(chunk_tokens=60, parallel=kind, keep_whole="nothing"), LENGTHS, ranks=4)
        for kind in ("ddp", "fsdp")
    )
    assert fsdp.moments * 4 == ddp.moments
    assert fsdp.gradients < ddp.gradients / 3
    assert isinstance(fsdp, MemoryEstimate)
    assert "moments" in str(fsdp)


@pytest.mark.parametrize(("most", "expected"), [(10_000, 7936), (1024, 1024), (100, SMALLEST_CHUNK)])
def test_the_largest_micro_batch_that_fits(most, expected):
    tried = []

    def peak(tokens):
        tried.append(tokens)
        bytes_needed = 1_000_000 + 1000 * tokens
        return None if bytes_needed > 9_500_000 else bytes_needed

    assert largest_fitting(peak, 9_000_000, most) == expected
    assert len(tried) <= 4


def test_a_guess_that_does_not_fit_is_shrunk():
    assert largest_fitting(lambda tokens: None if tokens > 3000 else tokens, 10**6, 10**5) <= 3000
    with pytest.raises(ValueError, match=r"not even a micro-batch of 256 tokens fits into 1\.0 MB"):
        largest_fitting(lambda tokens: 10**7, 10**6, 4096)


def test_no_rank_is_left_without_work(tmp_path):
    encoder = tiny_encoder(tmp_path)
    lengths = np.full(100, 30)
    assert choose_chunk_tokens(encoder, ComputeConfig(chunk_tokens="auto"), lengths, 4) == 750
    assert choose_chunk_tokens(encoder, ComputeConfig(chunk_tokens="auto"), np.full(10_000, 30), 4) == 1536


def test_the_estimate_is_told_before_the_first_step(tmp_path):
    notes = []
    config = train_config(steps=1, compute={"chunk_tokens": "auto"})
    train(config, tiny_encoder(tmp_path / "t"), tmp_path / "out", examples=two_sources(), tell=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("memory: about ")
    assert "activations" in notes[0]


def test_a_model_that_cannot_run_on_shapes_still_trains(tmp_path, monkeypatch, caplog):
    encoder = tiny_encoder(tmp_path / "t")
    head = type(encoder.head)
    forward = head.forward

    def looks_at_values(self, hidden_TD, packed):
        assert float(hidden_TD.detach().sum()) == float(hidden_TD.detach().sum())
        return forward(self, hidden_TD, packed)

    monkeypatch.setattr(head, "forward", looks_at_values)
    assert try_estimate(encoder, ComputeConfig(chunk_tokens=60), LENGTHS) is None
    assert "memory could not be counted" in caplog.text
    train(train_config(steps=1), encoder, tmp_path / "out", examples=two_sources())


def test_what_will_not_fit_a_gpu_is_refused(monkeypatch):
    estimate = MemoryEstimate(10**10, 10**9, 2 * 10**9, 0, 0, 0)
    monkeypatch.setattr("openembed.train.memory.available_bytes", lambda device: 12 * 10**9)
    with pytest.raises(ValueError, match=r"needs about 13.0 GB a rank: .*12.0 GB are to be had on cuda:0. Lower compute.chunk"):
        require_fit(estimate, torch.device("cuda", 0))
    require_fit(estimate, torch.device("cpu"))
