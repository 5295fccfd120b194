"""Files of sparse vectors for other engines, byte for byte."""

import json

import numpy as np
import pytest
from scipy import sparse as sp
from typer.testing import CliRunner

import openembed
from openembed.cli import app
from openembed.index.store import ModelInfo, Store
from openembed.integrations.sparse_files import anserini_topics, write_sparse
from openembed.records import Document, Query

NAMES = ["[PAD]", "żaba", "##ing", '"', "."]
WEIGHTS = np.array([[0, 1.5, 0.004, 0, 0], [0.1, 0, 0, 2.25, 0.005], [0, 0, 0, 0, 0]], dtype=np.float32)


@pytest.fixture
def store(tmp_path):
    model = ModelInfo(name="words", fingerprint="f", width=5, kind="sparse")
    documents = [Document("a", "The text.", "Title", {"n": 1}), Document('b"', "Second"), Document("c", "")]
    made = Store.create(
        tmp_path / "index", [Document("x", "gone"), *documents], sp.csr_matrix(WEIGHTS[[0, 0, 1, 2]]), model=model
    )
    made.delete(["x"])
    return made


def test_opensearch_bulk_lines(store, tmp_path):
    assert write_sparse(store, "opensearch", tmp_path / "my-index.jsonl", NAMES.__getitem__)["written"] == 3
    assert (tmp_path / "my-index.jsonl").read_bytes().decode() == (
        '{"index": {"_index": "my-index", "_id": "a"}}\n'
        '{"title": "Title", "text": "The text.", "metadata": {"n": 1}, "sparse": {"żaba": 1.5, "##ing": 0.004}}\n'
        '{"index": {"_index": "my-index", "_id": "b\\""}}\n'
        '{"title": "", "text": "Second", "metadata": {}, "sparse": {"[PAD]": 0.1, "\\"": 2.25, ".": 0.005}}\n'
        '{"index": {"_index": "my-index", "_id": "c"}}\n'
        '{"title": "", "text": "", "metadata": {}, "sparse": {}}\n'
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("My-docs.jsonl", "is not in lower case"),
        ("my docs.jsonl", "has one of"),
        ("a#b.jsonl", "has one of"),
        ("_bulk.jsonl", "begins with _, - or"),
        ("-a.jsonl", "begins with _, - or"),
        (".jsonl", "is empty"),
        ("żaba-2026_a+b.v2.jsonl", None),
    ],
)
def test_an_index_name_that_opensearch_refuses_is_refused_first(store, tmp_path, name, reason):
    if reason is None:
        write_sparse(store, "opensearch", tmp_path / name, NAMES.__getitem__)
        return
    with pytest.raises(ValueError, match=rf"{name}: .* refuses: it {reason}.*; give the file another name"):
        write_sparse(store, "opensearch", tmp_path / name, NAMES.__getitem__)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    write_sparse(store, "anserini", tmp_path / name, NAMES.__getitem__)


def test_an_id_too_long_for_opensearch_is_refused(tmp_path):
    model = ModelInfo(name="words", fingerprint="f", width=5, kind="sparse")
    documents = [Document("ok" * 256, "t"), Document("ż" * 257, "t")]
    store = Store.create(tmp_path / "index", documents, sp.csr_matrix(WEIGHTS[:2]), model=model)
    with pytest.raises(ValueError, match=r"document 'żż.*at most 512 bytes; shorten it"):
        write_sparse(store, "opensearch", tmp_path / "o.jsonl", NAMES.__getitem__)
    assert not (tmp_path / "o.jsonl").exists()


def test_anserini_vectors_and_topics(store, tmp_path):
    write_sparse(store, "anserini", tmp_path / "vectors.jsonl", NAMES.__getitem__)
    assert (tmp_path / "vectors.jsonl").read_bytes().decode() == (
        '{"id": "a", "contents": "Title The text.", "vector": {"żaba": 150}}\n'
        '{"id": "b\\"", "contents": "Second", "vector": {"[PAD]": 10, "\\"": 225}}\n'
        '{"id": "c", "contents": "", "vector": {}}\n'
    )
    vectors = sp.csr_matrix(np.array([[0, 0.03, 0.021, 0, 0], [0, 0, 0, 0, 0]], dtype=np.float32))
    lines = list(anserini_topics([Query("q1", "x"), Query("q2", "")], vectors, NAMES.__getitem__))
    assert lines == ["q1\tżaba żaba żaba ##ing ##ing", "q2\t"]
    with pytest.raises(ValueError, match="has a tab or a line break"):
        list(anserini_topics([Query("q\t1", "x")], vectors[:1], str))


def test_what_cannot_be_written_is_refused_and_leaves_nothing(store, tmp_path):
    with pytest.raises(ValueError, match="'lucene' is not known; allowed: opensearch, anserini"):
        write_sparse(store, "lucene", tmp_path / "out", str)
    with pytest.raises(IndexError):
        write_sparse(store, "anserini", tmp_path / "out", NAMES[:1].__getitem__)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    with pytest.raises(ValueError, match="has no sparse vectors"):
        write_sparse(
            Store.create(tmp_path / "d", model=ModelInfo(name="m", fingerprint="f", width=2)), "anserini", tmp_path / "o", str
        )


def test_the_command_takes_names_from_the_models_tokenizer(store, tmp_path, monkeypatch):
    class Backend:
        def id_to_token(self, term):
            return NAMES[term]

    class Model:
        kind, width, fingerprint = "sparse", 5, "f"
        tokenizer = type("Tokenizer", (), {"backend": Backend()})

    monkeypatch.setattr(openembed, "load", lambda *_a, **_k: Model(), raising=False)
    target = tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["export", str(store.directory), "--to", f"anserini:{target}", "--json"])
    assert json.loads(result.stdout)["written"] == 3
    assert json.loads(target.read_text().splitlines()[0])["vector"] == {"żaba": 150}
