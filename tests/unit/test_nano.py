"""openembed-nano as it ships: found by name, small, opened by sentence-transformers too, and as good as its card says."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import openembed
from openembed.cli import app
from openembed.evaluation.systems import EncoderSystem
from openembed.evaluation.tasks import read_task
from openembed.packaged import NANO, packaged

TEXTS = ["What causes anemia?", "Anaemia is caused by a lack of iron.", "A cat sat on the mat.", "", "x " * 700]


@pytest.fixture(scope="module")
def nano():
    return openembed.load(NANO, device="cpu")


def test_is_found_by_name_and_small(nano):
    assert sum(path.stat().st_size for path in packaged(NANO).rglob("*")) < 25_000_000
    assert nano.width == 256
    assert nano.encode_documents(TEXTS).shape == (5, 256)


def test_sentence_transformers_opens_it_with_the_same_vectors(nano):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(packaged(NANO)), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), nano.encode_documents(TEXTS), atol=1e-5)


def test_its_module_is_the_one_that_we_write_today(nano, tmp_path):
    nano.save(tmp_path / "again")
    assert (tmp_path / "again/openembed_module.py").read_bytes() == (packaged(NANO) / "openembed_module.py").read_bytes()
    settings = [json.loads((folder / "openembed.json").read_text()) for folder in (tmp_path / "again", packaged(NANO))]
    assert settings[0] == settings[1]


def test_it_is_the_default_of_an_english_index(tmp_path, caplog):
    (tmp_path / "corpus.txt").write_text("The bank lends money.\nA tabby sleeps all day.\nRain falls in spring.\n")

    def run(*arguments):
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert run("index", tmp_path / "corpus.txt", "-o", tmp_path / "index")["model"] == NANO
    found = run("search", tmp_path / "index", "drowsy cats", "--mode", "dense")  # no word in common
    assert found["hits"][0]["id"] == "2"
    assert run("index", tmp_path / "corpus.txt", "-o", tmp_path / "polish", "--language", "pl")["model"] is None
    assert "reads English alone" in caplog.text


def test_packaged_sets_score_as_in_the_demo(nano):
    task = read_task(packaged("package:demo/data/eval/captions"), "captions", {})
    assert EncoderSystem(nano, "nano").evaluate(task).value == pytest.approx(0.8775, abs=0.003)


@pytest.mark.parametrize(
    ("folder", "value", "potion"), [("stsb/en", 0.7920, 0.7541), ("sts16", 0.7908, 0.7626), ("banking77", 0.7637, 0.7264)]
)
def test_scores_of_the_card(nano, shared_dir, folder, value, potion):
    found = EncoderSystem(nano, "nano").evaluate(read_task(shared_dir / "data" / folder, folder, {})).value
    assert found == pytest.approx(value, abs=0.002)
    assert found > potion, "what potion-base-8M is published with"
