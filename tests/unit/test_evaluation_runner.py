import json

import pytest
import typer
from typer.testing import CliRunner

from openembed.cli import evaluate as commands
from openembed.evaluation.compare import compare_results, compare_runs
from openembed.evaluation.runner import read_results, run_tasks
from openembed.evaluation.systems import Bm25System, EncoderSystem, RunSystem
from openembed.evaluation.tasks import find_tasks
from tests.evaluation_fakes import WordEncoder, small_retrieval, write_rows

LAYOUTS = {
    "sts": [{"sentence1": "a b", "sentence2": "a c", "score": s} for s in (1.0, 2.5, 0)],
    "pair_classification": [{"sentence1": "a b", "sentence2": "a c", "label": s} for s in (0, 1)],
    "reranking": [{"query": "a", "positive": ["a b"], "negative": ["c"]}],
    "clustering": [{"text": "a", "label": 1}],
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_are_recognised(tmp_path, kind):
    write_rows(tmp_path / "set" / "test.jsonl", LAYOUTS[kind])
    (task,) = find_tasks(tmp_path)
    assert (task.name, task.kind, task.split) == ("set", kind, "test")


def test_folders_of_folders(tmp_path):
    small_retrieval(tmp_path / "many" / "poquad-pl")
    write_rows(tmp_path / "many" / "stsb" / "de" / "dev.jsonl", LAYOUTS["sts"])
    write_rows(tmp_path / "many" / "bank" / "test.jsonl", LAYOUTS["clustering"])
    write_rows(tmp_path / "many" / "bank" / "train.jsonl", LAYOUTS["clustering"])
    write_rows(tmp_path / "many" / "prose" / "train.jsonl", [{"text": "no label"}])
    found = find_tasks(tmp_path / "many")
    assert [(t.name, t.kind, t.split, t.language) for t in found] == [
        ("bank", "classification", "test", "en"),
        ("poquad-pl", "retrieval", "test", "pl"),
        ("stsb/de", "sts", "dev", "de"),
    ]
    assert find_tasks(tmp_path / "many" / "stsb" / "de")[0].name == "stsb/de"
    assert find_tasks(tmp_path / "many" / "stsb")[0].name == "stsb/de"


def test_task_toml_settles_what_the_files_leave_open(tmp_path):
    folder = small_retrieval(tmp_path / "set")
    (folder / "task.toml").write_text('name = "Mars"\nmetric = "recall_at_5"\ninstruction = "Find"\nlanguage = "de"\n')
    (task,) = find_tasks(folder)
    assert (task.name, task.metric, task.instruction, task.language) == ("Mars", "recall_at_5", "Find", "de")
    (task,) = find_tasks(folder, {"metric": "mrr_at_10"})
    assert task.metric == "mrr_at_10"
    (folder / "task.toml").write_text("metrik = 1\n")
    with pytest.raises(ValueError, match=r"task.toml: metrik: .* \(got 1\)"):
        find_tasks(folder)
    (folder / "task.toml").write_text("metric = \n")
    with pytest.raises(ValueError, match=r"task\.toml: not valid TOML"):
        find_tasks(folder)


def test_what_cannot_be_evaluated_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_tasks(tmp_path / "none")
    write_rows(tmp_path / "prose" / "test.jsonl", [{"text": "no label"}])
    with pytest.raises(ValueError, match=r"no task in a known layout; known are corpus\.jsonl"):
        find_tasks(tmp_path)
    folder = small_retrieval(tmp_path / "set")
    with pytest.raises(ValueError, match="no split 'dev'; it has test"):
        find_tasks(folder, {"split": "dev"})
    write_rows(tmp_path / "s" / "test.jsonl", LAYOUTS["sts"])
    with pytest.raises(ValueError, match="sts is scored by cosine_spearman, got metric 'ndcg_at_10'"):
        find_tasks(tmp_path / "s", {"metric": "ndcg_at_10"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence1": "a", "sentence2": "b", "score": "high"}, "test.jsonl:4: 'score' must be a number, got 'high'"),
        ({"sentence1": "a", "sentence2": None, "score": 1}, "test.jsonl:4: 'sentence2' must be a text"),
        ({"sentence1": "a", "sentence2": "b", "score": float("nan")}, "test.jsonl:4: 'score' must be a number, got nan"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    write_rows(tmp_path / "test.jsonl", [*LAYOUTS["sts"], row])
    with pytest.raises(ValueError, match=message):
        run_tasks(EncoderSystem(WordEncoder(), "words"), find_tasks(tmp_path))


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("pair_classification", {"sentence1": "a", "sentence2": "b", "label": 0.7}, "test.jsonl:3: 'label' must be 0 or 1"),
        ("reranking", {"query": "a", "positive": [1], "negative": []}, "test.jsonl:2: 'positive' and 'negative' must be lists"),
        ("reranking", {"id": "0", "query": "a", "positive": ["b"], "negative": []}, "test.jsonl:2: id '0' is already at"),
    ],
)
def test_bad_rows_of_other_layouts_are_named(tmp_path, kind, row, message):
    write_rows(tmp_path / "test.jsonl", [*LAYOUTS[kind], row])
    with pytest.raises(ValueError, match=message):
        run_tasks(EncoderSystem(WordEncoder(), "words"), find_tasks(tmp_path))


@pytest.mark.parametrize("row", [{"sentences": ["a", 3], "labels": [0, 1]}, {"sentences": ["a", "b"], "labels": [0, None]}])
def test_bad_clustering_sets_are_named(tmp_path, row):
    write_rows(tmp_path / "test.jsonl", [row])
    with pytest.raises(ValueError, match=r"test\.jsonl:1: '(sentences|labels)' must be"):
        run_tasks(EncoderSystem(WordEncoder(), "words"), find_tasks(tmp_path))


def test_a_split_asked_of_many_folders_passes_over_those_without_it(tmp_path, caplog):
    small_retrieval(tmp_path / "many" / "set")
    write_rows(tmp_path / "many" / "s" / "dev.jsonl", LAYOUTS["sts"])
    assert [task.name for task in find_tasks(tmp_path / "many", {"split": "dev"})] == ["s"]
    assert "set: no split 'dev'; it has test; passed over" in caplog.text
    with pytest.raises(ValueError, match=r"no split 'train'; it has dev\n.*no split 'train'; it has test"):
        find_tasks(tmp_path / "many", {"split": "train"})


@pytest.mark.parametrize("line", ['"d17"', "[1, 2]", "3", '{"foo": 1}'])
def test_a_file_of_an_unknown_shape_is_passed_over_and_a_damaged_one_named(tmp_path, caplog, line):
    write_rows(tmp_path / "many" / "s" / "test.jsonl", LAYOUTS["sts"])
    (tmp_path / "many" / "encoded").mkdir()
    (tmp_path / "many" / "encoded" / "ids.jsonl").write_text(f"\n{line}\n")
    assert [task.name for task in find_tasks(tmp_path / "many")] == ["s"]
    assert "encoded: in no known layout, passed over" in caplog.text
    with pytest.raises(ValueError, match="holds no task in a known layout"):
        find_tasks(tmp_path / "many" / "encoded")
    (tmp_path / "many" / "encoded" / "ids.jsonl").write_text('{"text": "tor')
    with pytest.raises(ValueError, match=r"ids\.jsonl:1: malformed JSON"):
        find_tasks(tmp_path / "many")


def test_a_finished_task_is_read_not_computed(tmp_path):
    folder = small_retrieval(tmp_path / "set")
    encoder = WordEncoder()
    (first,) = run_tasks(EncoderSystem(encoder, "words"), find_tasks(folder), tmp_path / "out")
    asked = len(encoder.encoded)
    (second,) = run_tasks(EncoderSystem(encoder, "words"), find_tasks(folder), tmp_path / "out")
    assert second == first
    assert len(encoder.encoded) == asked
    run_tasks(EncoderSystem(WordEncoder(fingerprint="other"), "words"), find_tasks(folder), tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "set" / "result.json").read_text())
    (third,) = run_tasks(EncoderSystem(encoder, "words"), find_tasks(folder), tmp_path / "out")
    assert len(encoder.encoded) == 2 * asked
    assert third.value == first.value
    assert stored["result"]["metrics"] == dict(first.metrics)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td3\t1\n")
    (changed,) = run_tasks(EncoderSystem(encoder, "words"), find_tasks(folder), tmp_path / "out")
    assert changed.value != first.value


def test_results_lie_beside_their_queries_and_run(tmp_path):
    folder = small_retrieval(tmp_path / "set")
    (result,) = run_tasks(Bm25System(), find_tasks(folder), tmp_path / "out", run_file=tmp_path / "bm25.trec")
    stored, items = read_results(tmp_path / "out")["set"]
    assert stored == result
    assert set(items["per_item"]["ndcg_at_10"]) == {"q1", "q2"}
    assert (tmp_path / "out" / "set" / "run.trec").read_text() == (tmp_path / "bm25.trec").read_text()
    (again,) = run_tasks(RunSystem(tmp_path / "bm25.trec", "bm25"), find_tasks(folder))
    assert again.metrics == result.metrics


def test_bm25_ranks_by_shared_words_and_leaves_others_out(tmp_path):
    run_tasks(Bm25System(), find_tasks(small_retrieval(tmp_path / "set")), run_file=tmp_path / "x.trec")
    lines = [line.split()[:3:2] for line in (tmp_path / "x.trec").read_text().splitlines()]
    assert lines == [["q1", "d1"], ["q1", "d2"], ["q2", "d3"]]
    write_rows(tmp_path / "s" / "test.jsonl", LAYOUTS["sts"])
    with pytest.raises(ValueError, match="cannot do sts"):
        run_tasks(Bm25System(), find_tasks(tmp_path / "s"))


def test_bm25_over_documents_without_words_is_refused(tmp_path):
    folder = small_retrieval(tmp_path / "set")
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{number}", "text": ""} for number in range(1, 5)])
    with pytest.raises(ValueError, match="no document holds a word that BM25 could index"):
        run_tasks(Bm25System(), find_tasks(folder))


def test_a_run_of_other_queries_is_refused(tmp_path):
    (tmp_path / "x.trec").write_text("zz Q0 d1 1 1.0 t\n")
    with pytest.raises(ValueError, match="ranks none of the judged queries"):
        run_tasks(RunSystem(tmp_path / "x.trec", "x"), find_tasks(small_retrieval(tmp_path / "set")))


def test_comparing_results_and_runs(tmp_path):
    folder = small_retrieval(tmp_path / "set")
    write_rows(tmp_path / "s" / "test.jsonl", [{"sentence1": "a b", "sentence2": f"a {i}", "score": i} for i in range(9)])
    for name, system in (("a", EncoderSystem(WordEncoder(), "a")), ("b", Bm25System())):
        run_tasks(system, find_tasks(folder), tmp_path / name)
    (comparison,) = compare_results(tmp_path / "a", tmp_path / "b")
    assert (comparison.test.metric, comparison.test.items) == ("ndcg_at_10", 2)
    qrels = folder / "qrels" / "test.tsv"
    runs = [tmp_path / name / "set" / "run.trec" for name in ("a", "b")]
    assert compare_runs(*runs, qrels).test.difference == pytest.approx(comparison.test.difference)
    assert compare_results(tmp_path / "a", tmp_path / "b", metric="recall_at_5")[0].test.metric == "recall_at_5"
    with pytest.raises(ValueError, match="no per-item scores"):
        compare_results(tmp_path / "a", tmp_path / "b", metric="accuracy")
    for name, fingerprint in (("a", "one"), ("b", "two")):
        run_tasks(EncoderSystem(WordEncoder(fingerprint=fingerprint), name), find_tasks(tmp_path / "s"), tmp_path / name)
    by_task = {c.task: c.test for c in compare_results(tmp_path / "a", tmp_path / "b")}
    assert by_task["s"].difference == 0
    assert by_task["s"].p_bootstrap == 1
    run_tasks(Bm25System(), find_tasks(small_retrieval(tmp_path / "other")), tmp_path / "c")
    with pytest.raises(ValueError, match="share no task"):
        compare_results(tmp_path / "a", tmp_path / "c")


@pytest.fixture
def cli():
    app = typer.Typer()
    commands.register(app)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(tmp_path, cli):
    folder = small_retrieval(tmp_path / "set")
    ran = cli("evaluate", "bm25", "--data", folder, "--out", tmp_path / "out", "--run-file", tmp_path / "r.trec", "--json")
    assert ran.exit_code == 0, ran.output
    (result,) = json.loads(ran.output)["results"]
    assert (result["metric"], result["value"], result["counts"]["queries"]) == ("ndcg_at_10", 1.0, 2)
    scored = cli("evaluate", tmp_path / "r.trec", "--data", folder, "--metric", "recall_at_5")
    assert "recall_at_5" in scored.output
    assert "100.00" in scored.output
    compared = cli("compare", tmp_path / "out", tmp_path / "out", "--json")
    assert json.loads(compared.output)["comparisons"][0]["p_randomization"] == 1.0
    runs = cli("compare", tmp_path / "r.trec", tmp_path / "r.trec", "--qrels", folder / "qrels" / "test.tsv")
    assert "+0.00" in runs.output


def test_several_data_folders_are_all_evaluated(tmp_path, cli):
    folders = [small_retrieval(tmp_path / name) for name in ("one", "two")]
    ran = cli("evaluate", "bm25", "--data", folders[0], "--data", folders[1], "--json")
    assert [result["task"] for result in json.loads(ran.output)["results"]] == ["one", "two"]
    same = cli("evaluate", "bm25", "--data", folders[0], "--data", small_retrieval(tmp_path / "else" / "one"))
    assert "two tasks are named 'one'" in str(same.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "bm25", "--data", "{sts}"], "bm25 does retrieval, reranking; .* holds s \\(sts\\)"),
        (["evaluate", "bm25", "--data", "{set}", "--tasks", "SciFact"], "--tasks runs encoders"),
        (["evaluate", "bm25", "--data", "{set}", "--tasks", "SciFact", "--metric", "mrr_at_10"], "--metric cannot be"),
        (["evaluate", "m", "--data", "{set}", "--data", "{sts}", "--tasks", "SciFact"], "in one folder; got 2"),
        (["compare", "{run}", "{run}"], "add --qrels"),
        (["compare", "{set}", "{run}"], "two results folders or two TREC runs"),
    ],
)
def test_command_line_mistakes(tmp_path, cli, arguments, message):
    write_rows(tmp_path / "s" / "test.jsonl", LAYOUTS["sts"])
    (tmp_path / "run.trec").write_text("q Q0 d 1 1.0 t\n")
    places = {"sts": tmp_path / "s", "set": small_retrieval(tmp_path / "set"), "run": tmp_path / "run.trec"}
    ran = cli(*(argument.format(**places) for argument in arguments))
    assert isinstance(ran.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise ran.exception


def test_the_loss_of_a_format_is_measured_with_queries_left_in_float(tmp_path):
    import numpy as np

    from openembed.evaluation.prompts import Prompts
    from openembed.evaluation.vectors import Vectors
    from openembed.vectors import VectorFormat

    encoder, texts = WordEncoder(), ["a b c", "d e f g"]
    whole_ND, stored = encoder.encode(texts), VectorFormat(dimensions=16, precision="binary")
    vectors = Vectors(encoder, Prompts("", "", "", {}, {}), stored=stored)
    np.testing.assert_array_equal(vectors.queries(texts), VectorFormat(dimensions=16).apply(whole_ND).values_NC)
    for side in (vectors.documents, vectors.symmetric):
        np.testing.assert_array_equal(side(texts), stored.apply(whole_ND).to_float32())


def test_formats_on_the_command_line(tmp_path, cli, monkeypatch):
    import openembed

    monkeypatch.setattr(openembed, "load", lambda *_args, **_options: WordEncoder(), raising=False)
    folder = small_retrieval(tmp_path / "set")
    scores = {}
    for options in ([], ["--precision", "binary", "--dimensions", "8"], ["--precision", "int8"]):
        ran = cli(
            "evaluate", "words", "--data", folder, "--cache", tmp_path / "cache", "--out", tmp_path / "o", "--json", *options
        )
        assert ran.exit_code == 0, ran.output
        (result,) = json.loads(ran.output)["results"]
        scores[tuple(options)] = result["value"]
    assert len(scores) == 3
    refused = cli("evaluate", "words", "--data", folder, "--dimensions", "49")
    assert "dimensions 49 is more than the 48" in str(refused.exception)
    assert "of a model's vectors" in str(cli("evaluate", "bm25", "--data", folder, "--dimensions", "8").exception)
    assert "cannot be combined" in str(
        cli("evaluate", "m", "--data", folder, "--tasks", "SciFact", "--dimensions", "8").exception
    )
