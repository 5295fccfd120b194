"""Training throughput on mixed lengths: openembed beside sentence-transformers' trainer, paired in one process.

Every contender runs its own complete training loop (data order, tokenization, loss, backward, clipping, AdamW, logging)
over the same batches from the same random weights, in its own thread; a baton lets exactly one of them run, one step at a
time in turn, so a busy moment of the machine falls on all alike. The first turn (loading, first step, compilation) is
reported apart. Steps are timed in wall seconds and in CPU seconds of the process.

The opponent is ``SentenceTransformerTrainer`` with ``CachedMultipleNegativesRankingLoss``. ``--sweep`` tries its settings
over two steps; the comparison then takes the fastest (name it in ``--sides``).

    python benchmarks/train.py --model decoder --data ../shared/data --sides st:32,st:tokens=1024,st:4 --steps 3
    python benchmarks/train.py --model decoder --data ../shared/data --sides st:4,plain,compiled,bf16 --json out.json

Sides: ``st:N`` (mini_batch_size N), ``st:tokens=N`` (mini_batch_num_tokens N), ``mnrl`` (its loss without caching),
``recompute`` (openembed, every micro-batch run twice, as the opponent does), ``plain`` (all activations kept),
``compiled``, ``bf16`` and ``compiled-bf16``. On a CUDA device both sides run bf16 and flash attention where it is
installed; no figure was ever taken on one.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import reports
import torch
from train_data import MODELS, build_model, generated_pairs, real_pairs

import openembed
from openembed.data.mixing import Mixture
from openembed.records import Document, Example, Query
from openembed.train.loop import TrainConfig, train

LR, TEMPERATURE, SEED = 1e-4, 0.05, 0
CHUNK_TOKENS = 1536
PEAK_ROWS = 1024


class Turns:
    """Hands the one permission to run from side to side; times what each does with it."""

    def __init__(self, names):
        self.go = {name: threading.Semaphore(0) for name in names}
        self.over = threading.Semaphore(0)
        self.times = {name: [] for name in names}
        self.losses = {name: [] for name in names}
        self.failed = None

    def run(self, name, work):
        """Thread body: waits for its first turn, runs ``work``, which calls :meth:`end` after every step."""
        self.go[name].acquire()
        try:
            self.started = time.perf_counter(), time.process_time()
            work(lambda: self.end(name), self.losses[name])
        except BaseException as error:
            self.failed = error
            raise
        finally:
            self.over.release()

    def end(self, name):
        """Ends the turn of ``name`` after a step and waits for its next."""
        wall, cpu = self.started
        self.times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        self.over.release()
        self.go[name].acquire()
        self.started = time.perf_counter(), time.process_time()

    def play(self, works, steps):
        """Runs all sides for ``steps`` turns in rotating order, and to their ends."""
        threads = [threading.Thread(target=self.run, args=item, daemon=True) for item in works.items()]
        for thread in threads:
            thread.start()
        for step in range(steps + 1):
            order = list(works)[step % len(works) :] + list(works)[: step % len(works)]
            for name in order:
                self.go[name].release()
                self.over.acquire()
                if self.failed is not None:
                    raise SystemExit(f"{name}: {self.failed}")


def sentence_transformers_side(folder, rows, options, setting):
    """Its own trainer over the same rows in the same order, at its defaults except for what both sides share."""

    def work(end_turn, losses):
        from datasets import Dataset
        from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from sentence_transformers.base.sampler import DefaultBatchSampler
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )
        from transformers import TrainerCallback

        class InOrder(DefaultBatchSampler):
            def __iter__(self):
                for start in range(0, len(rows), options.batch):
                    yield list(range(start, start + options.batch))

            def __len__(self):
                return len(rows) // options.batch

        class EndOfStep(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                end_turn()

        torch.set_num_threads(options.threads)
        cuda = options.device == "cuda"
        model_kwargs = {"dtype": torch.float32, **({"attn_implementation": "flash_attention_2"} if cuda else {})}
        model = SentenceTransformer(str(folder), device=options.device, model_kwargs=model_kwargs)
        if setting == "mnrl":
            loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
        else:
            kind, _, number = setting.rpartition("=")
            sizes = {"mini_batch_num_tokens": int(number)} if kind == "tokens" else {"mini_batch_size": int(number)}
            loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **sizes)
        loss.register_forward_hook(lambda module, inputs, output: losses.append(float(output.detach())))
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(folder.parent / f"st-{setting}"),
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=LR,
            weight_decay=0.01,
            lr_scheduler_type="linear",
            warmup_steps=0,
            max_grad_norm=1.0,
            batch_sampler=InOrder,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not cuda,
            bf16=cuda,
            seed=SEED,
        )
        data = Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [b for _, b in rows]})
        SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[EndOfStep()]).train()

    return work


COMPUTE = {
    "recompute": {"live_chunks": 0},
    "plain": {"live_chunks": "all"},
    "compiled": {"live_chunks": "all", "compile": True},
    "bf16": {"live_chunks": "all", "precision": "bf16"},
    "compiled-bf16": {"live_chunks": "all", "precision": "bf16", "compile": True},
}


def train_config(options, compute):
    return TrainConfig.model_validate(
        {
            "steps": options.steps,
            "seed": SEED,
            "data": {"sources": [{"name": "pairs", "path": "unused"}]},
            "batch": {"size": options.batch, "negatives": 0},
            "objective": {"temperature": TEMPERATURE},
            "optimizer": {"lr": LR, "warmup": 0, "weight_decay": 0.01, "clip": 1.0},
            "compute": {**compute, "chunk_tokens": options.chunk_tokens},
            "save_every": options.steps,
            "evaluate_every": 1,
        }
    )


def openembed_side(folder, examples, options, name):
    """openembed's ``train``; an evaluation that measures nothing marks the end of each step."""

    def work(end_turn, losses):
        torch.set_num_threads(options.threads)
        config = train_config(options, COMPUTE[name])
        if options.device == "cuda":
            config = config.model_copy(update={"compute": config.compute.model_copy(update={"precision": "bf16"})})
        encoder = openembed.load(folder, device=options.device)

        def mark(encoder, done):
            end_turn()
            return {}

        out = folder.parent / f"openembed-{name}"
        result = train(config, encoder, out, examples={"pairs": examples}, evaluate=mark)
        losses += [json.loads(line)["loss"] for line in result.metrics.read_text().splitlines()]

    return work


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def gemm_peak(encoder, repeats=15):
    """Best GFLOP/s (CPU seconds) of the model's own matrix products at 1,024 rows, with oneDNN's prepared kernel."""
    best = 0.0
    shapes = {tuple(m.weight.shape) for m in encoder.backbone.modules() if isinstance(m, torch.nn.Linear)}
    with torch.inference_mode():
        for outputs, inputs in sorted(shapes):
            x, weight = torch.randn(PEAK_ROWS, inputs), torch.randn(outputs, inputs)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            times = [
                seconds(lambda x=x, p=packed: torch.ops.mkldnn._linear_pointwise(x, p, None, "none", [], ""))
                for _ in range(repeats)
            ]
            best = max(best, 2 * PEAK_ROWS * inputs * outputs / statistics.median(times[3:]) / 1e9)
    return best


