"""Distillation: targets found by text, gradients that point at them, and a start that is already a bag of words."""

import numpy as np
import pytest
import torch
from store_fakes import BagOfWords
from tiny_training import tiny_encoder

from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.data.teacher import TeacherVectors, write_keys
from openembed.losses import cosine_distance_rows, kl_divergence_rows
from openembed.objectives.distillation import DistillationConfig
from openembed.objectives.ensemble import recorded_scores
from openembed.records import Document, Example, Query
from openembed.representations import Dense
from openembed.train.loop import TrainConfig, train
from openembed.train.vocabulary import initialise, token_weights
from openembed.vector_files import VECTORS

TEXTS = ["red fish", "blue bird", "green tree", "old stone", "new river"]


@pytest.fixture
def folder(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(len(TEXTS), 6)).astype(np.float32)
    np.save(tmp_path / VECTORS, vectors)
    write_keys(tmp_path, TEXTS)
    return tmp_path


def text_batch(texts):
    examples = [Example(Query("", text), (Document("", text),), source="t") for text in texts]
    return collate(examples, {"t": RowSource("t")}, BatchConfig(size=len(texts)), np.random.default_rng(0))


def scored_batch():
    examples = [
        Example(Query("q1", "red"), (Document("a", "red fish"),), (Document("b", "blue bird"),), "t", (0.9,), (0.3,)),
        Example(Query("q2", "old"), (Document("c", "old stone"),), (Document("d", "new river"),), "t", (0.7,), (0.6,)),
        Example(Query("q3", "green"), (Document("e", "green tree"),), (), "t"),
    ]
    return collate(examples, {"t": RowSource("t")}, BatchConfig(size=3), np.random.default_rng(0))


def test_vectors_are_found_by_text_whatever_its_case_and_spaces(folder):
    teacher = TeacherVectors(folder)
    stored = np.load(folder / VECTORS)
    assert np.array_equal(teacher.lookup(["NEW  river", "red fish"]), stored[[4, 0]])


def test_a_text_without_a_vector_is_named(folder):
    with pytest.raises(ValueError, match="no teacher vector for 1 of 2 texts, first 'purple cow'"):
        TeacherVectors(folder).lookup(["red fish", "purple cow"])


def test_vectors_and_keys_must_belong_together(folder):
    write_keys(folder, TEXTS[:3])
    with pytest.raises(ValueError, match="5 vectors but 3 keys"):
        TeacherVectors(folder)
    (folder / VECTORS).unlink()
    with pytest.raises(ValueError, match=r"no vectors\.npy"):
        TeacherVectors(folder)


def test_principal_directions_are_orthonormal_and_keep_the_most(folder):
    teacher = TeacherVectors(folder)
    directions = teacher.principal_directions(3)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-6)
    vectors = np.load(folder / VECTORS)
    singular = np.linalg.svd(vectors, compute_uv=False)
    assert np.square(vectors @ directions).sum() == pytest.approx(np.square(singular[:3]).sum(), rel=1e-5)
    with pytest.raises(ValueError, match="width 6 cannot be projected to 7"):
        teacher.principal_directions(7)


@pytest.mark.parametrize("embedding", ["cosine", "squared_error"])
@pytest.mark.parametrize("width", [6, 4])
def test_the_projected_teacher_is_the_minimum(folder, embedding, width):
    objective = DistillationConfig(vectors=str(folder), embedding=embedding).build()
    batch = text_batch(TEXTS)
    teacher = TeacherVectors(folder)
    target = teacher.lookup(batch.texts)
    target = target if width == 6 else target @ teacher.principal_directions(4)
    best = torch.from_numpy(target).requires_grad_()
    loss = objective.loss(Dense(best), batch)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(0, abs=1e-6)
    assert best.grad.abs().max() < 1e-6
    assert objective.loss(Dense(best.detach() + torch.randn(best.shape)), batch).total > 0.01
    assert loss.diagnostics["rows_by_source"] == {"t": 5}


def test_scores_of_teacher_vectors_are_learned_by_every_text_against_the_others(folder):
    objective = DistillationConfig(vectors=str(folder), embedding="none", score_weight=2.0, temperature=0.1).build()
    batch = text_batch(TEXTS)
    target = torch.from_numpy(TeacherVectors(folder).lookup(batch.texts))
    turned = target @ torch.linalg.qr(torch.randn(6, 6))[0]
    assert objective.loss(Dense(turned), batch).total.item() == pytest.approx(0, abs=1e-5), "a rotation keeps all scores"
    values = torch.randn(5, 6)
    expected = 0.0
    student = torch.nn.functional.normalize(values) @ torch.nn.functional.normalize(values).T / 0.1
    teacher = torch.nn.functional.normalize(target) @ torch.nn.functional.normalize(target).T / 0.1
    for row in range(5):
        others = [column for column in range(5) if column != row]
        p, q = teacher[row, others].softmax(0), student[row, others].softmax(0)
        expected += (p * (p / q).log()).sum().item() / 5
    assert objective.loss(Dense(values), batch).total.item() == pytest.approx(2 * expected, rel=1e-4)


