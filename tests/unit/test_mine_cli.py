"""``openembed mine`` and ``remine``, their audit sheet, and the mine stage's section of a recipe report."""

import json
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from openembed.cli import app
from openembed.data.readers import write_beir
from openembed.data.sources import SourceConfig, load_source
from openembed.recipe.config import load_recipe
from openembed.recipe.run import run_recipe
from openembed.records import Document, Query

HOSTILE = "<script>alert(1)</script> pear & plum"


@pytest.fixture
def data(tmp_path):
    fruit = ["red apple pie", "green apple pie", "red apple cake", "blue sky", HOSTILE, "apple juice", "red sea"]
    corpus = [Document(f"d{n}", text) for n, text in enumerate(fruit)]
    queries = [Query("q0", "red apple"), Query("q1", "pear plum")]
    write_beir(tmp_path / "data", corpus, queries, {"train": {"q0": {"d0": 1}, "q1": {"d4": 1}}})
    return tmp_path / "data"


def invoke(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


class References(HTMLParser):
    def __init__(self):
        super().__init__()
        self.outside, self.scripts = [], 0

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.outside += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]


def check_page(path):
    parser, text = References(), path.read_text()
    parser.feed(text)
    assert (parser.outside, parser.scripts) == ([], 0)
    return text


def test_mine_then_remine(data, tmp_path):
    said = json.loads(invoke("mine", data, "--out", tmp_path / "one", "--keep", 3, "--keep-pool", "--json"))
    assert (said["queries"], said["source"], said["policy"]) == (2, "data", "percent 0.95")
    rows = load_source(SourceConfig(name="data", path=str(tmp_path / "one" / "mined.jsonl")))
    assert rows[0].positives[0].id == "d0"
    assert all(score < 0.95 * rows[0].positive_scores[0] for score in rows[0].negative_scores)
    page = check_page(tmp_path / "one" / "audit.html")
    for text in ("Teacher scores", "red apple", "&lt;script&gt;", "refused at", "known positive"):
        assert text in page
    told = invoke("remine", tmp_path / "one", "--out", tmp_path / "two", "--filter", "none", "--keep", 2, "--pool", 9)
    assert "no ceiling" in told
    again = load_source(SourceConfig(name="data", path=str(tmp_path / "two" / "mined.jsonl")))
    assert [d.id for d in again[0].negatives] != [d.id for d in rows[0].negatives][:2]
    assert invoke("mine", data, "--out", tmp_path / "one", "--keep", 3, "--keep-pool")  # finished: returns at once


def test_rows_and_documents_in_files_of_their_own(tmp_path):
    rows = [{"query": "red apple", "positive": {"id": "a", "text": "red apple pie"}}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = [{"_id": "a", "text": "red apple pie"}, {"_id": "b", "text": "green apple"}, {"_id": "c", "text": "sea"}]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    out, corpus = tmp_path / "out", tmp_path / "documents.jsonl"
    said = json.loads(invoke("mine", tmp_path / "rows.jsonl", "--corpus", corpus, "--out", out, "--keep", 1, "--json"))
    assert (said["source"], said["negatives"]) == ("rows", 1)
    assert json.loads((out / "mined.jsonl").read_text())["negatives"][0]["id"] == "b"


def test_wrong_options_are_named(data, tmp_path):
    result = CliRunner().invoke(app, ["mine", str(data), "--out", str(tmp_path / "x"), "--filter", "guess"])
    assert isinstance(result.exception, ValueError)
    assert "filter.kind" in str(result.exception)


def test_the_recipe_report_shows_the_audit(data, tmp_path):
    (tmp_path / "r.toml").write_text(
        '[source.fruit]\npath = "data"\n[stage.mine]\ndo = "mine"\nsources = ["fruit"]\nkeep = 2\nkeep_pool = true\n'
        'sample = "softmax"\nshort = "relax"\nfilter = { kind = "margin", value = 0.05 }\n'
    )
    run_recipe(load_recipe(tmp_path / "r.toml"), tmp_path / "out", base=tmp_path, device="cpu")
    page = check_page(tmp_path / "out" / "report.html")
    assert "mine: fruit" in page
    assert "margin 0.05, softmax" in page
    folder = tmp_path / "out" / "mine"
    assert len((folder / "fruit.jsonl").read_text().splitlines()) == 2
    assert (folder / "fruit" / "pool.jsonl").exists()
    assert json.loads((folder / "report.json").read_text())["fruit"]["queries"] == 2
    assert all(stage.skipped for stage in run_recipe(load_recipe(tmp_path / "r.toml"), tmp_path / "out", base=tmp_path))
