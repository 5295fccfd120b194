"""Ensembles of teachers: min-max by query, dense, sparse and recorded scores in one target, and what is refused."""

import json

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.data.teacher import TeacherScores, open_teacher, teacher_fingerprint, write_keys
from openembed.losses import margin_mse_rows, min_max_rows
from openembed.objectives.distillation import DistillationConfig
from openembed.objectives.ensemble import EnsembleConfig
from openembed.records import Document, Example, Query
from openembed.representations import Dense
from openembed.vector_files import VECTORS

DENSE, TERMS = 5, 9


def batch(scores=True, in_batch=True):
    rows = [
        Example(
            Query("", f"q{n}"),
            (Document("", f"p{n}"),),
            (Document("", f"n{n} a"), Document("", f"n{n} b")),
            "s",
            (0.9 - n / 10,) if scores else (),
            (0.5, 0.1 + n / 10) if scores else (),
        )
        for n in range(3)
    ]
    return collate(rows, {"s": RowSource("s", in_batch=in_batch)}, BatchConfig(negatives=2), np.random.default_rng(0))


@pytest.fixture
def folders(tmp_path):
    texts = batch().texts
    generator = np.random.default_rng(3)
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    for folder in (dense, sparse):
        folder.mkdir()
        write_keys(folder, texts)
    np.save(dense / VECTORS, generator.normal(size=(len(texts), DENSE)).astype(np.float32))
    write_sparse(sparse, csr_matrix(generator.poisson(0.6, size=(len(texts), TERMS)).astype(np.float32)))
    return dense, sparse


def write_sparse(folder, matrix):
    for name in ("data", "indices", "indptr"):
        np.save(folder / f"{name}.npy", getattr(matrix, name))
    (folder / "meta.json").write_text(json.dumps({"representation": "sparse", "width": matrix.shape[1]}))


def expected_target(rows, folders, weights, scale, candidates):
    """Three loops: each teacher's scores of a query's candidates, min-max, weighted mean."""
    teachers = [open_teacher(folder).lookup(rows.texts) for folder in folders]
    dense = teachers[0] / np.linalg.norm(teachers[0], axis=1, keepdims=True)
    sparse = teachers[1].toarray()
    target = np.zeros((rows.rows, rows.columns))
    for row in range(rows.rows):
        chosen = np.flatnonzero(candidates[row])
        total = np.zeros(len(chosen))
        for values, weight in zip((dense, sparse), weights, strict=True):
            scores = np.array([values[rows.query_Q[row]] @ values[rows.document_N[column]] for column in chosen])
            total += weight * (scores - scores.min()) / (scores.max() - scores.min() + 1e-6)
        target[row, chosen] = scale * total / sum(weights)
    return target


@pytest.mark.parametrize("candidates", ["own", "in_batch"])
def test_dense_and_sparse_teachers_make_one_target(folders, candidates):
    dense, sparse = folders
    rows = batch()
    teachers = [{"vectors": str(dense), "weight": 2.0}, {"vectors": str(sparse)}]
    ensemble = EnsembleConfig(teachers=teachers, candidates=candidates, scale=30).build()
    target, known = ensemble.target(rows, torch.device("cpu"))
    assert known.sum(1).tolist() == ([3, 3, 3] if candidates == "own" else [9, 9, 9])
    np.testing.assert_allclose(target, expected_target(rows, folders, (2.0, 1.0), 30, known.numpy()), atol=1e-4)


def test_a_source_without_in_batch_negatives_keeps_to_its_own(folders):
    teachers = [{"vectors": str(folders[0])}]
    _, known = (
        EnsembleConfig(teachers=teachers, candidates="in_batch").build().target(batch(in_batch=False), torch.device("cpu"))
    )
    assert known.sum(1).tolist() == [3, 3, 3]


def test_recorded_scores_are_a_teacher_too(folders):
    rows = batch()
    both = EnsembleConfig(teachers=[{}, {"vectors": str(folders[0])}], candidates="in_batch").build()
    target, known = both.target(rows, torch.device("cpu"))
    assert known.sum(1).tolist() == [3, 3, 3], "a pair counts when every teacher has scored it"
    assert target.max() <= 30
    alone = EnsembleConfig(teachers=[{}], normalize="none", scale=1.0).build().target(rows, torch.device("cpu"))[0]
    assert alone[0][alone[0] > 0].tolist() == pytest.approx([0.9, 0.5, 0.1])


