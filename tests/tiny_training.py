"""A two-layer encoder and a few examples for trainer tests; nothing is downloaded."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from openembed.checkpoints import build
from openembed.data.sources import SourceConfig
from openembed.encoder import Encoder, EncoderConfig
from openembed.records import Document, Example, Query
from openembed.train.loop import TrainConfig

WORDS = [f"w{number}" for number in range(60)]


def tiny_encoder(folder: Path, family: str = "llama", dropout: float = 0.1, width: int = 32) -> Encoder:
    """A random encoder with dropout and a trainable head."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "</s>", "Instruct", "Query", ":", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    shape = {"hidden_size": width, "intermediate_size": width * 3 // 2, "num_hidden_layers": 2, "num_attention_heads": 4}
    extra = {
        "llama": {"attention_dropout": dropout, "num_key_value_heads": 2},
        "bert": {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout},
    }[family]
    config = EncoderConfig.model_validate(
        {
            "backbone": {"architecture": {"model_type": family, "vocab_size": 80, **shape, **extra}},
            "head": {"kind": "latent_attention", "latents": 8, "heads": 2},
            "tokenizer_path": str(folder),
            "max_length": 32,
        }
    )
    return build(config, seed=3)


def tiny_sparse_encoder(folder: Path, query_head: dict | None = None, **head: object) -> Encoder:
    """The same with a head over the vocabulary."""
    settings = tiny_encoder(folder).config.model_dump()
    settings |= {"head": {"kind": "splade", "offset": 0.2, **head}, "tokenizer_path": str(folder), "query_head": query_head}
    return build(EncoderConfig.model_validate(settings), seed=3)


def sentence(*numbers: int) -> str:
    return " ".join(WORDS[number % len(WORDS)] for number in numbers)


def examples(source: str, count: int, offset: int = 0) -> list[Example]:
    """Rows with 0 to 3 hard negatives and texts of many lengths."""
    rows = []
    for number in range(count):
        base = offset + 7 * number
        positive = Document(f"p{number}", sentence(*range(base, base + 2 + number % 5)))
        negatives = tuple(
            Document(f"n{number}-{k}", sentence(base + 11 * (k + 1), *range(number % 3))) for k in range(number % 4)
        )
        rows.append(Example(Query(f"q{number}", sentence(base, base + 1)), (positive,), negatives, source))
    return rows


def two_sources() -> dict[str, list[Example]]:
    return {"first": examples("first", 13), "second": examples("second", 9, offset=5)}


def train_config(**changes: object) -> TrainConfig:
    sources = [
        {"name": "first", "path": "unused", "instruction": "w1 w2"},
        {"name": "second", "path": "unused", "in_batch": False},
    ]
    values = {
        "steps": 8,
        "data": {"sources": sources},
        "batch": {"size": 6, "negatives": 2},
        "optimizer": {"lr": 1e-3, "warmup": 2},
        "compute": {"chunk_tokens": 40},
        "save_every": 3,
        **changes,
    }
    return TrainConfig.model_validate(json.loads(json.dumps(values)))


def source(**values: object) -> SourceConfig:
    return SourceConfig.model_validate(values)
