import json
import os
import re
import shutil

import numpy as np
import pytest
from crash import dies_at
from store_fakes import BagOfWords

from openembed.index import segments
from openembed.index import store as store_module
from openembed.index.store import Store, describe_model
from openembed.locks import exclusive
from openembed.records import Document

TEXTS = [
    "cats chase mice in the barn",
    "dogs chase cats around the yard",
    "embedding models turn text into vectors",
    "a barn full of hay",
    "",
    "nul \0 byte and\nnew line",
]


def documents(low=0, high=len(TEXTS)):
    return [Document(f"d{n}", TEXTS[n % len(TEXTS)], title=f"Title {n}", metadata={"n": n}) for n in range(low, high)]


@pytest.fixture
def encoder():
    return BagOfWords()


@pytest.fixture
def store(tmp_path, encoder):
    made = Store.create(tmp_path / "index", model=describe_model("bag", encoder))
    made.add(documents(), encoder)
    return made


def test_reopening_gives_back_documents_vectors_and_rankings_without_encoding(store, encoder):
    encoded = encoder.encoded
    query_QD = BagOfWords().encode(["cats in a barn"])
    again = Store(store.directory)
    assert list(again.documents()) == documents()
    assert [d.metadata for d in again.documents()] == [{"n": n} for n in range(len(TEXTS))]
    assert again.dense(query_QD, 3) == store.dense(query_QD, 3)
    assert next(iter(again.dense(query_QD, 3)[0])) == "d0"
    assert next(iter(again.bm25(["hay barn"], 3)[0])) == "d3"
    assert again.document("d5").text == "nul \0 byte and\nnew line"
    assert encoder.encoded == encoded


def test_rows_are_the_live_documents_with_their_vectors(store, encoder):
    store.add([Document("late", "added later")], encoder)
    store.delete(["late", next(store.ids())])
    store.add([Document("last", "a second segment")], encoder)
    documents, vectors = zip(*store.rows(), strict=True)
    assert list(documents) == list(store.documents())
    expected_ND = encoder.encode_documents([document.full_text for document in documents])
    assert np.array_equal(np.stack(vectors), expected_ND)
    assert all(vector_D.dtype == np.float32 for vector_D in vectors)


def test_rows_of_a_store_without_vectors_are_refused(tmp_path):
    store = Store.create(tmp_path / "words", [Document("a", "text")])
    with pytest.raises(ValueError, match="built without a model"):
        store.rows()


def test_bm25_returns_only_documents_that_share_a_term(store):
    assert store.bm25(["zebra", "", "hay"], 10) == [{}, {}, store.bm25(["hay"], 10)[0]]
    assert list(store.bm25(["hay"], 10)[0]) == ["d3"]


def test_delete_then_add_again(store, encoder):
    assert store.delete(["d3", "d0"]) == 2
    assert "d3" not in store
    assert len(store) == 4
    assert store.bm25(["hay"], 5) == [{}]
    assert "d0" not in store.dense(encoder.encode(["cats chase mice"]), 10)[0]
    store.add([Document("d3", "hay again")], encoder)
    assert list(store.bm25(["hay"], 5)[0]) == ["d3"]
    assert Store(store.directory).document("d3").text == "hay again"
    with pytest.raises(ValueError, match="no document with id 'd0'; nothing was deleted"):
        store.delete(["d1", "d0"])
    assert "d1" in store


def test_ids_given_twice_or_already_there_are_refused_and_change_nothing(store, encoder):
    before = sorted(path.name for path in store.directory.rglob("*"))
    with pytest.raises(ValueError, match="'x' is given twice; nothing was added"):
        store.add([Document("x", "a"), Document("x", "b")], encoder)
    with pytest.raises(ValueError, match="'d1' is already in the index"):
        store.add([Document("new", "a"), Document("d1", "b")], encoder)
    assert len(store) == len(TEXTS)
    assert "new" not in store
    assert sorted(path.name for path in store.directory.rglob("*")) == before


@pytest.mark.parametrize("change", [Store.add, Store.update])
@pytest.mark.parametrize("given", [{"id": "d1", "text": "a"}, "a text"])
def test_what_is_no_document_is_refused(store, encoder, change, given):
    count = len(store)
    with pytest.raises(TypeError, match=f"documents are openembed.Document, got {type(given).__name__}; write "):
        change(store, [given], encoder)
    with pytest.raises(TypeError, match=r"openembed\.Document"):
        Store.create(store.directory / "other", [given])
    assert (len(store), len(Store(store.directory))) == (count, count)


