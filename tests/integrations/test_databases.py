"""Qdrant (its own local mode) and PostgreSQL with pgvector (a server, named by OPENEMBED_POSTGRES): both as a store is."""

import json
import os
import uuid

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_fakes import SparseWords
from store_fakes import BagOfWords
from typer.testing import CliRunner

from openembed.cli import app
from openembed.index.filters import holds, parse_filter
from openembed.index.store import Store, describe_model
from openembed.integrations.database import DatabaseInfo, fill
from openembed.integrations.export import export, open_database
from openembed.integrations.pgvector import PgVectorIndex
from openembed.integrations.qdrant import QdrantIndex
from openembed.records import Document, Query
from openembed.steps import DenseConfig, Search

WORDS = ["cat", "dog", "fish", "tree", "stone", "river", "moon", "salt"]
ODD = ["a/b", "ä ö", "'; DROP TABLE openembed; --", '"quoted"', "%s", "{}", "$v0", "x\\", "0"]
DOCUMENTS = [
    Document(
        id=ODD[n] if n < len(ODD) else f"d{n}",
        text=f"{WORDS[n % 8]} {WORDS[n // 8 % 8]} text {n}",
        title="" if n % 3 else f"Title {n}",
        metadata={
            "lang": ["en", "de", "pl"][n % 3],
            "year": 1990 + n,
            "price": n / 4,
            "tags": WORDS[: n % 4],
            "odd name.x": f"v{n % 2}",
            "author": {"name": WORDS[n % 5], "born": 1900 + n},
            "parts": [{"page": n % 6}, {"page": 7}],
            **({"isbn": str(n)} if n % 5 == 0 else {}),
            **({"note": None} if n % 7 == 0 else {}),
        },
    )
    for n in range(60)
]
INFO = DatabaseInfo(model=describe_model("bag", BagOfWords()))
TARGETS = ["qdrant", "postgresql"]


@pytest.fixture(scope="module")
def postgres():
    psycopg = pytest.importorskip("psycopg")
    address = os.environ.get("OPENEMBED_POSTGRES")
    if not address:
        pytest.skip("no PostgreSQL to test with: set OPENEMBED_POSTGRES=postgresql://USER@HOST/DATABASE (with pgvector)")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
    return address


@pytest.fixture(params=TARGETS)
def target(request, tmp_path):
    """The address of a database that is not there yet, and is gone after."""
    name = f"t{uuid.uuid4().hex[:12]}"
    if request.param == "qdrant":
        pytest.importorskip("qdrant_client")
        yield f"qdrant://{tmp_path}/qdrant/{name}"
    else:
        address = request.getfixturevalue("postgres")
        yield f"{address}#{name}"
        import psycopg

        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(f"DROP TABLE IF EXISTS {name}")


@pytest.fixture
def store(tmp_path):
    made = Store.create(tmp_path / "store", DOCUMENTS, vectors(DOCUMENTS), model=INFO.model)
    made.add([Document(id="late", text="moon over a river")], BagOfWords())
    made.delete(["d20", "d21"])
    return made


def vectors(documents):
    return BagOfWords().encode([document.full_text for document in documents])


def queries(*texts):
    return BagOfWords().encode(texts)


def close(database):
    if isinstance(database, QdrantIndex):
        database._client.close()


