import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openembed.vectors import StoredVectors, VectorFormat, quantize, scores, truncation_warning, unit


def vectors(count=50, width=64, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32))


@pytest.mark.parametrize(
    ("precision", "dtype", "columns", "size", "error"),
    [("float32", "<f4", 64, 256, 0), ("float16", "<f2", 64, 128, 2e-4), ("int8", "i1", 64, 68, 2e-3)],
)
def test_what_is_stored_reads_back_within_its_rounding(precision, dtype, columns, size, error):
    values_ND, out = vectors(), VectorFormat(precision=precision)
    stored = out.apply(values_ND)
    assert (stored.precision, stored.width, len(stored)) == (precision, 64, 50)
    assert stored.values_NC.dtype == np.dtype(dtype)
    assert stored.values_NC.shape == (50, columns)
    assert out.bytes_per_vector(64) == size == sum(a.nbytes for a in (stored.values_NC, stored.scales_N) if a is not None) / 50
    assert np.abs(stored.to_float32() - values_ND).max() <= error


def test_int8_is_off_by_half_a_step_at_most_and_uses_the_whole_range():
    values_ND = vectors() * np.float32(37)
    stored = quantize(values_ND, "int8")
    assert (np.abs(stored.values_NC.astype(int)).max(axis=1) == 127).all()
    assert (np.abs(stored.to_float32() - values_ND) <= stored.scales_N[:, None] * 0.5001).all()


def test_binary_keeps_the_signs_and_its_scores_are_those_of_hamming_distance():
    values_ND = vectors()
    stored = VectorFormat(precision="binary").apply(values_ND)
    assert stored.values_NC.shape == (50, 8)
    assert stored.values_NC.dtype == np.uint8
    assert stored.width == 64
    np.testing.assert_array_equal(stored.to_float32() > 0, values_ND > 0)
    distances_NN = ((values_ND > 0)[:, None] != (values_ND > 0)[None]).sum(axis=2)
    np.testing.assert_allclose(scores(stored, stored), 1 - 2 * distances_NN / 64, atol=1e-6)
    np.testing.assert_array_equal(stored.binary().values_NC, stored.values_NC)


def test_the_bits_of_int8_are_those_of_the_vectors_but_for_numbers_rounded_to_zero():
    values_ND = vectors(200)
    codes = quantize(values_ND, "int8")
    different_ND = np.unpackbits(codes.binary().values_NC ^ np.packbits(values_ND > 0, axis=1), axis=1)
    assert (codes.values_NC[different_ND.astype(bool)] == 0).all()
    assert different_ND.mean() < 0.01


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
@given(
    arrays(np.float32, (7, 16), elements=st.floats(-1e4, 1e4, width=32)),
    st.permutations(range(7)),
)
def test_a_vector_gives_the_same_bytes_whatever_lies_beside_it(precision, values_ND, order):
    out = VectorFormat(dimensions=8, precision=precision)
    whole, moved = out.apply(values_ND), out.apply(values_ND[order])
    np.testing.assert_array_equal(moved.values_NC, whole[np.array(order)].values_NC)
    np.testing.assert_array_equal(moved.to_float32(), whole.to_float32()[order])
    for row in range(7):
        np.testing.assert_array_equal(out.apply(values_ND[row : row + 1]).values_NC[0], whole.values_NC[row])


def test_zeros_stay_zeros():
    for precision in ("float32", "float16", "int8"):
        assert not VectorFormat(dimensions=8, precision=precision).apply(np.zeros((2, 16), np.float32)).to_float32().any()