def test_the_temperature_is_the_ensembles_where_none_is_given(folders):
    scores = {"embedding": "none", "score_weight": 1.0}
    ensemble = {"teachers": [{"vectors": str(f)} for f in folders]}
    assert DistillationConfig(**scores).temperature == 0.05
    config = DistillationConfig(**scores, ensemble=ensemble)
    assert config.temperature == 1.0
    assert DistillationConfig(**scores, ensemble=ensemble, temperature=0.05).temperature == 0.05
    assert DistillationConfig(**config.model_dump()) == config
    assert config.at(["a", "b"]).temperature == 1.0
    torch.manual_seed(0)
    values, rows = Dense(torch.randn(len(batch().texts), 16)), batch()
    given = DistillationConfig(**scores, ensemble=ensemble, temperature=1.0)
    assert config.build().loss(values, rows).total == given.build().loss(values, rows).total


@pytest.mark.parametrize("loss", ["kl", "margin_mse"])
def test_the_target_is_where_the_loss_ends(folders, loss):
    rows = batch()
    config = DistillationConfig(
        embedding="none",
        score_weight=1.0,
        similarity="dot",
        temperature=1.0,
        ensemble={"teachers": [{"vectors": str(f)} for f in folders], "loss": loss, "scale": 3.0},
    )
    objective = config.build()
    torch.manual_seed(0)
    values = torch.randn(len(rows.texts), 16, requires_grad=True)
    optimizer = torch.optim.Adam([values], lr=0.05)
    losses = []
    for _ in range(400):
        found = objective.loss(Dense(values), rows)
        losses.append(found.total.item())
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
    assert losses[0] > 0.05
    assert losses[-1] < 0.01 * losses[0]
    assert set(found.parts) == {loss}
    assert found.diagnostics["rows_by_source"] == {"s": 3}


def test_settings_read_folders_in_order_and_can_be_moved(folders):
    config = DistillationConfig(
        vectors="a", score_weight=1.0, ensemble={"teachers": [{"vectors": "b", "queries": "c"}, {}, {"vectors": "d"}]}
    )
    assert config.folders == ("a", "b", "c", "d")
    moved = config.at(["1", "2", "3", "4"])
    assert moved.folders == ("1", "2", "3", "4")
    assert moved.ensemble.teachers[1].vectors is None
    assert teacher_fingerprint(folders[1]) != teacher_fingerprint(folders[0])


def test_unlike_or_damaged_folders_are_refused(folders):
    with pytest.raises(ValueError, match="vectors of different kinds"):
        TeacherScores(folders[0], folders[1], "cosine")
    with pytest.raises(ValueError, match="no teacher vector for 1 of 1 texts"):
        open_teacher(folders[1]).lookup(["unknown"])
    with pytest.raises(ValueError, match="score_weight is 0"):
        DistillationConfig(vectors="x", ensemble={"teachers": [{}]})
    with pytest.raises(ValueError, match="queries without vectors"):
        EnsembleConfig(teachers=[{"queries": "x"}])


def test_margin_mse_is_the_mean_over_pairs_and_blind_to_shifts():
    generator = torch.Generator().manual_seed(5)
    scores, teacher = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    positives = torch.zeros(4, 6, dtype=torch.bool)
    positives[:, 0] = True
    positives[1, 3] = True
    candidates = torch.rand(4, 6, generator=generator) > 0.3
    candidates[2] = False
    candidates[3] = torch.tensor([True] + [False] * 5)
    found = margin_mse_rows(scores + 1000, teacher, positives, candidates)
    for row in range(4):
        pairs = [
            ((scores[row, p] - scores[row, c]) - (teacher[row, p] - teacher[row, c])).item() ** 2
            for p in range(6)
            for c in range(6)
            if candidates[row, p] and candidates[row, c] and positives[row, p] and not positives[row, c]
        ]
        assert found[row].item() == pytest.approx(np.mean(pairs) if pairs else 0, abs=2e-3)


def test_min_max_of_one_candidate_is_nothing():
    scores = torch.tensor([[3.0, 9.0, 5.0], [1.0, 2.0, 3.0]])
    candidates = torch.tensor([[True, False, True], [False, True, False]])
    assert min_max_rows(scores, candidates).tolist() == [[0, 0, pytest.approx(1, abs=1e-6)], [0, 0, 0]]
