"""Representations of texts for evaluation: each distinct text is encoded once, and kept on disk where a folder is given.

Shapes: ``N`` texts, ``D`` width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from openembed.encoded import Encoded, count_of, joined, none_of, take
from openembed.evaluation.cache import Cache
from openembed.evaluation.prompts import Prompts
from openembed.progress import progress
from openembed.vectors import VectorFormat

CHUNK = 2_048


class TextEncoder(Protocol):
    """What evaluation asks of an encoder (:class:`openembed.encoder.Encoder` has it all); without a ``kind`` it is dense."""

    config: Any
    width: int

    @property
    def fingerprint(self) -> str:
        """Identifies configuration and weights."""
        ...

    def encode(self, texts: Sequence[str], *, instruction: str = "", **options: Any) -> Encoded:
        """Returns the representations of texts after a literal prefix."""
        ...

    def encode_queries(self, texts: Sequence[str], **options: Any) -> Encoded:
        """Returns those of queries."""
        ...

    def encode_documents(self, texts: Sequence[str], **options: Any) -> Encoded:
        """Returns those of documents."""
        ...

    def query_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of queries."""
        ...

    def document_prompt(self, task: str | None = None, instruction: str | None = None) -> str:
        """Returns the literal prefix of documents."""
        ...


class Vectors:
    """Gives the representations of a task's texts under its prompts, dense vectors or whatever the encoder makes.

    ``options`` go to the encoder (``max_length``, ``normalize``, ``token_budget``). With a ``cache`` nothing is encoded
    twice. ``label``: what progress is shown of, None: it is not. ``stored``: what documents and symmetric texts are kept in
    and read back from; queries are cut to its dimensions and stay float32 (dense vectors alone).
    """

    def __init__(
        self,
        encoder: TextEncoder,
        prompts: Prompts,
        cache: Cache | None = None,
        options: dict[str, Any] | None = None,
        *,
        label: str | None = None,
        stored: VectorFormat | None = None,
    ) -> None:
        self.stored = stored or VectorFormat()
        self._encoder, self._prompts, self._cache = encoder, prompts, cache
        self._options, self._label = dict(options or {}), label
        self._encoded: dict[str, tuple[int, float]] = {}

    def queries(self, texts: Sequence[str]) -> Encoded:
        """Returns those of queries."""
        arguments = self._prompts.query_arguments
        whole = self._get("query", self._prompts.query, texts, self._encoder.encode_queries, arguments)
        return self._read_back(whole, VectorFormat(dimensions=self.stored.dimensions))

    def one_query(self, text: str) -> Encoded:
        """Returns that of one query, encoded now whatever is kept: how long it takes is to be seen."""
        encoded = self._encoder.encode_queries([text], **self._prompts.query_arguments, **self._options)
        return self._read_back(encoded, VectorFormat(dimensions=self.stored.dimensions))

    def documents(self, texts: Sequence[str]) -> Encoded:
        """Returns those of documents."""
        arguments = self._prompts.document_arguments
        whole = self._get("document", self._prompts.document, texts, self._encoder.encode_documents, arguments)
        return self._read_back(whole, self.stored)

    def symmetric(self, texts: Sequence[str]) -> Encoded:
        """Returns those of texts that are neither query nor document."""
        prefix = self._prompts.symmetric
        whole = self._get("text", prefix, texts, self._encoder.encode, {"instruction": prefix})
        return self._read_back(whole, self.stored)

    def encode_seconds(self, side: str) -> float | None:
        """Returns the seconds a text of ``side`` (query, document, text) took to encode; None where all were cached."""
        count, seconds = self._encoded.get(side, (0, 0.0))
        return seconds / count if count else None

    def _read_back(self, encoded: Encoded, stored: VectorFormat) -> Encoded:
        if stored.plain:
            return encoded
        return stored.apply(encoded, normalize=self._options.get("normalize", True)).to_float32()

    def _get(
        self,
        side: str,
        prefix: str,
        texts: Sequence[str],
        encode: Callable[..., Encoded],
        arguments: dict[str, str],
    ) -> Encoded:
        distinct = list(dict.fromkeys(texts))
        place = {text: row for row, text in enumerate(distinct)}
        context = (
            side,
            prefix,
            str({k: v for k, v in sorted(self._options.items()) if k in ("max_length", "normalize")}),
        )
        order, parts = [], []
        if self._cache is not None:
            found, stored = self._cache.find(context, distinct)
            order, parts = list(found), [stored]
        cached = set(order)
        # longest first, so that chunks hold texts of like length and a lack of memory shows at once
        missing = sorted((row for row in range(len(distinct)) if row not in cached), key=lambda row: -len(distinct[row]))
        shown = self._label is not None and bool(missing)
        with progress(f"{self._label}: encode {side}", len(missing), "texts", show=shown) as advance:
            for start in range(0, len(missing), CHUNK):
                rows = missing[start : start + CHUNK]
                chunk = [distinct[row] for row in rows]
                began = time.perf_counter()
                parts.append(encode(chunk, **arguments, **self._options))
                self._count(side, len(rows), time.perf_counter() - began)
                order += rows
                if self._cache is not None:
                    self._cache.add(context, chunk, parts[-1])
                advance(len(rows))
        if not texts:
            return none_of(getattr(self._encoder, "kind", "dense"), self._encoder.width)
        together = joined([part for part in parts if count_of(part)])
        parts.clear()
        return take(together, np.argsort(order)[[place[text] for text in texts]])

    def _count(self, side: str, texts: int, seconds: float) -> None:
        count, before = self._encoded.get(side, (0, 0.0))
        self._encoded[side] = count + texts, before + seconds
