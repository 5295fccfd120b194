"""The demo's data: well-formed, free to redistribute, and clean of evaluation texts."""

import gzip
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "src" / "openembed" / "demo"
TRAIN = sorted((DEMO / "data" / "train").glob("*.jsonl.gz"))
RETRIEVAL = ["textbooks", "medquad", "scifact"]
TEXTS = ("query", "positive", "positives", "negative", "text", "sentence1", "sentence2")


def rows(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def texts_of(row):
    values = [row[field] for field in TEXTS if field in row]
    return [text for value in values for text in (value if isinstance(value, list) else [value])]


def normalised(text):
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def beir(name):
    folder = DEMO / "data" / "eval" / name
    lines = (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "query-id\tcorpus-id\tscore"
    return rows(folder / "corpus.jsonl.gz"), rows(folder / "queries.jsonl.gz"), [line.split("\t") for line in lines[1:]]


@pytest.fixture(scope="module")
def evaluation_texts():
    texts = {row[f] for row in rows(DEMO / "data/eval/captions/test.jsonl.gz") for f in ("sentence1", "sentence2")}
    texts |= {row["text"] for row in rows(DEMO / "data/eval/banking77/test.jsonl.gz")}
    for name in RETRIEVAL:
        corpus, queries, _ = beir(name)
        texts |= {row["text"] for row in [*corpus, *queries]}
        texts |= {f"{row['title']} {row['text']}" for row in corpus}
    return {normalised(text) for text in texts}


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.name)
def test_no_evaluation_text_is_trained_on(path, evaluation_texts):
    trained = {normalised(text) for row in rows(path) for text in texts_of(row)}
    assert trained
    assert not trained & evaluation_texts


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_folders_are_whole(name):
    corpus, queries, judgements = beir(name)
    documents, asked = {row["_id"] for row in corpus}, {row["_id"] for row in queries}
    assert len(documents) == len(corpus) >= 1000
    assert len(asked) == len(queries) == 300
    assert {query for query, _, _ in judgements} == asked
    assert {document for _, document, _ in judgements} <= documents
    assert len({normalised(row["text"]) for row in corpus}) == len(corpus), "two documents have the same text"


def test_banking77_has_every_intent_in_both_splits():
    train, test = (rows(DEMO / f"data/eval/banking77/{split}.jsonl.gz") for split in ("train", "test"))
    assert {row["label"] for row in train} == {row["label"] for row in test} == set(range(77))
    assert len(test) == 3080


def test_caption_scores_are_in_range():
    for row in rows(DEMO / "data/eval/captions/test.jsonl.gz") + rows(DEMO / "data/train/captions.jsonl.gz"):
        assert 0 <= row["score"] <= 5


def test_counts_file_says_what_is_there():
    counts = json.loads((DEMO / "data" / "counts.json").read_text())
    assert counts["train"] == {path.name.removesuffix(".jsonl.gz"): len(rows(path)) for path in TRAIN}
    readme = (DEMO / "README.md").read_text(encoding="utf-8")
    for name, count in counts["train"].items():
        assert re.search(rf"\| `{name}` \| {count:,} \|", readme), f"README.md does not give {name} {count:,} rows"


def test_notice_names_every_source_with_a_free_licence():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    sections = dict(re.findall(r"\n\d+\. [^\n]*\(([^)]*)\)\n(.*?)(?=\n\d+\. |\Z)", notice, re.S))
    covered = {name.strip() for names in sections for name in names.split(",")}
    assert covered == {path.name.removesuffix(".jsonl.gz") for path in TRAIN}
    for names, text in sections.items():
        assert "Authors:" in text, names
        assert "Source: http" in text, names
        assert re.search(r"Licence: [^.]*Creative Commons Attribution", text), names
    assert not re.search(r"non-?commercial|research use|GPL", notice, re.I)


def test_package_metadata_names_the_licences_of_the_data():
    licence = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"]
    assert set(licence.split(" AND ")) == {"Apache-2.0", "CC-BY-4.0", "CC-BY-SA-4.0", "ODC-By-1.0"}


def test_notice_pins_every_textbook_repository():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert len(set(re.findall(r"osbooks-[a-z-]+ +([0-9a-f]{40})", notice))) == 14


def test_demo_folder_stays_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 4_200_000


def test_tokenizer_begins_texts_and_treats_words_alike():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 8192
    assert [tokenizer.id_to_token(number) for number in (0, 1)] == ["<s>", "</s>"]
    pieces = tokenizer.encode("Diabetes\ndiabetes diabetes").tokens
    assert pieces[0] == "<s>"
    assert len(set(pieces[1:])) == 1
