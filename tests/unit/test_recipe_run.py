"""The executor: skips what is done, redoes what changed, resumes what was interrupted, and writes the report."""

import json
from pathlib import Path

import pytest

import openembed.recipe.run as recipe_run
from openembed.checkpoints import usable_device
from openembed.recipe.config import load_recipe
from openembed.recipe.earlier import check_folder
from openembed.recipe.run import run_recipe, stage_hashes
from openembed.recipe.stages import Workplace

ASK = """
title = "Ask"
[stage.index]
do = "index"
corpus = "corpus.jsonl"
[stage.ask]
do = "search"
index = "index"
queries = ["green apples"]
steps = [{ kind = "bm25", k = 5 }]
"""


@pytest.fixture
def folder(tmp_path):
    rows = [{"_id": "1", "title": "Fruit", "text": "apples are green"}, {"_id": "2", "title": "", "text": "cars are red"}]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ask.toml").write_text(ASK)
    return tmp_path


def run(folder, *settings):
    return told(folder, *settings)[0]


def told(folder, *settings):
    """What became of each stage, and what else was said."""
    events = []
    done = run_recipe(
        load_recipe(folder / "ask.toml", settings), folder / "out", base=folder, on_stage=lambda *event: events.append(event)
    )
    states = [event for event in events if event[1] in ("running", "skipped")]
    assert [stage.skipped for stage in done] == [state == "skipped" for _, state in states]
    return dict(states), [event for event in events if event not in states]


def test_stages_write_their_outputs_and_the_report(folder):
    assert run(folder) == {"index": "running", "ask": "running"}
    answers = json.loads((folder / "out/ask/searches.json").read_text())
    assert answers[0]["query"] == "green apples"
    assert answers[0]["hits"][0]["id"] == "1"
    assert "<mark>apples</mark>" in (folder / "out/report.html").read_text()
    assert load_recipe(folder / "out/recipe.toml").stage == load_recipe(folder / "ask.toml").stage


def test_a_second_run_skips_everything(folder):
    run(folder)
    assert run(folder) == {"index": "skipped", "ask": "skipped"}


def test_a_changed_setting_redoes_its_stage_alone(folder):
    run(folder)
    assert run(folder, "stage.ask.k=1") == {"index": "skipped", "ask": "running"}


def test_what_is_replaced_is_said_and_why(folder):
    assert told(folder)[1] == []
    lost = "its earlier output is replaced"
    assert told(folder, "stage.ask.k=1")[1] == [("ask", f"changed since it finished (stage.ask.k = 1, was 3); {lost}")]
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "3", "text": "pears"}\n')
    why = "data, an earlier stage or the version of openembed changed"
    assert told(folder, "stage.ask.k=1")[1] == [(n, f"changed since it finished ({why}); {lost}") for n in ("index", "ask")]


def everything(out):
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_folder_of_another_run_is_left_as_it_is(folder):
    run(folder)
    before = everything(folder / "out")
    other = folder / "other.toml"
    other.write_text(ASK)
    sweep = load_recipe(folder / "ask.toml")
    for recipe, this in (
        (load_recipe(folder / "ask.toml", smoke=True), "a smoke run of ask"),
        (load_recipe(other), "a run of other"),
    ):
        with pytest.raises(ValueError, match=f"out: holds a run of ask, and this is {this}, .* choose another --out"):
            run_recipe(recipe, folder / "out", base=folder)
    with pytest.raises(ValueError, match="holds a run of ask, and this is a sweep of ask"):
        check_folder(folder / "out", sweep, sweep=True)
    assert everything(folder / "out") == before
    run_recipe(load_recipe(other, ['name="ask"']), folder / "out", base=folder)  # the same recipe under another file name


def test_a_smoke_run_is_not_gone_on_with_for_real(folder):
    run_recipe(load_recipe(folder / "ask.toml", smoke=True), folder / "out", base=folder)
    before = everything(folder / "out")
    with pytest.raises(ValueError, match="out: holds a smoke run of ask, and this is a run of ask"):
        run(folder)
    assert everything(folder / "out") == before
    again = run_recipe(load_recipe(folder / "out/recipe.toml"), folder / "out", base=folder)
    assert [stage.skipped for stage in again] == [True, True], "its own recipe.toml is the smoke run again"


