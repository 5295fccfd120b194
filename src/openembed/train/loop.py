"""The training loop: steps that are pure functions of (seed, step), metrics as they happen, exact resume.

``metrics.jsonl`` has one object a step: ``step`` (1-based, finished steps), ``loss``, ``parts``, ``loss_by_source``,
``rows_by_source``, ``rows_without_negatives``, ``false_negatives_masked``, ``similarity`` (``positive``, ``hard``,
``in_batch``: count, mean, 40-bin histogram over -1..1), for sparse heads ``sparsity``
(:func:`openembed.objectives.regularizers.sparsity`), ``lr``, ``grad_norm``, ``tokens`` (run through the model),
``padded_tokens`` (what queries and documents padded to their longest would have cost), ``texts``, ``seconds`` and, where
one was due, ``evaluation``. Values of accumulated batches are summed (counts) or averaged (losses). With several ranks
all values are those of the whole batch, ``balance`` is the mean over the largest number of tokens of a rank, and only
rank 0 writes.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Discriminator, Field, Tag, model_validator

from openembed.backbones.adapters import LoraConfig, add_lora, has_quantized, merge_lora
from openembed.backbones.compiled import compile_layers, restore_layers
from openembed.config import Config
from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.data.mixing import MixtureConfig
from openembed.data.sources import SourceConfig, load_sources
from openembed.data.teacher import teacher_fingerprint
from openembed.encoder import Encoder
from openembed.objectives import Loss, Objective
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.objectives.distillation import DistillationConfig
from openembed.objectives.regularizers import read_idf
from openembed.objectives.semi_parametric import SemiParametricConfig
from openembed.packing import micro_batches
from openembed.progress import progress
from openembed.records import Example
from openembed.seeds import derive, generator
from openembed.train import checkpoint
from openembed.train.cached import PLACEMENT, ComputeConfig, Prepared, backward, prepare, seeded
from openembed.train.distributed import ALONE, World, balance
from openembed.train.memory import available_bytes, choose_chunk_tokens, require_fit, size, try_estimate
from openembed.train.metrics import MetricsFile, fingerprint, merge_losses, padded_tokens
from openembed.train.optimizer import OptimizerConfig, set_rate
from openembed.train.parallel import Replicated, Sharded, assembled, hollow, whole

logger = logging.getLogger(__name__)

EVEN_ENOUGH = 0.8
"""Below this balance of work between ranks the user is told how to better it."""

Evaluate = Callable[[Encoder, int], Mapping[str, float]]
"""Given the encoder and the number of finished steps, returns scores by name."""


def _kind(value: Any) -> str:
    return value.get("kind", "contrastive") if isinstance(value, Mapping) else value.kind


ObjectiveConfig = Annotated[
    Annotated[ContrastiveConfig, Tag("contrastive")]
    | Annotated[DistillationConfig, Tag("distillation")]
    | Annotated[SemiParametricConfig, Tag("semi_parametric")],
    Discriminator(_kind),
]
"""What can be trained for, by ``kind``; contrastive where none is given."""


class TrainConfig(Config):
    """Everything that decides the trained weights, given encoder and data (``save_every`` and ``evaluate_every`` do not).

    Its length is given in ``steps`` or in ``epochs`` of the mixture. ``lora`` adapts the backbone and trains the head in
    full; without it everything is trained. ``save_every`` and ``evaluate_every`` count steps; both also happen after the
    last step, and an ``evaluate_every`` of None only then.
    """

    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    data: MixtureConfig
    seed: int = 0
    batch: BatchConfig = BatchConfig()
    objective: ObjectiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig | None = None
    compute: ComputeConfig = ComputeConfig()
    save_every: int = Field(default=500, ge=1)
    evaluate_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs (got steps {self.steps}, epochs {self.epochs})")
        return self

    def with_steps(self, examples: Mapping[str, Sequence[Example]]) -> TrainConfig:
        """Returns the config with its number of steps: those that ``epochs`` take, the last batch filled."""
        if self.epochs is None:
            return self
        rows = self.data.rows_per_epoch([len(examples[source.name]) for source in self.data.sources])
        steps = math.ceil(self.epochs * rows / (self.batch.size * self.batch.accumulation))
        return self.model_copy(update={"steps": steps, "epochs": None})


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
    world: World = ALONE,
    tell: Callable[[str], None] | None = None,
) -> TrainResult:
    """Trains ``encoder`` in place, saves it to ``out_dir/model`` (adapters merged) and returns where things are.

    A run that was stopped at any point goes on from the newest intact checkpoint in ``out_dir/checkpoint`` and ends with
    the weights an uninterrupted run would have, bit for bit on CPU. ``encoder`` must then be the one it started from.
    ``examples`` replaces loading the sources (by name; relative paths count from ``base_dir``). Raises ``ValueError``
    when the run on disk has other settings, data or model, and when loss or gradient is no longer finite.

    Every rank of ``world`` must call, with equal arguments and an ``out_dir`` that all can read; only rank 0 writes. A run
    may be resumed on another number of ranks: same weights up to the order of summation, dropout included. Under
    ``fsdp`` the encoder handed in stays split (open ``out_dir/model`` instead), and ``evaluate`` runs on all ranks.
    ``tell`` is given, on rank 0, what the run needs of memory before its first step.
    """
    out_dir = Path(out_dir)
    loaded = examples or world.agree(lambda: load_sources(config.data.sources, base_dir, config.seed), leader_first=True)
    config = config.with_steps(loaded)
    settings = _settings(config, encoder, loaded)
    world.require_equal({**settings["data"], "model": settings["model"], "config": str(settings["config"])})
    found = world.lead(lambda: checkpoint.latest(out_dir / "checkpoint"))
    if found is not None:
        _require_same(found, settings)
    run = _Run(config, encoder, loaded, world)
    start = 0 if found is None else found.step
    settings["chunk_tokens"] = run.settle(start, None if found is None else found.settings.get("chunk_tokens"), tell)
    if found is not None:
        world.agree(lambda: run.restore(found))
        logger.info("resuming from %s", found.path)
    metrics = MetricsFile(out_dir / "metrics.jsonl", keep_steps=start) if world.leads else None
    with progress("train", config.steps - start, "steps", show=world.leads) as advance:
        for step, prepared in run.prefetched(start):
            record = run.step(step, prepared)
            done = step + 1
            if evaluate is not None and _due(done, config.evaluate_every, config.steps):
                record["evaluation"] = run.evaluated(evaluate, done)
            if metrics is not None:
                metrics.append({"step": done, **record})
            if _due(done, config.save_every, config.steps):
                run.save(out_dir / "checkpoint", done, settings)
            advance(1)
    restore_layers(encoder.backbone)
    finished = run.finished()
    evaluation = world.lead(lambda: (finished.save(out_dir / "model"), metrics.last_evaluation())[1])
    return TrainResult(out_dir / "model", out_dir / "metrics.jsonl", config.steps, start, evaluation)


class _Run:
    """An encoder made ready for training, its optimizer, and the order of its data."""

    def __init__(self, config: TrainConfig, encoder: Encoder, examples: Mapping[str, Sequence[Example]], world: World) -> None:
        self.config, self.encoder, self.world, self.compute = config, encoder, world, config.compute
        self.examples = [examples[source.name] for source in config.data.sources]
        self.sources = {source.name: row_source(source, encoder) for source in config.data.sources}
        self.mixture = config.data.build(
            [len(rows) for rows in self.examples],
            steps=config.steps,
            batch=config.batch.size,
            accumulation=config.batch.accumulation,
            seed=config.seed,
        )
        self.objective: Objective = config.objective.build()
        if has_quantized(encoder.backbone.model):
            _require_qlora(config)
        if config.lora is not None:
            with seeded(derive(config.seed, "lora"), encoder.device):
                add_lora(encoder.backbone.model, config.lora)
        _widen(encoder, everything=config.compute.precision == "fp32")
        if config.compute.gradient_checkpointing:
            encoder.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.compute.compile:
            compile_layers(encoder.backbone)
        encoder.train()
        self._plain = encoder  # as one process would hold it: what is counted, and what is saved
        self.ranks = Replicated(world)
        if config.compute.parallel == "fsdp" and world.size > 1:
            self._plain = hollow(encoder)
            bf16 = config.compute.precision == "bf16"
            self.ranks = Sharded(world, encoder, config.compute.keep_whole, bf16=bf16)
        self.optimizer = config.optimizer.build(encoder)
        self.trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def settle(self, start: int, chunk_tokens: int | None, tell: Callable[[str], None] | None) -> int:
        """Fixes the size of a micro-batch (that of the run resumed, else the configured or measured one); returns it.

        Raises ``ValueError`` when the first step will not fit the GPU.
        """
        given = self.config.compute.chunk_tokens
        batches = self.prepared(min(start, self.config.steps - 1))
        lengths = max((prepared.rows.lengths for prepared in batches), key=np.sum)
        if given != "auto":
            chunk_tokens = given
        elif chunk_tokens is None:
            chosen = self.world.agree(lambda: choose_chunk_tokens(self._plain, self.compute, lengths, self.world.size))
            chunk_tokens = min(self.world.gather(chosen))
        self.compute = self.compute.model_copy(update={"chunk_tokens": chunk_tokens})
        if start < self.config.steps:
            pairs = max(prepared.batch.rows * prepared.batch.columns for prepared in batches)
            self._foresee(lengths, pairs, tell if tell is not None and self.world.leads else lambda _note: None)
        return chunk_tokens

    def _foresee(self, lengths: np.ndarray, pairs: int, tell: Callable[[str], None]) -> None:
        """Tells what the first step needs of memory and how evenly the ranks share it; raises when it will not fit."""
        device, ranks = self.encoder.device, self.world.size
        estimate = try_estimate(self._plain, self.compute, lengths, pairs=pairs, ranks=ranks)
        if estimate is not None:
            free = available_bytes(device)
            tell(f"memory: about {estimate}" + ("" if free is None else f"; {size(free)} to be had"))
        chunks = [int(lengths[chunk].sum()) for chunk in micro_batches(lengths, self.compute.chunk_tokens)]
        if balance(chunks, ranks) < EVEN_ENOUGH:
            better = max(1, sum(chunks) // (4 * ranks))
            tell(
                f"work is uneven: {len(chunks)} micro-batches keep {ranks} ranks busy {balance(chunks, ranks):.0%} of the "
                f"time; lower compute.chunk_tokens to about {better}"
            )
        self.world.agree(lambda: require_fit(estimate, device))

    def save(self, folder: Path, done: int, settings: Mapping[str, Any]) -> None:
        """Writes a checkpoint of ``done`` steps; all ranks must call."""
        remembered = self.objective.state()
        checkpoint.save(folder, done, self.encoder, self.optimizer, settings, objective=remembered, world=self.world)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Puts back weights, optimizer and what the objective remembered."""
        checkpoint.restore(found, self.encoder, self.optimizer)
        self.objective.restore(checkpoint.remembered(found))

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
        return [self._prepare(step, step * count + part) for part in range(count)]

    def _prepare(self, step: int, number: int) -> Prepared:
        rows = [self.examples[source][index] for source, index in self.mixture.rows(number)]
        batch = collate(rows, self.sources, self.config.batch, generator(self.config.seed, "rows", number))
        return prepare(self._plain, self.objective, batch, self.config.compute, step)

    def step(self, step: int, batches: Sequence[Prepared]) -> dict[str, Any]:
        """Moves the weights once and returns the step's metrics."""
        config, began = self.config, time.perf_counter()
        rate = set_rate(self.optimizer, config.optimizer.rate(step, config.steps))
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Loss] = []
        for part, prepared in enumerate(batches):
            seed = derive(config.seed, "dropout", step, part)
            last = part == len(batches) - 1
            loss = backward(
                self.encoder,
                self.objective,
                prepared,
                self.compute,
                seed=seed,
                scale=1 / len(batches),
                ranks=self.ranks,
                last=last,
            )
            losses.append(loss)
        self.ranks.finish(self.trained)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.trained, config.optimizer.clip or math.inf)).item()
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
            **self._balance(batches),
        }

    def _balance(self, batches: Sequence[Prepared]) -> dict[str, float]:
        if self.world.size == 1:
            return {}
        budget, found = self.compute.chunk_tokens, []
        for prepared in batches:
            lengths = prepared.rows.lengths
            found.append(balance([int(lengths[c].sum()) for c in prepared.rows.micro_batches(budget)], self.world.size))
        return {"balance": sum(found) / len(found)}

    def evaluated(self, evaluate: Evaluate, done: int) -> dict[str, float]:
        """Returns the scores after ``done`` steps; training mode and random generators are as before.

        Rank 0 computes them while the others wait; split weights need all ranks, which then compute the same.
        """
        if self.ranks.sharded:
            return self._evaluated(evaluate, done)
        return self.world.lead(lambda: self._evaluated(evaluate, done))

    def _evaluated(self, evaluate: Evaluate, done: int) -> dict[str, float]:
        self.encoder.eval()
        with seeded(derive(self.config.seed, "evaluate", done), self.encoder.device):
            scores = {name: float(value) for name, value in evaluate(self.encoder, done).items()}
        self.ranks.split()
        self.encoder.train()
        return scores

    def finished(self) -> Encoder:
        """Returns the trained encoder, whole and with adapters merged; under fsdp on rank 0 alone."""
        encoder = assembled(self.encoder, self._plain, self.world) if self.ranks.sharded else self.encoder
        encoder.eval()
        if has_quantized(encoder.backbone.model):
            encoder.to("cpu")  # a card that needs 4 bits has no room for 16
        if self.config.lora is not None and (self.world.leads or not self.ranks.sharded):
            merge_lora(encoder.backbone.model)
        trained = getattr(self.config.objective, "matryoshka", ())
        encoder.config = encoder.config.model_copy(update={"matryoshka": trained})
        return encoder


