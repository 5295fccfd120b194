"""Multi-vector index: the codec and what searches it, XTR's scores, encodings, pooling, and files that are damaged."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from token_paths import COUNT, PATHS, WIDTH, clustered, drawn, fast_maxsim, forced, paths, segment

from openembed.index.tokens import clusters, warp
from openembed.index.tokens.clusters import k_means, nearest
from openembed.index.tokens.codec import Codec, encode_tokens
from openembed.index.tokens.coding import Panel
from openembed.index.tokens.exact import TokenMatrix
from openembed.index.tokens.field import TokenField
from openembed.index.tokens.files import TokenCoding, TokenSegment, TokenSettings, TokenWriter
from openembed.index.tokens.methods import EXACT
from openembed.index.tokens.muvera import EncodingSettings, Muvera, encode_fixed
from openembed.index.tokens.plaid import Plaid, as_bytes
from openembed.index.tokens.pooling import pool_tokens
from openembed.index.tokens.search import Tokens, explain, rerank, search
from openembed.index.tokens.warp import Warp, nearest_holding
from openembed.index.tokens.xtr import Retrieved, Xtr, retrieve, retrieve_coded, scores_of
from openembed.token_vectors import TokenVectors

CODED = {"coded_from": 100, "clusters": 64}


def coded(documents, bits, unit=None):
    values_TD = documents.values_TD
    codec = Codec.train(values_TD, 64, bits)
    codec = codec if unit is None else Codec(codec.centroids_KD, codec.cutoffs, codec.weights, unit)
    return encode_tokens(codec, values_TD, documents.offsets_N1)


def overlap(found, expected):
    return np.mean([len({n for n, _ in a} & {n for n, _ in b}) / len(b) for a, b in zip(found, expected, strict=True)])


# ---- the codec


def test_more_bits_and_more_centroids_lose_less(documents):
    """Bounds are four times what a uniform quantizer of the residuals' spread loses."""
    tokens, lost = np.arange(len(documents.values_TD)), {}
    for bits in (2, 4):
        for count in (1, 64):
            codec = Codec.train(documents.values_TD, count, bits)
            made = encode_tokens(codec, documents.values_TD, documents.offsets_N1).reconstruct(tokens)
            np.testing.assert_allclose(np.linalg.norm(made, axis=1), 1, atol=1e-5)
            lost[bits, count] = np.linalg.norm(made - documents.values_TD, axis=1).mean()
    assert lost[4, 64] < lost[2, 64] < lost[2, 1]
    assert lost[4, 64] < lost[4, 1]
    assert lost[4, 64] < 0.1
    assert lost[2, 64] < 0.35


@paths
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("width", [5, 24, 70])
def test_packing_round_trips_and_paths_agree(bits, width, path):
    """Coding a reconstructed residual gives the same buckets: nothing is lost but what quantizing loses."""
    documents = clustered(np.random.default_rng(1), 60, width)
    with forced(path):
        residuals = coded(documents, bits, unit=False)
        codec, tokens = residuals.codec, np.arange(len(documents.values_TD))
        made = residuals.reconstruct(tokens)
        again = codec.pack(made, residuals.codes_T)
    np.testing.assert_array_equal(again, residuals.packed_TB[residuals.places_T])
    with forced("numpy"):
        np.testing.assert_allclose(residuals.reconstruct(tokens), made, atol=1e-6)
        np.testing.assert_array_equal(
            codec.pack(documents.values_TD, residuals.codes_T), residuals.packed_TB[residuals.places_T]
        )


@paths
@pytest.mark.parametrize("bits", [2, 4])
def test_products_of_codes_are_those_of_reconstructed_tokens(documents, queries, everyone, bits, path):
    residuals, query_LD = coded(documents, bits, unit=False), queries[3]
    with forced(path):
        everything = search_runs(residuals, query_LD, everyone)
    made = residuals.reconstruct(np.arange(len(documents.values_TD)))
    expected = [fast_maxsim(query_LD, made[low:high]) for low, high in zip(*bounds(documents), strict=True)]
    np.testing.assert_allclose(everything, expected, atol=1e-4)


def search_runs(residuals, query_LD, everyone):
    positions, scores = Warp(probes=64).scores(residuals, query_LD, everyone)
    assert positions.tolist() == list(range(COUNT))
    return scores


