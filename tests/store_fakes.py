"""A model-free encoder for tests of the index and of bulk encoding: hashed bags of words."""

import hashlib
import re

import numpy as np


class BagOfWords:
    """Vectors are sums of one pseudo-random direction a word; the same text gives the same bytes everywhere."""

    device = "cpu"
    computed_in = "float32"

    def __init__(self, width=32, name="bag"):
        self.width = width
        self.fingerprint = hashlib.sha256(f"{name} {width}".encode()).hexdigest()
        self.encoded = 0

    def _vector(self, text):
        total = np.zeros(self.width, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()):
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            total += np.random.default_rng(seed).standard_normal(self.width, dtype=np.float32)
        return total

    def encode(self, texts, *, normalize=True, max_length=None, **_options):
        self.encoded += len(texts)
        values_ND = np.array([self._vector(text[:max_length]) for text in texts], dtype=np.float32)
        values_ND = values_ND.reshape(len(texts), self.width)
        if normalize:
            values_ND /= np.maximum(np.linalg.norm(values_ND, axis=1, keepdims=True), 1e-12)
        return values_ND

    def encode_documents(self, texts, *, task=None, instruction=None, **options):
        return self.encode([self.document_prompt(task, instruction) + text for text in texts], **options)

    def encode_queries(self, texts, *, task=None, instruction=None, **options):
        return self.encode([self.query_prompt(task, instruction) + text for text in texts], **options)

    def query_prompt(self, task=None, instruction=None):
        given = instruction or task
        return f"Instruct: {given}\nQuery: " if given else ""

    def document_prompt(self, task=None, instruction=None):
        given = instruction or task
        return f"{given} " if given else ""
