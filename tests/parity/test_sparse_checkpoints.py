"""Sparse checkpoints both ways: sentence-transformers' open here, ours open there, with the same weights."""

import json

import numpy as np
import pytest
import torch
from vocabulary import SENTENCES, bert, word_pieces

import openembed

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

TEXTS = [*SENTENCES, "", "wine? " * 40, "zzz judo 7"]
DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MASKED = {
    "bert": {},
    "roberta": {"pad_token_id": 0},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "modernbert": {"pad_token_id": 0, "cls_token_id": 3, "sep_token_id": 4, "bos_token_id": 3, "eos_token_id": 4},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
}
CAUSAL = {"llama": True, "qwen3": False}


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A function that writes a random language model of a family and returns its folder."""
    backend = word_pieces()
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=64, **names)

    def make(family, *, tied=True):
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        if family in CAUSAL:
            sizes = {**DECODER, "vocab_size": backend.get_vocab_size(), "head_dim": 16, "tie_word_embeddings": tied}
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
        else:
            sizes = {**bert(backend), "vocab_size": backend.get_vocab_size(), "max_position_embeddings": 70, **MASKED[family]}
            sizes.pop("model_type")
            if family == "distilbert":
                sizes = {name: value for name, value in sizes.items() if name not in ("hidden_size", "num_hidden_layers")}
                sizes.pop("num_attention_heads")
            model = transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(family, **sizes))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def modules(folder, activation="relu", pooling="max"):
    from sentence_transformers.sparse_encoder.modules import SpladePooling, Transformer

    return [Transformer(str(folder), transformer_task="fill-mask"), SpladePooling(pooling, activation_function=activation)]


def opened_there(folder):
    return st.SparseEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def assert_same(encoder, there):
    for ours, theirs in ((encoder.encode_queries, there.encode_query), (encoder.encode_documents, there.encode_document)):
        expected = theirs(TEXTS, show_progress_bar=False).to_dense().numpy()
        assert (expected > 0).any()
        np.testing.assert_allclose(ours(TEXTS).toarray(), expected, atol=1e-5, rtol=1e-5)


def assert_saves(encoder, folder):
    encoder.save(folder)
    assert_same(encoder, opened_there(folder))
    again = openembed.load(folder)
    assert again.fingerprint == encoder.fingerprint
    assert abs(again.encode_documents(TEXTS) - encoder.encode_documents(TEXTS)).max() == 0


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "modernbert"])
def test_splade_both_ways(language_model, tmp_path, family):
    activation = "log1p_relu" if family == "distilbert" else "relu"
    there = st.SparseEncoder(modules=modules(language_model(family), activation), device="cpu")
    there.save(str(tmp_path / "there"))
    encoder = openembed.load(tmp_path / "there")
    assert encoder.config.head.activation == ("log1p_log1p_relu" if family == "distilbert" else "log1p_relu")
    assert_same(encoder, there)
    assert_saves(encoder, tmp_path / "ours")


def test_sum_pooling(language_model, tmp_path):
    there = st.SparseEncoder(modules=modules(language_model("bert"), pooling="sum"), device="cpu")
    there.save(str(tmp_path / "there"))
    encoder = openembed.load(tmp_path / "there")
    assert encoder.config.head.pooling == "sum"
    assert_same(encoder, there)
    assert_saves(encoder, tmp_path / "ours")


def with_query_table(folder, path, *, frozen=True):
    """Their model whose queries are looked up, saved to ``path``."""
    from sentence_transformers.sparse_encoder.modules import Router, SparseStaticEmbedding

    body, pooling = modules(folder)
    weight = torch.rand(len(body.tokenizer.get_vocab()))
    table = SparseStaticEmbedding(tokenizer=body.tokenizer, weight=weight, frozen=frozen)
    router = Router.for_query_document(query_modules=[table], document_modules=[body, pooling])
    there = st.SparseEncoder(modules=[router], similarity_fn_name="dot", device="cpu")
    there.save(str(path))
    return path, there


@pytest.mark.parametrize("frozen", [True, False])
def test_router_with_a_query_table_both_ways(language_model, tmp_path, frozen):
    path, there = with_query_table(language_model("bert"), tmp_path / "there", frozen=frozen)
    encoder = openembed.load(path)
    assert encoder.query_head.config.trainable != frozen
    assert_same(encoder, there)
    assert_saves(encoder, tmp_path / "ours")


def test_a_long_query_is_cut_there_where_it_is_cut_here(language_model, tmp_path):
    encoder = openembed.load(with_query_table(language_model("bert"), tmp_path / "there")[0])
    encoder.config = encoder.config.model_copy(update={"max_length": 9})
    encoder.save(tmp_path / "ours")
    long = [" ".join(dict.fromkeys(" ".join(SENTENCES).lower().split()))]
    query = encoder.encode_queries(long)
    assert query.nnz <= 7 < encoder.encode_queries(long, max_length=60).nnz
    expected = opened_there(tmp_path / "ours").encode_query(long, show_progress_bar=False).to_dense().numpy()
    np.testing.assert_allclose(query.toarray(), expected, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(MASKED))
def test_a_plain_masked_model_becomes_a_sparse_encoder_with_its_own_head(language_model, tmp_path, family, caplog):
    folder = language_model(family)
    with caplog.at_level("INFO"):
        encoder = openembed.load(folder, head={"kind": "splade", "exclude_special": False})
    assert "the checkpoint's own language model head" in caplog.text
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = encoder.tokenize(TEXTS[:1]).ids[0]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
    expected = torch.log1p(torch.relu(logits.amax(0))).numpy()
    np.testing.assert_allclose(encoder.encode_documents(TEXTS[:1]).toarray()[0], expected, atol=1e-5)
    sparing = openembed.load(folder, head={"kind": "splade", "activation": "log1p_log1p_relu"})
    assert_saves(sparing, tmp_path / "ours")  # special tokens have no weight there either


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen3", True), ("qwen3", False)])
def test_decoders_with_tied_and_untied_heads(language_model, tmp_path, family, tied):
    folder = language_model(family, tied=tied)
    encoder = openembed.load(folder, head={"kind": "splade", "exclude_special": not tied})
    assert encoder.config.head.tied == tied
    assert_saves(encoder, tmp_path / "ours")


def test_an_untied_decoder_may_use_its_embeddings(language_model):
    encoder = openembed.load(language_model("llama", tied=False), head={"kind": "splade", "tied": True})
    assert encoder.head.output_VD is encoder.backbone.model.get_input_embeddings().weight


def test_what_cannot_be_said_there_is_not_written(language_model, tmp_path, caplog):
    encoder = openembed.load(language_model("bert"), head={"kind": "splade", "activation": "elu1p"})
    with caplog.at_level("INFO"):
        encoder.save(tmp_path / "ours")
    assert "no activation elu1p" in caplog.text
    assert not (tmp_path / "ours/modules.json").exists()
    assert abs(openembed.load(tmp_path / "ours").encode_documents(TEXTS) - encoder.encode_documents(TEXTS)).max() == 0


def test_open_search_layout(language_model, tmp_path):
    folder = language_model("bert")
    vocabulary = word_pieces().get_vocab()
    idf = {token: 0.5 + number / 100 for token, number in vocabulary.items() if token != "wine"}
    (folder / "idf.json").write_text(json.dumps(idf))
    encoder = openembed.load(folder)
    row = encoder.encode_queries(["the wine the"])
    assert dict(zip(row.indices.tolist(), row.data.tolist(), strict=True)) == {
        vocabulary["the"]: pytest.approx(idf["the"]),
        vocabulary["wine"]: 1.0,
    }
    assert_saves(encoder, tmp_path / "ours")
    (folder / "idf.json").write_text('{"nonsense-token": 1.0}')
    with pytest.raises(ValueError, match="'nonsense-token' is not in the tokenizer's vocabulary"):
        openembed.load(folder)


def test_old_names_of_norms_are_found(language_model):
    from safetensors.torch import load_file, save_file

    folder = language_model("bert")
    before = openembed.load(folder, head={"kind": "splade"}).encode_documents(TEXTS)
    tensors = load_file(folder / "model.safetensors")
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        for name in [name for name in tensors if name.endswith(new)]:
            tensors[name.replace(new, old)] = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert abs(openembed.load(folder, head={"kind": "splade"}).encode_documents(TEXTS) - before).max() == 0


def test_unknown_modules_are_named(language_model, tmp_path):
    there = st.SparseEncoder(modules=modules(language_model("bert")), device="cpu")
    there.save(str(tmp_path / "there"))
    rows = json.loads((tmp_path / "there/modules.json").read_text())
    rows[1]["type"] = "sentence_transformers.sparse_encoder.modules.SparseAutoEncoder"
    (tmp_path / "there/modules.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="SparseAutoEncoder are not supported"):
        openembed.load(tmp_path / "there")


def test_a_checkpoint_without_a_language_models_head_starts_anew(language_model, tmp_path, caplog):
    transformers.AutoModel.from_pretrained(language_model("bert")).save_pretrained(tmp_path / "base")
    word_pieces().save(str(tmp_path / "base/tokenizer.json"))
    with caplog.at_level("WARNING"):
        openembed.load(tmp_path / "base", head={"kind": "splade"})
    assert "newly initialised" in caplog.text
