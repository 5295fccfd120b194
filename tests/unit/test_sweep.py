"""Sweeps: what variants expand to, what they share, that a stopped one goes on, and what the report says."""

import json

import numpy as np
import pytest

import openembed.recipe.run as recipe_run
from openembed.evaluation.over_seeds import SeedScores, mean_scores, verdict
from openembed.evaluation.statistics import Interval
from openembed.recipe.config import load_recipe
from openembed.recipe.run import run_recipe
from openembed.recipe.sweep import load_sweep, run_sweep
from openembed.recipe.sweep_results import sweep_report
from openembed.report.sweep import render_markdown, render_sweep

RECIPE = """
title = "Small sweep"
[encoder]
tokenizer_path = "package:demo/tokenizer"
max_length = 32
head = { kind = "mean" }
[encoder.backbone.architecture]
model_type = "mistral"
vocab_size = 8192
hidden_size = 8
intermediate_size = 8
num_hidden_layers = 1
num_attention_heads = 1
num_key_value_heads = 1
[source.a]
path = "package:demo/toy/pairs.jsonl.gz"
count = 8
[stage.mine]
do = "mine"
sources = ["a"]
keep = 1
[stage.one]
do = "train"
steps = 2
batch = { size = 4, negatives = 1 }
data.sources = ["mine/a"]
[stage.two]
do = "train"
start = "one"
steps = 2
batch = { size = 4, negatives = 1 }
data.sources = ["mine/a"]
[stage.evaluate]
do = "evaluate"
models = ["untrained", "two", "bm25"]
[[stage.evaluate.tasks]]
name = "toy"
path = "package:demo/toy/retrieval"
[stage.index]
do = "index"
corpus = "package:demo/toy/retrieval"
[sweep]
seeds = [1, 2]
[sweep.measure]
retrieval = ["toy"]
[sweep.variant.first]
title = "after stage one"
model = "one"
[sweep.variant.second]
title = "after both"
model = "two"
[sweep.variant.hot]
title = "stage two at a high rate"
model = "two"
settings = ["stage.two.optimizer.lr=0.1"]
[sweep.variant.turned]
title = "the stages <reversed>"
model = "one"
stages = ["mine", "two", "one"]
settings = ['stage.two.start="untrained"', 'stage.one.start="two"']
[[sweep.group]]
title = "All"
variants = ["first", "second", "hot", "turned"]
[[sweep.claim]]
text = "Two beat one"
better = "second"
worse = "first"
paper = "2 > 1"
"""

