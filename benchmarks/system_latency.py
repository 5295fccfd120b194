"""Times one query at a time for the systems of a finished sweep, in turn in one process, so that other load meets all of them.

Each system's model (first seed, int8, 128 tokens unless it reads a text twice) encodes the documents of one BEIR folder once;
then, round after round, every system answers the same queries: encoding and exact search for ten documents, in memory. Medians
of the clock and of the processor.

    OMP_NUM_THREADS=1 python benchmarks/system_latency.py --runs runs/systems --data DATA/scifact --json latency.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import openembed
from openembed.data.readers import read_beir
from openembed.evaluation.bm25 import Bm25
from openembed.index import exact

SYSTEMS = {
    "dense": "dense",
    "distilled": "distilled",
    "splade": "splade",
    "echo": "splade",
    "both-ways": "splade",
    "vdr": "vdr",
    "maxsim": "maxsim",
    "crisp-8x32": "crisp",
    "crisp-4x8": "crisp",
}
"""Variant → the stage whose model it is."""
K, QUERIES = 10, 50


def answering(model: Path, texts: list[str], ids: list[str]) -> Callable[[str], object]:
    """Returns what answers a query with a model, its documents encoded."""
    encoder = openembed.load(model, dtype="int8")
    options = {} if encoder.config.tokenizer.repeat else {"max_length": 128}
    searched = exact.prepared(encoder.encode_documents(texts, **options))
    return lambda query: searched.search(encoder.encode_queries([query], **options), K, ids.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    corpus, queries, _ = read_beir(args.data)
    texts, ids = [document.full_text for document in corpus], [document.id for document in corpus]
    words = Bm25(texts)
    answer: dict[str, Callable[[str], object]] = {"bm25": lambda query: words.search([query], ["query"], ids, K)}
    for variant, stage in SYSTEMS.items():
        model = args.runs / "runs" / variant / f"seed-{args.seed}" / stage / "model"
        if model.is_dir():  # a sweep has some of the variants
            answer[variant] = answering(model, texts, ids)
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in answer}
    for _ in range(args.rounds):
        for name, respond in answer.items():
            for query in queries[:QUERIES]:
                wall, cpu = time.perf_counter(), time.process_time()
                respond(query.text)
                took[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    report = {
        name: {
            "ms": round(1000 * statistics.median(wall for wall, _ in times), 3),
            "cpu_ms": round(1000 * statistics.median(cpu for _, cpu in times), 3),
        }
        for name, times in took.items()
    }
    print(json.dumps({"documents": len(ids), "systems": report}, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"documents": len(ids), "data": args.data.name, "systems": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
