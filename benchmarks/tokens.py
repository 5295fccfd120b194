"""Measures the multi-vector index on real token vectors, beside PyLate's exact scorer.

    python benchmarks/token_vectors.py SHARED_DATA DATA
    python benchmarks/tokens.py DATA --out benchmarks/tokens-DATE.json

Single queries, one thread: milliseconds are medians of the clock, beside those of the processor, which tell more on a machine
that does other things too. Recall is of the ten best by exact MaxSim. ``--pylate FOLDER`` names a folder that PyLate is
installed in.
"""

import argparse
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from reports import clocked, finished

from openembed.files import read_json, write_json
from openembed.index.native import threads
from openembed.index.tokens.coding import Panel
from openembed.index.tokens.exact import TokenMatrix
from openembed.index.tokens.files import TokenSegment, TokenSettings, TokenWriter
from openembed.index.tokens.methods import EXACT
from openembed.index.tokens.muvera import EncodingSettings, Muvera
from openembed.index.tokens.plaid import Plaid
from openembed.index.tokens.pooling import pool_tokens
from openembed.index.tokens.search import Tokens, rerank, search
from openembed.index.tokens.warp import Warp
from openembed.index.tokens.xtr import Xtr
from openembed.token_vectors import TokenVectors

K = 10
CHUNK = 500
ENCODINGS = {
    "fde 2,560 (20, 4, 8)": EncodingSettings(repetitions=20, planes=4, inner=8),
    "fde 2,560 of 5,120 (40, 3, 16)": EncodingSettings(repetitions=40, planes=3, inner=16, final=2_560),
    "fde 10,240 (20, 5, 16)": EncodingSettings(repetitions=20, planes=5, inner=16),
}


def load(folder, name, mode=None):
    values = np.load(folder / f"{name}.values.npy", mmap_mode=mode)
    return TokenVectors(values, np.load(folder / f"{name}.offsets.npy"))


def cut(documents, count, length):
    """Returns pieces of ``length`` tokens as documents of their own: short passages."""
    starts = np.concatenate([np.arange(low, high - length + 1, length) for low, high in pairwise(documents.offsets_N1)])
    starts = np.sort(np.random.default_rng(3).permutation(starts)[:count])
    return TokenVectors.from_list([documents.values_TD[start : start + length] for start in starts])


def build(place, documents, settings):
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)

    def write():
        writer = TokenWriter(place, documents.width, settings)
        for start in range(0, len(documents), CHUNK):
            writer.add(documents.select(range(start, min(start + CHUNK, len(documents)))))
        return writer.close()

    _, wall, cpu = clocked(write)
    tokens = len(documents.values_TD)
    sizes = {path.name: path.stat().st_size / tokens for path in place.iterdir()}
    groups = {"vectors": "tokens.", "residuals": "residuals.", "encodings": "encodings."}
    row = {"build_s": round(wall, 1), "build_cpu_s": round(cpu, 1)}
    row |= {f"{g}_bytes_a_token": round(sum(v for n, v in sizes.items() if n.startswith(p)), 1) for g, p in groups.items()}
    return TokenSegment(place, len(documents)), row


def recall(found, best):
    return round(float(np.mean([len({p for p, _ in a} & {p for p, _ in b}) / K for a, b in zip(found, best, strict=True)])), 4)


def measured(action, queries, best, count):
    for row in range(3):
        action(queries.select([row]))
    taken, found = [], []
    for row in range(count):
        query = queries.select([row])
        result, wall, cpu = clocked(lambda query=query: action(query))
        taken.append((wall, cpu))
        found += result
    wall, cpu = np.median(taken, axis=0) * 1e3
    return {"recall": recall(found, best[:count]), "ms": round(float(wall), 2), "cpu_ms": round(float(cpu), 2)}


