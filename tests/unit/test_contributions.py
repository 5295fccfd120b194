"""Shares of the pooled vector: they sum to 1 and are what leaving the algebra aside gives."""

import numpy as np
import pytest
import torch

from openembed.contributions import contributions, pooled, shares
from openembed.packing import pack

TEXT = "The naïve cat 🙂 sat on the mat"
HEADS = [
    {"kind": "mean"},
    {"kind": "weighted_mean"},
    {"kind": "mean_sqrt_length"},
    {"kind": "max"},
    {"kind": "concat", "parts": ("mean", "max", "cls")},
    {"kind": "latent_attention", "latents": 8, "heads": 2},
    {"kind": "latent_attention", "latents": 8, "heads": 2, "variant": "paper"},
    {"kind": "self_attention", "heads": 2},
]


def row_of(encoder, text, instruction=""):
    packed = pack(encoder.tokenize([text], instruction))
    with torch.inference_mode():
        return encoder.backbone(packed), packed


@pytest.mark.parametrize("head", HEADS, ids=lambda head: "-".join(map(str, head.values())))
@pytest.mark.parametrize("instruction", ["", "Instruct: find it\nQuery:\n"])
def test_shares_sum_to_one_and_belong_to_pooled_tokens(make_encoder, head, instruction):
    tokens = contributions(make_encoder(head=head), TEXT, instruction)
    assert abs(sum(token.weight for token in tokens) - 1) < 1e-9
    assert all(token.weight == 0 for token in tokens if not token.pooled)
    assert all(token.text == TEXT[token.start : token.end] for token in tokens if token.end)
    assert (sum(not token.pooled for token in tokens) > 3) == bool(instruction)


@pytest.mark.parametrize("head", [HEADS[0], HEADS[1], HEADS[2], HEADS[5], HEADS[6], HEADS[7]], ids=lambda head: head["kind"])
def test_a_share_is_what_the_vector_loses_along_itself_without_the_token(make_encoder, head):
    """Brute force through the head: its output with one token's state set to zero in what is averaged."""
    encoder = make_encoder(head=head)
    hidden_TD, packed = row_of(encoder, TEXT, "Instruct: find it\nQuery:\n")
    module = encoder.head
    with torch.inference_mode():
        states_TD = module.token_states(hidden_TD, packed) if hasattr(module, "token_states") else hidden_TD
        whole_D = module(hidden_TD, packed)[0].double().numpy()
        found_T = shares(module, hidden_TD, packed).numpy()
    mask_T = packed.pool_mask_T.numpy()
    weights_T = mask_T * np.arange(1, len(mask_T) + 1) if head["kind"] == "weighted_mean" else mask_T.astype(float)
    scale = weights_T.sum() if head["kind"] != "mean_sqrt_length" else np.sqrt(weights_T.sum())
    assert np.allclose((weights_T[:, None] * states_TD.double().numpy()).sum(0) / scale, whole_D, atol=1e-5)
    for token in range(len(found_T)):
        without_D = sum(weights_T[i] * states_TD[i].double().numpy() for i in range(len(mask_T)) if i != token) / scale
        lost = (whole_D - without_D) @ whole_D / (whole_D @ whole_D)
        assert abs(lost - found_T[token]) < 1e-5


def test_max_pooling_shares_by_dimension(make_encoder):
    encoder = make_encoder(head={"kind": "max"})
    hidden_TD, packed = row_of(encoder, TEXT)
    found_T = shares(encoder.head, hidden_TD, packed).numpy()
    expected_T = np.zeros(len(found_T))
    for dimension in hidden_TD.T:
        expected_T[int(dimension.argmax())] += float(dimension.max()) ** 2
    assert np.allclose(found_T, expected_T / expected_T.sum(), atol=1e-6)


@pytest.mark.parametrize(("kind", "place"), [("cls", 0), ("last_token", -1)])
def test_one_token_has_it_all(make_encoder, kind, place):
    tokens = contributions(make_encoder(head={"kind": kind}), TEXT)
    assert tokens[place].weight == 1
    assert [token.pooled for token in tokens].count(True) == 1
    assert sum(token.weight for token in tokens) == 1


def test_cls_after_the_instruction(make_encoder):
    encoder = make_encoder(head={"kind": "cls", "after_instruction": True})
    tokens = contributions(encoder, TEXT, "Instruct: find it\nQuery:\n")
    first = next(token for token in tokens if token.pooled)
    assert (first.weight, first.start) == (1, 0)


def test_heads_side_by_side_share_by_length(make_encoder):
    encoder = make_encoder(head={"kind": "concat", "parts": ("cls", "last_token")})
    hidden_TD, packed = row_of(encoder, TEXT)
    squares = hidden_TD[0].square().sum(), hidden_TD[-1].square().sum()
    found_T = shares(encoder.head, hidden_TD, packed)
    assert np.allclose(found_T[[0, -1]], [float(s / sum(squares)) for s in squares], atol=1e-6)
    assert pooled(encoder.head, packed).tolist() == [True, *[False] * (len(found_T) - 2), True]


def test_tokens_of_a_text_that_is_cut(make_encoder):
    encoder = make_encoder()
    tokens = contributions(encoder, "cat " * 400)
    assert len(tokens) == encoder.max_length
    assert tokens[-1].text == "</s>"
    assert abs(sum(token.weight for token in tokens) - 1) < 1e-9


@pytest.mark.parametrize("truncation", ["keep_eos", "cut_end"])
@pytest.mark.parametrize("length", [6, 12, None])
def test_offsets_are_one_a_token(make_encoder, truncation, length):
    encoder = make_encoder(tokenizer={"eos_token": "</s>", "truncation": truncation})
    for text in (TEXT, "", "🙂"):
        row = encoder.tokenizer([text], "", length).ids[0]
        assert len(encoder.tokenizer.offsets(text, "", length)) == len(row)


def test_minilm_weights_its_words(minilm_dir):
    import openembed

    tokens = contributions(openembed.load(minilm_dir), "The aurora borealis over Norway")
    assert [tokens[0].text, tokens[-1].text] == ["[CLS]", "[SEP]"]
    weights = {token.text: token.weight for token in tokens}
    assert weights["aurora"] > weights["The"]
    assert abs(sum(token.weight for token in tokens) - 1) < 1e-9
