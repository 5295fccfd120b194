"""openembed as a model that mteb loads and runs, on a small local task of mteb's own classes."""

import numpy as np
import pytest

mteb = pytest.importorskip("mteb")

from kind_fakes import WordTokens, WordWeights  # noqa: E402
from tiny_training import tiny_sparse_encoder  # noqa: E402

from openembed.evaluation.mteb import MtebEncoder, load_task, run_mteb  # noqa: E402
from openembed.evaluation.runner import run_tasks  # noqa: E402
from openembed.evaluation.systems import EncoderSystem  # noqa: E402
from openembed.evaluation.tasks import find_tasks  # noqa: E402
from openembed.integrations.mteb import OpenEmbedModel, OpenEmbedSearch, model, model_meta  # noqa: E402
from tests.evaluation_fakes import small_retrieval, write_rows  # noqa: E402


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


@pytest.mark.parametrize("encoder", [WordWeights, WordTokens])
@pytest.mark.parametrize("name", ["SciFact", "AskUbuntuDupQuestions"])
def test_models_of_other_kinds_search_for_mteb_as_for_us(encoder, name, tmp_path):
    if name == "SciFact":
        folder = small_retrieval(tmp_path / "scifact")
    else:
        folder = tmp_path / "askubuntudupquestions"
        items = [("red planet", ["the red planet mars"], ["cooking rice", "red rose"]), ("rice", ["cooking rice"], ["red"])]
        write_rows(folder / "test.jsonl", [{"query": q, "positive": p, "negative": n} for q, p, n in items])
    (theirs,) = run_mteb(encoder(), "words", [name], tmp_path)
    (ours,) = run_tasks(EncoderSystem(encoder(), "words"), find_tasks(folder))
    assert theirs.value == pytest.approx(ours.value, abs=1e-4)
    assert theirs.value > 0.5


def test_other_tasks_are_refused_before_anything_is_encoded(tmp_path):
    rows = [{"sentence1": "a b", "sentence2": "a c", "score": s} for s in (1.0, 2.5, 0)]
    write_rows(tmp_path / "stsb" / "test.jsonl", rows)
    encoder = WordTokens()
    with pytest.raises(ValueError, match="STSBenchmark: mteb compares dense vectors in sts, words gives others"):
        run_mteb(encoder, "words", ["STSBenchmark"], tmp_path / "stsb")
    assert encoder.encoded == []
    with pytest.raises(ValueError, match="EncoderProtocol takes dense vectors, this model gives a vector a token"):
        MtebEncoder(encoder, "words")


def test_a_saved_sparse_model_is_one_that_searches(tmp_path):
    from mteb.models import EncoderProtocol, SearchProtocol

    tiny_sparse_encoder(tmp_path / "words").save(tmp_path / "model")
    opened = model(str(tmp_path / "model"))
    assert isinstance(opened, SearchProtocol)
    assert not isinstance(opened, EncoderProtocol)
    assert opened.mteb_model_meta.model_type == ["sparse"]
    assert isinstance(model_meta(str(tmp_path / "model")).load_model(), OpenEmbedSearch)