def of_pylate(folder, documents, queries, best, count):
    """PyLate's scorer over all documents, padded to the longest of their batch of 256; the encoding of lists is not counted."""
    sys.path.insert(0, str(folder))
    import torch
    from pylate.scores import colbert_scores

    torch.set_num_threads(threads())
    order = np.argsort(documents.lengths_N, kind="stable")
    batches = []
    for start in range(0, len(order), 256):
        chosen = [torch.from_numpy(documents[int(n)].astype(np.float32)) for n in order[start : start + 256]]
        padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        batches.append((padded, torch.arange(padded.shape[1])[None] < torch.tensor([[len(c)] for c in chosen])))

    def action(query):
        values = torch.from_numpy(query.values_TD)[None]
        with torch.inference_mode():
            scores = torch.cat([colbert_scores(values, padded, documents_mask=mask)[0] for padded, mask in batches])
            found, places = scores.topk(K)
        return [list(zip(order[places.numpy()].tolist(), found.tolist(), strict=True))]

    return measured(action, queries, best, count)


def of_torch(documents, queries, best, count):
    """One matrix product over all tokens end to end and a maximum by segments: what can be had of torch without padding."""
    import torch

    torch.set_num_threads(threads())
    values_TD = torch.from_numpy(documents.values_TD.astype(np.float32))
    offsets = torch.from_numpy(documents.offsets_N1)

    def action(query):
        products = torch.from_numpy(query.values_TD) @ values_TD.T
        scores = torch.segment_reduce(products, "max", offsets=offsets.expand(len(products), -1), axis=1).sum(0)
        found, places = scores.topk(K)
        return [list(zip(places.tolist(), found.tolist(), strict=True))]

    with torch.inference_mode():
        return measured(action, queries, best, count)


def limits(segment, queries):
    """What the processor allows an exact scan: reading the codes once, and 64 products of bytes a cycle and core."""
    import torch

    block = torch.ones(64 * 2**20)
    reads = min(clocked(lambda: block.sum())[1] for _ in range(5))
    bandwidth = block.numel() * 4 / reads
    n = float(queries.lengths_N.mean())
    tokens, width = segment.info.tokens, segment.info.width
    return {
        "read_gb_s": round(bandwidth / 1e9, 1),
        "codes_read_ms": round(tokens * (width + 4) / bandwidth * 1e3, 1),
        "products_billion_a_query": round(n * tokens * width / 1e9, 2),
        "products_billion_a_query_in_whole_lanes": round(
            float(np.ceil(queries.lengths_N / 8).mean()) * 8 * tokens * width / 1e9, 2
        ),
    }


def parts(segment):
    return [Tokens(segment, np.ones(len(segment), dtype=bool))]


def searching(segment, method=EXACT):
    return lambda query: search(query, parts(segment), K, str, method)


def of_exact(place, documents, queries, report):
    """Measures exact search, reranking and XTR without a codec; returns the true ten best."""
    segment, row = build(place / "exact", documents, TokenSettings(bits=0))
    best, wall, _ = clocked(lambda: search(queries, parts(segment), K, str))
    row |= measured(searching(segment), queries, best, len(queries))
    report["exact, float16"] = row | {"batch_ms_a_query": round(wall / len(queries) * 1e3, 2)}
    report["limits"] = limits(segment, queries)
    random = np.random.default_rng(1)
    chosen = [random.choice(len(documents), 1000, replace=False) for _ in range(len(queries))]
    taken = [
        clocked(lambda n=n: rerank(queries.select([n]), parts(segment), [chosen[n]], str))[1:] for n in range(len(queries))
    ]
    wall, cpu = np.median(taken, axis=0) * 1e3
    report["rerank of 1000 documents"] = {"ms": round(float(wall), 2), "cpu_ms": round(float(cpu), 2)}
    report["xtr 1000 tokens, exact retrieval"] = measured(
        searching(segment, Xtr(tokens=1000)), queries, best, len(queries) // 4
    )
    return best


def of_encodings(place, documents, queries, best, report):
    for name, settings in ENCODINGS.items():
        segment, row = build(place / "fde", documents, TokenSettings(bits=0, encodings=settings))
        for count in (100, 500):
            report[f"{name} + exact {count}"] = row | measured(
                searching(segment, Muvera(candidates=count)), queries, best, len(queries)
            )


