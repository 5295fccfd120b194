"""Commands about models and this machine: verify, convert, terms and doctor."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from openembed.cli.output import JsonFlag, console, print_json, print_table

HeadOption = Annotated[str | None, typer.Option(help="Head for a plain transformers model: mean, last_token, cls, ...")]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.command()(verify)
    app.command()(convert)
    app.command()(terms)
    app.command()(doctor)


def verify(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model.")],
    head: HeadOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, or int8 on a CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Proves that MODEL does what it should here: mask, end token, instruction span, padding, order, packing, precision."""
    import openembed
    from openembed.verify import verify as run_checks

    encoder = openembed.load(model, device, dtype, head={"kind": head} if head else None)
    checks = run_checks(encoder)
    if as_json:
        print_json({"model": model, "checks": [asdict(check) for check in checks]})
    else:
        _print_checks(model, checks)
    if any(check.passed is False for check in checks):
        raise typer.Exit(1)


def _print_checks(model: str, checks: list[Any]) -> None:
    from rich.table import Table

    table = Table(title=model, show_lines=False, title_justify="left")
    for column in ("check", "", "what was seen"):
        table.add_column(column)
    signs = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "[dim]n/a[/]"}
    for check in checks:
        table.add_row(check.name, signs[check.passed], check.detail)
    print_table(table)


def convert(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="openembed (sentence-transformers opens it too); with a vector a token also pylate or colbert; "
            "of sparse models also opensearch (queries by table) or splade."
        ),
    ] = "openembed",
    named_prompts: Annotated[
        bool,
        typer.Option("--named-prompts", help="pylate: also where prompts are text, which PyLate adds by name alone."),
    ] = False,
    query_gate: Annotated[
        str | None,
        typer.Option(help="Weights over a vocabulary: what queries keep of them; bag_of_words (no model is run), lexical, ..."),
    ] = None,
    document_gate: Annotated[
        str | None, typer.Option(help='The same of documents; parametric: all weights; "top_k=64,keep_own=true": the largest.')
    ] = None,
    head: HeadOption = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights: float32, bfloat16, float16.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write MODEL to the folder OUT in another layout, or with other gates; what a layout cannot say is refused by name."""
    import openembed
    from openembed.layouts import check_layout

    check_layout(out, to, named_prompts=named_prompts)  # before seconds are spent on loading
    if Path(model).exists() and Path(model).resolve() == out.resolve():
        raise ValueError(f"{out}: is the model itself, which would be replaced; give another folder")
    given = {"query": query_gate, "document": document_gate}
    gates = {side: _gate(f"--{side}-gate", text) for side, text in given.items() if text is not None}
    encoder = openembed.load(model, "cpu", dtype, head={"kind": head} if head else None)
    encoder = encoder.with_gates(**gates) if gates else encoder
    encoder.save(out, layout=to, named_prompts=named_prompts)
    if as_json:
        print_json({"model": model, "out": str(out), "layout": to, "kind": encoder.kind})
    else:
        said = "".join(f", {side} gate {text}" for side, text in given.items() if text is not None)
        sys.stdout.write(f"{out}: {model} in the layout of {to}{said}\n")


def _gate(option: str, text: str) -> Any:
    """Returns what an option says of a side: the name of a gate, or settings of it (``top_k=64,keep_own=true``)."""
    import tomllib

    from openembed.config import parse
    from openembed.heads.splade import SideConfig

    try:
        settings = tomllib.loads(text.replace(",", "\n")) if "=" in text else {"gate": text}
    except tomllib.TOMLDecodeError:
        raise ValueError(
            f'{option} {text!r} cannot be read; write a gate, or settings such as "top_k=64,keep_own=true"'
        ) from None
    return parse(SideConfig, settings, option)


def terms(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model with weights over its vocabulary.")],
    text: Annotated[str, typer.Argument(help="The text.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Terms to show.")] = 20,
    query: Annotated[bool, typer.Option("--query", help="Encode the text as a query, not as a document.")] = False,
    instruction: Annotated[str | None, typer.Option(help="Task description, put in the model's template.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Shows the terms that a sparse MODEL gives TEXT, heaviest first, and which of them the text itself has."""
    import openembed
    from openembed.terms import top_terms

    found = top_terms(openembed.load(model, device), text, k, query=query, instruction=instruction)
    if as_json:
        print_json({"model": model, "side": "query" if query else "document", "text": text, **asdict(found)})
    else:
        _print_terms(text, found)


def _print_terms(text: str, found: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(text), title_justify="left", caption=f"{found.count} terms", caption_justify="left")
    for column, justify in (("term", "left"), ("weight", "right"), ("share", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for term in found.top:
        shown = "in the text" if term.own else "[green]added[/]"
        table.add_row(escape(term.token), f"{term.weight:.3f}", f"{term.share:.1%}", shown)
    print_table(table)


def doctor(as_json: JsonFlag = False) -> None:
    """Prints versions, devices, optional engines and combinations known to break."""
    from openembed.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
    else:
        _print_diagnosis(found)
    if found["problems"]:
        raise typer.Exit(1)


def _print_diagnosis(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(title=f"Python {found['python']} on {found['system']}", title_justify="left")
    for column in ("package", "version", "for"):
        table.add_column(column)
    for name, version in found["versions"].items():
        table.add_row(name, version or "[red]missing[/]", "")
    for name, row in found["optional"].items():
        table.add_row(f"[dim]{name}[/]", row["version"] or "[dim]not installed[/]", f"[dim]{escape(row['for'])}[/]")
    print_table(table)
    cpu = found["devices"]["cpu"]
    out.print(f"CPU: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}, oneDNN {cpu['onednn']}")
    out.print(f"CPU kernels: {cpu['kernels']}")
    for gpu in found["devices"]["cuda"]:
        out.print(f"GPU: {gpu['name']}, {gpu['memory_gib']} GiB")
    if not found["devices"]["cuda"]:
        out.print("GPU: none that torch can use")
    for problem in found["problems"]:
        out.print(f"[red]problem:[/] {problem}", soft_wrap=True)
    if not found["problems"]:
        out.print("[green]no problem found[/]")
