"""Approximate search of large segments, the codes it and exact search read, and the library that reads them."""

import json
import os
import signal

import numpy as np
import pytest

from openembed.index import codes, fields, native, quantizer, sketch
from openembed.index.codes import quantize
from openembed.index.native import scan_library
from openembed.index.store import ModelInfo, Store
from openembed.kernels import compile
from openembed.records import Document

COUNT, WIDTH = 3000, 40
compiled = pytest.mark.skipif(scan_library() is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def values_ND():
    random = np.random.default_rng(0)
    centres = random.standard_normal((30, WIDTH))
    values_ND = centres[random.integers(0, 30, COUNT)] + 0.7 * random.standard_normal((COUNT, WIDTH))
    return (values_ND / np.linalg.norm(values_ND, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def large(tmp_path, values_ND, monkeypatch):
    monkeypatch.setattr(fields, "SKETCHED", 500)
    monkeypatch.setattr(sketch, "LEAST", 100)
    model = ModelInfo(name="given", fingerprint="given", width=WIDTH)
    documents = [Document(f"d{n}", f"text {n}", metadata={"n": n}) for n in range(COUNT)]
    return Store.create(tmp_path / "index", documents, values_ND, model=model)


def overlap(found, expected):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)])


@compiled
def test_approximate_search_finds_nearly_all_with_exact_scores(large, values_ND):
    queries_QD = values_ND[:60] + 0.2 * values_ND[100:160]
    exact = large.dense(queries_QD, 10, exact=True)
    found = large.dense(queries_QD, 10, exact=False)
    assert overlap(found, exact) >= 0.9
    assert all(exact[row][i] == score for row, hits in enumerate(found) for i, score in hits.items() if i in exact[row])
    assert all(list(hits.values()) == sorted(hits.values(), reverse=True) for hits in found)
    few = large.dense(queries_QD[:3], 10)
    assert few == large.dense(queries_QD[:3], 10, exact=False)
    assert large.dense(queries_QD, 10) == exact


@compiled
def test_with_every_cluster_and_enough_candidates_it_is_exact(large, values_ND, monkeypatch):
    monkeypatch.setattr(sketch, "LEAST_SHARE", 1.0)
    monkeypatch.setattr(sketch, "LEAST", COUNT)
    monkeypatch.setattr(sketch, "THREADED", 10)
    for number in (1, 3):
        monkeypatch.setattr(sketch, "threads", lambda number=number: number)
        assert large.dense(values_ND[:5], 10, exact=False) == large.dense(values_ND[:5], 10, exact=True)


@compiled
def test_deletions_filters_and_small_segments_beside_a_large_one(large, values_ND):
    query_QD = values_ND[:1]
    gone = list(large.dense(query_QD, 5, exact=True)[0])
    large.delete(gone)
    large.add([Document("small", "x", metadata={"n": 7})], vectors=query_QD)
    found = large.dense(query_QD, 10)[0]
    assert next(iter(found)) == "small"
    assert not set(gone) & set(found)
    half = large.dense(query_QD, 10, filter={"n": {"lt": 1500}})[0]
    assert len(half) == 10
    assert all(i == "small" or int(i[1:]) < 1500 for i in half)
    few = {"n": {"in": [7, 8, 2999]}}
    assert set(large.dense(query_QD, 10, filter=few)[0]) == {"small", "d7", "d8", "d2999"} - set(gone)
    assert large.dense(query_QD, 10, filter=few) == large.dense(query_QD, 10, filter=few, exact=True)
    before = large.dense(query_QD, 10, exact=True)
    large.compact()
    assert large.dense(query_QD, 10, exact=True) == before
    assert Store(large.directory).dense(query_QD, 10)[0]


def test_a_damaged_sketch_is_named(large):
    folder = large.directory / "segments" / "000001"
    names = sorted(path.name for path in folder.glob("sketch*"))
    assert names == sorted(sketch.FILES)
    for name in names:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            Store(large.directory)
        (folder / name).write_bytes(whole)


