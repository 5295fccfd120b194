"""Conditions on the metadata of documents.

    {"lang": "en"}                                a field equals a value (or, being a list, holds it)
    {"year": {"gte": 2000, "lt": 2020}}           gt, gte, lt, lte: numbers, or strings in order of code points
    {"tag": {"in": ["a", "b"]}}                   one of several values
    {"url": {"exists": true}}                     whether the field is there (null is not)
    {"and": [...]}  {"or": [...]}  {"not": {...}} of conditions; several keys of one object are all to hold

The parts of a nested object are named by dots (``author.name``), a field called ``and``, ``or`` or ``not`` cannot be filtered.
Strings, numbers and true/false are kept apart: ``"2000"`` is not ``2000``, ``1`` is ``1.0`` but not ``true``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from openembed.records import Document

Value = str | float | bool
RANGES = ("gt", "gte", "lt", "lte")
OPERATORS = (*RANGES, "in", "exists")


class Columns(Protocol):
    """Where documents with a value are found."""

    count: int

    def equal(self, field: str, value: Value) -> np.ndarray:
        """Returns the positions of documents whose ``field`` is or holds ``value``."""
        ...

    def between(self, field: str, bounds: Mapping[str, Value]) -> np.ndarray:
        """Returns the positions of documents with a value of ``field`` within ``bounds`` (gt, gte, lt, lte → value)."""
        ...

    def existing(self, field: str) -> np.ndarray:
        """Returns the positions of documents that have ``field``."""
        ...


class Filter(Protocol):
    """A condition on documents."""

    def matching(self, columns: Columns) -> np.ndarray:
        """Returns bool (N): the documents for which it holds."""
        ...


@dataclass(frozen=True)
class Field:
    """One or several conditions on one field: all hold. A list holds a range when one of its values lies in it."""

    name: str
    conditions: tuple[tuple[str, Any], ...]

    def matching(self, columns: Columns) -> np.ndarray:
        """Returns bool (N)."""
        ranges = {operator: value for operator, value in self.conditions if operator in RANGES}
        found_N = np.ones(columns.count, dtype=bool)
        if ranges:
            found_N &= _marked(columns.count, columns.between(self.name, ranges))
        for operator, value in self.conditions:
            if operator == "in":
                found_N &= _marked(columns.count, *(columns.equal(self.name, one) for one in value))
            elif operator == "exists":
                found_N &= _marked(columns.count, columns.existing(self.name)) == value
        return found_N


@dataclass(frozen=True)
class All:
    """Every part holds."""

    parts: tuple[Filter, ...]

    def matching(self, columns: Columns) -> np.ndarray:
        """Returns bool (N)."""
        found_N = np.ones(columns.count, dtype=bool)
        for part in self.parts:
            found_N &= part.matching(columns)
        return found_N


@dataclass(frozen=True)
class Any_:
    """At least one part holds."""

    parts: tuple[Filter, ...]

    def matching(self, columns: Columns) -> np.ndarray:
        """Returns bool (N)."""
        found_N = np.zeros(columns.count, dtype=bool)
        for part in self.parts:
            found_N |= part.matching(columns)
        return found_N


@dataclass(frozen=True)
class Not:
    """The part does not hold: also where the field is missing."""

    part: Filter

    def matching(self, columns: Columns) -> np.ndarray:
        """Returns bool (N)."""
        return ~self.part.matching(columns)


def parse_filter(given: Mapping[str, Any]) -> Filter:
    """Returns the filter that ``given`` describes (see the module); ``{}`` holds for every document.

    Raises ``ValueError`` naming an unknown operator or a value of the wrong type, and where it stands.
    """
    return _parse(given, "filter")


def parse_where(text: str) -> dict[str, Any]:
    """Returns the filter of ``field=value``, ``field!=value`` or ``field>=value`` (also ``>``, ``<``, ``<=``).

    A value is read as JSON where it is JSON (a number, true, "a string"), else as a string; ``field=a|b`` is one of both.
    Raises ``ValueError`` for anything else.
    """
    match = re.fullmatch(r"\s*([^=<>!]+?)\s*(!=|>=|<=|=|>|<)\s*(.*?)\s*", text, re.DOTALL)
    if match is None:
        raise ValueError(f"{text!r} is no condition; write field=value, field!=value, field>=value, field<value, ...")
    name, operator, value = match.groups()
    if operator in ("=", "!="):
        values = [_literal(part) for part in value.split("|")]
        equal = {name: values[0] if len(values) == 1 else {"in": values}}
        return equal if operator == "=" else {"not": equal}
    return {name: {{">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}[operator]: _literal(value)}}


def flat_values(metadata: Mapping[str, Any]) -> dict[str, list[Value]]:
    """Returns the distinct values of each field: those of a list one by one, those of an object under ``field.key``."""
    found: dict[str, list[Value]] = {}
    _flatten("", metadata, found)
    return found


def holds(condition: Filter, document: Document) -> bool:
    """Returns whether the condition holds for one document."""
    return bool(condition.matching(OneDocument(flat_values(document.metadata)))[0])


class OneDocument:
    """The columns of a single document; the plain meaning of every operator."""

    count = 1

    def __init__(self, values: Mapping[str, Sequence[Value]]) -> None:
        self._values = values

    def equal(self, field: str, value: Value) -> np.ndarray:
        """Returns [0] or []."""
        return self._if(field, lambda v: kind(v) == kind(value) and v == value)

    def between(self, field: str, bounds: Mapping[str, Value]) -> np.ndarray:
        """Returns [0] or []."""
        return self._if(field, lambda v: all(_within(v, operator, bound) for operator, bound in bounds.items()))

    def existing(self, field: str) -> np.ndarray:
        """Returns [0] or []."""
        return self._if(field, lambda _v: True)

    def _if(self, field: str, test: Callable[[Value], bool]) -> np.ndarray:
        return np.arange(any(test(value) for value in self._values.get(field, ())))


def kind(value: object) -> str | None:
    """Returns what a filter takes a value for: ``boolean``, ``number`` or ``string``; None for anything else."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number" if math.isfinite(value) else None
    return "string" if isinstance(value, str) else None


