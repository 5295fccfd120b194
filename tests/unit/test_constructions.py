import builtins
import gzip
import json
import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import source, tiny_encoder, train_config, two_sources

from openembed.data.constructions import Labelled, ScoredPair, class_examples, scored_examples, stratified
from openembed.data.mine import MineConfig, mine
from openembed.data.sources import SourceConfig, load_corpus, load_source, never_negative, without_known_positives
from openembed.records import Document, Example, Query
from openembed.seeds import generator


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(path, labels, each=5, text=True):
    return write(
        path,
        [
            {"text": f"{label} text {number}", "label": index, **({"label_text": label} if text else {})}
            for index, label in enumerate(labels)
            for number in range(each)
        ],
    )


# ---- the binary exception and label texts


def test_two_classes_fall_back_to_label_texts(tmp_path, caplog):
    binary = labelled(tmp_path / "b.jsonl", ["no", "yes"])
    config = source(name="toxic", path=str(binary), construction="class_examples")
    with caplog.at_level(logging.INFO, logger="openembed.data.sources"):
        examples = load_source(config)
    assert "source 'toxic' has two classes" in caplog.text
    assert examples == load_source(config.model_copy(update={"construction": "label_text"}))
    assert {(e.positives[0].text, e.negatives[0].text) for e in examples} == {("no", "yes"), ("yes", "no")}
    caplog.clear()
    three = load_source(source(name="s", path=str(labelled(tmp_path / "t.jsonl", "xyz")), construction="class_examples"))
    assert "two classes" not in caplog.text
    assert all(document.text.split()[1] == "text" for example in three for document in example.positives)


def test_numbers_are_no_label_texts(tmp_path):
    path = labelled(tmp_path / "b.jsonl", ["no", "yes"], text=False)
    for construction in ("label_text", "class_examples"):
        with pytest.raises(ValueError, match=r"source 's': its labels are numbers \(0, 1\).*label_texts"):
            load_source(source(name="s", path=str(path), construction=construction))


def test_invented_label_texts(tmp_path):
    path = labelled(tmp_path / "b.jsonl", "012")
    ratings = {"0": "1 star", "1": "2 stars", "2": "3 stars"}
    config = source(name="s", path=str(path), construction="label_text", label_texts=ratings)
    for example in load_source(config):
        assert example.positives[0].text == ratings[example.query.text[0]]
        assert {d.text for d in example.negatives} == set(ratings.values()) - {example.positives[0].text}
    with pytest.raises(ValueError, match=r"b\.jsonl:11: label 2 has no text in label_texts; known: 0, 1"):
        load_source(config.model_copy(update={"label_texts": {"0": "a", "1": "b"}}))


def test_rows_without_a_text_are_left_out(tmp_path, caplog):
    rows = [{"text": text, "label_text": label} for text, label in (("a", "x"), (" ", "x"), ("", "y"), ("b", "y"))]
    with caplog.at_level(logging.INFO):
        examples = load_source(source(name="s", path=str(write(tmp_path / "r.jsonl", rows)), construction="label_text"))
    assert [example.query.text for example in examples] == ["a", "b"]
    assert "2 rows without a text" in caplog.text


# ---- several categories


CATEGORIES = ["cs.CL cs.AI", "cs.AI", "math.PR stat.TH cs.AI", "math.PR", "stat.TH", "cs.CL", "q-bio", "math.PR"]


@pytest.fixture(params=["string", "list"])
def papers(request, tmp_path):
    values = CATEGORIES if request.param == "string" else [text.split() for text in CATEGORIES]
    rows = [{"title": f"paper {number}", "cats": value} for number, value in enumerate(values)]
    path = write(tmp_path / "papers.jsonl", rows)
    separator = " " if request.param == "string" else None
    return {"path": str(path), "columns": {"text": "title", "categories": "cats"}, "separator": separator}


