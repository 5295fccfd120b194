"""The claims of XTR and CRISP in the small, where the truth is known.

A synthetic world: an aspect is a set of words that mean the same. A document says three aspects, six words each, and some
filler; a query asks for two of them in other words of theirs, so that matching words does not help and meaning must be learned.
Every document with both aspects is relevant. All models are one random two-layer encoder with a vector a token, trained on
fresh pairs with in-batch negatives; nothing is shared between training and evaluation but the words and their aspects.

``xtr`` (arXiv 2304.01982): one model is trained with MaxSim, one with XTR's scores. Each is then searched as XTR searches:
every query token retrieves its k' nearest document tokens, and what a document's other tokens would have scored is imputed by
the last retrieved score (``last``), by 0 (``zero``), or left out with its query token (``none``). Reported: nDCG@10 over k',
that of exact MaxSim, and the share of retrieved tokens that lie in relevant documents.

``crisp`` (arXiv 2505.11471): a model trained with MaxSim on all vectors; its vectors clustered afterwards (post-hoc); the same
model trained further with the clusters in place (CRISP), with the last vectors, with every k-th one, and with all
vectors, which says what the further steps alone give.

``models``: the first of these curves for models of one's own, on BEIR folders. ``sweep``: those of the variants ``maxsim`` and
``xtr`` of a finished sweep (``benchmarks/systems.toml``), seed by seed, means over the folders, and a picture of them.

    OMP_NUM_THREADS=1 python benchmarks/late_interaction.py xtr --seeds 3 --json out.json
    python benchmarks/late_interaction.py models --model A --model B --data src/openembed/demo/data/eval/medquad
    python benchmarks/late_interaction.py sweep --runs runs/systems --data A --data B --svg xtr.svg --json xtr.json
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import openembed
from openembed.checkpoints import build
from openembed.config import parse
from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.data.readers import read_beir
from openembed.encoder import Encoder, EncoderConfig
from openembed.heads.token_projection import TokenProjectionConfig
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.records import Document, Example, Query
from openembed.seeds import derive, generator
from openembed.token_vectors import TokenVectors
from openembed.train.cached import ComputeConfig, backward, prepare

WORDS, FILLER = 16, 200
PER_DOCUMENT, PER_QUERY, SAID, ASKED, NOISE = 3, 2, 6, 4, 6
BATCH, WIDTH = 32, 32
K_PRIME = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
POOLS = {
    "C4x8": {"kind": "clusters", "queries": 4, "documents": 8},
    "C2x4": {"kind": "clusters", "queries": 2, "documents": 4},
    "tail 4x8": {"kind": "tail", "queries": 4, "documents": 8},
    "tail 2x4": {"kind": "tail", "queries": 2, "documents": 4},
    "K2": {"kind": "spacing", "queries": 2, "documents": 2},
    "K4": {"kind": "spacing", "queries": 4, "documents": 4},
}


@dataclass(frozen=True)
class World:
    """Documents, queries, and which documents are relevant to each query: bool (queries, documents)."""

    documents: list[str]
    queries: list[str]
    relevant_QN: np.ndarray


def pair(rng: np.random.Generator, aspects: int) -> tuple[str, str, np.ndarray, np.ndarray]:
    """Returns a document, a query for it, and the aspects of both."""
    said = rng.choice(aspects, PER_DOCUMENT, replace=False)
    words = {aspect: rng.permutation(WORDS) for aspect in said}
    document = [f"a{aspect}w{word}" for aspect in said for word in words[aspect][:SAID]]
    document += [f"f{word}" for word in rng.integers(0, FILLER, NOISE)]
    asked = rng.permutation(said)[:PER_QUERY]
    query = [f"a{aspect}w{word}" for aspect in asked for word in words[aspect][SAID : SAID + ASKED]]
    return " ".join(document), " ".join(query), said, asked


def world(seed: int, aspects: int, documents: int, queries: int) -> World:
    """Returns a world to evaluate on; the first documents have a query each."""
    rng = generator(seed, "world")
    rows = [pair(rng, aspects) for _ in range(documents)]
    says_NA = np.zeros((documents, aspects), dtype=bool)
    for number, (_, _, said, _) in enumerate(rows):
        says_NA[number, said] = True
    relevant = [says_NA[:, asked].all(axis=1) for _, _, _, asked in rows[:queries]]
    return World([row[0] for row in rows], [row[1] for row in rows[:queries]], np.array(relevant))


def new_encoder(folder: Path, aspects: int, seed: int) -> Encoder:
    """Returns a random encoder whose tokens are the world's words."""
    words = [f"a{aspect}w{word}" for aspect in range(aspects) for word in range(WORDS)] + [f"f{i}" for i in range(FILLER)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}
    config = {
        "backbone": {"architecture": {"model_type": "bert", "vocab_size": len(words) + 1, **shape, **rest}},
        "head": {"kind": "token_projection", "width": WIDTH},
        "tokenizer_path": str(folder),
        "max_length": 64,
    }
    return build(EncoderConfig.model_validate(config), seed=seed)


