"""A model-free sparse encoder for tests of the index: every word is a term, weighed by how often and where it stands."""

import hashlib
import re

import numpy as np
from scipy import sparse

WORDS = 97


class SparseWords:
    """Weights are multiples of 1/8, so that sums of products are exact whatever their order."""

    kind = "sparse"
    device = "cpu"
    computed_in = "float32"

    def __init__(self, width=WORDS, name="words"):
        self.width = width
        self.fingerprint = hashlib.sha256(f"{name} {width}".encode()).hexdigest()
        self.encoded = 0

    def term(self, word):
        return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little") % self.width

    def encode(self, texts):
        self.encoded += len(texts)
        values = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, text in enumerate(texts):
            for place, word in enumerate(re.findall(r"\w+", text.lower())):
                values[row, self.term(word)] += (1 + place % 3) / 8
        return sparse.csr_matrix(values)

    def encode_documents(self, texts, *, task=None, instruction=None, max_length=None, normalize=True):
        if not normalize:
            raise ValueError("normalize: the head decides it where vectors are sparse; leave it out")
        return self.encode(texts)

    def encode_queries(self, texts, *, task=None, instruction=None, max_length=None):
        return self.encode(texts)

    def query_prompt(self, task=None, instruction=None):
        return ""

    document_prompt = query_prompt
