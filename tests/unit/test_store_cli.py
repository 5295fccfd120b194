import json

import pytest
from store_fakes import BagOfWords
from typer.testing import CliRunner

import openembed
from openembed.cli import app
from openembed.index.store import Store


@pytest.fixture
def loaded(monkeypatch):
    models = []

    def load(name, device=None, dtype=None):
        models.append(BagOfWords(name=name.rpartition("/")[2]))
        return models[-1]

    monkeypatch.setattr(openembed, "load", load, raising=False)
    return models


@pytest.fixture
def cli(loaded):
    def run(*arguments, stdin=None):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def corpus(tmp_path):
    rows = [
        {"_id": "a", "title": "Cats", "text": "Cats chase mice in the barn.", "url": "http://a"},
        {"_id": "b", "title": "Dogs", "text": "A dog chased the cat. \u001b[31mred\u001b[0m [bold]not markup[/bold]"},
        {"_id": "c", "text": "Vectors and embeddings."},
    ]
    folder = tmp_path / "beir"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def index(cli, corpus, tmp_path):
    cli("index", corpus, "-o", tmp_path / "index", "--model", "bag")
    return tmp_path / "index"


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_search_as_json(cli, index, loaded, mode):
    loaded.clear()
    found = json.loads(cli("search", index, "cats in a barn", "--mode", mode, "-k", 2, "--json"))
    assert found["mode"] == mode
    assert found["hits"][0]["id"] == "a"
    assert found["hits"][0]["metadata"] == {"url": "http://a"}
    assert [hit["rank"] for hit in found["hits"]] == [1, 2]
    assert len(loaded) == (0 if mode == "bm25" else 1)
    assert sum(encoder.encoded for encoder in loaded) == len(loaded)


def test_search_as_a_table(cli, index):
    shown = cli("search", index, "cats chasing")
    assert "Cats chase mice" in shown
    assert "[bold]not markup[/bold]" in shown
    assert "\x1b" not in shown
    assert cli("search", index, "zebra", "--mode", "bm25") == "nothing found\n"


def test_add_delete_compact(cli, index, tmp_path):
    (tmp_path / "more.txt").write_text("zebras graze\nlions sleep\n")
    report = json.loads(cli("add", index, tmp_path / "more.txt", "--json"))
    assert (report["added"], report["count"], report["resumed"]) == (2, 5, 0)
    assert json.loads(cli("search", index, "zebra", "--mode", "bm25", "--json"))["hits"][0]["id"] == "1"
    with pytest.raises(ValueError, match="id '1' is already in the index"):
        cli("add", index, tmp_path / "more.txt")
    cli("add", index, tmp_path / "more.txt", "--replace")
    (tmp_path / "gone").write_text("1\n\nb\n")
    assert json.loads(cli("delete", index, "c", "--ids", tmp_path / "gone", "--json")) == {"deleted": 3, "count": 2}
    assert json.loads(cli("compact", index, "--json")) == {"count": 2}
    assert sorted(Store(index).ids()) == ["2", "a"]
    with pytest.raises(ValueError, match="no ids given"):
        cli("delete", index)


def test_indexing_again_is_refused_and_a_bad_corpus_leaves_no_index(cli, index, corpus, tmp_path):
    with pytest.raises(FileExistsError, match="add documents with `openembed add`"):
        cli("index", corpus, "-o", index, "--model", "bag")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    for options in ([], ["--model", "bag"]):
        with pytest.raises(ValueError, match=r"bad\.jsonl:2: malformed JSON"):
            cli("index", tmp_path / "bad.jsonl", "-o", tmp_path / "new", *options)
        with pytest.raises(FileNotFoundError, match="no openembed index"):
            Store(tmp_path / "new")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    cli("index", tmp_path / "bad.jsonl", "-o", tmp_path / "new", "--model", "bm25")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", "manifest.json", "segments"]


