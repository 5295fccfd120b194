"""A small encoder for evaluation tests: hashed bags of words, so that texts sharing words are near."""

import hashlib
import json
from pathlib import Path

import numpy as np

from openembed.encoder import PromptConfig


class WordEncoder:
    """Encodes by summing a fixed random vector a word; counts the texts it is asked for. A prefix adds its words."""

    width = 48

    def __init__(self, prompts: PromptConfig | None = None, fingerprint: str = "words") -> None:
        class Settings:
            pass

        self.config = Settings()
        self.config.prompts = prompts or PromptConfig()
        self.fingerprint = fingerprint
        self.encoded: list[str] = []

    def encode(self, texts, *, instruction="", normalize=True, **_options):
        self.encoded += [instruction + text for text in texts]
        vectors = np.stack([self._vector(instruction + text) for text in texts]).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors

    def encode_queries(self, texts, *, task=None, instruction=None, **options):
        return self.encode(texts, instruction=self.query_prompt(task, instruction), **options)

    def encode_documents(self, texts, *, task=None, instruction=None, **options):
        return self.encode(texts, instruction=self.document_prompt(task, instruction), **options)

    def query_prompt(self, task=None, instruction=None):
        prompts = self.config.prompts
        if instruction is not None:
            return prompts.render(instruction)
        if task is None:
            return prompts.query
        return prompts.named[task] if task in prompts.named else prompts.render(prompts.tasks[task].query)

    def document_prompt(self, task=None, instruction=None):
        prompts = self.config.prompts
        if instruction is not None:
            return prompts.render(instruction)
        if task is None or task in prompts.named:
            return prompts.document
        return prompts.render(prompts.tasks[task].document) or prompts.document

    def _vector(self, text):
        total = np.full(self.width, 1e-3)
        for word in text.lower().split():
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            total = total + np.random.default_rng(seed).normal(size=self.width)
        return total


def write_rows(path: Path, rows: list[dict]) -> None:
    """Writes JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def small_retrieval(folder: Path) -> Path:
    """A BEIR folder with four documents, three queries and judgements; returns it."""
    documents = {"d1": "red planet mars", "d2": "blue planet earth", "d3": "cooking rice", "d4": "the red rose"}
    queries = {"q1": "planet mars", "q2": "how to cook rice cooking", "q3": "never judged"}
    write_rows(folder / "corpus.jsonl", [{"_id": i, "title": "", "text": t} for i, t in documents.items()])
    write_rows(folder / "queries.jsonl", [{"_id": i, "text": t} for i, t in queries.items()])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t1\nq2\td3\t1\n")
    return folder
