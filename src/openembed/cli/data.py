"""``decontaminate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from openembed.cli.output import JsonFlag, console, print_json, print_table

if TYPE_CHECKING:
    from openembed.records import Example


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to ``app``."""
    app.command()(decontaminate)


def decontaminate(
    train: Annotated[
        list[Path],
        typer.Argument(help="Training data: JSON lines of examples (query, positive) or of texts (text), or BEIR folders."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the kept rows, removed.jsonl and report.json.")],
    against: Annotated[
        list[str] | None,
        typer.Option(help="An evaluation folder, a folder of them, or a JSON-lines file. May be repeated."),
    ] = None,
    documents: Annotated[
        Literal["all", "judged", "none"],
        typer.Option(help="Documents of evaluation folders that count: judged where training shares the corpus."),
    ] = "all",
    split: Annotated[str | None, typer.Option(help="Split that is evaluated (default: test, or else dev).")] = None,
    duplicates: Annotated[
        Literal["exact", "near", "none"], typer.Option(help="Duplicates inside the training data to remove.")
    ] = "near",
    bm25: Annotated[float | None, typer.Option(help="BM25 similarity in 0..1 from which a text is removed.")] = None,
    jaccard: Annotated[float | None, typer.Option(help="Similarity of word sets from which texts are near copies.")] = None,
    run: Annotated[int | None, typer.Option(help="Words in a row that no training text may share.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove evaluation texts and duplicates from training data; report what was removed and why."""
    from openembed.config import parse
    from openembed.data.clean import clean
    from openembed.data.evaluation_texts import EvaluationSet, read_evaluation_texts
    from openembed.data.filter import FilterConfig

    given = {"duplicates": duplicates, "bm25": bm25, "jaccard": jaccard, "run": run}
    config = parse(FilterConfig, {key: value for key, value in given.items() if value is not None}, "decontaminate")
    if not against and duplicates == "none":
        raise ValueError("nothing to remove: give --against, or --duplicates exact or near")
    names = [path.name.removesuffix(".gz").removesuffix(".jsonl") for path in train]
    if len(set(names)) < len(names):
        raise ValueError(f"two training files have one name ({', '.join(names)}); rename one")
    written = {(out / f"{name}.jsonl").resolve() for name in names}
    if lost := [path for path in train if path.resolve() in written]:
        raise ValueError(f"--out {out}: would overwrite {lost[0]}; choose another folder")
    splits = (split,) if split else ()
    sets = [EvaluationSet(path=path, splits=splits, documents=documents) for path in against or ()]
    sources, texts = _training_data(dict(zip(names, train, strict=True)))
    report = clean(sources, texts, read_evaluation_texts(sets), config, out)
    if as_json:
        print_json({"out": str(out), **report})
    else:
        _say(report, out)


def _training_data(paths: dict[str, Path]) -> tuple[dict[str, list[Example]], dict[str, Path]]:
    """Examples by name of the files and folders that hold some, and the files of plain texts."""
    from openembed.data.sources import SourceConfig, load_source
    from openembed.files import read_jsonl

    sources: dict[str, list[Example]] = {}
    texts: dict[str, Path] = {}
    for name, path in paths.items():
        first = {} if path.is_dir() else next(read_jsonl(path), (0, {}))[1]
        if "text" in first and "query" not in first:
            texts[name] = path
        else:
            sources[name] = load_source(SourceConfig(name=name, path=str(path.absolute())))
    return sources, texts


def _say(report: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    reasons = sorted({reason for source in report["sources"].values() for reason in source["removed"]})
    table = Table("source", box=None, pad_edge=False)
    for column in ("rows", "kept", *(reason.replace("_", " ") for reason in reasons), "negatives"):
        table.add_column(column, justify="right")
    for name, row in report["sources"].items():
        numbers = [row["rows"], row["kept"], *(row["removed"].get(reason, 0) for reason in reasons), row["negatives_removed"]]
        table.add_row(name, *(f"{number:,}" for number in numbers))
    print_table(table)
    terminal = console()
    found = [f"{row['name']} {sum(row['matched'].values()):,}" for row in report["against"] if row["matched"]]
    terminal.print(f"Removed for overlap with: {', '.join(found) or 'no evaluation set'}", markup=False, highlight=False)
    if empty := [path for row in report["against"] for path in row["empty"]]:
        text = f"Not compared with, for no texts were found there: {', '.join(empty)}"
        terminal.print(text, markup=False, highlight=False)
    terminal.print(f"What was removed and why: {out / 'removed.jsonl'}", markup=False, highlight=False)
