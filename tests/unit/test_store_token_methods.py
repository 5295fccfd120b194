"""How a store's token vectors are coded, and each method of searching them: as an index in memory of the same settings."""

import json

import numpy as np
import pytest
from token_paths import clustered, segment

from openembed.config import whole
from openembed.index.store import ModelInfo, Store, describe_model
from openembed.index.tokens.files import TokenCoding, TokenSettings
from openembed.index.tokens.methods import EXACT, METHODS, Muvera, Plaid, Warp, Xtr, check_served, parse_method, told
from openembed.index.tokens.muvera import EncodingSettings
from openembed.index.tokens.search import Tokens, search
from openembed.records import Document
from openembed.token_vectors import TokenVectors

WIDTH, COUNT = 24, 120
CODED = {"coded_from": 100, "clusters": 16}
SMALL = EncodingSettings(repetitions=4, planes=2)
VECTORS, QUERIES = clustered(np.random.default_rng(0), COUNT, WIDTH), clustered(np.random.default_rng(0), 6, WIDTH)
RESIDUALS = (Plaid(documents=20), Warp(probes=4), Warp(probes=4, rescored=20), Xtr(tokens=30), Xtr(tokens=30, rescored=9))
CASES = {
    "vectors alone": (TokenCoding(bits=0), (EXACT, Xtr(tokens=30))),
    "2 bits": (TokenCoding(**CODED), (EXACT, *RESIDUALS)),
    "4 bits": (TokenCoding(bits=4, **CODED), (EXACT, *RESIDUALS)),
    "4 bits alone": (TokenCoding(bits=4, keep_vectors=False, **CODED), (EXACT, *RESIDUALS)),
    "encodings": (TokenCoding(bits=0, encodings=SMALL), (EXACT, Muvera(candidates=12))),
    "everything": (TokenCoding(encodings=SMALL, **CODED), (EXACT, *RESIDUALS, Muvera(candidates=12))),
}
cases = pytest.mark.parametrize(("coding", "methods"), CASES.values(), ids=list(CASES))


def model(coding=None, precision="float32"):
    return ModelInfo(name="m", fingerprint="m", width=WIDTH, kind="tokens", precision=precision, coding=coding or TokenCoding())


def documents(rows):
    return [Document(f"d{n:03d}", f"text {n}", metadata={"n": n}) for n in rows]


def by_hand(folders, runs, settings, method, eligible_N=None):
    """What the index in memory finds in the same segments."""
    eligible_N = np.ones(COUNT, dtype=bool) if eligible_N is None else eligible_N
    parts = [
        Tokens(segment(VECTORS.select(run), settings, folder), eligible_N[run.start : run.stop])
        for folder, run in zip(folders, runs, strict=True)
    ]
    found = search(QUERIES, parts, 7, lambda n: f"d{n:03d}", method)
    return [{f"d{n:03d}": score for n, score in row} for row in found]


@cases
def test_a_store_finds_what_the_index_in_memory_of_its_settings_finds(coding, methods, tmp_path):
    runs, settings = [range(100), range(100, COUNT)], TokenSettings(precision="float32", **dict(coding))
    store = Store.create(tmp_path / "store", documents(runs[0]), VECTORS.select(runs[0]), model=model(coding))
    store.add(documents(runs[1]), vectors=VECTORS.select(runs[1]))
    for opened in (store, Store(tmp_path / "store")):
        assert opened.models["tokens"].coding == coding
        for number, method in enumerate(methods):
            folders = [tmp_path / f"{number} {run.start} {opened is store}" for run in runs]
            opened.check_method(method)
            assert opened.tokens(QUERIES, 7, method=method) == by_hand(folders, runs, settings, method), method
    store.delete(["d003"])
    left_N = np.arange(COUNT) != 3
    for number, method in enumerate(methods):
        folders = [tmp_path / f"deleted {number} {run.start}" for run in runs]
        assert store.tokens(QUERIES, 7, method=method) == by_hand(folders, runs, settings, method, left_N), method


