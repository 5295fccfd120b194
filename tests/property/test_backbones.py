"""Any decoder family: packed = alone = transformers' own attention; a model that is not what it should be is refused."""

import logging

import numpy as np
import pytest
import torch

from openembed.backbones.attention import Visibility, packed_attention
from openembed.backbones.probe import check, run_probe
from openembed.backbones.text import BackboneConfig, load_text_backbone
from openembed.packing import TokenRows, pack

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
PACKED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "granite",
    "olmo2",
    "cohere",
    "cohere2",
    "gpt_neox",
    "gpt2",
    "starcoder2",
    "glm",
    "smollm3",
    "exaone4",
    "ernie4_5",
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "arcee",
    "persimmon",
    "gpt_bigcode",
    "biogpt",
]
EQUAL_LENGTHS = ["stablelm", "nemotron", "xglm", "bloom"]
ENCODERS = ["bert", "roberta", "distilbert", "albert", "electra", "modernbert"]
EXTRA = {"phi": {"rotary_dim": 4}, "gpt2": {"n_positions": 128}, "bert": {"max_position_embeddings": 128}}


def build(family, attention="bidirectional", **more):
    fields = {"model_type": family, **SMALL, **EXTRA.get(family, {}), **more}
    torch.manual_seed(0)
    return load_text_backbone(BackboneConfig(architecture=fields, attention=attention)).eval()


def rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return TokenRows([rng.integers(5, 95, n).astype(np.int32) for n in lengths], np.zeros(len(lengths), dtype=np.int32))


def stock_states(backbone, ids):
    """Hidden states of one text from transformers' own eager attention under an explicit mask."""
    length = len(ids)
    mask = torch.zeros(1, 1, length, length)
    if not backbone.bidirectional:
        mask = mask.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    backbone.model.set_attn_implementation("eager")
    try:
        return backbone.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], attention_mask=mask).last_hidden_state[0]
    finally:
        backbone.model.set_attn_implementation("openembed_packed")


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", PACKED)
def test_packed_decoders_equal_transformers_own_attention(family, attention):
    backbone = build(family, attention)
    probe = check(backbone)
    assert backbone.packable
    assert probe.bidirectional == (attention == "bidirectional")
    texts = rows([11, 7, 7, 1])
    with torch.inference_mode():
        packed = backbone(pack(texts)).split([11, 7, 7, 1])
        for states, ids in zip(packed, texts.ids, strict=True):
            torch.testing.assert_close(states, stock_states(backbone, ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", EQUAL_LENGTHS)
def test_families_that_cannot_be_packed_run_in_groups_of_equal_length(family, attention, caplog):
    backbone = build(family, attention)
    with caplog.at_level(logging.WARNING):
        probe = check(backbone)
    assert not backbone.packable
    assert "groups of equal length" in caplog.text
    assert probe.isolated
    assert probe.bidirectional == (attention == "bidirectional")


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_pack(family):
    backbone = build(family, "model")
    assert backbone.bidirectional
    assert check(backbone).isolated
    assert backbone.packable


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_a_family_that_stays_causal_is_refused(family):
    with pytest.raises(ValueError, match="stays causal"):
        check(build(family))


def test_a_causal_model_that_sees_later_tokens_is_refused():
    backbone = Stubborn()
    with pytest.raises(ValueError, match="sees later tokens"):
        check(backbone)


class Stubborn(torch.nn.Module):
    """A backbone that sees the whole text although a causal one was asked for."""

    packable, bidirectional, vocabulary = True, False, 64

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Embedding(64, 8)

    def stop_packing(self, *, open_masks):
        self.packable = False

    def forward(self, packed):
        pieces = self.model(packed.ids_T).split(packed.lengths_B.tolist())
        return torch.cat([piece + piece.mean(0) for piece in pieces])


class Leaky(Stubborn):
    """A backbone whose texts depend on everything in the pack, whichever way it is run."""

    bidirectional = True

    def forward(self, packed):
        states = self.model(packed.ids_T)
        return states + states.mean(0)


def test_a_model_that_leaks_across_texts_is_refused():
    with pytest.raises(ValueError, match="mixes neighbouring texts"):
        check(Leaky())


def test_sliding_windows_are_kept_or_opened():
    near = build("mistral", sliding_window=5)
    assert run_probe(near).bidirectional  # two layers of five tokens reach over nine
    fields = {"model_type": "mistral", **SMALL, "sliding_window": 5}
    opened = load_text_backbone(BackboneConfig(architecture=fields, sliding_window="off")).eval()
    opened.load_state_dict(near.state_dict())
    texts = pack(rows([20]))
    with torch.inference_mode():
        assert (near(texts) - opened(texts)).abs().max() > 1e-4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2, 5])
def test_packed_attention_equals_a_loop_over_tokens(causal, window):
    layout = pack(rows([6, 6, 3])).layout
    q, k, v = torch.randn(4, 15, 8), torch.randn(2, 15, 8), torch.randn(2, 15, 8)
    out = packed_attention(q, k, v, layout, Visibility(causal=causal, window=window))
    for first, length in [(0, 6), (6, 6), (12, 3)]:
        for i in range(length):
            if causal:
                seen = [j for j in range(i + 1) if window is None or i - j < window]
            else:
                seen = [j for j in range(length) if window is None or abs(i - j) <= window]
            places = [first + j for j in seen]
            for h in range(4):
                weights = torch.softmax(k[h // 2, places] @ q[h, first + i] / 8**0.5, dim=0)
                torch.testing.assert_close(out[first + i, h], weights @ v[h // 2, places], atol=1e-5, rtol=1e-5)


def test_configurations_that_say_nothing_or_too_much_are_refused():
    with pytest.raises(ValueError, match="either path"):
        BackboneConfig()
    with pytest.raises(ValueError, match="either path"):
        BackboneConfig(path="a", architecture={})
    with pytest.raises(ValueError, match="needs model_type"):
        load_text_backbone(BackboneConfig(architecture={"hidden_size": 4}))
    with pytest.raises(ValueError, match="no model_type 'nonsense'"):
        load_text_backbone(BackboneConfig(architecture={"model_type": "nonsense"}))