def _within(value: Value, operator: str, bound: Value) -> bool:
    if kind(value) != kind(bound):
        return False
    return {"gt": value > bound, "gte": value >= bound, "lt": value < bound, "lte": value <= bound}[operator]


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
    parts: list[Filter] = []
    for key, value in given.items():
        at = f"{where}.{key}"
        if key in ("and", "or"):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{at}: must be a list of conditions, got {type(value).__name__}")
            inside = tuple(_parse(part, f"{at}[{number}]") for number, part in enumerate(value))
            parts.append(All(inside) if key == "and" else Any_(inside))
        elif key == "not":
            parts.append(Not(_parse(value, at)))
        else:
            parts.append(_field(key, value, at))
    return parts[0] if len(parts) == 1 else All(tuple(parts))


def _field(name: object, given: Any, where: str) -> Field:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: a field is named by a string, got {name!r}")
    if not isinstance(given, Mapping):
        return Field(name, (("in", (_value(given, where),)),))
    if not given:
        raise ValueError(f"{where}: no operator; allowed: {', '.join(OPERATORS)}")
    return Field(name, tuple((operator, _operand(operator, value, f"{where}.{operator}")) for operator, value in given.items()))


def _operand(operator: object, value: Any, where: str) -> Any:
    if operator == "in":
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: must be a list of values, got {type(value).__name__}")
        return tuple(_value(one, f"{where}[{number}]") for number, one in enumerate(value))
    if operator == "exists":
        if not isinstance(value, bool):
            raise ValueError(f"{where}: must be true or false, got {value!r}")
        return value
    if operator in RANGES:
        if kind(value) not in ("number", "string"):
            raise ValueError(f"{where}: must be a number or a string, got {value!r}")
        return value
    raise ValueError(f"{where}: unknown operator {operator!r}; allowed: {', '.join(OPERATORS)}, and above fields and, or, not")


def _value(value: Any, where: str) -> Value:
    if kind(value) is None:
        raise ValueError(f"{where}: must be a string, a finite number, true or false, got {value!r}")
    return value


def _literal(text: str) -> Any:
    import json

    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value if kind(value) is not None else text


def _marked(count: int, *positions: np.ndarray) -> np.ndarray:
    found_N = np.zeros(count, dtype=bool)
    for some in positions:
        found_N[some] = True
    return found_N
