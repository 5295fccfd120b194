"""Sweeps: the variants of one recipe, each with several seeds, every distinct stage done once.

``OUT/stages/<stage>-<hash>`` are the stages, ``OUT/runs/<variant>/seed-<seed>/`` links to those of one run. A sweep that
was stopped goes on where it stopped; a stage that several runs share (same settings, same inputs, same seed) is done by
the first. Checkpoints and rankings of finished stages are deleted: models and per-item scores are what later stages read.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from openembed.files import atomic_write
from openembed.locks import exclusive
from openembed.packaged import packaged
from openembed.recipe.config import BM25, UNTRAINED, EvaluateStage, Recipe, TrainStage, needed_stages, parse_recipe
from openembed.recipe.earlier import RECIPE, STAGES, check_folder
from openembed.recipe.files import RecipeFile, override, read_recipe
from openembed.recipe.run import StageDone, is_finished, run_stages, stage_hashes
from openembed.recipe.stages import CHECKPOINTS, Workplace
from openembed.recipe.sweep_config import SweepConfig

RUNS = "runs"


@dataclass(frozen=True)
class SweepRun:
    """One variant with one seed: a recipe of the stages it needs and the one that scores it."""

    variant: str
    seed: int
    recipe: Recipe
    evaluate: str

    def place(self, out: Path, base: Path, device: str | None = None) -> Workplace:
        """Returns where this run happens in the sweep's folder ``out``."""
        return Workplace(self.recipe, out / RUNS / self.variant / f"seed-{self.seed}", base, device)

    def finished(self, out: Path, base: Path) -> bool:
        """True when the run's scores are in ``out``, made with its present settings and data."""
        place = self.place(out, base)
        return is_finished(place.out / self.evaluate, stage_hashes(place)[self.evaluate])


@dataclass(frozen=True)
class Sweep:
    """A resolved sweep: its settings, the recipe it varies, and its runs, one seed after the other."""

    config: SweepConfig
    recipe: Recipe
    runs: tuple[SweepRun, ...]


def load_sweep(
    name_or_path: str | Path,
    settings: Iterable[str] = (),
    *,
    seeds: Sequence[int] = (),
    variants: Sequence[str] = (),
    smoke: bool = False,
) -> Sweep:
    """Returns the sweep of a recipe with a ``[sweep]`` table; ``settings`` apply to all variants, before their own.

    ``seeds`` instead of the recipe's; ``variants``: these alone; ``smoke`` shrinks every variant to a toy, and takes one seed.
    Raises ``ValueError`` naming file and key, for a variant that is not there, or when the recipe has no sweep.
    """
    file = read_recipe(name_or_path)
    settings = tuple(settings)
    recipe = parse_recipe(RecipeFile(file.name, file.path, file.packaged, override(file.table, settings)))
    smoke, config = smoke or recipe.smoke, recipe.sweep
    if config is None:
        raise ValueError(f"{file.path}: has no [sweep]; `openembed run` runs a recipe without variants")
    if not isinstance(recipe.stage.get(config.evaluate), EvaluateStage):
        raise ValueError(f"{file.path}: sweep.evaluate: no evaluate stage of this name (got {config.evaluate!r})")
    if unknown := [name for name in variants if name not in config.variant]:
        raise ValueError(f"{file.path}: no variant {', '.join(unknown)}; variants: {', '.join(config.variant)}")
    seeds = tuple(dict.fromkeys(seeds)) or (config.seeds[:1] if smoke else config.seeds)
    runs = [
        SweepRun(name, seed, _variant(file, settings, config, name, seed, smoke), config.evaluate)
        for seed in seeds
        for name in dict.fromkeys(variants) or config.variant
    ]
    return Sweep(config.model_copy(update={"seeds": seeds}), recipe.model_copy(update={"smoke": smoke}), tuple(runs))


