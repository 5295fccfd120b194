"""Runs recipes stage by stage; what is finished and unchanged is not done again.

``OUT/recipe.toml`` (resolved), ``OUT/report.html``, and a folder a stage with its outputs and ``state.json``: the hash of
everything the stage depends on (its settings, the seed, its input files, the stages it reads) and whether it finished. A
stage whose hash is the same and which finished is skipped; one that was interrupted goes on where its part can (training
from its last checkpoint, evaluation after its last task); one whose hash differs starts from an empty folder, and that is
said. Training is not thrown away for it: a train stage's old folder is kept as ``<stage>.old``, until the next change
replaces it. A folder that no run wrote is never touched, nor one of another recipe's run, nor a real run by a smoke run.

With several ranks, rank 0 runs the recipe and the others join it in the stages that train.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from openembed import __version__
from openembed.files import atomic_write, read_json, write_json
from openembed.locks import exclusive
from openembed.packaged import packaged
from openembed.recipe.config import (
    UNTRAINED,
    MineStage,
    Recipe,
    StageConfig,
    TrainStage,
    check_references,
    model_references,
    needed_stages,
    stage_paths,
    tables,
)
from openembed.recipe.earlier import RECIPE, STATE, changes, check_folder
from openembed.recipe.files import to_toml
from openembed.recipe.stages import CHECKPOINTS, Workplace, run_stage
from openembed.train.cached import PLACEMENT
from openembed.train.distributed import ALONE, OtherRankError, World

logger = logging.getLogger(__name__)

_REPORTING = {"save_every": True, "evaluate_every": True, "watch": True, "compute": PLACEMENT}
"""Settings of a train stage that leave the trained weights as they are: changing them does not train anew."""


@dataclass(frozen=True)
class StageDone:
    """A finished stage; ``skipped``: it had been finished by an earlier run."""

    name: str
    do: str
    folder: Path
    skipped: bool
    seconds: float


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    base: str | Path = ".",
    device: str | None = None,
    command: str = "",
    on_stage: Callable[[str, str], None] | None = None,
    world: World = ALONE,
) -> list[StageDone]:
    """Runs every stage of ``recipe`` into folder ``out``, writes ``out/report.html``, and returns what was done.

    Relative paths of the recipe count from ``base``. ``on_stage(name, "running" | "skipped" | a note)`` is called as
    stages begin, and with what there is to say of them. Raises ``ValueError`` for a reference to a stage that is not there,
    when another run holds ``out``, when ``out`` holds another recipe's or kind of run (see
    :func:`openembed.recipe.earlier.check_folder`), and what the stages raise. Every rank of ``world`` must call; ``out`` is
    a folder that all can read, rank 0 alone writes and calls ``on_stage``, and the others return an empty list.
    """
    problems = check_references(recipe)
    if problems:
        raise ValueError("\n".join(f"recipe {recipe.name}: {problem}" for problem in problems))
    out = Path(out)
    place = Workplace(recipe, out, Path(base), world.device or device, world)
    if not world.leads:
        _follow(place)
        return []
    crew = _Crew(world)
    try:
        out.mkdir(parents=True, exist_ok=True)
        done = _lead(place, crew, command, on_stage)
    except Exception as error:
        crew.dismiss(str(error) or type(error).__name__)
        raise
    crew.dismiss()
    return done


def _lead(place: Workplace, crew: _Crew, command: str, on_stage: Callable[[str, str], None] | None) -> list[StageDone]:
    recipe, out = place.recipe, place.out
    with exclusive(out):
        check_folder(out, recipe)
        with atomic_write(out / RECIPE) as file:
            file.write(recipe.to_toml())
        done = run_stages(place, crew=crew, on_stage=on_stage)
        from openembed.recipe.report import build_report
        from openembed.report import write_report

        write_report(build_report(place, command), out / "report.html")
    return done


def run_stages(
    place: Workplace,
    *,
    crew: _Crew | None = None,
    store: Path | None = None,
    on_stage: Callable[[str, str], None] | None = None,
) -> list[StageDone]:
    """Runs every stage of ``place`` that is not finished, and returns what was done.

    With ``store`` a stage's folder is ``store/<name>-<hash>``, and a link to it stands in ``place.out``: runs that share
    a stage (same settings, inputs and seed) do it once.
    """
    hashes = stage_hashes(place)
    done = []
    for name, identity in hashes.items():
        if store is not None:
            _link(place.out / name, store / stored_name(name, identity))
        done.append(_run(place, name, identity, crew or _Crew(place.world), on_stage))
    return done


def stage_hashes(place: Workplace) -> dict[str, str]:
    """Returns :func:`stage_hash` of every stage, in order."""
    hashes: dict[str, str] = {}
    for name in place.recipe.stage:
        hashes[name] = stage_hash(place, name, hashes)
    return hashes


def stored_name(name: str, identity: str) -> str:
    """Returns the name of a stage's folder in a store."""
    return f"{name}-{identity[:16]}"


def is_finished(folder: Path, identity: str) -> bool:
    """True when ``folder`` holds the finished stage of this hash."""
    state = _read_state(folder)
    return bool(state.get("finished")) and state.get("hash") == identity


def _link(link: Path, target: Path) -> None:
    """Makes ``link`` a relative link to folder ``target``, so that both can be moved together."""
    target.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise ValueError(f"{link}: exists and is no link to a shared stage; choose another --out or move it")
    link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


@dataclass(frozen=True)
class _Order:
    """What rank 0 tells the others: train with it, or (without a stage) go home, because it ``failed`` or is done."""

    stage: str | None = None
    failed: str = ""


