"""What clustering costs beside the model: CPU seconds of encoding and of a training pass, with and without 32 clusters a text.

Texts of 256 tokens, 128 dimensions, one thread. CPU seconds of the process, least of several rounds in turn, so that other
work on the machine counts little.

    OMP_NUM_THREADS=1 python benchmarks/pooling_cost.py --model openembed-nano --json out.json
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import openembed
from openembed.encoder import Encoder, EncoderConfig
from openembed.heads.token_pooling import ClustersConfig
from openembed.packing import pack

LENGTH, TEXTS, CLUSTERS, WORDS = 256, 24, 32, 300


def seconds(work: Callable[[], object]) -> float:
    """Returns the CPU seconds of one call."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def token_encoder(model: str, attention: str) -> Encoder:
    """Returns the model with a new projection of 128 dimensions a token."""
    fields = {"backbone": {"path": model, "attention": attention}, "head": {"kind": "token_projection"}, "max_length": LENGTH}
    return openembed.build(EncoderConfig.model_validate(fields))


def training_pass(encoder: Encoder, texts: list[str]) -> None:
    """Runs forward and backward once."""
    encoder(pack(encoder.tokenize(texts))).sum().backward()


def measure(model: str, attention: str, rounds: int) -> dict[str, float]:
    """Returns the seconds of both and what clusters add, as a share."""
    rng = np.random.default_rng(0)
    texts = [" ".join(f"word{number}" for number in rng.integers(0, 999, WORDS)) for _ in range(TEXTS)]
    plain = token_encoder(model, attention)
    pooled = plain.with_pool(ClustersConfig(documents=CLUSTERS))
    found: dict[str, float] = {}
    for name, work in (("encode", lambda e: e.encode(texts)), ("train", lambda e: training_pass(e, texts[:8]))):
        for encoder in (plain, pooled):
            encoder.train(name == "train")
            work(encoder)
        times = [[seconds(lambda e=e, work=work: work(e)) for e in (plain, pooled)] for _ in range(rounds)]
        least = [min(column) for column in zip(*times, strict=True)]
        found |= {f"{name} plain": least[0], f"{name} clustered": least[1], f"{name} added": least[1] / least[0] - 1}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="openembed-nano")
    parser.add_argument("--attention", default="bidirectional", choices=["bidirectional", "causal", "model"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {"model": Path(args.model).name, "length": LENGTH, "clusters": CLUSTERS}
    report |= measure(args.model, args.attention, args.rounds)
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
