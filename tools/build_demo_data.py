"""Builds the data that the package ships for its demo: python tools/build_demo_data.py SHARED_DATA_FOLDER.

Reads the data sets named in ``src/openembed/demo/README.md`` and writes ``src/openembed/demo/data`` (training files,
evaluation folders, ``counts.json``), ``src/openembed/demo/toy`` (a few rows of each kind, for smoke runs) and
``src/openembed/demo/tokenizer``. The same input gives the same bytes. No text
of an evaluation set stays in a training file: equality is judged on letters and digits alone, blind to case.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import random
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

DEMO = Path(__file__).resolve().parents[1] / "src" / "openembed" / "demo"
BOOKS_EXAMPLES, MEDQUAD_EXAMPLES, SQUAD_EXAMPLES, GLOSSARY_EXAMPLES = 6000, 6000, 6000, 6000
CORPUS_SIZE = 1200
SCIFACT_CORPUS_SIZE = 1000
QUERIES = 300
BANKING_PER_LABEL = 20
MAX_WORDS = {"textbooks": 100, "medquad": 80, "scifact": 120}
TEXT_FIELDS = ("query", "positive", "positives", "negative", "text", "sentence1", "sentence2")
PROMPT_WORDS = ("Instruct:", "Query:")
"""Given to the tokenizer often enough to become single pieces: they begin every query."""
CAPTION_SOURCES = ("images", "track5.en-en")
"""STS rows whose texts may be redistributed: image captions and SNLI hypotheses, both CC BY-SA."""

Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the data sets (medquad, prose-textbooks, ...)")
    source = parser.parse_args().data
    out = DEMO / "data"
    shutil.rmtree(out, ignore_errors=True)

    evaluation = Evaluation(out / "eval")
    train: dict[str, list[Row]] = {}
    train["textbooks"], train["glossary"] = textbooks(source / "prose-textbooks", evaluation)
    train["medquad"] = medquad(source / "medquad", evaluation)
    train["scifact"] = scifact(source / "scifact", evaluation)
    train["banking77"] = banking77(source / "banking77", evaluation)
    train["captions"] = captions(source / "stsb" / "en", evaluation)
    train["squad"] = squad(source / "squad-sentences")
    train["nli"] = nli(source / "nli-pairs")

    counts: dict[str, object] = {"evaluation": evaluation.counts, "train": {}, "removed_as_evaluation_text": {}}
    for name, rows in sorted(train.items()):
        kept = [row for row in rows if not evaluation.holds(row)]
        write_jsonl(out / "train" / f"{name}.jsonl.gz", kept)
        counts["train"][name] = len(kept)
        counts["removed_as_evaluation_text"][name] = len(rows) - len(kept)
        train[name] = kept
    (out / "counts.json").write_text(json.dumps(counts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    build_toy(train, DEMO / "toy")
    build_tokenizer(texts_of(train), DEMO / "tokenizer")
    print(json.dumps(counts, indent=2, sort_keys=True))


class Evaluation:
    """Writes evaluation sets and remembers their texts, so that training can be cleaned of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts: set[str] = set()
        self.counts: dict[str, dict[str, int]] = {}

    def holds(self, row: Row) -> bool:
        """Whether any text of a training row is an evaluation text."""
        return any(normalised(text) in self.texts for text in row_texts(row))

    def retrieval(self, name: str, queries: list[Row], documents: list[Row], judgements: list[tuple[str, str]]) -> None:
        """Writes a BEIR folder."""
        folder = self.folder / name
        write_jsonl(folder / "corpus.jsonl.gz", documents)
        write_jsonl(folder / "queries.jsonl.gz", queries)
        lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in judgements)]
        (folder / "qrels").mkdir(exist_ok=True)
        (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.counts[name] = {"documents": len(documents), "queries": len(queries), "judgements": len(judgements)}
        for row in [*queries, *documents]:
            self.texts.add(normalised(str(row["text"])))
            self.texts.add(normalised(f"{row.get('title', '')} {row['text']}"))

    def rows(self, name: str, split: str, rows: list[Row], fields: tuple[str, ...]) -> None:
        """Writes one JSON-lines split; ``fields`` are the texts kept out of training (none for a training split)."""
        write_jsonl(self.folder / name / f"{split}.jsonl.gz", rows)
        self.counts.setdefault(name, {})[split] = len(rows)
        self.texts.update(normalised(str(row[field])) for row in rows for field in fields)


def textbooks(folder: Path, evaluation: Evaluation) -> tuple[list[Row], list[Row]]:
    """Headings and objectives to sections; evaluation on the chapters held out, train sections as distractors."""
    sections = {row["_id"]: row for row in read_jsonl(folder / "sections.jsonl.gz")}
    cut = {key: cut_words(str(row["text"]), MAX_WORDS["textbooks"]) for key, row in sections.items()}
    pairs = [row for row in read_jsonl(folder / "pairs.jsonl.gz") if row.get("coverage", 1.0) >= 0.5]
    chance = random.Random("textbooks")

    positives: dict[str, set[str]] = defaultdict(set)
    for row in pairs:
        if row["split"] == "dev":
            positives[str(row["query"])].add(str(row["pos"]))
    usable = [query for query in sorted(positives) if len(positives[query]) == 1]
    chosen = sorted(chance.sample(usable, min(QUERIES, len(usable))))
    train_pairs = [row for row in pairs if row["split"] == "train"]
    chance.shuffle(train_pairs)
    train_pairs = sorted(train_pairs[:BOOKS_EXAMPLES], key=lambda row: (row["pos"], row["query"]))
    used = {row["pos"] for row in train_pairs}

    held_out = [key for key, row in sections.items() if row["split"] == "dev"]
    spare = sorted(key for key, row in sections.items() if row["split"] == "train" and key not in used)
    corpus = pick_corpus(held_out, spare, cut, CORPUS_SIZE, chance)
    queries = [{"_id": f"q{number}", "text": text} for number, text in enumerate(chosen)]
    judgements = [(f"q{number}", key) for number, text in enumerate(chosen) for key in positives[text] if key in corpus]
    write_retrieval(evaluation, "textbooks", queries, corpus, cut, judgements)

    examples = grouped((str(row["query"]), cut[row["pos"]]) for row in train_pairs)
    glossary = [row for row in read_jsonl(folder / "glossary.jsonl.gz") if row["split"] == "train"]
    terms = Counter(str(row["term"]).casefold() for row in glossary)
    glossary = [row for row in glossary if terms[str(row["term"]).casefold()] == 1]
    drawn = sample(glossary, GLOSSARY_EXAMPLES, "glossary")
    return examples, [{"query": row["term"], "positive": row["definition"]} for row in drawn]


def medquad(folder: Path, evaluation: Evaluation) -> list[Row]:
    """Consumer health questions to answers; evaluation on diseases held out, the dev split's answers as distractors."""
    corpus, queries, qrels = read_beir(folder, ("train", "dev", "test"))
    cut = {key: cut_words(str(row["text"]), MAX_WORDS["medquad"]) for key, row in corpus.items()}
    chance = random.Random("medquad")
    same_text = Counter(normalised(cut[key]) for key in cut)
    usable = [
        query for query, documents in qrels["test"].items() if all(same_text[normalised(cut[key])] == 1 for key in documents)
    ]
    chosen = sorted(chance.sample(sorted(usable), QUERIES))
    needed = sorted({key for query in chosen for key in qrels["test"][query]})
    other = {key for split in ("test", "dev") for documents in qrels[split].values() for key in documents}
    kept = pick_corpus(needed, sorted(other - set(needed)), cut, CORPUS_SIZE, chance)
    judgements = [(query, key) for query in chosen for key in sorted(qrels["test"][query])]
    rows = [{"_id": query, "text": queries[query]["text"]} for query in chosen]
    write_retrieval(evaluation, "medquad", rows, kept, cut, judgements)

    asked = sample(sorted(qrels["train"]), MEDQUAD_EXAMPLES, "medquad train")
    drawn = [(query, key) for query in asked for key in sorted(qrels["train"][query])]
    return grouped((str(queries[query]["text"]), cut[key]) for query, key in drawn)


def scifact(folder: Path, evaluation: Evaluation) -> list[Row]:
    """Scientific claims to abstracts; the corpus cut to the judged abstracts and as many others as fit."""
    corpus, queries, qrels = read_beir(folder, ("train", "test"))
    cut = {key: cut_words(str(row["text"]), MAX_WORDS["scifact"]) for key, row in corpus.items()}
    titles = {key: str(row["title"]) for key, row in corpus.items()}
    needed = sorted({key for documents in qrels["test"].values() for key in documents})
    trained = {key for documents in qrels["train"].values() for key in documents}
    spare = sorted(set(cut) - trained - set(needed))
    kept = pick_corpus(needed, spare, cut, SCIFACT_CORPUS_SIZE, random.Random("scifact"))
    rows = [{"_id": query, "text": queries[query]["text"]} for query in sorted(qrels["test"], key=int)]
    judgements = [(row["_id"], key) for row in rows for key in sorted(qrels["test"][row["_id"]])]
    write_retrieval(evaluation, "scifact", rows, kept, cut, judgements, titles)
    judged = [(query, key) for query in sorted(qrels["train"], key=int) for key in sorted(qrels["train"][query])]
    free = [(query, key) for query, key in judged if key not in set(needed)]
    return grouped((str(queries[query]["text"]), f"{titles[key]} {cut[key]}") for query, key in free)


def banking77(folder: Path, evaluation: Evaluation) -> list[Row]:
    """Customer messages by intent; the classifier of the evaluation is fitted on rows of the training split."""
    train, test = list(read_jsonl(folder / "train.jsonl.gz")), list(read_jsonl(folder / "test.jsonl.gz"))
    evaluation.rows("banking77", "test", test, ("text",))
    by_label: dict[object, list[Row]] = defaultdict(list)
    for row in train:
        by_label[row["label"]].append(row)
    few = [row for label in sorted(by_label) for row in sample(by_label[label], BANKING_PER_LABEL, f"banking {label}")]
    evaluation.rows("banking77", "train", few, ())
    return train


def captions(folder: Path, evaluation: Evaluation) -> list[Row]:
    """Scored sentence pairs from the two CC BY-SA sources of the STS Benchmark."""
    splits = {
        name: [row for row in read_jsonl(folder / f"{name}.jsonl.gz") if row["source"] in CAPTION_SOURCES]
        for name in ("train", "dev", "test")
    }
    fields = ("sentence1", "sentence2")
    test = splits["test"] + [row for row in splits["dev"] if row["source"] == "track5.en-en"]
    evaluation.rows("captions", "test", [scored(row) for row in test], fields)
    train = splits["train"] + [row for row in splits["dev"] if row["source"] == "images"]
    return [scored(row) for row in train]


def squad(folder: Path) -> list[Row]:
    """Questions to the sentence that answers them; the training split only."""
    corpus, queries, qrels = read_beir(folder, ("train",))
    pairs = sorted((query, key) for query, documents in qrels["train"].items() for key in documents)
    drawn = sample(pairs, SQUAD_EXAMPLES, "squad")
    drawn.sort(key=lambda pair: int(pair[1][1:]))
    return grouped((str(queries[query]["text"]), str(corpus[key]["text"])) for query, key in drawn)


def nli(folder: Path) -> list[Row]:
    """Premise, entailed sentence and contradicting sentence (the hard negative)."""
    return [
        {"query": row["premise"], "positive": row["entailment"], "negative": row["contradiction"]}
        for row in read_jsonl(folder / "triples.jsonl.gz")
    ]


def build_toy(train: dict[str, list[Row]], folder: Path) -> None:
    """Writes a few training rows of each construction, and a retrieval folder made of training pairs."""
    single = sample([row for row in train["medquad"] if "positive" in row], 40, "toy")
    pairs = [{key: cut_words(str(value), 30) for key, value in row.items()} for row in single]
    intents = sorted({str(row["label_text"]) for row in train["banking77"]})[:6]
    classes = [row for name in intents for row in [r for r in train["banking77"] if r["label_text"] == name][:6]]
    write_jsonl(folder / "pairs.jsonl.gz", pairs)
    write_jsonl(folder / "classes.jsonl.gz", classes)
    write_jsonl(folder / "scored.jsonl.gz", sample(train["captions"], 40, "toy"))
    documents = [{"_id": f"d{number}", "title": "", "text": row["positive"]} for number, row in enumerate(pairs)]
    queries = [{"_id": f"q{number}", "text": row["query"]} for number, row in enumerate(pairs[:12])]
    judgements = [(f"q{number}", f"d{number}") for number in range(len(queries))]
    Evaluation(folder).retrieval("retrieval", queries, documents, judgements)


def build_tokenizer(texts: Iterable[str], folder: Path, size: int = 8192) -> None:
    """Trains a lower-casing byte-level BPE; ``<s>`` begins texts, ``</s>`` ends and pads them.

    White space is dropped and every word begins alike, so a word is the same piece at the start of a text, after a
    line break and after a space.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "model_max_length": 512,
        "pad_token": "</s>",
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def texts_of(train: dict[str, list[Row]]) -> list[str]:
    texts = [text for name in sorted(train) for row in train[name] for text in row_texts(row)]
    return texts + [word for word in PROMPT_WORDS for _ in range(1000)]


def pick_corpus(needed: list[str], spare: list[str], texts: dict[str, str], size: int, chance: random.Random) -> list[str]:
    """Returns ``needed`` and random ``spare`` ids up to ``size``, no two with the same text, in order of id."""
    seen: set[str] = set()
    kept: list[str] = []
    chance.shuffle(spare)
    for key in [*needed, *spare]:
        text = normalised(texts[key])
        if len(kept) == size:
            break
        if len(text) > 40 and text not in seen:
            seen.add(text)
            kept.append(key)
    return sorted(kept)


def write_retrieval(
    evaluation: Evaluation,
    name: str,
    queries: list[Row],
    corpus: list[str],
    texts: dict[str, str],
    judgements: list[tuple[str, str]],
    titles: dict[str, str] | None = None,
) -> None:
    judged = {query for query, _ in judgements}
    documents = [{"_id": key, "title": (titles or {}).get(key, ""), "text": texts[key]} for key in corpus]
    evaluation.retrieval(name, [row for row in queries if row["_id"] in judged], documents, judgements)


def row_texts(row: Row) -> list[str]:
    """The texts of a training row."""
    values = [row[field] for field in TEXT_FIELDS if field in row]
    return [str(text) for value in values for text in (value if isinstance(value, list) else [value])]


def grouped(pairs: Iterable[tuple[str, str]]) -> list[Row]:
    """Returns one row a query with all its positives, so that none of them can become its negative."""
    positives: dict[str, dict[str, None]] = {}
    for query, positive in pairs:
        positives.setdefault(query, {})[positive] = None
    return [
        {"query": query, "positive": next(iter(texts))} if len(texts) == 1 else {"query": query, "positives": list(texts)}
        for query, texts in positives.items()
    ]


def scored(row: Row) -> Row:
    return {key: row[key] for key in ("sentence1", "sentence2", "score")}


def sample(rows: list, size: int, purpose: str) -> list:
    """Returns ``size`` of the rows (all when fewer), drawn by ``purpose`` and left in their order."""
    if len(rows) <= size:
        return list(rows)
    return [rows[index] for index in sorted(random.Random(purpose).sample(range(len(rows)), size))]


def cut_words(text: str, limit: int) -> str:
    """Returns whole sentences up to ``limit`` words; the first ``limit`` words when the first sentence is longer."""
    words = text.split()
    if len(words) <= limit:
        return " ".join(words)
    ends = [index + 1 for index, word in enumerate(words[:limit]) if re.search(r"[.!?][\")’”]*$", word)]
    return " ".join(words[: ends[-1] if ends and ends[-1] >= limit // 2 else limit])


def normalised(text: str) -> str:
    """Letters and digits alone, in lower case: what counts as the same text."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def read_jsonl(path: Path) -> Iterable[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_beir(folder: Path, splits: tuple[str, ...]) -> tuple[dict[str, Row], dict[str, Row], dict[str, dict[str, set[str]]]]:
    corpus = {str(row["_id"]): row for row in read_jsonl(folder / "corpus.jsonl.gz")}
    queries = {str(row["_id"]): row for row in read_jsonl(folder / "queries.jsonl.gz")}
    qrels: dict[str, dict[str, set[str]]] = {}
    for split in splits:
        qrels[split] = defaultdict(set)
        with (folder / "qrels" / f"{split}.tsv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                if int(row["score"]) > 0:
                    qrels[split][row["query-id"]].add(row["corpus-id"])
    return corpus, queries, qrels


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Writes gzipped JSON lines; the bytes depend on the rows alone (no time, no name in the header)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
