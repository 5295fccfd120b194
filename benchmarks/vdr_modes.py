"""Scores a trained VDR model in all its modes: either side by the model, or by its own words alone.

    python benchmarks/vdr_modes.py --runs runs/systems --data A --data B --scores scores.json --json modes.json

For every seed of a sweep's variant ``vdr``, and for the same head untrained, nDCG@10 of query → document: model → model, words
→ model (asking runs no model), model → words (indexing runs none), the same with 100 documents reranked by the model, words →
words; of the model's weights the largest 64, 256 and 768 are kept, and the text's own. ``--without-entry``: a sweep of the
same variant with ``entry_weight = 0``. Each text is encoded once (int8, 128 tokens) with 768 weights, of which fewer are
taken; seconds are the processor's. Also the heaviest terms of a few texts, and what those of all documents hold. What is
measured is kept in ``--scores``: run again, it goes on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from equal_length import seed_scores
from reports import machine
from scipy.sparse import csr_matrix

import openembed
from openembed.backbones.text import BackboneConfig
from openembed.checkpoints import in_int8
from openembed.data.readers import read_beir
from openembed.evaluation.metrics import per_query
from openembed.evaluation.over_seeds import SeedScores, mean_scores
from openembed.evaluation.retrieval import exact_search
from openembed.heads.splade import SideConfig
from openembed.index import exact
from openembed.records import Run
from openembed.terms import top_terms

SIZES, SHOWN = (64, 256, 768), 256
RERANKED, MAX_LENGTH, HEAVIEST = 100, 128, 10
BOTH, ASKED, INDEXED, RERANK, WORDS = (
    "model → model",
    "words → model",
    "model → words",
    "model → words, reranked",
    "words → words",
)
TEXTS = {"scifact": "13", "medquad": "q00085", "textbooks": "q0", "cranfield": "3"}
"""A short query of each data set, whose terms are shown."""
HELD = ("own", "commonest", "expanded", "expanded_elsewhere")
BAG = SideConfig(gate="bag_of_words")
WIDEST = SideConfig(top_k=max(SIZES), keep_own=True)


def kept(weights_NV: csr_matrix, bag_NV: csr_matrix, size: int) -> csr_matrix:
    """Returns the ``size`` largest weights of every row, and the text's own."""
    found = weights_NV.copy()
    for row in range(found.shape[0]):
        entries = slice(found.indptr[row], found.indptr[row + 1])
        own = np.isin(found.indices[entries], bag_NV.indices[bag_NV.indptr[row] : bag_NV.indptr[row + 1]])
        largest = np.ones(len(own), dtype=bool)
        if len(own) > size:
            largest[np.argpartition(found.data[entries], -size)[:-size]] = False
        found.data[entries][~(largest | own)] = 0
    found.eliminate_zeros()
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.process_time()
    return work(), round(time.process_time() - began, 2)


