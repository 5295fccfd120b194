"""Times one query at a time for the systems of a finished sweep, in turn in one process, so that other load meets all of them.

Each system's model (one seed, int8, 128 tokens unless it reads a text twice) encodes the documents of one BEIR folder once;
every system answers the first WARM queries untimed; then, round after round, each answers the same QUERIES: encoding and exact
search for ten documents, in memory (``xtr``: by its own retrieval of 1,000 tokens). Medians over all rounds, of the clock and
of the processor, beside the least and the greatest of the rounds' own medians. Python's garbage collector waits meanwhile.

    OMP_NUM_THREADS=1 python benchmarks/system_latency.py --runs runs/systems --data DATA/scifact --json latency.json
"""

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path

from reports import clocked, environment, finished

import openembed
from openembed.data.readers import read_beir
from openembed.evaluation.bm25 import Bm25
from openembed.index import exact
from openembed.index.tokens.methods import EXACT, Method, Xtr

SYSTEMS = {
    "dense": "dense",
    "distilled": "distilled",
    "splade": "splade",
    "echo": "splade",
    "both-ways": "splade",
    "vdr": "vdr",
    "maxsim": "maxsim",
    "xtr": "xtr",
    "crisp-8x32": "crisp",
    "crisp-4x8": "crisp",
}
"""Variant → the stage whose model it is."""
METHODS = {"xtr": Xtr(tokens=1000)}
"""How token vectors are searched where it is not by MaxSim."""
K, QUERIES, WARM = 10, 50, 10


def answering(model: Path, texts: list[str], ids: list[str], method: Method) -> Callable[[str], object]:
    """Returns what answers a query with a model, its documents encoded."""
    encoder = openembed.load(model, dtype="int8")
    options = {} if encoder.config.tokenizer.repeat else {"max_length": 128}
    searched = exact.prepared(encoder.encode_documents(texts, **options), method)
    return lambda query: searched.search(encoder.encode_queries([query], **options), K, ids.__getitem__)


def timed(answer: dict[str, Callable[[str], object]], queries: list[str], rounds: int) -> dict[str, dict[str, object]]:
    """Returns for each system medians of the milliseconds of a query, and the range of the rounds' medians."""
    for respond in answer.values():
        for query in queries[:WARM]:
            respond(query)
    took = {name: [] for name in answer}
    for _ in range(rounds):
        for name, respond in answer.items():
            gc.collect()
            gc.disable()
            times = [clocked(lambda respond=respond, query=query: respond(query))[1:] for query in queries]
            gc.enable()
            took[name].append(times)
    return {name: summary(of_rounds) for name, of_rounds in took.items()}


def summary(of_rounds: list[list[tuple[float, float]]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for place, clock in enumerate(("ms", "cpu_ms")):
        rounds = [[1000 * times[place] for times in of_round] for of_round in of_rounds]
        medians = [statistics.median(times) for times in rounds]
        found[clock] = round(statistics.median(time for times in rounds for time in times), 3)
        found[f"{clock}_of_rounds"] = [round(min(medians), 3), round(max(medians), 3)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1, help="of the models")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = environment("torch", "scipy")
    corpus, queries, _ = read_beir(args.data)
    texts, ids = [document.full_text for document in corpus], [document.id for document in corpus]
    words = Bm25(texts)
    answer: dict[str, Callable[[str], object]] = {"bm25": lambda query: words.search([query], ["query"], ids, K)}
    for variant, stage in SYSTEMS.items():
        model = args.runs / "runs" / variant / f"seed-{args.seed}" / stage / "model"
        if model.is_dir():  # a sweep has some of the variants
            answer[variant] = answering(model, texts, ids, METHODS.get(variant, EXACT))
    report |= {"documents": len(ids), "data": args.data.name, "seed": args.seed, "rounds": args.rounds, "queries": QUERIES}
    finished(report | {"systems": timed(answer, [query.text for query in queries[:QUERIES]], args.rounds)}, args.json)


if __name__ == "__main__":
    main()