def test_a_damaged_recipe_in_the_folder_is_named(folder):
    run(folder)
    (folder / "out/recipe.toml").write_text("seed = ")
    with pytest.raises(ValueError, match=r"out/recipe\.toml: damaged"):
        run(folder)


def test_changed_data_redoes_the_stages_that_read_it_and_those_after(folder):
    run(folder)
    with (folder / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "3", "text": "green apples, green apples"}\n')
    assert run(folder) == {"index": "running", "ask": "running"}
    assert json.loads((folder / "out/ask/searches.json").read_text())[0]["hits"][0]["id"] == "3"


def test_an_interrupted_stage_keeps_its_folder_and_a_changed_one_starts_empty(folder, monkeypatch):
    seen = []

    def interrupted(place, name):
        left = place.out / name / "left"
        seen.append(left.exists())
        left.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe_run, "run_stage", interrupted)
    for settings in ((), (), ("stage.index.language=none",)):
        with pytest.raises(KeyboardInterrupt):
            run(folder, *settings)
    assert seen == [False, True, False]


def test_two_runs_cannot_share_a_folder(folder, monkeypatch):
    def second(place, name):
        run_recipe(place.recipe, place.out, base=folder)

    monkeypatch.setattr(recipe_run, "run_stage", second)
    with pytest.raises(ValueError, match="another writer is at work"):
        run(folder)


def test_the_python_api_checks_references_too(folder):
    recipe = load_recipe(folder / "ask.toml")
    stages = {"ask": recipe.stage["ask"]}
    with pytest.raises(ValueError, match=r"recipe ask: stage\.ask\.index: no earlier index stage"):
        run_recipe(recipe.model_copy(update={"stage": stages}), folder / "out")
    assert not Path(folder / "out").exists()


def test_a_folder_that_no_run_wrote_is_never_emptied(folder):
    own = folder / "out" / "index" / "mine.txt"
    own.parent.mkdir(parents=True)
    own.write_text("precious")
    with pytest.raises(ValueError, match=r"index: exists and was not written by a run \(state.json is missing\)"):
        run(folder)
    assert own.read_text() == "precious"


TRAIN = """
seed = 3
[encoder]
tokenizer_path = "package:demo/tokenizer"
head = { kind = "latent_attention", latents = 4, heads = 1 }
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
[stage.one]
do = "train"
steps = 2
batch = { size = 4, negatives = 0 }
data.sources = ["a"]
[stage.two]
do = "train"
start = "one"
steps = 2
batch = { size = 4, negatives = 0 }
data.sources = ["a"]
"""


def train(folder, *settings):
    path = folder / "train.toml"
    path.write_text(TRAIN)
    done = run_recipe(load_recipe(path, settings), folder / "out", base=folder, device="cpu")
    return [stage.skipped for stage in done]


def test_what_is_only_reported_does_not_train_anew_and_old_training_is_kept(tmp_path):
    assert train(tmp_path) == [False, False]
    assert train(tmp_path, "stage.one.save_every=1", "stage.two.evaluate_every=1") == [True, True]
    before = (tmp_path / "out/two/model/model.safetensors").read_bytes()
    assert train(tmp_path, "stage.two.steps=3") == [True, False]
    assert (tmp_path / "out/two.old/model/model.safetensors").read_bytes() == before
    assert len((tmp_path / "out/two/metrics.jsonl").read_text().splitlines()) == 3


def test_a_frozen_backbone_is_trained_around_in_16_bits(tmp_path, monkeypatch):
    import torch

    from openembed.train import loop

    seen = []
    real = loop.train

    def watching(config, encoder, *rest, **options):
        result = real(config, encoder, *rest, **options)
        seen.append(({p.dtype for p in encoder.backbone.parameters()}, {p.dtype for p in encoder.head.parameters()}))
        return result

    monkeypatch.setattr(loop, "train", watching)
    lora = [f"stage.{name}.lora={{ rank = 2 }}" for name in ("one", "two")]
    bf16 = [f"stage.{name}.compute.precision='bf16'" for name in ("one", "two")]
    train(tmp_path, *lora, *bf16)
    assert seen == [({torch.bfloat16}, {torch.float32})] * 2
    seen.clear()
    train(tmp_path, *bf16)
    assert seen == [({torch.float32}, {torch.float32})] * 2