def row_source(config: SourceConfig, encoder: Encoder) -> RowSource:
    """Returns what a source's rows carry into batches, its instructions rendered through the encoder's template."""
    return RowSource(
        name=config.name,
        query_prompt=encoder.query_prompt(instruction=config.instruction or None),
        document_prompt=encoder.document_prompt(instruction=config.document_instruction or None),
        in_batch=config.in_batch,
        loss_weight=config.loss_weight,
        sided=encoder.sided,
    )


def _widen(encoder: Encoder, *, everything: bool) -> None:
    """Puts trainable parameters (or all) in fp32: an update smaller than half precision resolves would be lost."""
    for parameter in encoder.parameters():
        if everything or parameter.requires_grad:
            parameter.data = parameter.data.float()


def _require_qlora(config: TrainConfig) -> None:
    """Raises ``ValueError`` when ``config`` asks of a 4-bit backbone what it cannot do."""
    if config.lora is None or config.compute.precision != "bf16" or config.compute.parallel == "fsdp":
        raise ValueError(
            "a backbone with quantization = 'nf4' cannot be trained itself, in fp32, or split by fsdp; "
            "set lora, compute.precision = 'bf16' and compute.parallel = 'ddp'"
        )


def _due(done: int, every: int | None, steps: int) -> bool:
    return done == steps or (every is not None and done % every == 0)


def _settings(config: TrainConfig, encoder: Encoder, examples: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """What must be the same for a run to be resumed; teachers' vectors and tables by what they are, not by where."""
    chosen = config.model_dump(mode="json", exclude={"save_every": True, "evaluate_every": True, "compute": PLACEMENT})
    if isinstance(config.objective, DistillationConfig):
        prints = [teacher_fingerprint(folder) for folder in config.objective.folders]
        chosen["objective"] = config.objective.at(prints).model_dump(mode="json")
    for penalty in chosen["objective"].get("regularizers", ()):
        if penalty.get("idf") is not None:
            penalty["idf"] = hashlib.sha256(read_idf(penalty["idf"]).tobytes()).hexdigest()
    return {
        "config": chosen,
        "data": {source.name: fingerprint(examples[source.name]) for source in config.data.sources},
        "model": encoder.fingerprint,
    }


def _require_same(found: checkpoint.Checkpoint, settings: Mapping[str, Any]) -> None:
    before = {key: value for key, value in found.settings.items() if key != "chunk_tokens"}  # a result, not a setting
    changed = sorted(_differences(before, settings))
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