def bounds(documents):
    return documents.offsets_N1[:-1], documents.offsets_N1[1:]


@paths
@pytest.mark.parametrize("unit", [False, True])
def test_plaid_with_everything_probed_and_kept_is_exact_on_reconstructed_vectors(documents, queries, everyone, path, unit):
    residuals = coded(documents, 4, unit)
    made = residuals.reconstruct(np.arange(len(documents.values_TD)))
    expected = [fast_maxsim(queries[5], made[low:high]) for low, high in zip(*bounds(documents), strict=True)]
    with forced(path):
        chosen = np.sort(Plaid(documents=COUNT, probes=64).candidates(residuals, queries[5], everyone))
        assert chosen.tolist() == list(range(COUNT))
        np.testing.assert_allclose(residuals.maxsim(queries[5], chosen), expected, atol=1e-4)


@pytest.mark.parametrize("lanes", [1, 16, 17, 33, 70])
def test_scores_by_centroids_are_the_same_on_both_paths(documents, lanes):
    residuals, random = coded(documents, 2), np.random.default_rng(2)
    query_LD = random.standard_normal((lanes, WIDTH)).astype(np.float32)
    table_KL = as_bytes(query_LD @ residuals.codec.centroids_KD.T)
    found = []
    for path in PATHS:
        with forced(path):
            found.append(residuals.near(table_KL, np.arange(COUNT)))
    assert all((scores == found[0]).all() for scores in found)
    values_TD = residuals.codec.centroids_KD[residuals.codes_T]
    true = [fast_maxsim(query_LD, values_TD[low:high]) for low, high in zip(*bounds(documents), strict=True)]
    assert np.corrcoef(found[0], true)[0, 1] > 0.999


@paths
def test_k_means_finds_what_is_there(path, monkeypatch):
    random = np.random.default_rng(3)
    centres = np.eye(8, 20, dtype=np.float32)
    values_TD = np.repeat(centres, 50, axis=0) + 0.01 * random.standard_normal((400, 20)).astype(np.float32)
    monkeypatch.setattr(clusters, "BLOCK", 37)
    with forced(path):
        found = k_means(values_TD, 8, np.random.default_rng(0), unit=True)
        labels = nearest(values_TD, centres)
        biased = nearest(np.full((1, 20), 0.6, np.float32), np.stack([np.full(20, 0.5), np.full(20, 5.0)]).astype(np.float32))
    assert (labels == np.repeat(np.arange(8), 50)).all()
    assert biased.tolist() == [0]  # nearest, not of greatest product
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert (found @ centres.T).max(axis=1).min() > 0.7  # each is a centre, or lies between two
    with pytest.raises(ValueError, match="at most one for each token"):
        k_means(values_TD, 401, random, unit=True)


# ---- approximate search


@paths
@pytest.mark.parametrize("keep", [True, False])
def test_approximate_search_finds_nearly_all(documents, queries, everyone, path, keep, tmp_path):
    settings = TokenSettings(bits=4, keep_vectors=keep, encodings=EncodingSettings(), **CODED)
    with forced(path):
        parts = [Tokens(segment(documents, settings, tmp_path), everyone)]
        exact = search(queries, [Tokens(segment(documents), everyone)], 5, str)
        for method in (Plaid(documents=60), Plaid(documents=60, probes=4), Warp(probes=8, rescored=40), Muvera(candidates=150)):
            found = search(queries, parts, 5, str, method)
            assert overlap(found, exact) >= 0.8, method
            assert all(len(row) == 5 and row == sorted(row, key=lambda r: -r[1]) for row in found)
            if keep:
                best = [dict(row) for row in exact]
                assert all(best[q][n] == score for q, row in enumerate(found) for n, score in row if n in best[q])
        assert overlap(search(queries, parts, 5, str, Warp(probes=8)), exact) >= 0.5


