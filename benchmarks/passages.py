"""Writes real passages of one or two sentences from the shared data sets, and real questions, as JSON lines.

    python benchmarks/passages.py OUT --count 1000000

``OUT/passages.jsonl`` holds distinct passages in a random but fixed order, each with its source, year (books) and words as
metadata; ``OUT/queries.jsonl`` 1,500 questions people asked (SQuAD, MedQuAD) or textbooks set, none of them a passage.
"""

import argparse
import json
import os
import random
import re
from pathlib import Path

from openembed.files import read_jsonl

END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z0-9])|\n+")
SHORTEST, LONGEST = 24, 400
SOURCES = (
    ("prose-textbooks", "sections.jsonl.gz"),
    ("prose-textbooks", "glossary.jsonl.gz"),
    ("prose-books", "train.jsonl.gz"),
    ("prose-books", "validation.jsonl.gz"),
    ("prose-ushistory", "train.jsonl.gz"),
    ("prose-ushistory", "test.jsonl.gz"),
    ("medquad", "corpus.jsonl.gz"),
    ("scifact", "corpus.jsonl.gz"),
    ("pubmedqa", "corpus.jsonl.gz"),
    ("cranfield", "corpus.jsonl.gz"),
    ("cacm", "corpus.jsonl.gz"),
    ("npl-vaswani", "corpus.jsonl.gz"),
    ("squad-sentences", "corpus.jsonl.gz"),
    ("stackoverflow-clustering", "test.jsonl.gz"),
    ("biomedical-clustering", "test.jsonl.gz"),
)
QUESTIONS = (("squad-sentences", 700), ("medquad", 500), ("scifact", 300))


def passages(text):
    """Yields sentences; a short one is joined to the next."""
    held = ""
    for part in END.split(text):
        held = f"{held} {part.strip()}".strip()
        if len(held) >= SHORTEST:
            yield held[:LONGEST]
            held = ""


def collect(data):
    found = {}
    for name, file in SOURCES:
        for _, row in read_jsonl(data / name / file):
            for text in passages(row.get("text") or row.get("definition", "")):
                metadata = {"source": name, "words": len(text.split())}
                if "year" in row:
                    metadata["year"] = row["year"]
                found.setdefault(text, metadata)
    return list(found.items())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--shared", type=Path, default=Path(os.environ.get("OPENEMBED_SHARED", "shared")))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.shared / "data"
    rows = collect(data)
    random.Random(0).shuffle(rows)
    print(f"{len(rows):,} distinct passages, {sum(len(text) for text, _ in rows) / len(rows):.0f} characters on average")
    with (options.out / "passages.jsonl").open("w") as file:
        for number, (text, metadata) in enumerate(rows[: options.count]):
            file.write(json.dumps({"_id": f"p{number}", "text": text, **metadata}, ensure_ascii=False) + "\n")
    with (options.out / "queries.jsonl").open("w") as file:
        for name, count in QUESTIONS:
            asked = sorted({row["text"] for _, row in read_jsonl(data / name / "queries.jsonl.gz")})
            for number, text in enumerate(random.Random(1).sample(asked, count)):
                file.write(json.dumps({"_id": f"{name}-{number}", "text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
