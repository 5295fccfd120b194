"""Every packaged recipe loads, checks, says what it should show, and runs end to end in its smoke version."""

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from openembed.cli.recipes import register
from openembed.data.library import library
from openembed.recipe.config import MineStage, TrainStage, load_recipe
from openembed.recipe.files import packaged_recipes
from openembed.recipe.run import run_recipe

NAMES = [recipe.name for recipe in packaged_recipes()]


@pytest.fixture(scope="module")
def app():
    import typer

    app = typer.Typer()
    register(app)
    return app


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_whole(name, app):
    recipe = load_recipe(name)
    assert recipe.title
    assert recipe.description
    assert recipe.expect, "a recipe says what it should show"
    result = CliRunner().invoke(app, ["recipe", "check", name, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["stages"] == list(recipe.stage)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_smokes_and_a_second_run_skips(name, tmp_path):
    recipe = load_recipe(name, smoke=True)
    run_recipe(recipe, tmp_path, device="cpu")
    for stage_name, stage in recipe.stage.items():
        if isinstance(stage, TrainStage):
            rows = [json.loads(line) for line in (tmp_path / stage_name / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
            assert (tmp_path / stage_name / "model" / "openembed.json").is_file()
            assert (tmp_path / stage_name / "recipe.toml").is_file()
    assert (tmp_path / "report.html").is_file()
    assert all(stage.skipped for stage in run_recipe(recipe, tmp_path, device="cpu"))


def test_nv_embed_hyper_parameters_are_the_papers():
    for name in ("nv_embed_v1", "nv_embed_v2"):
        recipe = load_recipe(name)
        first, second = recipe.stage["stage1"], recipe.stage["stage2"]
        assert (first.steps, second.steps) == (20_000, 18_000)
        assert (first.optimizer.lr, second.optimizer.lr) == (2e-5, 1.5e-5)
        assert (first.objective.in_batch, second.objective.in_batch) == ("all", "none")
        for stage in (first, second):
            assert (stage.batch.size, stage.batch.positives, stage.batch.negatives) == (128, 1, 7)
            assert (stage.optimizer.warmup, stage.optimizer.weight_decay) == (500, 0.03)
            assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout) == (16, 32, 0.1)
            assert stage.data.mixing == "blended"
        head = recipe.encoder.head
        assert (head.kind, head.latents, head.heads, head.head_width) == ("latent_attention", 512, 8, None)
        assert (recipe.encoder.backbone.attention, recipe.encoder.max_length) == ("bidirectional", 512)


def test_nv_embed_v1_mixture_totals():
    recipe = load_recipe("nv_embed_v1")
    counts = {entry.name: entry.config("v1").count for entry in library().values() if entry.v1 is not None}
    retrieval = [source.name for source in recipe.stage["stage1"].data.sources]
    assert sum(counts[name] for name in retrieval) == 723_000
    rest = {source.name for source in recipe.stage["stage2"].data.sources} - set(retrieval)
    assert sum(counts[name] or 0 for name in rest) == 331_000 - 40_000  # the 40,000 of the three STS sets together
    assert {*retrieval, *rest} == set(counts), "the recipe trains on every set of v1's mixture, and on no other"


def test_nv_embed_v2_trains_on_every_set_of_its_mixture():
    sources = load_recipe("nv_embed_v2").stage["stage2"].data.sources
    assert {source.name for source in sources} == {entry.name for entry in library().values() if entry.v2 is not None}


def test_nv_embed_v2_is_example_based_where_the_paper_says():
    sources = {source.name: source for source in load_recipe("nv_embed_v2").stage["stage2"].data.sources}
    examples = {name for name, source in sources.items() if source.construction == "class_examples"}
    classification = {"emotion", "massive_intent", "massive_scenario", "mtop_domain", "mtop_intent"}
    assert classification <= examples
    assert len(examples - classification) == 11
    labels = {name for name, source in sources.items() if source.construction == "label_text"}
    assert {"banking77", "tweet_sentiment", "amazon_reviews", "imdb", "toxic_conversations"} <= labels
    mine = load_recipe("nv_embed_v2").stage["mine"]
    assert isinstance(mine, MineStage)
    assert (mine.filter.kind, mine.filter.value, mine.teacher) == ("percent", 0.95, "intfloat/e5-mistral-7b-instruct")


def test_nv_embed_similarity_negatives():
    v1, v2 = (load_recipe(name).stage["mine_similarity"] for name in ("nv_embed_v1", "nv_embed_v2"))
    assert (v1.teacher, v1.skip, v1.filter.kind) == ("bm25", 1, "none")
    assert (v2.teacher, v2.skip, v2.filter.kind, v2.filter.value) == ("intfloat/e5-mistral-7b-instruct", 0, "percent", 0.95)
    assert [s.document_instruction for s in v2.sources] == ["Retrieve semantically similar text."] * 3
    assert not any(s.document_instruction for s in v1.sources)


def test_nv_embed_trains_beside_a_frozen_16_bit_backbone():
    import torch

    from openembed.recipe.stages import backbone_dtype

    for name in ("nv_embed_v1", "nv_embed_v2"):
        stages = [stage for stage in load_recipe(name).stage.values() if isinstance(stage, TrainStage)]
        assert [backbone_dtype(stage) for stage in stages] == [torch.bfloat16] * 2


def test_listing_recipes_loads_no_torch():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nimport typer\nfrom openembed.cli.recipes import register\n"
        "app = typer.Typer(); register(app)\n"
        "result = CliRunner().invoke(app, ['recipe', 'list', '--json'])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'nv_embed_v2' in result.output\n"
        "result = CliRunner().invoke(app, ['recipe', 'sources', '--json'])\n"
        "assert result.exit_code == 0, result.output\n"
        "assert 'mteb/hotpotqa' in result.output\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_show_prints_a_recipe_that_loads(app, tmp_path):
    result = CliRunner().invoke(app, ["recipe", "show", "demo", "--set", "seed=5"])
    assert result.exit_code == 0, result.output
    path = tmp_path / "demo.toml"
    path.write_text(result.output)
    assert load_recipe(path) == load_recipe("demo", ["seed=5"])


def test_demo_command_smokes_and_says_where_the_report_is(app, tmp_path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--smoke", "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.stdout.splitlines() if re.match(r"\w+: \w+$", line)] == list(
        load_recipe("demo").stage
    )
    assert "memory: about" in result.output
    assert "openembed-nano" in result.output
    assert "BM25" in result.output
    assert str(out / "report.html") in result.output.replace("\n", "")
    page = (out / "report.html").read_text()
    assert "Evaluation over time" in page
    assert page.count("<svg") > 10

    again = CliRunner().invoke(app, ["demo", "--smoke", "--out", str(out), "--device", "cpu", "--json"])
    assert again.exit_code == 0, again.output
    report = json.loads(again.stdout)
    assert all(stage["skipped"] for stage in report["stages"])
    assert set(report["scores"][0]["scores"]) == {"openembed-nano", "stage 1", "stage 2", "BM25"}


def test_a_stopped_training_stage_resumes_to_the_same_weights(tmp_path, monkeypatch):
    from openembed.train import checkpoint

    settings = ["stage.stage1.save_every=2"]
    recipe = load_recipe("demo", settings, smoke=True)
    recipe = recipe.model_copy(update={"stage": {name: recipe.stage[name] for name in ("mine", "stage1")}})
    run_recipe(recipe, tmp_path / "whole", device="cpu")

    save = checkpoint.save

    def stop_at_four(folder, step, *rest, **options):
        save(folder, step, *rest, **options)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", stop_at_four)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "stopped", device="cpu")
    monkeypatch.setattr(checkpoint, "save", save)
    done = run_recipe(recipe, tmp_path / "stopped", device="cpu")
    assert [stage.skipped for stage in done] == [True, False]
    for name in ("model/model.safetensors", "model/head.safetensors"):
        assert (tmp_path / "stopped/stage1" / name).read_bytes() == (tmp_path / "whole/stage1" / name).read_bytes()


def test_an_unknown_key_is_one_clear_line(app, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('[stage.index]\ndo = "index"\ncorpus = "c"\nmodle = "x"\n')
    result = CliRunner().invoke(app, ["run", str(path)])
    assert isinstance(result.exception, ValueError)
    assert (
        str(result.exception)
        == f"{path}: stage.index.index.modle: Extra inputs are not permitted (got 'x'); did you mean 'model'?"
    )
