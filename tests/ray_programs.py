"""Encoders that tests make on the nodes of a Ray cluster; every call leaves a line in a file, so that it can be counted.

They import no torch, so that a worker is there in a second or two.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.sparse import csr_matrix
from store_fakes import BagOfWords

from openembed.token_vectors import TokenVectors


class Prompts(SimpleNamespace):
    """What ``Encoder`` asks of its prompts."""

    def render(self, instruction):
        return f"Instruct: {instruction}\nQuery: " if instruction else ""


class Watched(BagOfWords):
    """Bags of words, slowed down, that write who encoded what to ``log``."""

    def __init__(self, log=None, seconds=0.0):
        super().__init__(width=64)
        self.config = SimpleNamespace(prompts=Prompts(query="", document="", tasks={}, named={}), matryoshka=())
        self._log, self._seconds = log, seconds

    def encode(self, texts, *, instruction="", **options):
        time.sleep(self._seconds)
        values = super().encode([instruction + text for text in texts], **options)
        if self._log is not None:
            with Path(self._log).open("a") as file:
                file.write(f"{os.getpid()}\t{texts[0]}\n")
        return values

    def query_prompt(self, task=None, instruction=None):
        return self.config.prompts.render(instruction)

    def document_prompt(self, task=None, instruction=None):
        return self.config.prompts.render(instruction)


class WatchedTerms(Watched):
    """Sparse."""

    kind = "sparse"

    def encode(self, texts, **options):
        return csr_matrix(np.maximum(super().encode(texts, **options), 0))


class WatchedTokens(Watched):
    """Token vectors, as many as a text's length says; of some texts none."""

    kind = "tokens"

    def encode(self, texts, **options):
        values = super().encode(texts, **options)
        parts = [
            value * np.arange(1, 1 + len(text) % 6, dtype=np.float32)[:, None]
            for text, value in zip(texts, values, strict=True)
        ]
        return TokenVectors.from_list(parts)


class Refusing(Watched):
    """Refuses a text."""

    def encode(self, texts, **options):
        if any("poison" in text for text in texts):
            raise ValueError("there is poison in it")
        return super().encode(texts, **options)


class Dying(Watched):
    """Takes its whole process away, each time until it was done ``times`` times."""

    def __init__(self, log, times):
        super().__init__(log)
        self._times = times

    def encode(self, texts, **options):
        deaths = Path(self._log).with_suffix(".deaths")
        if len(deaths.read_text() if deaths.exists() else "") < self._times:
            with deaths.open("a") as file:
                file.write("x")
            os._exit(1)
        return super().encode(texts, **options)


class DyingTokens(WatchedTokens, Dying):
    """Dies so, with token vectors."""


def absent():
    """What a node says that lacks the model."""
    raise FileNotFoundError("/no/model: no such model folder")