def measured(encoder: openembed.Encoder, folder: Path) -> dict[str, Any]:
    """Returns nDCG@10 of each query by mode and size, seconds, terms a text, and what the heaviest terms hold."""
    corpus, queries, qrels = read_beir(folder)
    judged = sorted((query for query in queries if qrels.get(query.id)), key=lambda query: query.id)
    model, words = encoder.with_gates(query=WIDEST, document=WIDEST), encoder.with_gates(query=BAG, document=BAG)
    texts, asked = [document.full_text for document in corpus], [query.text for query in judged]
    ids, names = [query.id for query in judged], [document.id for document in corpus]
    seconds: dict[str, float] = {}
    widest, seconds["model, documents"] = timed(lambda: model.encode_documents(texts, max_length=MAX_LENGTH))
    bags, seconds["words, documents"] = timed(lambda: words.encode_documents(texts, max_length=MAX_LENGTH))
    asked_widest, seconds["model, queries"] = timed(lambda: model.encode_queries(asked, max_length=MAX_LENGTH))
    asked_bags, seconds["words, queries"] = timed(lambda: words.encode_queries(asked, max_length=MAX_LENGTH))
    judgements = {name: qrels[name] for name in ids}

    def scored(run: Run) -> list[float]:
        scores = per_query(run, judgements, ("ndcg_at_10",))["ndcg_at_10"]
        return [round(scores[name], 5) for name in ids]

    def searched(queries_QV: csr_matrix, documents: exact.Documents) -> Run:
        return exact_search(queries_QV, ids, documents, names, RERANKED)

    bag_lists, seconds["words, lists"] = timed(lambda: exact.prepared(bags))
    found, terms = {f"{WORDS}": scored(searched(asked_bags, bag_lists))}, {"words": bags.nnz / len(texts)}
    for size in SIZES:
        asked_kept, documents = kept(asked_widest, asked_bags, size), kept(widest, bags, size)
        lists, seconds[f"model {size}, lists"] = timed(lambda documents=documents: exact.prepared(documents))
        first = searched(asked_kept, bag_lists)
        found[f"{BOTH} {size}"] = scored(searched(asked_kept, lists))
        found[f"{ASKED} {size}"] = scored(searched(asked_bags, lists))
        found[f"{INDEXED} {size}"] = scored(first)
        found[f"{RERANK} {size}"] = scored(reranked(first, asked_kept, lists, names))
        terms[str(size)] = documents.nnz / len(texts)
    held = heaviest(kept(widest, bags, SHOWN), bags, asked_bags, [judgements[name] for name in ids], names)
    return {"ndcg_at_10": found, "seconds": seconds, "terms": terms, "documents": len(texts), "queries": len(ids), **held}


def reranked(run: Run, asked: csr_matrix, documents: exact.Documents, names: list[str]) -> Run:
    """Returns what was found, in order of the model's scores."""
    place, ordered = {name: number for number, name in enumerate(names)}, {}
    for row, (query, hits) in enumerate(run.items()):
        positions = np.array([place[name] for name in hits], dtype=np.int64)
        ordered[query] = dict(zip(hits, map(float, documents.scores(asked[row], positions)), strict=True))
    return ordered


def heaviest(
    weights_NV: csr_matrix, bag_NV: csr_matrix, asked_QV: csr_matrix, judged: list[dict[str, int]], names: list[str]
) -> dict[str, float]:
    """Returns what the heaviest terms of documents are worth.

    ``own``: share of the ten heaviest that the document has itself. ``commonest``: share of documents among whose ten heaviest
    the commonest such term is. ``expanded``: of a query's words that its relevant document lacks, the share among the weights
    kept of that document; ``expanded_elsewhere``: of documents drawn at random.
    """
    count, own, top = weights_NV.shape[0], 0, []
    for row in range(count):
        entries = slice(weights_NV.indptr[row], weights_NV.indptr[row + 1])
        best = weights_NV.indices[entries][np.argsort(-weights_NV.data[entries], kind="stable")[:HEAVIEST]]
        own += np.isin(best, bag_NV[row].indices).sum()
        top.append(best)
    place, rng = {name: number for number, name in enumerate(names)}, np.random.default_rng(1)
    shares: tuple[list[int], list[int]] = [], []
    for row, grades in enumerate(judged):
        words = asked_QV[row].indices
        for document in (place[name] for name, grade in grades.items() if grade > 0 and name in place):
            for kind, number in enumerate((document, int(rng.integers(count)))):
                lacking = np.setdiff1d(words, bag_NV[number].indices)
                shares[kind].extend(np.isin(lacking, weights_NV[number].indices).tolist())
    return {
        "own": float(own / sum(map(len, top))),
        "commonest": float(np.bincount(np.concatenate(top)).max() / count),
        "expanded": float(np.mean(shares[0])),
        "expanded_elsewhere": float(np.mean(shares[1])),
    }


