"""The engines that MiniLM is set beside: ONNX Runtime and OpenVINO, as sentence-transformers' own back ends run them.

Each takes texts in length-sorted batches of 32, padded, mean-pooled and normalised. 8 bits: ONNX Runtime's dynamic
quantisation with per-channel weights, and OpenVINO's full 8 bits by nncf, which needs calibration texts (300 here, others than
those measured). nncf pins versions of its own, so the 8-bit OpenVINO model is made by this file in another environment:

    python benchmarks/encode_engines.py --onnx model.onnx --model MINILM --data ../shared/data --out model-int8.xml
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

BATCH = 32


def export_onnx(folder, path):
    """The transformer of a BERT-type checkpoint, with dynamic batch and length."""
    import torch
    from transformers import AutoModel

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).last_hidden_state

    ids = torch.ones(2, 9, dtype=torch.long)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "length"} for name in [*names, "states"]}
    torch.onnx.export(
        Plain(),
        (ids, ids, ids * 0),
        path,
        input_names=names,
        output_names=["states"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    return path


class Engine:
    """Texts to vectors around a function from padded arrays to states."""

    def __init__(self, tokenizer, run, limit):
        self.tokenizer, self.run = tokenizer, run
        tokenizer.enable_truncation(limit)

    def encode(self, texts):
        tokenized = self.tokenizer.encode_batch(texts)
        order = np.argsort([-len(row.ids) for row in tokenized], kind="stable")
        out = None
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            width = len(tokenized[places[0]].ids)
            ids, mask = np.zeros((2, len(places), width), dtype=np.int64)
            for row, place in enumerate(places):
                ids[row, : len(tokenized[place].ids)] = tokenized[place].ids
                mask[row, : len(tokenized[place].ids)] = 1
            states = self.run(ids, mask)
            pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
            out = np.empty((len(texts), pooled.shape[1]), dtype=np.float32) if out is None else out
            out[places] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        return out


def onnx_runtime(path, threads):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, named(ids, mask))[0]


def onnx_int8(path, out):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, out, weight_type=QuantType.QInt8, per_channel=True)
    return out


def openvino(path, threads):
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return lambda ids, mask: compiled(named(ids, mask))[0]


def named(ids, mask):
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def main():
    import nncf
    import openvino as ov
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("onnx", "model", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    with gzip.open(options.data / "scifact" / "corpus.jsonl.gz", "rt") as file:
        texts = [json.loads(line)["text"] for line in file][:300]
    rows = [np.array([tokenizer.encode(text).ids], dtype=np.int64) for text in texts]
    samples = nncf.Dataset(rows, lambda ids: named(ids, np.ones_like(ids)))
    model = ov.Core().read_model(str(options.onnx))
    coded = nncf.quantize(model, samples, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    ov.save_model(coded, str(options.out))


if __name__ == "__main__":
    main()