@cases
def test_merged_segments_are_coded_as_one_written_at_once(coding, methods, tmp_path):
    """From the vectors as kept: those of residuals alone are the reconstructed ones."""
    store = Store.create(tmp_path / "store", documents(range(60)), VECTORS.select(range(60)), model=model(coding))
    store.add(documents(range(60, COUNT)), vectors=VECTORS.select(range(60, COUNT)))
    kept = TokenVectors.from_list([vectors for _, vectors in store.rows("tokens")])
    assert np.array_equal(kept.values_TD, VECTORS.values_TD) == coding.keep_vectors
    store.compact()
    (field,) = (segment.fields["tokens"] for segment in store._state.segments)
    info = field.segment.info
    assert (info.bits or 0, info.vectors, info.encodings) == (coding.bits, coding.keep_vectors, coding.encodings)
    settings = TokenSettings(precision="float32", **dict(coding))
    whole_part = [Tokens(segment(kept, settings, tmp_path / "whole"), np.ones(COUNT, dtype=bool))]
    for method in methods:
        found = search(QUERIES, whole_part, 7, lambda n: f"d{n:03d}", method)
        assert [list(hits) for hits in store.tokens(QUERIES, 7, method=method)] == [
            [f"d{n:03d}" for n, _ in row] for row in found
        ]


def test_compacting_codes_what_was_not_coded_and_additions_follow(tmp_path):
    store = Store.create(tmp_path, documents(range(100)), VECTORS.select(range(100)), model=model())
    plain = json.loads((tmp_path / "manifest.json").read_text())
    assert "coding" not in plain["models"][0], "an index of the usual settings opens in earlier versions too"
    exact = store.tokens(QUERIES, 7)
    coding = TokenCoding(bits=4, encodings=SMALL, **CODED)
    store.compact(coding)
    assert json.loads((tmp_path / "manifest.json").read_text())["models"][0]["coding"]["bits"] == 4
    assert store.tokens(QUERIES, 7) == exact
    assert store.tokens(QUERIES, 7, method=Plaid(documents=100)) == exact
    store.add(documents(range(100, COUNT)), vectors=VECTORS.select(range(100, COUNT)))
    assert [s.fields["tokens"].segment.info.bits for s in Store(tmp_path)._state.segments] == [4, 4]
    whole_ones = store.tokens(QUERIES, 7)
    assert store.tokens(QUERIES, 7, method=Muvera(candidates=COUNT)) == whole_ones
    change = store._state.manifest.change
    store.compact(coding)
    store.compact(coding)
    assert store._state.manifest.change == change + 1, "what is so already is left as it is"
    store.compact(TokenCoding(bits=0))
    with pytest.raises(ValueError, match="no segment of this index has any"):
        store.tokens(QUERIES, method=Warp())
    assert store.tokens(QUERIES, 7) == whole_ones
    empty = Store.create(tmp_path / "empty", model=model())
    empty.compact(coding)
    assert Store(tmp_path / "empty").models["tokens"].coding == coding


def test_a_method_that_the_store_cannot_serve_is_refused_with_what_would_serve_it(tmp_path):
    store = Store.create(tmp_path / "store", documents(range(100)), VECTORS.select(range(100)), model=model())
    tokens = int(VECTORS.offsets_N1[100])
    for method, options in ((Plaid(), "--bits 2 --coded-from 1"), (Warp(), "--bits 4 --coded-from 1")):
        reason = (
            f"method {method.kind} searches residuals, .*its largest has {tokens:,} tokens.*compact DIR {options}`.*exactly"
        )
        for refused in (lambda method=method: store.tokens(QUERIES, method=method), lambda m=method: store.check_method(m)):
            with pytest.raises(ValueError, match=reason):
                refused()
    with pytest.raises(ValueError, match=r"muvera searches encodings, and this index has none; .*compact DIR --encodings`"):
        store.tokens(QUERIES, method=Muvera())
    with pytest.raises(ValueError, match="no segment of this index has any"):
        store.tokens(QUERIES, method=Plaid(), filter={"n": -1})
    nothing = Store.create(tmp_path / "nothing", model=model())
    assert nothing.tokens(QUERIES, method=Muvera()) == [{}] * len(QUERIES)
    with pytest.raises(ValueError, match="built without a model"):
        Store.create(tmp_path / "words", documents([0])).check_method(EXACT)
    with pytest.raises(ValueError, match="built without a model"):
        Store(tmp_path / "words").compact(TokenCoding())


