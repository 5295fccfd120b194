"""Our C kernels against plain torch: linear layers, norms, codes and attention, at awkward sizes."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from openembed.kernels.calls import Codes, Heads, Norm, PackedLinear, attention, has_half, norm_rows, quantize, weight_codes
from openembed.kernels.library import library, missing

pytestmark = pytest.mark.skipif(library() is None, reason=f"no kernels here: {missing()}")

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(outputs, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator) * inputs**-0.5, torch.randn(outputs, generator=generator)


def decoded(codes):
    values = codes.scale_T[:, None] * (codes.codes_TK.float() - codes.zero_T[:, None])
    return values if codes.factors_K is None else values[:, : len(codes.factors_K)] / codes.factors_K


def sum_of_codes(codes, weight_NK):
    """What 8-bit products must give: exact integer sums, then scales."""
    weights, scale_N = weight_codes(weight_NK)
    signed = codes.codes_TK[:, : weight_NK.shape[1]].long() - codes.zero_T[:, None].long()
    return (signed @ weights.long().T).double() * codes.scale_T[:, None].double() * scale_N.double()


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 48, 101])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 64), (32, 48), (50, 130), (384, 384), (3, 5)])
def test_float32_products_are_those_of_torch(rows, inputs, outputs):
    weight, bias = layer(outputs, inputs)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1))
    packed = PackedLinear(weight, bias, int8=False)
    torch.testing.assert_close(packed.store(x)[:, :outputs], F.linear(x, weight, bias), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
def test_activations_and_gates(activation, gated):
    weight, bias = layer(2 * 70 if gated else 70, 40)
    x = 3 * torch.randn(29, 40)
    y = F.linear(x, weight, bias)
    function = ACTIVATIONS[activation]
    expected = function(y[:, :70]) * y[:, 70:] if gated else function(y)
    exact = PackedLinear(weight, bias, int8=False, activation=activation, gated=gated)
    torch.testing.assert_close(exact.store(x)[:, :70], expected, atol=5e-6, rtol=1e-5)
    coded = PackedLinear(weight, bias, int8=True, activation=activation, gated=gated)
    found = decoded(coded.codes(quantize(x)))[:, :70]
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 64), (13, 50, 130), (200, 384, 100), (7, 3, 5)])
def test_int8_products_are_exact_sums_of_codes(rows, inputs, outputs):
    weight, bias = layer(outputs, inputs)
    codes = quantize(torch.randn(rows, inputs) * torch.rand(rows, 1) * 50)
    found = PackedLinear(weight, bias, int8=True).store(codes)[:, :outputs]
    torch.testing.assert_close(found.double(), sum_of_codes(codes, weight) + bias, atol=1e-4, rtol=1e-5)


def test_int8_sums_do_not_overflow_or_saturate():
    weight, x = torch.ones(64, 16384), torch.full((2, 16384), 3.0)
    weight[1::2] = -1
    found = PackedLinear(weight, None, int8=True).store(quantize(x))
    torch.testing.assert_close(found, F.linear(x, weight), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 20), torch.full((2, 7), 5.0), torch.full((2, 33), -4.0), 1e6 * torch.randn(4, 64)]
)
def test_codes_are_within_half_a_step(x):
    codes = quantize(x)
    assert ((decoded(codes)[:, : x.shape[1]] - x).abs() <= codes.scale_T[:, None] * 0.5001).all()
    assert ((codes.zero_T >= 0) & (codes.zero_T <= 255)).all()


def test_factors_even_inputs_and_weights_out():
    weight, bias = layer(64, 96)
    sizes = torch.ones(96)
    sizes[::17] = 60
    x = torch.randn(300, 96) * sizes
    expected = F.linear(x, weight, bias)
    errors = []
    for given in (None, sizes):
        packed = PackedLinear(weight, bias, int8=True, sizes_K=given)
        errors.append(float((packed.store(quantize(x, packed.factors_K))[:, :64] - expected).norm()))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("width", [16, 33, 384])
@pytest.mark.parametrize("centred", [True, False])
def test_norms(width, centred):
    x, gain, bias = 4 * torch.randn(9, width) + 1, torch.rand(width), torch.randn(width)
    norm = Norm(gain, bias if centred else None, 1e-5, centred)
    expected = F.layer_norm(x, (width,), gain, bias, 1e-5) if centred else F.rms_norm(x, (width,), gain, 1e-5)
    plain, coded = PackedLinear(*layer(8, width), int8=False), PackedLinear(*layer(8, width), int8=True)
    torch.testing.assert_close(norm_rows(x, norm, (plain,))[0], expected, atol=1e-5, rtol=1e-5)
    first, second = norm_rows(x, norm, (coded, coded))
    for codes in (first, second):
        assert ((decoded(codes)[:, :width] - expected).abs() <= codes.scale_T[:, None] * 0.51).all()


@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("int8", [True, False])
def test_residual_sum_and_norm_ride_on_the_product(post_norm, int8):
    weight, bias = layer(80, 48)
    x, stream, gain = torch.randn(101, 48), torch.randn(101, 80), torch.rand(80)
    packed, then = PackedLinear(weight, bias, int8=int8), PackedLinear(*layer(8, 80), int8=int8)
    rows = quantize(x) if int8 else x
    summed = stream + packed.store(rows)[:, :80]
    normed = F.layer_norm(summed, (80,), gain, None, 1e-6)
    kept = stream.clone()
    (found,) = packed.add_norm(rows, kept, Norm(gain, None, 1e-6, True), (then,), post_norm=post_norm)
    torch.testing.assert_close(kept, normed if post_norm else summed, atol=1e-5, rtol=1e-5)
    if int8:
        assert isinstance(found, Codes)
        assert ((decoded(found)[:, :80] - normed).abs() <= found.scale_T[:, None] * 0.51).all()
    else:
        torch.testing.assert_close(found, normed, atol=1e-5, rtol=1e-5)


def attend(qkv, lengths, heads, causal):
    """torch's own attention, text by text."""
    pieces, h, g, d = [], heads.heads, heads.groups, heads.width
    for part in qkv.split(lengths):
        query, key, value = (x.view(len(part), -1, d).transpose(0, 1) for x in part.split([h * d, g * d, g * d], 1))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=heads.scale, enable_gqa=h != g)
        pieces.append(out.transpose(0, 1).reshape(len(part), -1))
    return torch.cat(pieces)


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width"), [(2, 2, 16), (4, 2, 32), (3, 1, 48), (2, 1, 80), (2, 2, 128)])
@pytest.mark.parametrize("lengths", [[1], [2, 1, 5], [16, 17, 64, 65], [131, 3]])
def test_attention_is_that_of_torch(heads, groups, width, lengths, causal):
    shape = Heads(heads, groups, width, width**-0.5)
    qkv = torch.randn(sum(lengths), (heads + 2 * groups) * width)
    expected = attend(qkv, lengths, shape, causal)
    found = attention(qkv, offsets(lengths), shape, causal=causal, half=False, rotary=None)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if has_half():
        rough = attention(qkv, offsets(lengths), shape, causal=causal, half=True, rotary=None)
        assert (rough - expected).norm() < 0.02 * expected.norm()


