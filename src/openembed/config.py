"""The base of every configuration: frozen, closed to unknown keys, with errors that name the key and the value."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen set of named settings; unknown keys are refused. Each part defines its own beside the class it builds."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def describe_errors(error: ValidationError, where: str) -> str:
    """Returns one line an error: ``where: path.to.key: reason (got value)``."""
    lines = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"])
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