SPARSE_VARIANT = """
[sweep.variant.words]
title = "words alone"
model = "bm25"
[[sweep.group]]
title = "Kinds"
variants = ["first", "words"]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def trained(monkeypatch):
    """Records the stages that are really run."""
    done, real = [], recipe_run.run_stage

    def run_stage(place, name):
        done.append(name)
        real(place, name)

    monkeypatch.setattr(recipe_run, "run_stage", run_stage)
    return done


def test_variants_expand_to_the_stages_they_need(recipe):
    sweep = load_sweep(recipe)
    assert [(run.seed, run.variant) for run in sweep.runs[:5]] == [
        (1, "first"),
        (1, "second"),
        (1, "hot"),
        (1, "turned"),
        (2, "first"),
    ]
    runs = {run.variant: run.recipe for run in sweep.runs if run.seed == 2}
    assert list(runs["first"].stage) == ["mine", "one", "evaluate"]
    assert list(runs["second"].stage) == ["mine", "one", "two", "evaluate"]
    assert list(runs["turned"].stage) == ["mine", "two", "one", "evaluate"]
    assert runs["hot"].stage["two"].optimizer.lr == 0.1
    assert runs["hot"].stage["evaluate"].models == ("two",)
    assert {recipe.seed for recipe in runs.values()} == {2}
    assert runs["first"].stage["one"] == runs["hot"].stage["one"]
    assert runs["first"].stage["one"].seed != sweep.runs[0].recipe.stage["one"].seed


def test_a_recipe_with_a_sweep_is_a_recipe_still(recipe, tmp_path):
    loaded = load_recipe(recipe)
    copy = tmp_path / "copy.toml"
    copy.write_text(loaded.to_toml())
    assert load_recipe(copy).sweep == loaded.sweep
    assert list(loaded.stage) == ["mine", "one", "two", "evaluate", "index"]


def test_what_is_wrong_with_a_sweep_is_said(recipe):
    text = recipe.read_text()
    for old, new, told in (
        ('worse = "first"', 'worse = "last"', "claim 'Two beat one': no variant 'last'"),
        ('paper = "2 > 1"', 'metric = "speed"', "no metric 'speed'"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds must differ"),
        ("seeds = [1, 2]", 'seeds = [1]\nalso = ["recall@100"]', "also: no metric recall@100 is kept; choose from ndcg_at_1,"),
        ('model = "one"\nstages', 'model = "three"\nstages', "sweep.variant.turned: no stage three"),
        ("stage.two.optimizer.lr=0.1", "stage.two.optimizer.speed=0.1", "sweep.variant.hot: stage.two.train.optimizer.speed"),
        ("stage.two.optimizer.lr=0.1", "stage.two.steps.x=1", "sweep.variant.hot: --set stage.two.steps.x=1"),
        ("seeds = [1, 2]", 'seeds = [1]\nevaluate = "index"', "no evaluate stage of this name"),
    ):
        assert old in text
        recipe.write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"small\.toml") as error:
            load_sweep(recipe)
        assert told in str(error.value)
    with pytest.raises(ValueError, match=r"has no \[sweep\]"):
        load_sweep("demo")


def test_a_shared_stage_runs_once_and_shares_nothing_with_another_seed(recipe, tmp_path, monkeypatch):
    done = trained(monkeypatch)
    out = tmp_path / "out"
    run_sweep(load_sweep(recipe, seeds=[1]), out, device="cpu")
    # one: first, second and hot share it, turned has its own; two: second, hot, turned
    assert {name: done.count(name) for name in ("mine", "one", "two", "evaluate")} == {
        "mine": 1,
        "one": 2,
        "two": 3,
        "evaluate": 4,
    }
    shared = (out / "runs/first/seed-1/one").resolve()
    assert shared == (out / "runs/hot/seed-1/one").resolve() != (out / "runs/turned/seed-1/one").resolve()
    assert not list(out.glob("stages/*/checkpoint"))
    assert not list(out.glob("stages/**/run.trec"))

    moved = out.rename(tmp_path / "moved")
    done.clear()
    run_sweep(load_sweep(recipe, seeds=[1]), moved, device="cpu")
    assert done == []
    run_sweep(load_sweep(recipe, seeds=[1, 2]), moved, device="cpu")
    assert (done.count("mine"), done.count("evaluate")) == (1, 4)


def test_a_shared_run_gives_the_weights_of_a_plain_one(recipe, tmp_path):
    sweep = load_sweep(recipe, seeds=[1])
    run_sweep(sweep, tmp_path / "out", device="cpu")
    run_recipe(sweep.runs[2].recipe, tmp_path / "plain", device="cpu")
    weights = "two/model/model.safetensors"
    assert (tmp_path / "out/runs/hot/seed-1" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()


def test_a_killed_sweep_goes_on(recipe, tmp_path, monkeypatch):
    done, real = [], recipe_run.run_stage

    def killed(place, name):
        real(place, name)
        done.append(name)
        if len(done) == 5:  # the work is there, the note that it is finished is not
            raise KeyboardInterrupt

    monkeypatch.setattr(recipe_run, "run_stage", killed)
    sweep = load_sweep(recipe, seeds=[1])
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep, tmp_path / "out", device="cpu")
    assert done == ["mine", "one", "evaluate", "two", "evaluate"]
    report = sweep_report(sweep, tmp_path / "out", tmp_path)
    assert (report.runs, list(report.variants), report.claims) == ((1, 4), ["first"], [])

    run_sweep(sweep, tmp_path / "out", device="cpu")
    assert done[5:] == ["evaluate", "two", "evaluate", "two", "one", "evaluate"]
    whole = tmp_path / "whole"
    run_sweep(sweep, whole, device="cpu")
    claims = [sweep_report(sweep, folder, tmp_path).claims for folder in (tmp_path / "out", whole)]
    assert claims[0] == claims[1] != []


def test_smoke_and_real_sweeps_and_runs_do_not_mix(recipe, tmp_path):
    real, smoke = load_sweep(recipe, seeds=[1], variants=["first"]), load_sweep(recipe, variants=["first"], smoke=True)
    out = tmp_path / "out"
    run_sweep(smoke, out, device="cpu")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for run, told in (
        (lambda: run_sweep(real, out), "this is a sweep of small"),
        (lambda: run_recipe(load_recipe(recipe, smoke=True), out), "this is a smoke run of small"),
    ):
        with pytest.raises(ValueError, match=f"out: holds a smoke sweep of small, and {told}, which would replace it"):
            run()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    report = sweep_report(smoke, out, tmp_path)
    assert report.smoke
    assert "scores mean nothing" in render_markdown(report)
    assert "scores mean nothing" in render_sweep(report)


def test_sweeps_of_two_recipes_share_a_folder(recipe, tmp_path, monkeypatch):
    other = tmp_path / "larger.toml"
    other.write_text(recipe.read_text())
    run_sweep(load_sweep(recipe, seeds=[1], variants=["first"]), tmp_path / "out", device="cpu")
    done = trained(monkeypatch)
    run_sweep(load_sweep(other, seeds=[1], variants=["first"]), tmp_path / "out", device="cpu")
    assert done == []


def test_changed_settings_leave_old_scores_out(recipe, tmp_path):
    run_sweep(load_sweep(recipe, seeds=[1]), tmp_path / "out", device="cpu")
    changed = load_sweep(recipe, ["stage.one.steps=3"], seeds=[1])
    with pytest.raises(ValueError, match="no run of this sweep is finished"):
        sweep_report(changed, tmp_path / "out", tmp_path)


def test_page_and_tables_hold_every_variant_and_claim(recipe, tmp_path):
    sweep = load_sweep(recipe)
    run_sweep(sweep, tmp_path / "out", device="cpu")
    report = sweep_report(sweep, tmp_path / "out", tmp_path, "openembed sweep small")
    page, text = render_sweep(report), render_markdown(report)
    for title in ("after stage one", "after both", "stage two at a high rate"):
        assert page.count(title) >= 2, "in the chart and in the table"
        assert f"| {title} |" in text
    assert "the stages &lt;reversed&gt;" in page
    assert "<reversed>" not in page
    assert page.count('class="seed ') == 4 * 2 * 2, "a dot a variant, panel and seed"
    assert "http" not in page.replace("http://www.w3.org", "")
    told = json.loads(json.dumps(report.as_dict()))
    for name, variant in told["variants"].items():
        model = load_sweep(recipe).config.variant[name].model
        files = [tmp_path / f"out/runs/{name}/seed-{seed}/evaluate/{model}/toy/result.json" for seed in (1, 2)]
        values = [json.loads(file.read_text())["result"]["value"] for file in files]
        assert variant["scores"]["overall"]["seeds"] == pytest.approx(values)
    claim = report.claims[0]
    first, second = (report.variants[name].scores["overall"].seeds for name in ("first", "second"))
    assert claim.difference.seeds == pytest.approx(np.subtract(second, first))
    assert "2 &gt; 1" in page


def test_further_metrics_and_costs_are_shown(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("seeds = [1, 2]", 'seeds = [1, 2]\nalso = ["recall_at_100"]'))
    sweep = load_sweep(recipe, variants=["first", "second", "first"])
    assert [run.variant for run in sweep.runs] == ["first", "second"] * 2, "a variant given twice runs once"
    run_sweep(sweep, tmp_path / "out", device="cpu")
    report = sweep_report(sweep, tmp_path / "out", tmp_path)
    assert report.columns == ["toy", "overall", "recall@100"]
    for seed in (1, 2):
        result = json.loads((tmp_path / f"out/runs/first/seed-{seed}/evaluate/one/toy/result.json").read_text())["result"]
        assert report.variants["first"].scores["recall@100"].seeds[seed - 1] == pytest.approx(
            result["metrics"]["recall_at_100"]
        )
    cost = report.variants["first"].cost
    assert (cost.document_bytes, cost.told) == (4 * 8, "8 dimensions")
    assert cost.query_ms > 0
    page, text = render_sweep(report), render_markdown(report)
    assert "bytes a document" in page
    assert "| 8 dimensions | 32 |" in text
    assert "What quality costs" not in page, "all cost the same"
    with pytest.raises(ValueError, match="no variant third; variants: first, second, hot, turned"):
        load_sweep(recipe, variants=["third"])


def test_variants_of_other_costs_are_drawn(recipe, tmp_path):
    recipe.write_text(recipe.read_text() + SPARSE_VARIANT)
    sweep = load_sweep(recipe, seeds=[1], variants=["first", "words"])
    run_sweep(sweep, tmp_path / "out", device="cpu")
    page = render_sweep(sweep_report(sweep, tmp_path / "out", tmp_path))
    assert page.count("What quality costs") == 1
    assert page.count("(logarithmic)") == 2, "over bytes and over milliseconds"


def scores(values, spread=0.0, items=2000):
    """Planted: one value a seed, and resamples that all seeds share."""
    noise = spread * np.random.default_rng(0).standard_normal(items)
    values = np.array(values)
    return SeedScores(tuple(range(len(values))), values, values[:, None] + noise[None, :])


def test_verdicts_on_planted_numbers():
    worse = scores([0.50, 0.52, 0.48])
    assert verdict((scores([0.60, 0.62, 0.58]) - worse).interval()) == "holds"
    assert verdict((worse - scores([0.60, 0.62, 0.58])).interval()) == "does not hold"
    assert verdict((scores([0.60, 0.45, 0.55]) - worse).interval()) == "cannot be told"
    assert verdict((worse - worse).interval()) == "cannot be told"
    assert verdict((scores([0.9]) - scores([0.1])).interval()) == "cannot be told"
    # sure over seeds, but another set of test items might say otherwise
    assert verdict((scores([0.60, 0.62, 0.58], spread=0.1) - worse).interval()) == "cannot be told"
    assert verdict(Interval(0.0, 0.1)) == "cannot be told"


def test_intervals_of_a_mean_over_seeds():
    found = scores([0.1, 0.2, 0.3])
    half = 4.302653 * 0.1 / np.sqrt(3)  # Student's quantile at 2 degrees of freedom
    assert (found.seed_interval().low, found.seed_interval().high) == pytest.approx((0.2 - half, 0.2 + half))
    assert found.interval() == found.seed_interval(), "items without spread add nothing"
    items_alone = scores([0.2, 0.2, 0.2], spread=0.01).interval()
    assert items_alone.high - items_alone.low == pytest.approx(2 * 1.96 * 0.01, rel=0.1)
    assert scores([0.1, 0.2, 0.3], spread=0.05).interval() == found.seed_interval(), "never narrower for the items"
    assert found.interval().high < scores([0.1, 0.2, 0.3], spread=0.3).interval().high


def test_differences_pair_seeds_and_means_need_the_same_ones():
    one, other = scores([0.1, 0.2, 0.3]), scores([0.1, 0.1])
    assert (one - other).values_S == pytest.approx([0.0, 0.1])
    assert mean_scores([one, scores([0.3, 0.2, 0.1])]).values_S == pytest.approx([0.2, 0.2, 0.2])
    with pytest.raises(ValueError, match="different seeds"):
        mean_scores([one, other])