def test_a_model_folder_counts_from_the_base_too(tmp_path):
    train(tmp_path)
    (tmp_path / "out/one/model").rename(tmp_path / "mine")
    recipe = load_recipe(tmp_path / "train.toml", ["stage.two.start='mine'"])
    recipe = recipe.model_copy(update={"stage": {"two": recipe.stage["two"]}})
    assert run_recipe(recipe, tmp_path / "other", base=tmp_path, device="cpu")[0].folder.is_dir()


def test_teacher_vectors_of_ones_own_count_from_the_base_and_are_watched(tmp_path):
    import numpy as np

    from openembed.data.teacher import write_keys

    recipe = load_recipe(write(tmp_path), ["stage.one.objective={kind='distillation', vectors='taught'}"])
    place = Workplace(recipe, tmp_path / "out", tmp_path)
    (tmp_path / "taught").mkdir()
    assert place.training(recipe.stage["one"]).objective.vectors == str(tmp_path / "taught")
    np.save(tmp_path / "taught/vectors.npy", np.ones((1, 8), dtype=np.float32))
    write_keys(tmp_path / "taught", ["text"])
    before = stage_hashes(place)
    np.save(tmp_path / "taught/vectors.npy", np.ones((2, 8), dtype=np.float32))
    assert stage_hashes(place) != before


def test_the_packaged_model_is_not_hidden_by_a_folder_of_its_name(tmp_path):
    (tmp_path / "openembed-nano").mkdir()
    place = Workplace(load_recipe(write(tmp_path)), tmp_path / "out", tmp_path)
    assert place.model_folder("openembed-nano") == "openembed-nano"


def test_initialise_names_an_encode_stage(tmp_path):
    path = write(tmp_path)
    path.write_text(TRAIN + '[stage.start]\ndo = "initialise"\nvectors = "nope"\n')
    with pytest.raises(ValueError, match="no earlier encode stage of this name"):
        load_recipe(path)


def test_a_smoke_run_keeps_where_a_step_is_computed(tmp_path):
    recipe = load_recipe(write(tmp_path), ["stage.one.compute.parallel='fsdp'"], smoke=True)
    assert recipe.stage["one"].compute.parallel == "fsdp"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not"):
        usable_device(device)


def write(folder):
    path = folder / "train.toml"
    path.write_text(TRAIN)
    return path


SCORED = (
    TRAIN[: TRAIN.index("[stage.two]")]
    + """
[stage.evaluate]
do = "evaluate"
models = ["untrained", "one", "openembed-nano", "bm25"]
dtype = "int8"
[[stage.evaluate.tasks]]
name = "toy"
path = "package:demo/toy/retrieval"
"""
)


def test_models_are_scored_in_the_dtype_asked_for(tmp_path, monkeypatch):
    from openembed.evaluation import systems

    asked, real = [], systems.EncoderSystem.evaluate

    def evaluate(self, task):
        asked.append((self.name, self.encoder.computed_in))
        return real(self, task)

    monkeypatch.setattr(systems.EncoderSystem, "evaluate", evaluate)
    (tmp_path / "scored.toml").write_text(SCORED)
    for settings in ((), ("stage.evaluate.dtype=float32",)):
        recipe = load_recipe(tmp_path / "scored.toml", settings)
        run_recipe(recipe, tmp_path / "out", base=tmp_path, device="cpu")
    models = ("untrained", "one", "openembed-nano")
    assert asked == [*((model, "int8") for model in models), *((model, "float32") for model in models)]


def test_models_read_no_more_of_a_text_than_the_stage_says(tmp_path):
    (tmp_path / "scored.toml").write_text(SCORED)
    values = []
    for settings in ((), ("stage.evaluate.max_length=3",)):
        recipe = load_recipe(tmp_path / "scored.toml", ['stage.evaluate.models=["openembed-nano"]', *settings])
        assert ("max_length" in recipe.stage["evaluate"].model_dump()) == bool(settings), "unset, it changes no stage's hash"
        run_recipe(recipe, tmp_path / "out", base=tmp_path, device="cpu")
        result = json.loads((tmp_path / "out/evaluate/openembed-nano/toy/result.json").read_text())["result"]
        values.append(result["metrics"])
    assert values[0] != values[1]
