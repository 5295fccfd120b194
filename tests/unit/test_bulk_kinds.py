"""Bulk encoding of sparse and token models: resumable as dense ones, the same bytes after any death; and mining with them."""

import json
from functools import partial

import numpy as np
import pytest
from crash import dies_at
from kind_fakes import WordTokens, WordWeights
from scipy.sparse import csr_matrix
from typer.testing import CliRunner

import openembed
from openembed.bulk import BulkConfig, encode_file, encoded_chunk, open_vectors
from openembed.cli import app
from openembed.data.mine import MineConfig, mine
from openembed.data.teachers import EncoderTeacher, Prompted
from openembed.documents import read_documents
from openembed.records import Document, Example, Query
from openembed.token_vectors import TokenVectors
from openembed.vector_files import StoredArray, open_encoded

TEXTS = ["red planet mars", "", "blue planet", "...", "rice", "the red rose is red", "one two three four five"] * 2
CONFIG = BulkConfig(chunk=3)
FILES = {
    "sparse": {"indptr.npy", "indices.npy", "data.npy", "ids.jsonl", "meta.json"},
    "tokens": {"offsets.npy", "vectors.npy", "ids.jsonl", "meta.json"},
}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"_id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    return path


@pytest.fixture(params=[WordWeights, WordTokens])
def model(request):
    return request.param


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def test_what_is_read_back_is_what_the_encoder_gives(corpus, tmp_path, model):
    encoded = encode_file(model(), corpus, tmp_path / "out", CONFIG)
    found, expected = encoded.representations(), model().encode(TEXTS)
    assert set(contents(tmp_path / "out")) == FILES[model.kind]
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta["representation"], meta["width"], meta["count"]) == (model.kind, model.width, len(TEXTS))
    assert "normalize" not in meta
    if model is WordWeights:
        assert isinstance(found, csr_matrix)
        assert found.shape == (len(TEXTS), 512)
        assert abs(found - expected).nnz == 0
        assert encoded.entries == meta["entries"] == expected.nnz
        assert np.load(tmp_path / "out" / "indices.npy").dtype == np.int32
    else:
        assert isinstance(found, TokenVectors)
        np.testing.assert_array_equal(found.offsets_N1, expected.offsets_N1)
        np.testing.assert_array_equal(found.values_TD, expected.values_TD)
        assert encoded.entries == meta["entries"] == len(expected.values_TD)
        assert isinstance(found.values_TD, np.memmap)


def test_killed_at_every_step_to_the_disk_it_resumes_with_the_same_bytes(corpus, tmp_path, model):
    encode_file(model(), corpus, tmp_path / "whole", CONFIG)
    whole, steps, out = contents(tmp_path / "whole"), 0, tmp_path / "0"
    while dies_at(steps, partial(encode_file, model(), corpus, out, CONFIG)):
        assert not (out / "meta.json").exists() or contents(out).items() >= whole.items()
        encoder = model()
        encoded = encode_file(encoder, corpus, out, CONFIG)
        assert contents(out) == whole, f"killed at step {steps}"
        assert len(encoder.encoded) == len(TEXTS) - encoded.resumed
        steps, out = steps + 1, tmp_path / f"{steps + 1}"
    assert steps > 20


def test_killed_again_while_resuming(corpus, tmp_path, model):
    encode_file(model(), corpus, tmp_path / "whole", CONFIG)
    out = tmp_path / "out"
    for step in range(3, 60):
        if not dies_at(step, lambda: encode_file(model(), corpus, out, CONFIG)):
            break
    else:
        pytest.fail("never came to an end")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_output_returns_at_once_and_a_cut_one_is_named(corpus, tmp_path, model):
    encode_file(model(), corpus, tmp_path / "out", CONFIG)
    encoder = model()
    again = encode_file(encoder, corpus, tmp_path / "out", CONFIG)
    assert (again.resumed, encoder.encoded, again.kind) == (len(TEXTS), [], model.kind)
    path = tmp_path / "out" / ("data.npy" if model is WordWeights else "vectors.npy")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path.name} is missing or cut short; pass --restart"):
        encode_file(model(), corpus, tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=str(tmp_path / "out")):
        open_encoded(tmp_path / "out")
    encode_file(model(), corpus, tmp_path / "out", CONFIG, restart=True)
    assert open_encoded(tmp_path / "out") is not None


