"""Text to token ids with the model's own conventions: what goes before and after, what is cut, what is pooled.

The caller gives texts and an instruction; beginning and end tokens, truncation and the pooled span belong to the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from openembed.config import Config
from openembed.packing import TokenRows
from openembed.words import words_of

LONE_SURROGATE = re.compile("[\ud800-\udfff]")

CHUNK = 4096
"""Texts tokenized at a time: the backend's results take some hundred bytes a token until they are rows."""


class QueryExpansionConfig(Config):
    """Queries are filled up to ``length`` tokens with ``token`` (ColBERT's query augmentation), end token before them.

    ``attend``: whether other tokens see these (ColBERT: no; they see the query). ``cut``: longer queries are cut to
    ``length`` too.
    """

    length: int = Field(32, gt=0)
    token: str = "[MASK]"
    attend: bool = False
    cut: bool = True


class TokenizerConfig(Config):
    """How texts become token rows.

    ``eos_token``: appended to every text unless the tokenizer adds it itself; None appends nothing.
    ``truncation``: what a text longer than the limit loses: ``keep_eos`` cuts the text and keeps what follows it,
    ``cut_end`` cuts the whole row, end token included (as NV-Embed's released code does).
    ``pool_instruction``: ``exclude`` starts pooling at the first token that holds a character of the text (exact, from
    offsets); ``exclude_by_count`` leaves out as many positions as the instruction alone has tokens, not counting the
    beginning token (NV-Embed's released code); ``exclude_by_count_and_prefix`` counts the beginning token too
    (sentence-transformers with ``include_prompt`` false); ``include`` pools every token. Beginning tokens go with the
    instruction: they are pooled when there is none.
    ``query_length``, ``document_length``: tokens of a text of that side at most, where that is less than the encoder's limit.
    ``expansion``: what is added to queries.
    ``repeat``: every text is given twice with this literal between (echo embeddings, Springer et al. 2024): a row is
    ``instruction + text + repeat + text``, and pooling starts at the second text, each token of which has seen the whole text
    even under a causal mask. A text too long for the limit loses as many tokens of either copy, and a row is twice as long.
    None: texts are given once.
    """

    eos_token: str | None = None
    truncation: Literal["keep_eos", "cut_end"] = "keep_eos"
    pool_instruction: Literal["exclude", "exclude_by_count", "exclude_by_count_and_prefix", "include"] = "exclude"
    lowercase: bool = False
    repeat: str | None = None
    query_length: int | None = Field(None, gt=0)
    document_length: int | None = Field(None, gt=0)
    expansion: QueryExpansionConfig | None = None

    @model_validator(mode="after")
    def _repeats_whole(self) -> TokenizerConfig:
        if self.repeat is not None and (self.pool_instruction != "exclude" or self.truncation != "keep_eos"):
            raise ValueError(
                "repeat pools the second text alone and cuts both copies: it needs pool_instruction = 'exclude' and "
                f"truncation = 'keep_eos' (got {self.pool_instruction!r} and {self.truncation!r})"
            )
        if self.repeat is not None and self.sided:
            raise ValueError("repeat knows one length for all texts; leave query_length, document_length and expansion out")
        if self.expansion is not None and self.query_length is not None and self.query_length < self.expansion.length:
            raise ValueError(
                f"queries are expanded to {self.expansion.length} tokens and cut to query_length {self.query_length}; "
                "give no query_length, or one that is not less"
            )
        return self

    @property
    def sided(self) -> bool:
        """Whether queries and documents become rows in different ways."""
        return self.query_length != self.document_length or self.expansion is not None

    def limit(self, max_length: int | None, *, query: bool) -> int | None:
        """Returns the tokens a text of that side may have under ``max_length``."""
        limits = [max_length, self.query_length if query else self.document_length]
        if query and self.expansion is not None and self.expansion.cut:
            limits.append(self.expansion.length)
        return min((limit for limit in limits if limit is not None), default=None)


def _special_tokens(backend: Tokenizer) -> re.Pattern[str] | None:
    """Matches any special token written out, the longest first."""
    names = [re.escape(token.content) for token in backend.get_added_tokens_decoder().values() if token.special]
    return re.compile("|".join(sorted(names, key=len, reverse=True))) if names else None


