"""BM25 on real collections, through an index on disk, against the figures of the data sets' own notes."""

import csv
import math

import pytest

from openembed.documents import read_documents
from openembed.files import read_jsonl
from openembed.index.store import Store


def ndcg(qrels, run, k=10):
    values = []
    for query, grades in qrels.items():
        found = list(run.get(query, {}))[:k]
        gain = sum(grades.get(d, 0) / math.log2(rank + 2) for rank, d in enumerate(found))
        best = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(grades.values(), reverse=True)[:k]))
        values.append(gain / best)
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("name", "language", "expected"),
    [("scifact", "en", 0.6863), ("xquad/en", "en", 0.9649), ("poquad-pl", "pl", 0.877)],
)
def test_bm25_reaches_the_known_figure(shared_dir, tmp_path, name, language, expected):
    folder = shared_dir / "data" / name
    qrels = {}
    with (folder / "qrels" / "test.tsv").open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    texts = {row["_id"]: row["text"] for _, row in read_jsonl(folder / "queries.jsonl.gz") if row["_id"] in qrels}
    Store.create(tmp_path / "index", read_documents(folder), language=language)
    run = dict(zip(texts, Store(tmp_path / "index").bm25(list(texts.values()), 10), strict=True))
    assert ndcg(qrels, run) == pytest.approx(expected, abs=0.0016)