def test_recorded_scores_are_learned_row_by_row():
    batch = scored_batch()
    teacher, candidates = recorded_scores(batch)
    assert candidates.sum(1).tolist() == [2, 2, 0]
    assert sorted(teacher[candidates].tolist()) == pytest.approx([0.3, 0.6, 0.7, 0.9])
    objective = DistillationConfig(embedding="none", score_weight=1.0, temperature=0.5).build()
    values = torch.randn(len(batch.texts), 6, requires_grad=True)
    loss = objective.loss(Dense(values), batch)
    loss.total.backward()
    touched = {batch.texts[index] for index in torch.nonzero(values.grad.abs().sum(1)).flatten().tolist()}
    assert touched == {"red", "red fish", "blue bird", "old", "old stone", "new river"}


def test_recorded_scores_must_exist():
    objective = DistillationConfig(embedding="none", score_weight=1.0).build()
    with pytest.raises(ValueError, match="mine the sources with the teacher first"):
        objective.loss(Dense(torch.randn(5, 6)), text_batch(TEXTS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "needs vectors"),
        ({"embedding": "none"}, "nothing is learned"),
        ({"vectors": "x", "temperature": 0}, "greater than 0"),
    ],
)
def test_settings_that_teach_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**fields)


def test_losses_of_single_candidates_and_zero_vectors_are_finite():
    scores = torch.randn(2, 3, requires_grad=True)
    one = torch.tensor([[True, False, False], [False, False, False]])
    loss = kl_divergence_rows(scores, torch.randn(2, 3), one, 0.1)
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert scores.grad.abs().max() == 0
    zero = torch.zeros(1, 4, requires_grad=True)
    cosine_distance_rows(zero, torch.ones(1, 4)).sum().backward()
    assert zero.grad.isfinite().all()


def test_the_initial_embeddings_carry_the_teacher_and_have_one_length(tmp_path):
    encoder, teacher = tiny_encoder(tmp_path / "student"), tiny_encoder(tmp_path / "teacher", "bert")
    width = encoder.backbone.width
    np.save(tmp_path / VECTORS, np.random.default_rng(0).normal(size=(50, width)).astype(np.float32))
    write_keys(tmp_path, [str(number) for number in range(50)])
    vectors = TeacherVectors(tmp_path)
    texts = ["w1 w1 w2", "w1 w3"]
    initialise(encoder, vectors, teacher, texts, 1e-2)
    table = encoder.backbone.model.get_input_embeddings().weight[: encoder.tokenizer.vocabulary]
    np.testing.assert_allclose(table.detach().norm(dim=1), width**0.5, rtol=1e-4)
    number = encoder.tokenizer.backend.token_to_id("w1")
    token = encoder.tokenizer.backend.decode([number])
    weight = token_weights(encoder.tokenizer, texts, 1e-2)[number]
    assert weight == pytest.approx(0.01 / (0.01 + 3 / 5))
    wanted = teacher.encode_documents([token])[0] @ vectors.principal_directions(width)[:, :-1] * weight * (0.9 * width) ** 0.5
    np.testing.assert_allclose(table[number, :-1].detach(), wanted, atol=1e-4)


def test_a_run_goes_on_where_its_teachers_vectors_were_moved_and_not_with_others(tmp_path):
    def teacher(name, seed):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / VECTORS, np.random.default_rng(seed).normal(size=(len(TEXTS), 32)).astype(np.float32))
        write_keys(tmp_path / name, TEXTS)

    def run(vectors, stop_at=None):
        def evaluate(encoder, done):
            if done == stop_at:
                raise KeyboardInterrupt
            return {}

        settings = {"objective": {"kind": "distillation", "vectors": str(tmp_path / vectors)}, "steps": 4, "save_every": 2}
        sources = {"sources": [{"name": "t", "path": "unused", "construction": "texts"}]}
        config = {**settings, "evaluate_every": 1, "data": sources, "batch": {"size": 4, "negatives": 0}}
        examples = {"t": [Example(Query("", text), (Document("", text),), source="t") for text in TEXTS]}
        encoder = tiny_encoder(tmp_path / "model")
        return train(TrainConfig.model_validate(config), encoder, tmp_path / "out", examples=examples, evaluate=evaluate)

    teacher("here", 0)
    teacher("other", 1)
    with pytest.raises(KeyboardInterrupt):
        run("here", stop_at=3)
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ValueError, match=r"belongs to another run: config\.objective\.vectors"):
        run("other")
    assert run("there").resumed_from == 2


def test_teacher_vectors_in_another_precision_read_as_float32(tmp_path):
    from openembed.bulk import BulkConfig, encode_file

    (tmp_path / "texts.txt").write_text("red fish\nblue bird\ngreen tree\n")
    found = {}
    for precision in ("float32", "int8"):
        encode_file(BagOfWords(), tmp_path / "texts.txt", tmp_path / precision, BulkConfig(precision=precision))
        write_keys(tmp_path / precision, ["red fish", "blue bird", "green tree"])
        found[precision] = TeacherVectors(tmp_path / precision)
    assert found["int8"].width == found["float32"].width == 32
    looked_up = [found[precision].lookup(["green tree", "red fish"]) for precision in found]
    assert looked_up[1].dtype == np.float32
    np.testing.assert_allclose(*looked_up, atol=3e-3)
    np.testing.assert_allclose(*(found[p].principal_directions(1) for p in found), atol=2e-2)
