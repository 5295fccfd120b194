"""``openembed evaluate`` and ``openembed compare``: how good a model is, and whether one is better than another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openembed.cli.coding import SearchMethod
from openembed.cli.encode import Dimensions, Precision
from openembed.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from openembed.evaluation.compare import Comparison
    from openembed.evaluation.result import TaskResult
    from openembed.evaluation.systems import System
    from openembed.evaluation.tasks import Task
    from openembed.index.tokens.methods import Method
    from openembed.vectors import VectorFormat

logger = logging.getLogger(__name__)


def register(app: typer.Typer) -> None:
    """Adds ``evaluate`` and ``compare`` to ``app``."""
    app.command("evaluate")(evaluate)
    app.command("compare")(compare)


def evaluate(
    model: Annotated[str, typer.Argument(help="A model (folder or hub id), 'bm25', or a TREC run file.")],
    data: Annotated[list[Path], typer.Option("--data", help="A task folder, or a folder of them; may be repeated.")],
    tasks: Annotated[list[str] | None, typer.Option("--tasks", help="mteb task class to run on the local data.")] = None,
    split: Annotated[str | None, typer.Option(help="Split to evaluate (default: test, else dev).")] = None,
    metric: Annotated[str | None, typer.Option(help="Main metric, such as ndcg_at_10 or recall_at_100.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Instruction of the queries, or of both sides of pairs.")] = None,
    language: Annotated[str | None, typer.Option(help="Language of BM25's stemmer: en, pl, …, or none.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the results; a rerun resumes there.")] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder that keeps vectors from run to run.")] = None,
    run_file: Annotated[Path | None, typer.Option("--run-file", help="Write the ranking as a TREC run.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text may have (default: the model's).")] = None,
    normalize: Annotated[bool, typer.Option(help="Compare by cosine; --no-normalize: by inner product.")] = True,
    dimensions: Dimensions = None,
    precision: Precision = "float32",
    method: SearchMethod = "exact",
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="What to compute in: float32, bfloat16, ..., or int8 on a CPU.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a model, BM25 or a TREC run on local data by MTEB's protocols, or on mteb's own task classes (--tasks).

    Layouts: BEIR retrieval, reranking, STS, pair classification, classification, clustering.
    """
    from openembed.config import parse
    from openembed.evaluation.tasks import find_all_tasks
    from openembed.index.tokens.methods import EXACT, parse_method
    from openembed.vectors import VectorFormat

    stored = parse(VectorFormat, {"dimensions": dimensions, "precision": precision}, "options")
    by = parse_method(method, "--method")
    options: dict[str, Any] = {} if max_length is None else {"max_length": max_length}
    if not normalize:
        options["normalize"] = False
    if tasks:
        _refuse({"--metric": metric, "--language": language, "--run-file": run_file, "--cache": cache}, "--tasks")
        given = {"--dimensions": dimensions, "--precision": None if precision == "float32" else precision}
        _refuse(given | {"--method": None if by == EXACT else method}, "--tasks")
        if len(data) > 1:
            raise ValueError(f"--tasks looks for its data in one folder; got {len(data)}: {_listed(data)}")
        results = _run_mteb(model, tasks, data[0], out, split, instruction, options, device, dtype)
    else:
        chosen = {"split": split, "metric": metric, "instruction": instruction, "language": language}
        overrides = {key: value for key, value in chosen.items() if value is not None}
        found = find_all_tasks(data, overrides)  # before seconds are spent on loading a model
        system = _system(model, cache, options, (stored, by), device, dtype)
        results = _run_local(system, found, out, run_file)
    if as_json:
        print_json({"model": model, "results": [result.as_dict() for result in results]})
    else:
        _print_results(model, results)


def compare(
    a: Annotated[Path, typer.Argument(help="Results folder of the first system, or its TREC run.")],
    b: Annotated[Path, typer.Argument(help="Results folder of the second system, or its TREC run.")],
    qrels: Annotated[Path | None, typer.Option("--qrels", help="Judgements (TREC or BEIR), for two runs.")] = None,
    metric: Annotated[str | None, typer.Option(help="Metric to compare (default: the task's main one).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the resampling.")] = 42,
    as_json: JsonFlag = False,
) -> None:
    """Test whether two systems differ on the same queries: randomisation test (STS and pairs: bootstrap).

    --json holds both tests.
    """
    from openembed.evaluation.compare import compare_results, compare_runs

    if a.is_file() and b.is_file():
        if qrels is None:
            raise ValueError("two TREC runs need judgements: add --qrels FILE")
        comparisons = [compare_runs(a, b, qrels, metric=metric or "ndcg_at_10", seed=seed)]
    elif a.is_dir() and b.is_dir():
        _refuse({"--qrels": qrels}, "results folders")
        comparisons = compare_results(a, b, metric=metric, seed=seed)
    else:
        raise ValueError(f"give two results folders or two TREC runs that exist, got {a} and {b}")
    if as_json:
        print_json({"a": str(a), "b": str(b), "comparisons": [comparison.as_dict() for comparison in comparisons]})
    else:
        _print_comparisons(a, b, comparisons)