def plain_scores(made, codes_GS, tables):
    """The sums of table entries, in numpy alone."""
    parts = len(made.coder.parts_MC)
    tables_MP = tables.transpose(1, 0, 2, 3).reshape(parts, quantizer.POINTS).astype(np.int64)
    both = codes_GS.transpose(0, 2, 1, 3).reshape(-1, parts // 2)
    return tables_MP[np.arange(parts), np.concatenate([both & 15, both >> 4], axis=1)].sum(axis=1)


def scanned(made, tables, ranges, k, eligible_N):
    found, sums = np.empty(2 * k + 16, dtype=np.int32), np.empty(2 * k + 16, dtype=np.float32)
    some = not eligible_N.all()
    given = codes.sketch_argument(made.codes_GS, np.array(ranges).reshape(-1, 2), made.order_P, eligible_N, some)
    count = scan_library().openembed_sketch_scan(given.pointer, tables.ctypes.data, k, found.ctypes.data, sums.ctypes.data)
    return found[:count], sums[:count]


@compiled
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 7, 300, COUNT])
def test_a_scan_finds_the_best_sums_of_the_tables(tmp_path, values_ND, k, masked):
    sketch.write_sketch(tmp_path, values_ND)
    made = sketch.map_sketch(tmp_path, COUNT, WIDTH)
    order_P, tables = made.order_P, made.coder.tables(values_ND[5])
    assert sorted(order_P[order_P >= 0]) == list(range(COUNT))
    expected_P = plain_scores(made, made.codes_GS, tables)
    assert quantizer.sketch_scores(made.codes_GS, tables).tolist() == expected_P.tolist()
    groups = len(made.codes_GS)
    eligible_N = np.arange(COUNT) % 3 != (1 if masked else 3)
    ranges = [[3, 3], [0, 40], [60, 61], [61, groups], [7, 7]]
    groups_P = np.arange(len(order_P)) // 16
    seen_P = (order_P >= 0) & eligible_N[order_P] & ((groups_P < 40) | (groups_P >= 60))
    found, sums = scanned(made, tables, ranges, k, eligible_N)
    assert len(set(found.tolist())) == len(found) == min(k, seen_P.sum())
    assert set(found.tolist()) <= set(order_P[seen_P].tolist())
    place_of = np.argsort(order_P)[-COUNT:]
    assert sums.tolist() == expected_P[place_of[found]].tolist()
    assert sorted(sums) == sorted(expected_P[seen_P])[-len(found) :]
    assert len(scanned(made, tables, [], k, eligible_N)[0]) == 0


