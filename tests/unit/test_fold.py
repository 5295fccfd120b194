"""Entries of the vocabulary that spell the same count as one."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import openembed
from openembed.config import parse
from openembed.encoder import EncoderConfig
from openembed.heads.idf_lookup import build_idf
from openembed.heads.vocabulary import folded, folded_tokens
from openembed.packing import pack
from openembed.records import Document, Example, Query
from openembed.terms import top_terms
from openembed.tokenization import TextTokenizer, TokenizerConfig
from openembed.train.vocabulary import calibrate

NAMES = ["<unk>", "</s>", "▁sun", "▁Sun", "sun", "▁SUN", "▁wine", "▁Wine", "▁ﬁne", "▁fine", "▁red", "▁"]
TEXTS = ["Sun red", "sun wine Wine", "fine SUN", "red"]


def backend():
    made = Tokenizer(models.WordLevel({name: number for number, name in enumerate(NAMES)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def encoder_of(folder, *, fold=True, **parts):
    backend().save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = {
        "model_type": "llama",
        **sizes,
        "num_key_value_heads": 2,
        "vocab_size": len(NAMES),
        "initializer_range": 0.3,
    }
    fields = {
        "backbone": {"architecture": architecture, "attention": "causal"},
        "head": {"kind": "splade", "fold": fold, **parts.pop("head", {})},
        "tokenizer": {"eos_token": "</s>"},
        "tokenizer_path": str(folder),
        "max_length": 32,
        **parts,
    }
    return openembed.build(parse(EncoderConfig, fields, "test"), seed=3)


def group(name):
    return NAMES.index({"▁Sun": "▁sun", "sun": "▁sun", "▁SUN": "▁sun", "▁Wine": "▁wine", "▁fine": "▁ﬁne"}.get(name, name))


def test_spellings_count_as_the_first_of_them():
    tokenizer = TextTokenizer(backend(), TokenizerConfig())
    found = folded_tokens(tokenizer, torch.zeros(len(NAMES), dtype=torch.bool))
    assert found.tolist() == [group(name) for name in NAMES]
    excluded = torch.tensor([name == "▁sun" for name in NAMES])
    found = folded_tokens(tokenizer, excluded).tolist()
    assert found[NAMES.index("▁sun")] == NAMES.index("▁sun")  # an excluded entry counts as itself, and stands for no other
    assert found[NAMES.index("▁SUN")] == NAMES.index("▁Sun")


def test_a_byte_of_a_character_is_no_spelling_of_another():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    found = folded_tokens(TextTokenizer(made, TokenizerConfig()), torch.zeros(len(alphabet), dtype=torch.bool))
    loose = [number for number in range(len(alphabet)) if "\ufffd" in made.decode([number])]
    assert len(loose) > 100
    assert all(found[number] == number for number in loose)
    assert found[alphabet.index("a")] == alphabet.index("A")


def test_weights_are_the_largest_of_all_spellings_in_training_and_in_use(tmp_path):
    ours, plain = encoder_of(tmp_path), encoder_of(tmp_path, fold=False)
    plain.load_state_dict(ours.state_dict())
    kept = sorted({group(name) for name in NAMES})
    for training in (True, False):
        rows = ours.tokenize(TEXTS)
        got, whole = (e.train(training)(pack(rows)).detach().numpy() for e in (ours, plain))
        assert (whole > 0).sum() > 10
        for number in kept:
            members = [i for i, name in enumerate(NAMES) if group(name) == number]
            np.testing.assert_array_equal(got[:, number], whole[:, members].max(1))
        assert not np.delete(got, kept, axis=1).any()


def test_gradients_are_those_of_the_largest():
    fold_V = torch.tensor([0, 0, 2, 2, 4])
    values = torch.tensor([[0.5, 2.0, 0.0, 0.0, 1.0], [3.0, 2.0, 0.25, 0.75, 0.0]], dtype=torch.float64, requires_grad=True)
    direction = torch.tensor([[1.0, 9.0, 3.0, 9.0, 5.0], [2.0, 9.0, 4.0, 9.0, 6.0]], dtype=torch.float64)
    (found,) = torch.autograd.grad(folded(values, fold_V), values, direction)
    positive = (values > 0).double()  # at 0 relu lets nothing through
    expected = torch.tensor([[0.0, 1.0, 0.0, 0.0, 5.0], [2.0, 0.0, 0.0, 4.0, 6.0]], dtype=torch.float64)
    torch.testing.assert_close(found * positive, expected * positive)
    assert folded(values, None) is values


def test_queries_are_looked_up_folded(tmp_path):
    encoder = encoder_of(tmp_path, query_head={"kind": "idf_lookup", "fold": True})
    idf = build_idf(encoder.tokenizer, TEXTS, encoder.query_head.fold_V)
    assert idf[NAMES.index("▁sun")] == pytest.approx(math.log(1 + (4 - 3 + 0.5) / (3 + 0.5)))
    encoder.query_head.set_table(idf)
    queries = ["Sun SUN wine", "sun wine", "SUN Wine Wine", "red"]
    fast = encoder.encode_queries(queries).toarray()
    np.testing.assert_array_equal(fast[0], fast[1])
    np.testing.assert_array_equal(fast[0], fast[2])
    np.testing.assert_array_equal(fast[0], encoder.encode_queries(queries[:1]).toarray()[0])
    rows = encoder.tokenize(queries, queries=np.ones(len(queries), dtype=bool))
    np.testing.assert_array_equal(fast, encoder(pack(rows)).detach().numpy())
    (heaviest, *_) = top_terms(encoder, "SUN", query=True).top
    assert (heaviest.token, heaviest.own) == ("▁sun", True)


def test_bags_and_gates_are_folded(tmp_path):
    encoder = encoder_of(tmp_path, head={"bags": True, "document": {"gate": "bag_of_words"}})
    rows = encoder.tokenize(TEXTS)
    bag = encoder.head.bag(rows, torch.device("cpu"))
    own = [{group(name) for name in names} for names in (["▁sun", "▁red"], ["▁sun", "▁wine"], ["▁fine", "▁sun"], ["▁red"])]
    assert [set(row.nonzero().flatten().tolist()) for row in bag] == own
    assert [set(row.indices.tolist()) for row in encoder.encode_documents(TEXTS)] == own


def test_one_side_alone_is_refused_and_saving_keeps_it(tmp_path):
    with pytest.raises(ValueError, match="set both"):
        encoder_of(tmp_path, query_head={"kind": "idf_lookup"})
    encoder = encoder_of(tmp_path)
    encoder.save(tmp_path / "model")
    assert not (tmp_path / "model" / "modules.json").exists()  # sentence-transformers would count spellings apart
    other = openembed.load(tmp_path / "model")
    np.testing.assert_array_equal(other.encode_documents(TEXTS).toarray(), encoder.encode_documents(TEXTS).toarray())


def test_an_offset_is_calibrated_on_positives(tmp_path):
    encoder = encoder_of(tmp_path, head={"offset": -50.0})
    rows = {"a": [Example(Query("q", "red"), (Document("d", text),)) for text in TEXTS]}
    assert encoder.encode_documents(TEXTS).nnz == 0
    calibrate(encoder, rows, 0.3)
    counted = int((~encoder.head.excluded_V).sum())
    share = (encoder.encode_documents(TEXTS).toarray() > 0).sum() / (len(TEXTS) * counted)
    assert 0 < share <= 0.31  # of entries before they are folded
    with pytest.raises(ValueError, match="no offset to calibrate"):
        calibrate(encoder_of(tmp_path), rows, 0.3)