def test_it_is_searched_like_the_store_it_came_from(store, target):
    counts = export(store, target)
    assert counts == {"written": 59, "unchanged": 0, "removed": 0}
    database = open_database(target)
    assert len(database) == len(store) == 59
    assert sorted(database.ids()) == sorted(store.ids())
    queries_QD = queries("cat dog", "moon", "river salt", "title 3")
    for ours, theirs in zip(store.dense(queries_QD, 59), database.dense(queries_QD, 59), strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_allclose([ours[name] for name in theirs], list(theirs.values()), atol=2e-6)
        assert list(theirs.values()) == sorted(theirs.values(), reverse=True)
    for name in ("d30", ODD[2], "late"):
        document = database.document(name)
        assert (document, document.metadata) == (store.document(name), store.document(name).metadata)
    with pytest.raises(ValueError, match="no document with id 'd20'"):
        database.document("d20")
    for config in (DenseConfig(k=5), DenseConfig(k=5, exact=True, filter={"year": {"gte": 2000}, "author.name": "cat"})):
        here, there = (config.build(place, BagOfWords())(Search((Query("q", "dog dog fish"),))) for place in (store, database))
        assert list(there.run["q"]) == list(here.run["q"])
        assert there.run["q"]
    close(database)


def test_exporting_again_writes_only_what_changed_and_prunes_what_is_gone(store, target):
    export(store, target)
    assert export(store, target) == {"written": 0, "unchanged": 59, "removed": 0}
    changed = Document(id="d30", text="a new text", metadata={"lang": "en"})
    store.add([changed], BagOfWords(), replace=True)
    store.delete(["d31"])
    assert export(store, target) == {"written": 1, "unchanged": 57, "removed": 0}
    database = open_database(target)
    assert len(database) == 59
    assert database.document("d30").text == "a new text"
    close(database)
    assert export(store, target, prune=True) == {"written": 0, "unchanged": 58, "removed": 1}
    database = open_database(target)
    assert sorted(database.ids()) == sorted(store.ids())
    close(database)


def test_killed_midway_it_goes_on(store, target):
    database, rows = open_database(target, INFO), list(store.rows())

    def failing():
        yield from rows[:30]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fill(database, failing(), batch=8)
    assert 0 < len(database) <= 30
    there = len(database)
    assert fill(database, rows, batch=8) == {"written": 59 - there, "unchanged": there, "removed": 0}
    close(database)


FILTERS = [
    {},
    {"lang": "en"},
    {"year": {"gte": 2000, "lt": 2020}},
    {"year": 2003},
    {"price": 2.25},
    {"tags": "dog"},
    {"tags": {"in": ["fish", "nothing"]}},
    {"year": {"in": [1991, 2000.0, "x"]}},
    {"isbn": {"exists": True}},
    {"note": {"exists": False}},
    {"tags": {"exists": True}},
    {"not": {"lang": "en"}},
    {"or": [{"lang": "pl"}, {"year": {"lt": 1995}}]},
    {"or": []},
    {"and": [{"lang": "de"}, {"not": {"tags": "cat"}}]},
    {"odd name.x": "v1"},
    {"author.name": {"in": ["cat", "dog"]}, "author.born": {"gte": 1910}},
    {"parts.page": 3},
    {"author": {"exists": True}},
    {"year": {"gte": 1995, "in": [1994, 1999, 2003], "exists": True}},
    {"year": {"gte": 1995, "lt": "x"}},
    {"lang": "'; DROP TABLE x; --"},
    {"'; DROP TABLE x; --": "a"},
    {"lang') OR TRUE --": "a"},
    {"%s": "%s"},
    {"$": 1},
    {"not": {"missing": {"gt": 3}}},
]


@pytest.fixture(scope="module", params=TARGETS)
def filled(request, tmp_path_factory):
    if request.param == "qdrant":
        client = pytest.importorskip("qdrant_client").QdrantClient(":memory:")
        database = QdrantIndex(client, "filled", INFO)
    else:
        psycopg = pytest.importorskip("psycopg")
        connection = psycopg.connect(request.getfixturevalue("postgres"), autocommit=True)
        connection.execute("DROP TABLE IF EXISTS filled")
        database = PgVectorIndex(connection, "filled", INFO)
    database.add(DOCUMENTS, vectors(DOCUMENTS))
    return database


def matching(given):
    condition = parse_filter(given)
    return {document.id for document in DOCUMENTS if holds(condition, document)}


@pytest.mark.parametrize("given_filter", FILTERS, ids=json.dumps)
def test_filters_mean_what_they_mean_to_us(filled, given_filter):
    (hits,) = filled.dense(queries("cat dog"), len(DOCUMENTS), filter=given_filter)
    assert set(hits) == matching(given_filter)


fields = st.sampled_from(
    ["lang", "year", "price", "tags", "isbn", "note", "missing", "odd name.x", "author.name", "parts.page"]
)
numbers = st.integers(1985, 2055) | st.sampled_from([0, 0.25, 3.5, 12.75])
atoms = st.one_of(
    st.builds(lambda f, v: {f: v}, fields, st.sampled_from(["en", "de", "cat", "v1", "5"]) | numbers),
    st.builds(lambda f, v: {f: {"in": v}}, fields, st.lists(st.sampled_from(["en", "dog", "v0"]) | numbers, max_size=3)),
    st.builds(lambda f, v: {f: {"exists": v}}, fields, st.booleans()),
    st.builds(lambda f, low, high: {f: {"gte": low, "lt": high}}, fields, numbers, numbers),
    st.builds(lambda f, low: {f: {"gt": low}}, fields, numbers),
)
filters = st.recursive(
    atoms,
    lambda parts: st.one_of(
        st.builds(lambda p: {"not": p}, parts),
        st.builds(lambda p: {"and": p}, st.lists(parts, max_size=3)),
        st.builds(lambda p: {"or": p}, st.lists(parts, max_size=3)),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_filter=filters)
def test_any_filter_means_what_it_means_to_us(filled, given_filter):
    (hits,) = filled.dense(queries("cat dog"), len(DOCUMENTS), filter=given_filter)
    assert set(hits) == matching(given_filter)


def test_a_filter_leaves_the_best_of_what_passes(filled):
    (everything,) = filled.dense(queries("cat dog"), len(DOCUMENTS))
    passing = matching({"lang": "pl"})
    (hits,) = filled.dense(queries("cat dog"), 5, filter={"lang": "pl"})
    assert list(hits) == [name for name in everything if name in passing][:5]


def test_bounds_of_strings(filled):
    if isinstance(filled, QdrantIndex):
        with pytest.raises(ValueError, match="Qdrant orders numbers and dates"):
            filled.dense(queries("cat"), filter={"lang": {"gte": "e"}})
        with pytest.raises(ValueError, match="with a double quote"):
            filled.dense(queries("cat"), filter={'a"b': 1})
        return
    (hits,) = filled.dense(queries("cat"), 60, filter={"lang": {"gte": "e", "lt": "f"}})
    assert set(hits) == matching({"lang": "en"})
    assert filled.dense(queries("cat"), filter={'a"b': 1}) == [{}]


def test_dates_are_ordered(target):
    database = open_database(target, INFO)
    rows = [Document(str(n), f"text {n}", metadata={"day": f"2024-01-{n:02d}"}) for n in range(1, 20)]
    database.add(rows, vectors(rows))
    (hits,) = database.dense(queries("text"), 30, filter={"day": {"gte": "2024-01-05", "lt": "2024-01-09"}})
    assert set(hits) == {"5", "6", "7", "8"}
    close(database)


def test_cut_and_halved_vectors(store, target):
    export(store, target, dimensions=16, precision="float16")
    database = open_database(target)
    assert (database.info.width, database.model.width) == (16, 32)
    queries_QD = queries("cat dog", "moon")
    whole_ND = vectors(store.documents())[:, :16]
    whole_ND /= np.linalg.norm(whole_ND, axis=1, keepdims=True)
    cut_QD = queries_QD[:, :16] / np.linalg.norm(queries_QD[:, :16], axis=1, keepdims=True)
    expected = dict(zip(store.ids(), (cut_QD @ whole_ND.T)[0].tolist(), strict=True))
    for given_QD in (queries_QD, cut_QD):
        (hits, _) = database.dense(given_QD, 59)
        np.testing.assert_allclose([expected[name] for name in hits], list(hits.values()), atol=2e-3)
    with pytest.raises(ValueError, match=r"queries of shape \(2, 20\); this index needs \(count, 16\)"):
        database.dense(queries_QD[:, :20])
    close(database)


def test_another_model_or_format_is_refused(store, target):
    export(store, target)
    with pytest.raises(ValueError, match="these differ"):
        export(store, target, dimensions=16)
    database = open_database(target)
    with pytest.raises(ValueError, match="its vectors were made by bag"):
        DenseConfig().build(database, BagOfWords(name="other"))
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        database.dense(queries("a") * np.float32("nan"))
    with pytest.raises(ValueError, match="k must be 1 or more"):
        database.dense(queries("a"), 0)
    close(database)
    with pytest.raises(ValueError, match="none of that name"):
        open_database(target + "x")


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_qdrant_quantizes_and_rescores(store, tmp_path, precision):
    """Its local mode keeps the settings and ranks exactly; a server quantizes."""
    pytest.importorskip("qdrant_client")
    target = f"qdrant://{tmp_path}/qdrant/quantized"
    export(store, target, precision=precision)
    database = open_database(target)
    assert database.info.precision == precision
    (hits,) = database.dense(queries("cat dog"), 10, exact=True)
    assert list(hits) == list(store.dense(queries("cat dog"), 10)[0])
    close(database)


def test_postgres_with_an_hnsw_index_and_a_rare_filter(postgres):
    """Without iterative scans a graph search would find few of what a filter leaves."""
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS graph")
        database = PgVectorIndex(connection, "graph", INFO)
        noise = np.random.default_rng(0).standard_normal((3000, 32), dtype=np.float32)
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        rows = [Document(f"n{n}", "text", metadata={"rare": n % 100 == 0}) for n in range(3000)]
        for start in range(0, 3000, 500):
            database.add(rows[start : start + 500], noise[start : start + 500])
        exact = database.dense(noise[:20], 10)
        database.create_index()
        database.create_index()
        connection.execute("SET enable_seqscan = off")
        plan = connection.execute(
            "EXPLAIN SELECT id FROM graph ORDER BY embedding <#> %s LIMIT 10", [database._vector(noise[0])]
        )
        assert "graph_hnsw" in str(plan.fetchall())
        found = database.dense(noise[:20], 10)
        shared = np.mean([len(a.keys() & b.keys()) / 10 for a, b in zip(exact, found, strict=True)])
        assert shared > 0.9
        for ours, theirs in zip(exact, database.dense(noise[:20], 10, exact=True), strict=True):
            assert list(ours) == list(theirs)
        assert all(len(hits) == 30 for hits in database.dense(noise[:5], 30, filter={"rare": True}))
        connection.execute("DROP TABLE graph")


def test_what_postgres_cannot_keep_is_said_before_it_is_tried(postgres):
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS refused, foreign_table")
        with pytest.raises(ValueError, match="pgvector keeps float32 or float16, got int8"):
            PgVectorIndex(connection, "refused", INFO.model_copy(update={"precision": "int8"}))
        database = PgVectorIndex(connection, "refused", INFO)
        for document in (Document("a", "x\0y"), Document("b", "x", metadata={"k": "\0"})):
            with pytest.raises(ValueError, match=f"document '{document.id}': holds NUL"):
                database.add([document], vectors([document]))
        assert len(database) == 0
        wide = DatabaseInfo(model=describe_model("wide", BagOfWords(width=2008)))
        connection.execute("DROP TABLE refused")
        with pytest.raises(ValueError, match=r"takes 2,000 dimensions of vector, these have 2,008; use --precision float16"):
            PgVectorIndex(connection, "refused", wide).create_index()
        connection.execute("DROP TABLE refused")
        connection.execute("CREATE TABLE foreign_table (id int)")
        with pytest.raises(ValueError, match="not made by openembed"):
            PgVectorIndex(connection, "foreign_table", INFO)
        connection.execute("DROP TABLE foreign_table")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mysql://u:secret@h/db", r"mysql://u:\*\*\*@h/db: not known; use qdrant://"),
        ("qdrant://localhost:6333", "expected qdrant://HOST:6333/COLLECTION"),
        ("qdrant://localhost:6333/a/b", "expected qdrant://HOST:6333/COLLECTION"),
        ("qdrant://127.0.0.1:9/books", "no Qdrant answers there"),
        ("postgresql://u:secret@127.0.0.1:9/db", r"u:\*\*\*@127\.0\.0\.1:9/db: no connection"),
    ],
)
def test_targets_that_are_not_there(target, message):
    pytest.importorskip("qdrant_client")
    pytest.importorskip("psycopg")
    with pytest.raises(ValueError, match=message) as raised:
        open_database(target, INFO)
    assert "secret" not in str(raised.value)


