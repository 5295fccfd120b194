"""Conditions on the metadata of documents, parsed once and translated by each database.

    {"lang": "en"}                      equal; of a list: one of its values is
    {"year": {"gte": 2000, "lt": 2020}} gt, gte, lt, lte: numbers, or strings in order
    {"tag": {"in": ["a", "b"]}}         one of several values
    {"isbn": {"exists": true}}          whether there is a value (null and an empty list are none)
    {"and": [...]}  {"or": [...]}  {"not": {...}}; several keys of one object all hold

The parts of a nested object are named by dots. Strings, numbers and true/false are kept apart.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openembed.records import Document

Value = str | float | bool
RANGES = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
OPERATORS = (*RANGES, "in", "exists")


@dataclass(frozen=True)
class Field:
    """One or several conditions on one field: all hold. A list holds the ranges when one of its values lies in them."""

    name: str
    conditions: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class All:
    """Every part holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Any_:
    """At least one part holds."""

    parts: tuple[Filter, ...]


@dataclass(frozen=True)
class Not:
    """The part does not hold: also where the field is missing."""

    part: Filter


Filter = Field | All | Any_ | Not


def parse_filter(given: Mapping[str, Any]) -> Filter:
    """Returns the filter that ``given`` describes; raises ``ValueError`` naming what cannot be understood, and where."""
    return _parse(given, "filter")


def flat_values(metadata: Mapping[str, Any]) -> dict[str, list[Value]]:
    """Returns the distinct values of each field: those of a list one by one, those of an object under ``field.key``."""
    found: dict[str, list[Value]] = {}
    _flatten("", metadata, found)
    return found


def holds(condition: Filter, document: Document) -> bool:
    """Returns whether the condition holds for one document: what every translation has to agree with."""
    return _holds(condition, flat_values(document.metadata))


def kind(value: object) -> str | None:
    """Returns what a filter takes a value for: ``boolean``, ``number`` or ``string``; None for anything else."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number" if math.isfinite(value) else None
    return "string" if isinstance(value, str) else None


def _holds(condition: Filter, fields: Mapping[str, list[Value]]) -> bool:
    match condition:
        case Field(name, conditions):
            values, ranges = fields.get(name, []), [pair for pair in conditions if pair[0] in RANGES]
            held = [_one(values, name, value) for name, value in conditions if name not in RANGES]
            return all(held) and (not ranges or any(all(_within(v, *pair) for pair in ranges) for v in values))
        case Not(part):
            return not _holds(part, fields)
        case All(parts):
            return all(_holds(part, fields) for part in parts)
        case Any_(parts):
            return any(_holds(part, fields) for part in parts)


def _one(values: list[Value], name: str, wanted: Any) -> bool:
    if name == "exists":
        return bool(values) == wanted
    return any(kind(a) == kind(b) and a == b for a in values for b in wanted)


def _within(value: Value, name: str, bound: Value) -> bool:
    return kind(value) == kind(bound) and RANGES[name](value, bound)


def _flatten(prefix: str, value: Any, found: dict[str, list[Value]]) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), part, found)
    elif isinstance(value, list | tuple):
        for part in value:
            _flatten(prefix, part, found)
    elif prefix and kind(value) is not None:
        values = found.setdefault(prefix, [])
        if not any(kind(v) == kind(value) and v == value for v in values):
            values.append(value)


def _parse(given: Any, where: str) -> Filter:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: must be an object such as {{'lang': 'en'}}, got {type(given).__name__}")
    parts = tuple(_entry(key, value, f"{where}.{key}") for key, value in given.items())
    return parts[0] if len(parts) == 1 else All(parts)


def _entry(key: Any, value: Any, where: str) -> Filter:
    if key in ("and", "or"):
        parts = tuple(_parse(part, f"{where}[{number}]") for number, part in enumerate(_list(value, where)))
        return All(parts) if key == "and" else Any_(parts)
    if key == "not":
        return Not(_parse(value, where))
    if not isinstance(key, str) or not key:
        raise ValueError(f"{where}: a field is named by a string, got {key!r}")
    if not isinstance(value, Mapping):
        return Field(key, (("in", (_value(value, where),)),))
    if not value:
        raise ValueError(f"{where}: no operator; allowed: {', '.join(OPERATORS)}")
    return Field(key, tuple((name, _operand(name, operand, f"{where}.{name}")) for name, operand in value.items()))


def _operand(name: object, value: Any, where: str) -> Any:
    if name == "in":
        return tuple(_value(one, f"{where}[{number}]") for number, one in enumerate(_list(value, where)))
    if name == "exists":
        if not isinstance(value, bool):
            raise ValueError(f"{where}: must be true or false, got {value!r}")
        return value
    if name in RANGES:
        if kind(value) not in ("number", "string"):
            raise ValueError(f"{where}: must be a number or a string, got {value!r}")
        return value
    raise ValueError(f"{where}: unknown operator {name!r}; allowed: {', '.join(OPERATORS)}, and above fields and, or, not")


def _list(value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: must be a list, got {type(value).__name__}")
    return value


def _value(value: Any, where: str) -> Value:
    if kind(value) is None:
        raise ValueError(f"{where}: must be a string, a finite number, true or false, got {value!r}")
    return value
