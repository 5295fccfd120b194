"""Times sparse search of small indexes and under filters, by each of its ways: as it chooses, by lists, by documents' own rows.

    python benchmarks/passages.py DATA
    python benchmarks/sparse_data.py DATA TOKENIZER.json --count 100000 --out SPARSE
    OMP_NUM_THREADS=1 python benchmarks/sparse_filters.py SPARSE --out benchmarks/sparse-filters-DATE.json

The first documents of SPARSE, of which a random share is eligible; single queries of 8 and of 40 terms, ten best. Without a
filter a search is made ready once and kept, as a store keeps it; under a filter it is made for each query. Ways take turns,
round after round; microseconds of the processor, medians over queries and rounds, beside the least and the greatest of the
rounds' own medians. ``numpy`` ways are those without a compiler. All ways must find the same.
"""

import argparse
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from reports import clocked, environment, finished
from scipy import sparse as sp

from openembed.index import sparse
from openembed.index.manifest import ModelInfo, SegmentInfo

K, SHARES = 10, (1.0, 0.25, 0.1, 0.03, 0.01, 0.001)
WAYS = "chosen", "lists", "rows", "numpy, chosen", "numpy, lists", "numpy, rows"
MOST_NUMPY, MOST_ROWS = 10_000, 30_000
"""Documents up to which numpy, and eligible ones up to which rows, are tried."""
CHOICE, LIBRARY = (sparse.FEW, sparse.ROW), sparse.postings_library


@contextmanager
def forced(way):
    """Searches made within go this way."""
    sparse.FEW, sparse.ROW = CHOICE
    if way.endswith("rows"):
        sparse.FEW, sparse.ROW = 1, -(10**6)
    elif way.endswith("lists"):
        sparse.FEW = np.inf
    sparse.postings_library = (lambda: None) if way.startswith("numpy") else LIBRARY
    try:
        yield
    finally:
        (sparse.FEW, sparse.ROW), sparse.postings_library = CHOICE, LIBRARY


def field_of(folder, documents):
    model = ModelInfo(name="impacts", fingerprint="f", width=documents.shape[1], kind="sparse")
    writer = sparse.SparseWriter(folder, model)
    writer.add([str(number) for number in range(documents.shape[0])], documents)
    return sparse.SparseField(folder, SegmentInfo(name="s", count=documents.shape[0], **writer.close()), model)


def ways_for(field, eligible):
    ways = [way for way in WAYS if field.count <= MOST_NUMPY or not way.startswith("numpy")]
    return [way for way in ways if eligible <= MOST_ROWS or not way.endswith("rows")]


def compared(field, share, queries, rounds, rng):
    """Returns the microseconds of each way, what it finds being the same."""
    segments = [sparse.SparseVectors(field, rng.random(field.count) < share if share < 1 else np.ones(field.count, dtype=bool))]
    eligible = int(np.count_nonzero(segments[0].eligible_N))
    kept, taken, found = {}, {way: [] for way in ways_for(field, eligible)}, {}
    for turn in range(rounds + 1):  # the first is not counted
        names = list(taken)
        for way in names[turn % len(names) :] + names[: turn % len(names)]:
            with forced(way):
                if way not in kept:
                    kept[way] = sparse.Search(segments, K)
                make = (lambda way=way: kept[way]) if share == 1 else lambda: sparse.Search(segments, K)
                answers = [clocked(lambda query=query, make=make: make()(query, str)) for query in queries]
            taken[way] += [[cpu * 1e6 for _, _, cpu in answers]] if turn else []
            if found.setdefault(share, [hits for hits, _, _ in answers]) != [hits for hits, _, _ in answers]:
                raise SystemExit(f"{way} finds something else among {eligible} of {field.count} documents")
    return {"eligible": eligible} | {way: summary(np.array(times)) for way, times in taken.items()}


def summary(times_RQ):
    medians_R = np.median(times_RQ, axis=1)
    return {
        "us": round(float(np.median(times_RQ)), 1),
        "us_of_rounds": [round(float(medians_R.min()), 1), round(float(medians_R.max()), 1)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--counts", type=int, nargs="*", default=[100, 1_000, 10_000, 100_000])
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0, help="of which documents are eligible")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = environment("scipy") | {"seed": options.seed, "rounds": options.rounds, "k": K, "rows": []}
    documents, rng = sp.load_npz(options.data / "documents.npz"), np.random.default_rng(options.seed)
    for count in options.counts:
        with TemporaryDirectory() as folder:
            field = field_of(Path(folder), documents[:count])
            for share in (share for share in SHARES if share * count >= 1):
                for name in ("short", "long"):
                    given = sp.load_npz(options.data / f"{name}.npz")[: options.queries]
                    asked = sparse.checked(given, documents.shape[1], str)
                    queries = [asked[row] for row in range(asked.shape[0])]
                    row = {"documents": count, "share": share, "queries": name}
                    report["rows"].append(row | compared(field, share, queries, options.rounds, rng))
                    print(report["rows"][-1], flush=True)
    finished(report, options.out)


if __name__ == "__main__":
    main()
