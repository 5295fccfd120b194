"""The base of every configuration: frozen, closed to unknown keys, with errors that name the key and the value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

C = TypeVar("C", bound="Config")
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
"""Of something that becomes the name of a folder or file."""


class Config(BaseModel):
    """A frozen set of named settings; unknown keys are refused. Each part defines its own beside the class it builds."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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


def describe_errors(error: ValidationError, where: str) -> str:
    """Returns one line an error: ``where: path.to.key: reason (got value)``; of settings that do not go together the reason."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
        if not path and item["type"] == "value_error":
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
            continue
        given = "" if item["type"] == "missing" else f" (got {_short(item['input'])})"
        lines.append(f"{where}: {path}: {item['msg']}{given}")
    return "\n".join(lines)


def parse(kind: type[C], values: Any, where: str) -> C:
    """Returns ``values`` as a ``kind``; raises ``ValueError`` naming file, key, reason and value when they do not fit."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(describe_errors(error, where)) from None


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
