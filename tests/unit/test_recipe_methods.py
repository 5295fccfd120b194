"""Methods of searching token vectors in recipes: an evaluate stage scores by them beside MaxSim, an index is coded for them."""

import json

import pytest
from token_models import WORDS, token_encoder

from openembed.evaluation.systems import EncoderSystem
from openembed.evaluation.tasks import find_tasks
from openembed.index.store import Store
from openembed.index.tokens.methods import Xtr
from openembed.recipe.config import load_recipe
from openembed.recipe.report import build_report
from openembed.recipe.run import run_recipe, stage_hashes
from openembed.recipe.stages import STORE, Workplace

RECIPE = """
title = "Methods"
[stage.evaluate]
do = "evaluate"
models = ["model", "bm25"]
tasks = [{ name = "words", path = "words" }]
methods = [{ kind = "xtr", tokens = 5 }, { kind = "warp", probes = 1 }]
[stage.index]
do = "index"
corpus = "words/corpus.jsonl"
model = "model"
coding = { bits = 4, coded_from = 1 }
[stage.ask]
do = "search"
index = "index"
queries = ["w1 w2 w3"]
steps = [{ kind = "tokens", k = 5, method = { kind = "warp", probes = 2 } }]
"""


@pytest.fixture
def folder(tmp_path):
    encoder = token_encoder(tmp_path / "tokenizer")
    encoder.save(tmp_path / "model")
    (tmp_path / "words" / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{n}", "title": "", "text": " ".join(WORDS[4 * n : 4 * n + 6])} for n in range(30)]
    queries = [{"_id": f"q{n}", "text": " ".join(WORDS[4 * n + 1 : 4 * n + 4])} for n in range(6)]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (tmp_path / "words" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"q{n}\td{n}\t1\n" for n in range(6))
    (tmp_path / "words" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    (tmp_path / "methods.toml").write_text(RECIPE)
    return tmp_path


def test_models_are_scored_by_methods_beside_maxsim_and_an_index_is_coded_and_searched(folder):
    recipe = load_recipe(folder / "methods.toml")
    run_recipe(recipe, folder / "out", base=folder, device="cpu")
    place = Workplace(recipe, folder / "out", folder)
    report = build_report(place)
    names = ["model", "model by xtr tokens=5", "model by warp probes=1", "BM25"]
    assert report.systems == names
    (task,) = report.tasks
    assert set(task.scores) == set(names)
    encoder = place.model("model")
    (words,) = find_tasks(folder / "words")
    for name, options in (("model", {}), ("model by xtr tokens=5", {"method": Xtr(tokens=5)})):
        assert task.scores[name].value == EncoderSystem(encoder, "m", **options).evaluate(words).value
    found = json.loads((folder / "out/evaluate/model by xtr tokens=5/words/result.json").read_text())["result"]
    assert found["details"]["scoring"] == Xtr(tokens=5).model_dump()

    store = Store(folder / "out" / "index" / STORE)
    assert store.models["tokens"].coding == recipe.stage["index"].coding
    (wanted,) = store.tokens(encoder.encode_queries(["w1 w2 w3"]), 3, method=recipe.stage["ask"].steps[0].method)
    (answer,) = json.loads((folder / "out/ask/searches.json").read_text())
    assert {hit["id"]: hit["score"] for hit in answer["hits"]} == pytest.approx(wanted)
    assert load_recipe(folder / "out/recipe.toml").stage == recipe.stage


def test_a_method_is_of_token_vectors_alone_and_changes_a_stages_hash_where_it_is_used(folder):
    plain = load_recipe(folder / "methods.toml", ["stage.evaluate.methods=[]"])
    hashes = [
        stage_hashes(Workplace(recipe, folder / "out", folder)) for recipe in (plain, load_recipe(folder / "methods.toml"))
    ]
    assert [name for name in hashes[0] if hashes[0][name] != hashes[1][name]] == ["evaluate"]
    assert "methods" not in plain.stage["evaluate"].model_dump()
    with pytest.raises(ValueError, match=r"stage\.index\.coding\.bits|stage\.index.*bits"):
        load_recipe(folder / "methods.toml", ["stage.index.coding.bits=3"])
    with pytest.raises(ValueError, match=r"methods\.0.*wrap"):
        load_recipe(folder / "methods.toml", ["stage.evaluate.methods=[{kind='wrap'}]"])
    uncoded = load_recipe(folder / "methods.toml", ["stage.index.coding.bits=0"])
    with pytest.raises(ValueError, match="method warp searches residuals"):
        run_recipe(uncoded, folder / "other", base=folder, device="cpu")


def test_the_recipes_of_xtr_score_by_retrieved_tokens_too():
    for name, tokens in (("xtr", 40_000), ("xtr_small", 1_000)):
        (method,) = load_recipe(name).stage["evaluate"].methods
        assert method == Xtr(tokens=tokens)


def test_an_offset_that_is_not_there_cannot_be_calibrated(tmp_path):
    table = """
[encoder]
backbone = { path = "openembed-nano" }
head = { kind = "splade"%s }
[source.pairs]
path = "pairs.jsonl"
[stage.train]
do = "train"
steps = 2
calibrate = 0.03
data.sources = ["pairs"]
"""
    path = tmp_path / "own.toml"
    path.write_text(table % "")
    with pytest.raises(ValueError, match=r"stage\.train\.calibrate: .*give encoder\.head\.offset = 0\.0"):
        load_recipe(path)
    path.write_text(table % ", offset = 0.0")
    assert load_recipe(path).stage["train"].calibrate == 0.03


def test_a_smoke_run_keeps_models_in_folders(tmp_path, monkeypatch):
    (tmp_path / "tokens-model").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text("""
[stage.index]
do = "index"
corpus = "corpus.jsonl"
model = "tokens-model"
""")
    assert load_recipe(tmp_path / "own.toml", smoke=True).stage["index"].model == "tokens-model"
