"""What an output folder holds of earlier runs: whether another run may go there, and what has changed since."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from openembed.recipe.config import Recipe

RECIPE = "recipe.toml"
STAGES = "stages"
"""The folder of a sweep's stages."""
STATE = "state.json"
SHOWN, LONGEST = 3, 60
"""Changed settings that are named, and characters of a value."""


def check_folder(out: Path, recipe: Recipe, *, sweep: bool = False) -> None:
    """Raises ``ValueError`` when ``out`` holds what this run would replace by something that is no later state of it.

    That is a run of another recipe, a smoke run where this one is none (or the reverse), and a sweep where this one is a
    run (or the reverse). A changed recipe of the same name and kind may go on there, and so may sweeps of several recipes:
    their stages lie side by side, and their reports are made anew in no time.
    """
    path = out / RECIPE
    if not path.is_file():
        return
    held = _read(path)
    name, smoke, was_sweep = held.get("name"), held.get("smoke") is True, _is_sweep(out)
    renamed = name != recipe.name and not (sweep and was_sweep)
    if renamed or (smoke, was_sweep) != (recipe.smoke, sweep):
        there, here = _told(name, smoke=smoke, sweep=was_sweep), _told(recipe.name, smoke=recipe.smoke, sweep=sweep)
        hint = f' (or, where it is the same recipe renamed, give it name = "{name}")' if renamed else ""
        raise ValueError(f"{out}: holds {there}, and this is {here}, which would replace it; choose another --out{hint}")


def changes(path: Path, settings: str) -> str:
    """Returns in what the TOML ``settings`` differ from those in file ``path``, in a few words."""
    before, after = (dict(_flat(table)) for table in (_read(path) if path.is_file() else {}, tomllib.loads(settings)))
    keys = [key for key in after | before if before.get(key) != after.get(key)]
    if not before or not keys:
        return "data, an earlier stage or the version of openembed changed"
    named = [f"{key} = {_short(after.get(key))}, was {_short(before.get(key))}" for key in keys[:SHOWN]]
    return "; ".join(named) + (f"; and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")


def _short(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _told(name: object, *, smoke: bool, sweep: bool) -> str:
    return f"a {'smoke ' if smoke else ''}{'sweep' if sweep else 'run'} of {name}"


def _is_sweep(out: Path) -> bool:
    """True when ``out`` is a sweep's: a stage may be called ``stages`` too, but has a state."""
    return (out / STAGES).is_dir() and not (out / STAGES / STATE).is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged ({error}); choose another --out or move it") from None


def _flat(table: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a table by dotted path."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value
