"""Measures exact sparse search of a store beside other engines on the same impact vectors, in one process, one thread.

    python benchmarks/sparse_data.py DATA TOKENIZER.json --count 100000 --out SPARSE
    OMP_NUM_THREADS=1 python benchmarks/sparse.py SPARSE --out benchmarks/sparse-DATE.json

Needs no torch. numba, bm25s and pyseismic-lsr take part where they are installed. Engines take turns, ROUND queries each, so
that whatever else the machine does meets all of them; medians and means of single queries are of the clock, ``cpu`` ones of
the processor. Recall is of the ten best by float64 products. Seismic is approximate: of its settings those are shown that
find .99 of the ten best, or the one that finds most. bm25s has no query weights; for short queries idf is put into its
documents, for long ones it takes no part. What is told of building it is the transposition by scipy and the weighing, and its
bytes are those of its arrays, which cannot say what terms a document has. ``postings`` is the mean number of postings of a
query's terms: 8 bytes each, which an engine that reads them all has to bring from memory.
"""

import argparse
import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reports import clocked, environment, finished
from scipy import sparse as sp

from openembed.index import sparse
from openembed.index.manifest import ModelInfo
from openembed.index.store import Store
from openembed.records import Document

K, ROUND = 10, 25
SETTINGS = [(cut, factor) for cut in (5, 10, 20, 40) for factor in (1.0, 0.9, 0.8, 0.7)]


def row_of(matrix, row):
    part = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[part], matrix.data[part]


def our_store(place, documents, precision):
    shutil.rmtree(place, ignore_errors=True)
    model = ModelInfo(name="impacts", fingerprint="f", width=documents.shape[1], kind="sparse", precision=precision)
    rows = (Document(str(n), "") for n in range(documents.shape[0]))
    _, wall, cpu = clocked(lambda: Store.create(place, rows, documents, language="none", model=model))
    sizes = {path.name: path.stat().st_size for path in place.rglob("sparse.*")}
    reopened, opening, _ = clocked(lambda: Store(place))
    report = {"build_s": round(wall, 1), "build_cpu_s": round(cpu, 1), "bytes": sum(sizes.values()), "files": sizes}
    return reopened, report | {"open_ms": round(opening * 1e3, 2)}


def top(scores_N):
    found = np.flatnonzero(scores_N)
    best = found[np.argpartition(scores_N[found], -K)[-K:]] if len(found) > K else found
    return best[np.argsort(-scores_N[best])].tolist()


def numpy_lists(columns):
    def search(terms, weights):
        scores_N = np.zeros(columns.shape[0], dtype=np.float32)
        for term, weight in zip(terms, weights, strict=True):
            part = slice(columns.indptr[term], columns.indptr[term + 1])
            scores_N[columns.indices[part]] += weight * columns.data[part]
        return top(scores_N)

    return search


def numba_lists(columns):
    import numba

    @numba.njit(fastmath=True)
    def add_up(starts, documents, impacts, terms, weights, scores_N):
        for number in range(len(terms)):
            for place in range(starts[terms[number]], starts[terms[number] + 1]):
                scores_N[documents[place]] += weights[number] * impacts[place]

    def search(terms, weights):
        scores_N = np.zeros(columns.shape[0], dtype=np.float32)
        add_up(columns.indptr, columns.indices, columns.data, terms, weights, scores_N)
        return top(scores_N)

    return search


def bm25s_arrays(columns, queries):
    weight_V = np.zeros(columns.shape[1], dtype=np.float32)
    weight_V[queries.indices] = queries.data
    data = columns.data * np.repeat(weight_V, np.diff(columns.indptr))
    return {"data": data, "indices": columns.indices, "indptr": columns.indptr}


def built_bm25s(documents, queries):
    """What making and keeping bm25s' arrays of these documents costs."""
    arrays, wall, cpu = clocked(lambda: bm25s_arrays(documents.tocsc(), queries))
    sizes = {name: array.nbytes for name, array in arrays.items()}
    return {"build_s": round(wall, 1), "build_cpu_s": round(cpu, 1), "bytes": sum(sizes.values()), "arrays": sizes}


