import copy

import pytest
import torch
from torch import nn

import openembed
from openembed.backbones.prepacked import LinearGelu, PrepackedLinear, available, prepack

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no prepared oneDNN kernels")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8, bias=False))


def test_prepared_layers_give_the_same_numbers_and_follow_their_weights():
    plain = layers()
    prepared = copy.deepcopy(plain)
    prepack(prepared)
    assert isinstance(prepared[0], PrepackedLinear)
    assert list(prepared.state_dict()) == list(plain.state_dict())
    x = torch.randn(64, 24)
    with torch.inference_mode():
        torch.testing.assert_close(prepared(x), plain(x), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for model in (plain, prepared):
            model[0].weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(prepared(x), plain(x), atol=1e-5, rtol=1e-5)


def test_gradients_other_precisions_and_copies_take_the_plain_path():
    plain, prepared = layers(), layers()
    prepack(prepared)
    x = torch.randn(64, 24)
    for model in (plain, prepared):
        model(x).sum().backward()
    torch.testing.assert_close(prepared[0].weight.grad, plain[0].weight.grad)
    with torch.inference_mode():
        prepared(x)
        half = copy.deepcopy(prepared).bfloat16()
        assert half(x.bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert prepared(x).dtype == torch.bfloat16


def test_bert_layers_activate_inside_the_kernel(minilm_dir):
    encoder = openembed.load(minilm_dir)
    fused = [m for m in encoder.modules() if isinstance(m, LinearGelu)]
    assert len(fused) == 6
    x = torch.randn(32, 384)
    with torch.inference_mode():
        inside = fused[0](x)
    torch.testing.assert_close(inside, torch.nn.functional.gelu(fused[0].dense(x)).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused[0](x).detach(), inside, atol=1e-5, rtol=1e-5)


def test_an_adapter_in_the_place_of_the_linear_layer_still_runs(minilm_dir):
    from openembed.backbones.adapters import LoraConfig, add_lora, merge_lora

    encoder = openembed.load(minilm_dir)
    before = encoder.encode(["a text"])
    add_lora(encoder.backbone.model, LoraConfig())
    adapted = encoder.encode(["a text"])
    merge_lora(encoder.backbone.model)
    for values in (adapted, encoder.encode(["a text"])):
        assert abs(values - before).max() < 1e-5


def test_tanh_gelu_is_left_alone():
    class Intermediate(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.dense, self.intermediate_act_fn = nn.Linear(8, 8), act

    for act, expected in ((nn.GELU(), LinearGelu), (nn.GELU(approximate="tanh"), Intermediate), (nn.ReLU(), Intermediate)):
        holder = nn.ModuleDict({"layer": Intermediate(act)})
        prepack(holder)
        assert type(holder["layer"]) is expected


def test_weights_that_come_and_go_in_the_same_memory_are_not_kept():
    prepared = layers()
    prepack(prepared)
    prepared[0].keeps_copy = False
    x = torch.randn(64, 24)
    with torch.inference_mode():
        before = prepared[0](x)
        prepared[0].weight.data.mul_(2)  # as fsdp does: neither address nor version tell
        prepared[0].bias.data.mul_(2)
        torch.testing.assert_close(prepared[0](x), before * 2)