def test_replace_puts_the_new_document_in_the_place_of_the_old(store, encoder):
    store.add([Document("d1", "llamas hum"), Document("d9", "new")], encoder, replace=True)
    assert store.document("d1").text == "llamas hum"
    assert len(store) == len(TEXTS) + 1
    assert list(store.bm25(["llamas"], 5)[0]) == ["d1"]
    assert "d1" not in store.bm25(["dogs"], 5)[0]


@pytest.mark.parametrize("text", [pytest.param("ok \ud800 not", id="surrogate")])
def test_text_that_is_not_unicode_is_refused(store, encoder, text):
    with pytest.raises(ValueError, match=r"document 'bad': text holds a lone surrogate \(U\+D800 at character 3\)"):
        store.add([Document("bad", text)], encoder)
    assert len(store) == len(TEXTS)


def test_a_text_of_a_million_characters_is_one_document(store, encoder):
    long = "needle " + "hay stack " * 100_000
    store.add([Document("long", long)], encoder)
    assert list(store.bm25(["needle"], 1)[0]) == ["long"]
    assert Store(store.directory).document("long").text == long


def test_another_model_another_width_and_bad_vectors_are_refused(store):
    with pytest.raises(ValueError, match=r"made by bag \(fingerprint"):
        store.add([Document("x", "a")], BagOfWords(name="other"))
    with pytest.raises(ValueError, match="vectors are 32 wide"):
        store.add([Document("x", "a")], BagOfWords(width=16))
    with pytest.raises(ValueError, match=r"this index needs \(count, 32\)"):
        store.dense(np.zeros((1, 16), dtype=np.float32))
    with pytest.raises(ValueError, match="'x': its vector holds NaN"):
        store.add([Document("x", "a")], vectors=np.full((1, 32), np.nan, dtype=np.float32))
    for count in (1, 3):
        with pytest.raises(ValueError, match=r"vectors"):
            store.add([Document("x", "a"), Document("y", "b")], vectors=np.ones((count, 32), dtype=np.float32))
    with pytest.raises(ValueError, match="give the encoder"):
        store.add([Document("x", "a")])
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        store.bm25(["a"], 0)
    assert len(store) == len(TEXTS)


@pytest.mark.parametrize("damage", ["a byte short", "half", "empty", "missing"])
def test_every_damaged_file_is_named_on_opening(store, damage):
    store.delete(["d0"])
    paths = [path for folder in ("segments", "deleted") for path in (store.directory / folder).rglob("*") if path.is_file()]
    assert len(paths) == 21
    for path in paths:
        whole = path.read_bytes()
        if not whole and damage != "missing":
            continue
        path.unlink()
        if damage != "missing":
            path.write_bytes(whole[: {"a byte short": len(whole) - 1, "half": len(whole) // 2, "empty": 0}[damage]])
        with pytest.raises(ValueError, match=rf"{re.escape(path.name)}.*(damaged|not valid)"):
            Store(store.directory)
        path.write_bytes(whole)
    assert len(Store(store.directory)) == len(TEXTS) - 1


def test_a_damaged_manifest_or_none_is_named(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="no openembed index"):
        Store(tmp_path)
    manifest = store.directory / "manifest.json"
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**whole, "format": 99}))
    with pytest.raises(ValueError, match="format 99, this version reads 1, 2, 3"):
        Store(store.directory)
    manifest.write_text(json.dumps({**whole, "language": 3}))
    with pytest.raises(ValueError, match=r"manifest\.json: language"):
        Store(store.directory)
    manifest.write_text('{"format": 1, "chan')
    with pytest.raises(ValueError, match="not valid JSON"):
        Store(store.directory)


def test_a_second_writer_is_refused_and_readers_are_not(store, encoder):
    other = Store(store.directory)
    with exclusive(store.directory):
        with pytest.raises(ValueError, match=f"another writer is at work \\(process {os.getpid()}\\)"):
            other.add([Document("x", "a")], encoder)
        assert len(Store(store.directory)) == len(TEXTS)
    other.add([Document("x", "a")], encoder)
    store.add([Document("y", "b")], encoder)
    assert "x" in store
    assert "y" in store


def test_creating_over_an_index_is_refused(store):
    with pytest.raises(FileExistsError, match="already an index; add documents with `openembed add`"):
        Store.create(store.directory)


def test_a_store_without_a_model_serves_bm25_only(tmp_path):
    store = Store.create(tmp_path / "words", language="none")
    store.add(documents())
    assert list(store.bm25(["chase"], 10)[0]) == ["d1", "d0"]  # equal scores: the greater id first
    with pytest.raises(ValueError, match="built without a model"):
        store.dense(np.zeros((1, 4), dtype=np.float32))


