"""Pairs of mixed, heavy-tailed lengths and random-weight models for the training benchmark."""

import csv
import gzip
import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import openembed
from openembed.backbones.text import BackboneConfig
from openembed.encoder import EncoderConfig
from openembed.heads import MeanConfig
from openembed.tokenization import TokenizerConfig

DECODER = {
    "model_type": "qwen3",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}

BERT = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}

MODELS = {
    "decoder": ("Qwen3-shaped decoder, bidirectional, 28.3 M parameters outside its embeddings", DECODER, 512),
    "minilm": ("BERT of MiniLM-L6's shape, 10.6 M parameters outside its embeddings", BERT, 256),
}


def read_lines(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def retrieval_pairs(folder):
    """(query, positive document) of the training split, every text once."""
    queries = {row["_id"]: row["text"] for row in read_lines(folder / "queries.jsonl.gz")}
    documents = {row["_id"]: row["text"] for row in read_lines(folder / "corpus.jsonl.gz")}
    with open(folder / "qrels" / "train.tsv", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return [(queries[query], documents[document]) for query, document, grade in rows if int(grade) > 0]


def real_pairs(data, count, rng):
    """A blend: 3/8 medical answers (heavy-tailed), 3/8 question-sentence pairs (short), 1/4 code (in between)."""
    shares = {"medquad": 3, "squad-sentences": 3, "code-docstrings": 2}
    pairs = []
    for name, share in shares.items():
        pool = retrieval_pairs(data / name)
        pairs += [pool[i] for i in rng.permutation(len(pool))[: 2 * count * share // 8]]
    return distinct([pairs[i] for i in rng.permutation(len(pairs))], count)


def generated_pairs(count, rng):
    """Random words, Zipf-distributed; queries of about 10 words, documents log-normal (median 50, a tenth above 180)."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(20_000)]
    share = 1 / np.arange(1, len(words) + 1)

    def text(median, sigma):
        length = int(np.clip(rng.lognormal(np.log(median), sigma), 2, 700))
        return " ".join(words[i] for i in rng.choice(len(words), length, p=share / share.sum()))

    return distinct([(text(10, 0.4), text(50, 1.0)) for _ in range(2 * count)], count)


def distinct(pairs, count):
    """The first ``count`` pairs none of whose texts occurred before: no row is another's false negative."""
    seen, kept = set(), []
    for pair in pairs:
        keys = {" ".join(text.split()).casefold() for text in pair}
        if len(keys) == 2 and not keys & seen and all(keys):
            seen |= keys
            kept.append(pair)
    return kept[:count]


def build_model(kind, folder, texts):
    """Saves a random model with a tokenizer trained on ``texts``, readable by both libraries; returns its folder."""
    _, architecture, max_length = MODELS[kind]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (folder / "tokenizer").mkdir()
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    config = EncoderConfig(
        backbone=BackboneConfig(architecture=architecture),
        head=MeanConfig(),
        tokenizer=TokenizerConfig(eos_token="</s>"),
        tokenizer_path=str(folder / "tokenizer"),
        max_length=max_length,
    )
    openembed.build(config).save(folder / kind)
    return folder / kind