def test_positives_are_all_categories_and_negatives_none_of_them(papers):
    examples = load_source(source(name="s", construction="label_text", **papers))
    every = {name for text in CATEGORIES for name in text.split()}
    for example, text in zip(examples, CATEGORIES, strict=True):
        assert [document.text for document in example.positives] == text.split()
        assert {document.text for document in example.negatives} == every - set(text.split())


def test_class_examples_share_the_main_category_and_negatives_none(papers):
    examples = load_source(source(name="s", construction="class_examples", **papers))
    categories = {f"paper {number}": text.split() for number, text in enumerate(CATEGORIES)}
    assert {e.query.text for e in examples} == {"paper 0", "paper 5", "paper 2", "paper 3", "paper 7"}
    for example in examples:
        own = categories[example.query.text]
        assert all(categories[d.text][0] == own[0] for d in example.positives)
        assert example.negatives
        assert all(set(own).isdisjoint(categories[d.text]) for d in example.negatives)


# ---- stratified sampling


@given(st.lists(st.sampled_from("abcde"), min_size=1, max_size=60), st.data(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_stratified_keeps_shares(labels, data, seed):
    count = data.draw(st.integers(1, len(labels)))
    chosen = stratified(labels, count, generator(seed, "x"))
    assert chosen == stratified(labels, count, generator(seed, "x"))
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == sorted(chosen)
    have, sizes = Counter(labels[place] for place in chosen), Counter(labels)
    if count >= len(sizes):
        assert set(have) == set(sizes)
    for label, size in sizes.items():
        share = size * count / len(labels)
        assert have[label] <= max(1, share + 1)
        assert have[label] <= size
        if all(n * count / len(labels) >= 1 for n in sizes.values()):
            assert share - 1 < have[label] < share + 1


@pytest.mark.parametrize("construction", ["label_text", "class_examples"])
def test_count_cuts_a_labelled_source_by_label(tmp_path, construction):
    rows = [
        {"text": f"{label} {n}", "label_text": label} for label, size in (("a", 60), ("b", 30), ("c", 10)) for n in range(size)
    ]
    config = source(name="s", path=str(write(tmp_path / "r.jsonl", rows)), construction=construction, count=20)
    examples = load_source(config, seed=5)
    assert Counter(example.query.text[0] for example in examples) == {"a": 12, "b": 6, "c": 2}
    assert examples == load_source(config, seed=5)
    assert {e.query.text for e in examples} != {e.query.text for e in load_source(config, seed=6)}
    if construction == "class_examples":
        documents = {d.text for e in examples for d in (*e.positives, *e.negatives)}
        assert len(documents) > 20, "texts that were not drawn as queries are documents still"


# ---- scored pairs and what is never their negative


SCORED = [
    ("the cat sat on the mat", "a cat sat on a mat", 4.8),
    ("the cat sat on the mat", "the cat sat on the sofa", 3.0),
    ("the cat sat on the mat", "the cat slept on the mat", 2.5),
    ("the cat sat on the mat", "the cat sat by the door mat", None),
    ("a dog ran in the park", "the dog ran in the park", 4.2),
    ("the cat sat by the door mat", "a mat for the door", 1.0),
]


@pytest.fixture
def scored(tmp_path):
    rows = [{"sentence1": a, "sentence2": b, "score": score} for a, b, score in SCORED if score is not None]
    return source(name="sts", path=str(write(tmp_path / "sts.jsonl", rows)), construction="scored_pairs")


def test_documents_scored_as_similar_are_known(scored):
    similar = never_negative(scored)
    query = Example(Query("", "The cat sat  on the mat"), (Document("", "x"),))
    assert similar(query, Document("", "the cat sat on the sofa"))
    assert not similar(query, Document("", "the cat slept on the mat")), "a score of 2.5 is no more than 2.5"
    assert not similar(query, Document("", "the cat sat by the door mat")), "no score, no objection"
    assert similar(Example(Query("", "the cat sat on the sofa"), ()), Document("", "the cat sat on the mat"))
    assert never_negative(source(name="s", path="x")) is None


def test_mining_scored_pairs_skips_rank_one_and_what_is_known_to_be_similar(scored):
    examples = load_source(scored)
    assert [(e.query.text[:5], e.positives[0].text[:5]) for e in examples] == [
        ("the c", "a cat"),
        ("a cat", "the c"),
        ("a dog", "the d"),
        ("the d", "a dog"),
    ]
    corpus = load_corpus(scored)
    assert len(corpus) == len({text for a, b, score in SCORED for text in (a, b)})
    config = MineConfig(teacher="bm25", keep=20, skip=1, filter={"kind": "none"})
    free = mine(examples, corpus, config)
    mined = mine(examples, corpus, config, exclude=never_negative(scored))
    before, after = ([d.text for d in run.examples[0].negatives] for run in (free, mined))
    assert "the cat sat on the sofa" in before
    assert after == [text for text in before if text != "the cat sat on the sofa"]
    assert "the cat slept on the mat" in after
    assert mined.notes[0]["mined"]["ranks"][0] >= 2


def test_a_mine_stage_does_so_by_itself(scored, tmp_path):
    from openembed.recipe.config import load_recipe
    from openembed.recipe.run import run_recipe

    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'[source.sts]\npath = "{scored.path}"\nconstruction = "scored_pairs"\n[stage.mine]\ndo = "mine"\n'
        'sources = ["sts"]\nskip = 1\nfilter = { kind = "none" }\n'
    )
    run_recipe(load_recipe(recipe), tmp_path / "out", device="cpu")
    first, *_ = load_source(source(name="sts", path=str(tmp_path / "out" / "mine" / "sts.jsonl")))
    negatives = [document.text for document in first.negatives]
    assert "the cat slept on the mat" in negatives
    assert "the cat sat on the sofa" not in negatives


def test_a_positive_of_the_same_query_is_no_negative_in_any_source():
    def example(query, positive, negatives, source, scores=()):
        return Example(
            Query("", query), (Document("", positive),), tuple(Document("", n) for n in negatives), source, (), scores
        )

    given = {
        "a": [example("Q one", "x", ["y ", "z", "w"], "a", (0.3, 0.2, 0.1)), example("other", "x", ["y"], "a")],
        "b": [example("q  one", "Y", ["x", "v"], "b"), example("q one", "w", [], "b")],
    }
    found = without_known_positives(given)
    assert found["a"][0] == example("Q one", "x", ["z"], "a", (0.2,))
    assert found["a"][1] is given["a"][1]
    assert found["b"] == [example("q  one", "Y", ["v"], "b"), given["b"][1]]


# ---- files


def test_parquet_jsonl_and_folders_of_them_give_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"query": f"q{n}", "positives": [f"p{n}", f"r{n}"], "negatives": []} for n in range(6)]
    expected = load_source(source(name="s", path=str(write(tmp_path / "all.jsonl", rows))))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "all.parquet")
    assert load_source(source(name="s", path=str(tmp_path / "all.parquet"))) == expected
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "a.jsonl", rows[:2])
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows[2:3]))
    parquet.write_table(pyarrow.Table.from_pylist(rows[3:]), folder / "c.parquet")
    (folder / "README.md").write_text("about")
    assert load_source(source(name="s", path="shards"), tmp_path) == expected