def of_bm25s(columns, queries, backend):
    """bm25s over scores that have the queries' term weights in them, the same weight for a term in every query."""
    import bm25s

    index = bm25s.BM25(backend=backend)
    index.nonoccurrence_array = None
    index.scores = bm25s_arrays(columns, queries) | {"num_docs": columns.shape[0]}
    index.vocab_dict = {str(term): term for term in range(columns.shape[1])}
    if backend == "numba":
        index.activate_numba_scorer()

    def search(terms, _weights):
        asked = bm25s.tokenization.Tokenized(ids=[terms.tolist()], vocab=index.vocab_dict)
        found, _ = index.retrieve(asked, k=K, show_progress=False, n_threads=1)
        return found[0].tolist()

    return search


def seismic_index(documents):
    import seismic

    dataset = seismic.SeismicDataset()
    names = [str(n) for n in range(documents.shape[0])]
    given = documents.indices.astype(np.int64), documents.data, documents.indptr.astype(np.int64)
    settings = {"n_postings": 4000, "centroid_fraction": 0.1, "summary_energy": 0.4, "max_fraction": 1.5, "num_threads": 1}
    _, fed, _ = clocked(lambda: dataset.add_documents_by_id(names, *given))
    index, built, cpu = clocked(lambda: seismic.SeismicIndex.build_from_dataset(dataset, **settings))
    with TemporaryDirectory() as folder:
        index.save(f"{folder}/index")
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return index, {"build_s": round(fed + built, 1), "build_cpu_s": round(cpu, 1), "bytes": size, "settings": settings}


def of_seismic(index, cut, factor):
    import seismic

    kind = seismic.get_seismic_string()

    def search(terms, weights):
        names = np.array([str(term) for term in terms], dtype=kind)
        hits = index.search("q", names, np.ascontiguousarray(weights), k=K, query_cut=cut, heap_factor=factor)
        return [int(document) for _, _, document in hits]

    return search


def recall(found, best):
    """The share of the k best; any document that scores as much as the k-th counts as one."""
    return round(float(np.mean([len(set(a) & b) / min(K, len(b)) for a, b in zip(found, best, strict=True) if b])), 4)


def in_turns(engines, queries):
    """Returns for each engine what it finds, and clock and processor seconds of each query."""
    found, taken = {name: [] for name in engines}, {name: [] for name in engines}
    for search in engines.values():
        search(*row_of(queries, 0))
    for start in range(0, queries.shape[0], ROUND):
        for name, search in engines.items():
            for row in range(start, min(start + ROUND, queries.shape[0])):
                hits, wall, cpu = clocked(lambda search=search, row=row: search(*row_of(queries, row)))
                found[name].append(hits)
                taken[name].append((wall, cpu))
    return found, {name: np.array(times) for name, times in taken.items()}


def chosen_seismic(index, queries, best):
    """Returns the settings worth showing: the fastest that finds .99, else the one that finds most."""
    rows = []
    for cut, factor in SETTINGS:
        search = of_seismic(index, cut, factor)
        found, _, cpu = clocked(lambda search=search: [search(*row_of(queries, row)) for row in range(queries.shape[0])])
        rows.append({"cut": cut, "factor": factor, "recall": recall(found, best), "cpu": cpu})
    enough = [row for row in rows if row["recall"] >= 0.99]
    pick = min(enough, key=lambda row: row["cpu"]) if enough else max(rows, key=lambda row: row["recall"])
    return pick["cut"], pick["factor"]


def measured(name, queries, engines, best):
    found, taken = in_turns(engines, queries)
    rows = {}
    for engine, times in taken.items():
        wall, cpu = np.median(times, axis=0) * 1e3, times.mean(axis=0) * 1e3
        rows[engine] = {
            "recall": recall(found[engine], best),
            "median_ms": round(float(wall[0]), 3),
            "median_cpu_ms": round(float(wall[1]), 3),
            "mean_cpu_ms": round(float(cpu[1]), 3),
            "cpu_qps": round(1e3 / float(cpu[1]), 1),
        }
        print(name, engine, rows[engine], flush=True)
    return rows


def best_of(documents, queries):
    wanted = []
    for start in range(0, queries.shape[0], 8):
        scores = (documents.astype(np.float64) @ queries[start : start + 8].T.astype(np.float64)).toarray()
        wanted += [
            set(np.flatnonzero((row >= np.partition(row, -K)[-K] * (1 - 1e-7)) & (row > 0)).tolist()) for row in scores.T
        ]
    return wanted


