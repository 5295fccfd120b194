"""Builds what openembed-nano is trained on: python tools/build_nano_data.py SHARED_DATA OUT.

``OUT/texts.jsonl.gz``: unlabelled sentences, paragraphs and questions of the training splits named in
``src/openembed/nano/README.md``; ``OUT/train/*.jsonl.gz``: labelled examples of the same sets; ``OUT/sets``: a link to
SHARED_DATA, for the evaluation sets. The same input gives the same bytes. Evaluation texts are not removed here: that is
the recipe's first stage, which reports what it removed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from build_demo_data import (
    CAPTION_SOURCES,
    Row,
    cut_words,
    grouped,
    nli,
    normalised,
    read_beir,
    read_jsonl,
    sample,
    scored,
    write_jsonl,
)

TEXTBOOK_SENTENCES, BOOK_SENTENCES, MEDICAL_SENTENCES, FUNCTIONS = 120_000, 50_000, 25_000, 5_000
PARAGRAPH_WORDS, ANSWER_WORDS, FUNCTION_WORDS = 128, 100, 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the data sets (prose-textbooks, medquad, ...)")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    texts: dict[str, str] = {}
    for text in gather(data):
        text = " ".join(text.split())
        if len(text) >= 4:
            texts.setdefault(normalised(text), text)
    order = sorted(texts.values())
    random.Random("nano texts").shuffle(order)
    write_jsonl(out / "texts.jsonl.gz", [{"_id": str(number), "text": text} for number, text in enumerate(order)])
    counts = {"texts": len(order)}
    for name, rows in examples(data).items():
        write_jsonl(out / "train" / f"{name}.jsonl.gz", rows)
        counts[name] = len(rows)
    (out / "sets").unlink(missing_ok=True)
    (out / "sets").symlink_to(data.resolve())
    print(json.dumps(counts, indent=2))


def examples(data: Path) -> dict[str, list[Row]]:
    """The labelled training rows by source."""
    books = data / "prose-textbooks"
    sections = {row["_id"]: cut_words(str(row["text"]), PARAGRAPH_WORDS) for row in read_jsonl(books / "sections.jsonl.gz")}
    pairs = [row for row in read_jsonl(books / "pairs.jsonl.gz") if row["split"] == "train" and row.get("coverage", 1.0) >= 0.3]
    glossary = [row for row in read_jsonl(books / "glossary.jsonl.gz") if row["split"] == "train"]
    captions = (row for row in read_jsonl(data / "stsb" / "en" / "train.jsonl.gz") if row["source"] in CAPTION_SOURCES)
    return {
        "textbooks": grouped((str(row["query"]), sections[row["pos"]]) for row in pairs),
        "glossary": grouped((str(row["term"]), str(row["definition"])) for row in glossary),
        "medquad": questions(data / "medquad", ANSWER_WORDS),
        "squad": questions(data / "squad-sentences", ANSWER_WORDS),
        "code": questions(data / "code-docstrings", FUNCTION_WORDS),
        "pubmedqa": questions(data / "pubmedqa", PARAGRAPH_WORDS),
        "nli": nli(data / "nli-pairs"),
        "captions": [scored(row) for row in captions],
        "banking77": list(read_jsonl(data / "banking77" / "train.jsonl.gz")),
    }


def questions(folder: Path, words: int) -> list[Row]:
    """The training questions of a BEIR folder and the documents judged for them, cut to ``words``."""
    corpus, queries, qrels = read_beir(folder, ("train",))
    return grouped(
        (str(queries[query]["text"]), cut_words(str(corpus[key]["text"]), words))
        for query in qrels["train"]
        for key in sorted(qrels["train"][query])
    )


def gather(data: Path) -> Iterator[str]:
    yield from textbooks(data / "prose-textbooks")
    yield from books(data / "prose-books")
    yield from medquad(data / "medquad")
    for name, functions in (("squad-sentences", None), ("code-docstrings", FUNCTIONS), ("pubmedqa", None)):
        yield from judged(data / name, functions)
    yield from (str(row["text"]) for row in read_jsonl(data / "banking77" / "train.jsonl.gz"))
    captions = (row for row in read_jsonl(data / "stsb" / "en" / "train.jsonl.gz") if row["source"] in CAPTION_SOURCES)
    yield from (str(row[field]) for row in captions for field in ("sentence1", "sentence2"))
    for row in read_jsonl(data / "nli-pairs" / "triples.jsonl.gz"):
        yield from (str(row[field]) for field in ("premise", "entailment", "contradiction"))


def textbooks(folder: Path) -> Iterator[str]:
    sections = [str(row["text"]) for row in read_jsonl(folder / "sections.jsonl.gz") if row["split"] == "train"]
    yield from sample(list(sentences(sections)), TEXTBOOK_SENTENCES, "textbook sentences")
    yield from (cut_words(text, PARAGRAPH_WORDS) for text in sections)
    yield from (str(row["query"]) for row in read_jsonl(folder / "pairs.jsonl.gz") if row["split"] == "train")
    for row in read_jsonl(folder / "glossary.jsonl.gz"):
        if row["split"] == "train":
            yield from (str(row["term"]), str(row["definition"]))


def books(folder: Path) -> Iterator[str]:
    texts = (str(row["text"]) for row in read_jsonl(folder / "train.jsonl.gz"))
    yield from sample(list(sentences(texts)), BOOK_SENTENCES, "book sentences")


def medquad(folder: Path) -> Iterator[str]:
    corpus, queries, qrels = read_beir(folder, ("train",))
    answers = [str(corpus[key]["text"]) for key in sorted({key for keys in qrels["train"].values() for key in keys})]
    yield from (str(queries[query]["text"]) for query in qrels["train"])
    yield from (cut_words(text, ANSWER_WORDS) for text in answers)
    yield from sample(list(sentences(answers)), MEDICAL_SENTENCES, "medical sentences")


def judged(folder: Path, most: int | None) -> Iterator[str]:
    """The training questions of a BEIR folder and (``most`` of) the documents judged for them."""
    corpus, queries, qrels = read_beir(folder, ("train",))
    yield from (str(queries[query]["text"]) for query in qrels["train"])
    found = sorted({key for keys in qrels["train"].values() for key in keys})
    yield from (cut_words(str(corpus[key]["text"]), FUNCTION_WORDS) for key in sample(found, most or len(found), folder.name))


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Sentences of 5 to 60 words, cut at full stops, question and exclamation marks."""
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])[\"”’)]?\s+", " ".join(text.split())):
            if 5 <= len(sentence.split()) <= 60:
                yield sentence


if __name__ == "__main__":
    main()
