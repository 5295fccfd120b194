"""Sparse encoders written as OpenSearch's and naver's: run by sentence-transformers, and as their model cards say, with the
same weights; what these layouts cannot say is refused."""

import json

import numpy as np
import pytest
import torch
from tiny_training import tiny_encoder
from tokenizers import decoders
from typer.testing import CliRunner
from vocabulary import SENTENCES, SPECIAL, bert, sparse_encoder, word_pieces

import openembed
from openembed.cli import app

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

TEXTS = [*SENTENCES, "", "wine? " * 40, "zzz judo 7"]
HEAD = {"transform": "mlm", "transform_activation": "gelu"}
LOOKUP = {"kind": "idf_lookup"}


@pytest.fixture
def lookup(tmp_path):
    """A function that makes an encoder whose queries are looked up, every token with another weight."""

    def make(head=None, **parts):
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        backend = word_pieces()
        backbone = {"architecture": bert(backend, vocab_size=backend.get_vocab_size()), "attention": "model"}
        parts = {"query_head": LOOKUP, "backbone": backbone, **parts}
        encoder = sparse_encoder(tmp_path / "tokenizer", {**HEAD, **(head or {})}, **parts)
        with torch.no_grad():
            encoder.head.bias_V.normal_(generator=torch.Generator().manual_seed(1))
        if encoder.query_head is not None:
            encoder.query_head.set_table(np.random.default_rng(0).gamma(2, 2, encoder.query_head.width).astype(np.float32))
        return encoder

    return make


def rows(encoder):
    return [encode(TEXTS).toarray() for encode in (encoder.encode_queries, encoder.encode_documents)]


def alike(found, expected):
    for mine, other in zip(found, expected, strict=True):
        assert (other > 0).any()
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=1e-5)


def by_the_card(folder, *, logarithms, table=True):
    """Queries and documents as OpenSearch's cards compute them from the files; without a table as naver's code does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**batch).logits
    weights = (logits * batch["attention_mask"][..., None]).amax(1).relu()
    for _ in range(logarithms):
        weights = weights.log1p()
    if not table:
        return weights.numpy(), weights.numpy()
    weights[:, [tokenizer.vocab[token] for token in tokenizer.special_tokens_map.values()]] = 0
    idf = torch.zeros(weights.shape[1])
    for token, weight in json.loads((folder / "idf.json").read_text()).items():
        idf[tokenizer.convert_tokens_to_ids(token)] = weight
    asked = torch.zeros_like(weights)
    asked[torch.arange(len(TEXTS))[:, None], batch["input_ids"]] = 1
    return (asked * idf).numpy(), weights.numpy()


def by_sentence_transformers(folder):
    there = st.SparseEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return [f(TEXTS, show_progress_bar=False).to_dense().numpy() for f in (there.encode_query, there.encode_document)]


@pytest.mark.parametrize(("activation", "logarithms"), [("log1p_relu", 1), ("log1p_log1p_relu", 2)])
@pytest.mark.parametrize("special", [True, False])
def test_open_search_layout_three_ways(lookup, tmp_path, activation, logarithms, special, caplog):
    """``special``: whether the head drops special tokens itself; where not, the card's code does."""
    encoder = lookup({"activation": activation, "exclude_special": special})
    encoder.save(tmp_path / "out", layout="opensearch")
    expected = rows(encoder)
    alike(rows(openembed.load(tmp_path / "out")), expected)
    alike(by_sentence_transformers(tmp_path / "out"), expected)
    queries, documents = by_the_card(tmp_path / "out", logarithms=logarithms)
    if not special:
        expected[1][:, [SPECIAL.index(name) for name in SPECIAL if name != "[unused0]"]] = 0
    alike((queries, documents), expected)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"idf.json", "modules.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"openembed.json", "head.safetensors"}
    assert "logarithm" not in caplog.text, "the modules say which"