def effort(store, queries):
    """What our search looks at: postings added up and documents scored, of how many postings there are."""
    field = store._state.segments[0].fields["sparse"]
    segments = [sparse.SparseVectors(field, np.ones(field.count, dtype=bool))]
    parts = [sparse._Part.of(segment) for segment in segments]
    compiled, rows = sparse._Compiled(sparse.postings_library(), parts, K), []
    lengths = np.diff(field.starts_V1)
    for row in range(queries.shape[0]):
        compiled(*row_of(queries, row))
        there = lengths[queries.indices[queries.indptr[row] : queries.indptr[row + 1]]].sum()
        rows.append((there, compiled.searches.touched, compiled.searches.rescored))
    return dict(zip(("postings", "postings_added", "documents_scored"), np.mean(rows, axis=0).round().tolist(), strict=True))


def of_store(store, width):
    def search(terms, weights):
        query = sp.csr_matrix((weights, terms, [0, len(terms)]), shape=(1, width))
        return [int(identifier) for identifier in store.sparse(query, K)[0]]

    return search


def engines_for(wanted, name, stores, documents, columns, queries):
    engines = {label: of_store(store, documents.shape[1]) for label, store in stores.items()}
    if "scipy" in wanted:
        engines["scipy product"] = lambda terms, weights: top(
            (documents @ sp.csc_matrix((weights, terms, [0, len(terms)]), shape=(documents.shape[1], 1))).toarray().ravel()
        )
    if "numpy" in wanted:
        engines["numpy lists"] = numpy_lists(columns)
    if "numba" in wanted:
        engines["numba lists"] = numba_lists(columns)
    if "bm25s" in wanted and name == "short":
        backends = [backend for backend in ("numpy", "numba") if find_spec(backend)]
        engines |= {f"bm25s, {backend}": of_bm25s(columns, queries, backend) for backend in backends}
    return engines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--engines", nargs="*", default=["float16", "uint8", "scipy", "numpy", "numba", "bm25s", "seismic"])
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    missing = [name for name in ("numba", "bm25s", "seismic") if not find_spec(name)]
    options.engines = [name for name in options.engines if name not in missing]
    documents = sp.load_npz(options.data / "documents.npz")
    store, built = our_store(options.data / "store", documents, "float32")
    report = {
        **environment("scipy", "numba", "bm25s", "pyseismic-lsr"),
        "note": options.note,
        "count": documents.shape[0],
        "terms_a_document": round(documents.nnz / documents.shape[0], 1),
        "k": K,
        "build": {"openembed": built},
    }
    print(built, flush=True)
    columns = documents.tocsc()
    columns.indptr = columns.indptr.astype(np.int64)
    stores = {"openembed": store}
    for precision in [name for name in ("float16", "uint8") if name in options.engines]:
        name = f"openembed, {precision}"
        stores[name], report["build"][name] = our_store(options.data / precision, documents, precision)
    index = None
    if "seismic" in options.engines:
        index, report["build"]["seismic"] = seismic_index(documents)
        print(report["build"]["seismic"], flush=True)
    if "bm25s" in options.engines:
        short = sparse.checked(sp.load_npz(options.data / "short.npz")[: options.queries], documents.shape[1], str)
        report["build"]["bm25s"] = built_bm25s(documents, short)
        print(report["build"]["bm25s"], flush=True)
    for name in ("short", "long"):
        queries = sparse.checked(sp.load_npz(options.data / f"{name}.npz")[: options.queries], documents.shape[1], str)
        best = best_of(documents, queries)
        engines = engines_for(options.engines, name, stores, documents, columns, queries)
        if index is not None:
            cut, factor = chosen_seismic(index, queries, best)
            engines[f"seismic, cut {cut}, heap factor {factor}"] = of_seismic(index, cut, factor)
        report[name] = {"terms_a_query": round(queries.nnz / queries.shape[0], 1), **effort(store, queries)}
        report[name]["engines"] = measured(name, queries, engines, best)
    finished(report, options.out)


if __name__ == "__main__":
    main()
