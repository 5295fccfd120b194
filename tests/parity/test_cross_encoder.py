"""Our cross-encoder against sentence-transformers' CrossEncoder on a tiny random checkpoint."""

import numpy as np
import pytest
import torch
from samples import TEXTS

from openembed.rerankers.cross_encoder import load_cross_encoder

sentence_transformers = pytest.importorskip("sentence_transformers")
QUERY = "Which planet is red?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_dir):
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("cross")
    torch.manual_seed(0)
    shape = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(**shape, num_labels=1, max_position_embeddings=64, initializer_range=0.3))
    model.save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"), pad_token="</s>")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("activation", [None, "sigmoid", "identity"])
def test_scores_equal_those_of_sentence_transformers(folder, tmp_path, activation):
    function = {None: None, "sigmoid": torch.nn.Sigmoid(), "identity": torch.nn.Identity()}[activation]
    theirs = sentence_transformers.CrossEncoder(str(folder), device="cpu", activation_fn=function)
    if activation is not None:
        theirs.save_pretrained(str(tmp_path))
    ours = load_cross_encoder(folder if activation is None else tmp_path)
    expected = theirs.predict([(QUERY, text) for text in TEXTS])
    found = ours.score(QUERY, TEXTS)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert ours.scale == ("log_odds" if activation == "identity" else "probability")
    alone = np.concatenate([ours.score(QUERY, [text]) for text in TEXTS])
    np.testing.assert_allclose(found, alone, atol=1e-5)
    assert ours.score(QUERY, []).shape == (0,)


def test_more_than_one_logit_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 3 logits"):
        load_cross_encoder(tmp_path)
