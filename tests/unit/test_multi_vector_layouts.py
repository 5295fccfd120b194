"""Models with a vector a token written as PyLate and Stanford's ColBERT write them: the same vectors, or a refusal."""

import json
import string

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import tiny_encoder
from token_models import TEXTS, token_encoder, write_tokenizer
from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from typer.testing import CliRunner

import openembed
from openembed.backbones.adapters import LoraConfig, add_lora
from openembed.checkpoints.markers import spaced
from openembed.cli import app
from openembed.tokenization import TextTokenizer, TokenizerConfig

MARKED = {"query": "[unused0] ", "document": "[unused1] "}
PUNCTUATION = {"kind": "token_projection", "width": 16, "skip": "punctuation"}
EXPANDED = {"pool_instruction": "include", "expansion": {"length": 9}}
LAYER = {"width": 24, "bias": True, "activation": "gelu", "residual": True}
COLBERT = {"head": PUNCTUATION, "tokenizer": EXPANDED, "prompts": MARKED}


def made(folder, **fields):
    """A tiny encoder whose vocabulary has every punctuation mark, as BERT's has."""
    write_tokenizer(folder / "words", punctuation=string.punctuation)
    return token_encoder(folder / "tokenizer", tokenizer_path=str(folder / "words"), **fields)


def alike(ours, other, texts=TEXTS):
    for encode in ("encode_queries", "encode_documents"):
        found, expected = getattr(other, encode)(texts), getattr(ours, encode)(texts)
        assert found.lengths_N.tolist() == expected.lengths_N.tolist()
        np.testing.assert_allclose(found.values_TD, expected.values_TD, atol=1e-5)


def read(path):
    return json.loads(path.read_text())


CASES = {
    "plain": {},
    "colbert": COLBERT,
    "attending": {
        **COLBERT,
        "tokenizer": {**EXPANDED, "expansion": {"length": 12, "attend": True}, "document_length": 10},
    },
    "layers": {
        "head": {**PUNCTUATION, "bias": True, "before": [LAYER, {**LAYER, "residual": False, "activation": "tanh"}]},
        "tokenizer": {"pool_instruction": "include", "query_length": 6, "document_length": 11, "lowercase": True},
        "prompts": {"document": "[unused1] "},
    },
    "own-words": {"head": {**PUNCTUATION, "skip": ["w3", ","]}, "prompts": MARKED, "tokenizer": EXPANDED},
    "no-layer": {"head": {"kind": "token_projection", "width": 0}, "tokenizer": {}},
}


@pytest.mark.parametrize("case", CASES)
def test_pylate_round_trip(tmp_path, case):
    ours = made(tmp_path, **CASES[case])
    ours.save(tmp_path / "out", layout="pylate")
    again = openembed.load(tmp_path / "out")
    alike(ours, again)
    again.save(tmp_path / "own")
    alike(ours, openembed.load(tmp_path / "own"))
    again.save(tmp_path / "again", layout="pylate")
    for name in ("config_sentence_transformers.json", "modules.json", "sentence_bert_config.json", "tokenizer_config.json"):
        assert read(tmp_path / "again" / name) == read(tmp_path / "out" / name)


@pytest.mark.parametrize("head", [PUNCTUATION, {**PUNCTUATION, "width": 0}], ids=["projected", "no-layer"])
@pytest.mark.parametrize("attend", [False, True], ids=["hidden", "attending"])
def test_colbert_round_trip(tmp_path, attend, head):
    lengths = {"expansion": {"length": 9, "attend": attend}, "document_length": 12}
    ours = made(tmp_path, **{**COLBERT, "head": head, "tokenizer": {**EXPANDED, **lengths}})
    ours.save(tmp_path / "out", layout="colbert")
    again = openembed.load(tmp_path / "out")
    alike(ours, again)
    again.save(tmp_path / "pylate", layout="pylate")
    alike(ours, openembed.load(tmp_path / "pylate"))
    again.save(tmp_path / "again", layout="colbert")
    for name in ("config.json", "tokenizer_config.json"):
        assert read(tmp_path / "again" / name) == read(tmp_path / "out" / name)


