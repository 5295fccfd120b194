"""Filters over metadata, parsed once and translated by each database.

    {"lang": "en"}                      equal; of a list: one of its elements is
    {"year": {"gte": 2000, "lt": 2020}} gt, gte, lt, lte
    {"tag": {"in": ["a", "b"]}}         equal to one of them
    {"isbn": {"exists": true}}          there, and neither null nor an empty list
    {"not": {...}}  {"and": [...]}  {"or": [...]}; several keys of one object must all hold

Values are strings, numbers and booleans; a boolean is no number. Numbers are compared with numbers, strings with strings.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Value = str | int | float | bool
COMPARISONS = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


@dataclass(frozen=True)
class OneOf:
    """The field equals one of ``values``."""

    field: str
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Within:
    """The field lies within ``bounds``: (gt, gte, lt or lte; number or string)."""

    field: str
    bounds: tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class Exists:
    """The field is there."""

    field: str


@dataclass(frozen=True)
class Not:
    """``part`` does not hold."""

    part: Condition


@dataclass(frozen=True)
class AllOf:
    """Every part holds; without parts: true."""

    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class AnyOf:
    """At least one part holds; without parts: false."""

    parts: tuple[Condition, ...]


Condition = OneOf | Within | Exists | Not | AllOf | AnyOf


def parse_conditions(given: Mapping[str, Any]) -> Condition:
    """Returns the condition of a filter; raises ``ValueError`` naming the part that cannot be understood."""
    if not isinstance(given, Mapping):
        raise ValueError(f"a filter is an object such as {{'lang': 'en'}}, got {given!r:.80}")
    parts = tuple(_entry(key, value) for key, value in given.items())
    return parts[0] if len(parts) == 1 else AllOf(parts)


def holds(condition: Condition, metadata: Mapping[str, Any]) -> bool:
    """Returns whether ``condition`` is true of ``metadata``: what every translation has to agree with."""
    match condition:
        case OneOf(field, values):
            return any(_same_kind(a, b) and a == b for a in _elements(metadata, field) for b in values)
        case Within(field, bounds):
            elements = _elements(metadata, field)
            return any(all(_same_kind(a, b) and COMPARISONS[name](a, b) for name, b in bounds) for a in elements)
        case Exists(field):
            return metadata.get(field) not in (None, [])
        case Not(part):
            return not holds(part, metadata)
        case AllOf(parts):
            return all(holds(part, metadata) for part in parts)
        case AnyOf(parts):
            return any(holds(part, metadata) for part in parts)


def _entry(key: str, value: Any) -> Condition:
    if key in ("and", "or"):
        if not isinstance(value, list | tuple):
            raise ValueError(f"filter: {key!r} takes a list of filters, got {value!r:.80}")
        parts = tuple(parse_conditions(part) for part in value)
        return AllOf(parts) if key == "and" else AnyOf(parts)
    if key == "not":
        return Not(parse_conditions(value))
    if isinstance(value, Mapping):
        return _field(key, value)
    return OneOf(key, (_value(key, value),))


def _field(key: str, given: Mapping[str, Any]) -> Condition:
    names = set(given)
    if names == {"in"}:
        if not isinstance(given["in"], list | tuple):
            raise ValueError(f"filter: {key!r}: 'in' takes a list, got {given['in']!r:.80}")
        return OneOf(key, tuple(_value(key, value) for value in given["in"]))
    if names == {"exists"}:
        if not isinstance(given["exists"], bool):
            raise ValueError(f"filter: {key!r}: 'exists' takes true or false, got {given['exists']!r:.80}")
        return Exists(key) if given["exists"] else Not(Exists(key))
    if names and names <= COMPARISONS.keys():
        bounds = tuple((name, _value(key, value)) for name, value in given.items())
        if any(isinstance(value, bool) or not _same_kind(value, bounds[0][1]) for _, value in bounds):
            raise ValueError(f"filter: {key!r}: bounds are numbers, or all strings, got {dict(given)!r:.80}")
        return Within(key, bounds)
    allowed = "a value, {'in': [...]}, {'exists': true} or bounds (gt, gte, lt, lte)"
    raise ValueError(f"filter: {key!r}: {dict(given)!r:.80} is not known; use {allowed}")


def _value(key: str, value: Any) -> Value:
    if not isinstance(value, str | int | float):
        raise ValueError(f"filter: {key!r}: values are strings, numbers and booleans, got {value!r:.80}")
    return value


def _elements(metadata: Mapping[str, Any], field: str) -> list[Any]:
    value = metadata.get(field)
    return value if isinstance(value, list) else [value]


def _same_kind(a: Any, b: Any) -> bool:
    return _kind(a) == _kind(b)


def _kind(value: Any) -> type | None:
    for kind in (bool, str):
        if isinstance(value, kind):
            return kind
    return float if isinstance(value, int | float) else None
