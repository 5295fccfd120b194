"""The CPU training kernels against the plain path: forward and gradients, for any lengths, texts of one token included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from openembed.backbones import packed_kernel
from openembed.backbones.attention import Visibility, packed_attention
from openembed.backbones.prepacked import available
from openembed.backbones.training_linear import linear
from openembed.packing import TokenRows, pack


def one_by_one(query, key, value, lengths, causal, scale):
    """Softmax attention written out, text by text, query heads sharing key heads."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    pieces, start = [], 0
    for n in lengths:
        q, k, v = (x[:, start : start + n] for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        if causal:
            scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        pieces.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += n
    return torch.cat(pieces)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    causal=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
)
def test_packed_attention_in_training_equals_attention_written_out(lengths, causal, groups, scale):
    torch.manual_seed(sum(lengths))
    tokens = sum(lengths)
    packed = pack(TokenRows([np.arange(n) for n in lengths], np.zeros(len(lengths), dtype=np.int64)))
    leaves = [torch.randn(heads, tokens, 8, requires_grad=True) for heads in (4, 4 // groups, 4 // groups)]
    found = packed_attention(*leaves, packed.layout, Visibility(causal), scale=scale)
    expected = one_by_one(*leaves, lengths, causal, scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad((values * weights).sum(), leaves) for values in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the first pass of gradient caching
        torch.testing.assert_close(packed_attention(*leaves, packed.layout, Visibility(causal), scale=scale), found.detach())


def test_autocast_takes_queries_and_values_of_different_precision():
    torch.manual_seed(0)
    packed = pack(TokenRows([np.arange(n) for n in (5, 5, 1)], np.zeros(3, dtype=np.int64)))
    query, key = (torch.randn(2, 11, 8, requires_grad=True) for _ in range(2))
    value = torch.randn(2, 11, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_attention(query, key, value, packed.layout, Visibility(causal=False))
    assert found.dtype == torch.bfloat16
    expected = one_by_one(query, key, value.float(), (5, 5, 1), False, None)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert (query.grad.dtype, value.grad.dtype) == (torch.float32, torch.bfloat16)


def test_operations_keep_torchs_contract():
    """Fake tensors, autograd registration and schema as ``torch.compile`` relies on them."""
    offsets = torch.tensor([0, 3, 6, 7], dtype=torch.int32)
    heads = [torch.randn(2, 7, 8, requires_grad=True) for _ in range(3)]
    torch.library.opcheck(packed_kernel._forward, (*heads, offsets, True, 0.3), atol=1e-5, rtol=1e-5)
    if available():
        x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((6, 5), (4, 5), (4,)))
        torch.library.opcheck(linear, (x, weight, bias), atol=1e-5, rtol=1e-5)
        torch.library.opcheck(linear, (x, weight, None), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not available(), reason="this torch has no oneDNN")
@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), outputs=st.integers(1, 9), biased=st.booleans())
def test_linear_equals_torchs(shape, outputs, biased):
    torch.manual_seed(outputs)
    x, weight = torch.randn(*shape, requires_grad=True), torch.randn(outputs, shape[-1], requires_grad=True)
    bias = torch.randn(outputs, requires_grad=True) if biased else None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    found, expected = linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(found)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
