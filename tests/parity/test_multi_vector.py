"""Models with a vector a token, in the layouts of sentence-transformers, PyLate and ColBERT: the same vectors, either way."""

import json
import string

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from token_models import TEXTS, token_encoder, write_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import openembed
from openembed.encoder import EncoderConfig

st = pytest.importorskip("sentence_transformers", minversion="6.0")
MARKED = {"query": "[unused0] ", "document": "[unused1] "}
FIXED = {"strategy": "fixed", "attend": False, "length": 9}


BYTE_MODEL = {
    "model_type": "mistral",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "initializer_range": 0.2,
}


def byte_level(folder):
    """A byte-level BPE tokenizer that has words with the space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" word word query: query:\nword one two apples"] * 8, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))


def agree(ours, theirs, texts=TEXTS):
    for side, other in (("encode_queries", "encode_query"), ("encode_documents", "encode_document")):
        found, expected = getattr(ours, side)(texts), getattr(theirs, other)(texts)
        assert found.lengths_N.tolist() == [len(matrix) for matrix in expected]
        for mine, matrix in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, matrix, atol=1e-5)


def backbone_folder(folder, *, markers=True):
    """A plain BERT with its tokenizer, in transformers' files."""
    from transformers import PreTrainedTokenizerFast

    encoder = token_encoder(folder / "made")
    model = encoder.backbone.model
    model.config._attn_implementation = "eager"
    model.save_pretrained(folder / "bert")
    write_tokenizer(folder / "tokenizer", markers=markers)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("mask", "pad", "cls", "sep", "unk")}
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), **names).save_pretrained(
        folder / "bert"
    )
    return folder / "bert"


def theirs(folder, *, layers=((32, 16),), skip=(), tasks=("document",), normalize=True, prompts=None, **transformer):
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask

    torch.manual_seed(1)
    tokens = {"module_input_name": "token_embeddings"}
    modules = [Transformer(str(backbone_folder(folder)), **transformer)]
    for number, (before, after) in enumerate(layers):
        activation = torch.nn.Identity() if number == len(layers) - 1 else torch.nn.GELU()
        modules.append(Dense(before, after, bias=number > 0, activation_function=activation, **tokens))
    modules.append(MultiVectorMask(skiplist_words=list(skip), skiplist_tasks=list(tasks)))
    modules += [Normalize(**tokens)] if normalize else []
    model = st.MultiVectorEncoder(modules=modules, prompts=prompts, device="cpu")
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"query_expansion": FIXED, "document_length": 12, "skip": string.punctuation, "prompts": MARKED},
        {"query_expansion": {**FIXED, "attend": True}, "skip": [",", "w3", "nowhere"], "prompts": {"query": "q: "}},
        {"query_expansion": {**FIXED, "strategy": "min", "token": "w7"}, "query_length": 11},
        {"layers": ((32, 24), (24, 8)), "tasks": ("query", "document"), "skip": ["w1", "."], "query_length": 6},
        {"layers": (), "normalize": False},
    ],
    ids=["plain", "colbert", "attending", "at-least", "two-layers", "no-layer"],
)
def test_theirs_opens_here_and_ours_there(tmp_path, settings):
    expected = theirs(tmp_path, **settings)
    texts = [text for text in TEXTS if text != "! . ,"]  # all skipped without special tokens to stay: see below
    ours = openembed.load(tmp_path / "model")
    agree(ours, expected, texts)
    ours.save(tmp_path / "ours")
    agree(openembed.load(tmp_path / "ours"), expected, texts)
    agree(ours, st.MultiVectorEncoder(str(tmp_path / "ours"), device="cpu"), texts)


@pytest.mark.parametrize(
    "pool",
    [
        {"kind": "clusters", "queries": 2, "documents": 0.4},
        {"kind": "clusters", "queries": 0, "documents": 3, "renormalize": False, "iterations": 3},
        {"kind": "tail", "queries": 3, "documents": 4},
        {"kind": "spacing", "queries": 2, "documents": 3},
    ],
    ids=lambda pool: pool["kind"],
)
def test_pooling_travels_along(tmp_path, pool):
    head = {"kind": "token_projection", "width": 16, "pool": pool}
    ours = token_encoder(tmp_path / "made", head=head, tokenizer={}, prompts={"query": "q: w3 "})
    ours.save(tmp_path / "ours")
    opened = st.MultiVectorEncoder(str(tmp_path / "ours"), trust_remote_code=True, device="cpu")
    agree(ours, opened)
    opened.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    again = st.MultiVectorEncoder(str(tmp_path / "again"), trust_remote_code=True, device="cpu")
    agree(ours, again)


