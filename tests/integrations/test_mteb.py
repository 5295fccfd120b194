"""openembed as a model that mteb loads and runs, on a small local task of mteb's own classes."""

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from openembed.evaluation.mteb import load_task, run_mteb  # noqa: E402
from openembed.integrations.mteb import OpenEmbedModel, model, model_meta  # noqa: E402


def test_it_is_an_encoder_by_mtebs_protocol():
    from mteb.models import EncoderProtocol

    opened = model("openembed-nano")
    assert isinstance(opened, EncoderProtocol)
    meta = opened.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.revision) == ("openembed/openembed-nano", 256, opened.encoder.fingerprint[:40])
    assert meta.n_parameters > 1e6


def test_mteb_evaluates_it_as_our_own_command_does(shared_dir, tmp_path):
    opened = model("openembed-nano")
    task = load_task("STSBenchmark", shared_dir / "data" / "stsb" / "en")
    (result,) = mteb.evaluate(opened, task, cache=None, show_progress_bar=False, co2_tracker=False).task_results
    (ours,) = run_mteb(opened.encoder, "openembed-nano", ["STSBenchmark"], shared_dir / "data" / "stsb" / "en")
    (score,) = result.scores["test"]
    assert score["main_score"] == pytest.approx(ours.value, abs=1e-6)
    assert 0.78 < score["main_score"] < 0.80


def test_mteb_loads_it_from_its_meta_and_cuts_it(make_encoder, tmp_path):
    make_encoder().save(tmp_path / "model")
    meta = model_meta(str(tmp_path / "model"), instruction="Find")
    loaded = meta.load_model()
    assert isinstance(loaded, OpenEmbedModel)
    assert loaded.mteb_model_meta.revision == make_encoder().fingerprint[:40]
    task = mteb.get_task("SciFact").metadata
    batches = [{"text": ["one text", "two"]}]
    given = loaded.encode(
        batches, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=mteb.types.PromptType.query
    )
    np.testing.assert_array_equal(given, make_encoder().encode_queries(["one text", "two"], instruction="Find"))
    cut = model(str(tmp_path / "model"), embed_dim=16)
    assert cut.mteb_model_meta.embed_dim == 16
    assert cut.encode(batches, task_metadata=task, hf_split="test", hf_subset="default").shape == (2, 16)
