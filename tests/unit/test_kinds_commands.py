"""Every command with real models of the other kinds: it does the right thing, or refuses with one line."""

import json

import numpy as np
import pytest
from tiny_training import sentence, tiny_sparse_encoder
from token_models import token_encoder
from typer.testing import CliRunner

import openembed
from openembed.cli import app
from openembed.encoded import kind_of
from openembed.index.store import Store, describe_model
from openembed.integrations.export import export
from openembed.recipe.config import parse_recipe
from openembed.recipe.files import RecipeFile
from openembed.records import Document
from openembed.vector_files import open_encoded
from openembed.verify import verify
from tests.evaluation_fakes import write_rows

KINDS = ["sparse", "tokens"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def models(folder):
    """A folder a kind, saved, so that commands load them as users do."""
    made = {
        "sparse": tiny_sparse_encoder(folder / "words", query_head={"kind": "idf_lookup"}),
        "tokens": token_encoder(folder / "pieces"),
    }
    for kind, encoder in made.items():
        encoder.save(folder / kind)
    return {kind: str(folder / kind) for kind in made}


@pytest.fixture(scope="module")
def data(folder):
    """A BEIR folder; a document's own words are its query."""
    documents = [{"_id": f"d{n}", "title": "", "text": sentence(*range(4 * n, 4 * n + 6))} for n in range(12)]
    queries = [{"_id": f"q{n}", "text": sentence(4 * n, 4 * n + 1, 4 * n + 2)} for n in range(6)]
    write_rows(folder / "set" / "corpus.jsonl", documents)
    write_rows(folder / "set" / "queries.jsonl", queries)
    (folder / "set" / "qrels").mkdir()
    lines = "".join(f"q{n}\td{n}\t1\n" for n in range(6))
    for split in ("test", "train"):
        (folder / "set" / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder / "set"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(done):
    """The line a refused command ends in, as it is written."""
    assert done.exit_code != 0
    return " ".join(str(done.output).replace("│", " ").split())


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_with_a_cache(kind, models, data, tmp_path):
    command = ("evaluate", models[kind], "--data", data, "--json", "--cache", tmp_path / "cache", "--out", tmp_path / "out")
    (result,) = json.loads(run(*command).stdout)["results"]
    assert result["costs"]["kind"] == kind
    assert result["costs"]["document_entries"] > 0
    (again,) = json.loads(run(*command[:-1], tmp_path / "again").stdout)["results"]
    assert again["value"] == result["value"]
    assert again["costs"]["encode_query_ms"] is None, "everything was cached"
    assert again["costs"]["document_bytes"] == result["costs"]["document_bytes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["query", "document"])
def test_encode_gives_what_the_model_gives(kind, side, models, data, tmp_path):
    done = run("encode", models[kind], data / "corpus.jsonl", "--out", tmp_path / "out", "--kind", side, "--chunk", 5)
    assert done.exit_code == 0, done.output
    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    encoder, found = openembed.load(models[kind]), open_encoded(tmp_path / "out")
    expected = (encoder.encode_queries if side == "query" else encoder.encode_documents)(texts)
    assert kind_of(found) == kind
    if kind == "sparse":
        np.testing.assert_allclose(found.toarray(), expected.toarray(), atol=1e-5)
        assert found.nnz == json.loads((tmp_path / "out" / "meta.json").read_text())["entries"]
    else:
        np.testing.assert_array_equal(found.offsets_N1, expected.offsets_N1)
        np.testing.assert_allclose(found.values_TD, expected.values_TD, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_mine(kind, models, data, tmp_path):
    options = ("--keep", 2, "--pool", 6, "--filter", "none", "--out", tmp_path / "out", "--json")
    done = run("mine", data, "--teacher", models[kind], *options)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out" / "mined.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["mined"]["teacher"] == openembed.load(models[kind]).fingerprint for row in rows)
    for row in rows:
        assert row["negatives"] or kind == "sparse"
        assert {n["id"] for n in row["negatives"]}.isdisjoint(p["id"] for p in row["positives"])


@pytest.mark.parametrize("kind", KINDS)
def test_verify(kind, models):
    checks = {check.name: check for check in verify(openembed.load(models[kind]))}
    assert checks["order"].passed
    assert checks["packing"].passed
    assert checks["dtype drift"].passed is not None


def test_index_and_search_with_a_sparse_model(models, data, tmp_path):
    assert run("index", data, "--out", tmp_path / "store", "--model", models["sparse"]).exit_code == 0
    found = json.loads(run("search", tmp_path / "store", sentence(4, 5, 6), "--mode", "sparse", "--json").stdout)
    assert found["hits"]


def test_sparse_vectors_are_not_exported_to_postgresql(models, tmp_path):
    encoder = openembed.load(models["sparse"])
    Store.create(tmp_path / "store", model=describe_model(models["sparse"], encoder)).add([Document("a", "b")], encoder)
    with pytest.raises(ValueError, match="sparse vectors go to Qdrant"):
        export(Store(tmp_path / "store"), "postgresql://nobody@nowhere/db#t")


def test_a_task_watched_in_training_must_suit_the_model(models, folder):
    from openembed.recipe.stages import Workplace, run_stage

    write_rows(folder / "sts" / "test.jsonl", [{"sentence1": "w1", "sentence2": "w2", "score": s} for s in (0, 1, 2)])
    write_rows(folder / "rows.jsonl", [{"query": sentence(n), "positive": sentence(n, n + 1)} for n in range(4)])
    stage = {
        "do": "train",
        "start": models["tokens"],
        "steps": 1,
        "objective": {"kind": "contrastive", "similarity": "mean_maxsim"},
        "data": {"sources": [{"name": "rows", "path": "rows.jsonl"}]},
        "watch": [{"name": "pairs", "path": "sts"}],
    }
    recipe = parse_recipe(RecipeFile("r", folder / "r.toml", False, {"stage": {"fit": stage}}))
    with pytest.raises(ValueError, match=r"^watch: pairs: this model cannot be scored on it; it does retrieval, reranking$"):
        run_stage(Workplace(recipe, folder / "run", folder), "fit")


def test_texts_under_a_literal_prefix_are_encoded_as_the_side_asked_for(models):
    encoder = openembed.load(models["sparse"])
    texts = [sentence(1, 2, 3), sentence(4)]
    asked, given = encoder.encode(texts, as_queries=True), encoder.encode(texts)
    assert abs(asked - encoder.encode_queries(texts)).nnz == 0
    assert abs(given - encoder.encode_documents(texts)).nnz == 0
    assert asked.nnz < given.nnz
