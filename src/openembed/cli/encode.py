"""``encode``, and what every command that encodes shares: its options, loading a model, and how fast it went."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openembed.cli.output import JsonFlag, print_json

if TYPE_CHECKING:
    from openembed.bulk import BulkConfig, Encoded
    from openembed.encoder import Encoder
    from openembed.ray_encode import RayEncoder

Restart = Annotated[bool, typer.Option("--restart", help="Forget an interrupted run and begin anew.")]
Instruction = Annotated[str | None, typer.Option(help="Task description, put in the model's template.")]
MaxLength = Annotated[int | None, typer.Option(help="Longest text, in tokens (default: the model's).")]
Normalize = Annotated[bool, typer.Option("--normalize/--no-normalize", help="Scale vectors to length 1.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... (default: the best there is).")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16, ..., or int8 on a CPU (default: the best for the device, exact).")
]
Dimensions = Annotated[int | None, typer.Option(help="Keep the first so many dimensions of each vector (Matryoshka).")]
Precision = Annotated[str, typer.Option(help="Of the vectors as stored: float32, float16, int8 or binary.")]
Ray = Annotated[str | None, typer.Option("--ray", help="Ray cluster that encodes: auto, local or HOST:PORT.")]
RayWorkers = Annotated[int | None, typer.Option("--ray-workers", help="Copies of the model (default: as many as fit).")]
RayCpus = Annotated[float | None, typer.Option("--ray-cpus", help="CPUs a worker (default: a node's; beside a GPU 1).")]
RayGpus = Annotated[float | None, typer.Option("--ray-gpus", help="GPUs a worker (default: 1 where there are any).")]


def register(app: typer.Typer) -> None:
    """Adds ``encode`` to ``app``."""
    app.command()(encode)


def encode(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    file: Annotated[str, typer.Argument(help="JSONL(.gz), text (one text a line), a BEIR folder, or - for stdin.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory for the arrays, ids.jsonl and meta.json; see docs/vectors.md.")
    ],
    kind: Annotated[str, typer.Option(help="query or document.")] = "document",
    task: Annotated[str | None, typer.Option(help="A task of the model's table.")] = None,
    instruction: Instruction = None,
    normalize: Normalize = True,
    max_length: MaxLength = None,
    dimensions: Dimensions = None,
    precision: Precision = "float32",
    chunk: Annotated[int, typer.Option(help="Texts between two savings.")] = 1024,
    device: Device = None,
    dtype: Dtype = None,
    ray: Ray = None,
    ray_workers: RayWorkers = None,
    ray_cpus: RayCpus = None,
    ray_gpus: RayGpus = None,
    restart: Restart = False,
    as_json: JsonFlag = False,
) -> None:
    """Encode a file to memory-mapped vectors, here or on a Ray cluster; run again after an interruption, it resumes."""
    from openembed.bulk import BulkConfig
    from openembed.config import parse
    from openembed.documents import check_texts

    values = {"kind": kind, "task": task, "instruction": instruction, "normalize": normalize, "max_length": max_length}
    config = parse(BulkConfig, {**values, "dimensions": dimensions, "precision": precision, "chunk": chunk}, "options")
    if file != "-":
        check_texts(file)
    if ray is None:
        encoder = load_model(model, device, dtype)
    else:
        there = {"address": ray, "workers": ray_workers, "cpus": ray_cpus, "gpus": ray_gpus}
        encoder = on_cluster(model, device, dtype, there)
    encoded, report = encode_to(encoder, file, out, config, restart)
    report |= {"directory": str(out), "precision": precision, "bytes": _size(out), "kind": encoded.kind}
    report |= {"entries": encoded.entries} if encoded.kind != "dense" else {}
    if encoded.warning:
        report["warning"] = encoded.warning
    if as_json:
        print_json(report)
    else:
        stored = "" if precision == "float32" else f" in {precision}"
        sys.stdout.write(f"{_made(encoded)}{stored} in {out}{pace(report)}\n")


def load_model(model: str, device: str | None, dtype: str | None) -> Encoder:
    """Returns the encoder at a path or hub id."""
    import openembed

    return openembed.load(model, device=device, dtype=dtype)


def on_cluster(model: str, device: str | None, dtype: str | None, options: dict[str, Any]) -> RayEncoder:
    """Returns the encoder at a path or hub id on the nodes of a Ray cluster."""
    from functools import partial

    from openembed.config import parse
    from openembed.ray_encode import RayConfig, RayEncoder

    name = str(Path(model).resolve()) if Path(model).exists() else model
    return RayEncoder(partial(load_model, name, device, dtype), parse(RayConfig, options, "options"))


def encode_to(
    encoder: Encoder | RayEncoder, file: str, out: Path, config: BulkConfig, restart: bool
) -> tuple[Encoded, dict[str, Any]]:
    """Encodes ``file`` into ``out``; returns what came of it, and its counts and seconds for a report."""
    from openembed.bulk import encode_file

    start = time.perf_counter()
    encoded = encode_file(encoder, file, out, config, restart=restart, show_progress=True)
    seconds = round(time.perf_counter() - start, 3)
    return encoded, {"count": encoded.count, "width": encoded.width, "resumed": encoded.resumed, "seconds": seconds}


def pace(report: dict[str, Any]) -> str:
    """Returns how many texts were encoded in how long, in brackets; nothing for a report without encoding."""
    if "seconds" not in report:
        return ""
    new = report["count"] - report["resumed"]
    kept = f", {report['resumed']:,} kept from before" if report["resumed"] else ""
    return f" ({new:,} encoded in {report['seconds']:.1f} s{kept})"


def _made(encoded: Encoded) -> str:
    """Says what was encoded."""
    a_text = encoded.entries / encoded.count
    if encoded.kind == "sparse":
        return f"{encoded.count:,} texts of {a_text:,.1f} terms each, of {encoded.width:,},"
    if encoded.kind == "tokens":
        return f"{encoded.count:,} texts of {a_text:,.1f} vectors of width {encoded.width} each,"
    return f"{encoded.count:,} vectors of width {encoded.width}"


def _size(out: Path) -> int:
    """Bytes of the arrays."""
    import numpy as np

    from openembed.vector_files import ARRAYS

    return sum(np.load(out / name, mmap_mode="r").nbytes for name in ARRAYS if (out / name).exists())
