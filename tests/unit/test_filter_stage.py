"""Filter stages in recipes, their section of the report, and the decontaminate command."""

import json
import sys

import pytest

from openembed.recipe.config import load_recipe
from openembed.recipe.run import run_recipe

RECIPE = """
[source.a]
path = "a.jsonl"
instruction = "Answer the question"
[stage.clean]
do = "filter"
sources = ["a"]
texts = { prose = "prose.jsonl.gz" }
against = ["sets/quiz", { name = "rows", path = "known.jsonl" }]
[stage.again]
do = "filter"
texts = { prose = "stage:clean/prose.jsonl" }
duplicates = "exact"
[stage.mine]
do = "mine"
sources = ["clean/a"]
"""


def write(path, rows):
    import gzip

    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "a.jsonl", [{"query": f"question {n}", "positive": f"answer number {n}"} for n in range(6)])
    write(tmp_path / "prose.jsonl.gz", [{"_id": f"p{n}", "text": f"prose <b>{n}</b>", "page": n} for n in (1, 2, 3, 1)])
    write(tmp_path / "sets/quiz/test.jsonl", [{"text": "Question 2?", "label": 0}])
    write(tmp_path / "known.jsonl", [{"text": "prose b 3 b"}, {"text": "unrelated"}])
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path


def run(folder, *settings):
    done = run_recipe(load_recipe(folder / "recipe.toml", settings), folder / "out", base=folder, device="cpu")
    return [stage.skipped for stage in done]


def rows(path):
    return [json.loads(line) for line in path.open()]


def test_later_stages_read_what_a_filter_stage_kept(folder):
    assert run(folder) == [False, False, False]
    out = folder / "out"
    assert [row["query"]["text"] for row in rows(out / "mine/a.jsonl")] == [f"question {n}" for n in (0, 1, 3, 4, 5)]
    assert rows(out / "again/prose.jsonl") == [{"_id": f"p{n}", "text": f"prose <b>{n}</b>", "page": n} for n in (1, 2)]
    removed = [(row["source"], row["id"], row["reason"], row["set"]) for row in rows(out / "clean/removed.jsonl")]
    assert removed == [
        ("a", "2", "exact", "sets/quiz"),
        ("prose", "p3", "exact", "rows"),
        ("prose", "p1", "duplicate", "prose"),
    ]
    report = json.loads((out / "clean/report.json").read_text())
    assert [(row["name"], row["texts"], row["matched"]) for row in report["against"]] == [
        ("sets/quiz", 1, {"exact": 1}),
        ("rows", 2, {"exact": 1}),
    ]
    assert all(len(row["sha256"]) == 64 for row in report["against"])
    page = (out / "report.html").read_text()
    assert "Training data removed" in page
    assert "prose &lt;b&gt;3&lt;/b&gt;" in page


def test_a_changed_evaluation_set_filters_again_and_an_unchanged_one_does_not(folder):
    run(folder)
    assert run(folder) == [True, True, True]
    write(folder / "known.jsonl", [{"text": "prose b 2 b"}])
    assert run(folder) == [False, False, False]
    assert [row["_id"] for row in rows(folder / "out/again/prose.jsonl")] == ["p1", "p3"]


def test_a_stage_that_was_cut_short_runs_again(folder):
    run(folder)
    state = folder / "out/clean/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "finished": False}))
    before = (folder / "out/clean/removed.jsonl").read_bytes()
    (folder / "out/clean/removed.jsonl").unlink()
    assert run(folder)[0] is False
    assert (folder / "out/clean/removed.jsonl").read_bytes() == before


def test_smoke_finds_something(folder):
    recipe = load_recipe(folder / "recipe.toml", smoke=True)
    run_recipe(recipe, folder / "smoke", base=folder / "nowhere", device="cpu")
    report = json.loads((folder / "smoke/clean/report.json").read_text())
    assert report["sources"]["a"]["removed"]["exact"] > 0
    assert report["sources"]["a"]["kept"] > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stage.mine.sources=['cleen/a']", "no earlier mine or filter stage 'cleen' with source 'a'"),
        ("stage.again.texts={ x = 'stage:clean/b.jsonl' }", "no earlier mine or filter stage 'clean' with source 'b'"),
        ("stage.clean.texts={ a = 'prose.jsonl.gz' }", "two of the sources and texts have one name"),
        ("stage.clean.bm25=1.5", "stage.clean.filter.bm25: Input should be less than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_said(folder, setting, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(folder / "recipe.toml", [setting])


def command(monkeypatch, capsys, *arguments):
    from openembed.cli import main

    monkeypatch.setattr(sys, "argv", ["openembed", "decontaminate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, *capsys.readouterr()


def test_the_command_cleans_examples_and_texts(folder, monkeypatch, capsys):
    options = ["--against", folder / "sets", "--against", folder / "known.jsonl", "--out", folder / "o"]
    files = [folder / "a.jsonl", folder / "prose.jsonl.gz"]
    code, out, _ = command(monkeypatch, capsys, *files, *options, "--json")
    assert code == 0
    assert {name: row["kept"] for name, row in json.loads(out)["sources"].items()} == {"a": 5, "prose": 2}
    assert len(rows(folder / "o/a.jsonl")) == 5
    code, out, _ = command(monkeypatch, capsys, *files, *options)
    assert code == 0
    assert "known.jsonl 1" in out.replace("\n", "")
    code, _, err = command(monkeypatch, capsys, files[0], "--out", folder / "o", "--duplicates", "none")
    assert (code, "nothing to remove" in err) == (2, True)
    code, _, err = command(monkeypatch, capsys, files[0], "--out", folder)
    assert (code, "would overwrite" in err) == (2, True)
    code, _, err = command(monkeypatch, capsys, files[0], files[0], "--out", folder / "o")
    assert (code, "two training files have one name" in err) == (2, True)
