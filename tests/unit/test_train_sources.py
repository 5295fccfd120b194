import gzip
import json

import pytest
from tiny_training import source

from openembed.data.examples import write_examples
from openembed.data.sources import load_source
from openembed.records import Document, Example, Query


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def test_pairs_with_renamed_columns(tmp_path):
    rows = [
        {"premise": "a", "entailment": "b", "contradiction": ["c", "d"]},
        {"premise": "e", "entailment": {"id": "7", "title": "t", "text": "f"}, "contradiction": []},
    ]
    config = source(
        name="nli",
        path=write(tmp_path / "x.jsonl", rows),
        columns={"query": "premise", "positive": "entailment", "negative": "contradiction"},
    )
    first, second = load_source(config, tmp_path)
    assert (first.query.text, first.positives[0].text, [d.text for d in first.negatives]) == ("a", "b", ["c", "d"])
    assert (second.positives, second.negatives, second.source) == ((Document("7", "f", "t"),), (), "nli")


def test_written_examples_come_back(tmp_path):
    examples = [
        Example(Query("1", "q"), (Document("p", "x", "t"),), (Document("n", "y"), Document("m", "z")), "s", (0.9,), (0.5, 0.2)),
        Example(Query("2", "r"), (Document("p", "x"),), (), "s"),
    ]
    write_examples(tmp_path / "e.jsonl", examples, [{"mined": {"ranks": [1, 2]}}, {}])
    assert load_source(source(name="s", path="e.jsonl"), tmp_path) == examples


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "a", "positive": "b"}, r"x.jsonl:1: no 'query'; fields here: positive, q"),
        ({"query": "a"}, "x.jsonl:1: no 'positive'"),
        ({"query": "a", "positive": 3}, "x.jsonl:1: positive: expected a text"),
        ({"query": "a", "positive": "b", "negatives": ["x", {"text": "y", "score": 1}]}, "1 of 2 documents have a score"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_source(source(name="s", path=write(tmp_path / "x.jsonl", [row])), tmp_path)


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"source 's': .*nothing.jsonl: no such file"):
        load_source(source(name="s", path="nothing.jsonl"), tmp_path)
    with pytest.raises(ValueError, match="source 's': no examples"):
        load_source(source(name="s", path=write(tmp_path / "x.jsonl", [])), tmp_path)
    path = write(tmp_path / "y.jsonl", [{"query": "a"}])
    with pytest.raises(ValueError, match="no column 'premise'"):
        load_source(source(name="s", path=path, columns={"query": "premise"}), tmp_path)


def test_unreachable_hub_is_named(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_args, **_options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"source 's': hub data set 'a/b' cannot be loaded \(ConnectionError: no route"):
        load_source(source(name="s", hub={"id": "a/b"}))


def test_beir_folder(tmp_path):
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        for number in range(4):
            file.write(json.dumps({"_id": f"d{number}", "title": "t" * number, "text": f"text {number}"}) + "\n")
    write(tmp_path / "queries.jsonl", [{"_id": f"q{number}", "text": f"query {number}"} for number in range(3)])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td1\t2\nq1\td2\t0\nq2\td3\t1\n")
    first, second = load_source(source(name="s", path=tmp_path.name), tmp_path.parent)
    assert [document.id for document in first.positives] == ["d0", "d1"]
    assert (second.query.id, [document.full_text for document in second.positives]) == ("q2", ["ttt text 3"])
    with pytest.raises(ValueError, match=r"source 's': .*qrels/dev.tsv: no such split"):
        load_source(source(name="s", path=tmp_path.name, split="dev"), tmp_path.parent)
    (tmp_path / "qrels" / "bad.tsv").write_text("query-id\tcorpus-id\tscore\nq2\tgone\t1\n")
    with pytest.raises(ValueError, match=r"source 's': .*document 'gone' is judged"):
        load_source(source(name="s", path=tmp_path.name, split="bad"), tmp_path.parent)


def labelled(tmp_path, labels):
    rows = [
        {"text": f"{label} text {number}", "label": index, "label_text": label}
        for index, label in enumerate(labels)
        for number in range(5)
    ]
    return write(tmp_path / "labels.jsonl", rows)


def test_label_text(tmp_path):
    binary = load_source(source(name="s", path=labelled(tmp_path, "xy"), construction="label_text"), tmp_path)
    assert len(binary) == 10
    assert all(len(example.negatives) == 1 for example in binary)
    many = load_source(source(name="s", path=labelled(tmp_path, "uvwxyz"), construction="label_text"), tmp_path)
    for example in many:
        label = example.query.text[0]
        assert example.positives[0].text == label
        assert sorted(document.text for document in example.negatives) == sorted(set("uvwxyz") - {label})


def test_class_examples(tmp_path):
    config = source(name="s", path=labelled(tmp_path, "uvw"), construction="class_examples")
    examples = load_source(config, tmp_path, seed=4)
    assert examples == load_source(config, tmp_path, seed=4)
    assert examples != load_source(config, tmp_path, seed=5)
    for example in examples:
        label = example.query.text[0]
        assert {document.text[0] for document in example.positives} == {label}
        assert example.query.text not in {document.text for document in example.positives}
        assert len(example.positives) == 4
        assert label not in {document.text[0] for document in example.negatives}
        assert example.negatives


def test_scored_pairs_both_directions_and_count(tmp_path):
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "score": n} for n in range(6)]
    config = source(name="s", path=write(tmp_path / "x.jsonl", rows), construction="scored_pairs")
    pairs = [(e.query.text, e.positives[0].text) for e in load_source(config, tmp_path)]
    assert pairs == [("a4", "b4"), ("b4", "a4"), ("a5", "b5"), ("b5", "a5")]
    capped = config.model_copy(update={"count": 3})
    assert len(load_source(capped, tmp_path)) == 3
    assert load_source(capped, tmp_path, seed=1) == load_source(capped, tmp_path, seed=1)


@pytest.mark.parametrize("score", ['"high"', "null", "NaN", "true"])
def test_a_score_that_is_no_number_is_named(tmp_path, score):
    (tmp_path / "s.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "score": ' + score + "}\n")
    config = source(name="s", path=str(tmp_path / "s.jsonl"), construction="scored_pairs")
    with pytest.raises(ValueError, match=r"s\.jsonl:1: 'score' must be a number"):
        load_source(config)
