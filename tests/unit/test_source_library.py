"""Every data set of the library reads rows with the columns it declares, from files and from the hub, pinned."""

import json

import pytest

from openembed.config import parse
from openembed.data.library import EVIDENCE, VERSIONS, library, resolve
from openembed.data.sources import SourceConfig, load_corpus, load_source
from openembed.recipe.config import load_recipe

CASES = [(name, version) for name, entry in library().items() for version in VERSIONS if getattr(entry, version) is not None]
LABELS = ("one", "two", "three")


def cells(field, number):
    """What a column of the public set holds for ``field`` in row ``number``."""
    label = number % 3
    return {
        "score": [1.0, 4.0, 3.0, 4.5][number % 4],
        "label": label,
        "label_text": LABELS[label],
        "categories": f"{LABELS[label]} {LABELS[(label + 1) % 3]}" if number % 2 else LABELS[label],
    }.get(field, f"{field} {number}")


def public_rows(config, count=12):
    columns = config.columns or {field: field for field in ("query", "positives")}
    rows = []
    for number in range(count):
        row = {}
        for field, names in columns.items():
            for part, name in enumerate([names] if isinstance(names, str) else names):
                row[name] = cells(field, number) if isinstance(names, str) else f"{field} {number} part {part}"
        rows.append(row)
    return rows


def beir_tables():
    corpus = [{"_id": f"d{n}", "title": f"title {n}", "text": f"document {n}"} for n in range(5)]
    queries = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(4)]
    qrels = [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": float(n != 2)} for n in range(3)]
    return corpus, queries, qrels


def is_beir(config):
    return (config.hub.layout == "beir") if config.hub else not config.columns and not config.path.endswith(".jsonl")


def local(config, folder):
    """A small local copy of the public set, and the source that reads it."""
    if is_beir(config):
        corpus, queries, qrels = beir_tables()
        for name, rows in (("corpus", corpus), ("queries", queries)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "qrels").mkdir()
        lines = "".join(f"{row['query-id']}\t{row['corpus-id']}\t{int(row['score'])}\n" for row in qrels)
        (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
        return folder
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in public_rows(config)))
    return path


def check(config, examples):
    texts = [example.query.text for example in examples]
    if is_beir(config):
        assert [(e.query.text, e.positives[0].full_text) for e in examples] == [
            ("query 0", "title 0 document 0"),
            ("query 1", "title 1 document 1"),
        ]
    elif config.construction == "scored_pairs":
        pairs = [(f"sentence1 {n}", f"sentence2 {n}") for n in (1, 3, 5, 7, 9, 11)]
        assert {(e.query.text, e.positives[0].text) for e in examples} == {*pairs, *[(b, a) for a, b in pairs]}
    elif config.construction == "pairs":
        field = "positive" if "positive" in config.columns else "positives"
        assert [(e.query.text, e.positives[0].text) for e in examples] == [(f"query {n}", f"{field} {n}") for n in range(12)]
        negatives = [f"negative {n}" for n in range(12)] if "negative" in config.columns else []
        assert [d.text for e in examples for d in e.negatives] == negatives
    else:
        joined = not isinstance(config.columns["text"], str)
        expected = {f"text {n} part 0 text {n} part 1" if joined else f"text {n}" for n in range(12)}
        assert set(texts) == expected
        documents = {d.text for e in examples for d in (*e.positives, *e.negatives)}
        words = set(config.label_texts.values()) & {"1 star", "2 stars", "3 stars"} or set(LABELS)
        assert documents == (words if config.construction == "label_text" else expected)
        for example in examples:
            own = {d.text for d in example.positives} | {d.id for d in example.positives}
            assert own.isdisjoint({d.text for d in example.negatives} | {d.id for d in example.negatives})


@pytest.mark.parametrize(("name", "version"), CASES)
def test_reads_a_local_copy_with_the_columns_of_the_public_set(name, version, tmp_path):
    public = library()[name].config(version)
    table = resolve(name, {"use": name, "path": str(local(public, tmp_path))}, version)
    config = parse(SourceConfig, table, "test")
    assert config.hub is None
    assert (config.instruction, config.construction, config.licence) == (
        public.instruction,
        public.construction,
        public.licence,
    )
    check(public, load_source(config, seed=3))