def test_compacting_keeps_rankings_and_frees_the_deleted(store, encoder):
    store.add(documents(10, 40), encoder)
    store.delete([f"d{n}" for n in range(0, 30) if f"d{n}" in store and n % 2])
    queries = ["cats barn", "text vectors", "hay"]
    vectors_QD = encoder.encode(queries)
    before = store.bm25(queries, 50), store.dense(vectors_QD, 50)
    encoded = encoder.encoded
    store.compact()
    assert (store.bm25(queries, 50), store.dense(vectors_QD, 50)) == before
    assert [path.name for path in (store.directory / "segments").iterdir()] == ["000004"]
    assert not list((store.directory / "deleted").iterdir())
    assert encoder.encoded == encoded
    store.delete(list(store.ids()))
    store.compact()
    assert len(store) == 0
    assert store.bm25(queries, 5) == [{}, {}, {}]
    assert store.dense(vectors_QD, 5) == [{}, {}, {}]
    assert len(Store(store.directory)) == 0


def test_many_small_additions_are_merged(tmp_path, encoder):
    store = Store.create(tmp_path / "index", model=describe_model("bag", encoder))
    for number in range(2 * store_module.SEGMENTS + 3):
        store.add([Document(f"d{number}", f"word{number} common")], encoder)
        assert len(list((store.directory / "segments").iterdir())) <= store_module.SEGMENTS
    assert encoder.encoded == len(store) == 2 * store_module.SEGMENTS + 3
    assert list(store.bm25(["word7"], 3)[0]) == ["d7"]


def test_opening_while_a_compaction_removes_what_the_manifest_named(store, encoder, monkeypatch):
    read = store_module.read_manifest
    store.add([Document("x", "a")], encoder)
    old = read(store.directory)
    store.compact()
    answers = iter([old])
    monkeypatch.setattr(store_module, "read_manifest", lambda directory: next(answers, None) or read(directory))
    assert sorted(Store(store.directory).ids()) == sorted(store.ids())


def test_a_query_that_is_not_unicode_finds_by_its_other_words(store):
    assert list(store.bm25(["hay\ud800 \0"], 5)[0]) == ["d3"]


def test_adding_nothing_changes_nothing(store, encoder):
    assert store.add([], encoder) == 0
    assert store.delete([]) == 0
    assert json.loads((store.directory / "manifest.json").read_text())["change"] == 1