def untrained(model: Path, backbone: str) -> openembed.Encoder:
    """Returns the model's head on the backbone as it was, both untrained."""
    config = openembed.load(model).config
    start = BackboneConfig(path=backbone, attention=config.backbone.attention)
    return in_int8(openembed.build(config.model_copy(update={"backbone": start}), seed=1))


def models_of(runs: Path | None) -> dict[str, Path]:
    """Returns seed → folder of the models of a sweep's variant ``vdr``."""
    return {} if runs is None else {path.parts[-3]: path for path in sorted((runs / "runs" / "vdr").glob("*/vdr/model"))}


def each(known: dict[str, Any], scores: Path, name: str, encoder: Callable[[], openembed.Encoder], data: list[Path]) -> None:
    """Measures a model on the data sets that ``known`` does not have yet, and writes it after each."""
    loaded = None
    for folder in data:
        if f"{name} {folder.name}" in known:
            continue
        loaded = loaded or encoder()
        sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S} {name} {folder.name}\n")
        known[f"{name} {folder.name}"] = measured(loaded, folder)
        scores.write_text(json.dumps(known))


def mean_of(known: dict[str, Any], kind: str, seeds: list[str], tasks: list[str], mode: str) -> SeedScores:
    """Returns a mode's scores by seed, means over data sets; the untrained model is the same for every seed."""
    parts = []
    for task in tasks:
        names = {n: f"untrained {task}" if kind == "untrained" else f"{kind} {seed} {task}" for n, seed in enumerate(seeds)}
        parts.append(seed_scores({n: np.array(known[name]["ndcg_at_10"][mode]) for n, name in names.items()}, task))
    return mean_scores(parts)


def rounded(scores: SeedScores, *, items: bool) -> dict[str, Any]:
    """Returns the mean, each seed's value, and the 95 % interval: over seeds, or with ``items`` over queries too."""
    interval = scores.interval() if items else scores.seed_interval()
    bounds = None if interval is None else [round(interval.low, 4), round(interval.high, 4)]
    return {"mean": round(scores.mean, 4), "seeds": [round(float(v), 4) for v in scores.values_S], "interval": bounds}


def compared(known: dict[str, Any], kinds: dict[str, list[str]], tasks: list[str]) -> dict[str, Any]:
    """Returns the differences that claims are about, with intervals over seeds and queries."""
    seeds = kinds["trained"]

    def of(mode: str, kind: str = "trained", shared: list[str] = seeds) -> SeedScores:
        return mean_of(known, kind, shared, tasks, mode)

    found = {f"{ASKED} - {BOTH}, {size}": of(f"{ASKED} {size}") - of(f"{BOTH} {size}") for size in SIZES}
    for mode in (INDEXED, RERANK):
        found[f"{mode} - {BOTH}, {SHOWN}"] = of(f"{mode} {SHOWN}") - of(f"{BOTH} {SHOWN}")
    found[f"{RERANK} - {INDEXED}, {SHOWN}"] = of(f"{RERANK} {SHOWN}") - of(f"{INDEXED} {SHOWN}")
    for mode in (BOTH, ASKED):
        for less, more in pairwise(SIZES):
            found[f"{mode}, {more} - {less}"] = of(f"{mode} {more}") - of(f"{mode} {less}")
        found[f"{mode}, trained - untrained, {SHOWN}"] = of(f"{mode} {SHOWN}") - of(f"{mode} {SHOWN}", "untrained")
    for mode in (BOTH, ASKED, INDEXED, RERANK):
        if shared := [seed for seed in seeds if seed in kinds["no entry loss"]]:
            with_it, without = (of(f"{mode} {SHOWN}", kind, shared) for kind in ("trained", "no entry loss"))
            found[f"{mode}, with - without entry loss, {SHOWN}"] = with_it - without
    return {name: rounded(scores, items=True) for name, scores in found.items()}


