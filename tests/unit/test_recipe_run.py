"""The executor: skips what is done, redoes what changed, resumes what was interrupted, and writes the report."""

import json
from pathlib import Path

import pytest

import openembed.recipe.run as recipe_run
from openembed.recipe.config import load_recipe
from openembed.recipe.run import run_recipe

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
    states = []
    done = run_recipe(
        load_recipe(folder / "ask.toml", settings), folder / "out", base=folder, on_stage=lambda *event: states.append(event)
    )
    assert [stage.skipped for stage in done] == [state == "skipped" for _, state in states]
    return dict(states)


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
