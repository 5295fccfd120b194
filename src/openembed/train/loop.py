"""The training loop: steps that are pure functions of (seed, step), metrics as they happen, exact resume.

``metrics.jsonl`` has one object a step: ``step`` (1-based, finished steps), ``loss``, ``parts``, ``loss_by_source``,
``rows_by_source``, ``rows_without_negatives``, ``false_negatives_masked``, ``similarity`` (``positive``, ``hard``,
``in_batch``: count, mean, 40-bin histogram over -1..1), ``lr``, ``grad_norm``, ``tokens`` (run through the model),
``padded_tokens`` (what queries and documents padded to their longest would have cost), ``texts``, ``seconds`` and, where
one was due, ``evaluation``. Values of accumulated batches are summed (counts) or averaged (losses).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Discriminator, Field, Tag

from openembed.backbones.adapters import LoraConfig, add_lora, merge_lora
from openembed.backbones.compiled import compile_layers, restore_layers
from openembed.config import Config
from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.data.mixing import Mixture, MixtureConfig
from openembed.data.sources import SourceConfig, load_source
from openembed.encoder import Encoder
from openembed.objectives import Loss, Objective
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.objectives.distillation import DistillationConfig
from openembed.progress import progress
from openembed.records import Example
from openembed.seeds import derive, generator
from openembed.train import checkpoint
from openembed.train.cached import ComputeConfig, Prepared, backward, prepare, seeded
from openembed.train.metrics import MetricsFile, fingerprint, merge_losses, padded_tokens
from openembed.train.optimizer import OptimizerConfig, set_rate

logger = logging.getLogger(__name__)

Evaluate = Callable[[Encoder, int], Mapping[str, float]]
"""Given the encoder and the number of finished steps, returns scores by name."""


def _kind(value: Any) -> str:
    return value.get("kind", "contrastive") if isinstance(value, Mapping) else value.kind


ObjectiveConfig = Annotated[
    Annotated[ContrastiveConfig, Tag("contrastive")] | Annotated[DistillationConfig, Tag("distillation")],
    Discriminator(_kind),
]
"""What can be trained for, by ``kind``; contrastive where none is given."""


class TrainConfig(Config):
    """Everything that decides the trained weights, given encoder and data (``save_every`` and ``evaluate_every`` do not).

    ``lora`` adapts the backbone and trains the head in full; without it everything is trained. ``save_every`` and
    ``evaluate_every`` count steps; both also happen after the last step, and an ``evaluate_every`` of None only then.
    """

    steps: int = Field(ge=1)
    data: MixtureConfig
    seed: int = 0
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    save_every: int = Field(default=500, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class TrainResult:
    """Where a finished run left its model and metrics; ``resumed_from`` is the step it went on from (0: from the start)."""

    model: Path
    metrics: Path
    steps: int
    resumed_from: int
    evaluation: dict[str, float]


def train(
    config: TrainConfig,
    encoder: Encoder,
    out_dir: str | Path,
    *,
    base_dir: str | Path = ".",
    examples: Mapping[str, Sequence[Example]] | None = None,
    evaluate: Evaluate | None = None,
) -> TrainResult:
    """Trains ``encoder`` in place, saves it to ``out_dir/model`` (adapters merged) and returns where things are.

    A run that was stopped at any point goes on from the newest intact checkpoint in ``out_dir/checkpoint`` and ends with
    the weights an uninterrupted run would have, bit for bit on CPU. ``encoder`` must then be the one it started from.
    ``examples`` replaces loading the sources (by name; relative paths count from ``base_dir``). Raises ``ValueError``
    when the run on disk has other settings, data or model, and when loss or gradient is no longer finite.
    """
    out_dir = Path(out_dir)
    loaded = examples or {s.name: load_source(s, base_dir, config.seed) for s in config.data.sources}
    settings = _settings(config, encoder, loaded)
    run = _Run(config, encoder, loaded)
    found = checkpoint.latest(out_dir / "checkpoint")
    start = 0
    if found is not None:
        _require_same(found, settings)
        checkpoint.restore(found, encoder, run.optimizer)
        start = found.step
        logger.info("resuming from %s", found.path)
    metrics = MetricsFile(out_dir / "metrics.jsonl", keep_steps=start)
    with progress("train", config.steps - start, "steps") as advance:
        for step, prepared in run.prefetched(start):
            record = run.step(step, prepared)
            done = step + 1
            if evaluate is not None and _due(done, config.evaluate_every, config.steps):
                record["evaluation"] = run.evaluated(evaluate, done)
            metrics.append({"step": done, **record})
            if _due(done, config.save_every, config.steps):
                checkpoint.save(out_dir / "checkpoint", done, encoder, run.optimizer, settings)
            advance(1)
    encoder.eval()
    restore_layers(encoder.backbone)
    if config.lora is not None:
        merge_lora(encoder.backbone.model)
    encoder.save(out_dir / "model")
    return TrainResult(out_dir / "model", metrics.path, config.steps, start, metrics.last_evaluation())


class _Run:
    """An encoder made ready for training, its optimizer, and the order of its data."""

    def __init__(self, config: TrainConfig, encoder: Encoder, examples: Mapping[str, Sequence[Example]]) -> None:
        self.config, self.encoder = config, encoder
        self.examples = [examples[source.name] for source in config.data.sources]
        self.sources = {source.name: row_source(source, encoder) for source in config.data.sources}
        self.mixture = Mixture(
            [len(rows) for rows in self.examples],
            [source.weight for source in config.data.sources],
            mixing=config.data.mixing,
            batch=config.batch.size,
            seed=config.seed,
        )
        self.objective: Objective = config.objective.build()
        if config.lora is not None:
            with seeded(derive(config.seed, "lora"), encoder.device):
                add_lora(encoder.backbone.model, config.lora)
        _widen(encoder, everything=config.compute.precision == "fp32")
        if config.compute.gradient_checkpointing:
            encoder.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compute.compile:
            compile_layers(encoder.backbone)
        encoder.train()
        self.optimizer = config.optimizer.build(encoder)

    def prefetched(self, start: int) -> Iterator[tuple[int, list[Prepared]]]:
        """Yields (step, its batches) up to the last step, preparing one step ahead in a thread."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            ahead = pool.submit(self.prepared, start) if start < self.config.steps else None
            for step in range(start, self.config.steps):
                assert ahead is not None
                current = ahead.result()
                ahead = pool.submit(self.prepared, step + 1) if step + 1 < self.config.steps else None
                yield step, current

    def prepared(self, step: int) -> list[Prepared]:
        """Returns the batches of ``step``, collated and tokenized; a pure function of (seed, step)."""
        count = self.config.batch.accumulation
        return [self._prepare(step * count + part) for part in range(count)]

    def _prepare(self, number: int) -> Prepared:
        rows = [self.examples[source][index] for source, index in self.mixture.rows(number)]
        batch = collate(rows, self.sources, self.config.batch, generator(self.config.seed, "rows", number))
        return prepare(self.encoder, self.objective, batch, self.config.compute)

    def step(self, step: int, batches: Sequence[Prepared]) -> dict[str, Any]:
        """Moves the weights once and returns the step's metrics."""
        config, began = self.config, time.perf_counter()
        rate = set_rate(self.optimizer, config.optimizer.rate(step, config.steps))
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Loss] = []
        for part, prepared in enumerate(batches):
            seed = derive(config.seed, "dropout", step, part)
            loss = backward(self.encoder, self.objective, prepared, config.compute, seed=seed, scale=1 / len(batches))
            losses.append(loss)
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip or math.inf).item()
        merged = merge_losses(losses)
        if not (math.isfinite(merged["loss"]) and math.isfinite(norm)):
            raise ValueError(
                f"step {step + 1}: loss {merged['loss']} with gradient norm {norm}; the weights were not changed. "
                "Lower optimizer.lr, or use precision = 'fp32'."
            )
        self.optimizer.step()
        return {
            **merged,
            "lr": rate,
            "grad_norm": norm,
            "tokens": sum(int(prepared.rows.lengths.sum()) for prepared in batches),
            "padded_tokens": sum(padded_tokens(prepared) for prepared in batches),
            "texts": sum(len(prepared.rows) for prepared in batches),
            "seconds": time.perf_counter() - began,
        }

    def evaluated(self, evaluate: Evaluate, done: int) -> dict[str, float]:
        """Returns the scores after ``done`` steps; training mode and random generators are as before."""
        self.encoder.eval()
        with seeded(derive(self.config.seed, "evaluate", done), self.encoder.device):
            scores = {name: float(value) for name, value in evaluate(self.encoder, done).items()}
        self.encoder.train()
        return scores


