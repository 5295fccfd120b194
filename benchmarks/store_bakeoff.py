"""Which engine should hold an index: our own, LanceDB, or faiss or usearch beside SQLite (FTS5).

    python benchmarks/store_bakeoff.py DATA --count 100000 --out benchmarks/store-bakeoff-DATE.json

DATA as ``benchmarks/search.py`` wants it. Each engine gets the same passages, ids, metadata and vectors: build, recall of the
ten best, single and batch searches, a filter, BM25 on SciFact, bytes on disk, reopening, ten additions and deletions, and what
is left after kill -9 during additions. Needs lancedb, faiss-cpu and usearch beside openembed.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np

from openembed.documents import read_documents
from openembed.files import read_jsonl
from openembed.index import dense
from openembed.index.store import ModelInfo, Store

K = 10


def clocks(action):
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, round(time.perf_counter() - wall, 4), round(time.process_time() - cpu, 4)


class Own:
    """``openembed.index.Store``."""

    code = "this package's index folder"

    def __init__(self, place):
        self.place = place / "own"

    def build(self, documents, vectors_ND):
        model = ModelInfo(name="nano", fingerprint="bakeoff", width=vectors_ND.shape[1])
        self.store = Store.create(self.place, documents, vectors_ND, model=model)

    def open(self):
        self.store = Store(self.place)
        return len(self.store)

    def dense(self, queries_QD, **options):
        return [list(hits) for hits in self.store.dense(queries_QD, K, **options)]

    def filtered(self, query_D):
        return list(self.store.dense(query_D[None], K, filter={"words": {"gte": 10, "lt": 20}})[0])

    def bm25(self, text):
        return list(self.store.bm25([text], K)[0])

    def add(self, documents, vectors_ND):
        self.store.add(documents, vectors=vectors_ND)

    def delete(self, ids):
        self.store.delete(ids)

    def ids(self):
        return set(Store(self.place).ids())


class Lance:
    """LanceDB: vectors, metadata and its own full-text index in one table."""

    code = "a table, an index for each kind of search, their upkeep after every change"

    def __init__(self, place):
        os.environ.setdefault("LANCE_LOG", "error")
        import lancedb

        self.place = place / "lance"
        self.db = lancedb.connect(self.place)

    def _rows(self, documents, vectors_ND):
        import pyarrow as pa

        width = vectors_ND.shape[1]
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(vectors_ND).reshape(-1)), width)
        return pa.table(
            {
                "id": [d.id for d in documents],
                "text": [d.full_text for d in documents],
                "words": [int(d.metadata.get("words", 0)) for d in documents],
                "metadata": [json.dumps(d.metadata) for d in documents],
                "vector": vectors,
            }
        )

    def build(self, documents, vectors_ND):
        from lancedb.index import FTS

        self.table = self.db.create_table("t", self._rows(list(documents), vectors_ND))
        self.table.create_index("text", config=FTS(language="English", stem=True, remove_stop_words=True))

    def open(self):
        self.table = self.db.open_table("t")
        return self.table.count_rows()

    def dense(self, queries_QD, **_options):
        def one(query_D):
            search = self.table.search(query_D, vector_column_name="vector").distance_type("dot").bypass_vector_index()
            return [row["id"] for row in search.select(["id"]).limit(K).to_list()]

        return [one(query_D) for query_D in queries_QD]

    def filtered(self, query_D):
        search = self.table.search(query_D, vector_column_name="vector").distance_type("dot")
        return [
            row["id"] for row in search.where("words >= 10 AND words < 20", prefilter=True).select(["id"]).limit(K).to_list()
        ]

    def bm25(self, text):
        from lancedb.query import MatchQuery

        return [row["id"] for row in self.table.search(MatchQuery(text, "text")).select(["id"]).limit(K).to_list()]

    def add(self, documents, vectors_ND):
        self.table.add(self._rows(documents, vectors_ND))

    def delete(self, ids):
        self.table.delete("id IN ({})".format(", ".join(f"'{i}'" for i in ids)))

    def ids(self):
        return set(self.db.open_table("t").to_arrow()["id"].to_pylist())


class Sqlite:
    """SQLite for documents and words (FTS5), and a vector library's file beside it, written after every change."""

    code = "two stores to be kept in step by hand: a crash between them leaves vectors without documents or the reverse"

    def __init__(self, place, library):
        self.place, self.library = place / library, library
        self.place.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.place / "documents.db")
        self.file = self.place / "vectors.index"

    def build(self, documents, vectors_ND):
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE d (n INTEGER PRIMARY KEY, id TEXT UNIQUE, text TEXT, words INTEGER, metadata TEXT)")
        self.db.execute("CREATE VIRTUAL TABLE f USING fts5(text, content='d', content_rowid='n', tokenize='porter unicode61')")
        self.db.execute("CREATE INDEX words ON d (words)")
        self.index = self._made(vectors_ND.shape[1])
        self.add(list(documents), vectors_ND)

    def _made(self, width):
        if self.library == "faiss":
            import faiss

            return faiss.IndexIDMap2(faiss.IndexFlatIP(width))
        from usearch.index import Index

        return Index(ndim=width, metric="ip", dtype="f32")

    def open(self):
        if self.library == "faiss":
            import faiss

            self.index = faiss.read_index(str(self.file))
        else:
            from usearch.index import Index

            self.index = Index.restore(str(self.file), view=False)
        return self.db.execute("SELECT count(*) FROM d").fetchone()[0]

    def dense(self, queries_QD, **_options):
        if self.library == "faiss":
            numbers = self.index.search(queries_QD, K)[1]
        else:
            found = self.index.search(queries_QD, K, exact=True)
            numbers = np.atleast_2d(found.keys)
        return [self._ids(row) for row in numbers.tolist()]

    def _ids(self, numbers):
        rows = dict(self.db.execute(f"SELECT n, id FROM d WHERE n IN ({','.join('?' * len(numbers))})", numbers))
        return [rows[n] for n in numbers if n in rows]

    def filtered(self, query_D):
        if self.library != "faiss":
            return None  # usearch's Python interface takes no filter
        import faiss

        numbers = np.array([n for (n,) in self.db.execute("SELECT n FROM d WHERE words >= 10 AND words < 20")], dtype=np.int64)
        selector = faiss.IDSelectorBatch(numbers)
        return self._ids(self.index.search(query_D[None], K, params=faiss.SearchParameters(sel=selector))[1][0].tolist())

    def bm25(self, text):
        words = " OR ".join(f'"{word}"' for word in dict.fromkeys("".join(c if c.isalnum() else " " for c in text).split()))
        query = "SELECT d.id FROM f JOIN d ON d.n = f.rowid WHERE f MATCH ? ORDER BY bm25(f) LIMIT ?"
        return [i for (i,) in self.db.execute(query, (words, K))] if words else []

    def add(self, documents, vectors_ND):
        first = (self.db.execute("SELECT max(n) FROM d").fetchone()[0] or 0) + 1
        rows = [
            (first + n, d.id, d.full_text, d.metadata.get("words", 0), json.dumps(d.metadata)) for n, d in enumerate(documents)
        ]
        with self.db:
            self.db.executemany("INSERT INTO d VALUES (?, ?, ?, ?, ?)", rows)
            self.db.executemany("INSERT INTO f (rowid, text) VALUES (?, ?)", [(row[0], row[2]) for row in rows])
        numbers = np.arange(first, first + len(rows), dtype=np.int64)
        if self.library == "faiss":
            import faiss

            self.index.add_with_ids(np.ascontiguousarray(vectors_ND), numbers)
            faiss.write_index(self.index, str(self.file))
        else:
            self.index.add(numbers, np.ascontiguousarray(vectors_ND))
            self.index.save(str(self.file))

    def delete(self, ids):
        marks = ",".join("?" * len(ids))
        numbers = np.array([n for (n,) in self.db.execute(f"SELECT n FROM d WHERE id IN ({marks})", ids)], dtype=np.int64)
        with self.db:
            for n in numbers.tolist():
                text = self.db.execute("SELECT text FROM d WHERE n = ?", (n,)).fetchone()[0]
                self.db.execute("INSERT INTO f (f, rowid, text) VALUES ('delete', ?, ?)", (n, text))
            self.db.execute(f"DELETE FROM d WHERE id IN ({marks})", ids)
        if self.library == "faiss":
            import faiss

            self.index.remove_ids(numbers)
            faiss.write_index(self.index, str(self.file))
        else:
            self.index.remove(numbers)
            self.index.save(str(self.file))

    def ids(self):
        found = {i for (i,) in sqlite3.connect(self.place / "documents.db").execute("SELECT id FROM d")}
        self.open()
        held = self.index.ntotal if self.library == "faiss" else len(self.index)
        return found if held == len(found) else {f"{len(found)} documents but {held} vectors"}