@paths
def test_what_is_deleted_or_filtered_is_never_found_and_k_documents_come_back(documents, queries, path, tmp_path):
    settings = TokenSettings(bits=2, encodings=EncodingSettings(), **CODED)
    eligible_N = np.random.default_rng(4).random(COUNT) < 0.08
    with forced(path):
        parts = [Tokens(segment(documents, settings, tmp_path), eligible_N)]
        for method in (
            EXACT,
            Plaid(documents=5),
            Plaid(documents=5, probes=1),
            Warp(probes=1),
            Xtr(tokens=20),
            Muvera(candidates=5),
        ):
            for row in search(queries, parts, 8, str, method):
                assert all(eligible_N[n] for n, _ in row)
                assert len(row) == 8
        none = [Tokens(parts[0].segment, np.zeros(COUNT, dtype=bool))]
        for method in (EXACT, Plaid(), Warp(), Xtr(), Muvera()):
            assert search(queries, none, 8, str, method) == [[]] * len(queries)


def test_small_segments_stay_exact_beside_coded_ones(documents, queries, tmp_path):
    settings = TokenSettings(bits=4, keep_vectors=False, coded_from=int(documents.offsets_N1[300]), clusters=32)
    large, small = documents.select(range(300)), documents.select(range(300, COUNT))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    parts = [Tokens(segment(large, settings, tmp_path / "a"), np.ones(300, bool))]
    parts += [Tokens(segment(small, settings, tmp_path / "b"), np.ones(100, bool))]
    assert parts[0].segment.matrix is None
    assert parts[1].segment.residuals is None
    for method in (EXACT, Plaid(documents=300), Warp(probes=32, rescored=300)):
        for query_LD, row in zip(queries, search(queries, parts, COUNT, str, method), strict=True):
            found = dict(row)
            assert len(found) == COUNT
            kept = small.values_TD.astype(np.float16)
            expected = [fast_maxsim(query_LD, kept[low:high]) for low, high in zip(*bounds(small), strict=True)]
            np.testing.assert_allclose([found[300 + n] for n in range(100)], expected, rtol=1e-6)
    copied = parts[0].segment.vectors(np.array([7, 2]))
    assert copied.lengths_N.tolist() == [len(documents[7]), len(documents[2])]
    assert np.abs(copied[0] - documents[7]).mean() < 0.05


def test_a_filter_that_leaves_little_of_one_coded_segment_mixes_no_scales(documents, queries, tmp_path):
    """That one is searched exactly, so the best of the other are scored exactly too."""
    settings, parts = TokenSettings(bits=2, coded_from=100, clusters=32), []
    for number, run in enumerate((range(200), range(200, COUNT))):
        (tmp_path / str(number)).mkdir()
        eligible_N = np.arange(200) < (200, 8)[number]
        parts.append(Tokens(segment(documents.select(run), settings, tmp_path / str(number)), eligible_N))
    found = search(queries, parts, 20, str, Warp(probes=8))
    assert found == rerank(queries, parts, [[n for n, _ in row] for row in found], str)
    assert any(n >= 200 for row in found for n, _ in row)
    alone = search(queries, parts[:1], 20, str, Warp(probes=8))
    assert alone != rerank(queries, parts, [[n for n, _ in row] for row in alone], str), "WARP's own scores, on one scale"


def test_warp_counts_what_is_missing_as_the_centroid_that_completes_its_reach():
    products_LK = np.array([[0.9, 0.5, 0.7, 0.1]], dtype=np.float32)
    order, held = nearest_holding(products_LK, np.array([2, 4, 3, 9]), 4)
    assert order[0].tolist() == [0, 2, 1, 3]
    assert held[0].tolist() == [2, 5, 9, 18]


@paths
def test_a_higher_estimate_of_what_is_missing_ranks_no_found_product_higher(documents, queries, everyone, path):
    """WARP's score of a document with a token found for each query token does not depend on ``reach``."""
    residuals = coded(documents, 4)
    with forced(path):
        near, far = (
            dict(zip(*Warp(probes=64, reach=reach).scores(residuals, queries[2], everyone), strict=True)) for reach in (1, 6000)
        )
        low, high = (
            dict(zip(*Warp(probes=1, reach=reach).scores(residuals, queries[2], everyone), strict=True)) for reach in (6000, 1)
        )
    assert near.keys() == far.keys()
    np.testing.assert_allclose(list(near.values()), list(far.values()), atol=1e-4)
    assert all(low[n] <= high[n] + 1e-4 for n in low)


