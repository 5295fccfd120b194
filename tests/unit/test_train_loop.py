import json
import math

import pytest
import torch
from tiny_training import examples, tiny_encoder, train_config, two_sources

from openembed.objectives.contrastive import HISTOGRAM_BINS
from openembed.train.loop import TrainConfig, train
from openembed.train.optimizer import OptimizerConfig


def metrics(folder):
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 4}}, {"compute": {"precision": "bf16", "chunk_tokens": 80}}])
def test_learns_and_records(tmp_path, changes):
    encoder = tiny_encoder(tmp_path / "tokenizer", dropout=0.0)
    config = train_config(steps=40, objective={"temperature": 0.1}, **changes)
    data = two_sources()
    seen = []

    def evaluate(model, step):
        assert not model.training
        seen.append(step)
        return {"score": 1 / step}

    result = train(config, encoder, tmp_path / "out", examples=data, evaluate=evaluate)
    lines = metrics(tmp_path)
    assert seen == [40]
    assert result.evaluation == lines[-1]["evaluation"] == {"score": 1 / 40}
    assert [line["step"] for line in lines] == list(range(1, 41))
    first, last = ([line["loss"] for line in part] for part in (lines[:8], lines[-8:]))
    assert sum(last) < 0.6 * sum(first)
    for line in lines:
        assert set(line["loss_by_source"]) <= set(data)
        assert sum(line["rows_by_source"].values()) == 6
        assert 0 < line["tokens"] <= line["padded_tokens"]
        assert line["seconds"] > 0
        assert math.isfinite(line["grad_norm"])
        assert all(len(part["histogram"]) == HISTOGRAM_BINS for part in line["similarity"].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_half_precision_weights_are_trained_in_full(tmp_path, precision, lora):
    encoder = tiny_encoder(tmp_path / "tokenizer").to(torch.bfloat16)
    kinds = set()

    def evaluate(model, _step):
        kinds.update(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
        return {}

    config = train_config(lora=lora, compute={"precision": precision, "chunk_tokens": 60})
    train(config, encoder, tmp_path / "out", examples=two_sources(), evaluate=evaluate)
    assert kinds == {torch.float32}
    assert len(metrics(tmp_path)) == 8


def test_same_metrics_whatever_the_micro_batches(tmp_path):
    losses = []
    for number, compute in enumerate([{"chunk_tokens": 20}, {"chunk_tokens": 5000, "live_chunks": "all"}]):
        encoder = tiny_encoder(tmp_path / "tokenizer", dropout=0.0)
        train(train_config(compute=compute), encoder, tmp_path / str(number) / "out", examples=two_sources())
        losses.append([line["loss"] for line in metrics(tmp_path / str(number))])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)


def test_lora_freezes_the_backbone_and_trains_the_head(tmp_path):
    encoder = tiny_encoder(tmp_path / "tokenizer")
    before = {name: parameter.clone() for name, parameter in encoder.named_parameters()}
    train(train_config(lora={"rank": 4}), encoder, tmp_path / "out", examples=two_sources())
    after = dict(encoder.named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("head.")} <= changed
    backbone = {name for name in changed if name.startswith("backbone.")}
    assert backbone == {name for name in before if "_proj" in name and name.startswith("backbone.")}


def test_accumulated_batches_do_not_see_one_another(tmp_path):
    encoder = tiny_encoder(tmp_path / "tokenizer", dropout=0.0)
    config = train_config(steps=1, batch={"size": 3, "negatives": 1, "accumulation": 2})
    train(config, encoder, tmp_path / "out", examples={"first": examples("first", 12), "second": two_sources()["second"]})
    [line] = metrics(tmp_path)
    assert sum(line["rows_by_source"].values()) == 6
    assert line["similarity"]["positive"]["count"] == 6
    assert line["similarity"]["in_batch"]["count"] <= 2 * 3 * 5


def test_not_finite_loss_stops_with_the_weights_kept(tmp_path):
    encoder = tiny_encoder(tmp_path / "tokenizer")
    with torch.no_grad():
        next(encoder.head.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"step 1: loss nan .* weights were not changed"):
        train(train_config(), encoder, tmp_path / "out", examples=two_sources())
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_schedule():
    config = OptimizerConfig(warmup=4)
    assert [config.rate(step, 8) for step in range(9)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert OptimizerConfig(warmup=0.5).rate(1, 8) == 0.5
    assert OptimizerConfig(warmup=0).rate(0, 2) == 1.0


def test_parameter_groups(tmp_path):
    encoder = tiny_encoder(tmp_path / "tokenizer")
    config = OptimizerConfig(lr=1e-3, head_lr_factor=5, embedding_lr_factor=0.5, weight_decay=0.1)
    groups = {(g["lr"], g["weight_decay"]): g["params"] for g in config.build(encoder).param_groups}
    sizes = {key: sum(p.numel() for p in params) for key, params in groups.items()}
    backbone, head = list(encoder.backbone.parameters()), list(encoder.head.parameters())
    table = encoder.backbone.model.get_input_embeddings().weight
    expected = {
        (1e-3, 0.1): sum(p.numel() for p in backbone if p.ndim > 1) - table.numel(),
        (1e-3, 0.0): sum(p.numel() for p in backbone if p.ndim == 1),
        (5e-4, 0.1): table.numel(),
        (5e-3, 0.1): sum(p.numel() for p in head if p.ndim > 1),
        (5e-3, 0.0): sum(p.numel() for p in head if p.ndim == 1),
    }
    assert sizes == expected
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        config.build(encoder)


def test_configuration_names_the_wrong_key():
    values = train_config().model_dump()
    with pytest.raises(ValueError, match="repeated: first"):
        TrainConfig.model_validate({**values, "data": {"sources": [{"name": "first", "path": "x"}] * 2}})
    with pytest.raises(ValueError, match="either path or hub"):
        TrainConfig.model_validate({**values, "data": {"sources": [{"name": "first"}]}})


def test_a_trained_model_says_which_dimensions_it_was_trained_at(tmp_path):
    from openembed import load

    encoder = tiny_encoder(tmp_path / "tokenizer")
    train(train_config(steps=1, objective={"matryoshka": (8, 32)}), encoder, tmp_path / "out", examples=two_sources())
    trained = load(tmp_path / "out" / "model")
    assert trained.config.matryoshka == (8, 32)
    train(train_config(steps=1), trained, tmp_path / "again", examples=two_sources())
    assert load(tmp_path / "again" / "model").config.matryoshka == ()
