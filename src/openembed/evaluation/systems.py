"""What can be evaluated: an encoder, BM25, or a finished TREC run. Each turns a task into an outcome."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from openembed.config import chosen
from openembed.data.readers import read_beir, read_run
from openembed.encoded import CALLED, require_kind
from openembed.evaluation import retrieval
from openembed.evaluation.bm25 import Bm25
from openembed.evaluation.cache import Cache
from openembed.evaluation.classification import evaluate_classification
from openembed.evaluation.clustering import evaluate_clustering, evaluate_clustering_sets
from openembed.evaluation.costs import ALONE_K, alone_ms, bm25_costs
from openembed.evaluation.pair_classification import evaluate_pair_classification
from openembed.evaluation.prompts import Prompts, choose_prompts
from openembed.evaluation.result import Outcome
from openembed.evaluation.rows import read_labelled, read_pairs, read_reranking, read_sets
from openembed.evaluation.sts import evaluate_sts
from openembed.evaluation.tasks import METRICS, Task
from openembed.evaluation.vectors import TextEncoder, Vectors
from openembed.index import lexical
from openembed.index.tokens.methods import EXACT, Exact, Method, told
from openembed.records import Run
from openembed.vectors import VectorFormat

QUERY = "query"

KINDS = {
    "dense": tuple(METRICS),
    "sparse": ("retrieval", "reranking", "sts", "pair_classification"),
    "tokens": ("retrieval", "reranking"),
}
"""What each kind of representation is compared for: terms are matched, token vectors are those of a query and a document."""


class System(Protocol):
    """Something that can be evaluated."""

    name: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of task it can do."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever scores could."""
        ...

    def prompts(self, task: Task) -> dict[str, str]:
        """Returns the literal prefixes the task's texts get."""
        ...

    def evaluate(self, task: Task) -> Outcome:
        """Returns what the task's protocol measures."""
        ...


@dataclass(frozen=True)
class EncoderSystem:
    """An encoder, searched exactly: dense vectors by inner product, sparse ones too, token vectors by MaxSim.

    ``options`` go to ``encode``: with ``normalize`` (the default) the similarity of dense vectors is the cosine, else the inner
    product. ``cache`` keeps vectors in a folder, so that a second evaluation encodes nothing. ``stored``: the format of dense
    vectors whose loss is measured (queries stay float32). ``method``: how token vectors are searched (reranking is by MaxSim
    always). Raises ``ValueError`` where another kind is asked for either.
    """

    encoder: TextEncoder
    name: str
    cache: Cache | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False
    stored: VectorFormat = field(default_factory=VectorFormat)
    method: Method = EXACT

    def __post_init__(self) -> None:
        if not self.stored.plain:
            require_kind(self.encoder, ["dense"], "a stored format", "leave dimensions and precision out")
        if not isinstance(self.method, Exact):
            require_kind(self.encoder, ["tokens"], f"method {self.method.kind}", "leave it out")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of task that its representations can be compared for."""
        return KINDS[getattr(self.encoder, "kind", "dense")]

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint and the options that change vectors."""
        relevant = {key: self.options[key] for key in ("max_length", "normalize") if key in self.options}
        relevant |= chosen(self.stored) | ({} if isinstance(self.method, Exact) else {"method": told(self.method)})
        return f"{self.encoder.fingerprint} {relevant}" if relevant else self.encoder.fingerprint

    def prompts(self, task: Task) -> dict[str, str]:
        """Returns the literal prefixes of the sides that the task has."""
        chosen = self._choose(task)
        if task.kind in ("retrieval", "reranking"):
            return {"query": chosen.query, "document": chosen.document}
        return {"text": chosen.symmetric}

    def evaluate(self, task: Task) -> Outcome:
        """Returns the outcome of the task under the model's prompts for it; ``ValueError`` for a kind it cannot do."""
        if task.kind not in self.kinds:
            kind = getattr(self.encoder, "kind", "dense")
            raise ValueError(
                f"{task.name}: {self.name} gives {CALLED[kind]}, which {task.kind} has no use for; "
                f"evaluate it on {', '.join(self.kinds)}"
            )
        prompts, options = self._choose(task), dict(self.options)
        label = task.name if self.progress else None
        vectors = Vectors(self.encoder, prompts, self.cache, options, label=label, stored=self.stored)
        if task.kind == "retrieval":
            return _retrieval(vectors, task, self.method)
        return PROTOCOLS[task.kind](vectors, task)

    def _choose(self, task: Task) -> Prompts:
        return choose_prompts(self.encoder, task.kind, task.prompt_names, task.instruction, task.document_instruction)