def test_what_is_missing_is_never_estimated_above_what_was_looked_at(documents, queries, everyone, tmp_path, monkeypatch):
    """Tokens of the probed centroids have been found, so what is missing lies beyond them."""
    monkeypatch.setattr(warp, "SHARE", 0.0)
    parts = [Tokens(segment(documents, TokenSettings(bits=4, **CODED), tmp_path), everyone)]
    exact = search(queries, parts, 5, str)
    assert overlap(search(queries, parts, 5, str, Warp(probes=16)), exact) > 0.6
    assert overlap(search(queries, parts, 5, str, Warp(probes=16, reach=1)), exact) < 0.3


@pytest.mark.parametrize("given", [["3", "4"], [1.0, 2.0], [True, False]])
def test_candidates_that_are_no_positions_are_refused(documents, queries, everyone, given):
    parts = [Tokens(segment(documents), everyone)]
    with pytest.raises(ValueError, match=f"candidates are positions, integers from 0 to {COUNT - 1}; got {given[0]!r} "):
        rerank(queries.select([0]), parts, [given], str)
    assert rerank(queries.select([0]), parts, [np.array([3], np.uint32)], str)[0][0][0] == 3
    assert rerank(queries.select([0]), parts, [[]], str) == [[]]


def test_explaining_a_score_says_which_tokens_meet(documents, queries):
    parts = [Tokens(segment(documents.select(run)), np.ones(len(run), bool)) for run in (range(150), range(150, COUNT))]
    for position in (0, 149, 150, 399):
        tokens, products = explain(queries[2], parts, position)
        assert products.sum() == pytest.approx(rerank(queries.select([2]), parts, [[position]], str)[0][0][1], rel=1e-6)
        kept = documents[position].astype(np.float16).astype(np.float32)
        np.testing.assert_allclose((kept[tokens] * queries[2]).sum(axis=1), products, atol=1e-6)
    with pytest.raises(ValueError, match="positions 0 to 399"):
        explain(queries[2], parts, COUNT)


# ---- XTR


@paths
def test_xtr_with_every_token_retrieved_is_maxsim(documents, queries, everyone, path):
    matrix = TokenMatrix.of(documents)
    with forced(path):
        for query_LD in queries:
            panel = Panel(TokenVectors.from_list([query_LD]))
            found = retrieve(matrix, everyone, panel, len(documents.values_TD))
            positions, scores = scores_of(found, panel.lanes, COUNT, "last")
            expected = [fast_maxsim(query_LD, document) / len(query_LD) for document in documents]
            np.testing.assert_allclose(scores / len(query_LD), expected, atol=1e-5)
            assert positions.tolist() == list(range(COUNT))


@paths
@pytest.mark.parametrize("count", [1, 7, 200])
def test_xtr_retrieves_the_nearest_tokens_of_eligible_documents(documents, queries, path, count):
    eligible_N = np.random.default_rng(6).random(COUNT) < 0.5
    matrix, panel = TokenMatrix.of(documents), Panel(TokenVectors.from_list([queries[0]]))
    owners = np.repeat(np.arange(COUNT), documents.lengths_N)
    with forced(path):
        found = retrieve(matrix, eligible_N, panel, count)
    products = queries[0].astype(np.float64) @ documents.values_TD.astype(np.float64).T
    products[:, ~eligible_N[owners]] = -np.inf
    for lane in range(len(queries[0])):
        best = np.argsort(-products[lane], kind="stable")[:count]
        chosen = found.lanes == lane
        assert sorted(found.documents[chosen]) == sorted(owners[best])
        np.testing.assert_allclose(np.sort(found.products[chosen]), np.sort(products[lane, best]), rtol=1e-6)


def by_hand(found, lanes, documents, imputation):
    """The paper's sums, one document and query token after the other."""
    scores = {}
    for document in documents:
        terms, hit = [], 0
        for lane in range(lanes):
            own = found.lanes == lane
            mine = found.products[own & (found.documents == document)]
            hit += len(mine) > 0
            missing = found.products[own].min() if imputation == "last" else 0.0
            terms.append(mine.max() if len(mine) else missing)
        if hit:
            scores[document] = sum(terms) * (lanes / hit if imputation == "none" else 1)
    return scores


@paths
@pytest.mark.parametrize("imputation", ["last", "zero", "none"])
def test_xtr_imputation_is_the_papers(documents, queries, everyone, path, imputation):
    matrix, panel = TokenMatrix.of(documents), Panel(TokenVectors.from_list([queries[1]]))
    with forced(path):
        found = retrieve(matrix, everyone, panel, 40)
        positions, scores = scores_of(found, panel.lanes, COUNT, imputation)
    expected = by_hand(found, panel.lanes, range(COUNT), imputation)
    assert positions.tolist() == sorted(expected)
    np.testing.assert_allclose(scores, [expected[n] for n in positions], rtol=1e-5)