def test_parquet_errors_are_clear(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"source 's': .*x\.parquet: cannot be read as Parquet"):
        load_source(source(name="s", path="x.parquet"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds neither a BEIR corpus nor files that end in \.jsonl"):
        load_source(source(name="s", path="empty"), tmp_path)
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"reading Parquet needs pyarrow: pip install 'openembed\[eval\]'"):
        load_source(source(name="s", path="x.parquet"), tmp_path)


def test_columns_may_be_joined(tmp_path):
    rows = [{"title": "t", "body": "b", "answer": "a"}, {"title": "u", "body": None, "answer": "c"}]
    path = write(tmp_path / "x.jsonl", rows)
    config = source(name="s", path=str(path), columns={"query": ["title", "body"], "positive": "answer"})
    assert [example.query.text for example in load_source(config)] == ["t b", "u"]


def test_passages_of_miracl_and_mrtydi(tmp_path):
    row = {
        "query": "q",
        "positive_passages": [{"docid": "7#1", "title": "T", "text": "x"}],
        "negative_passages": [{"docid": "8#1", "title": "", "text": "y"}],
    }
    columns = {"positives": "positive_passages", "negatives": "negative_passages"}
    (example,) = load_source(source(name="s", path=str(write(tmp_path / "x.jsonl", [row])), columns=columns))
    assert (example.positives, example.negatives) == ((Document("7#1", "x", "T"),), (Document("8#1", "y"),))


# ---- epochs


def test_epochs_are_steps_over_the_rows_of_the_mixture():
    data = {"sources": [{"name": "a", "path": "x", "weight": 2.0, "cap": 15}, {"name": "b", "path": "x"}]}
    config = train_config(steps=None, epochs=1.5, data=data, batch={"size": 6, "accumulation": 2})
    examples = {"a": [None] * 10, "b": [None] * 11}
    assert config.with_steps(examples).steps == 4  # 1.5 × (15 + 11) = 39 rows in steps of 12
    assert config.with_steps(examples).epochs is None
    assert train_config(steps=5).with_steps({}).steps == 5
    for lengths in ({"steps": 3, "epochs": 1}, {"steps": None, "epochs": None}):
        with pytest.raises(ValueError, match="give either steps or epochs"):
            train_config(**lengths)


def test_training_by_epochs_turns_where_the_schedule_says(tmp_path):
    from openembed.train.loop import train

    data = {
        "sources": [{"name": name, "path": "unused"} for name in ("first", "second")],
        "mixing": [{"kind": "homogeneous", "until": 0.5}, {"kind": "blended"}],
    }
    config = train_config(steps=None, epochs=1, data=data, batch={"size": 4, "negatives": 1})
    result = train(config, tiny_encoder(tmp_path / "tokenizer"), tmp_path / "run", examples=two_sources())
    rows = [json.loads(line)["rows_by_source"] for line in result.metrics.read_text().splitlines()]
    assert result.steps == len(rows) == 6  # 13 + 9 rows, 4 a step
    assert [len(counts) for counts in rows[:3]] == [1, 1, 1]
    assert max(len(counts) for counts in rows[3:]) == 2
    again = train(config, tiny_encoder(tmp_path / "tokenizer"), tmp_path / "run", examples=two_sources())
    assert again.resumed_from == 6


def test_float_labels_are_the_numbers_they_are(tmp_path):
    rows = [{"text": "a", "label": 0.0}, {"text": "b", "label": 1.0}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"name": "s", "path": str(tmp_path / "rows.jsonl"), "construction": "label_text"}
    with pytest.raises(ValueError, match="cannot be documents"):
        load_source(SourceConfig(**config))
    found = load_source(SourceConfig(**config, label_texts={"0": "bad", "1": "good"}))
    assert [example.positives[0].text for example in found] == ["bad", "good"]


def test_a_mapped_column_comes_before_one_of_the_fields_other_name(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "q", "answer": "right", "positives": ["wrong"]}) + "\n")
    config = SourceConfig(name="s", path=str(tmp_path / "rows.jsonl"), columns={"positive": "answer"})
    assert [document.text for document in load_source(config)[0].positives] == ["right"]


def test_a_text_is_never_its_own_positive_or_negative():
    random = np.random.default_rng(0)
    rows = [Labelled("same", ("a",)), Labelled("same", ("a",)), Labelled("other", ("a",)), Labelled("same", ("b",))]
    made = class_examples(rows, range(3), "s", random)
    assert [(e.query.text, [d.text for d in e.positives]) for e in made] == [
        ("same", ["other"]),
        ("same", ["other"]),
        ("other", ["same", "same"]),
    ]
    assert all(document.text != example.query.text for example in made for document in example.negatives)
    assert class_examples(rows[:2], range(2), "s", random) == []
    assert scored_examples([ScoredPair("x", "x", 5.0)], 4.0, "s") == []
