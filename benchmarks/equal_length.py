"""Compares two sparse systems of a sweep at equal document length: documents keep their weightiest terms alone.

Penalties of the same weight leave documents of different lengths, and longer ones find more. Which terms are the weightiest
is a choice where queries are weighted by idf: those of greatest weight, or of greatest weight times idf, which is what a query
that has the term adds up; both are shown. By default: idf in the match against binary queries, which is what IDF-aware FLOPS
is (arXiv 2411.04403). Models that encode queries have the first choice alone; their queries stay whole. All is float32.

    python benchmarks/equal_length.py --runs runs/systems --data A --data B --json equal-length.json
    python benchmarks/equal_length.py --runs runs/systems --better echo --worse causal --stage splade --data A --json echo.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

import openembed
from openembed.data.readers import read_beir
from openembed.evaluation.metrics import per_query
from openembed.evaluation.over_seeds import RESAMPLES, SeedScores, mean_scores, verdict
from openembed.evaluation.retrieval import exact_search
from openembed.evaluation.statistics import generator
from openembed.index import exact

LENGTHS = (16, 32, 64, 128)
Cut = tuple[int, str]
"""How many terms of a document are kept (0: all), and by what."""
CUTS: tuple[Cut, ...] = (*((terms, order) for order in ("weight", "weight x idf") for terms in LENGTHS), (0, "weight"))
Found = dict[tuple[str, str, str], tuple[dict[Cut, np.ndarray], float]]
"""(variant, seed, task) → nDCG@10 of each query by cut, and the mean number of terms of a document."""


def cut(weights_NV: csr_matrix, terms: int, factor_V: np.ndarray) -> csr_matrix:
    """Returns the ``terms`` entries of every row whose weight times ``factor_V`` is largest."""
    kept = weights_NV.copy()
    for row in range(kept.shape[0]):
        entries = slice(kept.indptr[row], kept.indptr[row + 1])
        order = kept.data[entries] * factor_V[kept.indices[entries]]
        if len(order) > terms:
            kept.data[entries][np.argpartition(order, -terms)[:-terms]] = 0
    kept.eliminate_zeros()
    return kept


def ndcg(model: Path, folder: Path) -> tuple[dict[Cut, np.ndarray], float]:
    """Returns nDCG@10 of each query by :data:`Cut`, and the mean number of terms of a document."""
    encoder = openembed.load(model)
    corpus, queries, qrels = read_beir(folder)
    judged = [query for query in queries if qrels.get(query.id)]
    documents = encoder.encode_documents([document.full_text for document in corpus])
    asked, found = encoder.encode_queries([query.text for query in judged]), {}
    ids, names = [query.id for query in judged], [document.id for document in corpus]
    factors = {"weight": np.ones(documents.shape[1], dtype=np.float32)}
    if encoder.query_head is not None:
        factors["weight x idf"] = encoder.query_head.table().detach().numpy()
    for terms, order in CUTS:
        if order not in factors:
            continue
        searched = exact.prepared(cut(documents, terms, factors[order]) if terms else documents)
        run = exact_search(asked, ids, searched, names, 100)
        scores = per_query(run, {name: qrels[name] for name in ids}, ("ndcg_at_10",))["ndcg_at_10"]
        found[terms, order] = np.array([scores[name] for name in sorted(scores)])
    return found, documents.nnz / documents.shape[0]


def seed_scores(by_seed: dict[int, np.ndarray], task: str) -> SeedScores:
    """Returns per-query scores as those of a sweep: the same draws of queries for every system."""
    values, resampled = [], []
    for scores in by_seed.values():
        rng = generator(0, "seeds", task)
        values.append(scores.mean())
        resampled.append([scores[rng.integers(0, len(scores), len(scores))].mean() for _ in range(RESAMPLES)])
    return SeedScores(tuple(by_seed), np.array(values), np.array(resampled))


def compare(found: Found, names: tuple[str, str], seeds: list[str], tasks: list[str], kept: Cut) -> dict[str, object]:
    """Returns both systems' means at a cut, and the difference with its interval over seeds and queries."""

    def mean(name: str) -> SeedScores:
        by_task = {task: {number: found[name, seed, task][0][kept] for number, seed in enumerate(seeds)} for task in tasks}
        return mean_scores([seed_scores(by_seed, task) for task, by_seed in by_task.items()])

    means = {name: mean(name) for name in names}
    difference = means[names[0]] - means[names[1]]
    interval = difference.interval()
    return {
        **{name: round(scores.mean, 4) for name, scores in means.items()},
        "difference": round(difference.mean, 4),
        "interval": None if interval is None else [round(interval.low, 4), round(interval.high, 4)],
        "verdict": verdict(interval),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--better", default="distilled")
    parser.add_argument("--worse", default="binary")
    parser.add_argument("--stage", default="distilled", help="the stage whose model both are")
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names, tasks = (args.better, args.worse), [folder.name for folder in args.data]
    models = {
        name: {path.parts[-3]: path for path in sorted((args.runs / "runs" / name).glob(f"*/{args.stage}/model"))}
        for name in names
    }
    seeds = [seed for seed in models[args.better] if seed in models[args.worse]]
    found: Found = {
        (name, seed, folder.name): ndcg(models[name][seed], folder) for name in names for seed in seeds for folder in args.data
    }
    report: dict[str, object] = {"seeds": seeds, "data": tasks}
    report["terms"] = {name: float(np.mean([found[name, s, task][1] for s in seeds for task in tasks])) for name in names}
    cuts = next(iter(found.values()))[0]
    report["by set"] = {task: compare(found, names, seeds, [task], (0, "weight")) for task in tasks}
    for kept in cuts:
        label = f"{kept[0]} by {kept[1]}" if kept[0] else "uncut"
        report[label] = compare(found, names, seeds, tasks, kept)
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