def useful_flops(encoder, lengths):
    """Forward and backward of the real tokens: 6 · linear weights · tokens + 12 · layers · width · Σ length²."""
    linear = sum(
        m.weight.numel() for m in encoder.backbone.modules() if isinstance(m, torch.nn.Linear) and "pooler" not in str(m)
    )
    config = encoder.backbone.model.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_width * float((lengths**2).sum())
    return 6 * linear * float(lengths.sum()) + attention


def summary(turns, name, base, work):
    """Medians over steps 2 and later; ratios are medians of the paired steps' ratios to ``base``."""
    wall, cpu = (np.array([t[i] for t in turns.times[name][1:]]) for i in (0, 1))
    base_wall, base_cpu = (np.array([t[i] for t in turns.times[base][1:]]) for i in (0, 1))
    ratios = base_cpu / cpu
    return {
        "wall_s": float(np.median(wall)),
        "cpu_s": float(np.median(cpu)),
        "first_turn_s": turns.times[name][0][0],
        "tokens_per_cpu_s": float(np.median(work["tokens"] / cpu)),
        "useful_gflops": float(np.median(work["flops"] / cpu / 1e9)),
        "share_of_gemm_peak": float(np.median(work["flops"] / cpu / 1e9)) / work["peak"],
        "ratio_cpu": float(np.median(ratios)),
        "ratio_cpu_range": [float(ratios.min()), float(ratios.max())],
        "ratio_wall": float(np.median(base_wall / wall)),
        "losses": turns.losses[name],
    }