def test_where_some_segments_lack_encodings_they_are_named(tmp_path):
    parts = [
        segment(VECTORS.select(range(60)), TokenSettings(encodings=SMALL), tmp_path / "000001"),
        segment(VECTORS.select(range(60, COUNT)), TokenSettings(), tmp_path / "000002"),
        segment(VECTORS.select([]), TokenSettings(), tmp_path / "000003"),
    ]
    with pytest.raises(ValueError, match="this index has none in 000002, of 2 segments; make them with"):
        check_served(Muvera(), parts)
    check_served(Muvera(), [parts[0], parts[2]])


def test_coding_that_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without vectors there must be residuals"):
        TokenCoding(bits=0, keep_vectors=False)
    with pytest.raises(ValueError, match=r"coding is of token vectors; m gives dense vectors"):
        ModelInfo(name="m", fingerprint="m", width=3, coding=TokenCoding(bits=4))

    class Dense:
        fingerprint, width = "d", 3

        def document_prompt(self, *, instruction=None):
            return ""

    with pytest.raises(ValueError, match="coding is of token vectors"):
        describe_model("d", Dense(), coding=TokenCoding(bits=4))


@pytest.mark.parametrize(
    "method",
    [
        EXACT,
        Plaid(documents=9, threshold=0.25),
        Warp(rescored=64),
        Xtr(tokens=7, imputation="none"),
        Muvera(candidates=3),
        *(kind() for kind in METHODS.values()),
    ],
    ids=told,
)
def test_a_method_is_read_as_it_is_told(method):
    assert parse_method(told(method)) == method


def test_what_is_no_method_is_refused_by_name():
    for text, reason in (
        ("warpp", r"--method 'warpp' is not known; allowed: exact, plaid, warp, xtr, muvera"),
        ("xtr:token=5", r"--method xtr: token: .*did you mean 'tokens'"),
        ("xtr:tokens=0", r"--method xtr: tokens: .*greater than or equal to 1 \(got 0\)"),
        ("xtr:tokens=many", r"--method xtr: tokens: .*valid integer \(got 'many'\)"),
        ("exact:k=5", r"--method exact: k: "),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_method(text, "--method")
    assert Warp(probes=5.0) == Warp(probes=np.int64(5)) == Warp(probes=5)
    assert whole(5.5) == 5.5


def test_coding_that_does_nothing_yet_and_vectors_that_are_gone_are_said(tmp_path, caplog):
    store = Store.create(tmp_path / "whole", documents(range(50)), VECTORS.select(range(50)), model=model(TokenCoding(bits=4)))
    assert "fewer than coded_from (2,000,000)" in caplog.text
    assert store._state.segments[0].fields["tokens"].segment.info.bits is None
    caplog.clear()
    Store.create(tmp_path / "usual", documents(range(50)), VECTORS.select(range(50)), model=model())
    assert not caplog.text
    coded = model(TokenCoding(bits=4, keep_vectors=False, **CODED))
    codes = Store.create(tmp_path / "codes", documents(range(50)), VECTORS.select(range(50)), model=coded)
    with pytest.raises(ValueError, match="cannot be brought back; index again"):
        codes.compact(TokenCoding(bits=4, **CODED))
    assert not codes.models["tokens"].coding.keep_vectors
