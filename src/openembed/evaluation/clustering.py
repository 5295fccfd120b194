"""Clustering: how well k-means on vectors finds the labels (v-measure), by MTEB's two protocols.

Shapes: ``N`` texts, ``D`` width.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

import numpy as np

from openembed.evaluation.result import Outcome
from openembed.evaluation.statistics import bootstrap_interval, generator
from openembed.evaluation.vectors import Vectors

METRIC = "v_measure"


def evaluate_clustering(
    vectors: Vectors,
    texts: Sequence[str],
    labels: Sequence[Hashable],
    *,
    fraction: float | None = 0.04,
    max_documents: int | None = None,
    sample: int = 16_384,
    experiments: int = 10,
    seed: int = 42,
) -> Outcome:
    """Returns the mean v-measure of ``experiments`` bootstraps (mteb's ``AbsTaskClustering``).

    Embeds ``fraction`` of the texts (or at most ``max_documents``, which wins; all where both are None), then clusters
    draws of ``sample`` vectors with replacement: MiniBatchKMeans, batch 512, one k-means++ start. The interval is over
    experiments.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import adjusted_mutual_info_score, v_measure_score

    rng = random.Random(seed)
    rows = list(range(len(texts)))
    limit = max_documents if max_documents is not None else None if fraction is None else int(fraction * len(texts))
    if limit is not None:
        rows = rng.sample(rows, k=min(limit, len(rows)))
    if not rows:
        raise ValueError(f"{fraction} of {len(texts)} texts is none; set max_documents or a larger fraction")
    values_ND = vectors.symmetric([texts[row] for row in rows])
    labels_N = np.array([labels[row] for row in rows])
    model = MiniBatchKMeans(len(np.unique(labels_N)), init="k-means++", batch_size=512, n_init=1, random_state=seed)
    scores, mutual = [], []
    for _ in range(experiments):
        drawn = rng.choices(range(len(rows)), k=sample)
        assigned = model.fit_predict(values_ND[drawn])
        scores.append(float(v_measure_score(labels_N[drawn], assigned)))
        mutual.append(float(adjusted_mutual_info_score(labels_N[drawn], assigned)))
    return _outcome(scores, len(rows), len(np.unique(labels_N)), seed, {"ami": float(np.mean(mutual))})


def evaluate_clustering_sets(
    vectors: Vectors, sets: Sequence[tuple[Sequence[str], Sequence[Hashable]]], *, seed: int = 42
) -> Outcome:
    """Returns the mean v-measure over ``sets`` of (texts, labels), each clustered whole (mteb's legacy protocol).

    MiniBatchKMeans, batch 500. A set with a single label scores 1, as in mteb. The interval is over sets.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.metrics import v_measure_score

    scores = []
    for texts, labels in sets:
        count = len(set(labels))
        if count <= 1:
            scores.append(1.0)
            continue
        model = MiniBatchKMeans(count, batch_size=500, n_init="auto", random_state=seed)
        assigned = model.fit(vectors.symmetric(texts)).labels_
        scores.append(float(v_measure_score(list(labels), assigned)))
    texts = sum(len(texts) for texts, _ in sets)
    return _outcome(scores, texts, len({label for _, labels in sets for label in labels}), seed, {})


def _outcome(scores: list[float], texts: int, labels: int, seed: int, extra: dict[str, float]) -> Outcome:
    return Outcome(
        metric=METRIC,
        value=float(np.mean(scores)),
        interval=bootstrap_interval(scores, generator(seed, "interval", "clustering")),
        metrics={METRIC: float(np.mean(scores)), f"{METRIC}_std": float(np.std(scores)), **extra},
        counts={"texts": texts, "labels": labels, "experiments": len(scores)},
        details={"per_experiment": scores},
    )