def row_source(config: SourceConfig, encoder: Encoder) -> RowSource:
    """Returns what a source's rows carry into batches, its instructions rendered through the encoder's template."""
    return RowSource(
        name=config.name,
        query_prompt=encoder.query_prompt(instruction=config.instruction or None),
        document_prompt=encoder.document_prompt(instruction=config.document_instruction or None),
        in_batch=config.in_batch,
        loss_weight=config.loss_weight,
    )


def _widen(encoder: Encoder, *, everything: bool) -> None:
    """Puts trainable parameters (or all) in fp32: an update smaller than half precision resolves would be lost."""
    for parameter in encoder.parameters():
        if everything or parameter.requires_grad:
            parameter.data = parameter.data.float()


def _due(done: int, every: int | None, steps: int) -> bool:
    return done == steps or (every is not None and done % every == 0)


def _settings(config: TrainConfig, encoder: Encoder, examples: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """What must be the same for a run to be resumed."""
    return {
        "config": config.model_dump(mode="json", exclude={"save_every", "evaluate_every"}),
        "data": {source.name: fingerprint(examples[source.name]) for source in config.data.sources},
        "model": encoder.fingerprint,
    }


def _require_same(found: checkpoint.Checkpoint, settings: Mapping[str, Any]) -> None:
    changed = sorted(_differences(found.settings, settings))
    if changed:
        raise ValueError(
            f"{found.path} belongs to another run: {'; '.join(changed[:5])}. "
            "Restore these settings to resume, or choose another output folder."
        )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path} was {old!r:.60}, is {new!r:.60}"
