"""Encoders with a vector a token: sides, skipped tokens, expansion, lengths, clustering, training, saving."""

import numpy as np
import pytest
import torch
from token_models import TEXTS, token_encoder

import openembed
from openembed.heads.token_pooling import ClustersConfig
from openembed.index.encoding import vector_tokens
from openembed.token_vectors import TokenVectors

COLBERT = {
    "head": {"kind": "token_projection", "width": 16, "skip": "punctuation"},
    "tokenizer": {"pool_instruction": "include", "expansion": {"length": 9}, "document_length": 12},
    "prompts": {"query": "[unused0] ", "document": "[unused1] "},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return token_encoder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def colbert(tmp_path_factory):
    return token_encoder(tmp_path_factory.mktemp("colbert"), **COLBERT)


def test_every_token_has_a_vector_of_length_one(plain):
    found = plain.encode(TEXTS)
    assert isinstance(found, TokenVectors)
    assert (plain.kind, plain.sided, found.width) == ("tokens", False, 16)
    assert found.lengths_N.tolist() == [len(row) for row in plain.tokenize(TEXTS).ids]
    np.testing.assert_allclose(np.linalg.norm(found.values_TD, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_batching_and_order_change_no_vector(colbert, budget):
    for encode in (colbert.encode_queries, colbert.encode_documents):
        expected, found = encode(TEXTS), encode(TEXTS[::-1], token_budget=budget)
        for text, matrix in enumerate(expected):
            np.testing.assert_allclose(found[len(TEXTS) - 1 - text], matrix, atol=1e-5)


def test_documents_lose_punctuation_and_keep_special_tokens(colbert):
    rows = colbert.tokenize(TEXTS, colbert.document_prompt(), queries=np.zeros(len(TEXTS), dtype=bool))
    marks = {colbert.tokenizer.backend.token_to_id(mark) for mark in ".,;:!?#[]"}
    found = colbert.encode_documents(TEXTS)
    assert found.lengths_N.tolist() == [sum(i not in marks for i in row) for row in rows.ids]
    assert found.lengths_N[3] == 3  # [CLS], the marker, [SEP]
    assert max(len(row) for row in rows.ids) == 12


def test_a_text_of_skipped_tokens_alone_keeps_them(tmp_path):
    encoder = token_encoder(tmp_path, head={"kind": "token_projection", "skip": ["[CLS]", "[SEP]", ".", "w9"]})
    assert encoder.encode([".", "", "w1 .", "w9 w1"]).lengths_N.tolist() == [3, 2, 1, 1]
    with pytest.raises(ValueError, match="none of the tokens"):
        token_encoder(tmp_path, head={"kind": "token_projection", "skip": ["Ġ."]})


def test_the_token_of_each_vector_is_named_and_placed(colbert, plain):
    found = vector_tokens(colbert, TEXTS, colbert.document_prompt(), None, queries=False)
    assert [len(each) for each in found] == colbert.encode_documents(TEXTS).lengths_N.tolist()
    assert [token.name for token in found[0]] == ["[CLS]", "[unused1]", "w1", "w2", "w3", "[SEP]"]
    for text, tokens in zip(TEXTS, found, strict=True):
        for name, span in tokens:
            assert (span is None) == name.startswith("[")
            assert span is None or text[slice(*span)].lower() == name
    (query,) = vector_tokens(colbert, ["w1, w2"], colbert.query_prompt(), None, queries=True)
    assert [token.name for token in query] == ["[CLS]", "[unused0]", "w1", ",", "w2", "[SEP]", "[MASK]", "[MASK]", "[MASK]"]
    assert [token.span for token in query] == [None, None, (0, 2), (2, 3), (4, 6), None, None, None, None]
    pooled = plain.with_pool(ClustersConfig(queries=0, documents=4))
    found = vector_tokens(pooled, TEXTS, "", None, queries=False)
    assert [each is None for each in found] == [True, True, False, True, True, True]
    assert vector_tokens(object(), ["a", "b"], "", None, queries=False) == [None, None]
    assert vector_tokens(plain, [], "", None, queries=False) == []


def test_queries_are_expanded_and_cut_to_one_length(colbert):
    rows = colbert.tokenize(TEXTS, colbert.query_prompt(), queries=np.ones(len(TEXTS), dtype=bool))
    mask, end = (colbert.tokenizer.backend.token_to_id(name) for name in ("[MASK]", "[SEP]"))
    assert {len(row) for row in rows.ids} == {9}
    assert rows.ids[2].tolist()[2:] == [end, *[mask] * 6]
    assert rows.ids[5][-1] == end
    assert rows.unattended[[2, 5]].tolist() == [6, 0]
    assert colbert.encode_queries(TEXTS).lengths_N.tolist() == [9] * len(TEXTS)


@pytest.mark.parametrize("attend", [False, True])
def test_masks_see_the_query_and_are_seen_only_where_asked(tmp_path, attend):
    short, long = (
        token_encoder(tmp_path, tokenizer={"expansion": {"length": length, "attend": attend}}).encode_queries(["w1 w2"])[0]
        for length in (6, 12)
    )
    same = np.abs(short - long[:6]).max() < 1e-5
    assert same != attend
    alone = token_encoder(tmp_path, tokenizer={"query_length": 12}).encode_queries(["w1 w2"])[0]
    assert (np.abs(long[:4] - alone).max() < 1e-5) != attend
    assert np.abs(long[4] - long[5]).max() > 1e-3  # masks differ by position


def test_expanded_queries_equal_the_models_own_attention_mask(tmp_path):
    encoder = token_encoder(tmp_path, tokenizer={"expansion": {"length": 10}})
    row = encoder.tokenize(["w4 w5 w6"], queries=np.ones(1, dtype=bool)).ids[0]
    model = encoder.backbone.model
    model.config._attn_implementation = "eager"
    ids = torch.tensor(row[None].astype(np.int64))
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=(torch.arange(10) < 5).long()[None]).last_hidden_state[0]
        expected = torch.nn.functional.normalize(encoder.head.layers[0](hidden), dim=-1)
    model.config._attn_implementation = "openembed_packed"
    np.testing.assert_allclose(encoder.encode_queries(["w4 w5 w6"])[0], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("open_masks", [False, True])
def test_a_family_that_cannot_be_packed_expands_queries_alike(tmp_path, open_masks):
    encoder = token_encoder(tmp_path, tokenizer={"expansion": {"length": 10}})
    texts = ["w4 w5 w6", "w1", "w7 w8 w9 w10 w11 w12 w13 w14 w15"]
    expected = encoder.encode_queries(texts)
    encoder.backbone.stop_packing(open_masks=open_masks)
    encoder.backbone.fused = None
    np.testing.assert_allclose(encoder.encode_queries(texts).values_TD, expected.values_TD, atol=1e-5)


def test_pools_share_the_weights_of_the_encoder_they_are_of(plain):
    pooled = plain.with_pool(ClustersConfig(queries=2, documents=2))
    assert pooled.sided is False
    assert pooled.encode(TEXTS).lengths_N.tolist() == [2] * len(TEXTS)
    assert pooled.fingerprint != plain.fingerprint
    assert pooled.with_pool(None).fingerprint == plain.fingerprint
    assert pooled.head.layers[0].linear.weight.data_ptr() == plain.head.layers[0].linear.weight.data_ptr()


def test_only_token_encoders_have_pools(make_encoder):
    with pytest.raises(ValueError, match="vectors a token"):
        make_encoder().with_pool(ClustersConfig())


def test_lengths_of_their_own(tmp_path):
    encoder = token_encoder(tmp_path, tokenizer={"query_length": 5, "document_length": 7})
    assert encoder.encode_queries([TEXTS[1]]).lengths_N.tolist() == [5]
    assert encoder.encode_documents([TEXTS[1]]).lengths_N.tolist() == [7]
    assert encoder.encode_documents([TEXTS[1]], max_length=6).lengths_N.tolist() == [6]


@pytest.mark.parametrize(
    "pool", [None, {"kind": "clusters", "queries": 2, "documents": 0.4}, {"kind": "spacing", "documents": 3}]
)
def test_saved_and_loaded_is_the_same(tmp_path, pool):
    encoder = token_encoder(tmp_path / "tokenizer", **{**COLBERT, "head": {**COLBERT["head"], "pool": pool}})
    encoder.save(tmp_path / "model")
    again = openembed.load(tmp_path / "model")
    for side in ("encode_queries", "encode_documents"):
        expected, found = getattr(encoder, side)(TEXTS), getattr(again, side)(TEXTS)
        np.testing.assert_array_equal(found.offsets_N1, expected.offsets_N1)
        np.testing.assert_array_equal(found.values_TD, expected.values_TD)
    assert again.fingerprint == encoder.fingerprint


def test_projections_after_the_head_are_refused(tmp_path):
    with pytest.raises(ValueError, match="before"):
        token_encoder(tmp_path, projections=[{"width": 8}])


def test_dense_options_are_refused(plain):
    with pytest.raises(ValueError, match="tokens"):
        plain.encode(["w1"], dimensions=8)