def test_attention_survives_large_scores():
    shape = Heads(1, 1, 16, 1.0)
    qkv = 60 * torch.randn(40, 48)
    found = attention(qkv, offsets([40]), shape, causal=False, half=False, rotary=None)
    torch.testing.assert_close(found, attend(qkv, [40], shape, False), atol=1e-3, rtol=1e-4)


def test_a_text_does_not_depend_on_its_neighbours_to_the_bit():
    shape, lengths = Heads(2, 1, 32, 0.2), [7, 30, 1, 90, 12]
    qkv = torch.randn(sum(lengths), 4 * 32)
    whole = attention(qkv, offsets(lengths), shape, causal=False, half=True, rotary=None).split(lengths)
    for part, alone in zip(qkv.split(lengths), whole, strict=True):
        assert torch.equal(
            attention(part.contiguous(), offsets([len(part)]), shape, causal=False, half=True, rotary=None), alone
        )


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"OPENEMBED_KERNELS": "off"}, "OPENEMBED_KERNELS=off"),
        ({"CC": "/nonexistent/cc"}, "/nonexistent/cc"),
        ({"CC": "/bin/false"}, "/bin/false could not make encode"),
        ({"CC": "", "PATH": "/nonexistent"}, "no C compiler"),
    ],
)
def test_without_kernels_the_reason_is_known(environment, said, tmp_path):
    code = "from openembed.kernels.library import library, missing\nassert library() is None\nprint(missing())"
    done = run(code, XDG_CACHE_HOME=str(tmp_path), **environment)
    assert said in done.stdout, done.stdout + done.stderr


