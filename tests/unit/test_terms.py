"""The heaviest terms of a text, from Python and from the command line."""

import json

import pytest
from tiny_training import tiny_encoder, tiny_sparse_encoder
from typer.testing import CliRunner

from openembed.cli import app
from openembed.terms import top_terms


def test_terms_are_the_heaviest_weights(tmp_path):
    model = tiny_sparse_encoder(tmp_path)
    found = top_terms(model, "w1 w2 w3", 5)
    weights = model.encode_documents(["w1 w2 w3"]).toarray()[0]
    assert found.count == (weights > 0).sum()
    assert [term.weight for term in found.top] == pytest.approx(sorted(weights, reverse=True)[:5])
    assert sum(term.share for term in top_terms(model, "w1 w2 w3", 99).top) == pytest.approx(1)


def test_a_looked_up_query_has_its_own_terms_alone(tmp_path):
    model = tiny_sparse_encoder(tmp_path, query_head={"kind": "idf_lookup"})
    found = top_terms(model, "w1 w2 w1", query=True)
    assert [(term.token, term.weight, term.own) for term in found.top] == [("w1", 1.0, True), ("w2", 1.0, True)]
    assert top_terms(model, "", query=True).top == ()


def test_dense_models_have_none(tmp_path):
    with pytest.raises(ValueError, match="this model's representations are dense"):
        top_terms(tiny_encoder(tmp_path), "w1")
    with pytest.raises(ValueError, match="k must be 1 or more"):
        top_terms(tiny_sparse_encoder(tmp_path), "w1", 0)


def test_the_command_prints_a_table_or_json(tmp_path):
    tiny_sparse_encoder(tmp_path, query_head={"kind": "idf_lookup"}).save(tmp_path / "model")
    shown = CliRunner().invoke(app, ["terms", str(tmp_path / "model"), "w1 w2", "--query"])
    assert "in the text" in shown.stdout
    assert "2 terms" in shown.stdout
    read = json.loads(CliRunner().invoke(app, ["terms", str(tmp_path / "model"), "w1 w2", "-k", "3", "--json"]).stdout)
    assert len(read["top"]) == 3
    assert read["side"] == "document"