def _system(
    model: str,
    cache: Path | None,
    options: dict[str, Any],
    how: tuple[VectorFormat, Method],
    device: str | None,
    dtype: str | None,
) -> System:
    from openembed.evaluation.systems import Bm25System, EncoderSystem, RunSystem
    from openembed.index.tokens.methods import EXACT

    stored, method = how
    if model == "bm25" or Path(model).is_file():
        if not stored.plain or method != EXACT:
            raise ValueError("--dimensions, --precision and --method are of a model's vectors; leave them out")
        return Bm25System() if model == "bm25" else RunSystem(Path(model), Path(model).stem)
    from openembed import load
    from openembed.evaluation.cache import open_cache

    encoder = load(model, device=device, dtype=dtype)
    vectors = None if cache is None else open_cache(cache, encoder)
    stored.width(encoder.width)  # refused before anything is encoded
    return EncoderSystem(encoder, model, vectors, options, progress=True, stored=stored, method=method)


def _run_local(system: System, tasks: list[Task], out: Path | None, run_file: Path | None) -> list[TaskResult]:
    from openembed.evaluation.runner import run_tasks

    usable = [task for task in tasks if task.kind in system.kinds]
    left_out = [task for task in tasks if task.kind not in system.kinds]
    if usable and left_out:
        logger.warning("%s does %s; left out: %s", system.name, ", ".join(system.kinds), _kinds(left_out))
    if not usable:
        raise ValueError(f"{system.name} does {', '.join(system.kinds)}; --data holds {_kinds(tasks)}")
    if run_file is not None and (len(usable) != 1 or usable[0].kind not in ("retrieval", "reranking")):
        raise ValueError(f"--run-file writes the ranking of one retrieval or reranking task; --data holds {_kinds(usable)}")
    return run_tasks(system, usable, out, run_file=run_file)


def _run_mteb(
    model: str,
    tasks: list[str],
    data: Path,
    out: Path | None,
    split: str | None,
    instruction: str | None,
    options: dict[str, Any],
    device: str | None,
    dtype: str | None,
) -> list[TaskResult]:
    from openembed.evaluation.mteb import require_mteb, run_mteb

    require_mteb()
    if model == "bm25" or Path(model).is_file():
        raise ValueError(f"--tasks runs encoders; evaluate {model} without --tasks")
    from openembed import load

    encoder = load(model, device=device, dtype=dtype)
    return run_mteb(encoder, model, tasks, data, out, split=split, instruction=instruction, options=options)


def _listed(data: list[Path]) -> str:
    return ", ".join(map(str, data))


def _kinds(tasks: list[Task]) -> str:
    return ", ".join(f"{task.name} ({task.kind})" for task in tasks)


def _refuse(options: dict[str, Any], what: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)} cannot be combined with {what}; leave it out")


def _print_results(model: str, results: list[TaskResult]) -> None:
    table = _table(model, ("score", "95 % interval", "items", "seconds"))
    otherwise = any("scoring" in r.details for r in results)
    if otherwise:
        table.add_column("searched by")
    for r in results:
        interval = "" if r.interval is None else f"{r.interval.low * 100:.2f} to {r.interval.high * 100:.2f}"
        items = next((r.counts[key] for key in ("queries", "pairs", "texts") if key in r.counts), "")
        table.add_row(
            r.task,
            r.metric,
            f"{r.value * 100:.2f}",
            interval,
            str(items),
            f"{r.seconds:.1f}",
            *([_scoring(r)] if otherwise else []),
        )
    print_table(table)
    costly = [r for r in results if r.costs]
    if costly:
        print_table(_costs_table(costly))


def _scoring(result: TaskResult) -> str:
    """How token vectors were searched."""
    from openembed.index.tokens.methods import METHODS, told

    found = result.details.get("scoring")
    return told(METHODS[found["kind"]].model_validate(found)) if found else "exact"


def _costs_table(results: list[TaskResult]) -> Any:
    """What the scores cost: entries are dimensions, terms or token vectors; milliseconds of a query alone and of a document."""
    from rich.table import Table

    table = Table(title="Costs (entries: dimensions, terms or token vectors)")
    table.add_column("task")
    columns = {"entries/query": "query_entries", "entries/doc": "document_entries", "bytes/doc": "document_bytes"}
    columns |= {"query ms": "query_ms", "encode doc ms": "encode_document_ms"}
    if any("flops" in r.costs for r in results):
        columns["FLOPS"] = "flops"
    shares = ("empty_queries", "empty_documents")
    if any(r.costs.get(key) for r in results for key in shares):
        columns |= {"empty queries": shares[0], "empty docs": shares[1]}
    for name in columns:
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(r.task, *(_shown(r.costs.get(key), share=key in shares) for key in columns.values()))
    return table


def _shown(value: float | None, *, share: bool) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if share else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _print_comparisons(a: Path, b: Path, comparisons: list[Comparison]) -> None:
    table = _table(f"A = {a}, B = {b}", ("A", "B", "A - B", "95 % interval", "p"))
    for comparison in comparisons:
        t = comparison.test
        p = t.p_bootstrap if t.p_randomization is None else t.p_randomization
        interval = f"{t.interval.low * 100:+.2f} to {t.interval.high * 100:+.2f}"
        scores = (f"{t.a * 100:.2f}", f"{t.b * 100:.2f}", f"{t.difference * 100:+.2f}")
        table.add_row(comparison.task, t.metric, *scores, interval, "< 0.0001" if p < 1e-4 else f"{p:.4f}")
    print_table(table)


def _table(title: str, numbers: tuple[str, ...]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in ("task", "metric"):
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
