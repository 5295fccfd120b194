"""Recipes: errors that name the place, references, the resolved form, and the smoke version."""

import tomllib
from pathlib import Path

import pytest

from openembed.recipe.config import Expect, Recipe, load_recipe, model_references, parse_recipe
from openembed.recipe.files import RecipeFile, packaged_recipes
from openembed.recipe.stages import Workplace

SMALL = """
seed = 3
[encoder]
tokenizer_path = "package:demo/tokenizer"
head = { kind = "mean" }
backbone.architecture = { model_type = "mistral", vocab_size = 8192, hidden_size = 32 }
[source.a]
path = "a.jsonl"
instruction = "Find it"
weight = 2.0
[source.b]
path = "b.jsonl"
construction = "class_examples"
[stage.mine]
do = "mine"
sources = ["a"]
[stage.one]
do = "train"
steps = 5
data.sources = ["mine/a", "b"]
[stage.two]
do = "train"
start = "one"
steps = 5
data.sources = ["b"]
[stage.eval]
do = "evaluate"
models = ["untrained", "two", "bm25"]
tasks = [{ name = "t", path = "t" }]
[stage.index]
do = "index"
corpus = "c.jsonl"
[stage.ask]
do = "search"
index = "index"
queries = ["why"]
steps = [{ kind = "bm25" }]
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_sources_are_filled_in_and_mined_ones_point_at_the_stage(path):
    recipe = load_recipe(path)
    mined, plain = recipe.stage["one"].data.sources
    assert (mined.name, mined.path, mined.instruction, mined.weight) == ("a", "stage:mine/a.jsonl", "Find it", 2.0)
    assert (plain.name, plain.path, plain.construction) == ("b", "b.jsonl", "class_examples")
    assert recipe.stage["mine"].sources[0].path == "a.jsonl"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "stage.one.stpes=5",
            r"small\.toml: stage\.one\.train\.stpes: Extra inputs are not permitted \(got 5\); did you mean 'steps'",
        ),
        ("stage.one.optimizer.rl=1", r"stage\.one\.train\.optimizer\.rl: .*; known are .*lr.*$"),
        ("stage.eval.tasks=[{name='t', pth='t'}]", r"stage\.eval\.evaluate\.tasks\.0\.pth: .*; did you mean 'path'\?"),
        ("stage.one.optimizer.lr=fast", r"stage\.one\.train\.optimizer\.lr: .*valid number.*\(got 'fast'\)"),
        (
            "stage.one.do=dance",
            r"stage\.one: Input tag 'dance' .* 'filter', 'mine', .*'train', 'evaluate', 'index', 'search'",
        ),
        ("encoder.head.kind=meen", r"encoder\.head: Input tag 'meen' .*'mean'"),
        ("source.a.pth=x", r"small\.toml: source\.a\.pth: Extra inputs are not permitted \(got 'x'\); did you mean 'path'\?"),
        ("source=5", r"small\.toml: source: expected tables \[source\.NAME\] \(got 5\)"),
        ("stage.one.data.sources=['c']", r"stage\.one\.data\.sources\.0: no table \[source\.c\] .*known: a, b"),
        ("stage.one.data.sources=['mine/b']", r"stage\.one: no earlier mine or filter stage 'mine' with source 'b'"),
        ("stage.one.start=two", r"stage\.one\.start: no earlier train stage of this name \(got 'two'\)"),
        ("stage.two.start=mine", r"stage\.two\.start: no earlier train stage of this name \(got 'mine'\)"),
        ("stage.two.start=bm25", r"stage\.two\.start: BM25 has nothing to train"),
        ("stage.ask.index=one", r"stage\.ask\.index: no earlier index stage of this name \(got 'one'\)"),
        ("colour=3", r"small\.toml: colour: Extra inputs are not permitted \(got 3\); known are name, title, .*, stage, "),
    ],
)
def test_errors_name_file_key_reason_and_value(path, setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(path, [setting])


def test_every_error_is_reported_at_once(path):
    with pytest.raises(ValueError, match="stpes") as error:
        load_recipe(path, ["stage.one.stpes=5", "colour=3"])
    assert len(str(error.value).splitlines()) == 2


def test_untrained_needs_an_encoder(path):
    path.write_text(SMALL.replace("[encoder]", "[other]"))
    with pytest.raises(ValueError, match="other"):
        load_recipe(path)
    table = tomllib.loads(SMALL)
    del table["encoder"]
    with pytest.raises(ValueError, match=r"stage\.one\.start: needs an \[encoder\] table \(got 'untrained'\)"):
        parse_recipe(RecipeFile("small", path, False, table))


@pytest.mark.parametrize("name", ["small", "nv_embed_v1", "nv_embed_v2", "demo"])
def test_the_resolved_recipe_reads_back_equal(path, name):
    recipe = load_recipe(path if name == "small" else name)
    again = parse_recipe(RecipeFile(recipe.name, Path("again.toml"), False, tomllib.loads(recipe.to_toml())))
    assert again == recipe


def test_measured_values_say_when_and_where():
    Expect(metric="m", value=1, status="paper", source="arXiv")
    with pytest.raises(ValueError, match="needs date, commit and hardware"):
        Expect(metric="m", value=1, status="measured", source="us")


@pytest.mark.parametrize("name", ["nv_embed_v1", "nv_embed_v2", "demo"])
def test_smoke_needs_nothing_but_the_package(name):
    recipe = load_recipe(name, smoke=True)
    assert isinstance(recipe, Recipe)
    full = load_recipe(name)
    assert list(recipe.stage) == list(full.stage)
    text = recipe.to_toml()
    assert "hub" not in [key.strip() for line in text.splitlines() for key in line.split("=")[:1]]
    assert recipe.encoder is None or recipe.encoder.backbone.path is None
    known = {"untrained", "bm25", "random", "openembed-nano", *recipe.stage}
    for stage in recipe.stage.values():
        assert set(model_references(stage).values()) <= known
    for stage in recipe.stage.values():
        for source in getattr(stage, "sources", ()) or getattr(getattr(stage, "data", None), "sources", ()):
            assert source.hub is None
            assert source.path.startswith(("package:", "stage:"))


def test_smoke_keeps_sources_constructions_and_objective():
    full, small = load_recipe("nv_embed_v2"), load_recipe("nv_embed_v2", smoke=True)
    for name in ("stage1", "stage2"):
        assert full.stage[name].objective == small.stage[name].objective
        kinds = [(s.name, s.construction, s.instruction) for s in full.stage[name].data.sources]
        assert kinds == [(s.name, s.construction, s.instruction) for s in small.stage[name].data.sources]


def test_smoke_says_that_its_scores_mean_nothing():
    recipe = load_recipe("nv_embed_v2", smoke=True)
    assert recipe.title.endswith("(smoke run)")
    assert "scores mean nothing" in recipe.description
    assert {task.note for task in recipe.stage["evaluate"].tasks} == {"toy data"}
    assert recipe.smoke


@pytest.mark.parametrize("name", [recipe.name for recipe in packaged_recipes()])
def test_a_smoke_recipe_written_and_read_is_the_same_smoke_recipe(name, tmp_path):
    recipe = load_recipe(name, smoke=True)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "again.toml") == recipe


@pytest.mark.parametrize("name", ["inference_free_sparse_small", "vdr_small", "mistral_splade_small"])
def test_sparse_vectors_of_a_smoke_run_are_made_of_a_texts_own_terms(name, tmp_path):
    encoder = Workplace(load_recipe(name, smoke=True), tmp_path, tmp_path, "cpu").model("untrained")
    documents = encoder.encode_documents(["green apples on the market", "asthma of the lungs"])
    assert 5 <= documents.getnnz(1).min() <= documents.getnnz(1).max() <= 300, "some terms, and far from all of 8,192"
    scores_QN = (encoder.encode_queries(["apples market", "asthma lungs"]) @ documents.T).toarray()
    assert (scores_QN.diagonal() > scores_QN[:, ::-1].diagonal()).all()


@pytest.mark.parametrize("name", ["../up", "a.b", ""])
def test_names_of_stages_and_sources_cannot_leave_their_folder(path, name):
    for kind in ("stage", "source"):
        table = tomllib.loads(SMALL)
        table[kind][name] = dict(next(iter(table[kind].values())))
        with pytest.raises(ValueError, match="should match pattern"):
            parse_recipe(RecipeFile("small", path, False, table))


def test_a_stage_cannot_take_the_name_of_a_model(path):
    path.write_text(SMALL.replace("[stage.mine]", "[stage.bm25]").replace("mine/a", "bm25/a"))
    with pytest.raises(ValueError, match=r"stage\.bm25: this name stands for a model"):
        load_recipe(path)


def test_every_choice_of_training_can_be_written_in_toml(path):
    settings = ["stage.one.compute.live_chunks='all'", "stage.one.optimizer.clip=0"]
    recipe = load_recipe(path, settings)
    assert (recipe.stage["one"].compute.live_chunks, recipe.stage["one"].optimizer.clip) == ("all", 0)
    assert parse_recipe(RecipeFile(recipe.name, path, False, tomllib.loads(recipe.to_toml()))) == recipe
