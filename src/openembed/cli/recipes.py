"""``run``, ``demo`` and ``recipe list|show|check|sources``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openembed.cli.output import JsonFlag, console, print_json, print_table

if TYPE_CHECKING:
    from openembed.recipe.config import Recipe
    from openembed.recipe.run import StageDone
    from openembed.report import Report

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a packaged recipe, or a TOML file.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as stage.stage1.optimizer.lr=1e-5."),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Shrink to a toy that runs on a CPU, offline, in seconds.")]
Data = Annotated[Path | None, typer.Option(help="Folder that relative paths of the recipe count from.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: the best there is).")]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to ``app``."""
    app.command()(run)
    app.command()(demo)
    recipe = typer.Typer(name="recipe", help="List, show and check recipes, list data sets.", no_args_is_help=True)
    recipe.command("list")(list_recipes)
    recipe.command()(show)
    recipe.command()(check)
    recipe.command()(sources)
    app.add_typer(recipe)


def run(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder (default: runs/RECIPE).")] = None,
    smoke: Smoke = False,
    settings: Settings = None,
    data: Data = None,
    device: Device = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a recipe: mine, train, evaluate, index, search. Run again, it skips what is done and resumes the rest.

    On several GPUs or nodes: torchrun --nproc-per-node N -m openembed run RECIPE (docs/distributed.md).
    """
    _run(recipe, out, smoke=smoke, settings=settings, data=data, device=device, as_json=as_json)


def demo(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder (default: runs/demo).")] = None,
    smoke: Smoke = False,
    settings: Settings = None,
    device: Device = None,
    as_json: JsonFlag = False,
) -> None:
    """Train openembed-nano in two stages on the packaged data, evaluate it beside BM25, search, write a report."""
    _run("demo", out, smoke=smoke, settings=settings, data=None, device=device, as_json=as_json)


def list_recipes(as_json: JsonFlag = False) -> None:
    """List the packaged recipes."""
    from openembed.recipe.files import packaged_recipes

    summaries = [recipe.summary for recipe in packaged_recipes()]
    if as_json:
        print_json(summaries)
        return
    from rich.table import Table

    table = Table("recipe", "stages", "title", box=None, pad_edge=False)
    for summary in summaries:
        table.add_row(summary["name"], " → ".join(summary["stages"]), summary["title"])
    print_table(table)


def show(recipe: RecipeName, smoke: Smoke = False, settings: Settings = None, as_json: JsonFlag = False) -> None:
    """Print the resolved recipe, every default written out."""
    from openembed.recipe.files import checked_recipe

    checked_recipe(recipe, settings or ())
    from openembed.recipe.config import load_recipe

    loaded = load_recipe(recipe, settings or (), smoke=smoke)
    if as_json:
        print_json(loaded.model_dump(mode="json"))
    else:
        sys.stdout.write(loaded.to_toml())


def check(recipe: RecipeName, settings: Settings = None, data: Data = None, as_json: JsonFlag = False) -> None:
    """Check that a recipe is whole, and say which of its data and models are not on this machine."""
    from openembed.recipe.files import checked_recipe

    file = checked_recipe(recipe, settings or ())
    from openembed.recipe.config import load_recipe

    loaded = load_recipe(recipe, settings or ())
    missing = _missing(loaded, base_folder(file.path, file.packaged, data))
    if as_json:
        print_json({"recipe": loaded.name, "stages": list(loaded.stage), "elsewhere": missing})
        return
    out = console()
    out.print(f"{loaded.name}: {len(loaded.stage)} stages, {len(loaded.expect)} expected values; well-formed", markup=False)
    for item in missing:
        out.print(f"  {item['kind']}: {item['name']}", markup=False, highlight=False)


def sources(as_json: JsonFlag = False) -> None:
    """List the data sets that recipes can name: NV-Embed's mixtures, with licence, origin, construction and count."""
    from openembed.data.library import VERSIONS, library

    summaries = [entry.summary for entry in library().values()]
    if as_json:
        print_json(summaries)
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("source", "licence", "hub set @ revision", "construction", *VERSIONS):
        table.add_column(column)
    for summary in summaries:
        pinned = (summary["revision"] or "not pinned")[:10]
        origin = f"{summary['hub']} @ {pinned}" if summary["hub"] else f"bring your own: {summary['path']}"
        rules = " → ".join(dict.fromkeys(summary["construction"].values()))
        counts = [_count(summary, version) for version in VERSIONS]
        table.add_row(summary["name"], summary["licence"] or "-", origin, rules, *counts)
    print_table(table)
    console().print("? not the paper's own figure; --json says how each part is known", style="dim", highlight=False)


def _count(summary: dict[str, Any], version: str) -> str:
    """The examples of a version; those that are not the paper's are marked."""
    if version not in summary["count"]:
        return "-"
    count, known = summary["count"][version], summary["evidence"][version]
    return f"{count:,}{'' if known == 'paper' else ' ?'}" if count else "all"


def _run(
    name: str,
    out: Path | None,
    *,
    smoke: bool,
    settings: list[str] | None,
    data: Path | None,
    device: str | None,
    as_json: bool,
) -> None:
    from openembed.recipe.files import checked_recipe

    file = checked_recipe(name, settings or ())  # before torch is imported, which takes seconds
    from openembed.recipe.config import load_recipe
    from openembed.recipe.run import run_recipe
    from openembed.recipe.stages import Workplace
    from openembed.train.distributed import joined

    quiet()
    recipe = load_recipe(name, settings or (), smoke=smoke)
    out = out or Path("runs") / (f"{recipe.name}-smoke" if recipe.smoke else recipe.name)
    base = base_folder(file.path, file.packaged, data)
    terminal = console()

    def announce(stage: str, state: str) -> None:
        if not as_json:
            said = {"skipped": "already done", "running": recipe.stage[stage].do}.get(state, state)
            terminal.print(f"{stage}: {said}", markup=False, highlight=False, soft_wrap=True)

    command = " ".join(["openembed", *sys.argv[1:]])
    with joined(device) as world:
        done = run_recipe(recipe, out, base=base, device=device, command=command, on_stage=announce, world=world)
    if not world.leads:
        return
    from openembed.recipe.report import build_report

    _say(build_report(Workplace(recipe, out, base, device), command), done, out, as_json)


def quiet() -> None:
    """Turns off transformers' own progress bars: ours say what is going on."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _say(report: Report, done: list[StageDone], out: Path, as_json: bool) -> None:
    from openembed.report import verdicts

    if as_json:
        stages = [{"name": s.name, "do": s.do, "skipped": s.skipped, "seconds": round(s.seconds, 2)} for s in done]
        places = {"out": str(out), "report": str(out / "report.html"), "smoke": report.smoke}
        print_json({**places, "stages": stages, "scores": _scores(report), "summary": verdicts(report)})
        return
    terminal = console()
    _print_scores(terminal, report)
    for line in verdicts(report):
        terminal.print(f"- {line}", markup=False, highlight=False)
    for search in report.searches:
        terminal.print(f"\n{search.query}", style="bold", markup=False, highlight=False)
        for number, hit in enumerate(search.hits, 1):
            text = f"{hit.title}. {hit.text}" if hit.title else hit.text
            terminal.print(f"  {number}. ({hit.score:.3f}) {text[:160]}…", markup=False, highlight=False)
    seconds = sum(stage.seconds for stage in done)
    terminal.print(f"\n{seconds:.0f} s in all. Report: {out / 'report.html'}", markup=False, highlight=False)


def _print_scores(terminal: Any, report: Report) -> None:
    from rich.table import Table

    if not report.tasks:
        return
    table = Table("task", "metric", box=None, pad_edge=False)
    for system in report.systems:
        table.add_column(system, justify="right")
    for task in report.tasks:
        cells = []
        for system in report.systems:
            score = task.scores.get(system)
            best = " *" if task.winner == system else "  "
            cells.append(f"{score.value:.3f}{best}" if score else "-  ")
        table.add_row(task.task, task.metric, *cells)
    print_table(table)
    terminal.print("* best of the row", style="dim", highlight=False)


def _scores(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "task": task.task,
            "metric": task.metric,
            "scores": {name: {"value": s.value, "low": s.low, "high": s.high} for name, s in task.scores.items()},
        }
        for task in report.tasks
    ]


def base_folder(path: Path, packaged: bool, data: Path | None) -> Path:
    """The folder that relative paths count from: the one given, the current one, or that of the user's recipe."""
    if data is not None:
        return data
    return Path() if packaged else path.parent


def _missing(recipe: Recipe, base: Path) -> list[dict[str, str]]:
    """What a run would have to find elsewhere: files that are not there, hub data sets, models of the hub."""
    from openembed.packaged import NANO
    from openembed.recipe.config import BM25, RANDOM, UNTRAINED, model_references, stage_paths, stage_sources
    from openembed.recipe.stages import Workplace

    place = Workplace(recipe, Path(), base)
    found: dict[tuple[str, str], None] = {}
    for stage in recipe.stage.values():
        for path in stage_paths(stage):
            if not place.locate(path).exists():
                found["not found here", str(place.locate(path))] = None
        for source in stage_sources(stage):
            if source.hub is not None:
                found["hub data set", f"{source.hub.id} @ {source.hub.revision or 'not pinned'}"] = None
        for model in model_references(stage).values():
            if model not in (UNTRAINED, BM25, RANDOM, NANO, *recipe.stage) and not Path(place.model_folder(model)).is_dir():
                found["hub model", model] = None
    backbone = recipe.encoder.backbone.path if recipe.encoder else None
    if backbone is not None and not Path(place.model_folder(backbone)).is_dir():
        found["hub model", backbone] = None
    return [{"kind": kind, "name": name} for kind, name in found]