def _listed(texts: Sequence[str]) -> Sequence[str]:
    """``texts`` where they have an order and a length; vectors could not be told apart otherwise."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings; got one string. Write [text] for a single text.")
    if isinstance(texts, (Mapping, Set)) or not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
        raise TypeError(f"texts must be a list of strings, got {type(texts).__name__}; make it one with list(...)")
    return texts if isinstance(texts, (list, tuple)) else list(texts)


class _Echo(NamedTuple):
    """A repeated text: its tokens, where the row's second copy starts, and which of the uncut tokens are left."""

    body: list[int]
    start: int
    kept: list[int]


def _cut(ids: list[int], ends: list[int], room: int) -> tuple[list[int], list[int]]:
    """No more than ``room`` ids of each text."""
    rows = [ids[start : min(end, start + room)] for start, end in pairwise([0, *ends])]
    return [i for row in rows for i in row], list(accumulate(map(len, rows)))


class TextTokenizer:
    """Turns texts into :class:`TokenRows`. Special tokens written out in a text are plain characters to it.

    Those of an instruction are the tokens they name: some models mark queries so. In the rare text that spells one out
    under such an instruction, a space after the first character keeps it plain.
    """

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig) -> None:
        self.backend = Tokenizer.from_str(tokenizer.to_str())
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True
        self.config = config
        self.prefix, self.suffix = self._surroundings()
        self._special = _special_tokens(self.backend)

    @classmethod
    def from_folder(cls, folder: str | Path, config: TokenizerConfig) -> TextTokenizer:
        """Reads ``tokenizer.json`` of a folder; raises ``ValueError`` when it is missing or damaged."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a fast tokenizer (tokenizer.json) is needed")
        try:
            return cls(Tokenizer.from_file(str(path)), config)
        except Exception as error:  # the backend raises bare Exception
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{path}: cannot be read as a tokenizer ({error})") from None

    @property
    def vocabulary(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __call__(
        self,
        texts: Sequence[str],
        instructions: str | Sequence[str] = "",
        max_length: int | None = None,
        queries: np.ndarray | None = None,
    ) -> TokenRows:
        """Returns one token row a text, at most ``max_length`` tokens each, instruction and special tokens included.

        ``instructions``: the literal prefix of all texts, or one a text. Lone surrogates become U+FFFD. ``queries`` (bool):
        which texts are queries, where sides differ; None: none.
        Raises ``TypeError`` for a bare string and ``ValueError`` when an instruction leaves no room for its text.
        """
        texts = _listed(texts)
        prefixes = self._prefixes(instructions, len(texts))
        counts = self._prefix_counts(prefixes)
        ids, starts = [], np.zeros(len(texts), dtype=np.int32)
        by_side = [self.config.limit(max_length, query=side) for side in (False, True)]
        limits = [by_side[0]] * len(texts) if queries is None else [by_side[int(query)] for query in queries]
        for first in range(0, len(texts), CHUNK):
            chunk = slice(first, first + CHUNK)
            rows, starts[chunk] = self._chunk(texts[chunk], prefixes[chunk], counts, limits[chunk])
            ids.extend(rows)
        return self._expanded(TokenRows(ids, starts, queries), max_length)

    def _expanded(self, rows: TokenRows, max_length: int | None) -> TokenRows:
        """``rows`` with queries filled up, where the model does that."""
        expansion, queries = self.config.expansion, rows.queries
        if expansion is None or queries is None or not queries.any():
            return rows
        length = expansion.length if max_length is None else min(expansion.length, max_length)
        missing = np.where(queries, np.maximum(length - rows.lengths, 0), 0)
        ids = [np.append(row, np.full(n, self._filler, row.dtype)) for row, n in zip(rows.ids, missing, strict=True)]
        return replace(rows, ids=ids, unattended=None if expansion.attend else missing)

    @cached_property
    def _filler(self) -> int:
        """The id of the token that queries are filled up with."""
        assert self.config.expansion is not None
        found = self.backend.token_to_id(self.config.expansion.token)
        if found is None:
            raise ValueError(f"expansion.token {self.config.expansion.token!r} is not in the tokenizer's vocabulary")
        return found

    def _chunk(
        self, texts: Sequence[str], prefixes: list[str], counts: dict[str, int], limits: list[int | None]
    ) -> tuple[list[np.ndarray], list[int]]:
        """Rows and pool starts of some texts: the backend's results are large and kept no longer than this."""
        joined = [self._joined(prefix, self._clean(text)) for prefix, text in zip(prefixes, texts, strict=True)]
        if self.config.repeat is not None:
            return self._echoed(joined, prefixes, limits[0])
        spans = self.config.pool_instruction != "include" and any(prefixes)
        rows, starts = [], []
        for encoding, prefix, text, max_length in zip(
            self._encodings(joined, prefixes, spans and not counts), prefixes, joined, limits, strict=True
        ):
            body, start = encoding.ids, 0
            row = self._row(body, max_length)
            if prefix and spans:
                start = counts[prefix] if counts else self._start(encoding, len(prefix), len(text))
                self._require_room(start, len(row) - self._kept(body, row), max_length)
            rows.append(row)
            starts.append(start)
        return rows, starts

    def _echoed(self, joined: list[str], prefixes: list[str], max_length: int | None) -> tuple[list[np.ndarray], list[int]]:
        """Rows of repeated texts and where their second copies start; ``joined``: instruction and text."""
        repeat = self._clean(self.config.repeat or "")
        between = [repeat + text[len(prefix) :] for prefix, text in zip(prefixes, joined, strict=True)]
        encodings = self._encodings([a + b for a, b in zip(joined, between, strict=True)], prefixes, True)
        rows, starts = [], []
        for encoding, prefix, first, rest in zip(encodings, prefixes, joined, between, strict=True):
            ends = len(prefix), len(first), len(first) + len(repeat), len(first) + len(rest)
            echo = self._echo(encoding.ids, [self._token_at(encoding, ends[i], ends[-1]) for i in range(3)], max_length)
            rows.append(self._row(echo.body, None))
            starts.append(min(echo.start, len(rows[-1]) - 1))
        return rows, starts

    def _echo(self, ids: Sequence[int], places: Sequence[int], max_length: int | None) -> _Echo:
        """A repeated text's tokens without the surroundings, cut to fit; ``places``: of the first copy, what is between, the
        second.

        Raises ``ValueError`` when what is not text leaves no room for a token of either copy.
        """
        text, between, second = places
        overhead = len(self.prefix) + len(self.suffix) + text + (second - between)
        longest = len(ids) if max_length is None else (max_length - overhead) // 2
        if longest < 1 and len(ids) > second:
            raise ValueError(
                f"max_length {max_length} leaves no token for a text that is given twice; {overhead + 2} is needed with this "
                "instruction"
            )
        kept = [range(text), range(text, min(between, text + longest)), range(between, second)]
        kept.append(range(second, min(len(ids), second + longest)))
        start = len(self.prefix) + sum(map(len, kept[:3]))
        return _Echo([ids[i] for part in kept for i in part], start, [i for part in kept for i in part])

    def _encodings(self, joined: list[str], prefixes: list[str], spans: bool) -> list[Any]:
        """The backend's results, with special tokens read where the prefix has one; offsets only where spans need them."""
        found: list[Any] = [None] * len(joined)
        marked = {prefix for prefix in set(prefixes) if self._has_special(prefix)}
        for special in (False, True):
            members = [i for i, prefix in enumerate(prefixes) if (prefix in marked) == special]
            if members:
                backend = self._reading_special if special else self.backend
                encode = backend.encode_batch if spans else backend.encode_batch_fast
                encodings = encode([joined[i] for i in members], add_special_tokens=False)
                for i, encoding in zip(members, encodings, strict=True):
                    found[i] = encoding
        return found

    @cached_property
    def _reading_special(self) -> Tokenizer:
        """The backend, reading special tokens that are written out."""
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _has_special(self, prefix: str) -> bool:
        return self._special is not None and self._special.search(prefix) is not None

    def _joined(self, prefix: str, text: str) -> str:
        if prefix and self._has_special(prefix):
            text = self._special.sub(lambda match: f"{match[0][:1]} {match[0][1:]}", text)  # type: ignore[union-attr]
        return prefix + text

    @cached_property
    def _words(self) -> Any:
        """What tokenizes by remembered words; None for tokenizers whose words depend on their neighbours."""
        return words_of(self.backend)

    def bodies(
        self, texts: Sequence[str], max_length: int | None = None, *, queries: bool = False
    ) -> tuple[list[int], list[int]]:
        """Returns the token ids of all texts end to end and where each text's end.

        They are those of the rows that calling gives, cut where those are cut, without what the model puts before and after,
        and much sooner had for some tokenizers.
        """
        lower, max_length = self.config.lowercase, self.config.limit(max_length, query=queries)
        self._require_place(max_length)
        texts = [t if type(t) is str and t.isascii() and not lower else self._clean(t) for t in _listed(texts)]
        if self._words is not None:
            ids, ends = self._words(texts)
        else:
            rows = [encoding.ids for encoding in self._encodings(texts, [""] * len(texts), False)]
            ids, ends = [i for row in rows for i in row], list(accumulate(map(len, rows)))
        if max_length is None:
            return ids, ends
        kept = self.config.truncation == "keep_eos"
        room = max(0, max_length - len(self.prefix) - (len(self.suffix) if kept else 0))
        return (ids, ends) if len(ids) <= room else _cut(ids, ends, room)

    def prefix_ids(self, prefix: str) -> list[int]:
        """Returns the token ids of an instruction alone."""
        backend = self._reading_special if self._has_special(prefix) else self.backend
        return backend.encode(prefix, add_special_tokens=False).ids

    def _prefixes(self, instructions: str | Sequence[str], count: int) -> list[str]:
        """One clean prefix a text."""
        if isinstance(instructions, str):
            return [self._clean(instructions)] * count
        if not isinstance(instructions, Sequence):
            raise TypeError(f"an instruction must be a string ('' for none), got {type(instructions).__name__}")
        if len(instructions) != count:
            raise ValueError(f"{count} texts but {len(instructions)} instructions; give one, or one a text")
        return [self._clean(prefix) for prefix in instructions]

    def frame(
        self, bodies: Sequence[Sequence[int]], instruction: str = "", max_length: int | None = None, *, query: bool = False
    ) -> TokenRows:
        """Returns rows of texts given as token ids, under one literal instruction, as the texts themselves would give them.

        ``query``: as which side's, where sides differ. Ids with or without what the model puts before and after make the same
        row. An instruction's tokens are those it has alone. Raises ``ValueError`` when the instruction leaves no room for its
        text.
        """
        max_length = self.config.limit(max_length, query=query)
        before = self.prefix_ids(self._clean(instruction)) if instruction else []
        start = 0
        if before and self.config.pool_instruction != "include":
            start = len(before) + (0 if self.config.pool_instruction == "exclude_by_count" else len(self.prefix))
        if self.config.repeat is not None:
            return self._echoed_ids(before, bodies, max_length)
        rows = []
        for ids in bodies:
            body = [*before, *self._body(ids)]
            row = self._row(body, max_length)
            if start:
                self._require_room(start, len(row) - self._kept(body, row), max_length)
            rows.append(row)
        side = np.full(len(rows), query) if self.config.sided else None
        return self._expanded(TokenRows(rows, np.full(len(rows), start, dtype=np.int32), side), max_length)

    def _echoed_ids(self, before: list[int], bodies: Sequence[Sequence[int]], max_length: int | None) -> TokenRows:
        """Rows of repeated texts given as token ids; what is between has the tokens it has alone."""
        between = self.prefix_ids(self._clean(self.config.repeat or ""))
        rows, starts = [], []
        for body in map(self._body, bodies):
            places = len(before), len(before) + len(body), len(before) + len(body) + len(between)
            echo = self._echo([*before, *body, *between, *body], places, max_length)
            rows.append(self._row(echo.body, None))
            starts.append(min(echo.start, len(rows[-1]) - 1))
        return TokenRows(rows, np.array(starts, dtype=np.int32))

    def offsets(
        self, text: str, instruction: str = "", max_length: int | None = None, *, query: bool = False
    ) -> list[tuple[int, int] | None]:
        """Returns for each token of a text's row the characters of ``text`` it was read from, None for tokens not of it.

        Characters are code points. Where the model's lower case or a written-out special token moves them, the place of the
        characters that moved is approximate.
        """
        max_length = self.config.limit(max_length, query=query)
        prefix, clean = self._clean(instruction), self._clean(text)
        joined = self._joined(prefix, clean)
        moved = [len(prefix)]
        if self.config.repeat is not None:
            repeat = self._clean(self.config.repeat)
            moved.append(len(joined) + len(repeat))
            joined += repeat + joined[len(prefix) :]
        encoding = self._encodings([joined], [prefix], True)[0]
        spans: list[tuple[int, int] | None] = []
        for low, high in encoding.offsets:
            begin = max((place for place in moved if place < high), default=moved[0])
            low, high = (min(max(place - begin, 0), len(text)) for place in (low, high))
            spans.append((low, high) if high > low else None)
        if self.config.repeat is not None:
            ends = moved[0], moved[1] - len(repeat), moved[1]
            spans = [
                spans[i]
                for i in self._echo(encoding.ids, [self._token_at(encoding, e, len(joined)) for e in ends], max_length).kept
            ]
        elif max_length is not None and self.config.truncation == "keep_eos":
            spans = spans[: max_length - len(self.prefix) - len(self.suffix)]
        return ([None] * len(self.prefix) + spans + [None] * len(self.suffix) or [None])[:max_length]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of a row's token ids, without what the model puts before and after."""
        return self.backend.decode(self._body(ids), skip_special_tokens=False)

    def _body(self, ids: Sequence[int]) -> list[int]:
        """A row's token ids without what the model puts before and after."""
        body = [int(i) for i in ids]
        body = body[len(self.prefix) :] if body[: len(self.prefix)] == self.prefix else body
        return body[: -len(self.suffix)] if self.suffix and body[-len(self.suffix) :] == self.suffix else body

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json``."""
        self.backend.save(str(Path(folder) / "tokenizer.json"))

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """The ids the tokenizer's own template puts before and after a text, our end token added where it lacks one."""
        bare = self.backend.encode("a", add_special_tokens=False).ids
        framed = self.backend.encode("a", add_special_tokens=True).ids
        first = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
        prefix, suffix = framed[:first], framed[first + len(bare) :]
        if self.config.eos_token is not None:
            eos = self.backend.token_to_id(self.config.eos_token)
            if eos is None:
                raise ValueError(f"eos_token {self.config.eos_token!r} is not in the tokenizer's vocabulary")
            suffix = suffix if suffix[-1:] == [eos] else [*suffix, eos]
        return prefix, suffix

    def _require_place(self, max_length: int | None) -> None:
        least = len(self.prefix) + len(self.suffix) + 1
        if max_length is not None and max_length < least:
            raise ValueError(f"max_length {max_length} leaves no token for the text; at least {least} is needed")

    def _row(self, body: list[int], max_length: int | None) -> np.ndarray:
        self._require_place(max_length)
        if max_length is not None and self.config.truncation == "keep_eos":
            body = body[: max_length - len(self.prefix) - len(self.suffix)]
        row = np.array([*self.prefix, *body, *self.suffix], dtype=np.int32)
        if len(row) == 0:
            row = np.zeros(1, dtype=np.int32)
        return row if max_length is None else row[:max_length]

    def _prefix_counts(self, prefixes: Sequence[str]) -> dict[str, int]:
        """Positions left out a distinct instruction, for the rules that count; empty for the others."""
        if not self.config.pool_instruction.startswith("exclude_by_count"):
            return {}
        extra = len(self.prefix) if self.config.pool_instruction == "exclude_by_count_and_prefix" else 0
        return {p: extra + len(self.prefix_ids(p)) for p in set(prefixes) if p}

    def _start(self, encoding: object, boundary: int, end: int) -> int:
        """Index in the row of the first token with a character at or after ``boundary``."""
        return len(self.prefix) + self._token_at(encoding, boundary, end)

    @staticmethod
    def _token_at(encoding: object, boundary: int, end: int) -> int:
        """The first token with a character at or after ``boundary``; the number of tokens where there is none."""
        for position in range(boundary, end):
            token = encoding.char_to_token(position)  # type: ignore[attr-defined]
            if token is not None:
                return int(token)
        return len(encoding.ids)  # type: ignore[attr-defined]

    def _kept(self, body: list[int], row: np.ndarray) -> int:
        """End tokens that survive although the text before them was cut: pooling these alone would be no vector of it."""
        cut = len(row) < len(self.prefix) + len(body) + len(self.suffix)
        return len(self.suffix) if cut and self.config.truncation == "keep_eos" else 0

    @staticmethod
    def _require_room(start: int, length: int, max_length: int | None) -> None:
        if start >= length:
            raise ValueError(
                f"the instruction takes {start} of {max_length} tokens and leaves none of the text to pool; "
                "shorten the instruction or raise max_length"
            )

    def _clean(self, text: str) -> str:
        if not isinstance(text, str):
            raise TypeError(f"texts and instructions must be strings, got {type(text).__name__}")
        text = LONE_SURROGATE.sub("\ufffd", text)
        return text.lower() if self.config.lowercase else text