def test_the_library_is_compiled_once_and_into_no_folder_of_others(tmp_path):
    code = "from openembed.kernels.library import library\nprint(library()._name)"
    first, second = (run(code, XDG_CACHE_HOME=str(tmp_path)).stdout.strip() for _ in range(2))
    assert first == second
    assert first.startswith(str(tmp_path))
    assert len(list((tmp_path / "openembed").iterdir())) == 1
    (tmp_path / "openembed").chmod(0o777)
    assert not run(code, XDG_CACHE_HOME=str(tmp_path)).stdout.startswith(str(tmp_path))


@pytest.mark.parametrize("damage", ["empty", "header", "half", "last byte", "other bytes"])
def test_a_damaged_library_is_compiled_anew(damage, tmp_path):
    code = "from openembed.kernels.library import library\nprint(library()._name, library().oe_has_half() in (0, 1))"
    first = run(code, XDG_CACHE_HOME=str(tmp_path))
    (path,) = (tmp_path / "openembed").iterdir()
    whole = path.read_bytes()
    half = len(whole) // 2
    damaged = {"empty": b"", "header": whole[:100], "half": whole[:half], "last byte": whole[:-1]}
    path.write_bytes(damaged.get(damage, whole[:half] + bytes(64) + whole[half + 64 :]))
    again = run(code, XDG_CACHE_HOME=str(tmp_path))
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert f"{path} cannot be loaded" in again.stderr
    assert path.read_bytes() == whole
    assert list((tmp_path / "openembed").iterdir()) == [path]
    assert run(code, XDG_CACHE_HOME=str(tmp_path)).stderr == ""


def test_a_library_that_loads_nowhere_is_told_once_and_torch_serves(tmp_path):
    (tmp_path / "cc").write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit\nwhile [ $1 != -o ]; do shift; done\necho made >> $0.log\necho wrong > $2\n"
    )
    (tmp_path / "cc").chmod(0o755)
    code = "from openembed.kernels.library import library, missing\nassert library() is None\nprint(missing())"
    for _ in range(2):
        done = run(code, CC=str(tmp_path / "cc"), XDG_CACHE_HOME=str(tmp_path))
        assert "could not make encode" in done.stdout, done.stderr
        assert done.stderr.count("slower code without it serves") == 1
    assert (tmp_path / "cc.log").read_text() == "made\n" * 2  # once a process


def test_long_texts_stay_exact():
    shape = Heads(1, 1, 16, 0.25)
    qkv = torch.cat([torch.zeros(9000, 16), torch.randn(9000, 16), 1.1 + 0.01 * torch.randn(9000, 16)], 1)
    found = attention(qkv, offsets([9000]), shape, causal=False, half=False, rotary=None)
    torch.testing.assert_close(found[0], qkv[:, 32:].double().mean(0).float(), atol=0, rtol=4e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 5, 39])
def test_what_is_not_finite_never_becomes_a_number(wrong, place):
    x = torch.randn(7, 40)
    x[3, place] = wrong
    found = PackedLinear(*layer(70, 40), int8=True).store(quantize(x))[:, :70]
    assert found[3].isnan().all()
    assert found[[0, 1, 2, 4, 5, 6]].isfinite().all()


def test_threads_that_end_give_their_memory_back():
    import threading

    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    shape, qkv = Heads(12, 12, 32, 0.2), torch.randn(1024, 1152)

    def work():
        attention(qkv, offsets([512, 512]), shape, causal=False, half=False, rotary=None)

    def many(count):
        for _ in range(count):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return resident()

    before = many(8)
    assert many(24) - before < 60e6
