"""The vocabulary head: pooling without logits, its gates, what it leaves out, saving."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from vocabulary import SENTENCES, sparse_encoder, text_tokenizer

import openembed
from openembed.heads import vocabulary_pooling
from openembed.heads.splade import SideConfig, SpladeConfig, largest
from openembed.heads.vocabulary import excluded_tokens
from openembed.heads.vocabulary_pooling import activate, max_pooled, packed_for, sum_pooled
from openembed.kernels import vocabulary as kernels
from openembed.packing import pack

ACTIVATIONS = ("log1p_relu", "log1p_log1p_relu", "elu1p")
LENGTHS = (3, 0, 7, 2, 2)


def naive(states, weight, bias, activation, pooling):
    rows = []
    for piece in states.split(LENGTHS):
        logits = piece @ weight.T + bias
        if not len(logits):
            rows.append(torch.zeros_like(bias))
        elif pooling == "max":
            rows.append(activate(logits.max(0).values, activation))
        else:
            rows.append(activate(logits, activation).sum(0))
    return torch.stack(rows)


def inputs(dtype, ties, vocabulary=301, width=20):
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(sum(LENGTHS), width, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=dtype)
    if ties:  # whole numbers: products are exact and many are equal
        states, weight = states.round(), weight.round()
    bias = torch.randn(vocabulary, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (states, weight, bias)]


@pytest.mark.parametrize(("activation", "pooling", "ties"), list(product(ACTIVATIONS, ("max", "sum"), (False, True))))
def test_weights_and_gradients_are_those_of_the_naive_form(activation, pooling, ties, monkeypatch):
    monkeypatch.setitem(vocabulary_pooling.LOGITS_HELD, "cpu", 1)  # several stretches of the vocabulary
    given = inputs(torch.float64, ties)
    ours = {"max": max_pooled, "sum": sum_pooled}[pooling](*given, LENGTHS, activation)
    expected = naive(*given, activation, pooling)
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(ours, given, direction), torch.autograd.grad(expected, given, direction), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_numerical_gradients(activation):
    given = inputs(torch.float64, ties=False, vocabulary=5)
    assert torch.autograd.gradcheck(lambda *x: max_pooled(*x, LENGTHS, activation), given)


@pytest.mark.parametrize("ties", [False, True])
def test_kernel_and_torch_agree(ties, monkeypatch):
    given = inputs(torch.float32, ties)
    if not kernels.serves(given[0], given[1], torch.float32):
        pytest.skip("no kernels on this machine")
    results = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(kernels, "serves", lambda *_: False)
        out = max_pooled(*given, LENGTHS, "elu1p")
        results.append([out, *torch.autograd.grad(out, given, torch.ones_like(out).cumsum(1) / 100)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [20, 33, 64])  # a tail of pairs, an odd one, whole vectors
@pytest.mark.parametrize("ties", [False, True])
def test_kernel_in_bfloat16_multiplies_what_is_rounded_and_sums_in_float32(ties, width):
    states, weight, _ = (x.detach() for x in inputs(torch.float32, ties, width=width))
    if not kernels.serves(states, weight, torch.bfloat16):
        pytest.skip("no bfloat16 kernels on this machine")
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    best, winner = kernels.largest_products(states, weight, offsets, winners=True, half=True)
    rounded = [x.bfloat16().float() for x in (states, weight)]
    expected, expected_winner = kernels.largest_products(*rounded, offsets, winners=True)
    torch.testing.assert_close(best, expected, atol=1e-4, rtol=1e-4)
    assert (winner == expected_winner).float().mean() > (0.99 if ties else 0.95), "near ties may fall either way"
    if ties:
        assert torch.equal(best, expected), "whole numbers are exact in bfloat16"
        assert torch.equal(winner, expected_winner), "of equal products the first wins"


def test_without_gradients_no_winners_are_sought(monkeypatch):
    given, asked, real = inputs(torch.float32, ties=False), [], vocabulary_pooling._largest
    monkeypatch.setattr(vocabulary_pooling, "_largest", lambda *args: asked.append(args[4]) or real(*args))
    with torch.no_grad():
        max_pooled(*given, LENGTHS, "elu1p")
    max_pooled(*(x.detach() for x in given), LENGTHS, "elu1p")
    max_pooled(*given, LENGTHS, "elu1p")
    assert asked == [False, False, True]


def test_few_tokens_in_bfloat16_weigh_alone_what_they_weigh_among_others():
    states, weight, bias = (x.detach() for x in inputs(torch.float32, ties=False, width=64))
    if not kernels.serves(states, weight, torch.bfloat16):
        pytest.skip("no bfloat16 kernels on this machine")
    many = max_pooled(torch.cat([states * 30] * 8), weight, bias, LENGTHS * 8, "elu1p", half=True)
    alone = max_pooled(states[3:10] * 30, weight, bias, (7,), "elu1p", half=True)
    assert torch.equal(alone[0], many[2])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("width", [20, 33])
def test_a_packed_vocabulary_gives_the_same_products(half, width):
    states, weight, bias = (x.detach() for x in inputs(torch.float32, ties=False, width=width))
    packed = packed_for(weight, half=half)
    if packed is None:
        pytest.skip("no kernels on this machine")
    plain, ahead = (max_pooled(states, weight, bias, LENGTHS, "elu1p", half=half, packed=x) for x in (None, packed))
    if half:
        assert torch.equal(plain, ahead)
    else:
        torch.testing.assert_close(plain, ahead)  # without it so few tokens take torch's products


def test_a_changed_vocabulary_is_packed_anew(tmp_path):
    encoder = sparse_encoder(tmp_path).eval()
    before = encoder.encode_documents(SENTENCES).toarray()
    with torch.no_grad():
        encoder.head.output_VD.mul_(0.5)
    after = encoder.encode_documents(SENTENCES).toarray()
    encoder.save(tmp_path / "halved")
    np.testing.assert_allclose(after, openembed.load(tmp_path / "halved").encode_documents(SENTENCES).toarray(), atol=1e-5)
    assert abs(before - after).max() > 0.01


def test_gradients_in_bfloat16_are_those_of_the_products_that_won(monkeypatch):
    given = inputs(torch.float32, ties=True)
    results = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(kernels, "serves", lambda *_: False)
        with torch.autocast("cpu", torch.bfloat16):
            out = max_pooled(*given, LENGTHS, "elu1p")
        results.append([out, *torch.autograd.grad(out, given, torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.02)


def test_frozen_weights_and_states_in_bfloat16_have_the_kernel_too(monkeypatch):
    states, weight, bias = inputs(torch.float32, ties=False, width=64)
    states = states.detach().bfloat16().requires_grad_()
    weight, bias = weight.detach().bfloat16(), bias.detach()
    results = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(kernels, "serves", lambda *_: False)
        out = max_pooled(states, weight, bias, LENGTHS, "elu1p")
        results.append([out, *torch.autograd.grad(out, states, torch.ones_like(out) / 100)])
    assert results[0][1].dtype == torch.bfloat16
    torch.testing.assert_close(results[0][0], results[1][0], atol=0.1, rtol=0.02)  # torch rounds products to bfloat16
    torch.testing.assert_close(*(found[1].float() for found in results), atol=0.05, rtol=0.05)


def test_kernel_does_not_hide_damaged_states():
    states, weight, bias = (x.detach() for x in inputs(torch.float32, ties=False))
    states[4, 0] = float("nan")
    out = max_pooled(states, weight, bias, LENGTHS, "elu1p")
    assert out[2].isnan().all()
    assert not out[[0, 3]].isnan().any()


PEAK = """
import re, torch
from openembed.heads import vocabulary_pooling as vp
from openembed.kernels import vocabulary as kernels
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
states, weight = torch.randn(4 * 256, 64, requires_grad=True), torch.randn(30000, 64, requires_grad=True)
bias, lengths, serves = torch.zeros(30000, requires_grad=True), [256] * 4, kernels.serves
def run(f):
    f().sum().backward()
    states.grad = weight.grad = bias.grad = None