def test_truncation_takes_the_first_dimensions_at_length_one_or_as_they_are():
    values_ND = vectors()
    kept_ND = VectorFormat(dimensions=24).apply(values_ND).to_float32()
    np.testing.assert_allclose(np.linalg.norm(kept_ND, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(kept_ND, values_ND[:, :24] / np.linalg.norm(values_ND[:, :24], axis=1)[:, None], rtol=1e-6)
    np.testing.assert_array_equal(VectorFormat(dimensions=24).apply(values_ND, normalize=False).to_float32(), values_ND[:, :24])
    np.testing.assert_array_equal(VectorFormat(dimensions=64).apply(values_ND * 3).to_float32(), values_ND * 3)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_scores_are_the_inner_products_of_what_is_stored(precision, monkeypatch):
    monkeypatch.setattr("openembed.vectors.BLOCK", 7)
    documents, queries_QD = quantize(vectors(), precision), vectors(5, seed=1)
    expected_QN = queries_QD.astype(np.float64) @ documents.to_float32().astype(np.float64).T
    np.testing.assert_allclose(scores(queries_QD, documents), expected_QN, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VectorFormat(dimensions=65).apply(vectors()), "dimensions 65 is more than the 64 this model has"),
        (lambda: VectorFormat(dimensions=20, precision="binary").apply(vectors()), "multiple of 8 dimensions, got 20; use 16"),
        (lambda: quantize(vectors() * np.float32(1e6), "float16"), "above 65504"),
        (lambda: quantize(vectors(width=20), "binary"), "multiple of 8"),
        (lambda: scores(vectors(2, 32), quantize(vectors(), "int8")), "queries have 32 dimensions, the stored vectors 64"),
        (lambda: StoredVectors(np.zeros((2, 8), np.int8)), "int8 vectors come with their scales"),
        (lambda: StoredVectors(np.zeros((2, 8), np.int8), np.zeros(3, np.float32)), "2 vectors but 3 scales"),
        (lambda: StoredVectors(np.zeros((2, 8), np.float64)), "vectors of float64 are not known"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_warning_where_the_model_was_not_trained_to_be_cut():
    assert "does not say it was trained" in truncation_warning((), 256, 384)
    assert "trained to be cut to 64 dimensions or more" in truncation_warning((64, 128), 32, 384)
    assert truncation_warning((64, 128), 100, 384) is None
    assert truncation_warning((), None, 384) is None
    assert truncation_warning((), 384, 384) is None


TEXTS = ["one text", "another, longer text about judo", "", "the third"]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_the_encoder_gives_the_bytes_of_its_own_vectors_in_the_format(make_encoder, precision):
    encoder = make_encoder()
    expected = VectorFormat(dimensions=16, precision=precision).apply(encoder.encode(TEXTS))
    given = encoder.encode(TEXTS, dimensions=16, precision=precision)
    np.testing.assert_array_equal(given, expected.values_NC)
    assert given.dtype == expected.values_NC.dtype
    queries = encoder.encode_queries(TEXTS, dimensions=16, precision=precision, instruction="Find")
    assert queries.shape == given.shape
    assert (queries != given).any()


def test_the_encoder_warns_once_and_not_when_its_training_cut_it(make_encoder, caplog):
    encoder, trained = make_encoder(), make_encoder(matryoshka=(8, 32))
    with caplog.at_level(logging.WARNING):
        trained.encode(TEXTS, dimensions=16)
        assert not caplog.records
        encoder.encode(TEXTS, dimensions=16)
        encoder.encode(TEXTS, dimensions=8)
    assert len(caplog.records) == 1
    assert "does not say it was trained to be cut" in caplog.text


def test_being_trained_to_be_cut_is_saved_and_changes_no_fingerprint(make_encoder, tmp_path):
    import openembed

    encoder = make_encoder(matryoshka=(8, 32))
    assert encoder.fingerprint == make_encoder().fingerprint
    encoder.save(tmp_path / "model")
    assert openembed.load(tmp_path / "model").config.matryoshka == (8, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimensions": 0}, "encode: dimensions: .*greater than or equal to 1"),
        ({"dimensions": 33}, "dimensions 33 is more than the 32"),
        ({"dimensions": 12, "precision": "binary"}, "multiple of 8 dimensions"),
        ({"precision": "int4"}, r"encode: precision: .*'float32', 'float16', 'int8' or 'binary' \(got 'int4'\)"),
        ({"precision": "int8", "normalize": False}, "have no lengths"),
    ],
)
def test_the_encoder_refuses_formats_that_cannot_be(make_encoder, options, message):
    with pytest.raises(ValueError, match=message):
        make_encoder().encode(TEXTS, **options)
