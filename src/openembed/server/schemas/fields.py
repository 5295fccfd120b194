"""What requests and answers share: fields and how they are checked, how a text is to be read, errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from openembed.config import Config, whole

DEEPEST = 16
"""Levels of lists and objects that free-form values (metadata, filters) may have."""

InputType = Literal["query", "document", "passage", "search_query", "search_document"]
"""What texts are to the model; ``passage`` and ``search_*`` are other vendors' words for the same two."""

TEXT = {"type": "string"}
IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
INPUT_SCHEMA = {
    "anyOf": [TEXT, {"type": "array", "items": TEXT, "minItems": 1}, IDS, {"type": "array", "items": IDS, "minItems": 1}]
}


def _input(value: Any) -> Any:
    """A string, strings, token ids or lists of them; checked by hand, since one error a wrong item would fill memory."""
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise ValueError("must be a string, a list of strings, token ids or a list of token ids, and not empty")
    if type(value[0]) in (int, float):
        value = [whole(item) for item in value] if float in set(map(type, value)) else value
    kind = type(value[0])
    if kind is list:
        value = [[whole(item) for item in row] if type(row) is list and float in set(map(type, row)) else row for row in value]
        if not all(type(row) is list and row and all(type(i) is int for i in row) for row in value):
            raise ValueError("each text must be a list of token ids (integers), and not empty")
    elif kind not in (str, int) or not all(type(item) is kind for item in value):
        raise ValueError("must hold strings only, or token ids (integers) only")
    return value


def _shallow(value: Any) -> Any:
    """``value``, unless it is nested deeper than ``DEEPEST``."""
    level, layer = 0, [value]
    while layer:
        level += 1
        if level > DEEPEST + 1:
            raise ValueError(f"is nested deeper than {DEEPEST} levels")
        inner = [item for item in layer if isinstance(item, (dict, list))]
        layer = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
    return value


Input = Annotated[Any, BeforeValidator(_input), WithJsonSchema(INPUT_SCHEMA)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
Free = Annotated[dict[str, Any], AfterValidator(_shallow)]
Text = Annotated[str, Field(min_length=1)]


class Request(Config):
    """The base of all requests."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class Prompted(Request):
    """How texts are to be read. ``input_type``: what they are (document unless said). ``task``: one of the model's own
    table; ``instruction``: a description of the task in words. ``truncate``: cut a text that is too long (else 400)."""

    input_type: InputType | None = None
    task: str | None = None
    instruction: str | None = None
    truncate: bool = True

    @property
    def is_query(self) -> bool:
        """True when the texts are queries."""
        return self.input_type in ("query", "search_query")


class Problem(BaseModel):
    """What is wrong. ``param``: the key; ``code``: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error."""

    error: Problem


class Usage(BaseModel):
    """Tokens encoded, special tokens included."""

    prompt_tokens: int
    total_tokens: int
