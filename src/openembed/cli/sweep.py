"""``sweep``: the variants of a recipe, over several seeds, in one table."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openembed.cli.output import JsonFlag, console, print_json, print_table
from openembed.cli.recipes import Data, Device, Settings, Smoke, base_folder, quiet

if TYPE_CHECKING:
    from openembed.recipe.sweep import RunDone
    from openembed.report.sweep import SweepReport


def register(app: typer.Typer) -> None:
    """Adds ``sweep`` to ``app``."""
    app.command()(sweep)


def sweep(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a packaged recipe with a sweep, or a TOML file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder (default: runs/RECIPE-sweep).")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 1,2,3 (default: the recipe's).")] = "",
    variants: Annotated[str, typer.Option(help="Variants, such as dense,bm25 (default: all).")] = "",
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing; report the runs that are finished.")] = False,
    smoke: Smoke = False,
    settings: Settings = None,
    data: Data = None,
    device: Device = None,
    as_json: JsonFlag = False,
) -> None:
    """Run every variant of a recipe with every seed, sharing the stages they have in common, and compare them.

    Run again, it goes on where it stopped. Writes report.html, report.md and report.json of all that is finished there.
    """
    from openembed.recipe.files import checked_recipe

    file = checked_recipe(recipe, settings or ())
    from openembed.recipe.sweep import load_sweep, run_sweep
    from openembed.recipe.sweep_results import sweep_report
    from openembed.report.sweep import write_sweep

    quiet()
    chosen = [name.strip() for name in variants.split(",") if name.strip()]
    loaded = load_sweep(recipe, settings or (), seeds=_numbers(seeds), variants=chosen, smoke=smoke)
    smoke = loaded.recipe.smoke
    out = out or Path("runs") / f"{file.name}-sweep{'-smoke' if smoke else ''}"
    base = base_folder(file.path, file.packaged, data)
    if not report_only:
        run_sweep(loaded, out, base=base, device=device, on_run=None if as_json else _Announcer())
    whole = loaded if smoke else load_sweep(recipe, settings or (), seeds=_seeds_of(out, loaded.config.seeds))
    report = sweep_report(whole, out, base, " ".join(["openembed", *sys.argv[1:]]), device)
    page = write_sweep(report, out)
    if as_json:
        print_json({"out": str(out), "report": str(page), **report.as_dict()})
    else:
        _say(report, page)


def _seeds_of(out: Path, chosen: tuple[int, ...]) -> list[int]:
    """The seeds that any run in ``out`` had, and those of now: the report is of all that is finished there."""
    found = {int(path.name.removeprefix("seed-")) for path in out.glob("runs/*/seed-*")}
    return sorted(found.union(chosen))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--seeds {text}: expected whole numbers with commas between, such as 1,2,3") from None


class _Announcer:
    """Prints a line a run: what was done, what another run had done before, and how long the rest may take."""

    def __init__(self) -> None:
        self.started, self.skipped, self.terminal = time.perf_counter(), 0, console()

    def __call__(self, done: RunDone) -> None:
        new = [f"{stage.name} {stage.seconds:.0f} s" for stage in done.stages if not stage.skipped]
        self.skipped += not new
        parts = ", ".join(new) or "already done"
        worked = done.number - self.skipped
        elapsed = time.perf_counter() - self.started
        rest = elapsed / worked * (done.total - done.number) if worked else 0.0
        line = f"[{done.number}/{done.total}] seed {done.run.seed}, {done.run.variant}: {parts}"
        left = f"; {elapsed / 60:.0f} min gone, about {rest / 60:.0f} min to go" if new else ""
        self.terminal.print(line + left, markup=False, highlight=False, soft_wrap=True)


def _say(report: SweepReport, page: Path) -> None:
    from rich.table import Table

    from openembed.report.page import SMOKE

    terminal = console()
    table = Table("claim", "paper", "difference", "verdict", box=None, pad_edge=False)
    for claim in report.claims:
        table.add_row(f"{claim.text} ({claim.metric})", claim.paper, _difference(claim.difference), claim.verdict)
    print_table(table)
    if report.smoke:
        terminal.print(SMOKE)
    for verdict, claims in report.verdicts.items():
        terminal.print(f"{verdict}: {len(claims)} of {len(report.claims)}", markup=False, highlight=False)
    terminal.print(f"Report: {page}", markup=False, highlight=False, soft_wrap=True)


def _difference(found: Any) -> str:
    if found is None:
        return "-"
    interval = "" if found.low is None else f" [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.mean:+.3f}{interval}"
