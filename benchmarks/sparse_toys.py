"""What is claimed of the sparse systems, put to the test on made-up corpora of some hundred words, in minutes on one core.

    python benchmarks/sparse_toys.py [idf] [threshold] [teachers] [echo] [entry] [--seeds 1 2 3] [--out FILE]

A model of two layers and width 64 starts from random weights, with a head tied to its embeddings. Documents hold content words
and common words; every concept has two words, and a query asks for some of a document's concepts, half of them by the other
word. Prints one JSON object an experiment; deterministic for a seed and a number of threads.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from openembed.checkpoints import build
from openembed.data.teacher import write_keys
from openembed.encoder import Encoder, EncoderConfig
from openembed.heads.idf_lookup import build_idf
from openembed.records import Document, Example, Query
from openembed.train.loop import TrainConfig, train
from openembed.vector_files import META, VECTORS

COMMON, CONCEPTS, CONTEXTS = 40, 300, 8
PAIRED = 100
"""Concepts that have two words in the corpus of synonyms."""
TRAIN, TEST = 3000, 300
NOISE = 1.0
"""Of the made-up dense teacher, against directions of length 1 a concept and dimension."""


@dataclass(frozen=True)
class World:
    """Rows to train on, and queries with one document each to find."""

    rows: list[Example]
    queries: list[str]
    documents: list[str]

    @property
    def texts(self) -> list[str]:
        """Every text of the rows once."""
        return list(dict.fromkeys(text for row in self.rows for text in (row.query.text, row.positives[0].text)))


def synonyms(seed: int, *, common: bool = True) -> World:
    """Documents of six concepts and ten common words; a query names three of the concepts and four common words."""
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, COMMON + 1)

    def words(concepts: np.ndarray, fillers: int) -> str:
        content = [f"{'ab'[generator.integers(2)]}{concept}" for concept in concepts]
        fill = generator.choice(COMMON, fillers if common else 0, p=weights / weights.sum())
        return " ".join(generator.permutation([*content, *(f"c{f}" for f in fill)]))

    pairs = []
    for _ in range(TRAIN + TEST):
        concepts = generator.choice(PAIRED, 6, replace=False)
        pairs.append((words(concepts[:3], 4), words(concepts, 10)))
    return _world(pairs)


def meanings(seed: int) -> World:
    """Documents of four words that mean one thing or another by the context, which comes last; queries say two meanings."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(TRAIN + TEST):
        context = generator.integers(CONTEXTS)
        ambiguous = generator.choice(CONCEPTS // CONTEXTS, 4, replace=False)
        query = " ".join(f"b{word * CONTEXTS + context}" for word in ambiguous[:2])
        pairs.append((query, " ".join([*(f"a{word}" for word in ambiguous), f"c{context}"])))
    return _world(pairs)


def _world(pairs: list[tuple[str, str]]) -> World:
    rows = [Example(Query("", q), (Document("", d),), (), "toy") for q, d in pairs[:TRAIN]]
    return World(rows, [q for q, _ in pairs[TRAIN:]], [d for _, d in pairs[TRAIN:]])


def encoder(folder: Path, seed: int, head: dict, *, query_head: dict | None = None, **changes: object) -> Encoder:
    """A random decoder whose words are themselves at first: a state's nearest word is the one it came from."""
    names = ["[UNK]", *(f"c{n}" for n in range(COMMON)), *(f"{s}{n}" for s in "ab" for n in range(CONCEPTS))]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.1, "vocab_size": len(names)}
    settings = {
        "backbone": {
            "architecture": {"model_type": "mistral", **shape},
            "attention": changes.pop("attention", "bidirectional"),
        },
        "head": {"kind": "splade", "bias": True, **head},
        "query_head": query_head,
        "tokenizer_path": str(folder),
        "max_length": 96,
        **changes,
    }
    return build(EncoderConfig.model_validate(settings), seed=seed)


def fit(model: Encoder, world: World, folder: Path, seed: int, objective: dict, steps: int = 250, **changes: object) -> Encoder:
    """Returns the model, trained in place."""
    settings = {
        "steps": steps,
        "seed": seed,
        "data": {"sources": [{"name": "toy", "path": "unused"}]},
        "batch": {"size": 64, "negatives": 0},
        "optimizer": {"lr": 2e-3, "warmup": 0.1, "weight_decay": 0.0},
        "compute": {"chunk_tokens": 4096, "live_chunks": "all"},
        "save_every": 10_000,
        "objective": objective,
        **changes,
    }
    train(TrainConfig.model_validate(settings), model, folder, examples={"toy": world.rows})
    return model.eval()


