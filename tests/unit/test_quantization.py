"""Adapters on a backbone held in 4 bits. What needs bitsandbytes is left out where it is not installed."""

import sys

import pytest
import torch
from tiny_training import tiny_encoder, train_config, two_sources

from openembed.backbones.text import BackboneConfig
from openembed.checkpoints import load
from openembed.train.cached import ComputeConfig
from openembed.train.loop import train
from openembed.train.memory import activation_bytes

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]


@pytest.fixture
def saved(tmp_path):
    encoder = tiny_encoder(tmp_path / "tokenizer", dropout=0.0, width=128)
    encoder.save(tmp_path / "model")
    return tmp_path / "model"


def test_missing_bitsandbytes_is_said(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes .*pip install bitsandbytes"):
        load(saved, device="cpu", quantization="nf4")


def test_random_weights_are_refused():
    with pytest.raises(ValueError, match="quantization needs pretrained weights"):
        BackboneConfig(architecture={"model_type": "llama"}, quantization="nf4")


def test_qlora_trains_and_saves_a_whole_model(saved, tmp_path):
    pytest.importorskip("bitsandbytes")
    import numpy as np

    encoder = load(saved, device="cpu", dtype=torch.bfloat16, head_dtype=torch.float32, quantization="nf4")
    plain = load(saved, device="cpu")
    before = encoder.encode(TEXTS)
    assert np.abs(before - plain.encode(TEXTS)).max() < 0.1
    with pytest.raises(ValueError, match="held in 4 bits"):
        encoder.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"set lora, compute\.precision = 'bf16'"):
        train(train_config(), encoder, tmp_path / "refused", examples=two_sources())
    assert activation_bytes(encoder, np.array([9, 5]), ComputeConfig(precision="bf16"))[0] > 0

    config = train_config(
        lora={"rank": 4, "dropout": 0.0}, compute={"chunk_tokens": 40, "precision": "bf16"}, optimizer={"lr": 1e-2, "warmup": 1}
    )
    vectors = []

    def evaluate(encoder, step):
        vectors.append(encoder.encode(TEXTS))
        return {}

    result = train(config, encoder, tmp_path / "out", examples=two_sources(), evaluate=evaluate)
    reopened = load(result.model, device="cpu", dtype=torch.bfloat16, head_dtype=torch.float32)
    assert reopened.config.backbone.quantization is None
    found = reopened.encode(TEXTS)
    assert np.abs(found - before).max() > 0.05
    np.testing.assert_allclose(found, vectors[-1], atol=0.03)
    np.testing.assert_allclose(encoder.encode(TEXTS), found, atol=0.03)
