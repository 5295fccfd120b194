"""The base of every configuration: frozen, closed to unknown keys, with errors that name the key and the value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

C = TypeVar("C", bound="Config")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""Of something that becomes the name of a folder or file."""


def whole(value: Any) -> Any:
    """Returns ``5.0`` as 5, for to JSON they are one number, and numpy's integers as Python's; everything else as it is."""
    number = (type(value) is float and value.is_integer()) or (isinstance(value, Integral) and not isinstance(value, bool))
    return int(value) if number else value


Count = Annotated[int, Field(ge=1, strict=True), BeforeValidator(whole)]
"""A number of things, from 1; text is none."""
CountFromZero = Annotated[int, Field(ge=0, strict=True), BeforeValidator(whole)]
"""A number of things, from 0."""


class Config(BaseModel):
    """A frozen set of named settings; unknown keys are refused. Each part defines its own beside the class it builds."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def kind_required(schema: dict[str, Any]) -> None:
    """Makes ``kind`` a required key of a JSON schema: told apart by it, a part of a union has a default in Python alone."""
    schema["required"] = [*schema.get("required", []), "kind"]


def chosen(config: Config) -> dict[str, Any]:
    """Returns the settings that differ from their defaults, nested, and every ``kind``, as plain JSON values.

    A field added later leaves the result of existing configurations as it is, as long as its default means what was done
    before: what hashes and comparisons over versions need.
    """
    fields = type(config).model_fields
    return {
        name: _plain(value)
        for name, value in config
        if name == "kind" or fields[name].is_required() or value != fields[name].get_default(call_default_factory=True)
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return chosen(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def describe_errors(error: ValidationError, where: str, kind: type[Config] | None = None) -> str:
    """Returns one line an error: ``where: path.to.key: reason (got value)``; of settings that do not go together the reason.

    ``kind``: what was to be made, so that an unknown key can be answered with those it may have been meant for.
    """
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if not path and item["type"] == "value_error":
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
            continue
        given = "" if item["type"] == "missing" else f" (got {_short(item['input'])})"
        meant = _meant(kind, item["loc"]) if kind is not None and item["type"] == "extra_forbidden" else ""
        lines.append(f"{where}: {path}: {item['msg']}{given}{meant}")
    return "\n".join(lines)


def parse(kind: type[C], values: Any, where: str) -> C:
    """Returns ``values`` as a ``kind``; raises ``ValueError`` naming file, key, reason and value when they do not fit."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe_errors(error, where, kind)) from None


def _meant(kind: type[Config], place: Sequence[str | int]) -> str:
    """The keys of a configuration that are most like an unknown one, or all that it has where none is."""
    found: list[Any] = [kind]
    for part in place[:-1]:
        found = [inner for one in found for inner in _inside(one, part)]
    known = list(dict.fromkeys(name for one in found for name in _members(one)))
    close = get_close_matches(str(place[-1]), known, n=3)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return f"; known are {', '.join(known)}" if known else ""


def _inside(kind: Any, part: str | int) -> Iterator[Any]:
    """The types of what ``part`` of an error's place leads to: a key, an index, or the one of several that was chosen."""
    if isinstance(kind, type) and issubclass(kind, Config):
        fields = kind.model_fields
        tags = (
            tag for field in fields.values() if get_origin(field.annotation) is Literal for tag in get_args(field.annotation)
        )
        if part in fields:
            yield from _alternatives(fields[part].annotation)
        elif part == kind.__name__ or part in tags:
            yield kind
    elif isinstance(get_origin(kind), type) and (inner := [each for each in get_args(kind) if each is not Ellipsis]):
        yield from _alternatives(inner[-1])


def _alternatives(annotation: Any) -> list[Any]:
    """What a value may be: the members of a union, those of its members, and so on."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for member in get_args(annotation) for one in _alternatives(member)]
    return [annotation]


def _members(kind: Any) -> list[str]:
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, Config) else []


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