def of_codec(place, documents, queries, best, report, settings):
    segment, row = build(place / "coded", documents, settings)
    name = f"{settings.bits} bits"
    report[name] = row | {"centroids": len(segment.residuals.codec.centroids_KD)}
    for method_name, method in METHODS.items():
        report[f"{name}, {method_name}"] = measured(searching(segment, method), queries, best, len(queries))
    info = segment.directory / "tokens.json"
    write_json(info, read_json(info) | {"vectors": False})
    segment = TokenSegment(segment.directory)
    report[f"{name} alone, every document"] = measured(searching(segment), queries, best, 10)
    for method_name in ("plaid 64 documents", "plaid 256 documents"):
        found = measured(searching(segment, METHODS[method_name]), queries, best, len(queries))
        report[f"{name} alone, {method_name}"] = found


METHODS = {
    **{f"plaid {n} documents": Plaid(documents=n) for n in (32, 64, 256)},
    "plaid 64 documents, 8 probes": Plaid(documents=64, probes=8),
    "plaid 64 documents, threshold .45": Plaid(documents=64, threshold=0.45),
    "warp 8 probes": Warp(probes=8),
    "warp 32 probes": Warp(probes=32),
    "warp 8 probes + exact 64": Warp(probes=8, rescored=64),
    "warp 32 probes + exact 64": Warp(probes=32, rescored=64),
    "xtr 1000 tokens": Xtr(tokens=1000),
    "xtr 1000 tokens, imputed 0": Xtr(tokens=1000, imputation="zero"),
    "xtr 10000 tokens": Xtr(tokens=10_000),
    "xtr 1000 tokens + exact 64": Xtr(tokens=1000, rescored=64),
}


def of_pooling(documents, queries, report):
    random = np.random.default_rng(2)
    chosen = documents.select(np.sort(random.choice(len(documents), 1000, replace=False)))
    panel, every = Panel(queries), np.arange(1000)
    true_QN = TokenMatrix.of(chosen).bounded(panel, every)[0]
    best = [[(int(n), 0.0) for n in np.argsort(-row)[:K]] for row in true_QN]
    for factor in (2, 4):
        for method in ("ward", "k_means"):
            pooled, _, cpu = clocked(lambda factor=factor, method=method: pool_tokens(chosen, factor, method=method))
            scores_QN = TokenMatrix.of(pooled).bounded(panel, every)[0]
            found = [[(int(n), 0.0) for n in np.argsort(-row)[:K]] for row in scores_QN]
            report[f"pooling by {factor}, {method}"] = {"cpu_ms_a_document": round(cpu, 2), "recall": recall(found, best)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 2])
    parser.add_argument("--clusters", type=int)
    parser.add_argument("--pylate", type=Path)
    parser.add_argument("--cut", type=int, nargs=2, metavar=("COUNT", "TOKENS"), help="pieces of documents, so long, instead")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    documents, queries = load(options.data, "documents", "r"), load(options.data, "queries")
    if options.cut:
        documents = cut(documents, *options.cut)
    rows = np.random.default_rng(0).permutation(len(queries))[: options.queries]
    queries = TokenVectors.from_list([queries[int(row)].astype(np.float32) for row in rows])
    report = {"note": options.note, "threads": threads(), "width": documents.width}
    report |= {"documents": len(documents), "tokens": len(documents.values_TD)}
    report["tokens_a_query"] = round(float(queries.lengths_N.mean()), 1)
    place = options.data / "index"
    best = of_exact(place, documents, queries, report)
    of_encodings(place, documents, queries, best, report)
    for bits in options.bits:
        settings = TokenSettings(bits=bits, coded_from=1, clusters=options.clusters)
        of_codec(place, documents, queries, best, report, settings)
    of_pooling(documents, queries, report)
    report["torch, one product and segment_reduce"] = of_torch(documents, queries, best, min(20, len(queries)))
    if options.pylate:
        report["pylate's colbert_scores"] = of_pylate(options.pylate, documents, queries, best, min(20, len(queries)))
    finished(report, options.out)


if __name__ == "__main__":
    main()
