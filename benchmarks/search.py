"""Measures dense search, filters, reopening and changes of a store on real passages, beside faiss.

    python benchmarks/passages.py DATA
    openembed encode openembed-nano DATA/passages.jsonl -o DATA/d
    openembed encode openembed-nano DATA/queries.jsonl -o DATA/q --kind query
    python benchmarks/search.py DATA --count 100000 --out benchmarks/search-DATE.json

Milliseconds are medians of single queries, rates those of all queries at once; the processor's time is given beside the
clock's, since it tells more on a machine that does other things too. Recall is of the ten best by float64 products.
"""

import argparse
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from reports import clocked, finished

from openembed.documents import read_documents
from openembed.index import dense, sketch
from openembed.index.native import threads
from openembed.index.store import ModelInfo, Store

K = 10
EF_BUILD = 100
REOPEN = """
import sys, time
from openembed.index.store import Store
start = time.perf_counter()
len(Store(sys.argv[1]))
print(time.perf_counter() - start)
"""


def single(action, queries_QD, count):
    for query_D in queries_QD[:3]:
        action(query_D[None])
    taken = [clocked(lambda query_D=query_D: action(query_D[None]))[1:] for query_D in queries_QD[:count]]
    (wall, cpu), (slow, _) = np.median(taken, axis=0) * 1e3, np.quantile(taken, 0.95, axis=0) * 1e3
    return {"single_ms": round(float(wall), 3), "single_cpu_ms": round(float(cpu), 3), "single_p95_ms": round(float(slow), 3)}


def batch(action, queries_QD):
    found, wall, cpu = clocked(lambda: action(queries_QD))
    return found, {"batch_qps": round(len(queries_QD) / wall, 1), "batch_cpu_qps": round(len(queries_QD) / cpu, 1)}


def recall(found, best):
    return round(float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, best, strict=True)])), 4)


def of_store(store, queries_QD, best, rows, **options):
    def search(part_QD):
        return store.dense(part_QD, K, **options)

    found, speed = batch(search, queries_QD)
    return {"recall": recall([list(hits) for hits in found], best), **speed, **single(search, queries_QD, rows)}


def of_faiss(name, documents_ND, queries_QD, best, ids):
    import faiss

    faiss.omp_set_num_threads(threads())
    index = faiss.index_factory(documents_ND.shape[1], name, faiss.METRIC_INNER_PRODUCT)
    _, build, _ = clocked(lambda: (index.train(documents_ND[:100_000]), index.add(documents_ND)))
    (_, found), speed = batch(lambda part_QD: index.search(part_QD, K), queries_QD)
    rows = {"recall": recall([[ids[n] for n in row] for row in found.tolist()], best), **speed}
    return rows | single(lambda part_QD: index.search(part_QD, K), queries_QD, 30) | {"build_s": round(build, 1)}