def _variant(file: RecipeFile, settings: tuple[str, ...], config: SweepConfig, name: str, seed: int, smoke: bool) -> Recipe:
    """The recipe of one run: settings applied, stages in order, those it does not need left out."""
    variant = config.variant[name]
    where = f"{file.path}: sweep.variant.{name}"
    try:
        table = override(file.table, [*settings, *variant.settings, f"seed={seed}"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    del table["sweep"]
    stages = table["stage"]
    unknown = [other for other in (*variant.stages, variant.model) if other not in (*stages, UNTRAINED, BM25)]
    unknown = [other for other in unknown if other in variant.stages or packaged(other) is None]
    if unknown:
        raise ValueError(f"{where}: no stage {', '.join(unknown)}; stages: {', '.join(stages)}")
    order = [*variant.stages, config.evaluate] if variant.stages else list(stages)
    score = {**stages[config.evaluate], "models": [variant.model]}
    table["stage"] = {other: score if other == config.evaluate else stages[other] for other in order}
    table["stage"] = {other: table["stage"][other] for other in order if other == config.evaluate or _runs(stages[other])}
    recipe = parse_recipe(RecipeFile(name, Path(where), file.packaged, table))
    recipe = recipe.model_copy(update={"stage": {n: recipe.stage[n] for n in _closure(recipe, config.evaluate)}, "expect": ()})
    if smoke:
        from openembed.recipe.smoke import shrink

        return shrink(recipe)
    return recipe


def _runs(stage: object) -> bool:
    """Whether a stage may belong to a variant: what indexes, searches or scores other models does not."""
    return isinstance(stage, dict) and stage.get("do") not in ("evaluate", "index", "search")


def _closure(recipe: Recipe, name: str) -> list[str]:
    """Returns stage ``name`` and all it needs, in the recipe's order."""
    wanted, open_names = {name}, [name]
    while open_names:
        more = [other for other in needed_stages(recipe, open_names.pop()) if other not in wanted]
        wanted.update(more)
        open_names += more
    return [other for other in recipe.stage if other in wanted]


@dataclass(frozen=True)
class RunDone:
    """A finished run: which of how many, what each stage took, and the seconds it took now."""

    number: int
    total: int
    run: SweepRun
    stages: tuple[StageDone, ...]
    seconds: float


def run_sweep(
    sweep: Sweep,
    out: str | Path,
    *,
    base: str | Path = ".",
    device: str | None = None,
    on_run: Callable[[RunDone], None] | None = None,
) -> None:
    """Does every run of ``sweep`` in folder ``out`` that is not done yet; ``on_run`` hears of each as it ends.

    Relative paths of the recipe count from ``base``. Raises ``ValueError`` when another run holds ``out``, when what is there
    is none of this sweep's (see :func:`openembed.recipe.earlier.check_folder`), and what the stages raise.
    """
    out, base = Path(out), Path(base)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        check_folder(out, sweep.recipe, sweep=True)
        (out / STAGES).mkdir(exist_ok=True)  # says that it is a sweep's
        with atomic_write(out / RECIPE) as file:
            file.write(sweep.recipe.model_copy(update={"sweep": sweep.config}).to_toml())
        for number, run in enumerate(sweep.runs, 1):
            started = time.perf_counter()
            place = run.place(out, base, device)
            done = run_stages(place, store=out / STAGES)
            _tidy(place)
            if on_run is not None:
                on_run(RunDone(number, len(sweep.runs), run, tuple(done), time.perf_counter() - started))


def _tidy(place: Workplace) -> None:
    """Deletes what only an unfinished stage needs: checkpoints (with optimizer state) and full rankings."""
    for name, stage in place.recipe.stage.items():
        if isinstance(stage, TrainStage):
            shutil.rmtree(place.out / name / CHECKPOINTS, ignore_errors=True)
        if isinstance(stage, EvaluateStage):
            for path in (place.out / name).glob("*/*/run.trec"):
                path.unlink()
