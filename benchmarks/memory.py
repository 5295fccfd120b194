"""Prints the tables of docs/distributed.md and docs/systems/nv_embed.md: NV-Embed's training step, counted on shapes.

Memory by openembed's own estimate; operations from the sizes of weights and the lengths of texts. Nothing is measured.

python benchmarks/memory.py
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModel

from openembed.backbones.adapters import LoraConfig, add_lora
from openembed.backbones.attention import install_attention
from openembed.backbones.text import BackboneConfig, wrap
from openembed.encoder import Encoder, EncoderConfig
from openembed.heads import LatentAttentionConfig
from openembed.train.cached import ComputeConfig
from openembed.train.memory import estimate_memory

MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
TEXTS, TOKENS, STEPS = 128 * 9, 256, 38_000
"""A batch of 128 queries, each with 1 positive and 7 hard negatives, and a mean length between short and full (512)."""
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight: 4 bits, an 8-bit scale for 64 of them, a 32-bit scale for 256 scales."""


def mistral(*, lora: bool) -> Encoder:
    """NV-Embed's model on the meta device; adapters leave the backbone in bfloat16."""
    settings = dict(MISTRAL)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = AutoModel.from_config(
            config, attn_implementation=install_attention(), dtype=torch.bfloat16 if lora else torch.float32
        )
        backbone = BackboneConfig(architecture=MISTRAL)
        head = LatentAttentionConfig()
        encoder = Encoder(EncoderConfig(backbone=backbone, head=head), None, wrap(model, backbone), head.build(4096))
        if lora:
            add_lora(encoder.backbone.model, LoraConfig())
            for parameter in encoder.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    return encoder.train()


def row(name: str, encoder: Encoder, ranks: int = 1, *, nf4: bool = False, **compute: object) -> str:
    """One line of the table, GB a rank."""
    settings = ComputeConfig.model_validate({"precision": "bf16", "chunk_tokens": 4096, **compute})
    if settings.gradient_checkpointing:
        encoder.backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    found = estimate_memory(encoder, settings, np.full(TEXTS, TOKENS), pairs=128 * 128 * 8, ranks=ranks)
    encoder.backbone.model.gradient_checkpointing_disable()
    weights, total = found.weights, found.total
    if nf4:
        linear = sum(p.numel() for n, p in encoder.named_parameters() if "layers." in n and p.ndim == 2 and not p.requires_grad)
        weights -= int(linear * (2 - NF4))
        total -= found.weights - weights
    parts = (weights, found.gradients, found.moments, found.activations, found.vectors + found.workspace, total)
    return f"| {name} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + " |"


def operations(encoder: Encoder, length: int, *, forwards: int) -> float:
    """FLOPs a token of a training step over texts of ``length`` tokens: ``forwards`` passes, gradients of activations and of
    what is trained."""
    elsewhere = ("embed_tokens", "latents", "to_kv")  # not run for every token: a table, and what the latents are turned into
    layers = [p for n, p in encoder.named_parameters() if p.ndim == 2 and not any(part in n for part in elsewhere)]
    everything = sum(p.numel() for p in layers)
    trained = sum(p.numel() for p in layers if p.requires_grad)
    scores = 2 * 2 * length * MISTRAL["hidden_size"] * MISTRAL["num_hidden_layers"]  # q kᵀ and weights v, all layers
    return 2 * everything * (forwards + 1) + 2 * trained + scores * (forwards + 2)


def step_table(encoder: Encoder) -> None:
    """Operations and time of a step of 1,152 texts, and of the 38,000 of both stages."""
    print("\n| mean length | tokens a step | PFLOP a step | 8 H100: a step | both stages | 8 A100: a step | both stages |")
    print("|---|---|---|---|---|---|---|")
    for length in (64, 128, 256, 512):
        work = operations(encoder, length, forwards=2) * TEXTS * length
        times = [work / (8 * peak * 1e12 * 0.4) for peak in (989, 312)]  # dense bfloat16 TFLOP/s, 40 % of them used
        cells = [cell for t in times for cell in (f"{t:.1f} s", f"{t * STEPS / 3600:.0f} h")]
        print(f"| {length} | {TEXTS * length:,} | {work / 1e15:.1f} | " + " | ".join(cells) + " |")


def main() -> None:
    adapted, full = mistral(lora=True), mistral(lora=False)
    print("| a rank, GB | weights | gradients | moments | activations | rest | total |")
    print("|---|---|---|---|---|---|---|")
    small = {"chunk_tokens": 1024, "gradient_checkpointing": True}
    print(row("QLoRA, 1 GPU, chunks of 1,024, checkpointing", adapted, nf4=True, **small))
    print(row("LoRA, 1 GPU, chunks of 1,024, checkpointing", adapted, **small))
    print(row("LoRA, 1 GPU, chunks of 2,048", adapted, chunk_tokens=2048))
    print(row("LoRA, 1 GPU, chunks of 4,096", adapted))
    print(row("LoRA, 8 GPUs, ddp, chunks of 2,048", adapted, 8, chunk_tokens=2048))
    print(row("LoRA, 8 GPUs, ddp, chunks of 4,096", adapted, 8))
    print(row("LoRA, 8 GPUs, fsdp, chunks of 4,096", adapted, 8, parallel="fsdp"))
    print(row("full, 1 GPU, chunks of 4,096", full))
    print(row("full, 8 GPUs, fsdp, chunks of 4,096", full, 8, parallel="fsdp"))
    print(row("full, 8 GPUs, fsdp, keep_whole nothing", full, 8, parallel="fsdp", keep_whole="nothing"))
    step_table(adapted)


if __name__ == "__main__":
    main()
