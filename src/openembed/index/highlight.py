"""Where a query's terms stand in a text, and the part of a text that holds most of them."""

from __future__ import annotations

from collections.abc import Set

from openembed.index.lexical import Analyzer

Span = tuple[int, int, str]


def matches(text: str, terms: Set[str], analyzer: Analyzer) -> list[Span]:
    """Returns (start, end, term) of each word of ``text`` whose stem is among ``terms``, those of a query."""
    return [span for span in analyzer.spans(text) if span[2] in terms]


def snippet(text: str, spans: list[Span], width: int = 200) -> tuple[int, int]:
    """Returns (start, end) of at most ``width`` characters of ``text``, cut at words where it can be.

    It holds the most distinct terms, then the most matches, then the earliest.
    """
    best, start, last = (0, 0), 0, 0
    for first, (low, _, _) in enumerate(spans):
        while last < len(spans) and spans[last][1] <= low + width:
            last += 1
        inside = spans[first:last]
        score = (len({term for _, _, term in inside}), len(inside))
        if score > best:
            end = inside[-1][1]
            best, start = score, max(0, low - (width - (end - low)) // 2)
    start = max(0, min(start, len(text) - width))
    end = min(len(text), start + width)
    return _after_space(text, start, spans), _before_space(text, end, spans)


def _after_space(text: str, start: int, spans: list[Span]) -> int:
    """Moves ``start`` past the rest of a word it cuts, unless that would skip a match."""
    space = text.find(" ", start, start + 20)
    if start == 0 or text[start - 1].isspace() or space < 0:
        return start
    return start if any(start <= low < space for low, _, _ in spans) else space + 1


def _before_space(text: str, end: int, spans: list[Span]) -> int:
    """Moves ``end`` back before a word it cuts, unless that would skip a match."""
    space = text.rfind(" ", max(0, end - 20), end)
    if end == len(text) or text[end].isspace() or space < 0:
        return end
    return end if any(space < high <= end for _, high, _ in spans) else space
