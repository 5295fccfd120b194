"""The ablations recipe: every variant runs, is on the page, and pairs share all that they do not vary."""

import json

import pytest
import typer
from markupsafe import escape
from typer.testing import CliRunner

from openembed.cli.sweep import register
from openembed.recipe.config import TrainStage
from openembed.recipe.run import stage_hashes
from openembed.recipe.sweep import load_sweep


@pytest.fixture(scope="module")
def app():
    app = typer.Typer()
    app.command("other")(lambda: None)  # a second command keeps the first one's name
    register(app)
    return app


def test_every_variant_smokes_and_is_on_the_page(app, tmp_path):
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["sweep", "ablations", "--smoke", "--out", str(out), "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    sweep = load_sweep("ablations")
    assert list(report["variants"]) == list(sweep.config.variant)
    assert report["runs"] == [len(sweep.config.variant)] * 2
    assert {claim["verdict"] for claim in report["claims"]} == {"cannot be told"}, "one seed tells nothing"
    page = (out / "report.html").read_text()
    for variant in sweep.config.variant.values():
        assert variant.title in page
    for claim in sweep.config.claim:
        assert escape(claim.text) in page

    again = CliRunner().invoke(app, ["sweep", "ablations", "--smoke", "--out", str(out), "--report-only"])
    assert again.exit_code == 0, again.output
    assert "cannot be told: 35 of 35" in again.output
    assert "smoke: scores mean nothing" in again.output


def test_a_seed_list_that_is_none_is_told(app):
    result = CliRunner().invoke(app, ["sweep", "ablations", "--seeds", "1;2"])
    assert str(result.exception).startswith("--seeds 1;2: expected whole numbers")


def test_variants_differ_in_what_they_vary_alone(tmp_path):
    runs = {run.variant: run for run in load_sweep("ablations", seeds=[1]).runs}
    hashes = {name: stage_hashes(run.place(tmp_path, tmp_path)) for name, run in runs.items()}
    two_stage = ("latent-bi-2", "kept", "labels", "percent", "margin", "absolute", "shifted", "naive", "random", "no-hard")
    assert len({hashes[name]["stage1"] for name in (*two_stage, "latent-bi-1")}) == 1
    assert len({hashes[name]["stage2"] for name in two_stage}) == len(two_stage)
    pooled = [f"{head}-{mask}-2" for head in ("eos", "mean", "latent", "self") for mask in ("bi", "causal")]
    assert len({hashes[name]["hard"] for name in pooled}) == 1
    assert len({hashes[name]["evaluate"] for name in ("latent-bi-2", "two-stage", "examples", "bm25")}) == 1
    assert len({hashes[name]["stage2"] for name in pooled}) == 8


def test_one_stage_and_two_see_as_many_texts():
    runs = {run.variant: run.recipe for run in load_sweep("ablations", seeds=[1]).runs}

    def texts(name):
        stages = [stage for stage in runs[name].stage.values() if isinstance(stage, TrainStage)]
        return sum(stage.steps * stage.batch.size * (1 + stage.batch.positives + stage.batch.negatives) for stage in stages)

    for name in ("single-on", "single-off", "reversed", "kept", "labels", "naive"):
        assert texts(name) == texts("latent-bi-2") - (0 if "single" not in name else 80)
