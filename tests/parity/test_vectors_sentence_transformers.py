"""Our stored vectors beside sentence-transformers' ``quantize_embeddings`` and ``truncate_embeddings``."""

import numpy as np
import pytest

from openembed.vectors import quantize, unit

quantization = pytest.importorskip("sentence_transformers.util.quantization")


@pytest.fixture(scope="module")
def vectors_ND():
    values_ND = np.random.default_rng(0).standard_normal((100, 384), dtype=np.float32)
    values_ND[0, :5] = [0.0, -0.0, 1e-30, -1e-30, np.float32(1e-45)]
    return unit(values_ND)


def test_binary_has_the_bits_of_ubinary_and_binary(vectors_ND):
    ours = quantize(vectors_ND, "binary").values_NC
    np.testing.assert_array_equal(ours, quantization.quantize_embeddings(vectors_ND, "ubinary"))
    signed = quantization.quantize_embeddings(vectors_ND, "binary")
    np.testing.assert_array_equal((ours.astype(np.int16) - 128).astype(np.int8), signed)


@pytest.mark.parametrize("precision", ["float32", "ubinary"])
def test_a_model_cut_in_both_libraries_gives_the_same_vectors(make_encoder, tmp_path, precision):
    from sentence_transformers import SentenceTransformer

    make_encoder().save(tmp_path / "model")
    texts = ["a text", "another text of more words", "third"]
    theirs = SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, truncate_dim=16, device="cpu")
    their_ND = theirs.encode(texts, normalize_embeddings=True, precision=precision)
    ours_ND = make_encoder().encode(texts, dimensions=16, precision={"ubinary": "binary"}.get(precision, precision))
    if precision == "ubinary":
        np.testing.assert_array_equal(ours_ND, their_ND)
    else:
        np.testing.assert_allclose(ours_ND, their_ND, atol=1e-6)