def compare(options, folder):
    rng = np.random.default_rng(SEED)
    count = options.steps * options.batch
    pairs = real_pairs(options.data, count, rng) if options.data else generated_pairs(count, rng)
    model = build_model(options.model, folder, [text for pair in pairs for text in pair])
    examples = [Example(Query(str(i), a), (Document(str(i), b),), (), "pairs") for i, (a, b) in enumerate(pairs)]
    mixture = Mixture([len(examples)], [1.0], batch=options.batch, seed=SEED)
    steps = [[pairs[i] for _, i in mixture.rows(step)] for step in range(options.steps)]
    rows = [pair for step in steps for pair in step]
    sides = options.sides.split(",")
    works = {}
    for side in sides:
        if side.startswith("st:") or side == "mnrl":
            works[side] = sentence_transformers_side(model, rows, options, side.removeprefix("st:"))
        else:
            works[side] = openembed_side(model, examples, options, side)
    turns = Turns(sides)
    turns.play(works, options.steps)

    encoder = openembed.load(model, device="cpu")
    lengths = [encoder.tokenize([text for pair in step for text in pair]).lengths for step in steps]
    work = {
        "tokens": np.array([step.sum() for step in lengths[1:]], dtype=float),
        "flops": np.array([useful_flops(encoder, step) for step in lengths[1:]]),
        "peak": gemm_peak(encoder),
    }
    documents = np.concatenate([step[1::2] for step in lengths])
    return {
        "model": MODELS[options.model][0],
        "batch": options.batch,
        "timed_steps": options.steps - 1,
        "data": "medquad, squad-sentences, code-docstrings" if options.data else "generated",
        "tokens_per_step": float(work["tokens"].mean()),
        "document_length_percentiles_10_50_90_99": np.percentile(documents, [10, 50, 90, 99]).tolist(),
        "padding_of_whole_columns": 1 - sum(s.sum() for s in lengths) / sum(_padded(s) for s in lengths),
        "gemm_peak_gflops": work["peak"],
        "base": sides[0],
        "sides": {side: summary(turns, side, sides[0], work) for side in sides},
    }


def _padded(lengths):
    return sum(len(side) * side.max() for side in (lengths[::2], lengths[1::2]))


def machine(options):
    return f"{reports.machine()}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with medquad, squad-sentences and code-docstrings; else generated")
    parser.add_argument("--model", choices=sorted(MODELS), default="decoder")
    parser.add_argument("--sides", default="st:tokens=1024,plain,compiled", help="comma-separated; the first is the base")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--chunk-tokens", type=int, default=CHUNK_TOKENS)
    parser.add_argument("--label", help="key of this result in the JSON file (default: the model)")
    parser.add_argument("--json", type=Path, help="results are added to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, Path(folder))
    print(
        f"{result['model']}: {result['tokens_per_step']:.0f} tokens a step, GEMM peak {result['gemm_peak_gflops']:.0f} GFLOP/s"
    )
    for name, side in result["sides"].items():
        print(
            f"  {name:16s} {side['ratio_cpu']:.2f}x ({side['ratio_cpu_range'][0]:.2f}-{side['ratio_cpu_range'][1]:.2f}; "
            f"wall {side['ratio_wall']:.2f}x) {side['cpu_s']:.2f} s, {side['tokens_per_cpu_s']:,.0f} tokens/s, "
            f"{side['useful_gflops']:.0f} GFLOP/s = {side['share_of_gemm_peak']:.0%}, first turn {side['first_turn_s']:.0f} s, "
            f"losses {' '.join(f'{loss:.6f}' for loss in side['losses'][:4])}"
        )
    if options.json:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        header = {"machine": machine(options), "torch": torch.__version__, "load_average_before": load_before}
        known[options.label or options.model] = {**header, **result}
        options.json.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
