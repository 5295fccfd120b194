"""``mine`` and ``remine``: hard negatives for training rows, and another policy on rankings that were kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openembed.cli.encode import Ray, RayCpus, RayGpus, RayWorkers, load_model, on_cluster
from openembed.cli.output import JsonFlag, console, print_json

if TYPE_CHECKING:
    from openembed.data.mine import MinedFolder

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for mined.jsonl, audit.json and audit.html.")]
Filter = Annotated[str, typer.Option(help="Ceiling: percent, margin, absolute or none.")]
Value = Annotated[float | None, typer.Option(help="Of the ceiling (default: percent 0.95, margin 0.05, absolute 0.7).")]
Keep = Annotated[int, typer.Option(help="Negatives a query.")]
Pool = Annotated[int, typer.Option(help="Ranked documents a query that are looked at.")]
Skip = Annotated[int, typer.Option(help="First ranks to leave out.")]
Sample = Annotated[str, typer.Option(help="top, uniform or softmax.")]
SampleFrom = Annotated[int | None, typer.Option(help="Best survivors to draw from (default: all).")]
Temperature = Annotated[float, typer.Option(help="Of softmax sampling, in teacher scores.")]
Short = Annotated[str, typer.Option(help="Too few survivors: keep, relax, random or drop.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
Restart = Annotated[bool, typer.Option("--restart", help="Forget an interrupted run and begin anew.")]

VALUES = {"percent": 0.95, "margin": 0.05, "absolute": 0.7, "none": 0.0}
"""The best settings of NV-Retriever, section 4."""


def register(app: typer.Typer) -> None:
    """Adds ``mine`` and ``remine`` to ``app``."""
    app.command()(mine)
    app.command()(remine)


def mine(
    data: Annotated[Path, typer.Argument(help="BEIR folder, or JSONL(.gz) with query and positive(s).")],
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help="Documents (default: the BEIR folder's, or all positives).")] = None,
    split: Annotated[str, typer.Option(help="Judgements of a BEIR folder.")] = "train",
    teacher: Annotated[str, typer.Option(help="Model folder or hub id, bm25 or random.")] = "bm25",
    reranker: Annotated[str | None, typer.Option(help="Cross-encoder that scores the ranking anew.")] = None,
    filter: Filter = "percent",
    value: Value = None,
    keep: Keep = 20,
    pool: Pool = 100,
    skip: Skip = 0,
    sample: Sample = "top",
    sample_from: SampleFrom = None,
    temperature: Temperature = 0.05,
    short: Short = "keep",
    instruction: Annotated[str, typer.Option(help="Task description for queries.")] = "",
    document_instruction: Annotated[str, typer.Option(help="Task description for documents.")] = "",
    template: Annotated[str | None, typer.Option(help="Query prompt, such as 'query: ' or 'Task: {task} '.")] = None,
    document_template: Annotated[str | None, typer.Option(help="Document prompt, such as 'passage: '.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text of the teacher.")] = None,
    language: Annotated[str, typer.Option(help="BM25's stemmer and stop words.")] = "en",
    keep_pool: Annotated[bool, typer.Option("--keep-pool", help="Keep the rankings for `openembed remine`.")] = False,
    seed: Seed = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: the best there is).")] = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_cpus: RayCpus = None,
    ray_gpus: RayGpus = None,
    restart: Restart = False,
    as_json: JsonFlag = False,
) -> None:
    """Mine hard negatives; run again after an interruption, it goes on. Read audit.html before training on them."""
    from openembed.config import parse
    from openembed.data.mine import MineConfig, mine_folder
    from openembed.data.sources import SourceConfig, load_source
    from openembed.documents import read_documents

    if ray is not None and teacher in ("bm25", "random"):
        raise ValueError(f"--ray is for a teacher that encodes, not {teacher}; leave it out, or name a model by --teacher")
    policy = _policy(filter, value, keep, pool, skip, sample, sample_from, temperature, short)
    prompts = {"instruction": instruction, "document_instruction": document_instruction}
    prompts |= {"template": template, "document_template": document_template}
    other = {"max_length": max_length, "language": language, "keep_pool": keep_pool, "seed": seed}
    kind = teacher if teacher in ("bm25", "random") else "encoder"
    config = parse(MineConfig, {**policy, **prompts, **other, "teacher": kind}, "options")
    name = Path(os.path.abspath(data)).name.removesuffix(".gz").removesuffix(".jsonl")
    examples = load_source(SourceConfig(name=name, path=str(data), split=split))
    place = corpus or (data if data.is_dir() else None)
    documents = iter(()) if place is None else read_documents(place)
    there = {"address": ray, "workers": ray_workers, "cpus": ray_cpus, "gpus": ray_gpus}
    encoder = _encoder(teacher, device, there) if kind == "encoder" else None
    cross = None if reranker is None else _reranker(reranker, device)
    done = mine_folder(examples, documents, out, config, encoder, reranker=cross, restart=restart)
    _say(done, as_json)


def remine(
    mined: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of `openembed mine --keep-pool`.")],
    out: Out,
    filter: Filter = "percent",
    value: Value = None,
    keep: Keep = 20,
    pool: Pool = 100,
    skip: Skip = 0,
    sample: Sample = "top",
    sample_from: SampleFrom = None,
    temperature: Temperature = 0.05,
    short: Short = "keep",
    seed: Annotated[int | None, typer.Option(help="Of all that is drawn (default: that of the mining).")] = None,
    restart: Restart = False,
    as_json: JsonFlag = False,
) -> None:
    """Take other negatives of rankings that were kept, by another policy; no teacher is needed."""
    from openembed.config import parse
    from openembed.data.mine import reapply
    from openembed.data.select import PolicyConfig

    values = _policy(filter, value, keep, pool, skip, sample, sample_from, temperature, short)
    _say(reapply(mined, out, parse(PolicyConfig, values, "options"), seed=seed, restart=restart), as_json)


def _policy(
    rule: str,
    value: float | None,
    keep: int,
    pool: int,
    skip: int,
    sample: str,
    sample_from: int | None,
    temperature: float,
    short: str,
) -> dict[str, Any]:
    chosen = {"kind": rule, "value": VALUES.get(rule, 0.0) if value is None else value}
    drawn = {"sample": sample, "sample_from": sample_from, "temperature": temperature, "short": short}
    return {"filter": chosen, "keep": keep, "pool": pool, "skip": skip, **drawn}


def _encoder(model: str, device: str | None, there: dict[str, Any]) -> Any:
    return load_model(model, device, None) if there["address"] is None else on_cluster(model, device, None, there)


def _reranker(model: str, device: str | None) -> Any:
    from openembed.rerankers.cross_encoder import load_cross_encoder

    return load_cross_encoder(model, device=device or "cpu")


def _say(done: MinedFolder, as_json: bool) -> None:
    from openembed.report import write_audit
    from openembed.report.mining import sheet

    audit = done.audit
    page = write_audit([audit], done.folder / "audit.html", f"Mined negatives: {audit['source']}")
    if as_json:
        shown = {name: value for name, value in audit.items() if name not in ("samples", "histograms")}
        print_json({"out": str(done.folder), "report": str(page), **shown})
        return
    found = sheet(audit)
    console().print(found.sentence, markup=False, highlight=False)
    for name, value in found.counts:
        console().print(f"  {name}: {value}", markup=False, highlight=False)
    console().print(f"Read before training: {page}", markup=False, highlight=False)