def scores(queries: csr_matrix, documents: csr_matrix) -> dict[str, float]:
    """nDCG@10 of finding each query's document, terms a text, and the expected products of a query and a document."""
    found = (queries @ documents.T).toarray()
    own = found.diagonal()[:, None]
    rank = (found > own).sum(1) + ((found == own).sum(1) - 1) / 2
    gains = np.where(rank < 10, 1 / np.log2(rank + 2), 0)
    share = [(side > 0).mean(0) for side in (queries, documents)]
    return {
        "ndcg_at_10": float(gains.mean()),
        "standard_error": float(gains.std() / np.sqrt(len(gains))),
        "query_terms": queries.nnz / queries.shape[0],
        "document_terms": documents.nnz / documents.shape[0],
        "flops": float(np.asarray(share[0]).ravel() @ np.asarray(share[1]).ravel()),
    }


def measure(model: Encoder, world: World) -> dict[str, float]:
    """What :func:`scores` says of the model on what it has not seen."""
    return scores(model.encode_queries(world.queries), model.encode_documents(world.documents))


def contrastive(*regularizers: dict) -> dict:
    """InfoNCE of inner products."""
    return {"kind": "contrastive", "similarity": "dot", "temperature": 1.0, "regularizers": list(regularizers)}


def idf_aware(folder: Path, seed: int) -> dict:
    """Queries by a table: ones (``none``) against idf (``match``), under FLOPS of several weights."""
    world, found = synonyms(seed), {}
    for setting in ("none", "match"):
        for weight in (0.01, 0.05, 0.2):
            here = _folder(folder, f"{setting}-{weight}")
            model = encoder(here, seed, {}, query_head={"kind": "idf_lookup"})
            idf = build_idf(model.tokenizer, [row.positives[0].text for row in world.rows])
            if setting == "match":
                model.query_head.set_table(idf)
            fit(model, world, here, seed, contrastive({"kind": "flops", "weight": weight, "steps": 80}))
            documents = model.encode_documents(world.documents)
            common = documents[:, 1 : COMMON + 1]
            found[f"{setting} {weight}"] = {
                **measure(model, world),
                "mean_weight_of_common_words": float(common.mean()),
                "mean_weight_of_words": float(documents.mean()),
            }
    return found


def threshold(folder: Path, seed: int, limit: int = 16, weight: float = 3.0) -> dict:
    """FLOPS, by default a strong one, with and without the l0 mask: how many terms documents keep."""
    world, found = synonyms(seed), {}
    for name, mask in (("plain", None), ("masked", limit)):
        here = _folder(folder, name)
        model = encoder(here, seed, {}, query_head={"kind": "idf_lookup"})
        model.query_head.set_table(build_idf(model.tokenizer, [row.positives[0].text for row in world.rows]))
        fit(model, world, here, seed, contrastive({"kind": "flops", "weight": weight, "steps": 80, "threshold": mask}))
        counts = np.diff(model.encode_documents(world.documents).indptr)
        quantiles = [int(q) for q in np.quantile(counts, (0.05, 0.25, 0.5, 0.75, 0.95))]
        found[name] = {**measure(model, world), "terms_at_5_25_50_75_95_percent": quantiles}
    return found


def weaker(folder: Path, seed: int) -> dict:
    """The same under weaker penalties, at which documents keep terms without a mask too."""
    return {str(weight): threshold(_folder(folder, str(weight)), seed, weight=weight) for weight in (0.2, 1.0)}


