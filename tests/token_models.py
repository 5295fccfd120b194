"""A tiny BERT with vectors a token, for tests; nothing is downloaded."""

from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece

from openembed.checkpoints import build
from openembed.encoder import Encoder, EncoderConfig

WORDS = [f"w{number}" for number in range(200)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused1]"]
TEXTS = [
    "w1 w2, w3.",
    "w5 w6 w7 w8 w9 w10 w11 w12",
    "",
    "! . ,",
    "w3 w3 w3 w3",
    "W20 w21; w22 w23 w24? w25 w26 w27 w28 w29 w30",
]


def write_tokenizer(folder: Path, *, markers: bool = True, punctuation: str = ".,;:!?#[]") -> None:
    """A lowercasing WordPiece tokenizer with BERT's frame; ``markers``: it reads [unused0] as one token."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *punctuation, "d", "q", *WORDS][:240])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL if markers else SPECIAL[:5])
    frame = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", frame)
    tokenizer.save(str(folder / "tokenizer.json"))


def token_encoder(folder: Path, *, seed: int = 3, width: int = 32, dropout: float = 0.0, **fields: object) -> Encoder:
    """A random two-layer encoder with a token head of 16 dimensions unless ``head`` says otherwise."""
    write_tokenizer(folder)
    architecture = {
        "model_type": "bert",
        "vocab_size": 240,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    values = {
        "backbone": {"architecture": architecture, "attention": "model"},
        "head": {"kind": "token_projection", "width": 16},
        "tokenizer": {"pool_instruction": "include"},
        "tokenizer_path": str(folder),
        "max_length": 48,
        **fields,
    }
    return build(EncoderConfig.model_validate(values), seed=seed)