def shown_terms(models: dict[str, Callable[[], openembed.Encoder]], data: list[Path]) -> list[dict[str, Any]]:
    """Returns the ten heaviest terms of a few queries by each model; ``+`` before those that the text does not have."""
    loaded = {name: load() for name, load in models.items()}
    rows = []
    for folder in data:
        if folder.name in TEXTS:
            text = next(query.text for query in read_beir(folder)[1] if query.id == TEXTS[folder.name])
            tops = {name: top_terms(encoder, text, HEAVIEST).top for name, encoder in loaded.items()}
            named = {name: [("" if term.own else "+") + term.token for term in top] for name, top in tops.items()}
            rows.append({"data": folder.name, "text": text, **named})
    return rows


def mean_part(known: dict[str, Any], names: list[str], part: str) -> dict[str, float]:
    """Returns the mean over models of a part's values."""
    found: dict[str, float] = {}
    for key in known[names[0]][part]:
        found[key] = float(np.mean([known[name][part][key] for name in names]))
    return {key: round(value, 2) for key, value in found.items()}


def report_of(known: dict[str, Any], kinds: dict[str, list[str]], tasks: list[str]) -> dict[str, Any]:
    """Returns the tables: scores by mode, costs, and what the heaviest terms hold."""
    modes, report = list(known[f"untrained {tasks[0]}"]["ndcg_at_10"]), {}
    for kind, seeds in (*kinds.items(), ("untrained", ["seed-0"])):
        if not seeds:
            continue
        rows = {
            mode: {task: rounded(mean_of(known, kind, seeds, [task], mode), items=False) for task in tasks} for mode in modes
        }
        for mode, row in rows.items():
            row["mean"] = rounded(mean_of(known, kind, seeds, tasks, mode), items=False)
        names = [[f"{kind} {s} {t}" if kind != "untrained" else f"untrained {t}" for s in seeds] for t in tasks]
        held = {key: round(float(np.mean([known[n][key] for part in names for n in part])), 4) for key in HELD}
        costs = {
            part: {t: mean_part(known, own, part) for t, own in zip(tasks, names, strict=True)} for part in ("seconds", "terms")
        }
        report[kind] = {"ndcg_at_10": rows, "heaviest_terms": held, **costs}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="output of a sweep with the variant vdr")
    parser.add_argument("--without-entry", type=Path, help="the same, trained with entry_weight = 0")
    parser.add_argument("--untrained", default="openembed-nano", help="the backbone as it was before training")
    parser.add_argument("--data", type=Path, action="append", required=True, help="a BEIR folder; repeat")
    parser.add_argument("--scores", type=Path, required=True, help="what is measured, for going on after an interruption")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = {"trained": models_of(args.runs), "no entry loss": models_of(args.without_entry)}
    if not found["trained"]:
        raise SystemExit(f"{args.runs}: no models under runs/vdr/*/vdr/model; give the output of a sweep with the variant vdr")
    known = json.loads(args.scores.read_text()) if args.scores.exists() else {}
    first = next(iter(found["trained"].values()))
    for kind, models in found.items():
        for seed, path in models.items():
            each(known, args.scores, f"{kind} {seed}", lambda path=path: openembed.load(path, dtype="int8"), args.data)
    each(known, args.scores, "untrained", lambda: untrained(first, args.untrained), args.data)
    kinds, tasks = {kind: list(models) for kind, models in found.items()}, [folder.name for folder in args.data]
    settings = {"sizes": SIZES, "reranked": RERANKED, "max_length": MAX_LENGTH, "dtype": "int8"}
    shown = {"untrained": lambda: untrained(first, args.untrained), "trained": lambda: openembed.load(first, dtype="int8")}
    report = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine(),
        "settings": settings | {"backbone": args.untrained, "data": tasks, "seeds": kinds},
        "differences": compared(known, kinds, tasks),
        "terms": shown_terms(shown, args.data),
        **report_of(known, kinds, tasks),
    }
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    sys.stdout.write(text)
    if args.json:
        args.json.write_text(text)


if __name__ == "__main__":
    main()
