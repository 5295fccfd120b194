"""Every head: alone = packed, excluded tokens do not matter, every parameter gets a finite gradient, save and load."""

import io
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vocabulary import text_tokenizer

from openembed.heads import (
    ClsConfig,
    ConcatConfig,
    HeadConfig,
    LastTokenConfig,
    LatentAttentionConfig,
    MaxConfig,
    MeanConfig,
    MeanSqrtConfig,
    SelfAttentionConfig,
    SpladeConfig,
    TokenProjectionConfig,
    WeightedMeanConfig,
)
from openembed.packing import TokenRows, pack

WIDTH, TOKENIZER = 8, text_tokenizer()
EMBEDDINGS = SimpleNamespace(model=nn.Module(), precision="exact")
EMBEDDINGS.model.get_input_embeddings = lambda table=nn.Embedding(TOKENIZER.vocabulary, WIDTH): table
HEADS = [
    MeanConfig(),
    WeightedMeanConfig(),
    LastTokenConfig(),
    ClsConfig(),
    MaxConfig(),
    MeanSqrtConfig(),
    ConcatConfig(parts=("cls", "mean", "max")),
    LatentAttentionConfig(latents=5, heads=2, head_width=6),
    LatentAttentionConfig(latents=5, heads=2, variant="paper"),
    SelfAttentionConfig(heads=2),
    TokenProjectionConfig(width=5),
    TokenProjectionConfig(width=5, bias=True, before=[{"width": 6, "activation": "gelu"}], normalize=False, skip=("3", "4")),
    TokenProjectionConfig(width=5, pool={"kind": "clusters", "documents": 3}),
    TokenProjectionConfig(width=5, pool={"kind": "tail", "documents": 0.5}),
    TokenProjectionConfig(width=5, pool={"kind": "spacing", "documents": 2}),
    SpladeConfig(),
    SpladeConfig(transform="mlm", tied=False, activation="log1p_log1p_relu", offset=0.1),
    SpladeConfig(transform="norm", bias=False, activation="elu1p", document={"top_k": 7, "keep_own": True}),
    SpladeConfig(pooling="sum"),
]
POOLED = [HEADS[0], HEADS[1], HEADS[4], HEADS[5], HEADS[7], HEADS[8], *HEADS[10:]]
every_head = pytest.mark.parametrize(
    "config", HEADS, ids=lambda c: f"{c.kind}-{getattr(c, 'variant', getattr(c, 'activation', ''))}"
)


def test_every_kind_of_head_is_tested_here():
    assert {type(config) for config in HEADS} == set(get_args(get_args(HeadConfig)[0]))


class Numbers:
    """A tokenizer whose tokens are numbers."""

    backend = SimpleNamespace(token_to_id=int)


def make(config, seed=0):
    torch.manual_seed(seed)
    head = config.build(WIDTH)
    if hasattr(head, "attach"):
        head.attach(EMBEDDINGS, Numbers if head.kind == "tokens" else TOKENIZER)
    return head.eval()


def token_rows(lengths, starts):
    return TokenRows([np.arange(n, dtype=np.int32) for n in lengths], np.array(starts, dtype=np.int32))


def layout(lengths, starts):
    return pack(token_rows(lengths, starts))


@st.composite
def texts(draw):
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    return lengths, [draw(st.integers(0, n - 1)) for n in lengths], draw(st.integers(0, 99))