class _Crew:
    """The ranks that wait for rank 0's orders."""

    def __init__(self, world: World) -> None:
        self._world, self._waiting = world, True

    @contextmanager
    def joining(self, stage: str) -> Iterator[None]:
        """Has all ranks work on ``stage`` in the block; when that fails they do not come back to wait for orders."""
        self._world.from_leader(_Order(stage))
        self._waiting = False
        yield
        self._waiting = True

    def dismiss(self, failed: str = "") -> None:
        """Sends everyone home who still waits."""
        if self._waiting:
            self._world.from_leader(_Order(failed=failed))


def _follow(place: Workplace) -> None:
    """Joins rank 0 in every stage it announces until it sends everyone home."""
    while (order := place.world.from_leader(_Order())).stage is not None:
        run_stage(place, order.stage)
    if order.failed:
        raise OtherRankError(f"rank 0 failed: {order.failed}")


def _speaking(place: Workplace, name: str, on_stage: Callable[[str, str], None] | None) -> Workplace:
    return place if on_stage is None else replace(place, tell=lambda note: on_stage(name, note))


def stage_hash(place: Workplace, name: str, earlier: dict[str, str]) -> str:
    """Returns the hash of everything stage ``name`` depends on; ``earlier`` are the hashes of the stages before it."""
    recipe, stage = place.recipe, place.recipe.stage[name]
    depends_on_encoder = UNTRAINED in model_references(stage).values() and recipe.encoder is not None
    models = {ref: Path(place.model_folder(ref)) for ref in model_references(stage).values() if ref not in recipe.stage}
    if isinstance(stage, MineStage) and stage.reranker is not None:
        models["reranker"] = Path(place.model_folder(stage.reranker))
    if depends_on_encoder and recipe.encoder.backbone.path is not None:
        models["backbone"] = Path(place.model_folder(recipe.encoder.backbone.path))
    models |= {f"table {table}": place.locate(table) for table in tables(stage) if table not in recipe.stage}
    parts = {
        "version": __version__,
        "seed": recipe.seed,
        "stage": stage.model_dump(mode="json", exclude=_REPORTING if isinstance(stage, TrainStage) else None),
        "encoder": recipe.encoder.model_dump(mode="json") if depends_on_encoder else None,
        "reads": {other: earlier[other] for other in needed_stages(recipe, name)},
        "files": {path: digest(place.locate(path)) for path in stage_paths(stage, watched=False)},
        "models": {ref: _model_identity(path) for ref, path in models.items() if path.exists()},
        "packaged": {ref: digest(found) for ref in models if (found := packaged(ref)) is not None},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """Returns the SHA-256 of a file, or of the names and contents of a folder's files; empty when nothing is there."""
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    total = hashlib.sha256()
    for item in files:
        with item.open("rb") as file:
            total.update(f"{item.relative_to(path)}\n".encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest() if files else ""


def _model_identity(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times: weights are too large to read on every run."""
    files = sorted(item for item in folder.rglob("*") if item.is_file()) if folder.is_dir() else [folder]
    return [(str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _run(place: Workplace, name: str, identity: str, crew: _Crew, on_stage: Callable[[str, str], None] | None) -> StageDone:
    stage: StageConfig = place.recipe.stage[name]
    folder = place.out / name
    state = _read_state(folder)
    same = state.get("hash") == identity
    if same and state.get("finished"):
        if on_stage is not None:
            on_stage(name, "skipped")
        return StageDone(name, stage.do, folder, True, state["seconds"])
    if on_stage is not None:
        on_stage(name, "running")
    settings = to_toml({"name": place.recipe.name, "seed": place.recipe.seed, **_stage_table(place, name)})
    if folder.exists() and not same:
        why = changes(folder / RECIPE, settings)
        kept = _make_room(folder, training=isinstance(stage, TrainStage))
        if state:
            what = "its earlier output is replaced" if kept is None else f"the earlier training is kept in {kept}"
            note = f"changed since it {'finished' if state.get('finished') else 'was interrupted'} ({why}); {what}"
            logger.warning("stage %s: %s", name, note) if on_stage is None else on_stage(name, note)
    folder.mkdir(exist_ok=True)
    before = state.get("seconds", 0.0) if same else 0.0
    write_json(folder / STATE, {"hash": identity, "finished": False, "seconds": before})
    with atomic_write(folder / RECIPE) as file:
        file.write(settings)
    started = time.perf_counter()
    with crew.joining(name) if isinstance(stage, TrainStage) else nullcontext():
        run_stage(_speaking(place, name, on_stage), name)
    seconds = before + time.perf_counter() - started
    write_json(folder / STATE, {"hash": identity, "finished": True, "seconds": seconds})
    logger.info("stage %s (%s) took %.1f s", name, stage.do, seconds)
    return StageDone(name, stage.do, folder, False, seconds)


def _make_room(folder: Path, *, training: bool) -> Path | None:
    """Empties a stage's folder, or moves it to ``<folder>.old`` and returns that; ``ValueError`` when it is not a stage's."""
    if not (folder / STATE).is_file() and any(folder.iterdir()):
        raise ValueError(f"{folder}: exists and was not written by a run ({STATE} is missing); choose another --out or move it")
    if training and (folder / CHECKPOINTS).is_dir():
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        return old
    for item in folder.iterdir():  # the state goes last (it is overwritten), so that a crash here leaves a known folder
        if item.name != STATE:
            shutil.rmtree(item) if item.is_dir() else item.unlink()
    return None


def _stage_table(place: Workplace, name: str) -> dict:
    dumped = place.recipe.model_dump(mode="json")
    return {"encoder": dumped["encoder"], "stage": {name: dumped["stage"][name]}}


def _read_state(folder: Path) -> dict:
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except ValueError:
        return {}
