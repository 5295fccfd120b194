"""A small WordPiece tokenizer, and tiny encoders over its vocabulary, for tests of heads over a vocabulary."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import openembed
from openembed.config import parse
from openembed.encoder import EncoderConfig
from openembed.tokenization import TextTokenizer, TokenizerConfig

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = [
    "the red planet is the fourth planet from the sun",
    "wine is made of grapes, and grapes grow in the sun",
    "which planet is known as the red planet?",
    "is wrestling older than judo?",
]


def word_pieces():
    """Returns BERT's kind of tokenizer, of a few sentences' words, letters and letters that continue a word."""
    words = sorted({word for sentence in SENTENCES for word in sentence.replace("?", " ").replace(",", " ").split()} - {"judo"})
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = dict.fromkeys([*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters), ",", "?"])
    backend = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.add_special_tokens(SPECIAL)
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    ids = [(name, backend.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return backend


def text_tokenizer():
    """Returns it as our tokenizer."""
    return TextTokenizer(word_pieces(), TokenizerConfig())


def bert(backend, **changes):
    """Returns the configuration of a tiny BERT over its vocabulary."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocabulary = {"vocab_size": backend.get_vocab_size() + 3, "max_position_embeddings": 64, "initializer_range": 0.3}
    return {"model_type": "bert", **sizes, **vocabulary, **changes}


def sparse_encoder(folder, head=None, **parts):
    """Returns a tiny sparse encoder with random weights, whose tokenizer is written to ``folder``."""
    backend = word_pieces()
    backend.save(str(folder / "tokenizer.json"))
    fields = {
        "backbone": {"architecture": bert(backend), "attention": "model"},
        "head": {"kind": "splade", **(head or {})},
        "tokenizer_path": str(folder),
        "max_length": 64,
        **parts,
    }
    return openembed.build(parse(EncoderConfig, fields, "test"))