@every_head
@settings(max_examples=15, deadline=None)
@given(case=texts())
def test_packed_equals_alone(config, case):
    lengths, starts, seed = case
    head = make(config)
    hidden = torch.randn(sum(lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        together = head(hidden, layout(lengths, starts))
        pieces = hidden.split(lengths)
        alone = torch.cat([head(h, layout([len(h)], [s])) for h, s in zip(pieces, starts, strict=True)])
    rows = head.rows_of(token_rows(lengths, starts)).sum() if getattr(head, "kind", "") == "tokens" else len(lengths)
    assert together.shape == (rows, head.width)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", POOLED, ids=lambda c: c.kind)
def test_tokens_before_the_pool_start_do_not_matter(config):
    head, packed = make(config), layout([6, 4], [2, 1])
    hidden = torch.randn(10, WIDTH)
    changed = hidden.clone()
    changed[[0, 1, 6]] += 5.0
    with torch.inference_mode():
        torch.testing.assert_close(head(hidden, packed), head(changed, packed))


@every_head
def test_gradients_reach_every_parameter_and_are_finite(config):
    head = make(config).train()
    hidden = torch.randn(9, WIDTH, requires_grad=True)
    out = head(hidden, layout([4, 5], [1, 0]))
    (out * torch.randn_like(out)).sum().backward()
    assert hidden.grad.abs().sum() > 0
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@every_head
def test_saved_and_loaded_weights_give_the_same_vectors(config):
    head, other = make(config, 0), make(config, 1)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    hidden, packed = torch.randn(9, WIDTH), layout([4, 5], [1, 0])
    with torch.inference_mode():
        torch.testing.assert_close(head(hidden, packed), other(hidden, packed), atol=0, rtol=0)


def test_pooling_formulas_on_a_small_case():
    hidden = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, -4.0]])
    packed = layout([3], [1])
    expected = {
        MeanConfig: [4.0, -1.0],
        WeightedMeanConfig: [(2 * 3 + 3 * 5) / 5, (2 * 2 - 3 * 4) / 5],
        LastTokenConfig: [5.0, -4.0],
        ClsConfig: [1.0, 0.0],
        MaxConfig: [5.0, 2.0],
        MeanSqrtConfig: [8 / 2**0.5, -2 / 2**0.5],
    }
    for config, values in expected.items():
        torch.testing.assert_close(config().build(2)(hidden, packed), torch.tensor([values]))


def test_latent_attention_equals_its_equations():
    """The released block written out token by token and head by head (spec of NV-Embed, section 2.3)."""
    config = LatentAttentionConfig(latents=5, heads=2, head_width=6)
    head = make(config)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    hidden = torch.randn(4, WIDTH)
    key, value = (head.to_kv.weight @ head.norm_latents(head.latents).T).chunk(2)
    rows = []
    for x in hidden:
        q = head.to_q.weight @ head.norm(x)
        parts = []
        for h in range(2):
            piece = slice(6 * h, 6 * h + 6)
            parts.append(value[piece] @ torch.softmax(q[piece] @ key[piece] / 6**0.5, dim=0))
        y = head.to_out.weight @ torch.cat(parts) + x
        u = head.feed_forward.up(head.norm_feed_forward(y))
        gated = u[: len(u) // 2] * torch.nn.functional.gelu(u[len(u) // 2 :])
        rows.append(head.feed_forward.down(gated) + y)
    expected = torch.stack(rows)[1:].mean(0)
    torch.testing.assert_close(head(hidden, layout([4], [1]))[0], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 12), st.integers(0, 50))
def test_folded_latent_attention_equals_unfolded(latents, heads, head_width, seed):
    head = make(LatentAttentionConfig(latents=latents, heads=heads, head_width=head_width), seed)
    hidden, packed = torch.randn(7, WIDTH), layout([3, 4], [0, 2])
    with torch.enable_grad():
        unfolded = head(hidden, packed)
    with torch.inference_mode():
        folded = head(hidden, packed)
    torch.testing.assert_close(folded, unfolded, atol=1e-5, rtol=1e-5)


def test_folded_weights_follow_a_change_of_the_weights():
    head = make(LatentAttentionConfig(latents=5, heads=2))
    hidden, packed = torch.randn(7, WIDTH), layout([3, 4], [0, 2])
    with torch.inference_mode():
        before = head(hidden, packed)
    with torch.no_grad():
        head.to_q.weight.mul_(3.0)
    with torch.inference_mode():
        after = head(hidden, packed)
    assert (before - after).abs().max() > 1e-4
    torch.testing.assert_close(after, head(hidden, packed).detach(), atol=1e-5, rtol=1e-5)


def test_a_head_that_does_not_divide_the_width_is_refused():
    for config in (SelfAttentionConfig(heads=3), LatentAttentionConfig(heads=3, variant="paper")):
        with pytest.raises(ValueError, match="must divide"):
            config.build(WIDTH)
