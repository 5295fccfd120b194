"""Marker tokens: PyLate and ColBERT insert one behind a text's first token; here it is a prompt, read as that token."""

from __future__ import annotations

from openembed.tokenization import TextTokenizer

BEGINNINGS = ("word", "Word", "7", "中文", "(bracket", "-", '"quoted"', "é", "two words")
"""Beginnings of texts, which a marker before them must leave as they are read alone. None is white space: PyLate drops that."""


def split_marker(tokenizer: TextTokenizer, prompt: str) -> tuple[str, str]:
    """Returns the special token that ``prompt`` begins with (empty: none) and the text after it."""
    ids = tokenizer.prefix_ids(prompt)
    name = tokenizer.backend.id_to_token(ids[0]) if ids else ""
    if not name or not is_special(tokenizer, name) or not prompt.startswith(name):
        return "", prompt
    return name, prompt[len(name) :]


def inserted(tokenizer: TextTokenizer, prompt: str, marker: str, rest: str) -> bool:
    """True when texts behind ``prompt`` are read as behind ``rest`` alone, with ``marker`` put in after the first token."""
    place = len(tokenizer.prefix)
    put_in = [tokenizer.backend.token_to_id(marker)] if marker else []
    plain = [row.tolist() for row in tokenizer(BEGINNINGS, rest).ids]
    return [row.tolist() for row in tokenizer(BEGINNINGS, prompt).ids] == [
        [*row[:place], *put_in, *row[place:]] for row in plain
    ]


def spaced(tokenizer: TextTokenizer, prompt: str) -> str:
    """Returns ``prompt`` with or without a space behind its marker, so that the text after it is read as it is alone.

    Which of them does that is the tokenizer's: some keep a space that begins a text, others want one before a word.
    """
    marker, rest = split_marker(tokenizer, prompt)
    rest = rest.lstrip()
    candidates = (prompt, marker + rest, f"{marker} {rest}")
    return next((each for each in candidates if marker and inserted(tokenizer, each, marker, rest)), prompt)


def is_special(tokenizer: TextTokenizer, name: str) -> bool:
    """True for a token that plain text never gives."""
    return any(token.special and token.content == name for token in tokenizer.backend.get_added_tokens_decoder().values())