def test_an_interrupted_index_resumes_its_encoding(cli, corpus, tmp_path, loaded, monkeypatch):
    monkeypatch.setattr(Store, "create", classmethod(lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt)))
    with pytest.raises(AssertionError):
        cli("index", corpus, "-o", tmp_path / "new", "--model", "bag")
    monkeypatch.undo()
    monkeypatch.setattr(openembed, "load", lambda *_a, **_k: loaded[0], raising=False)
    before = loaded[0].encoded
    assert json.loads(cli("index", corpus, "-o", tmp_path / "new", "--model", "bag", "--json"))["resumed"] == 3
    assert (before, loaded[0].encoded) == (3, 3)
    assert not (tmp_path / "new" / "encoding").exists()


def test_a_moved_or_other_model(cli, index):
    with pytest.raises(ValueError, match="made by bag"):
        cli("search", index, "cats", "--model", "other")
    assert json.loads(cli("search", index, "cats", "--model", "moved/bag", "--json"))["hits"][0]["id"] == "a"


def test_options_about_a_model_are_refused_where_none_is_run(cli, index, corpus, tmp_path, loaded):
    loaded.clear()
    for options in (["--model", "bag"], ["--task", "STS"], ["--instruction", "Find"]):
        with pytest.raises(ValueError, match=rf"^{options[0]}: words are searched here, by BM25, .* leave it out$"):
            cli("search", index, "cats", "--mode", "bm25", *options)
    words = tmp_path / "words"
    cli("index", corpus, "-o", words, "--model", "bm25")
    with pytest.raises(ValueError, match=r"^--model and --instruction: words are searched .* leave them out$"):
        cli("search", words, "cats", "--model", "bag", "--instruction", "Find")
    (tmp_path / "more.jsonl").write_text('{"_id": "a", "text": "straw"}\n')
    for command, *options in (("add", "--replace"), ("update",)):
        with pytest.raises(ValueError, match=r"^--model: the index holds words alone, .* leave it out$"):
            cli(command, words, tmp_path / "more.jsonl", "--model", "bag", *options)
    assert not loaded
    assert json.loads(cli("search", words, "straw", "--json"))["hits"] == []
    assert json.loads(cli("search", index, "cats", "--mode", "bm25", "--json"))["hits"]


def test_wrong_options_are_named(cli, index, tmp_path, corpus):
    with pytest.raises(ValueError, match="mode 'fast' is not known; allowed: dense, sparse, tokens, bm25, hybrid"):
        cli("search", index, "cats", "--mode", "fast")
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        cli("search", index, "cats", "--mode", "bm25", "-k", 0)
    with pytest.raises(ValueError, match="options: kind: Input should be 'query' or 'document'"):
        cli("encode", "bag", corpus, "-o", tmp_path / "out", "--kind", "both")
    cli("index", corpus, "-o", tmp_path / "words", "--language", "pl")
    with pytest.raises(ValueError, match="serves BM25 only; use --mode bm25"):
        cli("search", tmp_path / "words", "cats", "--mode", "hybrid")


@pytest.mark.parametrize(("text", "ids"), [("one\ntwo\n", ["1", "2"]), ('{"_id": "x", "text": "one"}\n', ["x"])])
def test_encode_reads_standard_input(cli, tmp_path, text, ids):
    report = json.loads(cli("encode", "bag", "-", "-o", tmp_path / "out", "--json", stdin=text))
    assert report["count"] == len(ids)
    assert [json.loads(line) for line in (tmp_path / "out" / "ids.jsonl").read_text().splitlines()] == ids
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "ids.jsonl",
        "meta.json",
        "vectors.npy",
    ]


