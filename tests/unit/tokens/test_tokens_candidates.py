"""What a token search passes on to be scored exactly: MUVERA's projected encodings, and PLAID's threshold."""

import json

import numpy as np
import pytest
from token_paths import COUNT, PATHS, WIDTH, forced, paths, segment

from openembed.index.tokens import muvera
from openembed.index.tokens.codec import Codec, encode_tokens
from openembed.index.tokens.files import TokenSegment, TokenSettings
from openembed.index.tokens.muvera import EncodingSettings, encode_fixed
from openembed.index.tokens.plaid import Plaid
from openembed.token_vectors import TokenVectors


@pytest.fixture(scope="module")
def residuals(documents):
    codec = Codec.train(documents.values_TD, 64, 2)
    return encode_tokens(codec, documents.values_TD, documents.offsets_N1)


# ---- PLAID's threshold


def by_definition(residuals, products_LK, threshold):
    """Sums of the greatest products with the kept centroids of a document, above the least product of all; 0 for none."""
    kept_K, scores = products_LK.max(axis=0) >= threshold, []
    for low, high in zip(residuals.offsets_N1[:-1], residuals.offsets_N1[1:], strict=True):
        codes = [code for code in residuals.codes_T[low:high] if kept_K[code]]
        scores.append((products_LK[:, codes] - products_LK.min()).max(axis=1).sum() if codes else 0.0)
    return np.array(scores)


@pytest.mark.parametrize("lanes", [1, 20, 70])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_tokens_of_centroids_below_the_threshold_count_for_nothing(residuals, documents, everyone, lanes, share):
    """Candidates are those of the definition but for what a byte a product loses, and the same on every path."""
    query_LD = documents.values_TD[np.random.default_rng(2).choice(len(documents.values_TD), lanes)]
    products_LK = query_LD @ residuals.codec.centroids_KD.T
    threshold = float(np.quantile(products_LK.max(axis=0), share))
    true, lost = by_definition(residuals, products_LK, threshold), lanes * np.ptp(products_LK) / 255
    emptied = np.count_nonzero(true == 0)
    assert share < 0.9 or 0 < emptied < COUNT
    for count in (30, COUNT - max(1, emptied)):
        found = []
        for path in PATHS:
            with forced(path):
                method = Plaid(documents=count, threshold=threshold)
                found.append(np.sort(method.candidates(residuals, query_LD, everyone)))
        assert all(np.array_equal(chosen, found[0]) for chosen in found)
        assert len(np.unique(found[0])) == count
        assert true[found[0]].min() >= np.sort(true)[-count] - lost
    if emptied:  # all that have tokens left come before any that has none
        assert (true[found[0]] > 0).all()


@paths
def test_a_threshold_changes_what_is_found_and_none_or_minus_one_change_nothing(residuals, queries, everyone, path):
    with forced(path):
        found = [
            np.sort(Plaid(documents=20, threshold=threshold).candidates(residuals, queries[3], everyone))
            for threshold in (None, -1, 0.95)
        ]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_a_threshold_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="should be a finite number"):
        Plaid(threshold=float("nan"))


# ---- projected encodings

FINAL = EncodingSettings(repetitions=5, planes=3, inner=7, final=96, seed=3)


def products(documents, queries, settings):
    return encode_fixed(queries, settings, document=False) @ encode_fixed(documents, settings, document=True).T


def test_projected_encodings_have_the_products_of_the_others_on_average(documents, queries):
    """Over seeds the difference is nothing but chance: its mean is within five standard errors, its spread that of 96 signs."""
    few, some, seeds = documents.select(range(30)), queries.select(range(6)), range(300)
    settings = [FINAL.model_copy(update={"seed": seed}) for seed in seeds]
    whole = np.array([products(few, some, s.model_copy(update={"final": None})) for s in settings])
    apart = np.array([products(few, some, s) for s in settings]) - whole
    error = apart.std(axis=0) / len(seeds) ** 0.5
    assert (np.abs(apart.mean(axis=0)) < 5 * error).all()
    lengths = [
        np.linalg.norm(encode_fixed(texts, settings[0].model_copy(update={"final": None}), document=document), axis=1)
        for texts, document in ((some, False), (few, True))
    ]
    assert 0.3 < np.mean(apart.std(axis=0) / (lengths[0][:, None] * lengths[1] / 96**0.5)) < 1.5