def test_pylate_files_say_what_pylate_reads(tmp_path):
    made(tmp_path, **CASES["attending"]).save(tmp_path / "out", layout="pylate")
    settings = read(tmp_path / "out" / "config_sentence_transformers.json")
    assert settings == {
        "model_type": "ColBERT",
        "similarity_fn_name": "MaxSim",
        "prompts": {},
        "default_prompt_name": None,
        "query_prefix": "[unused0]",
        "document_prefix": "[unused1]",
        "query_length": 12,
        "document_length": 10,
        "do_query_expansion": True,
        "attend_to_expansion_tokens": True,
        "skiplist_words": list(string.punctuation),
    }
    types = [row["type"] for row in read(tmp_path / "out" / "modules.json")]
    assert types == ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]
    dense = {"in_features": 32, "out_features": 16, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    assert read(tmp_path / "out" / "1_Dense" / "config.json") == dense
    assert read(tmp_path / "out" / "tokenizer_config.json")["mask_token"] == "[MASK]"


def test_colbert_files_say_what_stanfords_code_reads(tmp_path):
    ours = made(tmp_path, **COLBERT)
    ours.save(tmp_path / "out", layout="colbert")
    assert read(tmp_path / "out" / "config.json")["architectures"] == ["HF_ColBERT"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {"bert", "linear"}
    torch.testing.assert_close(tensors["linear.weight"], ours.head.layers[0].linear.weight.data)
    metadata = read(tmp_path / "out" / "artifact.metadata")
    assert metadata == {
        "checkpoint": "out",
        "dim": 16,
        "query_maxlen": 9,
        "doc_maxlen": 48,
        "mask_punctuation": True,
        "attend_to_mask_tokens": False,
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_token": "[Q]",
        "doc_token": "[D]",
        "similarity": "cosine",
        "interaction": "colbert",
    }
    settings = read(tmp_path / "out" / "tokenizer_config.json")
    names = [settings[f"{name}_token"] for name in ("mask", "pad", "cls", "sep")]
    assert names == ["[MASK]", "[PAD]", "[CLS]", "[SEP]"]
    assert not (tmp_path / "out" / "modules.json").exists()


@pytest.mark.parametrize(("family", "prefix"), [("xlm-roberta", "roberta"), ("modernbert", "model"), ("electra", "electra")])
def test_other_families_keep_their_prefix(tmp_path, family, prefix):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 240}
    own = {"embedding_size": 32} if family == "electra" else {}
    architecture = {"model_type": family, **shape, **own, "max_position_embeddings": 66, "pad_token_id": 0}
    architecture |= {f"{name}_token_id": i for i, name in ((2, "cls"), (3, "sep"), (2, "bos"), (3, "eos"))}
    ours = made(tmp_path, **COLBERT, backbone={"architecture": architecture, "attention": "model"})
    for layout in ("pylate", "colbert"):
        ours.save(tmp_path / layout, layout=layout)
        alike(ours, openembed.load(tmp_path / layout))
    names = {name.partition(".")[0] for name in load_file(tmp_path / "colbert" / "model.safetensors")}
    assert names == {prefix, "linear"}


NOT_IN_EITHER = {
    "head.pool": {"head": {**PUNCTUATION, "pool": {"kind": "tail"}}},
    "head.normalize": {"head": {**PUNCTUATION, "normalize": False}},
    "head.skip_queries": {"head": {**PUNCTUATION, "skip_queries": True}},
    "head.skip lists": {"head": {**PUNCTUATION, "skip": ["[CLS]", "[SEP]", "[unused1]", "."]}},
    "tokenizer.truncation": {"tokenizer": {**EXPANDED, "truncation": "cut_end"}},
    "tokenizer.repeat": {"tokenizer": {"repeat": " again: "}, "prompts": {}},
    "tokenizer.expansion.cut": {"tokenizer": {**EXPANDED, "expansion": {"length": 9, "cut": False}}},
    "tokenizer.expansion.token": {"tokenizer": {**EXPANDED, "expansion": {"length": 9, "token": "w7"}}},
    "tokenizer.pool_instruction": {"tokenizer": {"expansion": {"length": 9}}},
    "prompts.tasks": {"prompts": {**MARKED, "tasks": {"duplicates": {"query": "find duplicates"}}}},
    "prompts.named": {"prompts": {**MARKED, "named": {"query": "[unused0] ", "claim": "claim: "}}},
    "prompts.template": {"prompts": {**MARKED, "template": "{task} | query: "}},
    "prompts.query": {"prompts": {**MARKED, "query": "[unused0] q w3"}},
    "backbone.attention": {"backbone": "causal"},
}
NOT_IN_COLBERT = {
    "head.before": {"head": {**PUNCTUATION, "before": [LAYER]}},
    "head.bias": {"head": {**PUNCTUATION, "bias": True}},
    "head.skip": {"head": {**PUNCTUATION, "skip": ()}},
    "tokenizer.lowercase": {"tokenizer": {**EXPANDED, "lowercase": True}},
    "tokenizer.expansion": {"tokenizer": {"pool_instruction": "include"}},
    "prompts.document": {"prompts": {"query": "[unused0] "}},
}
REFUSED = [(layout, name, fields) for layout in ("pylate", "colbert") for name, fields in NOT_IN_EITHER.items()]
REFUSED += [("colbert", name, fields) for name, fields in NOT_IN_COLBERT.items()]


@pytest.mark.parametrize(("layout", "setting", "fields"), REFUSED, ids=[f"{layout}-{name}" for layout, name, _ in REFUSED])
def test_what_a_layout_cannot_say_is_named(tmp_path, layout, setting, fields):
    if "backbone" in fields:
        config = made(tmp_path / "first").config.backbone.architecture
        fields = {"backbone": {"architecture": config, "attention": fields["backbone"]}}
    ours = made(tmp_path, **{**COLBERT, **fields})
    with pytest.raises(ValueError, match=rf"cannot say .*{setting}"):
        ours.save(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_only_what_differs_is_refused(tmp_path):
    """Settings that look foreign and change nothing in this model: no end token to cut, no query longer than is filled up."""
    kept = {**EXPANDED, "expansion": {"length": 9, "cut": False}, "query_length": 9}
    ours = made(tmp_path, **{**COLBERT, "tokenizer": kept})
    ours.save(tmp_path / "out", layout="colbert")
    alike(ours, openembed.load(tmp_path / "out"))


def test_punctuation_that_the_vocabulary_lacks_is_not_colberts(tmp_path):
    """Its code would skip [UNK] then: the token that it reads such a mark as."""
    ours = token_encoder(tmp_path / "tokenizer", **COLBERT)
    with pytest.raises(ValueError, match="which here are 10 tokens, 9 of them"):
        ours.save(tmp_path / "out", layout="colbert")
    ours.save(tmp_path / "out", layout="pylate")
    alike(ours, openembed.load(tmp_path / "out"))


def test_a_padding_token_is_none_that_texts_hold(tmp_path):
    write_tokenizer(tmp_path / "words", punctuation=string.punctuation)
    path = tmp_path / "words" / "tokenizer.json"
    tokenizer = read(path)
    kept = [row for row in tokenizer["added_tokens"] if row["content"] not in ("[PAD]", "[UNK]")]
    path.write_text(json.dumps({**tokenizer, "added_tokens": kept}))
    ours = token_encoder(tmp_path / "tokenizer", tokenizer_path=str(tmp_path / "words"), **COLBERT)
    with pytest.raises(ValueError, match="no special token left for padding"):
        ours.save(tmp_path / "out", layout="colbert")


def test_named_prompts_are_pylates_alone(tmp_path):
    ours = made(tmp_path, **COLBERT)
    for layout, why in (("openembed", "keeps every prompt"), ("colbert", "ColBERT has no prompts of text")):
        with pytest.raises(ValueError, match=f"named_prompts is for layout 'pylate'; .*{why}, leave it out"):
            ours.save(tmp_path / "out", layout=layout, named_prompts=True)
        assert not (tmp_path / "out").exists()
    ours.save(tmp_path / "out", layout="pylate", named_prompts=True)


def test_prompts_of_text_go_to_pylate_by_name(tmp_path):
    ours = made(tmp_path, **{**COLBERT, "prompts": {"query": "[unused0] q w3 ", "document": "d, "}})
    with pytest.raises(ValueError, match=r"prompts.query = .* --named-prompts"):
        ours.save(tmp_path / "out", layout="pylate")
    ours.save(tmp_path / "out", layout="pylate", named_prompts=True)
    settings = read(tmp_path / "out" / "config_sentence_transformers.json")
    assert settings["prompts"] == {"query": "q w3 ", "document": "d, "}
    assert (settings["query_prefix"], settings["document_prefix"]) == ("[unused0]", "")
    alike(ours, openembed.load(tmp_path / "out"))


def test_other_kinds_adapters_and_full_folders(tmp_path):
    with pytest.raises(ValueError, match="this model's kind is dense"):
        tiny_encoder(tmp_path / "dense").save(tmp_path / "out", layout="pylate")
    ours = made(tmp_path, **COLBERT)
    with pytest.raises(ValueError, match="layout 'onnx' is not known; use openembed, pylate, colbert, opensearch or splade"):
        ours.save(tmp_path / "out", layout="onnx")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="give a new folder"):
        ours.save(tmp_path / "full", layout="colbert")
    assert (tmp_path / "full" / "notes").read_text() == "mine"
    add_lora(ours.backbone.model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="merge them before saving"):
        ours.save(tmp_path / "out", layout="colbert")


def test_the_command_converts_and_says_no(tmp_path):
    ours = made(tmp_path, **COLBERT)
    ours.save(tmp_path / "own")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "own"), str(tmp_path / "pylate"), "--to", "pylate", "--json"])
    out = str(tmp_path / "pylate")
    assert json.loads(done.stdout) == {"model": str(tmp_path / "own"), "out": out, "layout": "pylate", "kind": "tokens"}
    done = CliRunner().invoke(app, ["convert", out, str(tmp_path / "colbert"), "--to", "colbert"])
    assert "in the layout of colbert" in done.stdout
    assert CliRunner().invoke(app, ["convert", str(tmp_path / "colbert"), str(tmp_path / "back")]).exit_code == 0
    alike(ours, openembed.load(tmp_path / "back"))
    refused = CliRunner().invoke(app, ["convert", out, str(tmp_path / "onnx"), "--to", "onnx"])
    assert "layout 'onnx' is not known" in str(refused.exception)


@pytest.mark.parametrize(
    ("split", "prompt", "expected"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "[unused0] ", "[unused0]"),
        (pre_tokenizers.Metaspace(prepend_scheme="first"), "[unused0]", "[unused0] "),
        (pre_tokenizers.Metaspace(prepend_scheme="first"), "[Q] ", "[Q]  "),
        (pre_tokenizers.BertPreTokenizer(), "[unused0] ", "[unused0] "),
        (pre_tokenizers.BertPreTokenizer(), "no marker ", "no marker "),
    ],
)
def test_text_behind_a_marker_is_read_as_alone(split, prompt, expected):
    """Byte-level tokenizers make a space part of the word; those that begin words with a mark want one."""
    pieces = [
        space + word
        for word in ("word", "Word", "two", "words", "led", "by", "a", "space")
        for space in ("", "\u0120", "\u2581")
    ]
    vocabulary = {piece: number for number, piece in enumerate(["[UNK]", "[unused0]", "[Q] ", *pieces])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = split
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("[unused0]", "[Q] ")])
    assert spaced(TextTokenizer(backend, TokenizerConfig()), prompt) == expected
