"""Compiled layers give the eager layers' vectors and gradients. Compiling takes a C++ compiler and about a minute of CPU."""

import shutil

import numpy as np
import pytest
import torch
from tiny_training import tiny_encoder, train_config, two_sources

from openembed.backbones.compiled import compile_layers, restore_layers
from openembed.packing import TokenRows, pack
from openembed.train.loop import train

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")


def texts(*lengths):
    rng = np.random.default_rng(0)
    return pack(TokenRows([rng.integers(5, 60, n) for n in lengths], np.zeros(len(lengths), dtype=np.int64)))


def vectors_and_gradients(encoder, packed):
    encoder.zero_grad()
    values = encoder(packed)
    (values * torch.sin(torch.arange(values.numel())).view_as(values)).sum().backward()
    return values.detach().clone(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_compiled_equals_eager_whatever_the_lengths(tmp_path, family):
    encoder = tiny_encoder(tmp_path, family, dropout=0.0).train()
    packs = [texts(9, 9, 5, 1, 1), texts(30), texts(1), texts(1, 1), texts(12, 3, 3, 2)]
    expected = [vectors_and_gradients(encoder, packed) for packed in packs]
    names = list(encoder.state_dict())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_layers(encoder.backbone)
    for packed, (values, gradients) in zip(packs, expected, strict=True):
        found, found_gradients = vectors_and_gradients(encoder, packed)
        torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-5)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "layers or lengths did not share their code"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(encoder.state_dict()) == names
    restore_layers(encoder.backbone)
    torch.testing.assert_close(encoder(packs[0]), expected[0][0], rtol=0, atol=0)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_learns_what_a_plain_one_does(tmp_path):
    rows = two_sources()
    losses = []
    for compiled in (False, True):
        config = train_config(steps=3, compute={"chunk_tokens": 40, "compile": compiled})
        encoder = tiny_encoder(tmp_path / str(compiled), dropout=0.0)
        result = train(config, encoder, tmp_path / f"run-{compiled}", examples=rows)
        losses.append([p.detach().clone() for p in encoder.parameters()])
        assert result.steps == 3
    for plain, other in zip(*losses, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def test_passes_without_gradients_are_not_compiled(tmp_path):
    encoder = tiny_encoder(tmp_path, dropout=0.0)
    packed = texts(4, 4, 2)
    with torch.no_grad():
        expected = encoder(packed)
        torch._dynamo.utils.counters.clear()
        compile_layers(encoder.backbone)
        torch.testing.assert_close(encoder(packed), expected, rtol=0, atol=0)
    assert not torch._dynamo.utils.counters["stats"]


def test_a_family_without_packing_is_refused(tmp_path):
    encoder = tiny_encoder(tmp_path, "bert")
    encoder.backbone.stop_packing(open_masks=False)
    with pytest.raises(ValueError, match=r"compute\.compile: BertModel cannot be packed"):
        compile_layers(encoder.backbone)
