"""Both ways: what sentence-transformers saves opens here, what openembed saves opens there, with the same vectors."""

import json

import numpy as np
import pytest
import torch
from samples import TEXTS

import openembed

st = pytest.importorskip("sentence_transformers")

INSTRUCTION = "Given a question, retrieve passages that answer the question"
TEXTS_THERE = [text for text in TEXTS if text]


def open_there(folder, *, remote):
    return st.SentenceTransformer(str(folder), device="cpu", trust_remote_code=remote, model_kwargs={"dtype": torch.float32})


def assert_same(encoder, there, texts=TEXTS_THERE):
    prompt = encoder.query_prompt(instruction=INSTRUCTION)
    np.testing.assert_allclose(there.encode(texts), encoder.encode(texts), atol=1e-5)
    np.testing.assert_allclose(there.encode(texts, prompt=prompt), encoder.encode(texts, instruction=prompt), atol=1e-5)


@pytest.mark.parametrize(
    "head", ["mean", "weighted_mean", "last_token", "cls", "max", "mean_sqrt_length"], ids=lambda kind: kind
)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_standard_heads_need_no_remote_code(make_encoder, tmp_path, head, attention):
    encoder = make_encoder(head={"kind": head}, attention=attention)
    encoder.save(tmp_path / "model")
    assert_same(encoder, open_there(tmp_path / "model", remote=False))


@pytest.mark.parametrize(
    "parts",
    [
        {"head": {"kind": "self_attention", "heads": 4}, "prompts": {"template": "</s>{task}</s>"}},
        {"head": {"kind": "latent_attention", "latents": 6, "heads": 2}},
        {"head": {"kind": "latent_attention", "latents": 6, "heads": 2, "variant": "paper"}},
        {"head": {"kind": "self_attention", "heads": 4}},
        {"head": {"kind": "mean"}, "prompts": {"template": "Instruct: {task}\nQuery: "}},
        {"head": {"kind": "latent_attention", "latents": 6, "heads": 2}, "attention": "causal"},
        {"head": {"kind": "mean"}, "tokenizer": {"eos_token": "</s>", "truncation": "cut_end"}},
        {"head": {"kind": "self_attention", "heads": 4}, "projections": [{"width": 12, "activation": "tanh"}]},
        {"head": {"kind": "self_attention", "heads": 4}, "attention": "model"},
        {"head": {"kind": "concat", "parts": ["cls", "mean"]}},
        {"head": {"kind": "cls", "after_instruction": True}, "tokenizer": {"eos_token": "</s>", "truncation": "cut_end"}},
    ],
    ids=[
        "special-prompt",
        "latent",
        "paper",
        "self",
        "merging-template",
        "latent-causal",
        "cut-end",
        "projection",
        "own-mask",
        "cls-and-mean",
        "cls-after",
    ],
)
def test_other_encoders_travel_with_their_module(make_encoder, tmp_path, parts):
    encoder = make_encoder(**parts)
    encoder.save(tmp_path / "model")
    there = open_there(tmp_path / "model", remote=True)
    assert_same(encoder, there, TEXTS)
    there.save(str(tmp_path / "again"))
    assert_same(encoder, open_there(tmp_path / "again", remote=True), TEXTS)


def test_the_module_saves_over_itself_with_its_present_length(make_encoder, tmp_path):
    encoder = make_encoder(head={"kind": "self_attention", "heads": 4})
    encoder.save(tmp_path / "model")
    there = open_there(tmp_path / "model", remote=True)
    there.max_seq_length = 9
    expected = there.encode(TEXTS)
    there.save(str(tmp_path / "model"))
    again = openembed.load(tmp_path / "model")
    assert again.config.max_length == 9
    np.testing.assert_allclose(again.encode(TEXTS), expected, atol=1e-5)
    np.testing.assert_allclose(open_there(tmp_path / "model", remote=True).encode(TEXTS), expected, atol=1e-5)