def with_pool(encoder: Encoder, pool: dict | None) -> Encoder:
    """Returns an encoder with a copy of the weights, whose head keeps fewer vectors a text."""
    head = parse(TokenProjectionConfig, {"pool": pool}, "pool")
    return copy.deepcopy(encoder).with_pool(head.pool)


def train(encoder: Encoder, objective: ContrastiveConfig, steps: int, seed: int, args: argparse.Namespace) -> float:
    """Trains on fresh pairs and returns the mean loss of the last fifty steps."""
    built, compute, source = objective.build(), ComputeConfig(live_chunks="all"), {"s": RowSource("s", sided=encoder.sided)}
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=args.lr, weight_decay=0.0)
    rng, losses = generator(seed, "training"), []
    encoder.train()
    for step in range(steps):
        pairs = [pair(rng, args.aspects)[:2] for _ in range(BATCH)]
        rows = [Example(Query(str(i), q), (Document(str(i), d),), (), "s") for i, (d, q) in enumerate(pairs)]
        batch = collate(rows, source, BatchConfig(negatives=0), generator(seed, "rows", step))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 20, 1) * (1 - step / steps)
        optimizer.zero_grad()
        losses.append(backward(encoder, built, prepare(encoder, built, batch, compute), compute, seed=step).total.item())
        optimizer.step()
    encoder.eval()
    return statistics.fmean(losses[-50:])


def ndcg(scores_N: np.ndarray, relevant_N: np.ndarray, k: int = 10) -> float:
    """Returns nDCG@k of one query; documents of equal scores in their order."""
    found = relevant_N[np.argsort(-scores_N, kind="stable")[:k]]
    gains = 1 / np.log2(np.arange(2, k + 2))
    return float((found * gains[: len(found)]).sum() / gains[: min(k, relevant_N.sum())].sum())


def exact(queries: TokenVectors, documents: TokenVectors) -> np.ndarray:
    """Returns MaxSim divided by the number of query tokens, (Q, N)."""
    said_N, scores_QN = documents.lengths_N > 0, np.full((len(queries), len(documents)), -np.inf, dtype=np.float32)
    starts = documents.offsets_N1[:-1][said_N]  # a text without vectors is found by no query
    for row, query in enumerate(queries):
        scores_QN[row, said_N] = np.maximum.reduceat(query @ documents.values_TD.T, starts, axis=1).mean(axis=0)
    return scores_QN


