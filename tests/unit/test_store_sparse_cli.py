"""Sparse models on the command line and in steps: indexing with resumption, searching, hybrid of three rankings."""

import json
import logging

import numpy as np
import pytest
from kind_fakes import WordTokens, WordWeights
from sparse_fakes import SparseWords
from store_fakes import BagOfWords
from typer.testing import CliRunner

import openembed
from openembed.cli import app
from openembed.index.store import Store, describe_model
from openembed.records import Document, Query
from openembed.steps import DenseConfig, FuseConfig, Search, SparseConfig

TEXTS = ["cats chase mice in the barn", "dogs chase cats", "models turn text into vectors", "a barn of hay"]


@pytest.fixture
def cli(monkeypatch):
    def load(name, device=None, dtype=None):
        return BagOfWords() if "bag" in name else SparseWords()

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    monkeypatch.setattr(openembed, "load", load, raising=False)
    return run


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("".join(text + "\n" for text in TEXTS))
    return tmp_path / "corpus.txt"


def best(cli, index, mode, query="barn of hay", **options):
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return json.loads(cli("search", index, query, "--mode", mode, "--json", *given))["hits"]


def explained_by(cli, index, mode):
    return json.loads(cli("search", index, "barn of hay", "--mode", mode, "--explain", "--json"))["hits"]


@pytest.mark.parametrize("precision", ["float16", "uint8"])
def test_a_sparse_model_is_indexed_searched_added_to_and_updated(cli, corpus, tmp_path, precision):
    index = tmp_path / "index"
    report = json.loads(cli("index", corpus, "-o", index, "--model", "words", "--precision", precision, "--json"))
    assert (report["count"], report["models"], report["resumed"]) == (4, {"sparse": "words"}, 0)
    assert Store(index).models["sparse"].precision == precision
    assert best(cli, index, "sparse")[0]["id"] == "4"
    (tmp_path / "more.jsonl").write_text('{"_id": "x", "text": "hay hay hay hay"}\n')
    assert json.loads(cli("add", index, tmp_path / "more.jsonl", "--json"))["added"] == 1
    assert best(cli, index, "sparse", "hay")[0]["id"] == "x"
    (tmp_path / "more.jsonl").write_text('{"_id": "x", "text": "straw"}\n')
    cli("update", index, tmp_path / "more.jsonl")
    assert [hit["id"] for hit in best(cli, index, "sparse", "hay")] == ["4"]
    assert not list(index.glob("encoding*")) + list(index.glob("adding*"))
    with pytest.raises(ValueError, match=r"has no vectors for --mode dense; use sparse, bm25 or hybrid$"):
        cli("search", index, "x", "--mode", "dense")
    with pytest.raises(ValueError, match="allowed: dense, sparse, tokens, bm25, hybrid"):
        cli("search", index, "x", "--mode", "colours")


@pytest.mark.parametrize(("encoder", "kind"), [(SparseWords, "sparse"), (WordTokens, "tokens")])
def test_documents_that_a_mode_cannot_find_are_told(cli, tmp_path, monkeypatch, caplog, encoder, kind):
    def load(name, device=None, dtype=None):
        return encoder()

    monkeypatch.setattr(openembed, "load", load, raising=False)
    rows = [{"_id": str(n), "text": text} for n, text in enumerate(["!!!", "...", "hay in a barn"])]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = tmp_path / "index"
    said = cli("index", tmp_path / "odd.jsonl", "--out", index, "--model", "words")
    assert said.strip().endswith(f"2 without {kind} vectors")
    part = {"sparse": "term in their sparse vectors", "tokens": "token vector"}[kind]
    assert f"2 of 3 documents without any {part}: search by mode {kind} will not find them" in caplog.text
    caplog.clear()
    (tmp_path / "more.jsonl").write_text('{"_id": "x", "text": "cats"}\n')
    report = json.loads(cli("add", index, tmp_path / "more.jsonl", "--json"))
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert (report["empty"], warned) == ({kind: 2}, []), "what was there is counted, and what was added is well"
    cli("delete", index, "0", "1")
    assert Store(index).empty == {}