def bare(folder, *, pooling=False):
    """Leaves of a folder what OpenSearch's had before sentence-transformers could open them."""
    (folder / "modules.json").unlink()
    if not pooling:
        (folder / "document_1_SpladePooling/config.json").unlink()


def test_without_modules_what_is_assumed_is_said_and_can_be_said_otherwise(lookup, tmp_path, caplog):
    encoder = lookup({"activation": "log1p_log1p_relu"})
    encoder.save(tmp_path / "v3", layout="opensearch")
    bare(tmp_path / "v3", pooling=True)
    alike(rows(openembed.load(tmp_path / "v3")), rows(encoder))
    assert "logarithm" not in caplog.text, "the pooling's folder says which"
    (tmp_path / "v3/document_1_SpladePooling/config.json").unlink()
    assumed = openembed.load(tmp_path / "v3")
    assert assumed.config.head.activation == "log1p_relu"
    (line,) = [record.getMessage() for record in caplog.records if "logarithm" in record.getMessage()]
    assert "head={'kind': 'splade', 'activation': 'log1p_log1p_relu'}" in line
    np.testing.assert_allclose(np.log1p(rows(assumed)[1]), rows(encoder)[1], atol=1e-5)
    caplog.clear()
    told = openembed.load(tmp_path / "v3", head={"kind": "splade", "activation": "log1p_log1p_relu"})
    alike(rows(told), rows(encoder))
    assert "logarithm is taken" not in caplog.text


def test_idf_json_names_every_token_as_the_tables_module_reads_it(lookup, tmp_path):
    from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding

    encoder = lookup()
    encoder.save(tmp_path / "out", layout="opensearch")
    table = encoder.query_head.table().numpy()
    stored = json.loads((tmp_path / "out/idf.json").read_text())
    assert len(stored) == encoder.tokenizer.vocabulary
    assert stored["wine"] == float(str(table[encoder.tokenizer.backend.token_to_id("wine")]))
    assert stored["[CLS]"] == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    read = SparseStaticEmbedding.from_json(str(tmp_path / "out/idf.json"), tokenizer).weight.detach().numpy()
    np.testing.assert_array_equal(read, table[: len(read)])


def test_navers_layout_three_ways(lookup, tmp_path):
    encoder = lookup(query_head=None)
    encoder.save(tmp_path / "out", layout="splade")
    alike(rows(openembed.load(tmp_path / "out")), rows(encoder))
    alike(by_sentence_transformers(tmp_path / "out"), rows(encoder))
    alike(by_the_card(tmp_path / "out", logarithms=1, table=False), rows(encoder))
    assert not (tmp_path / "out/idf.json").exists()
    (tmp_path / "out/modules.json").unlink()
    alike(rows(openembed.load(tmp_path / "out", head={"kind": "splade"})), rows(encoder))


def test_what_our_own_layout_writes_opens_as_navers_too(lookup, tmp_path):
    encoder = lookup(query_head=None)
    encoder.save(tmp_path / "out")
    alike(by_the_card(tmp_path / "out", logarithms=1, table=False), rows(encoder))


def test_a_table_shorter_than_the_vocabulary_is_not_written_for_sentence_transformers(lookup, tmp_path, caplog):
    with caplog.at_level("INFO"):
        lookup(backbone=PADDED).save(tmp_path / "out")
    assert "an entry for each of 80 tokens" in caplog.text
    assert not (tmp_path / "out/modules.json").exists()


def test_long_texts_are_cut_alike(lookup, tmp_path):
    encoder = lookup(max_length=9)
    encoder.save(tmp_path / "out", layout="opensearch")
    assert openembed.load(tmp_path / "out").max_length == 9
    alike(by_the_card(tmp_path / "out", logarithms=1)[1:], rows(encoder)[1:])