@pytest.mark.parametrize(("name", "version"), [case for case in CASES if library()[case[0]].config().hub])
def test_asks_the_hub_for_the_pinned_revision(name, version, monkeypatch):
    datasets = pytest.importorskip("datasets")
    config = library()[name].config(version)
    asked = []

    def load(path, configuration=None, *, split, revision=None, data_files=None):
        asked.append((path, revision, data_files))
        if not is_beir(config):
            return datasets.Dataset.from_list(public_rows(config))
        corpus, queries, qrels = beir_tables()
        if configuration == "corpus":
            return datasets.Dataset.from_list(corpus)
        return datasets.Dataset.from_list(queries if configuration == "queries" else qrels)

    monkeypatch.setattr(datasets, "load_dataset", load)
    check(config, load_source(config, seed=3))
    hub = config.hub
    if hub.file:
        assert asked == [("json", None, f"hf://datasets/{hub.id}@{hub.revision}/{hub.file}")]
    else:
        assert {row[:2] for row in asked} == {(hub.id, hub.revision)}
    if is_beir(config):
        assert [document.full_text for document in load_corpus(config)][4] == "title 4 document 4"


def test_only_these_are_not_pinned():
    without = {name for name, entry in library().items() if entry.config().hub and not entry.config().hub.revision}
    assert without == {"squad", "medrxiv_p2p", "medrxiv_s2s"}


def test_revisions_are_those_that_mteb_evaluates_on():
    mteb = pytest.importorskip("mteb")
    ours = {}
    for entry in library().values():
        hub = entry.config().hub
        if hub and hub.id.startswith("mteb/") and not hub.file and "raw_" not in hub.id:
            ours[entry.title + "Classification" * (entry.family == "classification")] = (hub.id, hub.revision)
    theirs = {name: tuple(mteb.get_task(name).metadata.dataset[key] for key in ("path", "revision")) for name in ours}
    assert len(ours) == 20
    assert ours == theirs


def test_every_entry_says_what_a_reader_must_know():
    for name, entry in library().items():
        summary = entry.summary
        assert summary["title"], name
        assert summary["licence"] or name == "synthetic", name
        assert summary["instruction"] or name == "synthetic", name
        assert set(entry.evidence) <= set(EVIDENCE), name
        assert summary["hub"] or entry.note or entry.family == "clustering", f"{name}: say where to get it"
        assert entry.family == "retrieval" or not summary["in_batch"], name


RECIPE = """
library = "v2"
[source.claims]
use = "scifact"
count = 5
[source.nq]
path = "mine.jsonl"
[source.emotion]
count = 7
[stage.train]
do = "train"
start = "folder"
steps = 1
data.sources = ["claims", "nq", "emotion", "fiqa"]
"""


def test_a_recipe_takes_sources_by_name_and_overrides_their_keys(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE)
    claims, own, emotion, fiqa = load_recipe(path).stage["train"].data.sources
    assert (claims.name, claims.hub.id, claims.count) == ("claims", "mteb/scifact", 5)
    assert (own.name, own.path, own.hub, own.instruction) == ("nq", "mine.jsonl", None, "")
    assert (emotion.count, emotion.construction) == (7, "class_examples")
    assert fiqa == library()["fiqa"].config("v2")
    path.write_text(RECIPE.replace('"v2"', '"v1"'))
    emotion = load_recipe(path).stage["train"].data.sources[2]
    assert (emotion.count, emotion.construction) == (7, "label_text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"scifact"', '"scifcat"'), r"source\.claims\.use: no such entry .*'scifcat'.*openembed recipe sources"),
        (('library = "v2"', 'library = "v3"'), r"library: expected v1 or v2 \(got 'v3'\)"),
        (('"fiqa"]', '"fiqqa"]'), r"no table \[source\.fiqqa\].*known: claims, and `openembed recipe sources`"),
        (("count = 7", "cuont = 7"), r"source\.source\.emotion\.cuont|source\.emotion\.cuont"),
    ],
)
def test_wrong_names_are_named(tmp_path, change, message):
    path = tmp_path / "r.toml"
    path.write_text(RECIPE.replace(*change))
    with pytest.raises(ValueError, match=message):
        load_recipe(path)
