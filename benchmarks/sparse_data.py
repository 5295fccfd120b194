"""Writes impact vectors of real passages for ``benchmarks/sparse.py``: BM25 weights of word pieces, expanded by association.

    python benchmarks/passages.py DATA
    python benchmarks/sparse_data.py DATA TOKENIZER.json --count 1000000 --out SPARSE

A document's own word pieces weigh as BM25's term part does (k1 0.9, b 0.4). A learned model adds related words; here each
piece brings the eight pieces most associated with it in the same passages (log-likelihood over the first 100,000), at 0.4 of
its weight times the strength of the association. A short query is a question's eight rarest pieces weighed by idf, as an
inference-free model has it; a long one those of its 40 weightiest after the same expansion, as SPLADE's queries are. What is
synthetic here is the expansion alone; it decides how many postings there are, and their skew is that of the words it draws on.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

import numpy as np
from scipy import sparse

K1, B, SHARE, ASSOCIATED, SAMPLE = 0.9, 0.4, 0.4, 8, 100_000
SHORT, LONG = 8, 40


def texts_of(path, count):
    with path.open() as file:
        return [json.loads(line)["text"] for line in islice(file, count)]


def counts_of(texts, tokenizer):
    indices, starts = [], [0]
    for start in range(0, len(texts), 10_000):
        for encoding in tokenizer.encode_batch(texts[start : start + 10_000], add_special_tokens=False):
            indices.append(np.array(encoding.ids, dtype=np.int32))
            starts.append(starts[-1] + len(encoding.ids))
    flat = np.concatenate(indices)
    shape = len(texts), tokenizer.get_vocab_size()
    counts = sparse.csr_matrix((np.ones(len(flat), dtype=np.float32), flat, np.array(starts, dtype=np.int64)), shape=shape)
    counts.sum_duplicates()
    return counts


def weighted(counts, lengths, average):
    penalty = K1 * ((1 - B) + B * lengths / average)
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    data = counts.data * (K1 + 1) / (counts.data + penalty[rows])
    return sparse.csr_matrix((data.astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)


def associations(counts):
    """(V, V): for each piece the ASSOCIATED pieces of greatest log-likelihood gain, strengths scaled to at most 1."""
    present = counts[:SAMPLE].astype(bool).astype(np.float32)
    frequency = np.asarray(present.sum(axis=0)).ravel()
    together = (present.T @ present).tocsr()
    together.setdiag(0)
    together.eliminate_zeros()
    rows = np.repeat(np.arange(together.shape[0]), np.diff(together.indptr))
    expected = frequency[rows] * frequency[together.indices] / present.shape[0]
    gain = together.data * np.log(together.data / expected)
    kept_rows, kept_columns, kept = [], [], []
    for row in range(together.shape[0]):
        low, high = together.indptr[row], together.indptr[row + 1]
        best = low + np.argsort(-gain[low:high], kind="stable")[:ASSOCIATED]
        best = best[gain[best] > 0]
        if len(best):
            kept_rows.append(np.full(len(best), row))
            kept_columns.append(together.indices[best])
            kept.append(gain[best] / gain[best].max())
    data, place = np.concatenate(kept), (np.concatenate(kept_rows), np.concatenate(kept_columns))
    return sparse.csr_matrix((data.astype(np.float32), place), shape=together.shape)


def expanded(vectors, related):
    parts = []
    for start in range(0, vectors.shape[0], 50_000):
        part = vectors[start : start + 50_000]
        parts.append(part.maximum((part @ related) * np.float32(SHARE)).astype(np.float32))
    return sparse.vstack(parts, format="csr")


def heaviest(vectors, most):
    rows = []
    for row in range(vectors.shape[0]):
        low, high = vectors.indptr[row], vectors.indptr[row + 1]
        best = np.sort(low + np.argsort(-vectors.data[low:high], kind="stable")[:most])
        rows.append((vectors.data[best], vectors.indices[best]))
    starts = np.concatenate([[0], np.cumsum([len(data) for data, _ in rows])])
    data, indices = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return sparse.csr_matrix((data, indices, starts), shape=vectors.shape)


def main():
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_file(options.tokenizer)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    counts = counts_of(texts_of(options.data / "passages.jsonl", options.count), tokenizer)
    lengths = np.asarray(counts.sum(axis=1)).ravel()
    related = associations(counts)
    frequency = np.bincount(counts.indices, minlength=counts.shape[1])
    idf = np.log(1 + (counts.shape[0] - frequency + 0.5) / (frequency + 0.5)).astype(np.float32)
    documents = expanded(weighted(counts, lengths, lengths.mean()), related)
    asked = counts_of(texts_of(options.data / "queries.jsonl", None), tokenizer)
    questions = asked.astype(bool).astype(np.float32).multiply(idf[None]).tocsr().astype(np.float32)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, values in {
        "documents": documents,
        "short": heaviest(questions, SHORT),
        "long": heaviest(expanded(questions, related), LONG),
    }.items():
        values.sort_indices()
        sparse.save_npz(options.out / f"{name}.npz", values, compressed=False)
        print(name, values.shape, round(values.nnz / values.shape[0], 1), "a row")


if __name__ == "__main__":
    main()
