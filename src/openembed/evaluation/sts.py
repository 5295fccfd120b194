"""Semantic textual similarity: how well cosines order sentence pairs, by MTEB's protocol."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from openembed.evaluation.pair_classification import pair_similarities
from openembed.evaluation.result import Outcome
from openembed.evaluation.statistics import bootstrap_statistic, generator
from openembed.evaluation.vectors import Vectors


def spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Returns Spearman's rank correlation, tied values at their mean rank; nan where one side is constant."""
    from scipy.stats import rankdata

    return pearson(rankdata(a_N), rankdata(b_N))


def pearson(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Returns Pearson's correlation; nan where one side is constant."""
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    scale = np.sqrt((a_N @ a_N) * (b_N @ b_N))
    return float(a_N @ b_N / scale) if scale > 0 else float("nan")


def evaluate_sts(
    vectors: Vectors, first: Sequence[str], second: Sequence[str], gold: Sequence[float], *, seed: int = 42
) -> Outcome:
    """Returns the Spearman correlation of cosine and gold score; Pearson, and Manhattan and Euclidean, beside it.

    Of sparse vectors the dot product is beside it.

    Both sentences carry the same instruction. The interval resamples pairs.
    """
    gold_N = np.asarray(gold, dtype=np.float64)
    similarities = pair_similarities(vectors.symmetric(first), vectors.symmetric(second))
    if "manhattan" in similarities:
        similarities.pop("dot")  # of vectors of length 1 it is the cosine
    metrics = {}
    for name, values_N in similarities.items():
        metrics[f"{name}_spearman"] = spearman(values_N, gold_N)
        metrics[f"{name}_pearson"] = pearson(values_N, gold_N)
    cosine_N = similarities["cosine"]
    if not np.isfinite(metrics["cosine_spearman"]):
        raise ValueError("Spearman is undefined: all gold scores or all cosines are equal")
    return Outcome(
        metric="cosine_spearman",
        value=metrics["cosine_spearman"],
        interval=bootstrap_statistic(
            len(gold_N), lambda index: spearman(cosine_N[index], gold_N[index]), generator(seed, "interval", "sts")
        ),
        metrics=metrics,
        counts={"pairs": len(gold_N)},
        paired={"gold": gold_N.tolist(), "cosine": cosine_N.tolist()},
    )
