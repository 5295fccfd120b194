"""What we write as PyLate's and as Stanford ColBERT's folders, run by PyLate itself, and its XTR scores beside ours.

PyLate wants older versions of sentence-transformers and transformers, so it runs in a process of its own. Where it is not
installed, ``OPENEMBED_PYLATE`` names a folder that it is in (``pip install --target FOLDER --no-deps pylate fastkmeans
ujson sentence-transformers==5.3.0``).
"""

import importlib.util
import json
import os
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from token_models import TEXTS, token_encoder, write_tokenizer

from openembed.late_interaction import xtr
from openembed.representations import Tokens

FOLDER = os.environ.get("OPENEMBED_PYLATE", "")
if not FOLDER and importlib.util.find_spec("pylate") is None:
    pytest.skip("PyLate is not here: install it, or name a folder with it in OPENEMBED_PYLATE", allow_module_level=True)

PROGRAM = """
import json, sys
import numpy as np
import torch
from pylate import models, scores
folder, *cases = sys.argv[1:]
texts = json.load(open(f"{folder}/texts.json"))
for case in cases:
    model = models.ColBERT(f"{folder}/{case}", device="cpu")
    for side in ("query", "document"):
        name = side if side in model.prompts and model.prompts[side] else None
        vectors = model.encode(texts, is_query=side == "query", prompt_name=name, batch_size=4)
        np.savez(f"{folder}/{case}-{side}.npz", *vectors)
given = {name: torch.from_numpy(value) for name, value in np.load(f"{folder}/xtr.npz").items()}
found = {}
for case in {name.split("-")[0] for name in given}:
    sides = [given[f"{case}-{part}"] for part in ("queries", "documents", "queries_mask", "documents_mask")]
    for k in given[f"{case}-k"].tolist():
        found[f"{case}-{k}"] = scores.XTRScores(k=k)(*sides).numpy()
np.savez(f"{folder}/xtr-scores.npz", **found)
"""
MARKED = {"query": "[unused0] ", "document": "[unused1] "}
PUNCTUATION = {"kind": "token_projection", "width": 16, "skip": "punctuation"}
LAYER = {"width": 24, "activation": "gelu", "residual": True}
EXPANDED = {"pool_instruction": "include", "expansion": {"length": 9}, "document_length": 11}
DECODER = {"model_type": "mistral", "vocab_size": 240, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
DECODER |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 64}
CASES = {
    "colbert": {"head": PUNCTUATION, "tokenizer": EXPANDED, "prompts": MARKED},
    "attending": {
        "head": {**PUNCTUATION, "skip": ["w3", ","]},
        "tokenizer": {**EXPANDED, "expansion": {"length": 12, "attend": True}},
        "prompts": MARKED,
    },
    "layers": {
        "head": {**PUNCTUATION, "bias": True, "before": [LAYER, {**LAYER, "activation": "tanh"}]},
        "tokenizer": {"pool_instruction": "include", "query_length": 6, "lowercase": True},
        "prompts": {"document": "[unused1] "},
    },
    "prompts": {"prompts": {"query": "[unused0] q w3 ", "document": "d, "}},
    "no-layer": {"head": {"kind": "token_projection", "width": 0}, "tokenizer": {}},
    "decoder": {"backbone": {"architecture": DECODER, "attention": "bidirectional"}},
    "causal": {"backbone": {"architecture": DECODER, "attention": "causal"}},
}
STANFORD = ("colbert",)
XTR = {"equal": [5] * 6, "ragged": [5, 1, 3, 5, 2, 4], "negative": [4, 4, 1, 2]}
"""Lengths of documents; no vector of the last case's first two has a positive product with a query's."""
XTR_K = (1, 4, 9, 11)
"""No more than there are tokens in any case: among padding PyLate retrieves whatever ``topk`` picks."""


def xtr_sides(case):
    """Queries and documents as tokens."""
    generator, lengths = torch.Generator().manual_seed(len(case)), torch.tensor(XTR[case])
    values, of_queries = torch.randn(int(lengths.sum()), 4, generator=generator), torch.tensor([3, 6, 1])
    queries = torch.randn(int(of_queries.sum()), 4, generator=generator)
    if case == "negative":
        queries, values = queries.abs(), torch.cat([-values[:8].abs(), values[8:]])
    normalized = torch.nn.functional.normalize
    return Tokens(normalized(queries, dim=1), of_queries), Tokens(normalized(values, dim=1), lengths)


def write_xtr(path):
    """All cases, padded, documents in two groups, as PyLate takes them."""
    found = {}
    for case in XTR:
        for side, tokens in zip(("queries", "documents"), xtr_sides(case), strict=True):
            for name, padded in zip((side, f"{side}_mask"), tokens.padded(), strict=True):
                found[f"{case}-{name}"] = (padded.unflatten(0, (2, -1)) if side == "documents" else padded).numpy()
        found[f"{case}-k"] = np.array(XTR_K)
    np.savez(path, **found)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The encoders by case, written and run by PyLate in one process, and where its vectors are."""
    folder = tmp_path_factory.mktemp("pylate")
    write_tokenizer(folder / "words", punctuation=string.punctuation)
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    write_xtr(folder / "xtr.npz")
    encoders, cases = {}, []
    for case, fields in CASES.items():
        encoders[case] = token_encoder(folder / "tokenizer", tokenizer_path=str(folder / "words"), **fields)
        for layout in ("pylate", "colbert") if case in STANFORD else ("pylate",):
            cases.append(f"{case}-{layout}")
            encoders[case].save(folder / cases[-1], layout=layout, named_prompts=case == "prompts")
    paths = os.pathsep.join(filter(None, [FOLDER, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *cases],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return encoders, folder


@pytest.mark.parametrize("case", [*(f"{case}-pylate" for case in CASES), *(f"{case}-colbert" for case in STANFORD)])
def test_pylate_gives_the_same_vectors(written, case):
    encoders, folder = written
    ours = encoders[case.rpartition("-")[0]]
    for side, encode in (("query", ours.encode_queries), ("document", ours.encode_documents)):
        theirs = list(np.load(folder / f"{case}-{side}.npz").values())
        found = encode(TEXTS)
        assert found.lengths_N.tolist() == [len(matrix) for matrix in theirs]
        for mine, matrix in zip(found, theirs, strict=True):
            np.testing.assert_allclose(mine, matrix, atol=1e-5)


@pytest.mark.parametrize("case", XTR)
@pytest.mark.parametrize("k", XTR_K)
def test_pylates_xtr_scores_are_the_variant_of_its_name(written, case, k):
    _, folder = written
    queries, documents = xtr_sides(case)
    theirs = np.load(folder / "xtr-scores.npz")[f"{case}-{k}"]
    np.testing.assert_allclose(xtr(queries, documents, k, variant="pylate"), theirs, atol=1e-6, rtol=1e-6)
    if case == "negative" and k == 11:
        assert theirs.min() < -100, "what is retrieved and negative alone is blown up"