def nearest(query_nD: np.ndarray, documents: TokenVectors, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each query token's ``k`` nearest tokens, the nearest first, and their products, both (n, k)."""
    products_nT = query_nD @ documents.values_TD.T
    k = min(k, products_nT.shape[1])
    tokens_nk = np.argpartition(-products_nT, k - 1, axis=1)[:, :k]
    products_nk = np.take_along_axis(products_nT, tokens_nk, 1)
    order_nk = np.argsort(-products_nk, axis=1, kind="stable")
    return np.take_along_axis(tokens_nk, order_nk, 1), np.take_along_axis(products_nk, order_nk, 1)


def best_retrieved(document_nk: np.ndarray, products_nk: np.ndarray, documents: int) -> np.ndarray:
    """Returns the best retrieved product of each query token with each document, -inf where it has none (n, N)."""
    best_M = np.full(len(document_nk) * documents, -np.inf, dtype=np.float32)
    places_nk = document_nk + documents * np.arange(len(document_nk))[:, None]
    np.maximum.at(best_M, places_nk.ravel(), products_nk.ravel())
    return best_M.reshape(len(document_nk), documents)


def imputed(best_nN: np.ndarray, last_n: np.ndarray, how: str) -> np.ndarray:
    """Returns the scores (N) of XTR's section 3.3: a query token with no retrieved token of a document counts as ``last``, as
    ``zero``, or with ``none`` not at all: the sum is divided by those that have one. A document without any scores -inf."""
    hit_nN = np.isfinite(best_nN)
    sums_N = np.where(hit_nN, best_nN, last_n[:, None] if how == "last" else 0.0).sum(axis=0)
    scores_N = sums_N / (np.maximum(hit_nN.sum(axis=0), 1) if how == "none" else len(best_nN))
    return np.where(hit_nN.any(axis=0), scores_N, -np.inf)


def token_retrieval(encoder: Encoder, data: World) -> dict[str, object]:
    """Returns nDCG@10 of exact MaxSim and of every k' and imputation, and what share of retrieved tokens is relevant."""
    queries, documents = encoder.encode_queries(data.queries), encoder.encode_documents(data.documents)
    document_T = np.repeat(np.arange(len(documents)), documents.lengths_N)
    curves: dict[str, list[list[float]]] = {name: [[] for _ in K_PRIME] for name in ("last", "zero", "none", "precision")}
    for query, relevant_N in zip(queries, data.relevant_QN, strict=True):
        tokens_nk, products_nk = nearest(query, documents, max(K_PRIME))
        for place, k in enumerate(K_PRIME):
            document_nk, found_nk = document_T[tokens_nk[:, :k]], products_nk[:, :k]
            curves["precision"][place].append(float(relevant_N[document_nk].mean()))
            best_nN = best_retrieved(document_nk, found_nk, len(documents))
            for how in ("last", "zero", "none"):
                curves[how][place].append(ndcg(imputed(best_nN, found_nk[:, -1], how), relevant_N))
    whole = statistics.fmean(map(ndcg, exact(queries, documents), data.relevant_QN))
    return {"maxsim": whole, "k": list(K_PRIME), **{name: list(map(statistics.fmean, c)) for name, c in curves.items()}}


def read_world(folder: Path, count: int) -> World:
    """Returns the documents of a BEIR folder and at most ``count`` of its judged queries."""
    documents, queries, qrels = read_beir(folder)
    queries = [query for query in queries if any(grade > 0 for grade in qrels.get(query.id, {}).values())][:count]
    relevant = np.array([[qrels[query.id].get(document.id, 0) > 0 for document in documents] for query in queries])
    return World([document.full_text for document in documents], [query.text for query in queries], relevant)


def mean_of(found: list[dict]) -> dict[str, object]:
    """Returns the means of several results of :func:`token_retrieval`."""
    curves = {name: np.mean([one[name] for one in found], axis=0).tolist() for name in found[0]}
    return {**curves, "k": found[0]["k"]}


def models_run(args: argparse.Namespace) -> dict[str, object]:
    """Returns the curves of models that are there on BEIR folders."""
    worlds = [read_world(folder, args.queries) for folder in args.data]
    return {model: mean_of([token_retrieval(openembed.load(model), world) for world in worlds]) for model in args.model}


def sweep_run(args: argparse.Namespace) -> list[dict]:
    """Returns both models' curves, seed by seed, of a sweep; a seed that is not finished is left out."""
    runs: list[dict] = []
    for seed in sorted(path.name for path in (args.runs / "runs" / "xtr").iterdir()):
        states = [args.runs / "runs" / variant / seed / "evaluate" / "state.json" for variant in ("maxsim", "xtr")]
        if not all(path.is_file() and json.loads(path.read_text())["finished"] for path in states):
            continue
        args.model = [str(args.runs / "runs" / variant / seed / variant / "model") for variant in ("maxsim", "xtr")]
        runs.append({"seed": seed, **dict(zip(("mean_maxsim", "xtr"), models_run(args).values(), strict=True))})
        print(json.dumps(runs[-1]), flush=True)
    return runs


def picture(runs: list[dict]) -> str:
    """Returns the curves of nDCG@10 over k' as SVG: each model's own exact MaxSim dashed."""
    from picture import standalone

    from openembed.report.charts import Divider, Line, line_chart, number

    lines, places = [], range(len(K_PRIME))
    for color, (name, title) in enumerate((("mean_maxsim", "MaxSim-trained"), ("xtr", "XTR-trained"))):
        whole = statistics.fmean(run[name]["maxsim"] for run in runs)
        points = tuple((x, statistics.fmean(run[name]["last"][x] for run in runs)) for x in places)
        lines += [Line(f"{title}, k' tokens", points, color, marks=True)]
        lines += [Line(f"{title}, exact MaxSim", ((0, whole), (len(K_PRIME) - 0.5, whole)), color, dashed=True)]
    dividers = [Divider(x, number(k)) for x, k in enumerate(K_PRIME)]
    names = "k' tokens; MaxSim-trained blue, XTR-trained orange"
    axis = {"x_label": names, "dividers": dividers, "x_ticks": False}
    return standalone(line_chart("nDCG@10 by retrieved tokens", names, lines, **axis))


def xtr_run(seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Returns both models' curves under one seed."""
    data, results = world(derive(seed, "data"), args.aspects, args.documents, args.queries), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, steps in (("mean_maxsim", args.steps), ("xtr", args.xtr_steps)):
            encoder = new_encoder(Path(folder), args.aspects, seed)
            objective = ContrastiveConfig(similarity=name, temperature=args.temperature, k_train=args.k_train)
            begun = time.perf_counter()
            loss = train(encoder, objective, steps, seed, args)
            results[name] = {"loss": loss, "seconds": time.perf_counter() - begun, **token_retrieval(encoder, data)}
    return results


def spread(encoder: Encoder, pool: dict, texts: list[str]) -> float:
    """Returns the mean squared distance of document vectors to the mean of their cluster, clusters not normalised."""
    whole, pooled = with_pool(encoder, None), with_pool(encoder, {**pool, "renormalize": False})
    everything, centres = whole.encode_documents(texts), pooled.encode_documents(texts)
    pairs = zip(everything, centres, strict=True)
    return float(np.mean([((x[:, None] - c[None]) ** 2).sum(-1).min(axis=1).mean() for x, c in pairs]))


def crisp_run(seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Returns nDCG@10 of every variant under one seed, and how tight clusters are."""
    data, results = world(derive(seed, "data"), args.aspects, args.documents, args.queries), {}
    objective = ContrastiveConfig(similarity="mean_maxsim", temperature=args.temperature)

    def quality(encoder: Encoder) -> float:
        scores_QN = exact(encoder.encode_queries(data.queries), encoder.encode_documents(data.documents))
        return statistics.fmean(map(ndcg, scores_QN, data.relevant_QN))

    with tempfile.TemporaryDirectory() as folder:
        base = new_encoder(Path(folder), args.aspects, seed)
        results["loss"] = train(base, objective, args.steps, seed, args)
        results["multi-vector"] = quality(base)
        for name, pool in {"all vectors": None, **POOLS}.items():
            tuned = with_pool(base, pool)
            results[f"{name} post-hoc"] = quality(tuned)
            train(tuned, objective, args.tuning_steps, derive(seed, "tuning"), args)
            results[f"{name} trained"] = quality(tuned)
            if pool is not None and pool["kind"] == "clusters":
                results[f"{name} spread post-hoc"] = spread(base, pool, data.documents[:200])
                results[f"{name} spread trained"] = spread(tuned, pool, data.documents[:200])
    return results


def interval(values: list[float]) -> dict[str, float]:
    """Returns the mean over seeds and its 95 % interval (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean}
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summaries(runs: list[dict]) -> dict[str, object]:
    """Returns every number over seeds."""
    return {key: interval([run[key] for run in runs]) for key in runs[0]}


def xtr_summary(runs: list[dict]) -> dict[str, object]:
    """Returns the four pass criteria as numbers over seeds."""
    found: dict[str, object] = {}
    for name in ("mean_maxsim", "xtr"):
        kept = [[value / run[name]["maxsim"] for value in run[name]["last"]] for run in runs]
        found[f"{name} maxsim"] = interval([run[name]["maxsim"] for run in runs])
        found[f"{name} kept"] = {k: interval(list(column)) for k, column in zip(K_PRIME, zip(*kept, strict=True), strict=True)}
        for how in ("last", "zero", "none"):
            found[f"{name} {how}"] = {k: interval([run[name][how][i] for run in runs]) for i, k in enumerate(K_PRIME)}
    ratios = [[x / m for x, m in zip(run["xtr"]["precision"], run["mean_maxsim"]["precision"], strict=True)] for run in runs]
    found["precision ratio"] = {k: interval(list(c)) for k, c in zip(K_PRIME, zip(*ratios, strict=True), strict=True)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["xtr", "crisp", "models", "sweep"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--aspects", type=int, default=150)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--xtr-steps", type=int, default=720)
    parser.add_argument("--tuning-steps", type=int, default=220)
    parser.add_argument("--k-train", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--runs", type=Path, help="folder of a sweep")
    parser.add_argument("--svg", type=Path, help="where a sweep's curves are drawn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    needed = {"models": ("model", "data"), "sweep": ("runs", "data")}.get(args.part, ())
    if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
        parser.error(f"{args.part} needs {' and '.join(missing)}; --help shows the commands in full")
    report = {
        "settings": {
            key: value for key, value in vars(args).items() if value and key not in ("json", "model", "data", "runs", "svg")
        }
    }
    if args.part == "models":
        report["models"] = models_run(args)
    elif args.part == "sweep":
        report["runs"] = sweep_run(args)
        report["summary"] = xtr_summary(report["runs"])
        if args.svg:
            args.svg.write_text(picture(report["runs"]))
    else:
        report["runs"] = runs = []
        for seed in range(args.seeds):
            runs.append({"xtr": xtr_run, "crisp": crisp_run}[args.part](seed, args))
            print(json.dumps(runs[-1]), flush=True)
        report["summary"] = summaries(runs) if args.part == "crisp" else xtr_summary(runs)
    print(json.dumps(report.get("summary", report.get("models")), indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
