"""What we write as PyLate's and as Stanford ColBERT's folders, run by PyLate itself.

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
from token_models import TEXTS, token_encoder, write_tokenizer

FOLDER = os.environ.get("OPENEMBED_PYLATE", "")
if not FOLDER and importlib.util.find_spec("pylate") is None:
    pytest.skip("PyLate is not here: install it, or name a folder with it in OPENEMBED_PYLATE", allow_module_level=True)

PROGRAM = """
import json, sys
import numpy as np
from pylate import models
folder, *cases = sys.argv[1:]
texts = json.load(open(f"{folder}/texts.json"))
for case in cases:
    model = models.ColBERT(f"{folder}/{case}", device="cpu")
    for side in ("query", "document"):
        name = side if side in model.prompts and model.prompts[side] else None
        vectors = model.encode(texts, is_query=side == "query", prompt_name=name, batch_size=4)
        np.savez(f"{folder}/{case}-{side}.npz", *vectors)
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The encoders by case, written and run by PyLate in one process, and where its vectors are."""
    folder = tmp_path_factory.mktemp("pylate")
    write_tokenizer(folder / "words", punctuation=string.punctuation)
    (folder / "texts.json").write_text(json.dumps(TEXTS))
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
