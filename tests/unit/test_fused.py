"""Layers run by our kernels: the same states as the model's own code, in exact float32 and nearly so in 8 bits."""

import logging

import numpy as np
import pytest
import torch

import openembed
from openembed.backbones import structure
from openembed.backbones.structure import fuse, use_kernels
from openembed.backbones.text import BackboneConfig, load_text_backbone
from openembed.kernels.library import library, missing
from openembed.packing import TokenRows, pack

kernels = pytest.mark.skipif(library() is None, reason=f"no kernels here: {missing()}")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "sliding_window": None,
}
RUN_WHOLE = ["llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "smollm3", "seed_oss", "eurobert"]
RUN_WHOLE_ENCODERS = ["bert", "roberta", "xlm-roberta", "camembert"]
BY_LAYERS = ["gemma2", "phi", "gpt_neox", "olmo2", "distilbert", "modernbert", "mpnet", "helium", "ernie4_5"]


def build(family, attention="bidirectional", **more):
    return load_text_backbone(BackboneConfig(architecture={"model_type": family, **SMALL, **more}, attention=attention)).eval()


def packed(lengths, seed=0):
    rng = np.random.default_rng(seed)
    ids = [rng.integers(5, 95, n).astype(np.int32) for n in lengths]
    return pack(TokenRows(ids, np.zeros(len(lengths), dtype=np.int32)))


def states(backbone, batch):
    with torch.inference_mode():
        return backbone(batch).float()


def own_states(backbone, batch):
    with torch.inference_mode():
        return backbone.own_forward(batch).float()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a, b)


@kernels
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", RUN_WHOLE)
def test_decoders_run_whole(family, attention):
    backbone, batch = build(family, attention), packed([1, 30, 17, 64, 3])
    expected = own_states(backbone, batch)
    use_kernels(backbone, "exact")
    assert backbone.fused is not None
    torch.testing.assert_close(states(backbone, batch), expected, atol=1e-5, rtol=1e-5)
    use_kernels(backbone, "int8")
    assert cosine(states(backbone, batch), expected).min() > 0.99


@kernels
@pytest.mark.parametrize("family", RUN_WHOLE_ENCODERS)
def test_encoders_run_whole(family):
    backbone, batch = build(family), packed([1, 30, 17, 64, 3])
    expected = own_states(backbone, batch)
    use_kernels(backbone, "exact")
    assert backbone.fused is not None
    torch.testing.assert_close(states(backbone, batch), expected, atol=1e-5, rtol=1e-5)
    use_kernels(backbone, "int8")
    assert cosine(states(backbone, batch), expected).min() > 0.99


@pytest.mark.parametrize("family", BY_LAYERS)
def test_other_families_stay_exact_and_have_8_bits_by_layers(family):
    backbone, batch = build(family, **({"sliding_window": 64} if family == "modernbert" else {})), packed([30, 30, 17])
    if family == "mpnet":  # not packable: texts of equal length run together
        backbone.stop_packing(open_masks=False)
    expected = own_states(backbone, batch)
    assert fuse(backbone, "exact") is None
    use_kernels(backbone, "int8")
    assert backbone.fused is None
    found = states(backbone, batch)
    assert cosine(found, expected).min() > 0.98
    assert not torch.equal(found, expected)


@kernels
@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_a_text_has_the_same_states_alone_and_among_others(precision):
    backbone, lengths = build("qwen3"), [9, 1, 33, 60]
    use_kernels(backbone, precision)
    rng = np.random.default_rng(3)
    ids = [rng.integers(5, 95, n).astype(np.int32) for n in lengths]
    together = states(backbone, pack(TokenRows(ids, np.zeros(4, dtype=np.int32)))).split(lengths)
    for text, found in zip(ids, together, strict=True):
        torch.testing.assert_close(states(backbone, pack(TokenRows([text], np.zeros(1, dtype=np.int32)))), found)


@kernels
def test_threads_change_nothing():
    backbone, batch = build("bert", max_position_embeddings=512), packed([300, 12, 280, 50, 7, 7, 7])
    use_kernels(backbone, "int8")
    before, threads = states(backbone, batch), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(states(backbone, batch), before)
    finally:
        torch.set_num_threads(threads)


@kernels
def test_texts_longer_than_a_window_run_by_the_models_own_code():
    backbone = build("mistral", sliding_window=20)
    use_kernels(backbone, "exact")
    assert backbone.fused.serves(packed([20]), bidirectional=True)
    assert not backbone.fused.serves(packed([20, 40]), bidirectional=True)
    long = packed([20, 40])
    torch.testing.assert_close(states(backbone, long), own_states(backbone, long), atol=1e-6, rtol=0)


@kernels
def test_changed_weights_are_seen():
    backbone, batch = build("llama"), packed([12, 5])
    use_kernels(backbone, "exact")
    before = states(backbone, batch)
    with torch.no_grad():
        backbone.model.layers[0].mlp.up_proj.weight.mul_(2)
        backbone.model.layers[1].input_layernorm.weight.mul_(3)
    after = states(backbone, batch)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, own_states(backbone, batch), atol=1e-5, rtol=1e-5)