def test_imputation_orders_scores(documents, queries, everyone):
    """The last product retrieved is the greatest that what was not retrieved can have, and it is above 0 here: no score with it
    is below MaxSim, nor below that with 0; and leaving out what is missing is more than counting it as 0.
    """
    segments = [Tokens(segment(documents, TokenSettings(precision="float32")), everyone)]
    exact = [dict(row) for row in search(queries, segments, COUNT, str)]
    found = {
        kind: [dict(row) for row in search(queries, segments, COUNT, str, Xtr(tokens=300, imputation=kind))]
        for kind in ("last", "zero", "none")
    }
    for number, row in enumerate(found["last"]):
        for n, score in row.items():
            assert score + 1e-4 >= max(exact[number][n], found["zero"][number][n])
            assert found["none"][number][n] >= found["zero"][number][n] - 1e-4


@paths
def test_xtr_from_codes_is_maxsim_of_them_when_all_is_retrieved(documents, queries, everyone, path):
    residuals = coded(documents, 4, unit=False)
    with forced(path):
        found = retrieve_coded(residuals, everyone, queries[7], len(documents.values_TD))
        _, scores = scores_of(found, len(queries[7]), COUNT, "last")
        np.testing.assert_allclose(scores, residuals.maxsim(queries[7], np.arange(COUNT)), atol=1e-4)


def test_of_equal_products_the_first_tokens_are_kept():
    found = Retrieved(np.array([0, 0, 0, 0, 1]), np.array([5, 6, 7, 8, 9]), np.array([1.0, 2.0, 1.0, 1.0, 0.0], np.float32))
    assert found.best(2).documents.tolist() == [5, 6, 9]


# ---- encodings


@paths
def test_encodings_are_the_papers_sums_and_means(path):
    """One repetition, by hand: a query's cells hold sums, a document's means, and its empty cells their nearest token."""
    settings = EncodingSettings(repetitions=3, planes=2, inner=5, seed=7)
    random = np.random.default_rng(7)
    texts = drawn(random, 6, 9, 4)
    planes = np.random.default_rng(7).standard_normal((9, 3, 2))
    with forced(path):
        for document in (False, True):
            found = encode_fixed(texts, settings, document=document).reshape(6, 3, 4, 5)
            for n, text in enumerate(texts):
                assert found[n].shape == (3, 4, 5)
                for repetition in range(3):
                    cells = ((text @ planes[:, repetition] > 0) * [1, 2]).sum(axis=1)
                    for cell in range(4):
                        alone = [
                            encode_fixed(TokenVectors.from_list([token[None]]), settings, document=False) for token in text
                        ]
                        points = [a.reshape(3, 4, 5)[repetition, c] for a, c in zip(alone, cells, strict=True)]
                        inside = [p for p, c in zip(points, cells, strict=True) if c == cell]
                        if inside:
                            expected = np.mean(inside, axis=0) if document else np.sum(inside, axis=0)
                        elif document and len(points):
                            expected = points[int(np.argmin([bin(c ^ cell).count("1") for c in cells]))]
                        else:
                            expected = np.zeros(5)
                        np.testing.assert_allclose(found[n, repetition, cell], expected, atol=1e-5)


def test_encodings_follow_maxsim_and_are_compared_by_their_seed(documents, queries):
    settings = EncodingSettings(repetitions=40, planes=3, inner=16)
    products = encode_fixed(queries, settings, document=False) @ encode_fixed(documents, settings, document=True).T / 40
    true = np.array([[fast_maxsim(q, d) for d in documents] for q in queries])
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(products, true, strict=True)]) > 0.8
    other = encode_fixed(queries, settings.model_copy(update={"seed": 1}), document=False)
    assert np.abs(other - encode_fixed(queries, settings, document=False)).max() > 0.1


# ---- pooling


