import numpy as np
import pytest

from openembed import rescoring
from openembed.rescoring import BinarySearch, recall
from openembed.vectors import quantize, scores, unit


def clusters(count, width, seed):
    """Vectors around a hundred centres, so that there are neighbours to be found."""
    centres_KD = np.random.default_rng(0).standard_normal((100, width), dtype=np.float32)
    noise = np.random.default_rng(seed)
    return unit(centres_KD[noise.integers(0, 100, count)] + noise.standard_normal((count, width), dtype=np.float32))


DOCUMENTS_ND, QUERIES_QD = clusters(3000, 72, 1), clusters(40, 72, 2)
EXACT_QK = np.argsort(-(QUERIES_QD @ DOCUMENTS_ND.T), axis=1, kind="stable")[:, :10]


@pytest.mark.parametrize("block", [16_384, 700])
def test_without_a_second_pass_it_ranks_by_hamming_distance(block, monkeypatch):
    monkeypatch.setattr(rescoring, "BLOCK", block)
    distances_QN = ((QUERIES_QD > 0)[:, None] != (DOCUMENTS_ND > 0)[None]).sum(axis=2)
    expected_QK = np.argsort(distances_QN, axis=1, kind="stable")[:, :10]
    found_QK, scores_QK = BinarySearch(quantize(DOCUMENTS_ND, "binary")).search(QUERIES_QD, 10, oversampling=0)
    np.testing.assert_array_equal(found_QK, expected_QK)
    np.testing.assert_allclose(scores_QK, 1 - 2 * np.take_along_axis(distances_QN, expected_QK, 1) / 72, rtol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_with_every_document_a_candidate_it_is_exact_in_the_precision_stored(precision):
    documents = quantize(DOCUMENTS_ND, precision)
    scores_QN = scores(QUERIES_QD, documents)
    found_QK, scores_QK = BinarySearch(documents).search(QUERIES_QD, 10, oversampling=300)
    np.testing.assert_allclose(scores_QK, np.sort(scores_QN, axis=1)[:, :-11:-1], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(scores_QN, found_QK, 1), scores_QK, atol=1e-6)


def test_rescoring_and_more_candidates_find_more():
    def of(precision, oversampling):
        found_QK, _ = BinarySearch(quantize(DOCUMENTS_ND, precision)).search(QUERIES_QD, 10, oversampling=oversampling)
        return recall(found_QK, EXACT_QK)

    bits, signs, int8, more = of("binary", 0), of("binary", 4), of("int8", 4), of("int8", 20)
    assert bits < signs < int8 < more
    assert more > 0.95


def test_bits_kept_apart_give_what_bits_made_of_the_documents_give():
    documents, bits = quantize(DOCUMENTS_ND, "float32"), quantize(DOCUMENTS_ND, "binary")
    made = BinarySearch(documents).search(QUERIES_QD, 5)
    given = BinarySearch(documents, bits).search(QUERIES_QD, 5)
    np.testing.assert_array_equal(made[0], given[0])
    np.testing.assert_array_equal(made[1], given[1])


def test_counting_bits_without_numpy_2(monkeypatch):
    if not hasattr(np, "bitwise_count"):
        pytest.skip("this numpy has no other way")
    expected = BinarySearch(quantize(DOCUMENTS_ND, "int8")).search(QUERIES_QD, 5)
    monkeypatch.delattr(np, "bitwise_count")
    for before, after in zip(expected, BinarySearch(quantize(DOCUMENTS_ND, "int8")).search(QUERIES_QD, 5), strict=True):
        np.testing.assert_array_equal(before, after)


def test_fewer_documents_than_asked_for_and_none():
    found_QK, scores_QK = BinarySearch(quantize(DOCUMENTS_ND[:3], "int8")).search(QUERIES_QD, 10)
    assert found_QK.shape == scores_QK.shape == (40, 3)
    assert (np.sort(found_QK, axis=1) == [0, 1, 2]).all()
    assert BinarySearch(quantize(DOCUMENTS_ND[:0], "int8")).search(QUERIES_QD, 10)[0].shape == (40, 0)


def test_what_cannot_be_is_refused():
    search = BinarySearch(quantize(DOCUMENTS_ND, "int8"))
    with pytest.raises(ValueError, match=r"queries of shape \(40, 64\); \(count, 72\) expected"):
        search.search(QUERIES_QD[:, :64], 10)
    with pytest.raises(ValueError, match="k must be 1 or more"):
        search.search(QUERIES_QD, 0)
    with pytest.raises(ValueError, match="3000 documents but 10 rows of bits"):
        BinarySearch(quantize(DOCUMENTS_ND, "int8"), quantize(DOCUMENTS_ND[:10], "binary"))


def test_recall_counts_what_was_found_whatever_its_order():
    assert recall(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [4, 5]])) == 0.75
    assert recall(np.empty((2, 0)), np.empty((2, 0))) == 1.0