@compiled
def test_tables_and_codes_are_those_of_a_plain_product_quantizer(tmp_path, values_ND):
    sketch.write_sketch(tmp_path, values_ND)
    made = sketch.map_sketch(tmp_path, COUNT, WIDTH)
    decoded_PD = np.zeros((len(made.order_P), WIDTH))
    parts = len(made.coder.parts_MC)
    both = made.codes_GS.transpose(0, 2, 1, 3).reshape(-1, parts // 2)
    nearest_PM = np.concatenate([both & 15, both >> 4], axis=1)
    for part, (components, points) in enumerate(zip(made.coder.parts_MC, made.coder.points_MPC, strict=True)):
        np.add.at(decoded_PD.T, components, points[nearest_PM[:, part]].T)
    real_P = made.order_P >= 0
    values_PD = values_ND[made.order_P[real_P]]
    lost = ((values_PD - decoded_PD[real_P]) ** 2).sum() / values_PD.var(axis=0).sum() / real_P.sum()
    assert lost < 0.2
    scores_P = plain_scores(made, made.codes_GS, made.coder.tables(values_ND[5]))[real_P]
    assert np.corrcoef(scores_P, decoded_PD[real_P] @ values_ND[5])[0, 1] > 0.999


@compiled
def test_many_equal_vectors_are_searched_without_more_room(tmp_path, monkeypatch):
    """A thousand times the room of the candidates tie; all clusters are as near as each other."""
    made = np.zeros((20_000, 24), dtype=np.float32)
    made[:, 0] = 1
    made[-3:, 1] = 1
    sketch.write_sketch(tmp_path, made)
    monkeypatch.setattr(sketch, "LEAST", 20)
    found = sketch.map_sketch(tmp_path, *made.shape).candidates(made[-1], np.ones(len(made), dtype=bool), 1)
    assert len(set(found.tolist())) == 20
    assert {19_997, 19_998, 19_999} <= set(found.tolist())


@compiled
def test_components_are_dealt_by_how_much_they_vary():
    variance_D = np.array([4.0, 1.0, *[0.01] * 60, 0.0, 0.0])
    dealt = quantizer._dealt(variance_D, 24)
    with_most = next(part for part in dealt if 0 in part)
    assert sum(map(len, dealt)) <= len(variance_D)
    assert sorted(component for part in dealt for component in part) == sorted({c for part in dealt for c in part})
    assert len(with_most) < np.mean([len(part) for part in dealt if part])
    assert not any({62, 63} & set(part) for part in dealt)


@compiled
@pytest.mark.parametrize("width", [1, 2, 17, 130])
def test_any_width_can_be_sketched(tmp_path, width):
    values_ND = np.random.default_rng(3).standard_normal((400, width)).astype(np.float32)
    sketch.write_sketch(tmp_path, values_ND)
    found = sketch.map_sketch(tmp_path, 400, width).candidates(values_ND[7], np.ones(400, dtype=bool), 30)
    best = np.argsort(-(values_ND @ values_ND[7]))[:10]
    assert len(set(best) & set(found)) >= 8


@compiled
def test_a_sketch_of_another_version_is_passed_over_until_compaction(large, values_ND):
    manifest = large.directory / "manifest.json"
    written = json.loads(manifest.read_text())
    assert [segment["sketch"] for segment in written["segments"]] == [sketch.VERSION]
    written["segments"][0]["sketch"] = True
    manifest.write_text(json.dumps(written))
    for path in (large.directory / "segments" / "000001").glob("sketch*"):
        path.unlink()
    older = Store(large.directory)
    assert older.dense(values_ND[:3], 10, exact=False) == large.dense(values_ND[:3], 10, exact=True)
    older.delete(["d5"])
    older.compact()
    assert Store(large.directory)._state.segments[0].fields["dense"].sketch is not None


@compiled
@pytest.mark.parametrize("width", [1, 3, 16, 40])
def test_codes_are_the_same_with_and_without_the_library_and_bounds_hold(width, monkeypatch):
    random = np.random.default_rng(1)
    values_ND = (random.standard_normal((37, width)) * 10.0 ** random.integers(-30, 30, (37, 1))).astype(np.float32)
    values_ND[3] = 0
    values_ND[4] = 1e-39
    with_library = quantize(values_ND)
    monkeypatch.setattr(codes, "scan_library", lambda: None)
    without = quantize(values_ND)
    np.testing.assert_array_equal(with_library.codes_GS, without.codes_GS)
    np.testing.assert_allclose(with_library.bounds_3P, without.bounds_3P, rtol=1e-5)
    scale_P, norm_P, error_P = with_library.bounds_3P
    codes_PD = with_library.codes_GS.transpose(0, 2, 1, 3).reshape(len(scale_P), -1)[:37, :width].astype(np.float64) - 128
    exact_ND = values_ND.astype(np.float64)
    assert (np.linalg.norm(exact_ND, axis=1) <= norm_P[:37] + 1e-44).all()
    assert (np.linalg.norm(exact_ND - codes_PD * scale_P[:37, None], axis=1) <= error_P[:37] + 1e-44).all()


def test_without_a_compiler_search_is_the_same(large, values_ND, monkeypatch):
    expected = large.dense(values_ND[:4], 5, exact=True)
    monkeypatch.setenv("OPENEMBED_KERNELS", "off")
    native.scan_library.cache_clear()
    compile.compiled.cache_clear()
    try:
        assert scan_library() is None
        found = Store(large.directory).dense(values_ND[:4], 5)
    finally:
        monkeypatch.undo()
        native.scan_library.cache_clear()
        compile.compiled.cache_clear()
    assert [list(hits) for hits in found] == [list(hits) for hits in expected]


def test_a_compiler_that_fails_is_told_once_and_search_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/bin/false")
    caplog.set_level("INFO")
    native.scan_library.cache_clear()
    compile.compiled.cache_clear()
    try:
        assert scan_library() is None
        assert "dense search uses float32 products: /bin/false could not make scan" in caplog.text
    finally:
        monkeypatch.undo()
        native.scan_library.cache_clear()
        compile.compiled.cache_clear()


@compiled
def test_a_forked_process_searches_with_threads_of_its_own(large, values_ND, monkeypatch):
    monkeypatch.setattr(codes, "THREADED", 1)
    monkeypatch.setattr(codes, "threads", lambda: 2)
    expected = large.dense(values_ND[:3], 5, exact=True)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os._exit(0 if large.dense(values_ND[:3], 5, exact=True) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
