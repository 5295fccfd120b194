"""One served model: texts or token ids in, representations out, awaited. Admission, tokenizing and cancelling happen here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from scipy.sparse import csr_matrix

from openembed.encoded import Encoded
from openembed.encoder import Encoder
from openembed.packing import TokenRows
from openembed.representations import Kind
from openembed.server.batcher import Batcher
from openembed.server.errors import ApiError, internal, refused
from openembed.server.metrics import Metrics
from openembed.server.settings import Limits
from openembed.tokenization import TextTokenizer

R = TypeVar("R")

CHARACTERS_A_TOKEN = 128
"""A text is cut to this many characters for each token it may have before it is tokenized, which bounds time and memory."""

SLICE = 65_536
"""Characters tokenized in one go; between two slices of a large request others have their turn."""


@dataclass(frozen=True)
class Answer:
    """Representations of N texts, of the model's kind, and the tokens they were made of."""

    values: Encoded
    tokens: int


@dataclass(frozen=True)
class Prompt:
    """How a request's texts are read: the literal prefix, the most tokens a text may have, whether more are cut, and whether
    they are queries, where the model encodes these differently."""

    prefix: str = ""
    max_length: int | None = None
    truncate: bool = True
    query: bool = False


class Engine:
    """A model with its queue. Queries that need no model (``query_head``) are looked up and never queue."""

    def __init__(
        self,
        encoder: Encoder,
        name: str,
        limits: Limits,
        metrics: Metrics,
        *,
        token_budget: int | None = None,
        workers: int = 1,
    ) -> None:
        self.encoder, self.name, self.limits = encoder.eval(), name, limits
        self.batcher = Batcher(encoder, name, token_budget or encoder.token_budget, metrics, workers)
        self._tokenizing = ThreadPoolExecutor(2, thread_name_prefix=f"tokenize {name}")
        metrics.watch("queue_tokens", "Tokens that wait to be encoded.", lambda: self.batcher.tokens, {"model": name})
        metrics.watch("queue_texts", "Texts that wait to be encoded.", lambda: self.batcher.texts, {"model": name})

    def close(self) -> None:
        """Ends its threads when everything queued is done."""
        self.batcher.close()
        self._tokenizing.shutdown()

    def warm(self) -> int:
        """Starts the threads, runs one full micro-batch and one short text, and returns how many tokens that were.

        Afterwards everything lazy is done, memory is at its working size and the rate is known.
        """
        self.batcher.start()
        length = self.encoder.row_limit()
        row = self.encoder.tokenize(["warm " * length]).ids[0][: self.batcher.budget]
        count = max(1, self.batcher.budget // len(row))
        documents = np.zeros(count, dtype=bool) if self.encoder.sided else None
        rows = TokenRows([row] * count, np.zeros(count, dtype=np.int32), documents)
        for work in (self.encoder.tokenize(["warm"]), rows, rows):
            self.batcher.rate = 0.0  # that of the last one alone is kept
            outcome = _blocking(lambda done, work=work: self.batcher.submit(work, normalize=True, done=done))
            if isinstance(outcome, Exception):
                raise outcome
        return len(row) * count

    @property
    def kind(self) -> Kind:
        """What its answers are."""
        return self.encoder.kind

    async def encode(self, texts: Sequence[str], prompt: Prompt, *, normalize: bool = True) -> Answer:
        """Returns the representations of ``texts``; ``normalize``: dense vectors have length 1.

        Raises ``ApiError``: too long, too many tokens or numbers of token vectors (413), queue full (429).
        """
        rows = await self._tokenized(texts, prompt)
        if self._looks_up(prompt):
            limit = self._row_limit(prompt)
            encode = partial(self.encoder.encode, instruction=prompt.prefix, as_queries=True, max_length=limit)
            return await self._looked_up(rows, lambda: encode([text[: limit * CHARACTERS_A_TOKEN] for text in texts]))
        return await self._run(rows, normalize)

    async def encode_ids(self, bodies: Sequence[Sequence[int]], prompt: Prompt, *, normalize: bool = True) -> Answer:
        """Returns the representations of texts given as token ids; as :meth:`encode`."""
        vocabulary = min(self.encoder.tokenizer.vocabulary, self.encoder.backbone.vocabulary)
        self._check_total(sum(map(len, bodies)))
        for number, body in enumerate(bodies):
            if body and not (min(body) >= 0 and max(body) < vocabulary):
                raise refused(f"text {number} holds a token id outside 0..{vocabulary - 1}", "input", "unknown_token")
        limit = self._row_limit(prompt)
        if not prompt.truncate:
            _refuse_longer(await self._in_pool(lambda: self._uncut.frame(bodies, prompt.prefix, limit + 1)), limit)
        rows = await self._in_pool(lambda: self._framed(bodies, prompt, limit))
        if self._looks_up(prompt):
            return await self._looked_up(rows, lambda: self.encoder.query_head.look_up(*_pooled(rows)))
        return await self._run(rows, normalize)

    def cut(self, text: str) -> str:
        """Returns as much of a text as is tokenized at most."""
        return text[: self.encoder.row_limit() * CHARACTERS_A_TOKEN]

    async def call(self, function: Callable[[], R]) -> R:
        """Returns what ``function`` returns, run in the thread that owns the model."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self.batcher.call(function, lambda outcome: _hand_over(loop, future, outcome))
        return await future

    async def _tokenized(self, texts: Sequence[str], prompt: Prompt) -> TokenRows:
        limit = self._row_limit(prompt)
        longest = limit * CHARACTERS_A_TOKEN
        if not prompt.truncate:
            for number, text in enumerate(texts):
                if len(text) > longest:
                    raise _too_long(number, limit)
        parts: list[TokenRows] = []
        total = 0
        for chunk in _slices(texts, longest):
            first = sum(map(len, parts))
            part = await self._in_pool(lambda chunk=chunk, first=first: self._rows(chunk, prompt, limit, first))
            total += int(part.lengths.sum())
            self._check_total(total)
            parts.append(part)
        return parts[0] if len(parts) == 1 else TokenRows.concat(parts)

    def _rows(self, texts: Sequence[str], prompt: Prompt, limit: int, first: int) -> TokenRows:
        """The rows of some texts, the first of which is text ``first`` of the request."""
        if not prompt.truncate:
            _refuse_longer(self._uncut(texts, prompt.prefix, limit + 1), limit, first)
        queries = np.full(len(texts), prompt.query) if self.encoder.sided else None
        return self.encoder.tokenize(texts, prompt.prefix, limit, queries=queries)

    def _framed(self, bodies: Sequence[Sequence[int]], prompt: Prompt, limit: int) -> TokenRows:
        rows = self.encoder.tokenizer.frame(bodies, prompt.prefix, limit, query=prompt.query)
        return replace(rows, queries=np.full(len(rows), prompt.query)) if self.encoder.sided else rows

    @cached_property
    def _uncut(self) -> TextTokenizer:
        """The tokenizer without limits of its own, to see whether a text is too long."""
        tokenizer = self.encoder.tokenizer
        if not (tokenizer.config.sided or tokenizer.config.document_length):
            return tokenizer
        none = {"query_length": None, "document_length": None, "expansion": None}
        return TextTokenizer(tokenizer.backend, tokenizer.config.model_copy(update=none))

    def _row_limit(self, prompt: Prompt) -> int:
        """The tokens a text may have."""
        try:
            limit = self.encoder.row_limit(prompt.max_length)
        except ValueError as error:
            raise refused(str(error), "max_length") from None
        return self.encoder.tokenizer.config.limit(limit, query=prompt.query) or limit

    async def _in_pool(self, function: Callable[[], R]) -> R:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function)
        except ValueError as error:  # an instruction that leaves no room, a token without a row
            raise refused(str(error), "instruction", "instruction_too_long") from None

    def _check_total(self, tokens: int) -> None:
        if tokens > self.limits.request_tokens:
            raise ApiError(
                413, f"this request has more than {self.limits.request_tokens} tokens; send it in parts", code="too_many_tokens"
            )

    def _check_answer(self, rows: TokenRows) -> None:
        """Raises ``ApiError`` 413 where there would be more token vectors than memory has room for as JSON."""
        if self.kind != "tokens":
            return
        count, width, most = int(self.encoder.rows_of(rows).sum()), self.encoder.width, self.limits.answer_values
        if count * width > most:
            message = f"{count} vectors of {width} dimensions are more than the {most} numbers of one request; send it in parts"
            raise ApiError(413, message, code="answer_too_large")

    async def _run(self, rows: TokenRows, normalize: bool) -> Answer:
        tokens = int(rows.lengths.sum())
        self._check_total(tokens)
        self._check_answer(rows)
        waiting = self.batcher.tokens
        if waiting and waiting + tokens > self.limits.queue_tokens:
            excess = waiting + tokens - self.limits.queue_tokens
            raise ApiError(
                429, "the queue is full; try again later", code="queue_full", retry_after=excess / max(self.batcher.rate, 1.0)
            )
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        work = self.batcher.submit(rows, normalize=normalize, done=lambda outcome: _hand_over(loop, future, outcome))
        try:
            return Answer(await future, tokens)
        except asyncio.CancelledError:
            self.batcher.cancel(work)
            raise
        except (ValueError, RuntimeError):
            raise internal() from None  # the batcher has logged it

    def _looks_up(self, prompt: Prompt) -> bool:
        return prompt.query and self.encoder.query_head is not None

    async def _looked_up(self, rows: TokenRows, look_up: Callable[[], csr_matrix]) -> Answer:
        tokens = int(rows.lengths.sum())
        self._check_total(tokens)
        return Answer(await self._in_pool(look_up), tokens)


def _pooled(rows: TokenRows) -> tuple[list[int], list[int]]:
    """The pooled token ids of all texts end to end, and where each text's end."""
    ids = [row[start:] for row, start in zip(rows.ids, rows.pool_starts, strict=True)]
    return np.concatenate(ids).tolist(), np.cumsum([len(row) for row in ids]).tolist()


def _refuse_longer(rows: TokenRows, limit: int, first: int = 0) -> None:
    over = np.flatnonzero(rows.lengths > limit)
    if len(over):
        raise _too_long(first + int(over[0]), limit)


def _too_long(number: int, limit: int) -> ApiError:
    message = f"text {number} has more than {limit} tokens and truncate is false; shorten it"
    return refused(message, "input", "context_length_exceeded")


def _slices(texts: Sequence[str], longest: int) -> list[list[str]]:
    """``texts``, cut to ``longest`` characters, in groups of about ``SLICE`` characters."""
    groups: list[list[str]] = [[]]
    size = 0
    for text in texts:
        cut = text[:longest]
        if groups[-1] and size + len(cut) > SLICE:
            groups.append([])
            size = 0
        groups[-1].append(cut)
        size += len(cut)
    return groups


def _hand_over(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], outcome: Any) -> None:
    """Settles ``future`` from another thread; nothing where its loop has ended."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(_settle, future, outcome)


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    if future.done():  # given up meanwhile
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _blocking(start: Callable[[Callable[[Any], None]], Any]) -> Any:
    """Returns what ``start`` hands to the function it is given, waiting for it."""
    from concurrent.futures import Future

    future: Future[Any] = Future()
    start(future.set_result)
    return future.result()