def test_no_space_leaves_the_last_state(store, encoder, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(segments, "save_array", full)
        with pytest.raises(OSError, match="No space left"):
            store.add([Document("x", "a")], encoder)
    assert [path.name for path in (store.directory / "segments").iterdir()] == ["000001"]
    assert len(Store(store.directory)) == len(TEXTS)
    assert store.add([Document("x", "a")], encoder) == 1


def test_killed_at_every_step_to_the_disk_it_is_as_before_or_as_after(store, encoder, tmp_path):
    store.add(documents(10, 14), encoder)
    store.delete(["d2"])
    changes = {
        "add": lambda s: s.add([Document("d1", "llamas"), Document("new", "hay")], encoder, replace=True),
        "delete": lambda s: s.delete(["d0", "d11"]),
        "compact": Store.compact,
    }
    for name, change in changes.items():
        shutil.copytree(store.directory, tmp_path / name)
        change(Store(tmp_path / name))
        states = [{d.id: d.text for d in Store(path).documents()} for path in (store.directory, tmp_path / name)]
        seen, step = set(), 0
        while True:
            copy = tmp_path / f"{name}{step}"
            shutil.copytree(store.directory, copy)
            if not dies_at(step, lambda change=change, copy=copy: change(Store(copy))):
                break
            found = Store(copy)
            assert {d.id: d.text for d in found.documents()} in states
            seen.add(len(found))
            found.add([Document("later", "after the crash")], encoder)
            assert len(Store(copy)) == len(found)
            named = {info.name for info in found._state.manifest.segments}
            assert {path.name for path in (copy / "segments").iterdir()} == named
            step += 1
        assert step > 4, name
        assert seen == {len(state) for state in states}, name


def test_bare_strings_are_no_lists(tmp_path):
    store = Store.create(tmp_path / "bare", [Document(id=name, text=f"text {name}") for name in ("1", "2")])
    with pytest.raises(TypeError, match=r"Write \['12'\]"):
        store.delete("12")
    with pytest.raises(TypeError, match="one string"):
        store.bm25("text")
    assert len(store) == 2


def test_filters_apply_to_both_searches_across_segments_and_deletions(store, encoder):
    store.add(documents(10, 40), encoder)
    store.delete(["d11", "d3"])
    condition = {"n": {"gte": 3, "lt": 12}}
    expected = {"d4", "d5", "d10"}
    assert set(store.dense(encoder.encode(["hay"]), 100, filter=condition)[0]) == expected
    assert set(store.bm25(["title"], 100, filter=condition)[0]) == expected
    everything = store.bm25(["cats"], 100)[0]
    assert store.bm25(["cats"], 100, filter={"n": {"exists": True}})[0] == everything
    assert store.bm25(["cats"], 100, filter={"n": {"in": [0, 12]}})[0] == {
        i: everything[i] for i in everything if i in ("d0", "d12")
    }
    assert store.dense(encoder.encode(["hay"]), 5, filter={"n": "x"}) == [{}]
    with pytest.raises(ValueError, match=r"filter\.n\.near: unknown operator"):
        store.dense(encoder.encode(["hay"]), 5, filter={"n": {"near": 3}})
    store.compact()
    assert set(store.bm25(["title"], 100, filter=condition)[0]) == expected


def test_an_index_of_the_first_format_is_read_filtered_and_renewed_by_compacting(store, encoder):
    query_QD = encoder.encode(["cats in a barn"])
    found = store.dense(query_QD, 6), store.dense(query_QD, 6, filter={"n": {"lt": 3}})
    manifest = store.directory / "manifest.json"
    values = json.loads(manifest.read_text())
    values["format"] = 1
    for info in values["segments"]:
        del info["coded"], info["columns"]
    manifest.write_text(json.dumps(values))
    for path in (store.directory / "segments" / "000001").iterdir():
        if path.name.startswith(("codes", "metadata")):
            path.unlink()
    old = Store(store.directory)
    assert (old.dense(query_QD, 6), old.dense(query_QD, 6, filter={"n": {"lt": 3}})) == found
    old.delete(["d5"])
    old.compact()
    assert json.loads(manifest.read_text())["format"] == 3
    assert (store.directory / "segments" / "000003" / "codes.u8").exists()


def test_update_encodes_only_what_changed(store, encoder):
    before = encoder.encoded
    changed = [
        Document("d0", "llamas hum", metadata={"n": 100}),
        Document("d1", TEXTS[1], title="Title 1", metadata={"n": 101}),
    ]
    assert store.update(changed, encoder) == 2
    assert encoder.encoded == before + 1
    assert next(iter(store.dense(encoder.encode(["llamas hum"]), 1)[0])) == "d0"
    assert store.document("d1").metadata == {"n": 101}
    assert set(store.bm25(["chase"], 5, filter={"n": 101})[0]) == {"d1"}
    store.update([Document("d2", TEXTS[2], title="Title 2", metadata={"n": 7})])
    assert len(store) == len(TEXTS)
    with pytest.raises(ValueError, match="1 texts changed; give the encoder"):
        store.update([Document("d2", "other")])
    with pytest.raises(ValueError, match="no document with id 'new'; nothing was updated"):
        store.update([Document("d1", "x"), Document("new", "y")], encoder)
    with pytest.raises(ValueError, match="made by bag"):
        store.update([Document("d1", "x")], BagOfWords(name="other"))
    assert store.document("d1").text == TEXTS[1]


def test_a_reader_keeps_its_state_until_it_refreshes(store, encoder):
    reader = Store(store.directory)
    query_QD = encoder.encode(["cats in a barn"])
    found = reader.dense(query_QD, 10), reader.bm25(["chase"], 10)
    assert not reader.refresh()
    store.add([Document("x", "cats in a barn")], encoder)
    store.delete(["d0"])
    store.compact()
    assert (reader.dense(query_QD, 10), reader.bm25(["chase"], 10)) == found
    assert reader.document("d0").text == TEXTS[0]
    assert reader.refresh()
    assert next(iter(reader.dense(query_QD, 10)[0])) == "x"
    assert "d0" not in reader


def test_a_merge_without_space_leaves_what_was_added(tmp_path, encoder, monkeypatch, caplog):
    store = Store.create(tmp_path / "index", model=describe_model("bag", encoder))
    for number in range(store_module.SEGMENTS):
        store.add([Document(f"d{number}", "common")], encoder)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_merge", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert store.add([Document("last", "common")], encoder) == 1
    assert "could not be merged" in caplog.text
    assert "last" in Store(store.directory)
