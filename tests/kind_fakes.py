"""Small encoders of the other kinds, without a model: a weight a word, and a vector a word."""

import hashlib
import re

import numpy as np
from scipy.sparse import csr_matrix

from openembed.token_vectors import TokenVectors
from tests.evaluation_fakes import WordEncoder


def _hash(word):
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")


def _words(text, max_length):
    return re.findall(r"\w+", text.lower())[:max_length]


class WordWeights(WordEncoder):
    """Sparse: a word's weight is how long it is, over 512 hashed terms; ``kind`` and counting as in the real one."""

    kind, width, device, computed_in = "sparse", 512, "cpu", "float32"

    def encode(self, texts, *, instruction="", max_length=None, **_options):
        self.encoded += [instruction + text for text in texts]
        values_NV = np.zeros((len(texts), self.width), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in _words(instruction + text, max_length):
                values_NV[row, _hash(word) % self.width] = 0.1 * len(word)
        return csr_matrix(values_NV)


class WordTokens(WordEncoder):
    """Token vectors: a fixed direction of width 16 a word."""

    kind, width, device, computed_in = "tokens", 16, "cpu", "float32"

    def encode(self, texts, *, instruction="", max_length=None, **_options):
        self.encoded += [instruction + text for text in texts]
        return TokenVectors.from_list([self._matrix(_words(instruction + text, max_length)) for text in texts], self.width)

    def _matrix(self, words):
        rows = [np.random.default_rng(_hash(word)).standard_normal(self.width) for word in words]
        values_LD = np.array(rows, dtype=np.float32).reshape(len(words), self.width)
        return values_LD / np.maximum(np.linalg.norm(values_LD, axis=1, keepdims=True), 1e-12)
