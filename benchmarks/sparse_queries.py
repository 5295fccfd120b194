"""Costs of learned sparse retrieval: queries without a model against BM25's tokens, pooled logits against their naive form.

Queries: real ones of four shared data sets, encoded by openembed's table lookup (a ``csr_matrix`` comes out) and tokenised by
bm25s (its ``tokenize`` at its defaults, its ``Tokenizer``, and ``tokenize`` with an English stemmer), all together and one at a
time. Logits: random states and vocabulary, pooled by openembed's kernel, by its torch code, and by multiplying, activating and
taking the maximum of all logits; forwards, and forwards and backwards. Everything runs in turn in one process, round after
round; ratios are taken within a round. Times are the process's own, so that other load disturbs them less.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python benchmarks/sparse_queries.py --data ../shared/data --rounds 7 --json out.json
"""

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path

import bm25s
import Stemmer
import torch
from measuring import finished

import openembed
from openembed.encoder import Encoder
from openembed.heads import SpladeConfig
from openembed.heads.idf_lookup import IdfLookupConfig, build_idf
from openembed.heads.vocabulary_pooling import activate, max_pooled
from openembed.kernels import vocabulary as kernels
from openembed.kernels.calls import PackedLinear, quantize
from openembed.kernels.library import library

SETS = ("squad-sentences", "medquad", "scifact", "pubmedqa")
VOCABULARY, SINGLE = 30_522, 2_000
SHAPES = {"documents of 256": (256, 6), "documents of 32": (32, 48), "one query of 12": (12, 1)}


def read_queries(data, count):
    queries = []
    for name in SETS:
        with gzip.open(data / name / "queries.jsonl.gz", "rt", encoding="utf-8") as file:
            queries += [json.loads(line)["text"] for line in file]
    random.Random(0).shuffle(queries)
    return queries[:count]


def lookup_encoder(documents):
    plain = openembed.load("openembed-nano", device="cpu")
    changes = {"head": SpladeConfig(), "query_head": IdfLookupConfig(), "projections": ()}
    config = plain.config.model_copy(update=changes)
    encoder = Encoder(config, plain.tokenizer, plain.backbone, config.head.build(plain.backbone.width)).eval()
    encoder.query_head.set_table(build_idf(encoder.tokenizer, documents))
    return encoder


def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start


def rounds_of(engines, rounds, per):
    """Returns for each engine the median seconds and the median and range of its ratio to the first, over rounds in turn."""
    for run in engines.values():
        run()
    times = {name: [] for name in engines}
    for number in range(rounds):
        names = list(engines)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(seconds(engines[name]) / per)
    first = next(iter(engines))
    found = {}
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(values, times[first], strict=True))
        found[name] = {
            "median_s": statistics.median(values),
            f"ratio_to_{first}": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]},
        }
    return found


def query_rows(queries, encoder, rounds):
    stemmer, tokenizer = Stemmer.Stemmer("english"), bm25s.tokenization.Tokenizer()
    quiet = {"show_progress": False}

    def engines(texts):
        return {
            "bm25s.tokenize": lambda: [bm25s.tokenize(t, **quiet) for t in texts],
            "bm25s.Tokenizer": lambda: [tokenizer.tokenize(t, **quiet) for t in texts],
            "bm25s.tokenize, stemmed": lambda: [bm25s.tokenize(t, stemmer=stemmer, **quiet) for t in texts],
            "openembed": lambda: [encoder.encode_queries(t) for t in texts],
        }

    together = rounds_of(engines([queries]), rounds, len(queries))
    alone = rounds_of(engines([[query] for query in queries[:SINGLE]]), rounds, min(SINGLE, len(queries)))
    return {"all together, a query": together, "one at a time, a query": alone}


def pooled(kind, inputs, lengths, backwards):
    states, weight, bias = inputs

    def naive():
        logits = states @ weight.T + bias
        return torch.stack([activate(piece.amax(0), "log1p_relu") for piece in logits.split(lengths)])

    def run():
        serves = kernels.serves
        try:
            if kind == "torch":
                kernels.serves = lambda *_: False
            with torch.set_grad_enabled(backwards):
                out = naive() if kind == "naive" else max_pooled(states, weight, bias, lengths, "log1p_relu")
            if backwards:
                torch.autograd.grad(out, inputs, torch.ones_like(out))
        finally:
            kernels.serves = serves

    return run


def logit_rows(width, rounds):
    torch.manual_seed(0)
    weight = (torch.randn(VOCABULARY, width) * 0.1).requires_grad_()
    bias = torch.full((VOCABULARY,), -3.0, requires_grad=True)
    found = {}
    for name, (length, count) in SHAPES.items():
        states = (torch.randn(length * count, width) * 0.3).requires_grad_()
        inputs, lengths = (states, weight, bias), [length] * count
        operations = 2 * length * count * VOCABULARY * width
        for backwards in (False, True):
            kinds = {kind: pooled(kind, inputs, lengths, backwards) for kind in ("naive", "torch", "kernel")}
            rows = rounds_of(kinds, rounds, 1)
            if not backwards:
                for row in rows.values():
                    row["gflops"] = operations / row["median_s"] / 1e9
            found[f"{name}, {'both ways' if backwards else 'forwards'}"] = rows
    return found


def int8_ceiling(width, rounds):
    """Products of 8-bit codes of 1,536 states with the whole vocabulary, stored: what a coded kernel could come near."""
    if library() is None:
        return None
    layer, states = PackedLinear(torch.randn(VOCABULARY, width), None, int8=True), torch.randn(1536, width)
    taken = min(seconds(lambda: layer.store(quantize(states))) for _ in range(rounds))
    return {"seconds": taken, "gflops": 2 * 1536 * VOCABULARY * width / taken / 1e9}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of shared data sets")
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 384])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    queries = read_queries(options.data, options.queries)
    report = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "bm25s": bm25s.__version__, "openembed": openembed.__version__},
        "queries": {"count": len(queries), **query_rows(queries, lookup_encoder(queries), options.rounds)},
        "logits": {f"width {width}": logit_rows(width, options.rounds) for width in options.widths},
        "int8": {f"width {width}": int8_ceiling(width, options.rounds) for width in options.widths},
    }
    finished(report, options.json)


if __name__ == "__main__":
    main()
