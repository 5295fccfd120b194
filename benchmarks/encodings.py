"""Measures how many of the ten best documents by MaxSim are among the candidates of MUVERA's encodings, over seeds.

    python benchmarks/token_vectors.py SHARED_DATA DATA
    python benchmarks/encodings.py DATA --documents 5000 --cut 24 --queries 100 --seeds 8

Beside the encodings as kept, one byte a component, stand those in float32: what rounding loses. Times are the processor's.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from tokens import K, cut, load

from openembed.index.tokens.coding import Panel, code_rows
from openembed.index.tokens.exact import TokenMatrix
from openembed.index.tokens.muvera import EncodingSettings, encode_fixed
from openembed.token_vectors import TokenVectors

COUNTS = (50, 100, 500)
SETTINGS = {
    "2,560 (20, 4, 8)": EncodingSettings(),
    "2,560 (20, 3, 16)": EncodingSettings(planes=3, inner=16),
    "5,120 (40, 3, 16) to 2,560": EncodingSettings(repetitions=40, planes=3, inner=16, final=2_560),
    "5,120 (40, 4, 8) to 2,560": EncodingSettings(repetitions=40, final=2_560),
    "10,240 (20, 5, 16) to 2,560": EncodingSettings(planes=5, inner=16, final=2_560),
    "10,240 (20, 5, 16)": EncodingSettings(planes=5, inner=16),
}


def recalls(scores_QN, best_QK):
    """Returns the share of the ten best among the first candidates, for each number of candidates."""
    shares = []
    for count in COUNTS:
        found = np.argpartition(-scores_QN, count - 1, axis=1)[:, :count]
        shares.append(np.mean([len(np.intersect1d(*pair)) / K for pair in zip(found, best_QK, strict=True)]))
    return shares


def as_kept(values_NE):
    rows = code_rows(values_NE)
    return (rows.codes_TS[:, : values_NE.shape[1]].astype(np.float32) - 128) * rows.scale_T[:, None]


def measured(documents, queries, best_QK, settings, seeds):
    kept, whole, spent = [], [], np.zeros(2)
    for seed in range(seeds):
        settings = settings.model_copy(update={"seed": seed})
        clocks = [time.process_time()]
        documents_NE = encode_fixed(documents, settings, document=True)
        clocks.append(time.process_time())
        encoded = [encode_fixed(queries.select([n]), settings, document=False) for n in range(len(queries))]
        clocks.append(time.process_time())
        queries_QE = np.concatenate(encoded)
        spent += np.diff(clocks) * 1e3 / (len(documents), len(queries))
        kept.append(recalls(as_kept(queries_QE) @ as_kept(documents_NE).T, best_QK))
        whole.append(recalls(queries_QE @ documents_NE.T, best_QK))
    named = {
        "recall": np.mean(kept, axis=0),
        "spread_over_seeds": np.std(kept, axis=0),
        "recall_float32": np.mean(whole, axis=0),
    }
    row = {name: dict(zip(map(str, COUNTS), values.round(4).tolist(), strict=True)) for name, values in named.items()}
    document_ms, query_ms = (spent / seeds).round(3).tolist()
    return row | {"document_cpu_ms": document_ms, "query_cpu_ms": query_ms}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--documents", type=int, default=5_000)
    parser.add_argument("--cut", type=int, metavar="TOKENS", help="pieces of documents, so long, instead")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    documents, queries = load(options.data, "documents", "r"), load(options.data, "queries")
    if options.cut:
        documents = cut(documents, options.documents, options.cut)
    else:
        documents = documents.select(np.sort(np.random.default_rng(3).permutation(len(documents))[: options.documents]))
    documents = TokenVectors(documents.values_TD.astype(np.float32), documents.offsets_N1)
    rows = np.random.default_rng(0).permutation(len(queries))[: options.queries]
    queries = TokenVectors.from_list([queries[int(row)].astype(np.float32) for row in rows])
    true_QN = TokenMatrix.of(documents).bounded(Panel(queries), np.arange(len(documents)))[0]
    best_QK = np.argpartition(-true_QN, K - 1, axis=1)[:, :K]
    report = {"documents": len(documents), "tokens": len(documents.values_TD), "queries": len(queries), "seeds": options.seeds}
    for name, settings in SETTINGS.items():
        report[name] = measured(documents, queries, best_QK, settings, options.seeds)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