PADDED = {"architecture": bert(word_pieces()), "attention": "model"}
REFUSED = {
    "backbone's vocab_size = 83 ": ("opensearch", {"backbone": PADDED}),
    "head.activation = 'elu1p'": ("opensearch", {"head": {"activation": "elu1p"}}),
    "head.activation = 'log1p_log1p_relu'": ("splade", {"head": {"activation": "log1p_log1p_relu"}, "query_head": None}),
    "head.pooling = 'sum'": ("opensearch", {"head": {"pooling": "sum"}}),
    "head.transform = 'norm'": ("opensearch", {"head": {"transform": "norm"}}),
    r"head.document \(no part": ("opensearch", {"head": {"document": {"top_k": 8}}}),
    r"head.query \(no part": ("splade", {"head": {"query": {"top_k": 8}}, "query_head": None}),
    "head.fold = true": ("opensearch", {"head": {"fold": True}, "query_head": {**LOOKUP, "fold": True}}),
    "query_head is not set": ("opensearch", {"query_head": None}),
    r"query_head \(SPLADE's queries": ("splade", {}),
    r"drops \[PAD\], .* from documents": (
        "opensearch",
        {"head": {"exclude_special": False}, "query_head": {**LOOKUP, "exclude_special": False}},
    ),
    "prompts.document ": ("opensearch", {"prompts": {"document": "d: "}}),
    "prompts.tasks ": ("splade", {"prompts": {"tasks": {"qa": {"query": "Answer"}}}, "query_head": None}),
    "prompts.template ": ("opensearch", {"prompts": {"template": "{task}: "}}),
    "tokenizer.document_length": ("opensearch", {"tokenizer": {"document_length": 20}}),
    "tokenizer.repeat": ("opensearch", {"tokenizer": {"repeat": " "}}),
    "lowercase": ("opensearch", {"tokenizer": {"lowercase": True}}),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_a_layout_cannot_say_is_refused_by_name(lookup, tmp_path, setting):
    layout, parts = REFUSED[setting]
    with pytest.raises(ValueError, match=setting):
        lookup(**parts).save(tmp_path / "out", layout=layout)
    assert not (tmp_path / "out").exists()


def test_tokens_that_read_otherwise_than_they_are_called_are_refused(lookup, tmp_path):
    """OpenSearch looks a query's tokens up in ``idf.json`` by their decoded text."""
    encoder = lookup()
    encoder.tokenizer.backend.decoder = decoders.Replace("##", "")
    with pytest.raises(ValueError, match=r"the tokenizer .OpenSearch knows a token by what it reads as alone: '##[a-z]' reads"):
        encoder.save(tmp_path / "out", layout="opensearch")


def test_all_that_is_refused_is_said_at_once(lookup, tmp_path):
    encoder = lookup({"pooling": "sum"}, query_head=None, prompts={"query": "q: "})
    with pytest.raises(ValueError, match=r"head.pooling = 'sum'.*; query_head is not set.*; prompts.query") as caught:
        encoder.save(tmp_path / "out", layout="opensearch")
    assert "OpenSearch's layout cannot say" in str(caught.value)


def test_other_kinds_and_taken_folders_are_refused(lookup, tmp_path):
    with pytest.raises(ValueError, match="'splade' holds weights over a vocabulary, this model's kind is dense"):
        tiny_encoder(tmp_path).save(tmp_path / "out", layout="splade")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/notes").write_text("mine")
    with pytest.raises(FileExistsError, match="taken: exists; give a new folder"):
        lookup().save(tmp_path / "taken", layout="opensearch")


def test_the_command_converts_and_refuses(lookup, tmp_path):
    encoder = lookup({"activation": "log1p_log1p_relu"})
    encoder.save(tmp_path / "model")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "opensearch", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {
        "model": str(tmp_path / "model"),
        "out": str(tmp_path / "out"),
        "layout": "opensearch",
        "kind": "sparse",
    }
    alike(rows(openembed.load(tmp_path / "out")), rows(encoder))
    refused = CliRunner().invoke(app, ["convert", str(tmp_path / "model"), str(tmp_path / "other"), "--to", "splade"])
    assert refused.exit_code != 0
    assert "layout 'opensearch' has a table" in str(refused.exception)