run(lambda: vp.max_pooled(states[:12], weight, bias, [3] * 4, "log1p_relu"))
start = peak()
run(lambda: vp.max_pooled(states, weight, bias, lengths, "log1p_relu"))
kernels.serves = lambda *_: False
run(lambda: vp.max_pooled(states, weight, bias, lengths, "log1p_relu"))
ours = peak() - start
run(lambda: vp.activate(states @ weight.T + bias, "log1p_relu").view(4, 256, -1).amax(1))
print(ours, peak() - start)
"""


def test_memory_is_a_tenth_of_the_naive_form():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    ours, naively = map(int, done.stdout.split())
    assert naively > 250_000, "kilobytes: logits and their gradients are 120 MB each"
    assert ours <= naively / 10


WORKING = """
import re, torch
from openembed.heads import vocabulary_pooling as vp
from openembed.kernels import vocabulary as kernels
kernels.library = lambda: None
vp.LOGITS_HELD["cpu"] = 2**24
def peak(): return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
states, weight = torch.randn(4 * 128, 32, requires_grad=True), torch.randn(40000, 32, requires_grad=True)
bias = torch.zeros(40000, requires_grad=True)
def run(pooling, half, tokens):
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        value = getattr(vp, pooling + "_pooled")(states[: 4 * tokens], weight, bias, [tokens] * 4, "log1p_relu")
    value.sum().backward()
    states.grad = weight.grad = bias.grad = None