def test_the_command(store, target):
    def run(*arguments):
        result = CliRunner().invoke(app, ["export", str(store.directory), "--to", target, *arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    assert json.loads(run("--json")) == {"to": target, "written": 59, "unchanged": 0, "removed": 0}
    assert "0 documents written, 59 were there" in run()
    words = Store.create(store.directory.parent / "words", DOCUMENTS)
    result = CliRunner().invoke(app, ["export", str(words.directory), "--to", target])
    assert "has no vectors to export" in str(result.exception)


def test_a_missing_client_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"qdrant_client is not installed; .*openembed\[qdrant\]"):
        open_database("qdrant://localhost:6333/books")
    with pytest.raises(ValueError, match=r"psycopg is not installed; .*openembed\[pgvector\]"):
        open_database("postgresql://localhost/db")


def test_sparse_vectors_in_qdrant_are_found_as_in_the_store(tmp_path):
    pytest.importorskip("qdrant_client")
    words, bag = SparseWords(), BagOfWords()
    store = Store.create(tmp_path / "index", model=[describe_model("words", words), describe_model("bag", bag)])
    store.add(DOCUMENTS, [words, bag])
    target = f"qdrant://{tmp_path}/qdrant/words"
    assert export(store, target, kind="sparse")["written"] == len(DOCUMENTS)
    store.delete(["d20"])
    assert export(store, target, kind="sparse", prune=True) == {"written": 0, "unchanged": 59, "removed": 1}
    database = open_database(target)
    queries = words.encode(["salt moon text", "cat", ""])
    for condition in (None, {"lang": "de"}):
        for ours, theirs in zip(
            store.sparse(queries, 100, filter=condition), database.sparse(queries, 100, filter=condition), strict=True
        ):
            assert list(ours.items()) == list(theirs.items())
    with pytest.raises(ValueError, match="holds sparse vectors; search it with sparse"):
        database.dense(bag.encode(["cat"]))
    close(database)
    for options in ({"dimensions": 8}, {"precision": "float16"}):
        with pytest.raises(ValueError, match="sparse vectors go to Qdrant, whole and in float32"):
            export(store, target, kind="sparse", **options)
    with pytest.raises(ValueError, match="sparse vectors go to Qdrant"):
        export(store, "postgresql://host/database#table", kind="sparse")