@pytest.mark.parametrize("shape", [(1, 0, 1, 1), (1, 0, 5, 3), (5, 3, 7, 96), (5, 3, 7, 280), (4, 3, 8, 256)])
def test_a_projection_is_a_matrix_of_signs(shape):
    """Projecting unit vectors gives its columns; no row comes twice, and as many as there are components turn, no more."""
    repetitions, planes, inner, final = shape
    settings = EncodingSettings(repetitions=repetitions, planes=planes, inner=inner, final=final)
    matrix_CE = muvera._projected(np.eye(settings.components, dtype=np.float32), final, 0) * final**0.5
    assert matrix_CE.shape == (settings.components, final)
    np.testing.assert_allclose(np.abs(matrix_CE), 1, atol=1e-4)
    assert settings.components < 8 or len(np.unique(np.sign(matrix_CE), axis=1).T) == final
    if final == settings.components == 256:
        np.testing.assert_allclose(matrix_CE @ matrix_CE.T, 256 * np.eye(256), atol=1e-2)


@paths
def test_projected_encodings_are_the_same_in_parts_again_and_on_every_path(documents, path, monkeypatch):
    expected = encode_fixed(documents, FINAL, document=True)
    assert expected.shape == (COUNT, 96)
    muvera._signs.cache_clear()
    with forced(path):
        monkeypatch.setattr(muvera, "WAITING", 280 * 17)
        np.testing.assert_allclose(encode_fixed(documents, FINAL, document=True), expected, atol=1e-5)
    empty = encode_fixed(TokenVectors.from_list([np.empty((0, WIDTH), np.float32)], WIDTH), FINAL, document=True)
    assert empty.tolist() == [[0.0] * 96]
    assert encode_fixed(TokenVectors.from_list([], WIDTH), FINAL, document=False).shape == (0, 96)
    other = encode_fixed(documents, FINAL.model_copy(update={"seed": 4}), document=True)
    assert np.abs(other - expected).max() > 0.1


@paths
def test_a_segment_says_how_its_encodings_are_projected(documents, queries, everyone, path, tmp_path):
    """Reopened it finds the same candidates; what it keeps is a byte a component of what was encoded; others open as before."""
    with forced(path):
        made = segment(documents, TokenSettings(precision="float32", encodings=FINAL), tmp_path)
        found = made.encodings.candidates(queries.select([2]), everyone, 40)
        again = TokenSegment(tmp_path, COUNT)
        assert again.info.encodings == FINAL
        assert (tmp_path / "encodings.u8").stat().st_size == 96 * COUNT
        assert np.array_equal(found, again.encodings.candidates(queries.select([2]), everyone, 40))
        values_NE = encode_fixed(documents, FINAL, document=True)
        kept_NE = (again.encodings.codes_NE.astype(np.float32) - 128) * again.encodings.scale_N[:, None]
        assert (np.abs(kept_NE - values_NE) <= 0.51 * again.encodings.scale_N[:, None]).all()
        scores = (encode_fixed(queries.select([2]), FINAL, document=False) @ values_NE.T)[0]
        assert len(np.intersect1d(found, np.argsort(-scores)[:40])) >= 36
    text = json.loads((tmp_path / "tokens.json").read_text())
    plain = segment(documents, TokenSettings(encodings=EncodingSettings(repetitions=2)))
    said = json.loads((plain.directory / "tokens.json").read_text())["encodings"]
    assert said == {"repetitions": 2, "planes": 4, "inner": 8, "seed": 0}  # what earlier versions wrote, and read
    (tmp_path / "tokens.json").write_text(json.dumps({**text, "encodings": {**text["encodings"], "final": 281}}))
    with pytest.raises(ValueError, match=r"tokens.json: .*final is 281 of 280 components"):
        TokenSegment(tmp_path, COUNT)
