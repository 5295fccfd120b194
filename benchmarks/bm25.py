"""Measures BM25 of a store beside bm25s on real passages: single questions, ten best, one thread, taking turns.

    python benchmarks/passages.py DATA
    OMP_NUM_THREADS=1 python benchmarks/bm25.py DATA --count 100000 --out benchmarks/bm25-DATE.json

Needs no torch; bm25s' numba backend takes part where numba is installed. All score alike to the last bit; which of equal scores
comes first differs. The time of a question includes making its terms.
"""

import argparse
import os
import shutil
import sys
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

import numpy as np
from measuring import clocked, finished

from openembed.documents import read_documents
from openembed.index import lexical
from openembed.index.lexical import K1, B
from openembed.index.store import Store

K = 10


def of_bm25s(texts, analyze, backend):
    import bm25s

    index = bm25s.BM25(k1=K1, b=B, method="lucene", backend=backend)
    options = {"stopwords": analyze.stopwords, "stemmer": analyze.stemmer, "show_progress": False}
    index.index(bm25s.tokenize(texts, **options), show_progress=False)
    if backend == "numba":
        index.activate_numba_scorer()

    def search(text):
        asked = bm25s.tokenize([text], return_ids=False, **options)
        if not asked[0]:
            return []
        return index.retrieve(asked, k=K, show_progress=False, n_threads=1)[1][0].tolist()

    return search


def without_compiler(store):
    def search(text):
        kept, lexical.postings_library = lexical.postings_library, lambda: None
        try:
            return list(store.bm25([text], K)[0].values())
        finally:
            lexical.postings_library = kept

    return search


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--store", type=Path, default=None, help="A place for the store; it is kept, and used when there.")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    place = options.store or options.data / "bm25-store"
    report = {"date": datetime.now(UTC).date().isoformat(), "count": options.count, "note": options.note}
    if not (place / "manifest.json").exists():
        shutil.rmtree(place, ignore_errors=True)
        rows = islice(read_documents(options.data / "passages.jsonl"), options.count)
        _, report["build_s"], report["build_cpu_s"] = clocked(lambda: Store.create(place, rows))
    store = Store(place)
    texts = [document.text for document in store.documents()]
    engines = {"store": lambda text: list(store.bm25([text], K)[0].values()), "store, numpy": without_compiler(store)}
    for backend in ("numpy", "numba"):
        try:
            engines[f"bm25s, {backend}"] = of_bm25s(texts, store.analyzer, backend)
        except ImportError:
            sys.stderr.write(f"bm25s has no {backend} here\n")
    questions = [document.text for document in islice(read_documents(options.data / "queries.jsonl"), options.queries)]
    taken, scores = {name: [] for name in engines}, {name: [] for name in engines}
    for search in engines.values():
        search(questions[0])
    for question in questions:
        for name, search in engines.items():
            found, wall, cpu = clocked(lambda search=search, question=question: search(question))
            scores[name].append([score for score in found if score > 0])
            taken[name].append((wall, cpu))
    for name, times in taken.items():
        wall, cpu = np.median(times, axis=0) * 1e3
        equal = sum(a == b for a, b in zip(scores[name], scores["store"], strict=True))
        report[name] = {"median_ms": round(float(wall), 3), "median_cpu_ms": round(float(cpu), 3), "equal": equal}
    report |= {"questions": len(questions), "load_average": os.getloadavg()}
    finished(report, options.out)


if __name__ == "__main__":
    main()