def test_projections_travel_as_dense_modules(make_encoder, tmp_path):
    encoder = make_encoder(projections=[{"width": 12, "activation": "tanh"}, {"width": 5, "bias": False}])
    assert encoder.encode(["a"]).shape == (1, 5)
    encoder.save(tmp_path / "model")
    assert_same(encoder, open_there(tmp_path / "model", remote=False))


def test_published_layout_saved_for_sentence_transformers(golden_dir, tmp_path):
    encoder = openembed.load(golden_dir)
    encoder.save(tmp_path / "model")
    there = open_there(tmp_path / "model", remote=True)
    for case in json.loads((golden_dir / "expected.json").read_text()):
        there.max_seq_length = case["max_length"]
        values = there.encode(case["prompts"], prompt=case["instruction"] or None)
        np.testing.assert_allclose(values, case["embeddings"], atol=1e-5, err_msg=case["name"])


def test_minilm_gives_the_same_vectors(minilm_dir):
    encoder, there = openembed.load(minilm_dir), open_there(minilm_dir, remote=False)
    texts = [*TEXTS, "long " * 400]
    np.testing.assert_allclose(encoder.encode(texts), there.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    "modes", ["mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens", ("cls", "mean")], ids=str
)
def test_their_checkpoints_open_here(make_encoder, tmp_path, modes):
    from sentence_transformers.sentence_transformer import modules

    make_encoder().save(tmp_path / "body")
    transformer = modules.Transformer(str(tmp_path / "body"), model_kwargs={"dtype": torch.float32})
    width = transformer.get_embedding_dimension()
    pooling = modules.Pooling(width, modes)
    dense = modules.Dense(pooling.pooling_output_dimension, 6)
    model = st.SentenceTransformer(
        modules=[transformer, pooling, dense, modules.Normalize()], prompts={"query": "ask: ", "document": "text: "}
    )
    model.max_seq_length = 20
    model.save(str(tmp_path / "theirs"))
    encoder = openembed.load(tmp_path / "theirs")
    assert encoder.config.max_length == 20
    np.testing.assert_allclose(encoder.encode(TEXTS_THERE), model.encode(TEXTS_THERE), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_queries(TEXTS_THERE), model.encode_query(TEXTS_THERE), atol=1e-5)
    np.testing.assert_allclose(encoder.encode_documents(TEXTS_THERE), model.encode_document(TEXTS_THERE), atol=1e-5)


@pytest.mark.parametrize(
    ("prompt", "mode"),
    [("Represent this: ", "mean"), ("<s>ask: ", "mean"), ("ask</s>", "max"), ("ask: ", "cls"), ("ask: ", "lasttoken")],
)
def test_prompts_left_out_of_pooling_as_there(make_encoder, tmp_path, prompt, mode):
    from sentence_transformers.sentence_transformer import modules

    make_encoder().save(tmp_path / "body")
    transformer = modules.Transformer(str(tmp_path / "body"), model_kwargs={"dtype": torch.float32})
    pooling = modules.Pooling(transformer.get_embedding_dimension(), mode, include_prompt=False)
    model = st.SentenceTransformer(modules=[transformer, pooling], prompts={"query": prompt})
    model.save(str(tmp_path / "theirs"))
    encoder = openembed.load(tmp_path / "theirs")
    texts = ["are judo throws allowed", "Mars is a planet"]
    there = model.encode_query(texts, normalize_embeddings=True)
    np.testing.assert_allclose(encoder.encode_queries(texts), there, atol=1e-5)
    encoder.save(tmp_path / "ours")
    again = open_there(tmp_path / "ours", remote=False).encode_query(texts)
    np.testing.assert_allclose(again, there, atol=1e-5)


def test_an_unknown_module_is_named(minilm_dir, tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "custom.Thing"}]))
    with pytest.raises(ValueError, match=r"module custom\.Thing is not supported"):
        openembed.load(tmp_path)