ENGINES = {
    "own": Own,
    "lancedb": Lance,
    "faiss": lambda place: Sqlite(place, "faiss"),
    "usearch": lambda place: Sqlite(place, "usearch"),
}


def ndcg(qrels, run):
    def one(query):
        gain = sum(qrels[query].get(d, 0) / math.log2(n + 2) for n, d in enumerate(run[query]))
        return gain / sum(g / math.log2(n + 2) for n, g in enumerate(sorted(qrels[query].values(), reverse=True)[:K]))

    return round(sum(map(one, qrels)) / len(qrels), 4)


def scifact(make, place, data):
    """Returns nDCG@10 of the engine's BM25 on SciFact's test queries (published for bm25s: 0.6874)."""
    qrels = {}
    for line in (data / "scifact" / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        qrels.setdefault(query, {})[document] = int(grade)
    documents = list(read_documents(data / "scifact"))
    engine = make(place / "scifact")
    engine.build(documents, np.random.default_rng(0).standard_normal((len(documents), 8)).astype(np.float32))
    texts = {row["_id"]: row["text"] for _, row in read_jsonl(data / "scifact" / "queries.jsonl.gz") if row["_id"] in qrels}
    return ndcg(qrels, {query: engine.bm25(text) for query, text in texts.items()})


def write_until_killed(name, place):
    """Adds three documents at a time, writing each addition that returned; run in a process of its own."""
    from openembed.records import Document

    engine = ENGINES[name](Path(place))
    engine.open()
    for number in range(1_000_000):
        rows = [Document(f"new-{os.getpid()}-{number}-{n}", "text", metadata={"words": 1}) for n in range(3)]
        engine.add(rows, np.ones((3, 16), dtype=np.float32))
        sys.stdout.write(" ".join(row.id for row in rows) + "\n")
        sys.stdout.flush()


def kills(name, place, rounds):
    """Returns what was wrong after kill -9 during additions: how often an acknowledged document was lost, or worse."""
    from openembed.records import Document

    engine = ENGINES[name](place)
    engine.build([Document("first", "text", metadata={"words": 1})], np.ones((1, 16), dtype=np.float32))
    known, wrong, clock = {"first"}, [], random.Random(0)
    for _ in range(rounds):
        command = [sys.executable, __file__, "--write", name, str(place)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
        first = process.stdout.readline()
        time.sleep(clock.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        lines = (first + process.communicate()[0]).splitlines(keepends=True)
        known |= {i for line in lines if line.endswith("\n") for i in line.split()}
        try:
            found = ENGINES[name](place).ids()
        except Exception as error:
            wrong.append(f"does not open: {error}"[:120])
            continue
        if not known <= found:
            wrong.append(next(iter(found)) if len(found) == 1 else f"{len(known - found)} acknowledged documents lost")
        elif len(found - known) not in (0, 3):
            wrong.append(f"{len(found - known)} documents of one addition of 3")
        known = found
    return {"kills": rounds, "wrong": len(wrong), "examples": wrong[:3]}


def measure(make, place, documents, vectors_ND, queries_QD, best):
    from openembed.records import Document

    rows, engine = {}, make(place)
    _, rows["build_s"], rows["build_cpu_s"] = clocks(lambda: engine.build(documents, vectors_ND))
    rows["disk_mb"] = sum(path.stat().st_size for path in engine.place.rglob("*") if path.is_file()) // 1_000_000
    del engine
    engine = make(place)
    _, rows["reopen_s"], _ = clocks(engine.open)
    found, wall, cpu = clocks(lambda: engine.dense(queries_QD))
    rows["recall"] = round(float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, best, strict=True)])), 4)
    rows["batch_qps"], rows["batch_cpu_qps"] = round(len(queries_QD) / wall), round(len(queries_QD) / cpu)
    times = [clocks(lambda query_D=query_D: engine.dense(query_D[None]))[1:] for query_D in queries_QD[:40]]
    rows["single_ms"], rows["single_cpu_ms"] = (round(float(t) * 1e3, 2) for t in np.median(times, axis=0))
    times = [clocks(lambda query_D=query_D: engine.filtered(query_D))[2] for query_D in queries_QD[:10]]
    rows["filtered_cpu_ms"] = round(float(np.median(times)) * 1e3, 2) if engine.filtered(queries_QD[0]) else None
    added = [Document(f"new{n}", f"a new text {n}", metadata={"words": 4}) for n in range(10)]
    _, rows["add_10_s"], _ = clocks(lambda: engine.add(added, vectors_ND[:10]))
    _, rows["delete_10_s"], _ = clocks(lambda: engine.delete([d.id for d in added]))
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("OPENEMBED_SHARED", "shared")))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", nargs=2)
    options = parser.parse_args()
    if options.write:
        write_until_killed(*options.write)
    documents = list(islice(read_documents(options.data / "passages.jsonl"), options.count))
    vectors_ND = np.array(np.load(options.data / "d" / "vectors.npy", mmap_mode="r")[: options.count])
    queries_QD = np.load(options.data / "q" / "vectors.npy")[::5]
    best = [[documents[n].id for n in row] for row in dense.top_documents(queries_QD, vectors_ND, K).documents_QK.tolist()]
    report = {"count": options.count, "width": vectors_ND.shape[1]}
    for name in options.engines:
        place = options.data / "bakeoff" / name
        shutil.rmtree(place, ignore_errors=True)
        (place / "kill").mkdir(parents=True)
        rows = measure(ENGINES[name], place, documents, vectors_ND, queries_QD, best)
        rows["scifact_bm25_ndcg"] = scifact(ENGINES[name], place, options.shared / "data")
        rows["kill_9"] = kills(name, place / "kill", options.kills)
        report[name] = rows
        print(name, json.dumps(rows, indent=2), flush=True)
        shutil.rmtree(place)
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
