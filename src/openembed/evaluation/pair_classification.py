"""Pair classification: does a similarity separate pairs that belong together, by MTEB's protocol.

Shapes: ``N`` pairs, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from openembed.encoded import Encoded
from openembed.evaluation.result import Outcome
from openembed.evaluation.statistics import bootstrap_statistic, generator
from openembed.evaluation.vectors import Vectors


def pair_similarities(first_ND: Encoded, second_ND: Encoded) -> dict[str, np.ndarray]:
    """Returns cosine, dot product, and negated Manhattan and Euclidean distance of each pair, ``(N,)`` float32 each.

    Sparse vectors have the first two alone; the cosine of an empty one is 0.
    """
    if isinstance(first_ND, csr_matrix):
        return _sparse_similarities(first_ND.astype(np.float64), second_ND.astype(np.float64))
    difference_ND = first_ND - second_ND
    unit_ND = _unit(first_ND) - _unit(second_ND)
    return {
        # scikit-learn's way: half the squared distance of the unit vectors
        "cosine": 1 - 0.5 * np.einsum("nd,nd->n", unit_ND, unit_ND),
        "dot": np.einsum("nd,nd->n", first_ND, second_ND),
        "manhattan": -np.abs(difference_ND).sum(axis=1),
        "euclidean": -np.sqrt(np.einsum("nd,nd->n", difference_ND, difference_ND)),
    }


def average_precision(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Returns average precision, equal scores taken together, as scikit-learn does; nan without a positive."""
    hits_N, rows_N, positives = _cumulated(scores_N, labels_N)
    if positives == 0:
        return float("nan")
    recall = hits_N / positives
    return float(np.sum(np.diff(recall, prepend=0.0) * hits_N / rows_N))


def best_accuracy(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Returns the accuracy at the best threshold between two distinct scores."""
    hits, rows, positives = _cumulated(scores_N, labels_N)
    negatives_below = (len(labels_N) - positives) - (rows - hits)
    between = (hits + negatives_below)[:-1]
    return float(between.max() / len(labels_N)) if len(between) else 0.0


def best_f1(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[float, float, float]:
    """Returns (F1, precision, recall) at the threshold between two distinct scores where F1 is best."""
    hits, rows, positives = (part[:-1] if isinstance(part, np.ndarray) else part for part in _cumulated(scores_N, labels_N))
    if not len(hits) or not hits.any():
        return 0.0, 0.0, 0.0
    f1 = 2 * hits / (rows + positives)
    best = int(f1.argmax())
    return float(f1[best]), float(hits[best] / rows[best]), float(hits[best] / positives)


def evaluate_pair_classification(
    vectors: Vectors, first: Sequence[str], second: Sequence[str], labels: Sequence[int], *, seed: int = 42
) -> Outcome:
    """Returns the largest average precision over cosine, dot, Manhattan and Euclidean; accuracy and F1 beside it.

    Of sparse vectors over cosine and dot. ``labels`` are 0 or 1. The interval resamples pairs and takes the maximum anew.
    """
    labels_N = np.asarray(labels)
    if not set(np.unique(labels_N).tolist()) <= {0, 1} or labels_N.min() == labels_N.max():
        raise ValueError(f"labels must be 0 and 1 and both occur, got {sorted(set(labels_N.tolist()))[:5]}")
    similarities = pair_similarities(vectors.symmetric(first), vectors.symmetric(second))
    metrics: dict[str, float] = {}
    for name, scores_N in similarities.items():
        f1, precision, recall = best_f1(scores_N, labels_N)
        values = {"ap": average_precision(scores_N, labels_N), "accuracy": best_accuracy(scores_N, labels_N)}
        values |= {"f1": f1, "precision": precision, "recall": recall}
        metrics |= {f"{name}_{key}": value for key, value in values.items()}
    for key in ("ap", "accuracy", "f1", "precision", "recall"):
        metrics[f"max_{key}"] = max(metrics[f"{name}_{key}"] for name in similarities)
    return Outcome(
        metric="max_ap",
        value=metrics["max_ap"],
        interval=bootstrap_statistic(
            len(labels_N),
            lambda index: max(average_precision(s[index], labels_N[index]) for s in similarities.values()),
            generator(seed, "interval", "pairs"),
            resamples=500,
        ),
        metrics=metrics,
        counts={"pairs": len(labels_N), "positive": int(labels_N.sum())},
        paired={"gold": labels_N.tolist(), **{name: scores.tolist() for name, scores in similarities.items()}},
    )


def _cumulated(scores_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Positives and rows at or above each distinct score, best first, and all positives."""
    order = np.argsort(-scores_N, kind="stable")
    sorted_scores, sorted_labels = scores_N[order], labels_N[order]
    ends = np.append(np.flatnonzero(np.diff(sorted_scores)), len(scores_N) - 1)
    return np.cumsum(sorted_labels)[ends], ends + 1, int(labels_N.sum())


def _sparse_similarities(first_NV: csr_matrix, second_NV: csr_matrix) -> dict[str, np.ndarray]:
    dot_N, *squares = (_row_products(a, b) for a, b in ((first_NV, second_NV), (first_NV,) * 2, (second_NV,) * 2))
    norms_N = np.sqrt(squares[0] * squares[1])
    cosine_N = dot_N / np.where(norms_N > 0, norms_N, 1)
    return {"cosine": cosine_N.astype(np.float32), "dot": dot_N.astype(np.float32)}


def _row_products(a_NV: csr_matrix, b_NV: csr_matrix) -> np.ndarray:
    return np.asarray(a_NV.multiply(b_NV).sum(axis=1)).ravel()


def _unit(vectors_ND: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / np.where(lengths > 0, lengths, 1)