def test_encode_says_the_format_its_bytes_and_what_to_know_of_truncation(cli, corpus, tmp_path):
    out = tmp_path / "out"
    report = json.loads(cli("encode", "bag", corpus, "-o", out, "--precision", "int8", "--dimensions", "16", "--json"))
    count = report["count"]
    assert (report["precision"], report["width"], report["bytes"]) == ("int8", 16, count * (16 + 4))
    assert "trained to be cut" in report["warning"]
    assert "width 16 in int8" in cli("encode", "bag", corpus, "-o", out, "--precision", "int8", "--dimensions", "16")
    with pytest.raises(ValueError, match="options: precision"):
        cli("encode", "bag", corpus, "-o", tmp_path / "other", "--precision", "int4")


def test_search_with_conditions(cli, index, tmp_path):
    (tmp_path / "more.jsonl").write_text(
        '{"_id": "x", "text": "cats", "year": 2001, "lang": "en"}\n{"_id": "y", "text": "cats", "year": 2010, "lang": "pl"}\n'
    )
    cli("add", index, tmp_path / "more.jsonl")

    def ids(*options):
        return [hit["id"] for hit in json.loads(cli("search", index, "cats", *options, "--json"))["hits"]]

    for mode in ("dense", "bm25", "hybrid"):
        assert set(ids("--mode", mode, "--where", "year>=2000")) == {"x", "y"}
        assert ids("--mode", mode, "--where", "year>=2000", "--where", "lang=en|de") == ["x"]
        assert ids("--mode", mode, "--filter", '{"year": {"gt": 2001}}') == ["y"]
        assert ids("--mode", mode, "--where", "year=1") == []
    assert '"year": 2001' in cli("search", index, "cats", "--where", "lang=en")
    with pytest.raises(ValueError, match="'year' is no condition"):
        cli("search", index, "cats", "--where", "year")
    with pytest.raises(ValueError, match="--filter: malformed JSON"):
        cli("search", index, "cats", "--filter", "{year")
    with pytest.raises(ValueError, match=r"filter\.year\.near: unknown operator"):
        cli("search", index, "cats", "--filter", '{"year": {"near": 3}}')


def test_json_says_what_a_score_is(cli, index):
    assert "reciprocal rank" in json.loads(cli("search", index, "cats", "--json"))["score"]


def test_an_interrupted_add_resumes_its_encoding(cli, index, tmp_path, loaded, monkeypatch):
    (tmp_path / "more.txt").write_text("zebras graze\n\nlions sleep\n")
    monkeypatch.setattr(Store, "add", lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(AssertionError):
        cli("add", index, tmp_path / "more.txt")
    monkeypatch.undo()
    encoder = loaded[-1]
    monkeypatch.setattr(openembed, "load", lambda *_a, **_k: encoder, raising=False)
    before = encoder.encoded
    report = json.loads(cli("add", index, tmp_path / "more.txt", "--json"))
    assert (report["resumed"], report["added"], encoder.encoded - before) == (2, 2, 0)
    assert sorted(Store(index).ids()) == ["1", "3", "a", "b", "c"]
    assert not (index / "adding").exists()


def test_nothing_is_loaded_or_encoded_for_input_that_cannot_be_added(cli, index, tmp_path, loaded):
    loaded.clear()
    for command in (("index", tmp_path / "none.txt", "-o", tmp_path / "new"), ("add", index, tmp_path / "none.txt")):
        with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
            cli(*command)
    (tmp_path / "again.jsonl").write_text('{"_id": "a", "text": "again"}\n')
    with pytest.raises(ValueError, match="id 'a' is already in the index"):
        cli("add", index, tmp_path / "again.jsonl")
    assert not loaded


def test_update(cli, index, tmp_path, loaded):
    (tmp_path / "new.jsonl").write_text('{"_id": "a", "text": "llamas hum"}\n')
    assert json.loads(cli("update", index, tmp_path / "new.jsonl", "--json")) == {"updated": 1, "count": 3}
    assert Store(index).document("a").text == "llamas hum"
    (tmp_path / "new.jsonl").write_text('{"_id": "nowhere", "text": "x"}\n')
    with pytest.raises(ValueError, match="no document with id 'nowhere'; nothing was updated"):
        cli("update", index, tmp_path / "new.jsonl")