def test_texts_without_any_entry(tmp_path, model):
    (tmp_path / "t.txt").write_text("...\n!!!\n")
    encoded = encode_file(model(), tmp_path / "t.txt", tmp_path / "out", BulkConfig(chunk=1))
    assert (encoded.entries, encoded.count) == (0, 2)
    found = encoded.representations()
    assert (found.nnz if model is WordWeights else found.lengths_N.sum()) == 0


def test_another_kind_in_the_same_folder_is_refused(corpus, tmp_path):
    encode_file(WordWeights(), corpus, tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match="representation is 'tokens', was 'sparse'"):
        encode_file(WordTokens(), corpus, tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match="holds sparse representations, dense vectors are needed here"):
        open_vectors(tmp_path / "out")
    encode_file(WordTokens(), corpus, tmp_path / "out", CONFIG, restart=True)
    assert set(contents(tmp_path / "out")) == FILES["tokens"]


def test_token_vectors_in_half_precision(corpus, tmp_path):
    half = encode_file(WordTokens(), corpus, tmp_path / "out", BulkConfig(chunk=3, precision="float16")).representations()
    assert half.values_TD.dtype == np.float16
    np.testing.assert_allclose(half.values_TD.astype(np.float32), WordTokens().encode(TEXTS).values_TD, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "setting", "allowed"),
    [
        (WordTokens, {"precision": "int8"}, "float32 or float16"),
        (WordTokens, {"dimensions": 8}, "float32 or float16"),
        (WordWeights, {"precision": "float16"}, "float32"),
        (WordWeights, {"dimensions": 8}, "float32"),
    ],
)
def test_settings_of_dense_vectors_are_refused(corpus, tmp_path, model, setting, allowed):
    ((name, given),) = setting.items()
    with pytest.raises(ValueError, match=f"^{name} {given}: this model gives .* stored whole, in {allowed}; leave it out$"):
        encode_file(model(), corpus, tmp_path / "out", BulkConfig(**setting))
    assert not (tmp_path / "out" / "journal.jsonl").exists()


def test_what_is_not_finite_is_named(corpus, tmp_path, model):
    class Broken(model):
        def encode(self, texts, **options):
            encoded = super().encode(texts, **options)
            (encoded.data if model is WordWeights else encoded.values_TD)[-1] = np.nan
            return encoded

    with pytest.raises(ValueError, match="the vector of 'd13' holds NaN or infinity"):
        encode_file(Broken(), corpus, tmp_path / "out", BulkConfig(chunk=100))