def test_explain_shows_the_terms_of_each_score(cli, corpus, tmp_path):
    index = tmp_path / "index"
    cli("index", corpus, "-o", index, "--model", "words")
    for mode in ("sparse", "bm25"):
        assert "terms" not in best(cli, index, mode)[0]
        hits = explained_by(cli, index, mode)
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in best(cli, index, mode)]
        for hit in hits:
            assert sum(term["score"] for term in hit["terms"]) == pytest.approx(hit["score"], rel=1e-5)
            assert sum(term["share"] for term in hit["terms"]) == pytest.approx(1)
    assert {term["term"] for term in hits[0]["terms"]} == {"barn", "hay"}, "the words of the last mode"
    shown = cli("search", index, "barn of hay", "--mode", "bm25", "--explain", "-k", 1)
    shares = {term["term"]: f"{term['share']:.0%}" for term in hits[0]["terms"]}
    assert all(f"{term} {share}" in shown for term, share in shares.items())
    assert "%" not in cli("search", index, "barn of hay", "--mode", "bm25", "-k", 1)
    assert cli("search", index, "zebra", "--mode", "bm25", "--explain") == "nothing found\n"
    shown = json.loads(cli("search", index, "barn of hay", "--explain", "--json"))
    assert (shown["mode"], shown["hits"]) == ("sparse", explained_by(cli, index, "sparse"))
    cli("index", corpus, "-o", tmp_path / "dense", "--model", "bag")
    shown = json.loads(cli("search", tmp_path / "dense", "barn of hay", "--explain", "--json"))
    assert (shown["mode"], shown["hits"]) == ("bm25", explained_by(cli, index, "bm25"))
    for mode in ("hybrid", "dense"):
        with pytest.raises(ValueError, match="allowed with explain: sparse, tokens, bm25"):
            cli("search", index, "x", "--mode", mode, "--explain")


def test_two_models_and_words_are_fused(cli, corpus, tmp_path):
    index = tmp_path / "index"
    report = json.loads(cli("index", corpus, "-o", index, "--model", "bag", "--model", "words", "--json"))
    assert report["models"] == {"dense": "bag", "sparse": "words"}
    first = best(cli, index, "hybrid")[0]
    assert (first["id"], first["score"]) == ("4", pytest.approx(3 / 61))
    assert best(cli, index, "dense")[0]["id"] == best(cli, index, "sparse", model="words")[0]["id"] == "4"
    with pytest.raises(ValueError, match=r"--model words gives sparse weights .*; dense vectors are asked for here"):
        best(cli, index, "dense", model="words")
    (tmp_path / "more.jsonl").write_text('{"_id": "x", "text": "straw"}\n')
    assert json.loads(cli("add", index, tmp_path / "more.jsonl", "--model", "words", "--json"))["added"] == 1


def test_no_normalize_is_about_dense_vectors_and_leaves_others_as_their_head_makes_them(cli, corpus, tmp_path):
    index = tmp_path / "index"
    cli("index", corpus, "-o", index, "--model", "bag", "--model", "words", "--no-normalize")
    for text in ("hay", "straw"):
        (tmp_path / "more.jsonl").write_text(json.dumps({"_id": "x", "text": text}) + "\n")
        cli("add" if text == "hay" else "update", index, tmp_path / "more.jsonl")
    store, texts = Store(index), [*TEXTS, "straw"]
    np.testing.assert_array_equal([row for _, row in store.rows()], BagOfWords().encode(texts, normalize=False))
    weights = [row.weights.sum() for _, row in store.rows("sparse")]
    np.testing.assert_array_equal(weights, SparseWords().encode(texts).toarray().sum(axis=1))


