import gzip

import pytest

from openembed.data.readers import (
    read_beir,
    read_corpus,
    read_run,
    read_trec_qrels,
    write_beir,
    write_run,
    write_trec_qrels,
)
from openembed.documents import read_documents
from openembed.records import Document, Query
from tests.evaluation_fakes import small_retrieval


def test_beir_round_trip(tmp_path):
    corpus = [Document("a", "one", "Title", {"url": "x"}), Document("ü 2", "zwei\nlines\ttab")]
    queries = [Query("q", "first?", {"answer": 3})]
    write_beir(tmp_path, corpus, queries, {"test": {"q": {"a": 1, "ü 2": 0}}, "dev": {"q": {"a": 2}}})
    read = read_beir(tmp_path)
    assert read == (corpus, queries, {"q": {"a": 1, "ü 2": 0}})
    assert read[0][0].metadata == {"url": "x"}
    assert read[1][0].metadata == {"answer": 3}
    assert read_beir(tmp_path, "dev")[2] == {"q": {"a": 2}}


def test_gzip_corpus(tmp_path):
    with gzip.open(tmp_path / "corpus.jsonl.gz", "wt") as file:
        file.write('{"_id": "a", "text": "one", "title": "T"}\n')
    assert read_corpus(tmp_path)[0].full_text == "T one"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "corpus.jsonl",
            '{"_id": "d1", "text": "x"}\n{"_id": "d1", "text": "y"}\n',
            r":2: duplicate id 'd1', first on line 1",
        ),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n{"_id": ', r"corpus.jsonl:2: malformed JSON"),
        ("corpus.jsonl", '{"_id": "d1"}\n', r"corpus.jsonl:1: no 'text'"),
        ("corpus.jsonl", '{"text": "x"}\n', r"corpus.jsonl:1: needs an '_id'"),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}\n', r"document 'd2' is judged for query 'q1' but not in corpus"),
        ("queries.jsonl", '{"_id": "q2", "text": "x"}\n', r"query 'q1' is judged but not in queries"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t0.5\n", r"test.tsv:2: the grade must be a whole number"),
        ("qrels/test.tsv", "q1\td1\t1\n", r"test.tsv:1: expected the header"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\n", r"test.tsv:2: expected 3 columns"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td1\t2\n", r"test.tsv:3: .* two grades"),
    ],
)
def test_faults_are_named(tmp_path, file, content, message):
    (small_retrieval(tmp_path / "set") / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_beir(tmp_path / "set")


def outcome(read):
    """What was read, or the message of the error."""
    try:
        return list(read())
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "line",
    [
        '{"_id": 7, "text": "x", "title": null, "year": 2020}',
        '\ufeff{"id": "a", "text": "", "title": "T", "metadata": {"url": "u"}}',
        '\n{"_id": "a", "text": "x"}\r\n\n{"_id": "b", "text": "line\\nand nul \\u0000"}',
        '{"_id": "a", "text": "x", "title": 3}',
        '{"_id": true, "text": "x"}',
        '{"_id": "", "text": "x"}',
        '{"_id": "a", "text": "\\ud83d"}',
        '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}',
        '{"_id": "a"}',
        "[]",
        '{"_id": "a", "text": "x"}\n\udcff',
    ],
)
def test_a_corpus_is_read_for_evaluation_as_for_an_index(tmp_path, line, packed):
    data = line.encode("utf-8", "surrogateescape")
    path = tmp_path / ("corpus.jsonl.gz" if packed else "corpus.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    found = outcome(lambda: read_corpus(tmp_path))
    assert found == outcome(lambda: read_documents(tmp_path))
    assert isinstance(found, list) or found.startswith(f"{path}:")


def test_unknown_split_lists_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="has test"):
        read_beir(small_retrieval(tmp_path / "set"), "dev")


def test_run_round_trip_keeps_scores_and_orders_ties_by_id(tmp_path):
    run = {"q": {"a": 0.1, "c": 1 / 3, "b": 1 / 3}, "p": {"a": -5.0}}
    write_run(tmp_path / "x.trec", run)
    assert read_run(tmp_path / "x.trec") == run
    assert [line.split()[2:4] for line in (tmp_path / "x.trec").read_text().splitlines()[:3]] == [
        ["c", "1"],
        ["b", "2"],
        ["a", "3"],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d 1 0.5", "x.trec:2: expected 6 columns"),
        ("q Q0 d 1 high tag", "x.trec:2: the score must be a number, got 'high'"),
        ("q Q0 d 1 nan tag", "x.trec:2: the score must be finite"),
        ("q Q0 a 1 0.5 tag", "x.trec:2: document 'a' is listed twice"),
    ],
)
def test_malformed_run_lines_are_named(tmp_path, line, message):
    (tmp_path / "x.trec").write_text(f"q Q0 a 1 0.9 tag\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "x.trec")


def test_ids_with_spaces_cannot_become_a_run(tmp_path):
    with pytest.raises(ValueError, match="white space"):
        write_run(tmp_path / "x.trec", {"q 1": {"a": 1.0}})
    assert not (tmp_path / "x.trec").exists()


def test_trec_qrels_and_beir_qrels_read_alike(tmp_path):
    qrels = {"q": {"a": 2, "b": 0}, "p": {"a": -1}}
    write_trec_qrels(tmp_path / "qrels.txt", qrels)
    write_beir(tmp_path, [], [], {"test": qrels})
    assert read_trec_qrels(tmp_path / "qrels.txt") == qrels == read_trec_qrels(tmp_path / "qrels" / "test.tsv")


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
    (tmp_path / "qrels.txt").write_text("\ufeffq 0 a 1\n", encoding="utf-8")
    assert read_trec_qrels(tmp_path / "qrels.txt") == {"q": {"a": 1}}
    (tmp_path / "x.trec").write_text("\ufeffq Q0 a 1 0.9 tag\n", encoding="utf-8")
    assert read_run(tmp_path / "x.trec") == {"q": {"a": 0.9}}


def test_broken_utf_8_is_named_by_line(tmp_path):
    (tmp_path / "x.trec").write_bytes(b"q Q0 a 1 0.9 tag\nq Q0 \xff 2 0.8 tag\n")
    with pytest.raises(ValueError, match=r"x\.trec:2: not UTF-8"):
        read_run(tmp_path / "x.trec")