@kernels
def test_an_adapter_ends_it_and_merging_brings_it_back():
    from openembed.backbones.adapters import LoraConfig, add_lora, merge_lora

    backbone, batch = build("llama"), packed([12, 5])
    use_kernels(backbone, "exact")
    states(backbone, batch)
    add_lora(backbone.model, LoraConfig(dropout=0.0))
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    backbone.eval()
    assert not backbone.fused.serves(batch, bidirectional=True)
    adapted = states(backbone, batch)
    merge_lora(backbone.model)
    assert backbone.fused.serves(batch, bidirectional=True)
    torch.testing.assert_close(states(backbone, batch), adapted, atol=1e-4, rtol=1e-4)


@kernels
def test_gradients_go_through_the_models_own_code():
    backbone, batch = build("llama"), packed([12, 5])
    use_kernels(backbone, "int8")
    backbone(batch).sum().backward()
    assert all(p.grad is not None for p in backbone.model.layers.parameters())


@kernels
def test_a_plan_that_computes_something_else_is_refused(monkeypatch, caplog):
    real = structure.read

    def wrong(backbone):
        plan = real(backbone)
        object.__setattr__(plan.layers[0].heads, "scale", 2 * plan.layers[0].heads.scale)
        return plan

    monkeypatch.setattr(structure, "read", wrong)
    with caplog.at_level(logging.INFO):
        assert fuse(build("llama"), "exact") is None
    assert "differ by" in caplog.text


def test_8_bits_without_kernels(monkeypatch, minilm_dir):
    monkeypatch.setattr("openembed.backbones.int8.library", lambda: None)
    monkeypatch.setattr(structure, "library", lambda: None)
    texts = ["are judo throws allowed in wrestling?", "Mars is the fourth planet from the Sun. " * 5]
    exact, int8 = (openembed.load(minilm_dir, dtype=d) for d in ("float32", "int8"))
    assert int8.backbone.fused is None
    assert (exact.encode(texts) * int8.encode(texts)).sum(1).min() > 0.99


def test_8_bits_of_minilm_stay_close_on_every_text(minilm_dir, shared_dir):
    import gzip
    import json

    with gzip.open(shared_dir / "data" / "banking77" / "test.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file][::20]
    texts += [word for text in texts[:60] for word in text.split()] + ["?", "1", "你好", " ".join(texts)]
    exact, int8 = openembed.load(minilm_dir), openembed.load(minilm_dir, dtype="int8")
    assert (exact.computed_in, int8.computed_in) == ("float32", "int8")
    if library() is not None:
        assert (exact.encode(texts) * int8.encode(texts)).sum(1).min() >= 0.995


def test_8_bits_are_for_cpus(minilm_dir):
    with pytest.raises(ValueError, match="runs on CPUs"):
        openembed.load(minilm_dir, "meta", "int8")
    with pytest.raises(ValueError, match="or int8 on a CPU"):
        openembed.load(minilm_dir, dtype="int4")


def test_a_copy_and_a_pickle_run_without_kernels_of_the_original(minilm_dir):
    import copy
    import pickle

    encoder = openembed.load(minilm_dir, dtype="int8")
    before = encoder.encode(["a text"])
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert other.backbone.fused is None
        assert (other.encode(["a text"]) * before).sum() > 0.99
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert (encoder.encode(["a text"]) == before).all()


def replace_parameter(model):
    linear = model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(2 * linear.weight.detach())


def assign_state(model):
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def set_hook(model):
    model.layers[0].register_forward_hook(lambda _module, _inputs, output: 2 * output)


@kernels
@pytest.mark.parametrize("change", [replace_parameter, assign_state, set_hook])
def test_what_takes_anothers_place_is_seen(change):
    backbone, batch = build("llama"), packed([12, 5])
    use_kernels(backbone, "exact")
    before = states(backbone, batch)
    change(backbone.model)
    after = states(backbone, batch)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, own_states(backbone, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_of_any_optimizer_is_seen(fused):
    backbone, batch = build("llama"), packed([12, 5])
    use_kernels(backbone, "exact")
    before = states(backbone, batch)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.05, fused=fused)
    backbone(batch).square().sum().backward()
    optimizer.step()
    after = states(backbone, batch)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, own_states(backbone, batch), atol=1e-5, rtol=1e-5)


@kernels
def test_a_model_made_in_inference_mode_runs():
    with torch.inference_mode():
        backbone = build("llama")
        use_kernels(backbone, "exact")
    assert backbone.fused is not None


@kernels
def test_weights_are_held_once_and_once_packed(minilm_dir):
    from openembed.backbones.prepacked import PrepackedLinear

    encoder = openembed.load(minilm_dir)
    encoder.encode(["a text that is long enough for the prepared layers of the model's own code to be of use to it"])
    layers = [m for m in encoder.backbone.modules() if isinstance(m, PrepackedLinear)]
    assert layers
    assert all(layer._prepared is None for layer in layers)


@kernels
def test_a_model_too_large_for_a_second_copy_is_not_packed_at_all(monkeypatch):
    monkeypatch.setattr(structure, "MAX_WEIGHT_BYTES", 0)
    monkeypatch.setattr("openembed.backbones.fused._packed", lambda *_: pytest.fail("packed"))
    assert fuse(build("llama"), "exact") is None
