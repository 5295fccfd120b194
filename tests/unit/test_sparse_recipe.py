"""Stages that sparse recipes are made of: texts of sources, tables of idf, teachers of both kinds, and wrong references."""

import json

import numpy as np
import pytest

from openembed.checkpoints import load
from openembed.recipe.config import load_recipe
from openembed.recipe.run import run_recipe

RECIPE = """
title = "Sparse"
[encoder]
max_length = 32
tokenizer_path = "package:demo/tokenizer"
query_head = { kind = "idf_lookup" }
head = { kind = "splade", offset = 0.1 }
[encoder.backbone.architecture]
model_type = "mistral"
vocab_size = 8192
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
[source.rows]
path = "rows.jsonl"
[stage.idf]
do = "idf"
sources = ["rows"]
[stage.documents]
do = "encode"
sources = ["rows"]
model = "idf"
side = "document"
[stage.queries]
do = "encode"
sources = ["rows"]
model = "idf"
side = "query"
[stage.train]
do = "train"
start = "idf"
steps = 2
batch = { size = 4, negatives = 1 }
data.sources = ["rows"]
[stage.train.objective]
kind = "distillation"
embedding = "none"
score_weight = 1.0
similarity = "dot"
regularizers = [{ kind = "flops", weight = 0.1, idf = "idf" }]
ensemble = { teachers = [{ vectors = "documents", queries = "queries" }], candidates = "in_batch" }
"""


@pytest.fixture
def folder(tmp_path):
    rows = [{"query": f"what is {n}", "positive": f"this is {n}", "negative": f"that is {n + 1}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sparse.toml").write_text(RECIPE)
    return tmp_path


def run(folder, *settings):
    return {s.name: s.skipped for s in run_recipe(load_recipe(folder / "sparse.toml", settings), folder / "out", base=folder)}


def texts(folder, stage):
    return {json.loads(line)["text"] for line in (folder / "out" / stage / "texts.jsonl").read_text().splitlines()}


def test_a_table_and_two_sided_teachers_train_a_student(folder):
    run(folder)
    assert texts(folder, "queries") == {f"what is {n}" for n in range(6)}
    assert (
        texts(folder, "documents")
        == texts(folder, "idf")
        == {f"this is {n}" for n in range(6)} | {f"that is {n + 1}" for n in range(6)}
    )
    table, model = np.load(folder / "out" / "idf" / "idf.npy"), load(str(folder / "out" / "train" / "model"))
    weights = model.encode_queries(["this is 1"])
    assert np.allclose(weights.data, table[weights.indices])
    assert (table > 0).all()
    found = [json.loads(line) for line in (folder / "out" / "train" / "metrics.jsonl").read_text().splitlines()]
    assert set(found[-1]["parts"]) == {"kl", "flops_document"}
    assert all(run(folder).values()), "nothing is done twice"


def test_a_changed_table_trains_anew(folder):
    run(folder)
    rows = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text(rows + json.dumps({"query": "who", "positive": "is it"}) + "\n")
    assert run(folder) == {"idf": False, "documents": False, "queries": False, "train": False}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stage.train.objective.regularizers=[{ kind = 'flops', weight = 1.0, idf = 'queries' }]", "no earlier idf stage"),
        ("stage.train.objective.ensemble.teachers=[{ vectors = 'idf' }]", "no earlier encode stage"),
        ("stage.documents.texts='rows.jsonl'", "give either texts or sources"),
        ("stage.train.objective.score_weight=0.0", "score_weight is 0"),
        ("stage.train.objective.kind='semi_parametric'", "semi_parametric"),
    ],
)
def test_wrong_references_and_settings_are_named(folder, setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(folder / "sparse.toml", [setting])


def test_a_model_whose_queries_are_no_lookup_has_no_table(folder):
    text = (folder / "sparse.toml").read_text().replace('query_head = { kind = "idf_lookup" }\n', "")
    (folder / "sparse.toml").write_text(text)
    with pytest.raises(ValueError, match="its queries are no lookup"):
        run(folder)