@pytest.mark.parametrize(
    ("rule", "prompt", "opened"),
    [
        ("include", "query: ", True),
        ("exclude_by_count_and_prefix", "query: ", True),
        ("exclude", "query:\n", True),
        ("exclude", "query: ", False),
        ("exclude_by_count", "query:\n", False),
        ("exclude", "", True),
    ],
)
def test_prompts_left_out_are_the_same_or_refused_where_tokens_merge(tmp_path, rule, prompt, opened):
    """Byte-level tokens reach over the end of a prompt: counting the prompt's alone then finds others than offsets do."""
    fields = {"prompts": {"query": prompt}, "tokenizer": {"pool_instruction": rule}, "tokenizer_path": str(tmp_path)}
    byte_level(tmp_path)
    head = {"kind": "token_projection", "width": 8}
    backbone = {"architecture": BYTE_MODEL, "attention": "causal"}
    ours = openembed.build(EncoderConfig.model_validate({"backbone": backbone, "head": head, "max_length": 64, **fields}))
    ours.save(tmp_path / "ours")
    texts = ["word one two", "a b", "7 apples"]
    if opened:
        agree(ours, st.MultiVectorEncoder(str(tmp_path / "ours"), trust_remote_code=True, device="cpu"), texts)
        return
    with pytest.raises(Exception, match="leaves out other tokens than counting"):
        st.MultiVectorEncoder(str(tmp_path / "ours"), trust_remote_code=True, device="cpu")
    again = openembed.load(tmp_path / "ours")
    np.testing.assert_array_equal(again.encode_queries(texts).values_TD, ours.encode_queries(texts).values_TD)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [({"repeat": " again: "}, "reads every text twice"), ({"truncation": "cut_end"}, "cuts the end token off")],
)
def test_how_texts_are_read_is_refused_where_it_cannot_be_told(tmp_path, tokenizer, reason):
    ours = token_encoder(tmp_path / "made", tokenizer=tokenizer)
    ours.save(tmp_path / "ours")
    with pytest.raises(Exception, match=reason):
        st.MultiVectorEncoder(str(tmp_path / "ours"), trust_remote_code=True, device="cpu")
    long = [" ".join(f"w{number}" for number in range(60))]
    again = openembed.load(tmp_path / "ours")
    np.testing.assert_array_equal(again.encode_documents(long).values_TD, ours.encode_documents(long).values_TD)


@pytest.mark.parametrize("expanded", [True, False])
def test_pylate_checkpoints_open(tmp_path, expanded):
    """A folder as PyLate 1.x writes it: markers added to the vocabulary, everything else in one settings file."""
    source = backbone_folder(tmp_path, markers=False)
    folder = tmp_path / "pylate"
    source.rename(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    first = len(tokenizer["model"]["vocab"])
    markers = [{"id": first + n, "content": name, **plain} for n, name in enumerate(("[Q] ", "[D] "))]
    tokenizer["added_tokens"] += markers
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "1_Dense").mkdir()
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    save_file({"linear.weight": weight}, str(folder / "1_Dense" / "model.safetensors"))
    dense = {"in_features": 32, "out_features": 16, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
    (folder / "1_Dense" / "config.json").write_text(json.dumps(dense))
    rows = [("", "sentence_transformers.models.Transformer"), ("1_Dense", "pylate.models.Dense.Dense")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(rows)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 11, "do_lower_case": False}))
    settings = {
        "prompts": {},
        "model_type": "ColBERT",
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": 8,
        "document_length": 12,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list(string.punctuation),
        "do_query_expansion": expanded,
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    ours = openembed.load(folder)
    rows = ours.tokenize(["w1"], ours.query_prompt(), queries=np.ones(1, dtype=bool))
    assert rows.ids[0][1] == first
    assert len(rows.ids[0]) == (8 if expanded else 4)
    agree(ours, st.MultiVectorEncoder(str(folder), device="cpu"))


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
def test_colbert_checkpoints_open(tmp_path, weights):
    """A folder as Stanford's code writes it: the projection beside the backbone's weights, settings in artifact.metadata."""
    folder = backbone_folder(tmp_path, markers=False)
    tensors = {f"bert.{name}": value for name, value in load_file(str(folder / "model.safetensors")).items()}
    tensors["linear.weight"] = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    if weights == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    metadata = {"query_maxlen": 10, "doc_maxlen": 12, "attend_to_mask_tokens": False, "mask_punctuation": True}
    metadata |= {"query_token_id": "[unused0]", "doc_token_id": "[unused1]"}
    (folder / "artifact.metadata").write_text(json.dumps(metadata))
    ours = openembed.load(folder)
    assert ours.encode_queries(["w1"]).lengths_N.tolist() == [10]
    agree(ours, st.MultiVectorEncoder(str(folder), device="cpu"))
    with pytest.raises(ValueError, match="its own head"):
        openembed.load(folder, head={"kind": "mean"})


def test_a_text_of_skipped_tokens_alone_is_kept_here_and_empty_there(tmp_path):
    """The one difference: without special tokens, sentence-transformers gives such a document no vectors at all."""
    expected = theirs(tmp_path, skip=["[CLS]", "[SEP]", "."])
    ours = openembed.load(tmp_path / "model")
    assert ours.encode_documents(["."]).lengths_N.tolist() == [3]
    assert len(expected.encode_document(["."])[0]) == 0


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("modules.json", {"type": "sentence_transformers.models.Pooling"}, "Pooling is not supported"),
        ("2_MultiVectorMask/config.json", {"keep_only_token_ids": [3]}, "image tokens"),
        ("2_MultiVectorMask/config.json", {"skiplist_tasks": ["query"]}, "without documents"),
    ],
)
def test_what_has_no_counterpart_is_named(tmp_path, file, change, message):
    theirs(tmp_path, skip=["."])
    path = tmp_path / "model" / file
    content = json.loads(path.read_text())
    if isinstance(content, list):
        content[-1] |= change
    else:
        content |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        openembed.load(tmp_path / "model")