def of_graph(library, documents_ND, queries_QD, best, ids):
    """HNSW of 32 neighbours over int8 vectors, by how many documents a search keeps in view; forty are found, the best ten
    by exact products kept."""
    if library == "faiss":
        import faiss

        faiss.omp_set_num_threads(threads())
        index = faiss.index_factory(documents_ND.shape[1], "HNSW32_SQ8", faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = EF_BUILD
        _, build_s, build_cpu_s = clocked(lambda: (index.train(documents_ND[:100_000]), index.add(documents_ND)))
    else:
        from usearch.index import Index

        index = Index(ndim=documents_ND.shape[1], metric="ip", dtype="i8", connectivity=32, expansion_add=EF_BUILD)
        keys = np.arange(len(documents_ND))
        _, build_s, build_cpu_s = clocked(lambda: index.add(keys, documents_ND, threads=threads()))

    def search(query_QD):
        if library == "faiss":
            near = index.search(query_QD, 40)[1][0]
        else:
            near = index.search(query_QD[0], 40, threads=1).keys.astype(np.int64)
        return near[np.argsort(-(documents_ND[near] @ query_QD[0]))[:K]]

    rows = {"build_s": round(build_s, 1), "build_cpu_s": round(build_cpu_s, 1)}
    for wide in (128, 256, 512, 1024):
        if library == "faiss":
            index.hnsw.efSearch = wide
        else:
            index.expansion_search = wide
        found = [[ids[n] for n in search(query_D[None])] for query_D in queries_QD]
        rows[f"ef {wide}"] = {"recall": recall(found, best), **single(search, queries_QD, 200)}
    return rows


def build(options, documents_ND):
    place = options.data / f"store-{options.count}"
    shutil.rmtree(place, ignore_errors=True)
    model = ModelInfo(name="openembed-nano", fingerprint="benchmark", width=documents_ND.shape[1])
    rows = islice(read_documents(options.data / "passages.jsonl"), options.count)
    store, wall, cpu = clocked(lambda: Store.create(place, rows, documents_ND, model=model))
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    return store, {"build_s": round(wall, 1), "build_cpu_s": round(cpu, 1), "disk_bytes_a_document": round(size / len(store))}


def filters(store, query_D):
    rows = {}
    for name, condition in {
        "source=medquad": {"source": "medquad"},
        "year>=1900": {"year": {"gte": 1900}},
        "10<=words<20, not from books": {"words": {"gte": 10, "lt": 20}, "not": {"source": "prose-books"}},
        "words=50 (few)": {"words": 50},
    }.items():
        masks, wall, _ = clocked(lambda condition=condition: store._state.eligible(condition))
        times = [clocked(lambda condition=condition: store.dense(query_D[None], K, filter=condition))[1] for _ in range(7)]
        matching = int(sum(mask_N.sum() for mask_N in masks))
        rows[name] = {
            "matching": matching,
            "mask_ms": round(wall * 1e3, 2),
            "search_ms": round(float(np.median(times)) * 1e3, 2),
        }
    return rows


def changes(store, documents_ND):
    """Times adding and deleting ten documents, and BM25, on the whole index."""
    from openembed.records import Document

    added = [Document(f"new{n}", f"a new text {n}") for n in range(10)]
    _, add_s, _ = clocked(lambda: store.add(added, vectors=documents_ND[:10]))
    _, delete_s, _ = clocked(lambda: store.delete([document.id for document in added]))
    texts = [document.text for document in islice(store.documents(), 20)]
    store.bm25(texts[:1], K)
    _, bm25_s, _ = clocked(lambda: store.bm25(texts, K))
    return {"add_10_s": round(add_s, 3), "delete_10_s": round(delete_s, 3), "bm25_ms": round(bm25_s / len(texts) * 1e3, 2)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=504)
    parser.add_argument("--faiss", nargs="*", default=["Flat"], help="Names of faiss indexes, as its index_factory takes them.")
    parser.add_argument("--reaches", nargs="*", type=float, default=[], help="Values of sketch.REACH beside the default.")
    parser.add_argument("--graphs", nargs="*", default=[], choices=["faiss", "usearch"], help="HNSW: takes long to build.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    documents_ND = np.array(np.load(options.data / "d" / "vectors.npy", mmap_mode="r")[: options.count])
    queries_QD = np.load(options.data / "q" / "vectors.npy")
    queries_QD = np.ascontiguousarray(queries_QD[:: max(1, len(queries_QD) // options.queries)][: options.queries])
    ids = [f"p{number}" for number in range(options.count)]
    best = [[ids[n] for n in row] for row in dense.top_documents(queries_QD, documents_ND, K).documents_QK.tolist()]
    store, rows = build(options, documents_ND)
    report = {"count": options.count, "width": documents_ND.shape[1], "threads": threads(), "store": rows}
    report["store, exact"] = of_store(store, queries_QD, best, 100, exact=True)
    for reach in [sketch.REACH, *options.reaches] if store._state.segments[0].fields["dense"].sketch is not None else []:
        sketch.REACH = reach
        report[f"store, approximate, reach {reach}"] = of_store(store, queries_QD, best, len(queries_QD), exact=False)
    for name in options.faiss:
        report[f"faiss {name}"] = of_faiss(name, documents_ND, queries_QD, best, ids)
    for library in options.graphs:
        report[f"{library} HNSW"] = of_graph(library, documents_ND, queries_QD, best, ids)
    report["filters"] = filters(store, queries_QD[0])
    report["changes"] = changes(store, documents_ND)
    command = [sys.executable, "-c", REOPEN, str(store.directory)]
    report["reopen_s"] = round(
        float(subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout), 3
    )
    finished(report, options.out)


if __name__ == "__main__":
    main()
