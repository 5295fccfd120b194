"""Texts given twice: rows, spans and cuts, and that packing, padding and company do not matter."""

import numpy as np
import pytest
import torch
from tiny_training import WORDS, sentence, tiny_encoder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel

from openembed.checkpoints import build, load
from openembed.encoder import EncoderConfig
from openembed.packing import pack
from openembed.tokenization import TextTokenizer, TokenizerConfig

NAMES = ["[UNK]", "</s>", "again", ":", "find", "Query", "Instruct", *WORDS]


def backend():
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(NAMES)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def tokenizer(**fields):
    return TextTokenizer(backend(), TokenizerConfig(**{"repeat": " again : ", "eos_token": "</s>", **fields}))


def shown(rows, index=0):
    return " ".join(NAMES[i] for i in rows.ids[index]), int(rows.pool_starts[index])


def test_a_row_is_instruction_text_between_text():
    rows = tokenizer()(["w1 w2 w3", "w4"], "find : ")
    assert shown(rows, 0) == ("find : w1 w2 w3 again : w1 w2 w3 </s>", 7)
    assert shown(rows, 1) == ("find : w4 again : w4 </s>", 5)
    assert shown(tokenizer()(["w1 w2"])) == ("w1 w2 again : w1 w2 </s>", 4)
    assert shown(tokenizer(repeat=" ", eos_token=None)(["w1 w2"])) == ("w1 w2 w1 w2", 2)


@pytest.mark.parametrize("limit", range(7, 16))
def test_a_cut_takes_as_much_of_both_copies(limit):
    row, start = shown(tokenizer()(["w1 w2 w3 w4 w5"], "find : ", limit))
    words = row.split()
    assert len(words) <= limit
    assert len(words) >= min(limit - 1, 15), "no more than the odd token is given away"
    assert words[-1] == "</s>"
    copy = words[start:-1]
    assert copy == words[2 : 2 + len(copy)] == [f"w{n + 1}" for n in range(len(copy))]
    assert words[2 + len(copy) : start] == ["again", ":"]


def test_no_room_for_two_texts_is_refused():
    with pytest.raises(ValueError, match="leaves no token for a text that is given twice; 7 is needed"):
        tokenizer()(["w1 w2"], "find : ", 6)
    with pytest.raises(ValueError, match="it needs pool_instruction = 'exclude'"):
        TokenizerConfig(repeat="", pool_instruction="include")


def test_an_empty_text_still_has_something_to_pool():
    rows = tokenizer(eos_token=None, repeat="")([""])
    assert len(rows.ids[0]) == 1
    assert rows.pool_starts[0] == 0


@pytest.mark.parametrize("limit", [None, 11, 8])
def test_token_ids_make_the_same_rows(limit):
    echo = tokenizer()
    ids = [[NAMES.index(f"w{n}") for n in range(1, 6)], [NAMES.index("w7")]]
    framed, called = echo.frame(ids, "find : ", limit), echo(["w1 w2 w3 w4 w5", "w7"], "find : ", limit)
    assert [row.tolist() for row in framed.ids] == [row.tolist() for row in called.ids]
    assert framed.pool_starts.tolist() == called.pool_starts.tolist()


@pytest.mark.parametrize("limit", [None, 11])
def test_both_copies_point_at_the_text(limit):
    echo, text = tokenizer(), "w1 w20 w3 w4 w5"
    spans, row = echo.offsets(text, "find : ", limit), echo([text], "find : ", limit).ids[0]
    assert len(spans) == len(row)
    for number, span in zip(row, spans, strict=True):
        if NAMES[number].startswith("w"):
            assert text[slice(*span)] == NAMES[number]
        else:
            assert span is None


def encoder(tmp_path, attention="causal", head=None, repeat=" again : "):
    backend().save(str(tmp_path / "tokenizer.json"))
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "backbone": {
            "architecture": {"model_type": "mistral", "vocab_size": len(NAMES), "num_key_value_heads": 2, **shape},
            "attention": attention,
        },
        "head": head or {"kind": "splade", "offset": 0.5},
        "tokenizer": {"repeat": repeat, "eos_token": "</s>"},
        "tokenizer_path": str(tmp_path),
        "max_length": 40,
    }
    return build(EncoderConfig.model_validate(config), seed=1)


def dense(values):
    return values if isinstance(values, np.ndarray) else values.toarray()


@pytest.mark.parametrize("head", [{"kind": "mean"}, {"kind": "last_token"}, {"kind": "splade", "offset": 0.5}])
def test_company_and_padding_do_not_matter(tmp_path, head):
    model = encoder(tmp_path, head=head)
    texts = [sentence(*range(n, n + 1 + n % 5)) for n in range(9)]
    together = dense(model.encode(texts, instruction="find : "))
    alone = np.concatenate([dense(model.encode([text], instruction="find : ")) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_packed_equals_padded(tmp_path):
    model = encoder(tmp_path, head={"kind": "mean"})
    model.save(tmp_path / "model")
    texts = [sentence(*range(n, n + 1 + n % 5)) for n in range(9)]
    rows = model.tokenize(texts, "find : ")
    lengths = torch.from_numpy(rows.lengths)
    ids = torch.stack([torch.tensor([*row, *[0] * (int(lengths.max()) - len(row))]) for row in rows.ids])
    position = torch.arange(int(lengths.max()))
    padded = AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.inference_mode():
        states = padded(input_ids=ids, attention_mask=(position < lengths[:, None]).long()).last_hidden_state
    pooled = (position >= torch.from_numpy(rows.pool_starts)[:, None]) & (position < lengths[:, None])
    expected = (states * pooled[..., None]).sum(1) / pooled.sum(1, keepdim=True)
    np.testing.assert_allclose(model.encode(texts, instruction="find : ", normalize=False), expected.numpy(), atol=1e-5)


def test_only_the_second_copy_is_pooled_and_it_has_seen_the_end(tmp_path):
    """Under a causal mask: the first word's weight depends on the last word with the echo, and not without it."""
    changed = {}
    for repeat in (None, " again : "):
        model = encoder(tmp_path, repeat=repeat, head={"kind": "mean"})
        rows = model.tokenize(["w1 w2 w3", "w1 w2 w9"])
        with torch.inference_mode():
            first, second = (model.backbone(pack(rows, [i])) for i in range(2))
        start = int(rows.pool_starts[0])
        changed[repeat] = (first[start] - second[start]).abs().max().item()
        assert rows.pool_starts.tolist() == [start, start]
    assert changed[None] == 0
    assert changed[" again : "] > 1e-4


def test_a_saved_model_repeats_too_and_sentence_transformers_is_told_no(tmp_path):
    model = encoder(tmp_path, head={"kind": "mean"})
    model.save(tmp_path / "model")
    texts = ["w1 w2 w3", "w4"]
    np.testing.assert_allclose(load(str(tmp_path / "model")).encode(texts), model.encode(texts), atol=1e-6)
    transformers = pytest.importorskip("sentence_transformers")
    with pytest.raises(Exception, match="reads every text twice"):
        transformers.SentenceTransformer(str(tmp_path / "model"), trust_remote_code=True, device="cpu")


def test_plain_rows_are_as_before(tmp_path):
    model = tiny_encoder(tmp_path)
    assert model.tokenize(["w1 w2"]).pool_starts.tolist() == [0]