def test_bytes_are_for_sparse_weights_and_leave_token_vectors_as_they_are(cli, corpus, tmp_path, monkeypatch):
    made = {"words": WordWeights(), "pieces": WordTokens()}
    monkeypatch.setattr(openembed, "load", lambda name, **_options: made[name])
    given = "index", corpus, "-o", tmp_path / "index", "--precision"
    for models, precision, message in (
        (["pieces"], "uint8", r"^--precision uint8 is for sparse weights; token vectors are kept in float32 or float16$"),
        (["words", "words"], "float32", "2 encoders, but of 1 kinds"),
        (["words", "pieces"], "int4", "--precision int4 is not known; allowed: float32, float16, uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            cli(*given, precision, *[part for name in models for part in ("--model", name)])
    assert made["words"].encoded == made["pieces"].encoded == []
    assert not (tmp_path / "index").exists()
    cli(*given, "uint8", "--model", "words", "--model", "pieces")
    kept = {kind: model.precision for kind, model in Store(tmp_path / "index").models.items()}
    assert kept == {"sparse": "uint8", "tokens": "float32"}
    with pytest.raises(
        ValueError, match=r"^options: precision uint8 is for sparse weights; token vectors are kept in .*float16$"
    ):
        describe_model("pieces", made["pieces"], precision="uint8")


def test_what_a_new_index_has_no_use_for_is_refused(cli, corpus, tmp_path):
    given = "index", corpus, "-o", tmp_path / "index", "--model"
    for precision in ("uint8", "float16"):
        with pytest.raises(ValueError, match=f"--precision {precision} is for sparse weights and token vectors; dense"):
            cli(*given, "bag", "--precision", precision)
    unused = "--precision", "uint8", "--instruction", "foo", "--max-length", 3, "--no-normalize"
    with pytest.raises(
        ValueError, match=r"^--precision and --no-normalize and --instruction and --max-length: the index .* leave them out$"
    ):
        cli(*given, "bm25", *unused)
    assert not (tmp_path / "index").exists()
    cli(*given, "bag", "--model", "words", "--precision", "uint8")
    kept = {kind: model.precision for kind, model in Store(tmp_path / "index").models.items()}
    assert kept == {"dense": "float32", "sparse": "uint8"}
    with pytest.raises(ValueError, match="precision uint8: dense vectors are kept in float32; leave it out"):
        describe_model("bag", BagOfWords(), precision="uint8")


@pytest.mark.parametrize("kind", [WordWeights, WordTokens])
def test_encoding_goes_on_where_it_was_and_ends_with_the_same_files(cli, tmp_path, monkeypatch, kind):
    source = tmp_path / "c.txt"
    source.write_text("".join(f"{TEXTS[n % 4]} {n}\n" for n in range(1030)))

    class Killed(kind):
        def encode_documents(self, texts, **options):
            if self.encoded:
                raise RuntimeError("killed")
            return super().encode_documents(texts, **options)

    def made(encoder, out="index", *options):
        monkeypatch.setattr(openembed, "load", lambda *_a, **_k: encoder)
        given = "index", source, "-o", tmp_path / out, "--model", "m", "--precision", "float16", "--json", *options
        return json.loads(cli(*given)), encoder.encoded

    def segment(out):
        return {path.name: path.read_bytes() for path in (tmp_path / out / "segments").rglob("*") if path.is_file()}

    with pytest.raises(RuntimeError):
        made(Killed())
    with pytest.raises(ValueError, match=r"model_fingerprint is 'another', was 'words'.*; pass --restart"):
        made(kind(fingerprint="another"))
    with pytest.raises(ValueError, match="max_length is 2, was None"):
        made(kind(), "index", "--max-length", 2)
    report, encoded = made(kind())
    assert (report["resumed"], report["count"], report["width"], len(encoded)) == (1024, 1030, kind.width, 6)
    report, encoded = made(kind(), "whole")
    assert (report["resumed"], len(encoded)) == (0, 1030)
    assert segment("index") == segment("whole")
    with pytest.raises(RuntimeError):
        made(Killed(), "again")
    report, encoded = made(kind(), "again", "--restart")
    assert (report["resumed"], len(encoded)) == (0, 1030)
    assert not (tmp_path / "again" / "encoding").exists()


def test_steps_take_the_encoder_of_their_kind(tmp_path):
    dense, words = BagOfWords(), SparseWords()
    store = Store.create(tmp_path / "index", model=[describe_model("a", dense), describe_model("b", words)])
    store.add([Document(f"d{n}", text) for n, text in enumerate(TEXTS)], [dense, words])
    search = Search((Query("q", "barn of hay"), Query("none", "zebra")))
    run = SparseConfig(k=2).build(store, words)(search).run
    assert run == dict(zip(("q", "none"), store.sparse(words.encode(["barn of hay", "zebra"]), 2), strict=True))
    fused = FuseConfig(parts=(DenseConfig(), SparseConfig()), k=1).build(store, [words, dense])(search).run
    assert fused["q"] == {"d3": pytest.approx(2 / 61)}
    with pytest.raises(ValueError, match="the sparse step needs the encoder that made the store's sparse vectors"):
        SparseConfig().build(store, dense)
    with pytest.raises(ValueError, match="made by b"):
        SparseConfig().build(store, SparseWords(name="other"))
    assert next(iter(store.rows("sparse")))[1].weights.sum() == words.encode(TEXTS[:1]).sum()