@pytest.mark.parametrize("factor", [1, 1.5, 2, 4, 100])
@pytest.mark.parametrize("protected", [0, 1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_ward_pooling_is_that_of_sentence_transformers(factor, protected, normalize):
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("sentence_transformers.multi_vector_encoder.modules").HierarchicalTokenPooling
    documents = clustered(np.random.default_rng(8), 20, 16, longest=60)
    pooling = theirs(factor, num_protected_tokens=protected, normalize_embeddings=normalize)
    ours = pool_tokens(documents, factor, protected=protected, normalize=normalize)
    for mine, document in zip(ours, documents, strict=True):
        np.testing.assert_allclose(mine, pooling.pool_one(torch.from_numpy(document)).numpy(), atol=1e-5)


def test_k_means_pooling_keeps_the_count_and_stays_near(documents, queries):
    exact = np.array([[fast_maxsim(q, d) for d in documents] for q in queries])
    lost = {}
    for method in ("ward", "k_means"):
        pooled = pool_tokens(documents, 2, method=method)
        assert np.array_equal(pooled[3][0], documents[3][0] / np.linalg.norm(documents[3][0]))
        assert all(1 <= len(p) <= max(2, 1 + (len(d) - 1) // 2) for p, d in zip(pooled, documents, strict=True))
        lost[method] = np.abs(np.array([[fast_maxsim(q, d) for d in pooled] for q in queries]) - exact).mean()
    assert lost["ward"] < lost["k_means"] < 2 * lost["ward"]


def test_pooling_of_nothing_and_of_little():
    texts = TokenVectors.from_list([np.empty((0, 3), np.float32), np.eye(3, dtype=np.float32)[:1], np.eye(3, dtype=np.float32)])
    for method in ("ward", "k_means"):
        assert pool_tokens(texts, 2, method=method).lengths_N.tolist() == [0, 1, 2]
    for wrong in ({"factor": 0.5}, {"factor": 2, "protected": -1}, {"factor": 2, "method": "mean"}):
        with pytest.raises(ValueError, match="pooling needs"):
            pool_tokens(texts, **wrong)


# ---- files and bad input


def test_a_segment_says_what_it_holds_and_gives_vectors_back(documents, tmp_path):
    found = segment(documents, TokenSettings(precision="float32"), tmp_path)
    assert found.info.model_dump(exclude_none=True) == {
        **{"width": WIDTH, "count": COUNT, "tokens": len(documents.values_TD)},
        **{"precision": "float32", "vectors": True, "unit": False},
    }
    copied = found.vectors(np.array([5, 0, 399]))
    assert all(np.array_equal(a, documents[n]) for a, n in zip(copied, (5, 0, 399), strict=True))
    assert len(found.vectors(np.array([], dtype=np.int64))) == 0


def opened(folder):
    found = TokenSegment(folder, COUNT)
    return found.residuals, found.encodings


@pytest.mark.parametrize("harm", ["missing", "short", "garbled"])
def test_damaged_files_are_named(documents, tmp_path, harm):
    settings = TokenSettings(bits=2, encodings=EncodingSettings(repetitions=1), **CODED)
    segment(documents, settings, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 16
    raw = {"tokens.values.f16", "tokens.codes.u8", "tokens.scales.f32", "tokens.bounds.f32"}
    raw |= {"encodings.u8", "encodings.scales.f32", "residuals.packed.u8"}
    for name in names:
        path = tmp_path / name
        if harm == "garbled" and name in raw:
            continue  # bytes are only checked for their number
        kept = path.read_bytes()
        if harm == "missing":
            path.unlink()
        else:
            path.write_bytes(kept[:-3] if harm == "short" else kept[: len(kept) // 2] + b"\xff" * (len(kept) - len(kept) // 2))
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            opened(tmp_path)
        path.write_bytes(kept)
    with pytest.raises(ValueError, match="400 documents where 7 are needed"):
        TokenSegment(tmp_path, 7)
    info = json.loads((tmp_path / "tokens.json").read_text())
    (tmp_path / "tokens.json").write_text(json.dumps({**info, "vectors": False, "bits": None}))
    with pytest.raises(ValueError, match="neither vectors nor residuals"):
        TokenSegment(tmp_path)


def test_bad_input_is_refused_with_a_reason(documents, queries, everyone, tmp_path):
    writer = TokenWriter(tmp_path / "not" / "there", 2)
    for values, reason in (
        (np.ones((1, 3)), "width 3; this index needs width 2"),
        (np.array([[np.nan, 1]]), "document 0: a token vector holds NaN"),
        (np.array([[1e5, 1]]), "beyond 65,504; use precision='float32'"),
        (np.array([[1e12, 1]]), "scale them down"),
    ):
        with pytest.raises(ValueError, match=reason):
            writer.add(TokenVectors.from_list([values.astype(np.float32)]))
    parts = [Tokens(segment(documents), everyone)]
    with pytest.raises(ValueError, match="k must be 1 or more"):
        search(queries, parts, 0, str)
    with pytest.raises(ValueError, match="token vectors of width 2; this index needs width 24"):
        search(TokenVectors.from_list([np.ones((1, 2), np.float32)]), parts, 1, str)
    with pytest.raises(ValueError, match="positions 0 to 399"):
        rerank(queries, parts, [[400]] * len(queries), str)
    with pytest.raises(ValueError, match="given twice"):
        rerank(queries, parts, [[1, 1]] * len(queries), str)
    with pytest.raises(ValueError, match="but candidates of 1"):
        rerank(queries, parts, [[1]], str)
    with pytest.raises(ValueError, match="from 1 to 32,768"):
        TokenWriter(tmp_path, 0)
    with pytest.raises(ValueError, match="at most 32,768 are possible"):
        EncodingSettings(repetitions=20, planes=12)
    with pytest.raises(ValueError, match="of 40,000 components; at most 32,768"):
        EncodingSettings(repetitions=200, planes=6, final=40_000)
    with pytest.raises(ValueError, match=r"final is 2,561 of 2,560 components .* no greater"):
        EncodingSettings(final=2_561)
    with pytest.raises(ValueError, match="these 1,048,576 at most"):
        EncodingSettings(repetitions=200, planes=12, inner=8, final=10)
    with pytest.raises(ValueError, match="greater than 0"):
        EncodingSettings(final=0)
    for method, setting in (
        (Plaid, {"documents": 0}),
        (Plaid, {"probes": 0}),
        (Warp, {"probes": True}),
        (Warp, {"rescored": -1}),
        (Xtr, {"tokens": "5"}),
        (Xtr, {"imputation": "most"}),
        (Muvera, {"candidates": 0}),
    ):
        with pytest.raises(ValueError, match=next(iter(setting))):
            method(**setting)


def test_a_segment_of_a_store_writes_gives_back_and_takes_apart(documents, tmp_path):
    model, ids = SimpleNamespace(width=WIDTH, precision="float32", coding=TokenCoding()), [f"d{n}" for n in range(COUNT)]
    writer = TokenField.writer(tmp_path, model)
    writer.add(ids[:150], TokenField.take(documents, slice(0, 150)))
    writer.add(ids[150:], TokenField.take(documents, np.arange(150, COUNT)))
    assert writer.close() == {}
    field = TokenField(tmp_path, SimpleNamespace(count=COUNT), model)
    parts = [field.rows(np.array(rows)) for rows in ([3, 1], [], [399])]
    joined = TokenField.join(parts)
    for found, number in zip(TokenField.each(joined), (3, 1, 399), strict=True):
        np.testing.assert_array_equal(found, documents[number])
    other = tmp_path / "other"
    other.mkdir()
    bad = TokenVectors(np.where(np.arange(len(joined.values_TD))[:, None] == 0, np.nan, joined.values_TD), joined.offsets_N1)
    for given, reason in ((joined, "of 3 documents for 2"), (bad.select([1, 0]), "document 'd1': a token vector holds NaN")):
        with pytest.raises(ValueError, match=reason):
            TokenField.writer(other, model).add(ids[:2], given)
    with pytest.raises(ValueError, match="width 24 where the model has 7"):
        TokenField(tmp_path, SimpleNamespace(count=COUNT), SimpleNamespace(width=7))


def test_nothing_at_all(tmp_path):
    empty = segment(TokenVectors.from_list([], 5), TokenSettings(bits=2, coded_from=1, encodings=EncodingSettings()), tmp_path)
    query = TokenVectors.from_list([np.ones((2, 5), np.float32)])
    for parts in ([], [Tokens(empty, np.zeros(0, dtype=bool))]):
        for method in (EXACT, Plaid(), Warp(), Xtr(), Muvera()):
            assert search(query, parts, 3, str, method) == [[]]
        assert rerank(query, parts, [[]], str) == [[]]
