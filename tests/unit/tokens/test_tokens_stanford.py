"""Directories of ColBERT and fast-plaid: what is written is read again, and unpacked as ColBERT unpacks it."""

import itertools
import json

import numpy as np
import pytest
import torch
from token_paths import clustered

from openembed.index.tokens.codec import Codec, encode_tokens
from openembed.index.tokens.files import TokenSegment, TokenSettings
from openembed.index.tokens.plaid import Plaid
from openembed.index.tokens.search import Tokens, search
from openembed.index.tokens.stanford import read_plaid, write_plaid, write_segment

WIDTH = 32


@pytest.fixture(scope="module")
def documents():
    return clustered(np.random.default_rng(0), 70, WIDTH)


def made(documents, bits):
    return encode_tokens(Codec.train(documents.values_TD, 16, bits), documents.values_TD, documents.offsets_N1)


def unpacked_as_colbert_does(residuals_TB, weights, bits):
    """Through tables of bytes: fields of a byte, highest first, each with its bits turned round."""
    turned = [int(f"{field:0{bits}b}"[::-1], 2) for field in range(2**bits)]
    fields = [[turned[byte >> shift & 2**bits - 1] for shift in range(8 - bits, -1, -bits)] for byte in range(256)]
    table = np.asarray(weights)[np.array(fields)]
    return table[residuals_TB].reshape(len(residuals_TB), -1)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("layout", ["colbert", "fast-plaid"])
def test_an_index_is_written_and_read_again(documents, bits, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("openembed.index.tokens.stanford.CHUNK", 30)
    residuals = made(documents, bits)
    write_plaid(tmp_path / "out", residuals, layout)
    found = read_plaid(tmp_path / "out")
    for name in ("packed_TB", "codes_T", "places_T", "owners_T", "starts_K1", "offsets_N1"):
        np.testing.assert_array_equal(getattr(found, name), getattr(residuals, name))
    np.testing.assert_allclose(found.codec.centroids_KD, residuals.codec.centroids_KD, atol=1e-3)
    np.testing.assert_array_equal(found.codec.cutoffs, residuals.codec.cutoffs)
    with pytest.raises(FileExistsError, match="not empty"):
        write_plaid(tmp_path / "out", residuals, layout)


@pytest.mark.parametrize("bits", [2, 4])
def test_its_files_say_to_colbert_what_ours_say_to_us(documents, bits, tmp_path):
    residuals = made(documents, bits)
    write_plaid(tmp_path, residuals, "colbert")
    codes = torch.load(tmp_path / "0.codes.pt", weights_only=True).numpy()
    packed = torch.load(tmp_path / "0.residuals.pt", weights_only=True).numpy()
    centroids = torch.load(tmp_path / "centroids.pt", weights_only=True).numpy()
    _, weights = torch.load(tmp_path / "buckets.pt", weights_only=True)
    values = centroids[codes] + unpacked_as_colbert_does(packed, weights.numpy(), bits)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    np.testing.assert_allclose(values, residuals.reconstruct(np.arange(len(codes))), atol=1e-6)
    lists, lengths = torch.load(tmp_path / "ivf.pid.pt", weights_only=True)
    bounds = np.concatenate([[0], np.cumsum(lengths.numpy())])
    owners = np.repeat(np.arange(70), documents.lengths_N)
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        assert lists[low:high].tolist() == sorted(set(owners[codes == number].tolist()))
    assert json.loads((tmp_path / "doclens.0.json").read_text()) == documents.lengths_N.tolist()


def test_an_index_is_there_as_a_whole_or_not_at_all(documents, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError("no space left")

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("openembed.index.tokens.stanford._save_lists", full)
    for name in ("new", "empty"):
        with pytest.raises(OSError, match="no space left"):
            write_plaid(tmp_path / name, made(documents, 2))
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    with pytest.raises(ValueError, match="coded_from=1"):
        write_plaid(tmp_path / "new", None)
    assert TokenSettings(coded_from=1).coded_from == 1


def test_what_is_read_becomes_a_segment_that_is_searched(documents, tmp_path):
    residuals = made(documents, 4)
    write_plaid(tmp_path / "theirs", residuals)
    (tmp_path / "ours").mkdir()
    write_segment(tmp_path / "ours", read_plaid(tmp_path / "theirs"))
    parts = [Tokens(TokenSegment(tmp_path / "ours", 70), np.ones(70, dtype=bool))]
    queries = documents.select(range(10))
    found = search(queries, parts, 3, str, Plaid(documents=30))
    assert [row[0][0] for row in found] == list(range(10))


def test_damage_and_other_formats_are_named(documents, tmp_path):
    write_plaid(tmp_path / "out", made(documents, 2), "colbert")
    for name in ("metadata.json", "centroids.pt", "buckets.pt", "0.codes.pt", "0.residuals.pt", "doclens.0.json"):
        path = tmp_path / "out" / name
        kept = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=name):
            read_plaid(tmp_path / "out")
        path.write_bytes(kept[:20])
        with pytest.raises(ValueError, match=name):
            read_plaid(tmp_path / "out")
        path.write_bytes(kept)
    (tmp_path / "out/doclens.0.json").write_text("[1]")
    with pytest.raises(ValueError, match="chunk 0 differ"):
        read_plaid(tmp_path / "out")
    (tmp_path / "out/metadata.json").write_text('{"num_chunks": 1, "nbits": 1}')
    with pytest.raises(ValueError, match="2 or 4 bits can be read"):
        read_plaid(tmp_path / "out")
    with pytest.raises(ValueError, match="whole bytes"):
        write_plaid(tmp_path / "odd", made(clustered(np.random.default_rng(1), 40, 3), 2))
