"""The comparison of systems: every variant is a whole recipe, and the smallest of each kind run from end to end."""

from pathlib import Path

import pytest

from openembed.recipe.sweep import Sweep, load_sweep, run_sweep
from openembed.recipe.sweep_results import sweep_report

SYSTEMS = Path(__file__).parents[2] / "benchmarks" / "systems.toml"
OTHERS = tuple(SYSTEMS.with_name(f"systems_{name}.toml") for name in ("shared", "minilm"))


@pytest.mark.parametrize("path", [SYSTEMS, *OTHERS], ids=lambda path: path.stem)
def test_every_variant_is_whole(path):
    sweep = load_sweep(path)
    assert {run.variant for run in sweep.runs} == set(sweep.config.variant)
    for run in sweep.runs:
        heads = {"bm25", "untrained", "openembed-nano", *run.recipe.stage}
        assert run.recipe.stage[run.evaluate].models[0] in heads


@pytest.mark.timeout(600)
def test_a_variant_of_each_kind_runs(tmp_path):
    whole = load_sweep(SYSTEMS, smoke=True)
    chosen = ("bm25", "dense", "vdr", "crisp-4x8")
    sweep = Sweep(whole.config, whole.recipe, tuple(run for run in whole.runs if run.variant in chosen))
    run_sweep(sweep, tmp_path, base=SYSTEMS.parent, device="cpu")
    report = sweep_report(sweep, tmp_path, SYSTEMS.parent)
    assert set(report.variants) == set(chosen)
    assert all(0 <= found.scores["overall"].mean <= 1 for found in report.variants.values())
