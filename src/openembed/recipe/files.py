"""Recipe files as plain tables: finding them, ``extends``, and ``--set``. Loads neither torch nor the stage configs."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Table = dict[str, Any]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as written, with its parent's keys filled in. ``packaged``: it is one that openembed ships."""

    name: str
    path: Path
    packaged: bool
    table: Table

    @property
    def summary(self) -> Table:
        """Name, title, stages and path, for listing."""
        stages = {name: stage.get("do") for name, stage in self.table.get("stage", {}).items()}
        return {"name": self.name, "title": self.table.get("title", ""), "stages": stages, "path": str(self.path)}


def packaged_recipes() -> list[RecipeFile]:
    """Returns the recipes that openembed ships, by name."""
    return [read_recipe(path.stem) for path in sorted(_folder().glob("*.toml"))]


def read_recipe(name_or_path: str | Path) -> RecipeFile:
    """Returns a recipe by its packaged name or by the path of a TOML file.

    A recipe may name one parent in ``extends`` (a file beside it, or a packaged recipe), whose tables it completes and
    overrides key by key; lists are replaced whole. Raises ``FileNotFoundError`` naming the known recipes, or
    ``ValueError`` for broken TOML or a parent that itself extends.
    """
    path, packaged = _find(str(name_or_path))
    table = _parse(path)
    parent_name = table.pop("extends", None)
    if parent_name is not None:
        parent = _parse(_parent(path, parent_name))
        if "extends" in parent:
            raise ValueError(f"{path}: extends: {parent_name!r} itself extends {parent['extends']!r}; one level is allowed")
        table = merge(parent, table)
    return RecipeFile(path.stem, path, packaged, table)


def checked_recipe(name_or_path: str | Path, settings: Iterable[str] = ()) -> RecipeFile:
    """Returns what :func:`read_recipe` does; raises what it and :func:`override` with ``settings`` do: all that can be said
    against a recipe before torch is imported."""
    file = read_recipe(name_or_path)
    override(file.table, settings)
    return file


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Table:
    """Returns ``base`` with the keys of ``over``: tables are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_tables else value
    return merged


def override(table: Mapping[str, Any], settings: Iterable[str]) -> Table:
    """Returns ``table`` with each ``path.to.key=value`` applied, such as ``stage.stage1.optimizer.lr=1e-5``.

    The right side is read as a TOML value, or as a plain string where it is none. Raises ``ValueError`` for a setting
    without ``=`` or a path that runs through something that is no table.
    """
    changed: Table = dict(table)
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = [key.strip() for key in path.split(".")]
        if not equals or not all(keys):
            raise ValueError(f"--set {setting}: expected path.to.key=value, for example stage.stage1.optimizer.lr=1e-5")
        place = changed
        for depth, key in enumerate(keys[:-1], 1):
            inner = place.get(key, {})
            if not isinstance(inner, Mapping):
                raise ValueError(f"--set {setting}: {'.'.join(keys[:depth])} is no table (it is {inner!r})")
            place[key] = dict(inner)
            place = place[key]
        place[keys[-1]] = _value(text.strip())
    return changed


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _folder() -> Path:
    return Path(__file__).parents[1] / "recipes"


def _find(name: str) -> tuple[Path, bool]:
    packaged = _folder() / f"{name}.toml"
    if "/" not in name and packaged.is_file():
        return packaged, True
    path = Path(name)
    if path.is_file():
        return path, False
    known = ", ".join(sorted(item.stem for item in _folder().glob("*.toml")))
    raise FileNotFoundError(f"{name}: no such recipe; give the path of a TOML file or one of: {known}")


def _parent(path: Path, name: str) -> Path:
    for candidate in (path.parent / f"{name}.toml", _folder() / f"{name}.toml"):
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path}: extends: no recipe {name!r} beside it or in the package")


def _parse(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML ({error})") from None


def to_toml(table: Mapping[str, Any]) -> str:
    """Returns ``table`` as TOML that reads back equal, keys without a value (None) left out."""
    return "\n".join(_table_lines((), table)).strip() + "\n"


def _table_lines(path: tuple[str, ...], table: Mapping[str, Any]) -> list[str]:
    """Plain values first, then the tables below, each under its own header."""
    plain = {key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)}
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_inline(value)}" for key, value in plain.items()]
    for key, value in inner.items():
        below = (*path, key)
        lines += ["", f"[{'.'.join(map(_key, below))}]", *_table_lines(below, value)]
    return lines


def _inline(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(k)} = {_inline(v)}" for k, v in value.items() if v is not None) + " }"
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, Mapping) for item in value):
            return "[\n" + "".join(f"  {_inline(item)},\n" for item in value) + "]"
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's, with the one control character that JSON leaves as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