ascending = [("max", False), ("max", True), ("sum", False), ("sum", True)]
for pooling, half in ascending:
    run(pooling, half, 1)
start = peak()
for pooling, half in ascending:
    run(pooling, half, 128)
    dtype = torch.bfloat16 if half else torch.float32
    print(peak() - start, vp.working_bytes(pooling, 512, weight, dtype))
"""


def test_what_is_held_for_a_moment_is_counted():
    done = subprocess.run([sys.executable, "-c", WORKING], capture_output=True, text=True, check=True)
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [held for held, _ in found] == sorted(held for held, _ in found)
    assert all(counted / 2 < held < 1.4 * counted for held, counted in found), found  # the allocator has its part in it


def test_bfloat16_products_give_float32_weights():
    states, weight, bias = inputs(torch.float32, ties=False)
    exact = max_pooled(states, weight, bias, LENGTHS, "log1p_relu")
    with torch.autocast("cpu", torch.bfloat16):
        rough = max_pooled(states, weight, bias, LENGTHS, "log1p_relu")
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.05)
    rough.sum().backward()
    assert states.grad.dtype == torch.float32
    assert all(x.grad.isfinite().all() for x in (states, weight, bias))


@pytest.fixture
def encoder(tmp_path):
    return sparse_encoder(tmp_path, {"transform": "mlm"})


def test_what_stands_for_no_text_has_no_weight(encoder):
    tokenizer, vocabulary = encoder.tokenizer, encoder.backbone.vocabulary
    names = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    excluded = {tokenizer.backend.token_to_id(name) for name in names} | set(range(tokenizer.vocabulary, vocabulary))
    assert set(encoder.head.excluded_V.nonzero().flatten().tolist()) == excluded
    for mode in (True, False):
        encoder.train(mode)
        rows = encoder(pack(encoder.tokenize(SENTENCES)))
        assert (rows[:, sorted(excluded)] == 0).all()
        assert (rows > 0).any()
    whole = sparse_encoder_like(encoder, exclude_special=False)
    assert (whole(pack(encoder.tokenize(SENTENCES)))[:, sorted(excluded)] > 0).any()


def sparse_encoder_like(encoder, **changes):
    config = encoder.config.model_copy(update={"head": encoder.config.head.model_copy(update=changes)})
    torch.manual_seed(1)
    return openembed.encoder.Encoder(config, encoder.tokenizer, encoder.backbone, config.head.build(encoder.backbone.width))


def test_excluded_tokens_of_a_byte_level_vocabulary(make_encoder):
    tokenizer = make_encoder().tokenizer
    names = {
        tokenizer.backend.id_to_token(int(i)) for i in excluded_tokens(tokenizer, tokenizer.vocabulary).nonzero().flatten()
    }
    assert {"<s>", "</s>", "Ġ", "Ċ"} <= names
    assert not {"a", "Z", "7", "?"} & names


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prompts_are_seen_but_never_pooled(tmp_path, activation):
    encoder = sparse_encoder(tmp_path, {"activation": activation, "transform": "norm"}).eval()
    rows = encoder.tokenize(SENTENCES[:2], "the planet: ")
    packed = pack(rows)
    hidden = torch.randn(len(packed.ids_T), 32)
    changed = hidden.clone()
    changed[~packed.pool_mask_T] *= 100.0
    with torch.inference_mode():
        torch.testing.assert_close(encoder.head(hidden, packed), encoder.head(changed, packed), atol=0, rtol=0)


def test_top_k_keeps_the_largest_and_own_tokens(tmp_path):
    side = {"top_k": 5, "keep_own": True}
    encoder = sparse_encoder(tmp_path, {"activation": "elu1p", "query": side, "bags": True}).eval()
    assert encoder.sided
    queries, documents = encoder.encode_queries(SENTENCES), encoder.encode_documents(SENTENCES)
    own = encoder.head.bag(encoder.tokenize(SENTENCES), torch.device("cpu")).numpy()
    assert (documents.getnnz(1) == encoder.width - encoder.head.excluded_V.sum().item()).all()
    for query, document, bag in zip(queries.toarray(), documents.toarray(), own, strict=True):
        kept = set(np.argsort(-document)[:5]) | set(np.flatnonzero(bag))
        assert set(np.flatnonzero(query)) == kept
        np.testing.assert_allclose(query[query > 0], document[query > 0], rtol=1e-5)
    encoder.train()
    rows = encoder(pack(encoder.tokenize(SENTENCES, queries=np.ones(4, dtype=bool))))
    assert (rows > 0).sum() > queries.nnz, "training sees all weights"


def test_a_micro_batch_has_no_more_rows_than_its_weights_allow(tmp_path, monkeypatch):
    encoder = sparse_encoder(tmp_path).eval()
    whole, seen = encoder.encode_documents(SENTENCES * 3), []
    monkeypatch.setattr("openembed.encoder.WEIGHTS_AT_ONCE", 2 * encoder.width + 1)
    encoder.head.register_forward_hook(lambda _module, _given, out: seen.append(len(out)))
    parts = encoder.encode_documents(SENTENCES * 3)
    assert max(seen) == 2
    assert sum(seen) == 3 * len(SENTENCES)
    np.testing.assert_allclose(parts.toarray(), whole.toarray(), rtol=1e-5, atol=1e-6)


def test_documents_of_every_term_are_said_once(tmp_path, caplog):
    encoder = sparse_encoder(tmp_path, {"activation": "elu1p"}).eval()
    encoder.encode_queries(SENTENCES)
    assert not caplog.records
    encoder.encode_documents(SENTENCES)
    encoder.encode_documents(SENTENCES)
    (record,) = caplog.records
    assert "head.activation = 'elu1p' is never 0" in record.message
    assert f"documents have weights for all {encoder.width:,} terms; give head.document a top_k" in record.message
    caplog.clear()
    encoder.with_gates(document=SideConfig(top_k=9)).encode_documents(SENTENCES)
    sparse_encoder(tmp_path, {}).eval().encode_documents(SENTENCES)
    assert not caplog.records


def test_gates(tmp_path, monkeypatch):
    encoder = sparse_encoder(tmp_path, {"query": {"gate": "bag_of_words"}, "document": {"gate": "lexical"}}).eval()
    texts = ["the sun the sun", "red wine"]
    ids = [set(row.tolist()) - set(encoder.head.excluded_V.nonzero().flatten().tolist()) for row in encoder.tokenize(texts).ids]
    documents = encoder.encode_documents(texts)
    assert all(set(documents[i].indices) <= own for i, own in enumerate(ids))
    monkeypatch.setattr(encoder.backbone, "forward", None)  # queries run no model
    queries = encoder.encode_queries(texts)
    assert [set(queries[i].indices) for i in range(2)] == ids
    assert set(queries.data) == {1.0}


def test_pruning_keeps_what_is_near_the_largest(tmp_path):
    encoder = sparse_encoder(tmp_path, {"document": {"prune_ratio": 0.5}}).eval()
    pruned, whole = encoder.encode_documents(SENTENCES).toarray(), encoder.encode_queries(SENTENCES).toarray()
    np.testing.assert_array_equal(pruned > 0, whole > 0.5 * whole.max(1, keepdims=True))


def test_ties_and_small_vocabularies_in_largest():
    values = torch.tensor([[1.0, 0.0, 3.0], [2.0, 5.0, 4.0]])
    assert largest(values, 1).tolist() == [[False, False, True], [False, True, False]]
    assert largest(values, 10).all()


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="leave top_k and keep_own out"):
        SpladeConfig(query={"gate": "lexical", "top_k": 3})
    with pytest.raises(ValueError, match="give top_k"):
        SpladeConfig(document={"keep_own": True})


def test_calibrated_offset_gives_the_share_asked_for(tmp_path):
    encoder = sparse_encoder(tmp_path, {"offset": 0.0, "transform": "norm"}).eval()
    packed = pack(encoder.tokenize(SENTENCES))
    with torch.no_grad():
        encoder.head.calibrate(encoder.backbone(packed), packed, share=0.1)
        rows = encoder(packed)[:, ~encoder.head.excluded_V]
    assert (rows > 0).float().mean() == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="no offset"):
        sparse_encoder(tmp_path).head.calibrate(torch.zeros(len(packed.ids_T), 32), packed)


def test_tied_weights_learn_in_the_backbone_and_own_ones_beside_it(tmp_path):
    for tied in (True, False):
        encoder = sparse_encoder(tmp_path, {"tied": tied}).train()
        names = dict(encoder.named_parameters())
        assert ("head.matrix_VD" in names) != tied
        encoder(pack(encoder.tokenize(SENTENCES))).sum().backward()
        weight = encoder.backbone.model.get_input_embeddings().weight if tied else names["head.matrix_VD"]
        assert encoder.head.output_VD is weight
        assert weight.grad[encoder.tokenizer.backend.token_to_id("##q")].abs().sum() > 0, "of no text, only an output"


def test_saved_and_loaded(tmp_path):
    head = {"transform": "norm", "activation": "elu1p", "tied": False, "offset": 0.3, "query": {"top_k": 9}}
    encoder = sparse_encoder(tmp_path, head)
    encoder.save(tmp_path / "model")
    again = openembed.load(tmp_path / "model")
    assert again.fingerprint == encoder.fingerprint
    assert again.config.head == encoder.config.head
    for encode in ("encode_queries", "encode_documents"):
        assert abs(getattr(again, encode)(SENTENCES) - getattr(encoder, encode)(SENTENCES)).max() < 1e-6


def test_int8_leaves_the_head_exact(tmp_path):
    sparse_encoder(tmp_path, {"transform": "mlm"}).save(tmp_path / "model")
    exact, coded = openembed.load(tmp_path / "model"), openembed.load(tmp_path / "model", dtype="int8")
    assert coded.computed_in == "int8"
    assert coded.head.dense.weight.dtype == torch.float32
    assert not getattr(coded.head.dense, "int8", False)
    difference = abs(exact.encode_documents(SENTENCES) - coded.encode_documents(SENTENCES)).max()
    assert 0 < difference < 0.6, "of weights up to 1.9 from random layers"


def test_a_model_in_int8_multiplies_by_its_vocabulary_in_bfloat16(tmp_path):
    sparse_encoder(tmp_path).save(tmp_path / "model")
    exact, coded = (openembed.load(tmp_path / "model", dtype=dtype) for dtype in (None, "int8"))
    packed = pack(exact.tokenize(SENTENCES * 8))
    hidden_TD = torch.randn(len(packed.ids_T), exact.head.output_VD.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights, rough = exact.head(hidden_TD, packed), coded.head(hidden_TD, packed)
    torch.testing.assert_close(rough, weights, atol=0.03, rtol=0.03)
    assert torch.equal(rough, weights) != kernels.serves(hidden_TD, exact.head.output_VD, torch.bfloat16)


def test_widths_that_do_not_fit_are_refused(tmp_path):
    parts = {
        "backbone": {"architecture": {"model_type": "electra", "embedding_size": 16, "hidden_size": 32, "vocab_size": 230}}
    }
    with pytest.raises(ValueError, match="transform = 'mlm'"):
        sparse_encoder(tmp_path, **parts)


def test_a_tokenizer_of_its_own_is_not_needed_to_tell_words():
    tokenizer = text_tokenizer()
    assert not excluded_tokens(tokenizer, tokenizer.vocabulary)[tokenizer.backend.token_to_id("the")]
