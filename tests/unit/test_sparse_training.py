"""Training a vocabulary head: objectives end to end, exact resume of what penalties remember, metrics and report."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_training import tiny_sparse_encoder, train_config, two_sources

from openembed.checkpoints import load
from openembed.report.sections import training_figures
from openembed.train import checkpoint
from openembed.train.loop import train

DF_FLOPS = {"kind": "df_flops", "weight": 0.05, "refresh": 2, "side": "both", "alpha": 0.3}


def objective(**fields):
    return {"kind": "contrastive", "similarity": "dot", "temperature": 1.0, **fields}


class Stopped(Exception):
    pass


def run(folder, stop_after=None, objective=None, head=None, query_head=None, **changes):
    def evaluate(encoder, step):
        if stop_after is not None and step > stop_after:
            raise Stopped
        return {"step": step}

    encoder = tiny_sparse_encoder(folder / "tokenizer", query_head, **(head or {}))
    config = train_config(evaluate_every=1, objective=objective, **changes)
    return train(config, encoder, folder / "out", examples=two_sources(), evaluate=evaluate)


def weights(folder):
    tensors = {}
    for path in sorted((folder / "out" / "model").glob("*.safetensors")):
        tensors |= load_file(path)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def rows(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_after", [4, 7])
def test_document_frequencies_are_resumed_exactly(tmp_path, stop_after):
    settings = {"objective": objective(regularizers=[DF_FLOPS]), "batch": {"size": 4, "negatives": 1, "accumulation": 2}}
    run(tmp_path / "whole", **settings)
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop_after=stop_after, **settings)
    assert run(tmp_path / "cut", **settings).resumed_from == stop_after // 3 * 3
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert [row["parts"] for row in rows(tmp_path / "cut")] == [row["parts"] for row in rows(tmp_path / "whole")]


def test_what_is_remembered_is_part_of_the_checkpoint(tmp_path):
    settings = {"objective": objective(regularizers=[DF_FLOPS])}
    with pytest.raises(Stopped):
        run(tmp_path, stop_after=4, **settings)
    found = checkpoint.latest(tmp_path / "out" / "checkpoint")
    assert set(checkpoint.remembered(found)) == {
        f"df_flops_{side}/{name}" for side in ("query", "document") for name in ("counts", "shares", "progress")
    }
    (found.path / checkpoint.OBJECTIVE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path / "out" / "checkpoint")


def test_a_table_may_move_but_not_change(tmp_path):
    for name, values in (("a", np.ones(60)), ("b", np.ones(60)), ("c", np.full(60, 2.0))):
        np.save(tmp_path / f"{name}.npy", values)

    def flops(name):
        return {"objective": objective(regularizers=[{"kind": "flops", "weight": 0.1, "idf": str(tmp_path / f"{name}.npy")}])}

    with pytest.raises(Stopped):
        run(tmp_path, stop_after=4, **flops("a"))
    with pytest.raises(ValueError, match="belongs to another run"):
        run(tmp_path, **flops("c"))
    assert run(tmp_path, **flops("b")).resumed_from == 3


def test_gradient_caching_does_not_change_a_penalised_step(tmp_path):
    settings = {"objective": objective(regularizers=[DF_FLOPS]), "steps": 4}
    run(tmp_path / "plain", compute={"chunk_tokens": 40, "live_chunks": "all"}, **settings)
    run(tmp_path / "cached", compute={"chunk_tokens": 40, "live_chunks": 0}, **settings)
    assert weights(tmp_path / "plain") == weights(tmp_path / "cached")


def test_metrics_and_report_show_terms_and_sparsity(tmp_path):
    penalties = [{"kind": "flops", "weight": 0.1, "steps": 4}, {"kind": "anti_zero", "weight": 0.01}]
    run(tmp_path, objective=objective(regularizers=penalties))
    found = rows(tmp_path)
    assert set(found[0]["parts"]) == {"info_nce", "flops_document", "anti_zero_query", "anti_zero_document"}
    assert found[0]["parts"]["flops_document"] == 0
    assert 0 < found[-1]["sparsity"]["document_terms"] <= 80
    titles = {figure.title for name in ("penalties", "sparsity") for figure in training_figures([("train", found)])[name]}
    assert {"flops document", "Terms a query", "Terms a document", "Empty documents", "Products a pair"} <= titles


def test_a_strong_penalty_makes_documents_shorter(tmp_path):
    settings = {"steps": 25, "optimizer": {"lr": 3e-3, "warmup": 2}}
    run(tmp_path / "free", objective=objective(), **settings)
    run(tmp_path / "flops", objective=objective(regularizers=[{"kind": "flops", "weight": 3.0}]), **settings)
    free, priced = (np.mean([row["sparsity"]["document_terms"] for row in rows(tmp_path / n)[-5:]]) for n in ("free", "flops"))
    assert priced < 0.8 * free


def test_queries_by_lookup_train_documents_alone(tmp_path):
    result = run(tmp_path, objective=objective(), query_head={"kind": "idf_lookup"})
    model = load(str(result.model))
    assert (model.query_head.table()[5:] == 1).float().mean() > 0.5
    assert model.encode_queries(["w1 w2"]).nnz == 2


@pytest.mark.parametrize("gated", ["query", "both"])
def test_the_semi_parametric_objective_learns(tmp_path, gated):
    head = {"activation": "elu1p", "transform": "norm", "bias": False, "offset": None, "bags": True}
    head["document"] = head["query"] = {"top_k": 8, "keep_own": True}
    settings = {"kind": "semi_parametric", "top_k": 8, "gated": gated}
    run(tmp_path, objective=settings, head=head, steps=30, optimizer={"lr": 1e-3, "warmup": 2})
    found = rows(tmp_path)
    assert np.mean([row["loss"] for row in found[-5:]]) < np.mean([row["loss"] for row in found[:5]])