def elsewhere(model, order):
    """A model that gives its chunks in another order, as a cluster does."""

    class Elsewhere(model):
        def encode_chunks(self, path, numbers, config):
            chunks = [list(read_documents(path))[3 * number : 3 * number + 3] for number in range(-(-len(TEXTS) // 3))]
            for number in order:
                if number in numbers:
                    yield number, encoded_chunk(self, config, chunks[number])

        def wrap(self, wrapper):
            raise AssertionError

    return Elsewhere()


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (1, 0, 3, 4, 2), (0, 2, 1, 4, 3)])
def test_chunks_out_of_turn_give_the_same_files(corpus, tmp_path, model, order):
    encode_file(model(), corpus, tmp_path / "whole", CONFIG)
    encode_file(elsewhere(model, order), corpus, tmp_path / "out", CONFIG)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_chunks_out_of_turn_survive_being_killed_at_every_step(corpus, tmp_path, model):
    encode_file(model(), corpus, tmp_path / "whole", CONFIG)
    whole, steps, out, most = contents(tmp_path / "whole"), 0, tmp_path / "0", 0
    while dies_at(steps, partial(encode_file, elsewhere(model, (2, 1, 4, 0, 3)), corpus, out, CONFIG)):
        encoder = elsewhere(model, (4, 3, 2, 1, 0)) if steps % 2 else model()
        encoded = encode_file(encoder, corpus, out, CONFIG)
        assert contents(out) == whole, f"killed at step {steps}"
        assert len(encoder.encoded) == len(TEXTS) - encoded.resumed
        most, steps, out = max(most, encoded.resumed), steps + 1, tmp_path / f"{steps + 1}"
    assert steps > 30
    assert most == len(TEXTS)


def test_a_waiting_chunk_that_is_damaged_is_named_and_a_new_beginning_removes_it(corpus, tmp_path, model):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"{len(TEXTS)} texts before, 5 now"):
        encode_file(elsewhere(model, (2, 4)), corpus, out, CONFIG)  # the last chunk has two texts
    (out / ".waiting-2.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"\.waiting-2\.npz: cannot be read .* pass --restart"):
        encode_file(model(), corpus, out, CONFIG)
    encode_file(model(), corpus, out, CONFIG, restart=True)
    assert set(contents(out)) == FILES[model.kind]


def test_files_of_the_users_own_are_left_where_they_are(corpus, tmp_path, model):
    out, own = tmp_path / "out", ("chunk-1.npz", "chunk-mine.npz", ".waiting-mine.npz", ".waiting-1.npz.bak")
    out.mkdir()
    for name in own:
        (out / name).write_bytes(b"precious")
    for encoder, restart in ((elsewhere(model, (4, 3, 2, 1, 0)), False), (model(), True)):
        encode_file(encoder, corpus, out, CONFIG, restart=restart)
        assert {name: (out / name).read_bytes() for name in own} == dict.fromkeys(own, b"precious")
        assert set(contents(out)) == FILES[model.kind] | set(own)


def test_headers_are_of_one_length():
    for shape in ((0,), (7,), (10**12,)):
        array = StoredArray("data.npy", np.dtype("<f4"), shape, "entries")
        assert len(array.header) == len(StoredArray("data.npy", np.dtype("<f4"), (0,), "entries").header)


def test_the_command_says_what_there_is(corpus, tmp_path, model, monkeypatch):
    monkeypatch.setattr(openembed, "load", lambda *_a, **_k: model())
    done = CliRunner().invoke(app, ["encode", "words", str(corpus), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert ("terms each, of 512" if model is WordWeights else "vectors of width 16 each") in done.output
    report = json.loads(CliRunner().invoke(app, ["encode", "m", str(corpus), "-o", str(tmp_path / "out"), "--json"]).stdout)
    assert (report["kind"], report["count"]) == (model.kind, len(TEXTS))
    arrays = [np.load(path).nbytes for path in (tmp_path / "out").glob("*.npy")]
    assert report["bytes"] == sum(arrays)


DOCUMENTS = [
    Document(f"d{n}", f"{a} {b} {n}") for n, (a, b) in enumerate([("red", "apple"), ("green", "pear"), ("blue", "sky")] * 6)
]


def test_mining_with_a_teacher_of_another_kind(model):
    examples = [
        Example(Query("q0", "red apple"), (DOCUMENTS[0],), (), "s"),
        Example(Query("q1", "pear"), (DOCUMENTS[1],), (), "s"),
    ]
    config = MineConfig(keep=2, pool=5, filter={"kind": "none"})
    mined = mine(examples, iter(DOCUMENTS), config, model())
    first = mined.examples[0]
    assert all("red apple" in document.text for document in first.negatives)
    assert "d0" not in {document.id for document in first.negatives}
    assert all("pear" in document.text for document in mined.examples[1].negatives)
    assert mined.notes[0]["mined"]["teacher"] == model().fingerprint


def test_a_teacher_scores_as_it_searches(model):
    queries, documents = model().encode(["red apple", "sky"]), model().encode([document.text for document in DOCUMENTS])
    teacher = EncoderTeacher("t", queries, documents)
    assert teacher.scale == "lexical"
    found = teacher.search(np.array([1, 0]), 5)
    np.testing.assert_array_equal(teacher.score(1, found.documents_QK[0]), found.scores_QK[0])
    below = teacher.search(np.array([1]), 5, found.scores_QK[:1, 0])
    assert (below.scores_QK < found.scores_QK[0, 0]).all()
    assert below.above_Q[0] == (teacher.score(1, np.arange(len(DOCUMENTS))) >= found.scores_QK[0, 0]).sum()


def test_a_teacher_of_two_sides_is_asked_for_queries_as_queries():
    class Sided(WordWeights):
        sided, sides = True, ()

        def encode(self, texts, *, as_queries=False, **options):
            self.sides = (*self.sides, as_queries)
            return super().encode(texts, **options)

    encoder = Sided()
    teacher = Prompted(encoder, template="query: ")
    teacher.encode_queries(["a"], normalize=True)
    teacher.encode_documents(["a"])
    assert encoder.sides == (True, False)
    assert encoder.encoded == ["query: a", "a"]
    assert teacher.kind == "sparse"
