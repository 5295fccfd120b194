import gzip
import json
import os
import shutil
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
from crash import dies_at
from store_fakes import BagOfWords

from openembed import bulk_output
from openembed.bulk import BulkConfig, encode_file, open_vectors
from openembed.vectors import VectorFormat

ROWS = [{"_id": f"d{n}", "title": f"Title {n}", "text": f"text number {n} of many"} for n in range(25)]
CONFIG = BulkConfig(chunk=4)
OUTPUTS = {"vectors.npy", "ids.jsonl", "meta.json"}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


@pytest.fixture
def whole(corpus, tmp_path):
    encode_file(BagOfWords(), corpus, tmp_path / "whole", CONFIG)
    return contents(tmp_path / "whole")


class Failing(BagOfWords):
    """Encodes so many texts and then fails."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit

    def encode(self, texts, **options):
        if self.encoded + len(texts) > self.limit:
            raise RuntimeError("interrupted")
        return super().encode(texts, **options)


def test_vectors_are_memory_mapped_and_in_the_order_of_the_ids(corpus, tmp_path, whole):
    encoded = encode_file(BagOfWords(), corpus, tmp_path / "whole", CONFIG)
    assert (encoded.count, encoded.width) == (25, 32)
    assert encoded.resumed == 25
    assert encoded.ids() == [row["_id"] for row in ROWS]
    vectors_ND = encoded.vectors()
    assert isinstance(vectors_ND, np.memmap)
    expected_ND = BagOfWords().encode([f"{row['title']} {row['text']}" for row in ROWS])
    np.testing.assert_array_equal(vectors_ND, expected_ND)
    assert set(whole) == OUTPUTS
    assert json.loads(whole["meta.json"])["model_fingerprint"] == BagOfWords().fingerprint


def test_killed_at_every_step_to_the_disk_it_resumes_with_the_same_bytes(corpus, tmp_path, whole):
    steps, out = 0, tmp_path / "0"
    while dies_at(steps, partial(encode_file, BagOfWords(), corpus, out, CONFIG)):
        assert not (out / "meta.json").exists() or contents(out).items() >= whole.items()
        encoder = BagOfWords()
        encoded = encode_file(encoder, corpus, out, CONFIG)
        assert contents(out) == whole, f"killed at step {steps}"
        assert encoder.encoded == 25 - encoded.resumed
        steps, out = steps + 1, tmp_path / f"{steps + 1}"
    assert steps > 20


def test_killed_again_while_resuming(corpus, tmp_path, whole):
    out = tmp_path / "out"
    for step in range(3, 60):
        if not dies_at(step, lambda: encode_file(BagOfWords(), corpus, out, CONFIG)):
            break
    else:
        pytest.fail("never came to an end")
    assert contents(out) == whole


def test_rows_after_the_last_saved_chunk_and_a_torn_journal_line_are_done_again(corpus, tmp_path, whole):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        encode_file(Failing(13), corpus, out, CONFIG)
    journal = (out / "journal.jsonl").read_bytes()
    assert journal.endswith(b'{"rows": 12}\n')
    assert set(contents(out)) == {"vectors.npy.partial", "journal.jsonl"}
    vectors = (out / "vectors.npy.partial").read_bytes()
    for cut in range(1, len(b'{"rows": 12}\n') + 1):
        (out / "journal.jsonl").write_bytes(journal[:-cut])
        (out / "vectors.npy.partial").write_bytes(vectors[:-1] + b"garbage" * 50)
        copy = tmp_path / f"copy{cut}"
        shutil.copytree(out, copy)
        with pytest.raises(RuntimeError):
            encode_file(Failing(5), corpus, copy, CONFIG)
        assert encode_file(BagOfWords(), corpus, copy, CONFIG).resumed == 12
        assert contents(copy) == whole


def test_no_space_midway_leaves_a_state_to_resume_from(corpus, tmp_path, whole, monkeypatch):
    out, real = tmp_path / "out", bulk_output.append_synced
    calls = []

    def full(file, data, path):
        calls.append(path)
        if len(calls) == 5:
            file.write(data[:100])
            raise OSError(28, "No space left on device", str(path))
        real(file, data, path)

    with monkeypatch.context() as patch:
        patch.setattr(bulk_output, "append_synced", full)
        with pytest.raises(OSError, match=r"No space left on device: .*vectors\.npy\.partial"):
            encode_file(BagOfWords(), corpus, out, CONFIG)
    assert encode_file(BagOfWords(), corpus, out, CONFIG).resumed == 8
    assert contents(out) == whole


def test_a_file_size_limit_midway_leaves_a_state_to_resume_from(corpus, tmp_path, whole):
    """The system itself refuses the write here, in the middle of a chunk."""
    import resource
    import signal

    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 32 * 4 * 10, 128 + 32 * 4 * 10))
        try:
            encode_file(BagOfWords(), corpus, out, CONFIG)
        except OSError as error:
            os._exit(7 if str(out / "vectors.npy.partial") in str(error) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert encode_file(BagOfWords(), corpus, out, CONFIG).resumed == 8
    assert contents(out) == whole


def test_too_little_space_is_said_before_anything_is_encoded(corpus, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 1000))
    encoder = BagOfWords()
    with pytest.raises(ValueError, match=r"GB of vectors to write, 0\.00 GB free"):
        encode_file(encoder, corpus, tmp_path / "out", CONFIG)
    assert encoder.encoded == 0
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("finished", [True, False])
def test_another_input_model_or_setting_needs_restart(corpus, tmp_path, finished):
    out = tmp_path / "out"
    if finished:
        encode_file(BagOfWords(), corpus, out, CONFIG)
    else:
        with pytest.raises(RuntimeError):
            encode_file(Failing(13), corpus, out, CONFIG)
    with pytest.raises(ValueError, match=r"begun with something else \(model_fingerprint is .*--restart"):
        encode_file(BagOfWords(name="other"), corpus, out, CONFIG)
    with pytest.raises(ValueError, match="normalize is False, was True"):
        encode_file(BagOfWords(), corpus, out, CONFIG.model_copy(update={"normalize": False}))
    corpus.write_text(corpus.read_text().replace("number 3", "number three"))
    with pytest.raises(ValueError, match="input_sha256 is"):
        encode_file(BagOfWords(), corpus, out, CONFIG)
    assert encode_file(BagOfWords(), corpus, out, CONFIG, restart=True).resumed == 0
    encode_file(BagOfWords(), corpus, tmp_path / "fresh", CONFIG)
    assert contents(out) == contents(tmp_path / "fresh")


def test_vectors_of_unknown_origin_and_a_cut_partial_file_are_refused(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "vectors.npy").write_bytes(b"precious")
    with pytest.raises(ValueError, match="not made by a finished run"):
        encode_file(BagOfWords(), corpus, out, CONFIG)
    assert (out / "vectors.npy").read_bytes() == b"precious"
    (out / "vectors.npy").unlink()
    with pytest.raises(RuntimeError):
        encode_file(Failing(13), corpus, out, CONFIG)
    os.truncate(out / "vectors.npy.partial", 300)
    with pytest.raises(ValueError, match="shorter than its journal says"):
        encode_file(BagOfWords(), corpus, out, CONFIG)


def test_queries_take_the_task_prompt_and_no_title(corpus, tmp_path):
    config = BulkConfig(kind="query", instruction="Find it", normalize=False, max_length=40)
    encoded = encode_file(BagOfWords(), corpus, tmp_path / "out", config)
    expected_ND = BagOfWords().encode_queries(
        [row["text"] for row in ROWS], instruction="Find it", normalize=False, max_length=40
    )
    np.testing.assert_array_equal(encoded.vectors(), expected_ND)
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["prompt"] == "Instruct: Find it\nQuery: "


def test_text_lines_gzip_empty_nul_and_very_long_texts(tmp_path):
    lines = ["first", "", "nul \0 inside", "long " * 200_000, "last without end"]
    with gzip.open(tmp_path / "texts.txt.gz", "wt") as file:
        file.write("\n".join(lines))
    encoded = encode_file(BagOfWords(), tmp_path / "texts.txt.gz", tmp_path / "out", CONFIG)
    assert encoded.ids() == ["1", "3", "4", "5"]
    np.testing.assert_array_equal(encoded.vectors(), BagOfWords().encode([line for line in lines if line]))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([b'{"text": "a"}', b'{"text": '], r"bad\.jsonl:2: malformed JSON"),
        ([b'{"text": "a"}', b"", b"[1]"], r"bad\.jsonl:3: expected a JSON object a line, got list"),
        (
            [b'{"_id": "a", "text": "x"}', b'{"_id": "b", "text": "x"}', b'{"_id": "a", "text": "y"}'],
            r"bad\.jsonl:3: duplicate id 'a', first on line 1",
        ),
        ([b'{"text": "a"}'] * 900 + [b'{"text": "\xff"}'], r"bad\.jsonl:901: not UTF-8"),
        ([b'{"text": "ab\\ud800"}'], r"bad\.jsonl:1: text holds a lone surrogate \(U\+D800 at character 2\)"),
        ([b'{"_id": "\\udfff", "text": "a"}'], r"bad\.jsonl:1: id holds a lone surrogate"),
        ([b'{"_id": "", "text": "a"}'], r"bad\.jsonl:1: the id is empty"),
        ([b'{"_id": 1.5, "text": "a"}'], r"bad\.jsonl:1: id must be a string, got float"),
        ([b'{"text": 3}'], r"bad\.jsonl:1: text must be a string, got int"),
        ([b'{"_id": "a", "body": "x"}'], r"bad\.jsonl:1: no 'text' \(the keys are _id, body\)"),
        ([], r"bad\.jsonl: holds no texts"),
    ],
)  # fmt: skip
def test_bad_input_is_named_before_anything_is_encoded(tmp_path, lines, message):
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    encoder = BagOfWords()
    with pytest.raises(ValueError, match=message):
        encode_file(encoder, tmp_path / "bad.jsonl", tmp_path / "out", CONFIG)
    assert encoder.encoded == 0
    assert not (tmp_path / "out").exists()


def test_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": os.urandom(30).hex()}) + "\n" for _ in range(500)).encode())
    for name, damaged in {"cut": whole[:-200], "flipped": whole[:3000] + b"\xff" * 50 + whole[3050:]}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl\.gz:\d+: (cannot be read|malformed|not UTF-8)"):
            encode_file(BagOfWords(), tmp_path / f"{name}.jsonl.gz", tmp_path / "out", CONFIG)


def test_a_byte_order_mark_and_windows_line_ends_are_dropped(tmp_path):
    (tmp_path / "w.jsonl").write_bytes(b'\xef\xbb\xbf{"_id": "a", "text": "x"}\r\n{"id": 7, "text": "y", "title": null}\r\n')
    assert encode_file(BagOfWords(), tmp_path / "w.jsonl", tmp_path / "out").ids() == ["a", "7"]


def test_vectors_that_are_not_finite_are_refused(corpus, tmp_path):
    class Broken(BagOfWords):
        def encode(self, texts, **options):
            return super().encode(texts, **options) * np.float32("nan")

    with pytest.raises(ValueError, match="the vector of 'd0' holds NaN or infinity"):
        encode_file(Broken(), corpus, tmp_path / "out", CONFIG)


def test_documents_take_the_task_they_are_asked_for(corpus, tmp_path):
    encoder = BagOfWords()
    plain = encode_file(encoder, corpus, tmp_path / "plain", BulkConfig()).vectors()
    asked = encode_file(encoder, corpus, tmp_path / "asked", BulkConfig(task="STS12")).vectors()
    same = encode_file(encoder, corpus, tmp_path / "same", BulkConfig(instruction="STS12")).vectors()
    np.testing.assert_array_equal(asked, same)
    assert not np.array_equal(asked, plain)


def test_a_finished_output_that_lost_its_vectors_is_not_taken_for_whole(corpus, tmp_path):
    encode_file(BagOfWords(), corpus, tmp_path / "out")
    path = tmp_path / "out" / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut short; pass --restart"):
        encode_file(BagOfWords(), corpus, tmp_path / "out")
    encode_file(BagOfWords(), corpus, tmp_path / "out", restart=True)
    assert encode_file(BagOfWords(), corpus, tmp_path / "out").resumed > 0


FORMATS = [("float16", None), ("int8", None), ("int8", 16), ("binary", 16), ("float32", 8)]


@pytest.mark.parametrize(("precision", "dimensions"), FORMATS)
def test_vectors_in_another_format(corpus, tmp_path, precision, dimensions, whole):
    config = CONFIG.model_copy(update={"precision": precision, "dimensions": dimensions})
    encoded = encode_file(BagOfWords(), corpus, tmp_path / "out", config)
    floats_ND = encode_file(BagOfWords(), corpus, tmp_path / "whole", CONFIG).vectors()
    expected = VectorFormat(precision=precision, dimensions=dimensions).apply(floats_ND)
    assert encoded.width == (dimensions or 32)
    np.testing.assert_array_equal(encoded.vectors(), expected.values_NC)
    np.testing.assert_array_equal(open_vectors(tmp_path / "out").to_float32(), expected.to_float32())
    assert set(contents(tmp_path / "out")) == OUTPUTS | ({"scales.npy"} if precision == "int8" else set())
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (meta.get("precision", "float32"), meta.get("dimensions")) == (precision, dimensions)
    assert meta["dtype"] == encoded.vectors().dtype.name
    assert meta["width"] == encoded.width
    assert set(json.loads(whole["meta.json"])) == set(meta) - {"precision", "dimensions"}
    assert encoded.warning == encode_file(BagOfWords(), corpus, tmp_path / "out", config).warning
    assert bool(encoded.warning) == (dimensions is not None)


def test_int8_killed_at_every_step_to_the_disk_resumes_with_the_same_bytes(corpus, tmp_path):
    config = CONFIG.model_copy(update={"precision": "int8"})
    encode_file(BagOfWords(), corpus, tmp_path / "whole", config)
    whole, steps, out = contents(tmp_path / "whole"), 0, tmp_path / "0"
    while dies_at(steps, partial(encode_file, BagOfWords(), corpus, out, config)):
        encode_file(BagOfWords(), corpus, out, config)
        assert contents(out) == whole, f"killed at step {steps}"
        steps, out = steps + 1, tmp_path / f"{steps + 1}"
    assert steps > 25


def test_another_format_needs_restart_and_leaves_nothing_of_the_one_before(corpus, tmp_path):
    out, int8 = tmp_path / "out", CONFIG.model_copy(update={"precision": "int8"})
    encode_file(BagOfWords(), corpus, out, int8)
    with pytest.raises(ValueError, match="dtype is 'float32', was 'int8'"):
        encode_file(BagOfWords(), corpus, out, CONFIG)
    with pytest.raises(ValueError, match="width is 16, was 32"):
        encode_file(BagOfWords(), corpus, out, int8.model_copy(update={"dimensions": 16}))
    encode_file(BagOfWords(), corpus, out, CONFIG, restart=True)
    assert set(contents(out)) == OUTPUTS


def test_scales_that_are_missing_or_cut_are_named(corpus, tmp_path):
    out, int8 = tmp_path / "out", CONFIG.model_copy(update={"precision": "int8"})
    encode_file(BagOfWords(), corpus, out, int8)
    whole = (out / "scales.npy").read_bytes()
    (out / "scales.npy").write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"scales\.npy is missing or cut short"):
        encode_file(BagOfWords(), corpus, out, int8)
    with pytest.raises(ValueError, match=r"scales\.npy: cannot be read"):
        open_vectors(out)
    (out / "scales.npy").unlink()
    with pytest.raises(ValueError, match=r"scales\.npy: cannot be read"):
        open_vectors(out)


def test_dimensions_that_no_vector_has_are_refused_before_anything_is_encoded(corpus, tmp_path):
    encoder = BagOfWords()
    with pytest.raises(ValueError, match="dimensions 33 is more than the 32"):
        encode_file(encoder, corpus, tmp_path / "out", CONFIG.model_copy(update={"dimensions": 33}))
    with pytest.raises(ValueError, match="options: dimensions"):
        encode_file(encoder, corpus, tmp_path / "out", CONFIG.model_copy(update={"dimensions": 0}))
    assert encoder.encoded == 0
    assert not (tmp_path / "out").exists()
