"""What the ranks of the distributed tests run: ``python rank_programs.py FUNCTION ARGUMENTS``."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tiny_training import examples, tiny_encoder, train_config, two_sources

from openembed.backbones.adapters import LoraConfig, add_lora
from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.seeds import generator
from openembed.train.cached import ComputeConfig, backward, prepare, seeded
from openembed.train.distributed import ALONE, OtherRankError, joined
from openembed.train.loop import train
from openembed.train.parallel import Replicated, Sharded, whole

SOURCES = {name: RowSource(name, query_prompt="w1 w2 ", in_batch=name == "first") for name in ("first", "second")}


@dataclass(frozen=True)
class Case:
    """One way to make a step's gradient."""

    compute: dict = field(default_factory=dict)
    lora: bool = False
    batches: int = 1
    family: str = "llama"
    dropout: float = 0.2


CASES = {
    "plain": Case({"live_chunks": "all"}),
    "cached": Case({"live_chunks": 0}),
    "partly_cached": Case({"live_chunks": 1}),
    "lora": Case(lora=True),
    "accumulated": Case(batches=3),
    "unused_parameters": Case(family="bert"),
    "fewer_chunks_than_ranks": Case({"chunk_tokens": 10_000}),
    "checkpointing": Case({"gradient_checkpointing": True, "chunk_tokens": 30}),
    "bf16": Case({"precision": "bf16"}, dropout=0.0),
    "lora_bf16": Case({"precision": "bf16"}, lora=True, dropout=0.0),
}
SHARDED = {
    **{f"fsdp_{name}": (case, {}) for name, case in CASES.items()},
    "fsdp_nothing_whole": (CASES["cached"], {"keep_whole": "nothing"}),
    "fsdp_weights_whole": (CASES["accumulated"], {"keep_whole": "weights"}),
}


def prepared_encoder(folder, case):
    encoder = tiny_encoder(folder, case.family, dropout=case.dropout).train()
    if case.lora:
        with seeded(1, encoder.device):
            add_lora(encoder.backbone.model, LoraConfig(rank=4, dropout=case.dropout))
        with seeded(2, encoder.device):
            for name, parameter in encoder.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        if case.compute.get("precision") == "bf16":
            for parameter in encoder.parameters():
                parameter.data = parameter.data if parameter.requires_grad else parameter.data.bfloat16()
    return encoder


def gradient_of(folder, case, world=ALONE, changes=None):
    """Loss, gradients and norm of one step, whole, by name."""
    compute = ComputeConfig(**{"chunk_tokens": 40, **case.compute, **(changes or {})})
    encoder = prepared_encoder(folder, case)
    if compute.gradient_checkpointing:
        encoder.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    objective = ContrastiveConfig(temperature=0.1, matryoshka=(8, 32)).build()
    rows = [example for listed in two_sources().values() for example in listed]
    batches = [collate(rows[n::2], SOURCES, BatchConfig(negatives=2), generator(0, "rows", n)) for n in range(case.batches)]
    prepared = [prepare(encoder, objective, batch, compute) for batch in batches]
    ranks = Replicated(world)
    if changes is not None:
        ranks = Sharded(world, encoder, compute.keep_whole, bf16=compute.precision == "bf16")
    trained = [p for p in encoder.parameters() if p.requires_grad]
    losses = []
    for number, batch in enumerate(prepared):
        last = number == case.batches - 1
        scale = 1 / case.batches
        loss = backward(encoder, objective, batch, compute, seed=5 + number, scale=scale, ranks=ranks, last=last)
        losses.append(loss.total.item())
    ranks.finish(trained)
    gradients = {name: whole(p.grad).clone() for name, p in encoder.named_parameters() if p.grad is not None}
    norm = whole(torch.nn.utils.clip_grad_norm_(trained, 0.01)).item()
    clipped = {name: whole(p.grad).clone() for name, p in encoder.named_parameters() if p.grad is not None}
    return {"losses": losses, "gradients": gradients, "norm": norm, "clipped": clipped}


def gradients(folder):
    """Saves every case's gradient of this many ranks: replicated, then sharded."""
    folder, results = Path(folder), {}
    with joined("cpu") as world:
        for name, case in CASES.items():
            results[name] = gradient_of(folder / "tokenizer" / str(world.rank), case, world)
        for name, (case, changes) in SHARDED.items():
            results[name] = gradient_of(folder / "tokenizer" / str(world.rank), case, world, changes)
        torch.save(results, folder / f"rank{world.rank}.pt")


class Stopped(Exception):
    pass


def run(folder, stop_after=None, world=ALONE, tell=None, **changes):
    """Trains the tiny model; an evaluation raises after ``stop_after`` steps."""

    def evaluate(encoder, step):
        torch.rand(7)
        vectors = encoder.encode(["w1 w2", "w3"])
        if stop_after is not None and step > stop_after:
            raise Stopped(f"stopped at {step}")
        return {"first": float(vectors[0, 0])}

    config = train_config(evaluate_every=1, **changes)
    encoder = tiny_encoder(folder / "tokenizer" / str(world.rank))
    return train(config, encoder, folder / "out", examples=two_sources(), evaluate=evaluate, world=world, tell=tell)


def trainings(folder, plan):
    """Runs the trainings of a JSON list ``[{name, stop_after, changes}]``, one after another."""
    with joined("cpu") as world:
        for item in json.loads(plan):
            try:
                run(Path(folder) / item["name"], item.get("stop_after"), world, **item.get("changes", {}))
            except (Stopped, OtherRankError) as error:
                assert item.get("stop_after") is not None, error  # noqa: PT017


def failing(folder):
    """Rank 1 fails where only it can; rank 0 must not wait for it."""
    with joined("cpu") as world:
        rows = two_sources()
        if world.rank == 1:
            rows["first"] = examples("first", 12)
        config = train_config()
        train(config, tiny_encoder(Path(folder) / str(world.rank)), Path(folder) / "out", examples=rows, world=world)


def dying(folder):
    """Rank 1 ends without a word in the middle of a run."""
    import os

    with joined("cpu") as world:
        config = train_config(steps=1000, evaluate_every=2)

        def evaluate(encoder, step):
            return {}

        if world.rank == 1:
            gather = Replicated.gather
            calls = []

            def gather_and_die(self, own_UD):
                calls.append(1)
                if len(calls) == 3:
                    os._exit(9)
                return gather(self, own_UD)

            Replicated.gather = gather_and_die
        encoder = tiny_encoder(Path(folder) / str(world.rank))
        train(config, encoder, Path(folder) / "out", examples=two_sources(), evaluate=evaluate, world=world)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