@dataclass(frozen=True)
class Bm25System:
    """BM25 over titles and texts; the stemmer is that of the task's language."""

    kinds: ClassVar[tuple[str, ...]] = ("retrieval", "reranking")
    name: str = "bm25"

    @property
    def fingerprint(self) -> str:
        """Method and settings."""
        return f"bm25 lucene k1={lexical.K1} b={lexical.B}"

    def prompts(self, task: Task) -> dict[str, str]:
        """Returns nothing: BM25 reads the bare texts."""
        return {}

    def evaluate(self, task: Task) -> Outcome:
        """Returns the outcome of a retrieval or reranking task; raises ``ValueError`` for another kind."""
        if task.kind == "retrieval":
            corpus, queries, qrels = read_beir(task.folder, task.split)
            judged = [query for query in queries if qrels.get(query.id)]
            model = Bm25([document.full_text for document in corpus], language=task.language)
            began = time.perf_counter()
            texts, ids = [query.text for query in judged], [document.id for document in corpus]
            run = model.search(texts, [query.id for query in judged], ids)
            took = time.perf_counter() - began
            alone = alone_ms(lambda text: model.search([text], [QUERY], ids, ALONE_K), texts)
            costs = bm25_costs(model.postings / len(corpus), took, len(judged), alone)
            return replace(_score_retrieval(run, task, corpus, qrels), costs=costs)
        if task.kind == "reranking":
            return self._rerank(task)
        raise ValueError(f"{task.name}: BM25 ranks documents and cannot do {task.kind}; choose retrieval or reranking tasks")

    def _rerank(self, task: Task) -> Outcome:
        items = read_reranking(task.folder, task.split)
        usable, qrels, texts = retrieval.reranking_qrels(items)
        identities = list(texts)
        place = {identity: row for row, identity in enumerate(identities)}
        model = Bm25([texts[identity] for identity in identities], language=task.language)
        run: Run = {}
        for item in usable:
            scores = model.scores(item.query)
            run[item.id] = {identity: float(scores[place[identity]]) for identity in qrels[item.id]}
        return retrieval.score_reranking(run, items, metric=task.metric)


@dataclass(frozen=True)
class RunSystem:
    """A finished TREC run file, scored against a retrieval task's judgements."""

    kinds: ClassVar[tuple[str, ...]] = ("retrieval",)
    path: Path
    name: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def prompts(self, task: Task) -> dict[str, str]:
        """Returns nothing: the run is finished."""
        return {}

    def evaluate(self, task: Task) -> Outcome:
        """Returns the outcome of the run; ``ValueError`` for a task that is no retrieval or a run of other queries."""
        if task.kind != "retrieval":
            raise ValueError(f"{task.name}: a TREC run can only be scored on retrieval tasks, this is {task.kind}")
        run = read_run(self.path)
        corpus, _, qrels = read_beir(task.folder, task.split)
        if not run.keys() & qrels.keys():
            raise ValueError(f"{self.path}: ranks none of the judged queries of {task.name} ({task.split})")
        return _score_retrieval(run, task, corpus, qrels)


def _score_retrieval(run: Run, task: Task, corpus: list[Any], qrels: Any) -> Outcome:
    return retrieval.score_retrieval(run, corpus, qrels, metric=task.metric, ignore_identical_ids=task.ignore_identical_ids)


def _retrieval(vectors: Vectors, task: Task, method: Method) -> Outcome:
    corpus, queries, qrels = read_beir(task.folder, task.split)
    rules = {"metric": task.metric, "ignore_identical_ids": task.ignore_identical_ids}
    return retrieval.evaluate_retrieval(vectors, corpus, queries, qrels, method=method, **rules)


def _reranking(vectors: Vectors, task: Task) -> Outcome:
    return retrieval.evaluate_reranking(vectors, read_reranking(task.folder, task.split), metric=task.metric)


def _sts(vectors: Vectors, task: Task) -> Outcome:
    return evaluate_sts(vectors, *read_pairs(task.folder, task.split, "score"))


def _pair_classification(vectors: Vectors, task: Task) -> Outcome:
    first, second, labels = read_pairs(task.folder, task.split, "label")
    return evaluate_pair_classification(vectors, first, second, [int(label) for label in labels])


def _classification(vectors: Vectors, task: Task) -> Outcome:
    train, test = read_labelled(task.folder, "train"), read_labelled(task.folder, task.split)
    return evaluate_classification(
        vectors,
        train,
        test,
        samples_per_label=task.samples_per_label,
        experiments=task.experiments,
        metric=task.metric,
    )


def _clustering(vectors: Vectors, task: Task) -> Outcome:
    sets = read_sets(task.folder, task.split)
    if task.protocol == "whole" or len(sets) > 1:
        return evaluate_clustering_sets(vectors, sets)
    texts, labels = sets[0]
    return evaluate_clustering(
        vectors, texts, labels, fraction=task.fraction, max_documents=task.max_documents, experiments=task.experiments
    )


PROTOCOLS: dict[str, Callable[[Vectors, Task], Outcome]] = {
    "reranking": _reranking,
    "sts": _sts,
    "pair_classification": _pair_classification,
    "classification": _classification,
    "clustering": _clustering,
}
