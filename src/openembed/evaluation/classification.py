"""Classification: logistic regression on a few texts of each label, by MTEB's protocol.

Shapes: ``N`` texts, ``D`` width.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from openembed.evaluation.result import Outcome
from openembed.evaluation.statistics import bootstrap_interval, generator
from openembed.evaluation.vectors import Vectors


def undersample(labels: Sequence[Hashable], samples_per_label: int, experiments: int, seed: int) -> list[list[int]]:
    """Returns the training rows of each experiment, exactly as mteb draws them.

    mteb shuffles one list of indices again and again, each time with a fresh ``RandomState(seed)``, and takes the first
    ``samples_per_label`` rows of every label in that order.
    """
    order = list(range(len(labels)))
    chosen = []
    for _ in range(experiments):
        np.random.RandomState(seed).shuffle(order)
        taken: dict[Hashable, int] = defaultdict(int)
        rows = []
        for row in order:
            if taken[labels[row]] < samples_per_label:
                taken[labels[row]] += 1
                rows.append(row)
        chosen.append(rows)
    return chosen


def evaluate_classification(
    vectors: Vectors,
    train: tuple[Sequence[str], Sequence[Hashable]],
    test: tuple[Sequence[str], Sequence[Hashable]],
    *,
    samples_per_label: int = 8,
    experiments: int = 10,
    seed: int = 42,
    metric: str = "accuracy",
) -> Outcome:
    """Returns the mean accuracy (or ``metric``) of ``experiments`` classifiers, each trained on a few texts a label.

    ``train`` and ``test`` are (texts, labels). Only training texts that some experiment uses are encoded. Per-item
    accuracy is the share of experiments that label the text rightly; the interval resamples test texts.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    chosen = undersample(train[1], samples_per_label, experiments, seed)
    used = sorted(set().union(*chosen))
    place = {row: position for position, row in enumerate(used)}
    train_ND, test_ND = vectors.symmetric([train[0][row] for row in used]), vectors.symmetric(test[0])
    gold = list(test[1])
    scores, right_N = [], np.zeros(len(gold))
    for rows in chosen:
        classifier = LogisticRegression(max_iter=100, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(train_ND[[place[row] for row in rows]], [train[1][row] for row in rows])
        predicted = classifier.predict(test_ND)
        scores.append(_scores(gold, predicted))
        right_N += predicted == np.asarray(gold)
    metrics = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    if metric not in metrics:
        raise ValueError(f"unknown metric {metric!r} of classification; allowed: {', '.join(metrics)}")
    per_item = dict(zip(map(str, range(len(gold))), (right_N / experiments).tolist(), strict=True))
    of_items = metric == "accuracy"
    spread = list(per_item.values()) if of_items else [score[metric] for score in scores]
    return Outcome(
        metric=metric,
        value=metrics[metric],
        interval=bootstrap_interval(spread, generator(seed, "interval", "classification")),
        metrics=metrics,
        counts={"texts": len(gold), "labels": len(set(gold)), "train": len(used), "experiments": experiments},
        per_item={"accuracy": per_item},
        details={"per_experiment": [score[metric] for score in scores]},
    )


def _scores(gold: Sequence[Hashable], predicted: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score

    scores = {"accuracy": accuracy_score(gold, predicted)}
    for suffix, average in (("", "macro"), ("_weighted", "weighted")):
        scores[f"f1{suffix}"] = f1_score(gold, predicted, average=average)
        scores[f"precision{suffix}"] = precision_score(gold, predicted, average=average, zero_division=0)
        scores[f"recall{suffix}"] = recall_score(gold, predicted, average=average, zero_division=0)
    if set(gold) <= {0, 1} and len(set(gold)) == 2:
        scores["ap"] = average_precision_score(gold, predicted)
    return {name: float(value) for name, value in scores.items()}
