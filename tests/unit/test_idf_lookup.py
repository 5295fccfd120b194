"""Queries without a model: the table, the lookup, words, training and recipes."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocabulary import SENTENCES, SPECIAL, sparse_encoder, text_tokenizer, word_pieces

import openembed
from openembed import words
from openembed.data.batch import BatchConfig, RowSource, collate
from openembed.heads.idf_lookup import build_idf
from openembed.objectives.contrastive import ContrastiveConfig
from openembed.packing import pack
from openembed.records import Document, Example, Query
from openembed.seeds import generator
from openembed.train.cached import ComputeConfig, backward, prepare
from openembed.words import words_of

QUERIES = ["the sun the sun", "which wine?", "", "[SEP] judo", "zzz"]


@pytest.fixture
def encoder(tmp_path):
    encoder = sparse_encoder(tmp_path, query_head={"kind": "idf_lookup"})
    encoder.query_head.set_table(build_idf(encoder.tokenizer, SENTENCES))
    return encoder


def test_frequencies_are_those_of_the_formula():
    tokenizer = text_tokenizer()
    idf = build_idf(tokenizer, iter(["the sun the", "the red wine", "wine", "judo"]))
    for word, count in {"the": 2, "wine": 2, "sun": 1}.items():
        assert idf[tokenizer.backend.token_to_id(word)] == pytest.approx(math.log(1 + (4 - count + 0.5) / (count + 0.5)))
    assert idf[tokenizer.backend.token_to_id("planet")] == idf[tokenizer.backend.token_to_id("[CLS]")] == 1.0
    with pytest.raises(ValueError, match="need documents"):
        build_idf(tokenizer, [])


def test_published_values_are_of_this_formula():
    """Largest and further values of the published table, of 8,841,823 passages: n passages have the token."""
    for count, value in {1: 15.5895, 7_722_891: 0.1353, 6_563_880: 0.2979, 91_696: 4.5684}.items():
        assert math.log1p((8_841_823 - count + 0.5) / (count + 0.5)) == pytest.approx(value, abs=1e-3)


def test_queries_are_their_own_tokens_once(encoder, monkeypatch):
    monkeypatch.setattr(encoder.backbone, "forward", None)  # no model runs
    found, table = encoder.encode_queries(QUERIES), encoder.query_head.table().numpy()
    names = [{encoder.tokenizer.backend.id_to_token(i): w for i, w in zip(row.indices, row.data, strict=True)} for row in found]
    assert set(names[0]) == {"the", "sun"}
    assert names[2] == {}
    assert not set(SPECIAL) & set().union(*names)
    assert all(weight == table[encoder.tokenizer.backend.token_to_id(name)] for row in names for name, weight in row.items())
    assert found.has_sorted_indices
    assert found.dtype == np.float32


def test_lookup_equals_the_forward_pass(encoder):
    with torch.no_grad():
        encoder.query_head.weight_V[:40] -= 3.0  # weights below 0 count as 0
    fast = encoder.encode_queries(QUERIES)
    rows = encoder.tokenize(QUERIES, queries=np.ones(len(QUERIES), dtype=bool))
    plain = encoder(pack(rows)).detach().numpy()
    np.testing.assert_array_equal(fast.toarray(), plain)
    for query, row in zip(QUERIES, plain, strict=True):
        np.testing.assert_array_equal(encoder.encode_queries([query]).toarray()[0], row)
    assert encoder.encode_queries([]).shape == (0, encoder.width)
    documents = encoder.encode_documents(QUERIES)
    assert documents.nnz > fast.nnz, "documents are expanded"


def test_long_queries_are_cut_where_texts_are(encoder):
    long = " ".join(SENTENCES * 5)
    for limit in (4, 9, 64):
        row = encoder.tokenize([long], max_length=limit, queries=np.ones(1, dtype=bool))
        expected = encoder(pack(row)).detach().numpy()
        np.testing.assert_array_equal(encoder.encode_queries([long], max_length=limit).toarray(), expected)


def test_prompts_do_not_count(encoder):
    plain = encoder.encode_queries(["red wine"]).toarray()
    np.testing.assert_array_equal(encoder.encode_queries(["red wine"], instruction="the sun: ").toarray(), plain)


def test_options_of_dense_vectors_are_refused(encoder):
    with pytest.raises(ValueError, match="only dense vectors"):
        encoder.encode_queries(["a"], dimensions=3)
    with pytest.raises(TypeError, match="one string"):
        encoder.encode_queries("a")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=6))
def test_words_give_the_tokenizers_own_ids(texts):
    backend = word_pieces()
    backend.encode_special_tokens = True
    found = words_of(backend)
    for _ in range(2):  # learned, then remembered
        ids, ends = found(texts)
        expected = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
        assert [ids[low:high] for low, high in pairwise([0, *ends])] == expected


def test_words_are_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(words, "REMEMBERED", 20)
    backend = word_pieces()
    backend.encode_special_tokens = True
    found = words_of(backend)
    for sentence in SENTENCES * 2:
        assert found([sentence])[0] == backend.encode(sentence, add_special_tokens=False).ids
        assert sum(map(len, found._ids)) <= 20 + len(sentence)


def test_tokenizers_whose_words_depend_on_neighbours_have_no_words(make_encoder):
    tokenizer = make_encoder().tokenizer
    assert words_of(tokenizer.backend) is None
    ids, ends = tokenizer.bodies(["the sun", "", "wine"])
    rows = tokenizer(["the sun", "wine"]).ids
    assert ids[: ends[0]] == rows[0][1:-1].tolist()
    assert ends[1] == ends[0]
    assert ids[ends[1] :] == rows[1][1:-1].tolist()


@pytest.mark.parametrize("trainable", [False, True])
def test_saved_and_loaded(tmp_path, trainable):
    encoder = sparse_encoder(tmp_path, query_head={"kind": "idf_lookup", "trainable": trainable})
    encoder.query_head.set_table(build_idf(encoder.tokenizer, SENTENCES))
    assert ("query_head.weight_V" in dict(encoder.named_parameters())) == trainable
    encoder.save(tmp_path / "model")
    again = openembed.load(tmp_path / "model")
    assert again.fingerprint == encoder.fingerprint
    assert again.query_head.weight_V.requires_grad == trainable
    assert abs(again.encode_queries(SENTENCES) - encoder.encode_queries(SENTENCES)).max() == 0
    encoder.query_head.set_table(np.full(5, 9.0))
    assert encoder.fingerprint != again.fingerprint
    assert encoder.encode_queries(["[UNK]"]).nnz == again.encode_queries(["[UNK]"]).nnz


@pytest.mark.parametrize("trainable", [False, True])
def test_a_training_step_moves_what_is_trainable(tmp_path, trainable):
    encoder = sparse_encoder(tmp_path, query_head={"kind": "idf_lookup", "trainable": trainable}).train()
    examples = [
        Example(Query(str(i), query), (Document(str(i), text),), source="pairs")
        for i, (query, text) in enumerate(zip(("red planet", "wine"), SENTENCES, strict=False))
    ]
    sources = {"pairs": RowSource("pairs", sided=encoder.sided)}
    batch = collate(examples, sources, BatchConfig(size=2, negatives=0), generator(0, "rows", 0))
    compute = ComputeConfig(max_length=32)
    objective = ContrastiveConfig(similarity="dot").build()
    loss = backward(encoder, objective, prepare(encoder, objective, batch, compute), compute, seed=0)
    assert loss.total.isfinite()
    assert encoder.backbone.model.get_input_embeddings().weight.grad.abs().sum() > 0
    assert encoder.query_head.weight_V.requires_grad == trainable
    if trainable:
        assert encoder.query_head.weight_V.grad.abs().sum() > 0


def test_a_dense_encoder_has_no_query_table(make_encoder):
    with pytest.raises(ValueError, match="give a sparse head"):
        make_encoder(query_head={"kind": "idf_lookup"})


def test_a_table_of_another_model_is_refused(encoder):
    with pytest.raises(ValueError, match="this model's tokenizer"):
        encoder.query_head.set_table(np.ones(encoder.width + 1))


def test_a_recipe_makes_the_table(tmp_path):
    from openembed.recipe.config import Recipe
    from openembed.recipe.stages import MODEL, Workplace, run_stage

    sparse_encoder(tmp_path)  # writes tokenizer.json
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    fields = {
        "backbone": {"architecture": {"model_type": "bert", "vocab_size": 230, "hidden_size": 32, "num_attention_heads": 2}}
    }
    fields |= {"head": {"kind": "splade"}, "tokenizer_path": str(tmp_path)}
    stage = {"start": {"do": "idf", "texts": "corpus.jsonl"}}
    recipe = {"name": "sparse", "encoder": {**fields, "query_head": {"kind": "idf_lookup"}}, "stage": stage}
    place = Workplace(Recipe.model_validate(recipe), tmp_path / "out", tmp_path)
    run_stage(place, "start")
    made = openembed.load(tmp_path / "out/start" / MODEL)
    expected = build_idf(made.tokenizer, SENTENCES)
    np.testing.assert_allclose(made.query_head.weight_V[: len(expected)].numpy(), expected)
    with pytest.raises(ValueError, match="give either texts or sources"):
        Recipe.model_validate({**recipe, "stage": {"start": {"do": "idf"}}})


def test_looked_up_queries_are_cut_and_repeated_as_trained_ones(tmp_path):
    for settings in ({"query_length": 6}, {"repeat": " again: "}):
        encoder = sparse_encoder(tmp_path, query_head={"kind": "idf_lookup"}, tokenizer=settings)
        rows = encoder.tokenize(SENTENCES, queries=np.ones(len(SENTENCES), dtype=bool))
        with torch.no_grad():
            expected_NV = torch.cat([encoder(pack(rows, [n])) for n in range(len(rows))]).numpy()
        np.testing.assert_array_equal(encoder.encode_queries(SENTENCES).toarray(), expected_NV)
    with pytest.raises(ValueError, match="leaves no token for the text"):
        sparse_encoder(tmp_path, query_head={"kind": "idf_lookup"}).encode_queries(["wine"], max_length=2)