def teachers(folder: Path, seed: int, rows: int = 600) -> dict:
    """Few rows: labels alone, each of two imperfect teachers, and both; a teacher's own score beside its student's."""
    whole, generator = synonyms(seed), np.random.default_rng(seed + 1)
    world = World(whole.rows[:rows], whole.queries, whole.documents)
    plain = encoder(_folder(folder, "plain"), seed, {}, query_head={"kind": "idf_lookup"})
    idf = build_idf(plain.tokenizer, [row.positives[0].text for row in world.rows])
    plain.query_head.set_table(idf)
    concept = generator.normal(size=(CONCEPTS, 24)).astype(np.float32)

    def lexical(texts: list[str]) -> csr_matrix:
        return plain.encode_queries(texts)

    def dense(texts: list[str]) -> np.ndarray:
        found = np.stack([sum(concept[int(w[1:])] for w in text.split() if w[0] != "c") for text in texts])
        found = found + NOISE * generator.normal(size=found.shape)
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    parts = {"dense": _folder(folder, "dense"), "lexical": _folder(folder, "lexical")}
    np.save(parts["dense"] / VECTORS, dense(world.texts))
    weights = lexical(world.texts)
    for name, values in (("data", weights.data), ("indices", weights.indices), ("indptr", weights.indptr.astype(np.int64))):
        np.save(parts["lexical"] / f"{name}.npy", values)
    (parts["lexical"] / META).write_text(json.dumps({"representation": "sparse", "width": weights.shape[1]}))
    for part in parts.values():
        write_keys(part, world.texts)
    found = {
        "teacher dense": scores(csr_matrix(dense(world.queries)), csr_matrix(dense(world.documents))),
        "teacher lexical": scores(lexical(world.queries), lexical(world.documents)),
    }
    penalty = {"kind": "flops", "weight": 0.01, "steps": 80}
    for name, chosen in {"labels": [], "dense": ["dense"], "lexical": ["lexical"], "both": ["dense", "lexical"]}.items():
        here = _folder(folder, f"student-{name}")
        model = encoder(here, seed, {}, query_head={"kind": "idf_lookup"})
        model.query_head.set_table(idf)
        taught = [{"vectors": str(parts[part])} for part in chosen]
        ensemble = {"teachers": taught, "candidates": "in_batch", "scale": 30.0}
        distilled = {"kind": "distillation", "embedding": "none", "score_weight": 1.0, "similarity": "dot", "temperature": 1.0}
        distilled |= {"ensemble": ensemble, "regularizers": [penalty]}
        fit(model, world, here, seed, distilled if chosen else contrastive(penalty))
        found[f"student of {name}"] = measure(model, world)
    return found


def echo(folder: Path, seed: int) -> dict:
    """A causal mask, the text read twice under it, and no mask, where the word that tells meanings apart comes last.

    Queries are looked up, so that a document must hold their words, which it never has itself.
    """
    world, found = meanings(seed), {}
    for name, changes in {
        "causal": {"attention": "causal"},
        "echo": {"attention": "causal", "tokenizer": {"repeat": " "}},
        "bidirectional": {"attention": "bidirectional"},
    }.items():
        here = _folder(folder, name)
        model = encoder(here, seed, {}, query_head={"kind": "idf_lookup"}, **changes)
        fit(model, world, here, seed, contrastive({"kind": "flops", "weight": 0.01, "steps": 100}), steps=300)
        documents = model.encode_documents(world.documents).toarray()
        top = np.argsort(-documents, axis=1)[:, :20]
        asked = [[model.tokenizer.backend.token_to_id(word) for word in query.split()] for query in world.queries]
        expanded = [np.isin(words, top[row]).mean() for row, words in enumerate(asked)]
        found[name] = {**measure(model, world), "recall_of_the_queries_words_in_20_terms": float(np.mean(expanded))}
    return found


def entry(folder: Path, seed: int) -> dict:
    """VDR with and without the entry loss: queries by the model, and by their words alone; and how many weights are kept."""
    world, found = synonyms(seed, common=False), {}
    head = {"activation": "elu1p", "transform": "norm", "bias": False, "bags": True}
    for name, weight in (("with", 1.0), ("without", 0.0)):
        here = _folder(folder, name)
        model = encoder(here, seed, head)
        fit(model, world, here, seed, {"kind": "semi_parametric", "top_k": 32, "gated": "both", "entry_weight": weight})
        full = [model.encode_queries(world.queries).toarray(), model.encode_documents(world.documents).toarray()]
        rows = [model.tokenize(texts) for texts in (world.queries, world.documents)]
        bags = [model.head.bag(row, torch.device("cpu")).numpy() for row in rows]
        for k in (8, 16, 32, 64):
            query, document = (csr_matrix(_gated(*side, k)) for side in zip(full, bags, strict=True))
            found[f"{name}, {k} weights"] = {
                "model to model": scores(query, document)["ndcg_at_10"],
                "words to model": scores(csr_matrix(bags[0].astype(np.float32)), document)["ndcg_at_10"],
                "model to words": scores(query, csr_matrix(bags[1].astype(np.float32)))["ndcg_at_10"],
            }
    return found


def _gated(values: np.ndarray, bag: np.ndarray, k: int) -> np.ndarray:
    edge = -np.sort(-values, axis=1)[:, k - 1 : k]
    return np.where((values >= edge) | bag, values, 0)


def _folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


EXPERIMENTS = {
    "idf": idf_aware,
    "threshold": threshold,
    "weaker": weaker,
    "teachers": teachers,
    "echo": echo,
    "entry": entry,
}


def main() -> None:
    """Runs the experiments asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    for name in given.experiments:
        for seed in given.seeds:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                found = EXPERIMENTS[name](Path(folder), seed)
            line = json.dumps(
                {"experiment": name, "seed": seed, "seconds": round(time.perf_counter() - began, 1), "found": found}
            )
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
            if given.out is not None:
                with given.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
